"""Timing two states of the same work, so that noise does not flip the verdict.

The two are run in turn, A B A B ..., so that a slow phase of the machine hits both alike; each pair gives one ratio.
The verdict rests on the order statistics of those ratios, which assume nothing of their distribution: the k-th smallest
of n ratios lies below the true median with a probability that is a binomial sum, and k is the largest for which the
chance of being wrong stays under 3.3 %. With 5 pairs that is the smallest ratio (3.1 %), with 11 the third (3.3 %).

Where the median says that there is much to gain and the bound does not, something was in the way of a pair, or the
times have two modes (threads of two libraries that now and then meet). Then as many pairs are run again, 13 in all at
least, and all of them are looked at once more, with 1.7 %: two looks together are wrong in 5 % of cases at most. Of 13
pairs the third smallest ratio counts (1.1 %), so two disturbed ones do not decide.

Where it can be told of each timing whether its threads had their processors, pairs of which one half was disturbed do
not count, as soon as there are as many others as a verdict needs.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WORTH_A_SECOND_LOOK", "Timing", "compare_speed", "synchronize", "time_once"]

_FIRST_LOOK, _SECOND_LOOK = 0.033, 0.017
WORTH_A_SECOND_LOOK, _PAIRS_OF_A_SECOND_LOOK = 1.1, 13
_MOST_PAIRS = 25
# Where each of the fewest pairs says that one state is faster by so much, more pairs would only say it again.
_CLEAR = 1.1
_PATIENCE = 10.0


@dataclass(frozen=True)
class Timing:
    """Two states timed against each other.

    Attributes:
        before: Median seconds in the first state.
        after: Median seconds in the second.
        ratio: Median of the pairs' ratios; above 1 the second is faster.
        low: A bound that the true median ratio is above with 95 % confidence.
        high: A bound that it is below with 95 % confidence.
        pairs: Number of pairs.
        clean: Whether nothing disturbed the pairs that this rests on, as far as that was watched.
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
    """Time one piece of work in two states, in turn.

    Args:
        run: The work. It should have run once in both states already.
        before: Switches to the first state, the way it was. Not timed.
        after: Switches to the second, the candidate. Not timed.
        device_type: torch's device type, whose work is waited for before a clock is read.
        seconds: About how long this may take; a second look takes as long again, or 8 pairs. At most 25 pairs are run
            for each.
        fewest: The pairs that are run in any case, unless the second state takes ten times as long as the first (a
            candidate that compiles again and again). With fewer than 5 the bounds hold with less than 95 %.
        clock: Seconds; `time.process_time` for the time that processors worked.
        clean: Called when a timing begins; what it returns says at the end whether nothing disturbed it.
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
            # The order within a pair alternates: whoever runs second finds warmer or fuller caches.
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
    timing = judged(_FIRST_LOOK)
    if not _is_clear(timing):
        run_pairs(pairs)
        timing = judged(_FIRST_LOOK)
    undecided = timing.low <= 1.0 and timing.ratio >= WORTH_A_SECOND_LOOK
    if (undecided or not timing.clean) and clock() - begun <= 2 * seconds:
        run_pairs(max(2 * pairs, _PAIRS_OF_A_SECOND_LOOK))
        timing = judged(_SECOND_LOOK)
    return timing


def _is_clear(timing: Timing) -> bool:
    return timing.clean and (timing.low >= _CLEAR or timing.high <= 1 / _CLEAR)


def _judged(first: list[float], second: list[float], alpha: float) -> Timing:
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    rank = _rank(len(ratios), alpha)
    return Timing(
        before=statistics.median(first),
        after=statistics.median(second),
        ratio=statistics.median(ratios),
        low=ratios[rank],
        high=ratios[-1 - rank],
        pairs=len(ratios),
    )


def _rank(count: int, alpha: float) -> int:
    chance, rank = 0.0, -1
    for k in range(count):
        chance += math.comb(count, k) / 2**count
        if chance > alpha:
            break
        rank = k
    return max(rank, 0)


def time_once(run: Callable[[], object], device_type: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one run of a piece of work takes.

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
    """Wait until the device has done what was asked of it; nothing to do on a CPU."""
    if device_type == "cpu":
        return
    import torch

    getattr(torch, device_type).synchronize()
