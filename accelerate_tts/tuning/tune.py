"""Try each stage on each part with the part's own inputs; keep what is faster and right; say so in a receipt.

The one rule: whatever goes wrong in here, the object that leaves is at least as good as the one that came. A stage
that raises, compiles nothing, is slower, cannot be told from noise or computes something else is switched off again.
"""

from __future__ import annotations

import math
import platform
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from accelerate_tts._version import __version__
from accelerate_tts.events import BudgetTooSmall, FellBack, NotApplied, Tuned, TunedUnderLoad, WarmupFailed, emit
from accelerate_tts.plan import PROCESS, Part
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.runtime.guard.guard import listening
from accelerate_tts.tuning.capture import calls_of, time_modules, watch
from accelerate_tts.tuning.compare import TOLERANCES
from accelerate_tts.tuning.disturbance import Watcher
from accelerate_tts.tuning.end_to_end import WHOLE_PASSES, check_whole, finish
from accelerate_tts.tuning.linear_profile import linear_work
from accelerate_tts.tuning.policy import OVER_BUDGET, TuningPolicy, current_policy
from accelerate_tts.tuning.session import Session, switch_off
from accelerate_tts.tuning.timing import WORTH_A_SECOND_LOOK, synchronize
from accelerate_tts.tuning.trial import try_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.patching.lazy_parameters import LetGo
    from accelerate_tts.plan import ModelPlan
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.runtime.guard.checks import Expectation
    from accelerate_tts.settings import Precision
    from accelerate_tts.stages.protocol import Change, Stage
    from accelerate_tts.tuning.session import Kept
    from accelerate_tts.tuning.warmup import WarmupCalls

# Passes of a budget that two at the start leave room for: to try something, and to check the whole.
_FIRST_PASSES = 4

__all__ = ["Limits", "Tuning", "acts_in_training", "begin", "recompile_counter", "tune", "versions", "warn_of_training"]


@dataclass(frozen=True)
class Tuning:
    """A finished tuning: its receipt and the changes in force.

    Attributes:
        receipt: What was tried, and what came of it.
        changes: What is in force.
        complete: False if the warm-up failed, or there was none: it may be tried again.
        kept: The changes again, with the part and the stage of each.
        parts: What the model was divided into.
        expected: What the untouched object's `@inference` functions gave for the warm-up.
        let_go: Weights that are away while copies serve, where `guard_weights` says so.
    """

    receipt: Receipt
    changes: tuple[Change, ...] = ()
    complete: bool = False
    kept: tuple[Kept, ...] = ()
    parts: tuple[Part, ...] = ()
    expected: Mapping[str, Expectation] = field(default_factory=dict)
    let_go: LetGo | None = None

    def undo(self) -> None:
        """Put the object back exactly as it was loaded.

        Raises:
            ReloadError: Its weights were let go, and cannot be loaded again; nothing is changed then.
        """
        self.keep_loaded()
        switch_off(reversed(self.changes))

    def on(self) -> None:
        """Put every change of the object in force again."""
        for change in self._of_object():
            change.on()

    def off(self) -> None:
        """Put the object back for a while. What was changed of the process computes the same, and stays.

        The caller has the loaded weights `at_hand` until everything is `on` again.
        """
        switch_off(reversed(self._of_object()))

    def at_hand(self) -> object:
        """Have the loaded weights, for as long as what is returned lives. That may take as long as the load did.

        Raises:
            ReloadError: As for `undo`.
        """
        return None if self.let_go is None else self.let_go.at_hand()

    def keep_loaded(self) -> None:
        """Have the loaded weights from now on.

        Raises:
            ReloadError: As for `undo`.
        """
        if self.let_go is not None:
            self.let_go.stay()

    def put_back(self) -> Receipt:
        """The receipt as it is after the guard has put the object back for good."""
        reason = "put back by the guard, after faulty output in service"
        stages = (s.dropped(reason) if s.kept and s.part != PROCESS else s for s in self.receipt.stages)
        return replace(self.receipt, stages=tuple(stages), notes=(*self.receipt.notes, reason))

    def _of_object(self) -> list[Change]:
        of_process = {id(kept.change) for kept in self.kept if kept.part == PROCESS}
        return [change for change in self.changes if id(change) not in of_process]


