"""Try each stage on each part with the part's own inputs; keep what is faster and right; say so in a receipt.

The one rule: whatever goes wrong in here, the object that leaves is at least as good as the one that came. A stage
that raises, compiles nothing, is slower, cannot be told from noise or computes something else is switched off again.
"""

from __future__ import annotations

import math
import platform
import time
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from accelerate_tts._version import __version__
from accelerate_tts.engine.capture import outputs_of, time_modules, watch
from accelerate_tts.engine.measure import Timing, compare_speed, synchronize
from accelerate_tts.engine.random_state import seeded
from accelerate_tts.engine.receipt import Receipt, StageResult
from accelerate_tts.engine.verify import EXACT_TOLERANCE, NOTHING_TO_COMPARE, Difference, compare
from accelerate_tts.events import FellBack, NotApplied, Trying, Tuned, WarmupFailed, emit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.engine.capture import Captured
    from accelerate_tts.engine.plan import ModelPlan, Part
    from accelerate_tts.engine.stages import Change, Stage
    from accelerate_tts.engine.warmup import WarmupCall

__all__ = ["MARGIN", "Limits", "Tuning", "tune"]

MARGIN = 1.02
"""A stage must be faster by this factor. Less is not worth a receipt's line, nor a dependency on a compiler."""

# The parts' own comparisons were sharper than one of the whole can be: a gain of 10 % on 5 % of the time drowns in its
# noise. So the whole must be slower beyond doubt, or by this much, before all is undone.
_WORST_TOTAL = 0.95

# Seconds for one comparison of speeds; compare_speed stretches them to at least five pairs.
_COMPARISON = 2.0
_WHOLE_COMPARISON = 6.0
_FEWEST, _FEWEST_LATE = 5, 3


@dataclass(frozen=True)
class Tuning:
    """A finished tuning: its receipt and the changes in force.

    One that is not complete (the warm-up failed, or there was none) may be tried again.
    """

    receipt: Receipt
    changes: tuple[Change, ...] = ()
    complete: bool = False

    def undo(self) -> None:
        """Put the object back exactly as it was loaded."""
        for change in reversed(self.changes):
            change.off()


@dataclass(frozen=True)
class Limits:
    """When tuning stops.

    Attributes:
        seconds: The budget; no further stage is begun after it.
        stopped: Asked before each stage; once it is true, everything is undone.
    """

    seconds: float
    stopped: Callable[[], bool] = lambda: False


@dataclass
class _Session:
    plan: ModelPlan
    calls: Sequence[WarmupCall]
    device: DeviceInfo
    deadline: float
    captured: dict[str, Captured] = field(default_factory=dict)
    results: list[StageResult] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> list[Any]:
        """One warm-up pass through the public path, with the same random numbers every time."""
        with seeded(self.device.type):
            return [call.run() for call in self.calls]

    def run_variants(self) -> None:
        """The pass once more, with the tensors as the other kind of caller makes them."""
        with seeded(self.device.type):
            for call in self.calls:
                if call.variant is not None:
                    call.variant()

    def replay(self, part: Part) -> list[Any]:
        """The part by itself on its captured inputs, or the whole pass where it cannot be run by itself."""
        captured = self.captured[part.name]
        if captured.obstacle or not captured.calls:
            return self.run()
        with seeded(self.device.type):
            return captured.replay(part.module)

    def outputs(self, part: Part) -> list[Any]:
        """What the part computes: of its replayed calls, or of its calls in a whole pass and that pass's own result."""
        if self.captured[part.name].calls:
            return self.replay(part)
        with outputs_of(part.module) as seen:
            whole = self.run()
        return [*seen, *whole]


