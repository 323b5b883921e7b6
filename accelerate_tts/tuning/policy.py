"""Policy of tuning as data: clock, margins, numbers of runs, and limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerate_tts.tuning.disturbance import Machine
from accelerate_tts.tuning.timing import Timing, compare_speed, time_once

if TYPE_CHECKING:
    from collections.abc import Generator

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Stage

OVER_BUDGET = "the tuning budget"
"""Phrase in the reasons of stages that a larger budget would have tried or finished. Warm packs look for it."""


@dataclass(frozen=True)
class TuningPolicy:
    """Rules of tuning. Immutable; tests and benchmarks set another one with `tuning_policy`.

    Attributes:
        clock: Returns seconds, for budgets and single looks.
        compare: Times two states of the same work alternately; see `compare_speed`.
        look: Times one run; see `time_once`.
        machine: Makes the source of measurements of a `Watcher`.
        unworthy: Replaces the usual reasons not to begin a stage on a part; `None` for those.
        margin: Minimum ratio of speeds. A smaller gain is not worth a dependency on a compiler.
        comparison: Seconds of a comparison of one part. At least five pairs are run.
        total: The same for the whole object.
        hangs: Seconds over the budget after which preparing a stage, or its first run, is interrupted.
        longest: Maximum seconds of preparing a stage, and of its first run.
        looks: True if single looks may reject a stage without pairs.
        hopeless: A look rejects a candidate that takes this many times as long as the untouched part, with warm caches:
            half precision on a CPU without it can be a hundred times slower.
        not_twice: The first run rejects a candidate that takes this many times as long, unless it compiles.
        far_behind: A look rejects an alternative that takes this many times as long as the one in force.
        cheap_look: Seconds of a replay up to which the better of two looks counts.
        cheap_pairs: Seconds of a replay up to which a look rejects nothing: other programs can turn microseconds into
            milliseconds, and the pairs take no time.
        long_replay: Seconds of a replay from which a look without any gain rejects: such long work varies by a few per
            cent, and its pairs would take a tenth of the budget.
        copied_a_second: Bytes of weights that a slow machine converts in a second, at their first use.
        from_memory: Bytes of weights that exceed every processor's caches. Above it, fewer bytes are faster.
        longest_pass: Maximum seconds of a warm-up pass for changes of the process, which take a dozen passes.
        pass_share: Maximum share of the budget of such a pass. A dozen of them then take a sixth.
        process_gain: Minimum ratio that a look at a change of the process must show before its pairs of whole passes.
        first_replays: Replays before the pairs: one for the outputs, and a look.
        pairs: Minimum pairs of a verdict.
        slack: Seconds over the budget that a verdict may take.
        costly: Seconds from which a trial is costly. Costly trials come last, and only if the stage may gain.
        thorough: Minimum budget in seconds for costly trials of stages that gained nothing on similar parts.
        patience: Seconds that one tuning waits, in all, for a quiet machine.
        enough: Seconds of a loop's calls that one timing needs, so that steps of half a second are not timed six times.
        first_passes: Minimum passes in the budget for a second pass at the start.
        set_up_share: Share of a first pass outside of all parts from which a second one is made anyway.
        unknown_gain: Assumed ratio of a stage without a promise.
        comparisons: Maximum comparisons if the machine is disturbed during them.
        whole_passes: Minimum passes of the final check: repetition, correctness, and a pair for the time.
        total_pairs: Numbers of pairs for the whole, most first. The first that fits the remaining budget is run, and at
            least the last. Only the first has a confidence of 95 %.
        worst_total: Ratio of the whole below which fewer pairs undo everything, beyond the noise of two passes.
        other_lengths: Maximum ratio of lengths of two sampled sequences of the same speech. A broken one exceeds it.
        other_loudness: Maximum ratio of their loudness, likewise.
    """

    clock: Callable[[], float] = time.perf_counter
    compare: Callable[..., Timing] = compare_speed
    look: Callable[..., float] = time_once
    machine: Callable[[], Machine] = Machine
    unworthy: Callable[[Any, Part, Stage], str | None] | None = None
    margin: float = 1.02
    comparison: float = 2.0
    total: float = 6.0
    hangs: float = 10.0
    longest: float = math.inf
    looks: bool = True
    hopeless: float = 3.0
    not_twice: float = 10.0
    far_behind: float = 1.3
    cheap_look: float = 0.05
    cheap_pairs: float = 0.01
    long_replay: float = 0.5
    copied_a_second: float = 2.5e8
    from_memory: int = 512 << 20
    longest_pass: float = 3.0
    pass_share: float = 1 / 72
    process_gain: float = 1.1
    first_replays: int = 2
    pairs: int = 5
    slack: float = 2.0
    costly: float = 5.0
    thorough: float = 600.0
    patience: float = 15.0
    enough: float = 1.0
    first_passes: int = 4
    set_up_share: float = 0.5
    unknown_gain: float = 1.05
    comparisons: int = 2
    whole_passes: int = 4
    total_pairs: tuple[int, ...] = (5, 3, 1)
    worst_total: float = 0.95
    other_lengths: float = 2.0
    other_loudness: float = 4.0


_policies: list[TuningPolicy] = [TuningPolicy()]


def current_policy() -> TuningPolicy:
    """Return the policy of tunings that begin now in this process."""
    return _policies[-1]


@contextmanager
def tuning_policy(policy: TuningPolicy) -> Generator[TuningPolicy, None, None]:
    """Set the policy of all tunings that begin in this process while open."""
    own = replace(policy)  # scopes may overlap, and several may be given the same
    try:
        _policies.append(own)
        yield policy
    finally:
        try:
            _policies[:] = [each for each in _policies if each is not own]
        except BaseException:  # Ctrl-C in it
            _policies[:] = [each for each in _policies if each is not own]
            raise
