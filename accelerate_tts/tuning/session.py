"""One tuning in progress: the model's parts, what they were given and computed, and what has been decided so far."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import Event, FellBack, add_hook
from accelerate_tts.plan import Which
from accelerate_tts.runtime.seeding import ALL, drawing, other_threads, seeded
from accelerate_tts.stages.process.constants import KeptConstants
from accelerate_tts.stages.vocoder.checked_lengths import is_checked
from accelerate_tts.tuning.capture import outputs_of
from accelerate_tts.tuning.compare import EXACT_TOLERANCE, TOLERANCES, Tolerance, compare
from accelerate_tts.tuning.kl_divergence import divergence, head_of
from accelerate_tts.tuning.timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from torch import nn

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.plan import ModelPlan, Part
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.runtime.guard.checks import Expectation
    from accelerate_tts.stages.protocol import Change
    from accelerate_tts.tuning.capture import Captured
    from accelerate_tts.tuning.compare import Difference
    from accelerate_tts.tuning.disturbance import Watcher
    from accelerate_tts.tuning.policy import TuningPolicy
    from accelerate_tts.tuning.warmup import WarmupCalls

__all__ = [
    "CUDA_GRAPH_PASSES",
    "Kept",
    "OtherThreadsDrawError",
    "Reference",
    "Session",
    "fallbacks",
    "switch_off",
]

CUDA_GRAPH_PASSES = 3
"""A captured CUDA graph needs an eager pass, a recording pass and a replay before it is warm."""

_BIT_EXACT = Tolerance(0.0, 0.0)
_LOOKS = 4  # runs for a comparison whose random numbers another thread used
_WHOLE = ""


class OtherThreadsDrawError(RuntimeError):
    """Other threads draw from the generators of the process all the time, so no two runs have the same numbers."""

    def __init__(self) -> None:
        super().__init__(
            "other threads draw random numbers meanwhile, so no two runs have the same; load before they start, or give"
            " them generators of their own"
        )


def _depth_of(module: nn.Module) -> int:
    """How many blocks lie one behind the other in it: the most in one of its lists."""
    from torch import nn

    lists = (len(holder) for holder in module.modules() if isinstance(holder, (nn.ModuleList, nn.Sequential)))
    return max(lists, default=1)


@dataclass(frozen=True)
class Reference:
    """What an untouched part computes on its captured inputs.

    Attributes:
        outputs: Of each call.
        repeats: How far a second run of the same was from the first.
        seconds: What a run of what is timed took.
        quiet: Whether nothing disturbed the machine meanwhile.
    """

    outputs: list[Any]
    repeats: Difference
    seconds: float
    quiet: bool = True


@dataclass(frozen=True)
class Kept:
    """A change in force: on which part, of which stage, of which group of alternatives, and which calls were timed."""

    part: str
    stage: str
    group: str
    change: Change
    times: Which = "loop"


@dataclass
class Session:
    """The state of one tuning.

    Attributes:
        plan: The parts.
        calls: The warm-up calls, through the path that service calls take.
        device: Where it runs.
        budget: Seconds from the start to the deadline.
        deadline: No stage is begun after it, in seconds of the policy's clock.
        tolerance: What a candidate may differ by.
        policy: How it is decided.
        watcher: Tells how disturbed the machine is.
        known: Verdicts of an earlier tuning that need not be timed again, by part and stage.
        pass_seconds: What a warm pass of the untouched object took.
        pass_quiet: Whether nothing disturbed the machine meanwhile.
        reserved: Seconds of the budget that are kept for the check of the whole at the end.
        captured: What was seen of each part in a warm pass, by its name.
        called: The `id` of each module that this pass called.
        results: A line for each stage tried.
        kept: The changes in force, in the order in which they were made.
        notes: Whatever else the user should know.
        unmet: What there was no time for: what it may be hoped to gain of a pass, its part and stage, and the budget
            that it wants.
        heard: What the untouched object's `@inference` functions gave in a warm pass, for the guard.
        constants: What upstream was seen to compute anew in a warm pass though it never changes.
        left_alone: Generators of random numbers that the object does not draw from, so that other threads may.
    """

    plan: ModelPlan
    calls: WarmupCalls
    device: DeviceInfo
    budget: float
    deadline: float
    tolerance: Tolerance
    policy: TuningPolicy
    watcher: Watcher
    known: Mapping[tuple[str, str], StageResult] = field(default_factory=dict)
    pass_seconds: float = 0.0
    pass_quiet: bool = True
    reserved: float = 0.0
    captured: dict[str, Captured] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    results: list[StageResult] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmet: list[tuple[float, str, str, float]] = field(default_factory=list)
    heard: Mapping[str, Expectation] = field(default_factory=dict)
    constants: KeptConstants = field(default_factory=KeptConstants)
    left_alone: frozenset[str] = frozenset()
    _unknown: bool = False
    _shared: bool = False
    _moved: frozenset[str] = frozenset()
    _left_by: dict[str, frozenset[str]] = field(default_factory=dict)
    _ended: dict[str, dict[str, str]] = field(default_factory=dict)
    _undisturbed: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    _references: dict[str, Reference] = field(default_factory=dict)

    def run(self) -> list[Any]:
        """One warm-up pass through the public path, with the same random numbers every time."""
        with self._seeded(_WHOLE, watched=self._unknown or other_threads()):
            return [call.run() for call in self.calls.main]

    def run_others(self) -> None:
        """What service will bring beside: other lengths, and tensors as the other kind of caller makes them."""
        with self._seeded(_WHOLE):
            for call in (*self.calls.main, *self.calls.ladder):
                if call in self.calls.ladder:
                    call.run()
                if call.variant is not None:
                    call.variant()

    def replayable(self, part: Part) -> bool:
        """Whether the part can be run by itself, on its captured inputs."""
        captured = self.captured.get(part.name)
        return captured is not None and bool(captured.calls) and not captured.obstacle

    def replay(self, part: Part, which: Which = "all") -> Callable[[], list[Any]]:
        """The part by itself on its captured inputs, or the whole pass where it cannot be run by itself.

        Args:
            part: The part.
            which: Which of its calls.

        Returns:
            A function that runs it once: the copies of its inputs are made here, and are not part of its time.
        """
        if which == "pass" or not self.replayable(part):
            return self.run
        prepared = self.captured[part.name].prepared(part.module, which)

        def run() -> list[Any]:
            with self._seeded(part.name):
                return [call.run(part.module) for call in prepared]

        return run

    def outputs(self, part: Part) -> list[Any]:
        """What the part computes: of its replayed calls, or of its calls in a whole pass and that pass's own result."""
        captured = self.captured.get(part.name)
        if captured is None:  # the process as a whole
            return self.run()
        if self.replayable(part):
            with self._seeded(part.name, watched=other_threads()):
                return captured.outcomes(part.module)
        with outputs_of(part) as seen:
            whole = self.run()
        return [*seen, *whole]

    def reference(self, part: Part) -> Reference:
        """What the untouched part computes. Computed once, so that the errors of several changes cannot add up unseen.

        Whoever asks first must do so before anything is changed on the part.
        """
        known = self._references.get(part.name)
        if known is None:
            self._leave_alone(part)
            first = self.outputs(part)
            repeats, first = self.repeated(first, lambda: self.outputs(part), part)
            with self.watcher.window() as window:
                seconds = self.seconds(part)
            known = Reference(first, repeats, seconds, window.disturbance.quiet)
            self._references[part.name] = known
        return known

    # --- random numbers, which all threads of a process draw from the same generators ----------------------------

    @contextmanager
    def _seeded(self, what: str, *, watched: bool = False) -> Generator[None, None, None]:
        leaving = self._left_by.get(what, self.left_alone)
        with seeded(self.device.type, leaving=leaving, watched=watched) as window:
            yield
        if watched:
            self._moved = window.moved
            known = self._undisturbed.setdefault(what, [])
            # Twice in succession: so it is when nobody else draws.
            if self._ended.get(what) == window.end and window.end not in known:
                known.append(window.end)
            self._ended[what] = window.end

    @contextmanager
    def finding_draws(self) -> Generator[None, None, None]:
        """While open, a first pass shows from which generators the object draws; `draws_found` says what came of it.

        As long as that is not known, nothing is seeded beside other threads.
        """
        self._shared = other_threads()
        self.left_alone = ALL if self._shared else frozenset()
        self._unknown = True
        try:
            yield
        finally:
            self._unknown = False

    def draws_found(self, reference: list[Any]) -> bool:
        """Leave the generators alone that the object does not draw from; returns whether the reference stands.

        Args:
            reference: What the first pass computed.
        """
        own = self._moved
        if self._shared and own:
            with drawing() as seen:
                again = self.run()
            repeats = compare(reference, again).error <= EXACT_TOLERANCE
            # A model that draws in a thread of its own is not seen to draw, but its output is another one.
            own = frozenset(seen) if seen or repeats else own
        self.left_alone = ALL - own
        return not (self._shared and own)

    def _leave_alone(self, part: Part) -> None:
        """Leave the generators alone that a part does not draw from, beside other threads."""
        captured = self.captured.get(part.name)
        if self.left_alone == ALL or captured is None or not self.replayable(part) or not other_threads():
            return
        self._left_by[part.name] = ALL
        with drawing() as seen:
            captured.outcomes(part.module)
        self._left_by[part.name] = ALL - seen

    def drawn_by_others(self, part: Part | None = None) -> bool:
        """Whether the last run, of a part or of the whole, drew as no two runs in succession have done.

        That is so if another thread drew meanwhile. It also is of a change that draws more or less, until its next run.
        """
        what = _WHOLE if part is None or not self.replayable(part) else part.name
        return other_threads() and self._ended.get(what) not in self._undisturbed.get(what, [])

    def repeated(
        self, first: list[Any], run: Callable[[], list[Any]], part: Part | None = None, second: list[Any] | None = None
    ) -> tuple[Difference, list[Any]]:
        """How far a second run is from a first one, and the first; of other two where another thread's draws part them.

        Args:
            first: What a run computed.
            run: Makes another one.
            part: Of which part; `None` is the whole.
            second: What another run computed, if there was one.

        Raises:
            OtherThreadsDrawError: No two runs had the same random numbers.
        """
        for _ in range(_LOOKS):
            second = run() if second is None else second
            found = compare(first, second)
            if found.error <= EXACT_TOLERANCE or not self.drawn_by_others(part):
                return found, first
            first, second = second, None
        raise OtherThreadsDrawError

    def confirmed(
        self,
        found: Difference,
        objection: Callable[[Difference], str],
        again: Callable[[], Difference],
        part: Part | None = None,
    ) -> Difference:
        """A difference; of another run where it is not tolerated, and another thread drew random numbers meanwhile.

        Raises:
            OtherThreadsDrawError: There was no run without.
        """
        for _ in range(_LOOKS):
            if not objection(found) or not self.drawn_by_others(part):
                return found
            found = again()
        raise OtherThreadsDrawError

    def compared(self, part: Part, outputs: list[Any]) -> Difference:
        """How far what a changed part computed is from its reference; `confirmed`.

        Raises:
            OtherThreadsDrawError: As for `confirmed`.
        """
        return self.confirmed(
            self.difference(part, outputs), partial(self.objection, part),
            lambda: self.difference(part, self.outputs(part)), part,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------------

    def with_head(self, part: Part) -> Part:
        """A part with the head by whose probabilities it is judged, if it is a decoder in its loop and has one."""
        captured = self.captured.get(part.name)
        if part.head is not None or captured is None or not captured.cached:
            return part
        return replace(part, head=head_of(part.module, self.plan.roots))

    def difference(self, part: Part, outputs: list[Any]) -> Difference:
        """How far what a part computed is from its reference, by its head's probabilities too if it has one."""
        reference = self.reference(part).outputs
        found = compare(reference, outputs)
        return replace(found, divergence=divergence(reference, outputs, part.head))

    def objection(self, part: Part, difference: Difference) -> str:
        """Why what a changed part computes is not tolerated, or ""."""
        bit_exact = part.decides and not is_checked(part.module)
        tolerance = TOLERANCES["exact"] if part.decides else self.tolerance
        objection = (_BIT_EXACT if bit_exact else tolerance).objection(
            difference, depth=_depth_of(part.module), read_by_a_head=part.head is not None and part.head.reads_alone
        )
        why = "; it must be bit-exact, since lengths hang on it" if bit_exact else ""
        return f"wrong output: {objection}{why}" if objection else ""

    def seconds(self, part: Part, which: Which = "loop") -> float:
        """What one replay takes now."""
        run = self.replay(part, which)
        start = self.policy.clock()
        run()
        synchronize(self.device.type)
        return self.policy.clock() - start

    def known_seconds(self, part: Part) -> float:
        """What one replay of the untouched part takes, as far as that is known; otherwise 0.0."""
        known = self._references.get(part.name)
        return 0.0 if known is None else known.seconds

    def share(self, part: Part) -> float:
        """The share of the parts' time that a part took in a warm pass; 0.0 if it was not called."""
        total = sum(seen.seconds for seen in self.captured.values())
        seen = self.captured.get(part.name)
        return seen.seconds / total if seen is not None and total > 0 else 0.0

    def captured_seconds(self, part: Part) -> float:
        """About what a replay of a part's captured calls takes: that many of all that it was given in the pass."""
        seen = self.captured.get(part.name)
        if seen is None:
            return self.pass_seconds
        return seen.seconds * len(seen.calls) / seen.count if seen.calls else self.pass_seconds

    def kept_on(self, part: Part) -> list[str]:
        """The names of the stages that are in force on a part."""
        return [kept.stage for kept in self.kept if kept.part == part.name]

    def incumbent(self, part: Part, group: str) -> Kept | None:
        """The alternative of the same group that is in force on the part."""
        return next((kept for kept in self.kept if group and (kept.part, kept.group) == (part.name, group)), None)

    def on(self) -> None:
        """Put every kept change in force."""
        for kept in self.kept:
            kept.change.on()

    def off(self) -> None:
        """Put the object back as it was loaded."""
        switch_off(kept.change for kept in reversed(self.kept))

    def put(self, kept: Kept) -> None:
        """Put one of the kept changes in force again, where it was: below those that were made after it."""
        with self._above(kept):
            kept.change.on()

    def lift(self, kept: Kept) -> None:
        """Switch one of the kept changes off, from below those that were made after it."""
        with self._above(kept):
            switch_off((kept.change,))

    @contextmanager
    def _above(self, kept: Kept) -> Generator[None, None, None]:
        # A change that was made of a module's class remembers what that was; so the last one made goes first.
        above = [other.change for other in self.kept[self.kept.index(kept) + 1 :]]
        try:
            switch_off(reversed(above))
            yield
        finally:
            for change in above:
                change.on()

    def drop(
        self, reason: str, unwanted: Callable[[StageResult], bool] = lambda _result: True, *, sure: bool = True
    ) -> None:
        """Give up kept changes, all of them unless told which, and say why (and how sure) in their results."""
        self.off()
        for number, result in enumerate(self.results):
            if result.kept and unwanted(result):
                self.results[number] = replace(result.dropped(f"undone: {reason}"), sure=sure and result.sure)
        names = {(result.part, result.stage) for result in self.results if result.kept}
        self.kept[:] = [kept for kept in self.kept if (kept.part, kept.stage) in names]
        self.on()


def switch_off(changes: Iterable[Change]) -> None:
    """Switch changes off, each of them whatever becomes of the others.

    One that fails half-way (for want of memory, say) is asked once more, since `Change.off` is idempotent.

    Raises:
        Exception: The first that there was, once all have been switched off.
    """
    first: Exception | None = None
    for change in changes:
        for _ in range(2):
            try:
                change.off()
                break
            except Exception as error:  # raised below, when nothing is left to be done
                first = first or error
    if first is not None:
        raise first


@contextmanager
def fallbacks() -> Generator[list[FellBack], None, None]:
    """While open, note each `FellBack` event: a change that gave up by itself computes the right thing untouched.

    Those of this context only, and of what it begins: another object may fall back in service meanwhile.
    """
    found: list[FellBack] = []
    outer = _noting.get()
    here = (*outer, found)

    def note(event: Event) -> None:
        if isinstance(event, FellBack) and any(noted is found for noted in _noting.get()):
            found.append(event)

    remove = add_hook(note)
    _noting.set(here)
    try:
        yield found
    finally:
        _noting.set(outer)
        remove()


_noting: ContextVar[tuple[list[FellBack], ...]] = ContextVar("accelerate_tts_noting", default=())
