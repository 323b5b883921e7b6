"""Policy of tuning as data: clock, margins, numbers of runs, and limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.tuning.disturbance import Machine, ThisMachine
from accelerate_tts.tuning.timing import Timing, compare_speed, time_once

if TYPE_CHECKING:
    from collections.abc import Generator

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Stage

__all__ = ["OVER_BUDGET", "TuningPolicy", "current_policy", "tuning_policy"]

OVER_BUDGET = "the tuning budget"
"""Phrase in the reasons of stages that a larger budget would have tried or finished. Warm packs look for it."""


@dataclass(frozen=True)
class TuningPolicy:
    """Rules by which tuning decides. Immutable; tests and benchmarks give others with `tuning_policy`.

    Attributes:
        clock: Seconds, for budgets and single looks.
        compare: Times two states of the same work in turn; `compare_speed`.
        look: Times one run of a piece of work; `time_once`.
        machine: Makes what tells how disturbed the machine is.
        unworthy: Asked in place of the usual reasons not to begin a stage on a part; `None` for those.
        margin: A stage must be faster by this factor. Less is not worth a receipt's line, nor a dependency on a
            compiler.
        comparison: Seconds for one comparison of speeds; they are stretched to at least five pairs.
        total: The same for the comparison of the whole.
        hangs: Seconds beyond the budget after which a stage that is being prepared, or run for the first time, hangs.
        longest: Seconds that preparing a stage, and running it for the first time, may take at most each.
        looks: True if single looks may drop a stage without pairs.
        hopeless: A candidate that takes this many times as long as the untouched part, after a run that filled its
            caches, is dropped without being timed in pairs: half precision on a CPU without it can be a hundred times
            slower.
        not_twice: One that took this many times as long for its outputs, though it compiles nothing, is not run again.
        far_behind: An alternative that takes this many times as long as the one in force did when it was timed is not
            timed in pairs.
        cheap_look: Seconds of a replay up to which a look is the better of two.
        cheap_pairs: Seconds up to which a look decides nothing: of microseconds a neighbour makes milliseconds, and
            pairs of so little are timed in no time.
        long_replay: Seconds of one replay from which a look that shows no gain at all is enough: so much work varies
            by a few per cent, and the pairs would take a tenth of the budget.
        copied_a_second: Bytes of weights that a slow machine makes copies of in other formats, in a second. They are
            made when first needed.
        from_memory: Bytes of weights that no processor's caches hold: then what reads fewer of them is faster.
        longest_pass: Seconds of a warm-up pass up to which changes of the process are tried: they take a dozen of it.
        pass_share: Share of the budget that such a pass may take: a dozen of them then take a sixth.
        process_gain: Gain that a look at a change of the process must show, whose pairs are a dozen whole passes.
        first_replays: Replays before the pairs: the outputs, and a look.
        pairs: Pairs of replays that a verdict needs.
        slack: Seconds over the budget that a verdict may take.
        costly: Seconds from which a stage is tried after all that take less, on any part, and only if it may be hoped
            to gain something.
        thorough: A budget from which it is tried without hope, too.
        patience: Seconds that one tuning waits, in all, for a machine to become quiet.
        enough: Seconds of a loop's calls that one timing needs: a step of half a second need not be timed six times
            over.
        first_passes: Passes of a budget that two at the start leave room for: to try something, and to check the
            whole.
        unknown_gain: Assumed speed-up of a stage without a promise.
        comparisons: Comparisons of speeds on a machine that says that it is quiet, and is disturbed meanwhile.
        whole_passes: Passes that the check of the whole takes at least: does the output repeat, is it right, and a
            pair for its time.
        total_pairs: Pairs of passes for the total, most first: those are run that fit into what is left of the budget.
            The last number is always run, but only from the first one on is its verdict one of 95 %.
        worst_total: Ratio below which fewer pairs undo everything; it is beyond the noise of two passes.
        other_lengths: Another sampled sequence of the same speech is at most so many times as long, or as short;
        other_loudness: and at most so many times as loud, or as quiet. A broken one is not.
    """

    clock: Callable[[], float] = time.perf_counter
    compare: Callable[..., Timing] = compare_speed
    look: Callable[..., float] = time_once
    machine: Callable[[], Machine] = ThisMachine
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
    _policies.append(policy)
    try:
        yield policy
    finally:
        _policies.remove(policy)