@dataclass(frozen=True)
class Limits:
    """When tuning stops.

    Attributes:
        seconds: The budget; no further stage is begun after it, and one that ran over it is given up.
        precision: What may be changed, and by how much.
        stopped: Asked before each stage; once it is true, everything is undone.
        policy: How it is decided.
        began: Told what is being tuned, before anything is changed.
    """

    seconds: float
    precision: Precision = "exact"
    stopped: Callable[[], bool] = lambda: False
    policy: TuningPolicy = field(default_factory=current_policy)
    began: Callable[[Session], object] = bool


def begin(
    plan: ModelPlan, calls: WarmupCalls, device: DeviceInfo, limits: Limits, known: Sequence[StageResult] = ()
) -> Session:
    """A tuning that begins now; see `tune`."""
    import torch

    policy = limits.policy
    watcher = Watcher(policy.machine(), torch.get_num_threads(), min(policy.patience, limits.seconds / 4))
    verdicts = {(result.part, result.stage): result for result in known}
    deadline = policy.clock() + limits.seconds
    session = Session(
        plan, calls, device, limits.seconds, deadline, TOLERANCES[limits.precision], policy, watcher, verdicts
    )
    limits.began(session)
    return session


def tune(  # noqa: PLR0913, PLR0917 - what a tuning consists of
    plan: ModelPlan,
    calls: WarmupCalls,
    stages: Sequence[Stage],
    device: DeviceInfo,
    limits: Limits,
    known: Sequence[StageResult] = (),
) -> Tuning:
    """Optimise a loaded object in place.

    Args:
        plan: Its parts.
        calls: Warm-up calls through the path that service calls will take.
        stages: What to try, in order.
        device: Where it runs.
        limits: When to stop.
        known: Verdicts of an earlier tuning that stand: these changes are compared, but not timed again.

    Returns:
        The receipt and the changes in force. An exception of a warm-up call becomes a `WarmupFailed` event and a
        receipt that says so; the object is then untouched.
    """
    clock = limits.policy.clock
    start = clock()
    empty = Receipt(plan.what, f"{device.kind} ({device.name})", versions(), precision=limits.precision)
    if not calls.main:
        note = "no warmup= was given: nothing can be verified, so nothing was changed"
        return Tuning(replace(empty, notes=(note,)))
    session = begin(plan, calls, device, limits, known)
    if acts_in_training(plan):
        session.notes.append(warn_of_training(plan))
    try:
        cold, reference = _first_passes(session)
    except Exception as error:  # the user's own warm-up; the model was loaded, and that is not thrown away
        reason = f"{type(error).__name__}: {error}"
        emit(WarmupFailed(plan.what, reason))
        seconds = clock() - start
        return Tuning(replace(empty, notes=(f"the warm-up failed: {reason}",), seconds=seconds))
    try:
        for part, stage in _in_order(session, stages):
            if limits.stopped():
                return _given_up(session, empty, "the load was cancelled", start)
            try_stage(session, part, stage)
        _look_again(session, stages, limits)
        timing, difference = check_whole(session, reference)
        finish(session)
        _say_how_sure(session)
        _say_what_was_missed(session)
    except Exception as error:  # the user's model raised in a later pass; what was loaded is not thrown away
        return _given_up(session, empty, f"{type(error).__name__}: {error}", start)
    except BaseException:  # Ctrl-C, SIGTERM's SystemExit: leave no half-tuned model behind
        session.off()
        raise
    changes = tuple(kept.change for kept in session.kept)
    receipt = replace(
        empty,
        stages=_by_part(session),
        cold=cold,
        before=timing.before,
        after=timing.after,
        ratio=timing.ratio,
        error=None if difference is None else difference.error,
        spectral=None if difference is None else difference.spectral,
        seconds=clock() - start,
        notes=tuple(session.notes),
        _live=recompile_counter(changes),
    )
    emit(Tuned(plan.what, len(receipt.kept), len(receipt.stages), receipt.ratio, receipt.seconds))
    kept = tuple(session.kept)
    return Tuning(receipt, changes, complete=True, kept=kept, parts=session.plan.parts, expected=session.heard)


