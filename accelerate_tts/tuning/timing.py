"""Timing of two states of the same work, robust against noise.

The states run alternately, A B A B ..., so that a slow phase of the machine affects both; each pair gives one ratio.
The verdict uses order statistics of the ratios, without assumptions on their distribution. The k-th smallest of n
ratios lies below the true median with a probability that is a binomial sum. k is the largest number for which the
probability of an error is below 3.3 %: the smallest ratio of 5 pairs (3.1 %), the third smallest of 11 (3.3 %).

If the median shows a large gain and the bound does not, a pair was disturbed, or the times have two modes (threads of
two libraries that sometimes collide). Then as many pairs are run again, at least 13 in total, and all are judged again
at 1.7 %. Both verdicts together are wrong in at most 5 % of cases. Of 13 pairs the third smallest ratio counts (1.1 %),
so two disturbed pairs do not decide.

If disturbances of single timings can be detected, disturbed pairs do not count once there are enough others for a
verdict.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

FIRST_LOOK, SECOND_LOOK = 0.033, 0.017
"""Maximum probability that the verdict of a look is wrong."""
WORTH_A_SECOND_LOOK, PAIRS_OF_A_SECOND_LOOK = 1.1, 13
"""Median ratio from which an undecided first look is followed by a second one, and its minimum number of pairs."""
_MOST_PAIRS = 25
# If the minimum number of pairs shows this ratio without exception, no further pairs are needed.
_CLEAR = 1.1
_PATIENCE = 10.0


@dataclass(frozen=True)
class Timing:
    """Timing of two states.

    Attributes:
        before: Median seconds in the first state.
        after: Median seconds in the second state.
        ratio: Median of the paired ratios; above 1 the second state is faster.
        low: Lower bound of the true median ratio with 95 % confidence.
        high: Upper bound of it with 95 % confidence.
        pairs: Number of pairs.
        clean: True if none of these pairs is known to be disturbed.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    pairs: int
    clean: bool = True


def compare_speed(  # noqa: C901, PLR0913 - the work, its two states, and what limits and watches it
    run: Callable[[], object],
    before: Callable[[], object],
    after: Callable[[], object],
    device_type: str,
    seconds: float,
    *,
    fewest: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    clean: Callable[[], Callable[[], bool]] | None = None,
) -> Timing:
    """Time one piece of work in two states, alternately.

    Args:
        run: The work. It should have run once in both states already.
        before: Switches to the first state, the reference. Not timed.
        after: Switches to the second state, the candidate. Not timed.
        device_type: torch's device type. The device is synchronised before the clock is read.
        seconds: Approximate duration; a second round takes as long again, or 8 pairs. Each has at most 25 pairs.
        fewest: Minimum number of pairs, unless the second state takes ten times as long as the first (a candidate that
            compiles repeatedly). With fewer than 5, the confidence of the bounds is below 95 %.
        clock: Returns seconds; `time.process_time` measures processor time.
        clean: Called when a timing begins. It returns a function that is called at the end, and returns True if the
            timing was not disturbed.
    """
    dirty: set[int] = set()

    def timed(switch: Callable[[], object], number: int) -> float:
        switch()
        synchronize(device_type)
        ended = clean() if clean is not None else None
        start = clock()
        run()
        synchronize(device_type)
        seconds = max(clock() - start, 1e-9)
        if ended is not None and not ended():
            dirty.add(number)
        return seconds

    first, second = [timed(before, 0)], [timed(after, 0)]
    begun = clock()
    pairs = max(fewest, min(_MOST_PAIRS, int(seconds / (first[0] + second[0]))))

    def run_pairs(count: int) -> None:
        for number in range(len(first), count):
            if sum(second) > _PATIENCE * (sum(first) + seconds):
                break
            # The order within a pair alternates, since the second run finds warmer or fuller caches.
            if number % 2:
                second.append(timed(after, number))
                first.append(timed(before, number))
            else:
                first.append(timed(before, number))
                second.append(timed(after, number))

    def judged(alpha: float) -> Timing:
        undisturbed = [number for number in range(len(first)) if number not in dirty]
        if len(undisturbed) < fewest:
            return replace(_judged(first, second, alpha), clean=not dirty)
        return _judged([first[number] for number in undisturbed], [second[number] for number in undisturbed], alpha)

    run_pairs(min(fewest, pairs))
    timing = judged(FIRST_LOOK)
    if not timing.clean or (timing.low < _CLEAR and timing.high > 1 / _CLEAR):
        run_pairs(pairs)
        timing = judged(FIRST_LOOK)
    undecided = timing.low <= 1.0 and timing.ratio >= WORTH_A_SECOND_LOOK
    if (undecided or not timing.clean) and clock() - begun <= 2 * seconds:
        run_pairs(max(2 * pairs, PAIRS_OF_A_SECOND_LOOK))
        timing = judged(SECOND_LOOK)
    return timing


def _judged(first: list[float], second: list[float], alpha: float) -> Timing:
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    rank = rank_of(len(ratios), alpha)
    return Timing(
        before=statistics.median(first),
        after=statistics.median(second),
        ratio=statistics.median(ratios),
        low=ratios[rank],
        high=ratios[-1 - rank],
        pairs=len(ratios),
    )


def rank_of(count: int, alpha: float) -> int:
    """Return the largest index at which a sorted ratio exceeds the true median with at most the probability `alpha`."""
    chance, rank = 0.0, -1
    for k in range(count):
        chance += math.comb(count, k) / 2**count
        if chance > alpha:
            break
        rank = k
    return max(rank, 0)


def time_once(run: Callable[[], object], device_type: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one run of a piece of work.

    Args:
        run: The work.
        device_type: See `compare_speed`.
        clock: Seconds.
    """
    start = clock()
    run()
    synchronize(device_type)
    return clock() - start


def synchronize(device_type: str) -> None:
    """Wait until the device has finished all work. Does nothing on a CPU."""
    if device_type == "cpu":
        return
    import torch

    getattr(torch, device_type).synchronize()
