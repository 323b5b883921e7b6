"""A ledger switches changes in the order of a stack through any lift, put, supersede and drop; a request is checked."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import SettingsError, WarmupError
from accelerate_tts.plan import Part
from accelerate_tts.receipts.receipt import StageResult
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.tuning.exclusions import obstacle
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
            slower = ledger.displaced.get((chosen.part, chosen.stage))
            expected = {kept.stage for kept in ledger.kept if kept is not chosen} | (
                {slower[0].stage} if slower else set()
            )
            ledger.undo(next(result for result in ledger.results if result.stage == chosen.stage), "wrong")
            assert {kept.stage for kept in ledger.kept} == expected, "a slower alternative comes back"
        elif chosen is not None:
            ledger.lift(chosen)
            assert chosen.change not in stack
            ledger.put(chosen)
        assert stack == [kept.change for kept in ledger.kept]
        made = [int(kept.stage.split()[1]) for kept in ledger.kept]
        assert made == sorted(made), "in the order in which they were made, which a warm pack repeats"
        assert {result.stage for result in ledger.results if result.kept} == {kept.stage for kept in ledger.kept}
    ledger.off()
    assert not stack


def test_a_warm_pack_can_repeat_what_is_kept_after_an_alternative_came_back() -> None:
    """Few-row layers do not apply on top of bf16 layers, which were made on top of them."""
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval(), torch.randn(1, 256)
    part, again = (Part("part", "model", each, few_rows=1.0) for each in (model, copy.deepcopy(model)))
    stages: list[Any] = [FewRowsStage(), HalfStage(torch.bfloat16, carried=False), SkinnyStage("int8")]
    ledger = Ledger()
    with torch.no_grad():
        expected = model(x)
        for stage in stages:
            current = ledger.current("part", stage.group)
            if current is not None:
                ledger.lift(current)
            assert obstacle(stage, part) is None
            change = stage.prepare(part)
            change.on()
            result = StageResult("part", stage.name, kept=True, reason="")
            ledger.enter(result, AppliedChange("part", stage.name, stage.group, change), current)
        ledger.undo(ledger.results[-1], "wrong")
        assert [kept.stage for kept in ledger.kept] == [stage.name for stage in stages[:2]]
        found = model(x)
        for stage in stages[:2]:
            assert obstacle(stage, again) is None
            stage.prepare(again).on()
        assert torch.equal(again.module(x), found)
        ledger.off()
        assert torch.equal(model(x), expected)


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
