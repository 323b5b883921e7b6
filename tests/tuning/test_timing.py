"""The verdict on speed: the rank, the bound, and switching outside the clock."""

from __future__ import annotations

import time
from itertools import cycle
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts.tuning import timing

LOOKS = (timing.FIRST_LOOK, timing.SECOND_LOOK)


@given(st.integers(1, 200), st.sampled_from(LOOKS))
def test_the_rank_leaves_at_most_what_a_look_may_be_wrong_by(count: int, alpha: float) -> None:
    rank = timing.rank_of(count, alpha)
    wrong = sum(comb(count, k) for k in range(rank + 1)) / 2**count
    if count >= 6:
        assert wrong <= alpha
        assert wrong + comb(count, rank + 1) / 2**count > alpha  # and it is the largest such rank


def test_all_looks_together_are_wrong_in_five_percent_at_most() -> None:
    assert sum(LOOKS) <= 0.05


def test_the_documented_ranks() -> None:
    assert [timing.rank_of(count, timing.FIRST_LOOK) for count in (5, 11)] == [0, 2]
    assert timing.rank_of(timing.PAIRS_OF_A_SECOND_LOOK, timing.SECOND_LOOK) == 2


def _times(first: list[float], second: list[float]) -> timing.Timing:
    """Compare work with these times in the two states, on a clock that only the work moves."""
    state = {"clock": 0.0, "next": iter(first)}
    times = {"first": cycle(first), "second": cycle(second)}

    def switch(name: str) -> None:
        state["next"] = times[name]

    def run() -> None:
        state["clock"] += next(state["next"])  # type: ignore[call-overload,operator]

    states = (lambda: switch("first"), lambda: switch("second"))
    return timing.compare_speed(run, *states, "cpu", 1.0, clock=lambda: state["clock"])  # type: ignore[arg-type,return-value]


def test_times_of_two_modes_get_a_second_look() -> None:
    # In one call out of three nothing is in the way: of 8 pairs the second smallest ratio is 1.0, of 16 too few are.
    found = _times([0.1, 0.1, 0.025, 0.1, 0.1, 0.1, 0.1, 0.025] + [0.1] * 8, [0.025])
    assert found.pairs == 16
    assert found.low > 2.0


def test_a_disturbed_pair_does_not_decide() -> None:
    found = _times([0.2], [0.1, 0.1, 0.3, *[0.1] * 20])
    assert found.pairs == 13
    assert found.low > 1.5


def test_no_second_look_where_the_median_says_little_or_all_is_said() -> None:
    assert _times([0.1, 0.104], [0.1]).pairs == 5
    assert _times([0.1, 0.11], [0.05]).pairs == 5, "the fewest say it clearly"
    assert _times([0.1, 0.11], [0.098]).pairs == 5


def test_a_real_difference_is_seen_and_switches_are_not_timed() -> None:
    state = {"wait": 0.0, "clock": 0.0}

    def switch(wait: float) -> None:
        state["clock"] += 0.003
        state["wait"] = wait

    def run() -> None:
        state["clock"] += state["wait"]

    found = timing.compare_speed(
        run, lambda: switch(0.01), lambda: switch(0.001), "cpu", 0.1, clock=lambda: state["clock"]
    )
    assert found.before == pytest.approx(0.01)
    assert found.after == pytest.approx(0.001)
    assert found.low == pytest.approx(10.0)
    assert found.low <= found.ratio <= found.high
    assert 5 <= found.pairs <= 25


def test_the_machines_own_clock_is_read_unless_another_is_given() -> None:
    state = {"wait": 0.0}

    def switch(wait: float) -> None:
        state["wait"] = wait

    found = timing.compare_speed(
        lambda: time.sleep(state["wait"]), lambda: switch(0.004), lambda: switch(0.001), "cpu", 0.1
    )
    assert found.before >= 0.004, "no machine sleeps for less"
    assert found.after >= 0.001


def test_both_orders_occur_within_pairs() -> None:
    log: list[str] = []
    now = [0.0]

    def run() -> None:
        now[0] += 0.005

    timing.compare_speed(run, lambda: log.append("a"), lambda: log.append("b"), "cpu", 0.0, clock=lambda: now[0])
    pairs = ["".join(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert set(pairs) == {"ab", "ba"}
    assert len(pairs) == 5


def test_nothing_to_wait_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: pytest.fail("no CUDA work was asked for"))
    timing.synchronize("cpu")
