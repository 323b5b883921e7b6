"""Baseline of one tuning: the untouched object, the inputs of its parts, and their outputs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from accelerate_tts.plan import TimedCalls
from accelerate_tts.stages.process.constants import KeptConstants
from accelerate_tts.stages.vocoder.checked_lengths import is_checked
from accelerate_tts.tuning.capture import outputs_of
from accelerate_tts.tuning.compare import TOLERANCES, Tolerance, compare
from accelerate_tts.tuning.draws import WHOLE, Draws
from accelerate_tts.tuning.kl_divergence import divergence
from accelerate_tts.tuning.timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.plan import ModelPlan, Part
    from accelerate_tts.runtime.guard.checks import Expectation
    from accelerate_tts.tuning.capture import Captured
    from accelerate_tts.tuning.compare import Difference
    from accelerate_tts.tuning.disturbance import Watcher
    from accelerate_tts.tuning.limits import Budget
    from accelerate_tts.tuning.policy import TuningPolicy
    from accelerate_tts.tuning.warmup import WarmupCalls

_BIT_EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class Reference:
    """Outputs of an untouched part on its captured inputs.

    Attributes:
        outputs: Of each call.
        repeats: Difference between two runs.
        seconds: Seconds of one run of the timed calls.
        quiet: True if the machine was not disturbed meanwhile.
    """

    outputs: list[Any]
    repeats: Difference
    seconds: float
    quiet: bool = True


@dataclass(frozen=True, eq=False)  # tensors have no truth
class Baseline:
    """An untouched object, with the comparison and the timing of its changes.

    Attributes:
        plan: The parts, with their properties that the passes showed.
        calls: The warm-up calls, through the path of service calls.
        device: The device.
        tolerance: Maximum difference of a candidate's outputs.
        policy: The policy of tuning.
        watcher: Measures disturbances of the machine.
        budget: The time budget.
        output: Results of a pass, with which those of the tuned object are compared.
        cold: Seconds of the first pass.
        pass_seconds: Seconds of the recorded pass.
        pass_quiet: True if the machine was not disturbed in that pass.
        captured: Calls of each part in that pass, by its name.
        called: The `id` of each module that was called in it.
        expected: Outputs of the object's `@inference` functions in it, for the guard.
        draws: Seeds runs.
        constants: Constants that upstream computes again at each call.
        reserved: Seconds of the budget reserved for the final check of the whole.
    """

    plan: ModelPlan
    calls: WarmupCalls
    device: DeviceInfo
    tolerance: Tolerance
    policy: TuningPolicy
    watcher: Watcher
    budget: Budget
    output: list[Any]
    cold: float
    pass_seconds: float
    captured: Mapping[str, Captured]
    expected: Mapping[str, Expectation]
    draws: Draws
    constants: KeptConstants
    called: Collection[int] = ()
    pass_quiet: bool = True
    reserved: float = 0.0
    _references: dict[str, Reference] = field(default_factory=dict, repr=False)

    def run(self) -> list[Any]:
        """Run a warm-up pass through the public path, with the same random numbers every time."""
        return self.draws.whole(self.calls.run)

    def first_audio(self, passes: int) -> float | None:
        """Return the median seconds until the first piece of the calls that speak in pieces; `None` without any."""
        seconds = []
        for _ in range(passes):
            with self.draws.seeded(WHOLE):
                start = self.policy.clock()
                for _ in self.calls.begin():
                    synchronize(self.device.type)
                    seconds.append(self.policy.clock() - start)
                    start = self.policy.clock()
        return statistics.median(seconds) if seconds else None

    def replayable(self, part: Part) -> bool:
        """Check that the part can be run by itself, on its captured inputs."""
        captured = self.captured.get(part.name)
        return captured is not None and bool(captured.calls) and not captured.obstacle

    def replay(self, part: Part, which: TimedCalls = "all") -> Callable[[], list[Any]]:
        """Prepare a replay of the part on its captured inputs, or a whole pass if it cannot be run by itself.

        Args:
            part: The part.
            which: The calls to replay.

        Returns:
            A function that runs it once. The inputs are copied here, outside of its time.
        """
        if which == "end_to_end" or not self.replayable(part):
            return self.run
        prepared = self.captured[part.name].prepared(part.module, which)

        def run() -> list[Any]:
            with self.draws.seeded(part.name):
                return [call.run(part.module) for call in prepared]

        return run

    def outputs(self, part: Part) -> list[Any]:
        """Return the part's present outputs: of replayed calls, or of a whole pass with the pass's result."""
        captured = self.captured.get(part.name)
        if captured is None:  # the process as a whole
            return self.run()
        if self.replayable(part):
            with self.draws.seeded(part.name, watched=True):
                return captured.outcomes(part.module)
        with outputs_of(part) as seen:
            whole = self.run()
        return [*seen, *whole]

    def reference(self, part: Part, *, timed: bool = True) -> Reference:
        """Return the untouched part's outputs. Computed once, so that errors of several changes cannot add up unseen.

        The first call must be made before anything is changed on the part.

        Args:
            part: The part.
            timed: Time a run, too, if this is the first call. Its seconds are 0.0 otherwise.

        Raises:
            OtherThreadsDrawError: No two runs had the same random numbers.
        """
        known = self._references.get(part.name)
        if known is None:
            if self.replayable(part):
                self.draws.leave_alone(part.name, lambda: self.captured[part.name].outcomes(part.module))
            first = self.outputs(part)
            repeats, first = self.draws.repeated(first, lambda: self.outputs(part), self._drawn_as(part))
            with self.watcher.window() as window:
                seconds = self.seconds(part) if timed else 0.0
            known = Reference(first, repeats, seconds, window.disturbance.quiet)
            self._references[part.name] = known
        return known

    def difference(self, part: Part, outputs: list[Any]) -> Difference:
        """Compare a part's outputs with its reference, also by the probabilities of its head if it has one."""
        reference = self.reference(part).outputs
        found = compare(reference, outputs)
        return replace(found, divergence=divergence(reference, outputs, part.head))

    def compared(self, part: Part, outputs: list[Any]) -> Difference:
        """Compare a changed part's outputs with its reference; see `Draws.confirmed`.

        Raises:
            OtherThreadsDrawError: As for `Draws.confirmed`.
        """
        return self.draws.confirmed(
            self.difference(part, outputs), partial(self.objection, part),
            lambda: self.difference(part, self.outputs(part)), self._drawn_as(part),
        )  # fmt: skip

    def _drawn_as(self, part: Part) -> str:
        return part.name if self.replayable(part) else WHOLE

    def objection(self, part: Part, difference: Difference) -> str:
        """Return the reason why a changed part's outputs are not tolerated; "" if they are."""
        bit_exact = part.decides and not is_checked(part.module)
        tolerance = TOLERANCES["exact"] if part.decides else self.tolerance
        return (_BIT_EXACT if bit_exact else tolerance).objection(
            difference, depth=_depth_of(part.module), read_by_a_head=part.head is not None and part.head.reads_alone
        )

    def seconds(self, part: Part, which: TimedCalls = "loop") -> float:
        """Return the seconds of one replay in the present state."""
        return self.policy.look(self.replay(part, which), self.device.type, self.policy.clock)

    def known_seconds(self, part: Part) -> float:
        """Return the seconds of one replay of the untouched part; 0.0 if unknown."""
        known = self._references.get(part.name)
        return 0.0 if known is None else known.seconds

    @property
    def share_elsewhere(self) -> float:
        """Share of the recorded pass that was spent outside of all parts."""
        total = sum(seen.seconds for seen in self.captured.values())
        return 1 - min(1.0, total / self.pass_seconds) if self.pass_seconds > 0 else 0.0

    def share(self, part: Part) -> float:
        """Return the part's share of the time of all parts in a warm pass; 0.0 if it was not called."""
        total = sum(seen.seconds for seen in self.captured.values())
        seen = self.captured.get(part.name)
        return seen.seconds / total if seen is not None and total > 0 else 0.0

    def share_left(self, part: Part, seconds_now: Callable[[str], float | None]) -> float:
        """Return the part's share of the time that is left of a warm pass after changes.

        What took a hundredth of the untouched pass may be a tenth of it once the decoder is ten times as fast.

        Args:
            part: The part.
            seconds_now: Returns the seconds of a part's replay with the changes; `None` if they are not known.
        """
        left = {name: seen.seconds for name, seen in self.captured.items()}
        for name, reference in self._references.items():
            now = seconds_now(name)
            if name in left and now is not None and now < reference.seconds:
                left[name] *= now / reference.seconds
        total = sum(left.values())
        return left.get(part.name, 0.0) / total if total > 0 else 0.0

    def captured_seconds(self, part: Part) -> float:
        """Estimate the seconds of a replay of a part's captured calls, by their share of its calls in the pass."""
        seen = self.captured.get(part.name)
        if seen is None:
            return self.pass_seconds
        return seen.seconds * len(seen.calls) / seen.count if seen.calls else self.pass_seconds


def _depth_of(module: nn.Module) -> int:
    """Return the number of consecutive blocks of a module: the length of its longest list."""
    lists = (len(holder) for holder in module.modules() if isinstance(holder, (nn.ModuleList, nn.Sequential)))
    return max(lists, default=1)
