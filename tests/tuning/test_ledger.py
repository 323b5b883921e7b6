"""A ledger switches changes in the order of a stack through any lift, put, supersede and drop; a request is checked."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts import SettingsError, WarmupError
from accelerate_tts.receipts.receipt import StageResult
from accelerate_tts.tuning.ledger import AppliedChange, Ledger
from accelerate_tts.tuning.load_request import LoadRequest
from accelerate_tts.tuning.warmup import Loaded


class Stacked:
    """A change that may only be switched off from the top, as a change of a module's class."""

    graphs = None

    def __init__(self, stack: list[Stacked]) -> None:
        self.stack = stack

    def on(self) -> None:
        if self not in self.stack:
            self.stack.append(self)

    def off(self) -> None:
        if self in self.stack:
            assert self.stack[-1] is self, "another change was made on top of it"
            self.stack.pop()

    def end_warmup(self) -> None: ...


def test_a_verdict_that_was_not_sure_is_not_sure_once_it_is_undone() -> None:
    ledger = Ledger()
    for number, found_sure in enumerate((True, False)):
        result = StageResult("part", f"stage {number}", kept=True, reason="", sure=found_sure)
        ledger.enter(result, AppliedChange("part", f"stage {number}", "", Stacked([])))
    ledger.drop("wrong")
    assert [(result.kept, result.sure) for result in ledger.results] == [(False, True), (False, False)]


@given(st.lists(st.tuples(st.sampled_from(["keep", "supersede", "drop", "undo", "lift and put"]), st.integers(0, 5))))
def test_changes_are_switched_from_the_top(steps: list[tuple[str, int]]) -> None:
    stack: list[Stacked] = []
    ledger = Ledger()
    for number, (step, which) in enumerate(steps):
        chosen = ledger.kept[which % len(ledger.kept)] if ledger.kept else None
        if step in {"keep", "supersede"}:
            replaced = chosen if step == "supersede" else None
            if replaced is not None:
                ledger.lift(replaced)
            change = Stacked(stack)
            change.on()
            result = StageResult("part", f"stage {number}", kept=True, reason="")
            ledger.enter(result, AppliedChange("part", f"stage {number}", "", change), replaced)
        elif step == "drop" and chosen is not None:
            ledger.drop("wrong", lambda result, name=chosen.stage: result.stage == name)
        elif step == "undo" and chosen is not None:
            place = ledger.kept.index(chosen)
            slower = ledger.displaced.get((chosen.part, chosen.stage))
            expected = [*ledger.kept[:place], *([slower[0]] if slower else []), *ledger.kept[place + 1 :]]
            ledger.undo(next(result for result in ledger.results if result.stage == chosen.stage), "wrong")
            assert ledger.kept == expected, "a slower alternative comes back where the faster one was"
        elif chosen is not None:
            ledger.lift(chosen)
            assert chosen.change not in stack
            ledger.put(chosen)
        assert stack == [kept.change for kept in ledger.kept]
        assert {result.stage for result in ledger.results if result.kept} == {kept.stage for kept in ledger.kept}
    ledger.off()
    assert not stack


def test_a_slower_alternative_that_fails_half_way_is_switched_off_with_the_others() -> None:
    """It comes back after a faster one was wrong in the whole, perhaps with no memory left for its weights."""
    stack: list[Stacked] = []

    class Failing(Stacked):
        def on(self) -> None:
            super().on()
            raise MemoryError("no memory")

    ledger = Ledger()
    slower = AppliedChange("part", "slower", "group", Stacked(stack))
    slower.change.on()
    ledger.enter(StageResult("part", "slower", kept=True, reason=""), slower)
    ledger.lift(slower)
    faster = AppliedChange("part", "faster", "group", Stacked(stack))
    faster.change.on()
    verdict = StageResult("part", "faster", kept=True, reason="")
    ledger.enter(verdict, faster, slower)
    slower.change.__class__ = Failing
    with pytest.raises(MemoryError):
        ledger.undo(verdict, "wrong")
    ledger.off()
    assert not stack


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"warmup": 5}, WarmupError), ({"lengths": (1, 2)}, WarmupError), ({"mode": "fast"}, SettingsError),
        ({"precision": "some"}, SettingsError), ({"tune_seconds": -1}, SettingsError),
        ({"lengths": (2, 1)}, SettingsError),
    ],
)  # fmt: skip
def test_a_request_is_checked_where_it_is_made(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        LoadRequest(**wrong)
    with pytest.raises(error):
        replace(LoadRequest(), **wrong)


def test_a_request_goes_with_a_pickled_function() -> None:
    request = pickle.loads(pickle.dumps(LoadRequest("a text", lengths=(5, 9))))
    assert (request.warmup, request.lengths, request.stopped()) == ("a text", (5, 9), False)
    assert replace(request, loaded=Loaded("voice")).loaded.subject == "voice"
