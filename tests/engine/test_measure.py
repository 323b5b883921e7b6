"""The verdict on speed: which rank, which bound, and that switching is not timed."""

from __future__ import annotations

import time
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts.engine import measure


@given(st.integers(1, 200))
def test_the_rank_leaves_at_most_five_percent(count: int) -> None:
    rank = measure._rank(count)
    wrong = sum(comb(count, k) for k in range(rank + 1)) / 2**count
    if count >= 5:
        assert wrong <= 0.05
        assert wrong + comb(count, rank + 1) / 2**count > 0.05  # and it is the largest such rank


def test_the_documented_ranks() -> None:
    assert (measure._rank(5), measure._rank(11)) == (0, 2)


def test_a_real_difference_is_seen_and_switches_are_not_timed() -> None:
    state = {"wait": 0.0}

    def switch(wait: float) -> None:
        time.sleep(0.003)
        state["wait"] = wait

    timing = measure.compare_speed(
        lambda: time.sleep(state["wait"]), lambda: switch(0.01), lambda: switch(0.001), "cpu", 0.1
    )
    assert timing.low > 1.0
    assert timing.low <= timing.ratio <= timing.high
    assert timing.before > timing.after
    assert 5 <= timing.pairs <= 25


def test_both_orders_occur_within_pairs() -> None:
    log: list[str] = []
    measure.compare_speed(lambda: None, lambda: log.append("a"), lambda: log.append("b"), "cpu", 0.0)
    pairs = ["".join(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert set(pairs) == {"ab", "ba"}
    assert len(pairs) == 5


def test_nothing_to_wait_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: pytest.fail("no CUDA work was asked for"))
    measure.synchronize("cpu")
