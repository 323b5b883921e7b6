"""Use of the budget: the largest parts first, long trials last, and no trial of a stage that never gained."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import BudgetTooSmall, Trying
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.tuning.findings import Tuning
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.promises import PROMISES, promise
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, tune

pytestmark = pytest.mark.usefixtures("steady_clock")

X = torch.ones(1, 4)


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x * self.weight


class Speech(nn.Module):
    """A text encoder, which takes a tenth of the time, and a vocoder."""

    def __init__(self, seconds: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.vocoder = Slow(0.1 * seconds), Slow(0.9 * seconds)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vocoder(self.encoder(x))  # type: ignore[no-any-return]


class Halves(Stage):
    """Takes half of the time. Trying it takes as long as it is told."""

    least_share = BaseStage.least_share

    def __init__(self, name: str = "halves", cost: float = 0.0) -> None:
        super().__init__(name, {"prepare": lambda: time.sleep(cost)})
        self.cost = cost

    def changes(self, module: Any) -> dict[str, Any]:
        return {"seconds": module.seconds / 2}


def run(model: Speech, *stages: Halves, budget: float) -> Tuning:
    parts = (Part("encoder", "encoder", model.encoder), Part("vocoder", "vocoder", model.vocoder))
    calls = warmup_calls(X, Loaded(model), "inference")
    return tune(ModelPlan("model", (model,), parts), calls, stages, DeviceInfo("cpu", "test"), Limits(budget))


def tried(seen: list[Event]) -> list[tuple[str, str]]:
    return [(event.what.removeprefix("model: "), event.stage) for event in seen if isinstance(event, Trying)]


def test_what_is_quick_comes_first_on_every_part_and_the_longest_part_before_the_others(seen: list[Event]) -> None:
    run(Speech(), Halves("slow", 8.0), Halves("quick"), budget=500.0)
    assert tried(seen) == [("vocoder", "quick"), ("encoder", "quick"), ("vocoder", "slow"), ("encoder", "slow")]


@pytest.mark.parametrize("budget", [180.0, 600.0])
def test_what_takes_long_and_never_gained_anything_on_its_like_is_not_tried(budget: float, seen: list[Event]) -> None:
    """torch.compile on a vocoder whose convolutions are channels-last: 20 to 40 s of a start, and dropped each time."""
    stages = [Halves("channels-last convolutions"), Halves("torch.compile", 10.0)]
    receipt = run(Speech(), *stages, budget=budget).receipt
    assert (("vocoder", "torch.compile") in tried(seen)) is (budget >= 600)
    assert ("encoder", "torch.compile") in tried(seen), "of which nobody knows anything"
    (result,) = [one for one in receipt.stages if (one.part, one.stage) == ("vocoder", "torch.compile")]
    assert result.kept is (budget >= 600)
    if not result.kept:
        assert result.reason.endswith("gained nothing on similar parts; tune_seconds=600 tries it")
    assert not any(isinstance(event, BudgetTooSmall) for event in seen)


@pytest.mark.parametrize(("cost", "seconds"), [(30.0, 0.1), (0.0, 2.0)], ids=["to prepare", "to be timed"])
def test_a_budget_that_is_too_small_for_the_best_says_which_one_is_not(
    cost: float, seconds: float, seen: list[Event]
) -> None:
    stage = Halves("slow", cost)
    receipt = run(Speech(seconds), stage, budget=15.0).receipt
    assert "vocoder" not in {result.part for result in receipt.kept}
    (event,) = [event for event in seen if isinstance(event, BudgetTooSmall)]
    assert (event.what, event.stage, event.seconds) == ("model: vocoder", "slow", 15.0)
    assert any(f"tune_seconds of about {event.wants:.0f}" in note for note in receipt.notes)
    seen.clear()
    receipt = run(Speech(seconds), stage, budget=1.1 * event.wants).receipt
    assert "vocoder" in {result.part for result in receipt.kept}, str(receipt)


class Tenfold(Halves):
    """Takes a twentieth of the time, of the vocoder alone."""

    def changes(self, module: Any) -> dict[str, Any]:
        return {"seconds": module.seconds / 20} if module.seconds > 0.1 else {}


@pytest.mark.parametrize("cost", [0.0, 8.0], ids=["cheap", "costly"])
def test_a_small_part_is_tried_once_it_is_much_of_what_is_left(cost: float, seen: list[Event]) -> None:
    """T3's head is a hundredth of the untouched time, and a tenth of what a step in 8 bits leaves."""
    model = Speech(1.0)
    model.encoder.seconds = 0.01
    receipt = run(model, Tenfold("tenfold"), Halves("halves", cost), budget=500.0).receipt
    assert (("encoder", "halves") in tried(seen)) is (cost == 0), str(receipt)
    assert (("encoder", "halves") in {(result.part, result.stage) for result in receipt.kept}) is (cost == 0)
    (first,) = [result for result in receipt.stages if (result.part, result.stage) == ("encoder", "tenfold")]
    assert not first.kept


def test_every_promise_is_of_a_stage_that_there_is_and_names_its_source() -> None:
    names = {
        stage.name
        for precision in ("exact", "balanced", "fast")
        for stage in default_stages("cpu", "default", precision)
    }  # type: ignore[arg-type]
    for row in PROMISES:
        assert row.stage in names
        assert not row.beside or any(name.startswith(row.beside) for name in names)
        assert row.ratio >= 1.0
        assert row.source.startswith("docs/")


def test_the_first_row_that_fits_counts() -> None:
    found: Any = promise("torch.compile, frozen", "model", ["skinny linear layers (fp32)"])
    assert found.ratio == 1.0
    found = promise("torch.compile, frozen", "model")
    assert found.ratio > 1.0
    assert promise("torch.compile, frozen", "flow") is None
    assert promise("torch.compile", "vocoder") is None