def acts_in_training(plan: ModelPlan) -> bool:
    """Whether a module computes something else in train mode, and is in it."""
    return any(_acts_in_training(module) for root in plan.roots for module in root.modules())


def warn_of_training(plan: ModelPlan) -> str:
    """Say that a module is in train mode, as an event and as a note."""
    why = "a module is in train mode, where dropout and batch statistics are on; call .eval() on it in the load"
    emit(NotApplied(f"tuning of {plan.what} for inference", why))
    return why


def _acts_in_training(module: Any) -> bool:
    from torch import nn

    if not module.training:
        return False
    drops = any(getattr(module, name, 0) for name in ("p", "dropout", "drop_prob") if _is_number(module, name))
    return drops or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _is_number(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), (int, float))


def _in_order(session: Session, stages: Sequence[Stage]) -> Iterator[tuple[Part, Stage]]:
    """What is tried on the process as a whole comes first: it disturbs every later comparison.

    Then all that is tried quickly, and then the rest: the budget that a compilation of one part takes must not be
    missing for the fold of another one. Of each, parts come in the order of the time that is spent in them. On a part
    the order of the stages stands, since what comes later is built on what was kept before.
    """
    plan, costly = session.plan, session.policy.costly
    for stage in stages:
        if stage.process and plan.roots:
            yield Part(PROCESS, "process", plan.roots[0]), stage
    parts = sorted(plan.parts, key=session.share, reverse=True)
    for late in (False, True):
        for part in parts:
            for stage in stages:
                if not stage.process and (stage.cost_of(part) >= costly) is late:
                    yield part, stage


def _look_again(session: Session, stages: Sequence[Stage], limits: Limits) -> None:
    """Try once more, on top of what was kept, what could not be told from noise, or was dropped beside others' work.

    On a machine with neighbours such verdicts come by chance, and may cost what is built on them: of a vocoder in half
    precision, over a layout that was not kept, half of the gain. What compiled is not compiled again.
    """
    named = {stage.name: stage for stage in stages}
    parts = {part.name: part for part in session.plan.parts}
    for result in [result for result in session.results if _is_undecided(result)]:
        part, stage = parts.get(result.part), named.get(result.stage)
        if any(kept.part == result.part and kept.change.graphs for kept in session.kept):
            continue  # what was compiled would be compiled anew, with this in it
        if part is None or stage is None or limits.stopped() or not (result.sure or session.watcher.look().quiet):
            continue
        session.results.remove(result)
        before = len(session.results)
        try_stage(session, part, stage)
        if len(session.results) == before:
            session.results.append(result)
        elif session.results[-1].ratio is None:  # there was no time for it, so the first verdict stands
            session.results[-1] = result


def _is_undecided(result: StageResult) -> bool:
    if result.kept or result.graphs is not None:
        return False
    if result.ratio is None or result.low is None:
        return not result.sure
    return not result.sure or (result.ratio >= WORTH_A_SECOND_LOOK and result.low <= 1.0)


def _say_how_sure(session: Session) -> None:
    """Say on the receipt, and in an event, what was decided beside others' work."""
    watcher = session.watcher
    unsure = sum(not result.sure for result in session.results)
    if watcher.waited:
        session.notes.append(f"waited {watcher.waited:.1f} s for a quiet machine")
    if unsure:
        who = watcher.worst.why or "other threads drew random numbers"
        why = f"{who}; {unsure} of {len(session.results)} verdicts are not sure"
        session.notes.append(f"tuned beside others' work: {why}, and the next load from a warm pack tries them again")
        emit(TunedUnderLoad(session.plan.what, who, unsure, len(session.results)))