def tune(
    plan: ModelPlan,
    calls: Sequence[WarmupCall],
    stages: Sequence[Stage],
    device: DeviceInfo,
    limits: Limits,
) -> Tuning:
    """Optimise a loaded object in place.

    Args:
        plan: Its parts.
        calls: Warm-up calls through the path that service calls will take.
        stages: What to try, in order.
        device: Where it runs.
        limits: When to stop.

    Returns:
        The receipt and the changes in force. An exception of a warm-up call becomes a `WarmupFailed` event and a
        receipt that says so; the object is then untouched.
    """
    start = time.perf_counter()
    empty = Receipt(plan.what, f"{device.kind} ({device.name})", _versions())
    if not calls:
        note = "no warmup= was given: nothing can be verified, so nothing was changed"
        return Tuning(replace(empty, notes=(note,)))
    session = _Session(plan, calls, device, start + limits.seconds)
    if any(root.training for root in plan.roots):
        why = "a module is in train mode, where dropout and batch statistics are on; call .eval() on it in the load"
        emit(NotApplied(f"tuning of {plan.what} for inference", why))
        session.notes.append(why)
    try:
        cold, reference = _first_passes(session)
    except Exception as error:  # the user's own warm-up; the model was loaded, and that is not thrown away
        reason = f"{type(error).__name__}: {error}"
        emit(WarmupFailed(plan.what, reason))
        seconds = time.perf_counter() - start
        return Tuning(replace(empty, notes=(f"the warm-up failed: {reason}",), seconds=seconds))
    try:
        for part in session.plan.parts:
            for stage in stages:
                if limits.stopped():
                    return _given_up(session, empty, "the load was cancelled", start)
                _try(session, part, stage)
        timing, whole_error = _whole(session, reference)
    except Exception as error:  # the user's model raised in a later pass; what was loaded is not thrown away
        return _given_up(session, empty, f"{type(error).__name__}: {error}", start)
    except BaseException:  # Ctrl-C, SIGTERM's SystemExit: leave no half-tuned model behind
        Tuning(empty, tuple(session.changes)).undo()
        raise
    live = _recompile_counter(session.changes)
    receipt = replace(
        empty,
        stages=tuple(session.results),
        cold=cold,
        before=timing.before,
        after=timing.after,
        ratio=timing.ratio,
        error=whole_error,
        seconds=time.perf_counter() - start,
        notes=tuple(session.notes),
        _live=live,
    )
    emit(Tuned(plan.what, len(receipt.kept), len(receipt.stages), receipt.ratio, receipt.seconds))
    return Tuning(receipt, tuple(session.changes), complete=True)


def _given_up(session: _Session, empty: Receipt, reason: str, start: float) -> Tuning:
    Tuning(empty, tuple(session.changes)).undo()
    emit(FellBack(session.plan.what, "everything", reason))
    results = tuple(replace(r, kept=False, reason=f"undone: {reason}") if r.kept else r for r in session.results)
    seconds = time.perf_counter() - start
    return Tuning(replace(empty, stages=results, notes=(f"tuning was given up: {reason}",), seconds=seconds))


