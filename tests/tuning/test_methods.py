"""Parts that a system does not run by calling the module: by `.forward()`, or by a method of upstream's own."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.models.named import Known
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.stages.compile.regional import block_stacks
from accelerate_tts.stages.compile.whole import CompileStage, FrozenCompileStage
from accelerate_tts.tuning.capture import outputs_of, watch
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, tune

pytestmark = pytest.mark.usefixtures("steady_clock")


class Estimator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.seconds = 0.01

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.linear(x) * t

    def inference(self, x: torch.Tensor, *, t: float) -> torch.Tensor:
        return self.forward(x, t) + 1.0


class Solver(nn.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.estimator = Estimator()
        self.method = method
        self.eval()

    def speak(self) -> torch.Tensor:
        x = torch.ones(2, 8)
        for step in range(3):
            x = x + getattr(self.estimator, self.method)(x, t=0.1 * step)
        return x


METHODS = ["__call__", "forward", "inference"]


@pytest.mark.parametrize("method", METHODS)
def test_a_part_is_watched_and_timed_however_it_is_run(method: str) -> None:
    model = Solver(method)
    before = dict(vars(model.estimator))
    part = Part("estimator", "estimator", model.estimator, method=method)
    with torch.inference_mode(), watch((part,), "cpu") as seen:
        expected = model.speak()
    captured = seen["estimator"]
    assert (captured.count, len(captured.calls), captured.obstacle) == (3, 3, "")
    assert captured.seconds > 0.03
    assert vars(model.estimator) == before
    replayed = [call.run(model.estimator) for call in captured.prepared(model.estimator, "all")]
    with torch.inference_mode(), outputs_of(part) as outputs:
        assert torch.equal(model.speak(), expected)
    assert all(torch.equal(a, b[0]) for a, b in zip(replayed, outputs, strict=True))
    assert vars(model.estimator) == before


@pytest.mark.parametrize("method", METHODS)
def test_tuning_tries_stages_on_it(method: str) -> None:
    model = Solver(method)
    plan = ModelPlan("solver", (model,), (Part("estimator", "estimator", model.estimator, method=method),))
    calls = warmup_calls(lambda loaded: loaded.speak(), Loaded(model), "inference")
    tuning = tune(plan, calls, [Stage("faster", seconds=0.0)], DeviceInfo("cpu", "test"), Limits(30.0))
    (result,) = tuning.receipt.stages
    assert result.kept, result.reason
    assert result.before is not None
    assert 0.025 < result.before < 0.1, "three calls of the part, not the whole"
    tuning.undo()
    assert model.estimator.seconds == 0.01


def test_an_instances_own_method_comes_back() -> None:
    model = Solver("inference")
    own: Any = lambda x, *, t: x * t  # noqa: E731
    vars(model.estimator)["inference"] = own
    part = Part("estimator", "estimator", model.estimator, method="inference")
    with watch((part,), "cpu") as seen:
        model.speak()
    assert seen["estimator"].count == 3
    assert vars(model.estimator)["inference"] is own


def test_a_method_that_fails_leaves_nothing_behind() -> None:
    model = Solver("inference")
    part = Part("estimator", "estimator", model.estimator, method="inference")
    with pytest.raises(TypeError), watch((part,), "cpu"):
        model.estimator.inference("wrong", t=0.1)
    assert "inference" not in vars(model.estimator)


def test_torch_compile_does_not_stand_in_for_a_method() -> None:
    model = Solver("forward")
    part = Part("estimator", "estimator", model.estimator, method="forward")
    for stage in (CompileStage("default"), FrozenCompileStage()):
        assert "by .forward()" in str(stage.applies(part))


def test_a_plan_names_the_method() -> None:
    known = Known(
        "test", "1.0", {"estimator": "estimator", "estimator.linear": "model"}, methods={"estimator": "forward"}
    )
    assert [part.method for part in known("solver", Solver("forward"))] == ["forward", "__call__"]


def test_blocks_of_several_lists_share_a_graph_unless_they_have_a_cache() -> None:
    def block(cls: Any = None) -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2) if cls is None else cls()

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, hidden_states: Any, past_key_values: Any = None) -> Any:
            return hidden_states

    lists = nn.ModuleList([nn.ModuleList([block(), block()]), nn.ModuleList([block()])])
    assert [len(row) for row in block_stacks(lists)] == [3]
    cached = nn.ModuleList([nn.ModuleList([block(Cached), block(Cached)]) for _ in range(2)])
    assert [len(row) for row in block_stacks(cached)] == [2, 2]
    shared = nn.ModuleList([block(), block()])
    assert [len(row) for row in block_stacks(nn.ModuleList([shared, nn.Sequential(*shared)]))] == [2]


def test_blocks_beside_gaps_and_with_a_state_of_any_type_are_found() -> None:
    class Stateful(nn.TransformerEncoderLayer):
        def get_extra_state(self) -> None:
            """Saves nothing, as a layer for another device does."""

    def block(cls: type[nn.Module] = nn.TransformerEncoderLayer) -> Any:
        return cls(8, 2)

    for blocks in (nn.ModuleList([block(), block(), block()]), nn.Sequential(block(), block(), block())):
        blocks._modules["1"] = None  # what `blocks[1] = None` does
        assert [len(row) for row in block_stacks(blocks)] == [2]
    stateful = nn.ModuleList([block(Stateful), None, block(Stateful), block()])
    assert [len(row) for row in block_stacks(stateful)] == [2]


def test_of_a_long_step_fewer_calls_are_timed() -> None:
    model = Solver("forward")
    part = Part("estimator", "estimator", model.estimator, method="forward")
    with torch.inference_mode(), watch((part,), "cpu") as seen:
        for _ in range(4):
            model.speak()
    captured = seen["estimator"]
    assert len(captured.calls) == 6
    assert len(captured.prepared(model.estimator, "loop")) == 6, "of a hundredth of a second each"
    captured.enough = 0.025
    assert 1 <= len(captured.prepared(model.estimator, "loop")) <= 3
    captured.enough = 0.0
    assert len(captured.prepared(model.estimator, "loop")) == 1
    assert len(captured.prepared(model.estimator, "all")) == 6, "all are compared"


@pytest.mark.parametrize("steps", [5, 6, 8, 10, 40])
@pytest.mark.parametrize("longer", [1, 4, 10])
def test_a_second_length_after_a_loop_is_captured_too(steps: int, longer: int) -> None:
    """Ten steps of a solver at one length fill all places: the longer text's have to be compared all the same."""
    part = Part("linear", "estimator", nn.Linear(8, 8))
    with torch.inference_mode(), watch((part,), "cpu") as seen:
        for rows, times in ((2, steps), (5, longer), (7, 1)):
            for _ in range(times):
                part.module(torch.ones(rows, 8))
    captured = seen["linear"]
    kept = [call.args[0].shape[0] for call in captured.calls]
    assert set(kept) == {2, 5, 7}
    assert kept == sorted(kept), "in the order in which they came"
    assert len(kept) <= 6
    assert captured.prepared(part.module, "loop")
    assert captured.prepared(part.module, "prefill")


def test_two_texts_through_a_solver_are_tuned() -> None:
    model = Solver("forward")
    model.estimator.seconds = 0.0

    def speak(texts: tuple[int, ...] = (2, 6)) -> list[torch.Tensor]:
        spoken = []
        for rows in texts:
            x = torch.ones(rows, 8)
            for step in range(10):
                x = x + model.estimator(x, t=0.01 * step)
            spoken.append(x)
        return spoken

    plan = ModelPlan("solver", (model,), (Part("estimator", "estimator", model.estimator),))
    calls = warmup_calls(lambda _loaded: speak(), Loaded(model), "inference")
    tuning = tune(plan, calls, [], DeviceInfo("cpu", "test"), Limits(60.0))
    assert tuning.complete, tuning.receipt.notes