def _say_what_was_missed(session: Session) -> None:
    """Name the budget that the most promising of what there was no time for would want."""
    for gain, part, stage, wanted in sorted(session.unmet, reverse=True)[:1]:
        if gain > 0:
            emit(BudgetTooSmall(f"{session.plan.what}: {part}", stage, session.budget, float(math.ceil(wanted))))
            session.notes.append(f"{stage} of {part} is promising, and wants a budget of about {math.ceil(wanted)} s")


def _by_part(session: Session) -> tuple[StageResult, ...]:
    """What came of the trials, part by part, for people."""
    order = {name: number for number, name in enumerate((PROCESS, *(part.name for part in session.plan.parts)))}
    return tuple(sorted(session.results, key=lambda result: order.get(result.part, len(order))))


def _given_up(session: Session, empty: Receipt, reason: str, start: float) -> Tuning:
    session.drop(reason)
    emit(FellBack(session.plan.what, "everything", reason))
    seconds = session.policy.clock() - start
    return Tuning(replace(empty, stages=_by_part(session), notes=(f"tuning was given up: {reason}",), seconds=seconds))


def versions() -> dict[str, str]:
    """The versions that a receipt names."""
    import torch

    return {"accelerate_tts": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _first_passes(session: Session) -> tuple[float, list[Any]]:
    """The cold pass, and a warm one that is the reference and shows each part's inputs.

    Where passes take so long that nothing could be tried after two of them, the cold one is the reference, too.
    """
    clock = session.policy.clock
    start = clock()
    reference: list[Any] | None = None
    with session.finding_draws():
        if session.plan.refine is None:
            first = reference = _recorded_pass(session)
        else:
            with time_modules(session.plan.roots, session.device.type) as seconds:
                first = session.run()
            session.plan = replace(session.plan, parts=session.plan.refine(seconds), refine=None)
        synchronize(session.device.type)
    cold = clock() - start
    if not session.draws_found(first):
        reference = None
    if reference is None or _FIRST_PASSES * cold <= session.budget:
        session.captured = {}  # first: it has copies of what the parts were given
        reference = _recorded_pass(session)
    else:
        session.notes.append(f"the first pass is what all is compared with, for {OVER_BUDGET} allows no other")
    left = max(0.0, session.deadline - clock())
    session.reserved = min(WHOLE_PASSES * session.pass_seconds, left / 3)
    return cold, reference


def _recorded_pass(session: Session) -> list[Any]:
    """A pass that shows each part's inputs, and what is to come of them."""
    clock = session.policy.clock
    with (
        session.watcher.window() as window,
        watch(session.plan.parts, session.device.type) as session.captured,
        calls_of(session.plan.roots) as session.called,
        linear_work(session.plan.roots) as work,
        listening() as listener,
        session.constants.watching(),
    ):
        start = clock()
        reference = session.run()
        session.pass_seconds = clock() - start
    session.heard, session.pass_quiet = listener.expected, window.disturbance.quiet
    parts = tuple(
        replace(
            session.with_head(part),
            cached=session.captured[part.name].cached,
            few_rows=work.share_of_few(part.module),
        )
        for part in session.plan.parts
    )
    session.plan = replace(session.plan, parts=parts)
    return reference


def recompile_counter(changes: Sequence[Change]) -> Callable[[], int]:
    """A function that counts the graphs compiled since now. Holds the changes weakly."""
    # Weakly: a receipt that somebody keeps must not keep the model's weights.
    known = [weakref.ref(change) for change in changes if change.graphs is not None]
    sealed = sum(change.graphs or 0 for change in changes)

    def count() -> int:
        alive = [change for reference in known if (change := reference()) is not None]
        return max(0, sum(change.graphs or 0 for change in alive) - sealed)

    return count