def _versions() -> dict[str, str]:
    import torch

    return {"accelerate_tts": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _first_passes(session: _Session) -> tuple[float, list[Any]]:
    """The cold pass, and a warm one that is the reference and shows each part's inputs."""
    clock = time.perf_counter()
    if session.plan.refine is None:
        session.run()
    else:
        with time_modules(session.plan.roots, session.device.type) as seconds:
            session.run()
        session.plan = replace(session.plan, parts=session.plan.refine(seconds), refine=None)
    synchronize(session.device.type)
    cold = time.perf_counter() - clock
    with watch(session.plan.parts, session.device.type) as session.captured:
        reference = session.run()
    return cold, reference


def _try(session: _Session, part: Part, stage: Stage) -> None:
    """Try one stage on one part, and record what came of it."""
    obstacle = stage.applies(part)
    if obstacle is not None:
        return  # nothing to try, nothing to report
    clock = time.perf_counter()
    result = StageResult(part.name, stage.name, kept=False, reason="")
    obstacle = _not_worth_it(session, part, stage)
    if obstacle is not None:
        session.results.append(replace(result, reason=obstacle))
        return
    emit(Trying(f"{session.plan.what}: {part.name}", stage.name))
    change: Change | None = None
    try:
        change = stage.prepare(part)
        result = _judge(session, part, change, result)
    except Exception as error:  # a stage must never cost the user the model
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        emit(FellBack(f"{session.plan.what}: {part.name}", stage.name, reason))
        result = replace(result, kept=False, reason=f"failed: {reason}")
    finally:
        if change is not None and not result.kept:
            change.off()
    if result.kept and change is not None:
        session.changes.append(change)
    graphs = None if change is None else change.graphs
    session.results.append(replace(result, graphs=graphs, seconds=time.perf_counter() - clock))


def _not_worth_it(session: _Session, part: Part, stage: Stage) -> str | None:
    captured = session.captured[part.name]
    if captured.count == 0 and not _is_whole(session, part):
        return "the warm-up never called it"
    total = sum(seen.seconds for seen in session.captured.values())
    if captured.count and total > 0 and captured.seconds < stage.least_share * total:
        return f"only {100 * captured.seconds / total:.1f} % of the time is spent in it"
    if time.perf_counter() > session.deadline:
        return "not tried: the tuning budget is spent"
    return None


def _is_whole(session: _Session, part: Part) -> bool:
    # A root module may be driven by other methods than __call__; then the whole pass is what is timed.
    return any(part.module is root for root in session.plan.roots)


def _judge(session: _Session, part: Part, change: Change, result: StageResult) -> StageResult:
    """Run the part both ways: first for its outputs, then for its time."""
    reference = session.outputs(part)
    again = compare(reference, session.outputs(part))
    if again.reason == NOTHING_TO_COMPARE:
        return replace(result, reason=again.reason)
    if again.error > EXACT_TOLERANCE:
        return replace(result, reason="its own output does not repeat, so nothing can be verified")
    change.on()
    difference = compare(reference, session.outputs(part))
    change.off()
    result = _with_error(result, difference)
    if change.graphs == 0:
        return replace(result, reason="compiled no graph at all")
    if difference.error > (0.0 if part.decides else EXACT_TOLERANCE):
        limit = "bit-exact, since lengths hang on it" if part.decides else f"{EXACT_TOLERANCE:.0e}"
        reason = difference.reason or f"relative error {difference.error:.1e}, allowed is {limit}"
        return replace(result, reason=f"wrong output: {reason}")

    timing = compare_speed(lambda: session.replay(part), change.off, change.on, session.device.type, _COMPARISON)
    result = replace(result, before=timing.before, after=timing.after, ratio=timing.ratio, low=timing.low)
    if timing.ratio < MARGIN or timing.low <= 1.0:
        why = "slower" if timing.high < 1.0 else "no gain beyond doubt"
        return replace(result, reason=f"{why} ({timing.low:.2f}x to {timing.high:.2f}x)")
    change.on()
    return replace(result, kept=True, reason=f"at least {timing.low:.2f}x, 95 % sure")


def _with_error(result: StageResult, difference: Difference) -> StageResult:
    return replace(result, error=None if math.isinf(difference.error) else difference.error)


def _whole(session: _Session, reference: list[Any]) -> tuple[Timing, float | None]:
    """The whole object, tuned against untouched; if that is slower or wrong, everything is undone."""
    changes = session.changes

    def on() -> None:
        for change in changes:
            change.on()

    def off() -> None:
        for change in reversed(changes):
            change.off()

    if not changes:
        clock = time.perf_counter()
        session.run()
        synchronize(session.device.type)
        seconds = time.perf_counter() - clock
        return Timing(seconds, seconds, 1.0, 1.0, 1.0, 1), 0.0
    on()
    difference = compare(reference, session.run())
    off()
    repeats = compare(reference, session.run())
    unknown = repeats.error > EXACT_TOLERANCE
    if unknown:
        why = repeats.reason if repeats.reason == NOTHING_TO_COMPARE else "the output does not repeat under one seed"
        session.notes.append(f"only the parts were verified, not the whole: {why}")
        difference = Difference(0.0)
    # A pass of half a minute is not run ten times more when the budget is spent.
    fewest = _FEWEST if time.perf_counter() < session.deadline else _FEWEST_LATE
    timing = compare_speed(session.run, off, on, session.device.type, _WHOLE_COMPARISON, fewest=fewest)
    slower = timing.high < 1.0 or timing.ratio < _WORST_TOTAL
    if difference.error > EXACT_TOLERANCE or slower:
        wrong = difference.reason or f"relative error {difference.error:.1e}"
        reason = f"slower in total ({timing.ratio:.2f}x)" if slower else f"wrong in total: {wrong}"
        off()
        changes.clear()
        session.results[:] = [
            replace(result, kept=False, reason=f"undone: {reason}") if result.kept else result
            for result in session.results
        ]
        emit(FellBack(session.plan.what, "everything", reason))
        return Timing(timing.before, timing.before, 1.0, 1.0, 1.0, timing.pairs), 0.0
    on()
    session.run_variants()
    for change in changes:
        change.seal()
    return timing, None if unknown else difference.error


def _recompile_counter(changes: Sequence[Change]) -> Callable[[], int]:
    # Weakly: a receipt that somebody keeps must not keep the model's weights.
    known = [weakref.ref(change) for change in changes if change.graphs is not None]
    sealed = sum(change.graphs or 0 for change in changes)

    def count() -> int:
        alive = [change for reference in known if (change := reference()) is not None]
        return max(0, sum(change.graphs or 0 for change in alive) - sealed)

    return count
