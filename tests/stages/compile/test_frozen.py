"""Compilation with the weights as constants: fast only as long as the weights are those that were compiled."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import FellBack, Recompiled
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.stages.compile import inductor
from accelerate_tts.stages.compile.inductor import Frozen
from accelerate_tts.stages.compile.whole import CompiledCall, CompileStage, FrozenCompileStage
from accelerate_tts.tuning.exclusions import obstacle
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Repeats, pays_off, tune

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A transformer's block, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("scale", torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x) * self.scale
        y = nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        return x + self.out(torch.tanh(y))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Tanh()).eval()


def x(length: int = 5) -> torch.Tensor:
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length))


def run(model: nn.Module, *args: Any) -> Any:
    with torch.inference_mode():
        return model(*args)


def frozen(model: nn.Module) -> CompiledCall:
    call = CompiledCall(model, "model", "default", frozen=True)
    call.on()
    return call


def fallen(seen: list[Event]) -> list[FellBack]:
    return [event for event in seen if isinstance(event, FellBack)]


@pytest.fixture
def traced(compile_by: Callable[..., None]) -> list[tuple[int, ...]]:
    """inductor is left out: graphs run as they were traced. The shapes of the last inputs of each run of a graph."""
    runs: list[tuple[int, ...]] = []

    def compiler(graph: Any, _inputs: Any, **_options: Any) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            runs.append(next((tuple(arg.shape) for arg in reversed(args) if isinstance(arg, torch.Tensor)), ()))
            return graph.forward(*args)

        return compiled

    compile_by(compiler)
    return runs


# --- with inductor itself ------------------------------------------------------------------------------------------


@pytest.fixture
def without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are constants, but no kernels are compiled and timed for them, which takes half a minute."""

    def options(_self: Frozen) -> Any:
        from torch._inductor import config

        return config.patch(freezing=True)

    monkeypatch.setattr(Frozen, "options", options)


def test_the_options_are_those_of_the_thread_that_calls() -> None:
    from torch._inductor import config

    with inductor.options(Frozen(nn.Linear(2, 2))):
        assert (config.freezing, config.max_autotune) == (True, True)
    assert (config.freezing, config.max_autotune) == (False, False)


def test_one_graph_for_every_length_until_the_weights_are_written(without_timing: None, seen: list[Event]) -> None:
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    references = {length: run(model, x(length)) for length in range(2, 30, 3)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    call = frozen(model)
    assert call.graphs == 0
    for length, expected in references.items():
        torch.testing.assert_close(run(model, x(length)), expected, rtol=1e-4, atol=1e-5)
    assert call.graphs == 1
    call.end_warmup()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert type(model) is nn.Sequential
    assert copy.deepcopy(model)._compiled_call_impl is None
    assert pickle.loads(pickle.dumps(model))._compiled_call_impl is None
    call.off()
    assert torch.equal(run(model, x(8)), references[8])
    call.on()
    torch.testing.assert_close(run(model, x(8)), references[8], rtol=1e-4, atol=1e-5)
    assert not [event for event in seen if event.degraded]
    # The graph has copies of the weights, packed for its kernels: they must not be served when the weights are others.
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    for _ in range(3):
        assert torch.equal(run(model, x(8)), run(other, x(8)))
    (event,) = fallen(seen)
    assert (event.what, event.stage) == ("model", FrozenCompileStage.name)
    assert "weights were written" in event.reason
    assert model._compiled_call_impl is None
    call.on()  # it stays off, whoever switches it on
    assert model._compiled_call_impl is None
    assert call.graphs == 1


def test_a_call_with_gradients_works(without_timing: None, seen: list[Event]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    plain = copy.deepcopy(model)
    call = frozen(model)
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(run(model, inputs), run(plain, inputs))
    for one in (model, plain):
        one(inputs).sum().backward()
    torch.testing.assert_close(model(inputs), plain(inputs))
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
    assert call.graphs == 2
    assert not fallen(seen)
    with torch.no_grad():
        model[0].weight.sub_(model[0].weight.grad)  # a training step
        plain[0].weight.sub_(plain[0].weight.grad)
    assert torch.equal(model(inputs), plain(inputs))
    assert len(fallen(seen)) == 1


# --- without ---------------------------------------------------------------------------------------------------------


def write_data(model: nn.Module) -> None:
    model[0].out.bias.data = model[0].out.bias.data + 1


def new_parameter(model: nn.Module) -> None:
    model[0].out.bias = nn.Parameter(model[0].out.bias.detach() + 1)


def write_buffer(model: nn.Module) -> None:
    model[0].scale.mul_(2.0)


def new_buffer(model: nn.Module) -> None:
    model[0].scale = model[0].scale * 2.0


def load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)


def no_bias(model: nn.Module) -> None:
    model[0].out.bias = None


WRITES = [write_data, new_parameter, write_buffer, new_buffer, load, assign, no_bias]


@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_change_a_weight_is_seen(
    write: Callable[[nn.Module], None], traced: list[Any], seen: list[Event]
) -> None:
    model = build()
    frozen(model)
    before = run(model, x())
    assert traced
    traced.clear()
    with torch.no_grad():
        write(model)
    expected = copy.deepcopy(model)(x())
    assert not torch.allclose(before, expected)
    assert torch.equal(run(model, x()), expected)
    assert len(fallen(seen)) == 1
    assert not traced


def test_a_weight_that_was_replaced_and_then_written() -> None:
    model = nn.Linear(3, 3)
    state = Frozen(model)
    assert not state.outdated()
    old = model.weight
    model.weight = nn.Parameter(old.detach().clone())
    assert state.outdated()
    model.weight = old
    assert not state.outdated()
    with torch.no_grad():
        old.zero_()
    assert state.outdated()


def test_reading_changes_nothing() -> None:
    model = build()
    state = Frozen(model)
    run(model, x())
    model.train().eval().requires_grad_(requires_grad=False)
    copy.deepcopy(model.state_dict())
    model.to(torch.float32)
    assert not state.outdated()
    model.double()
    assert state.outdated()


def test_a_module_that_writes_its_own_buffers_is_never_served_stale(traced: list[Any], seen: list[Event]) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.linear(x) * 0 + self.count

    model = Counting()
    frozen(model)
    with torch.no_grad():
        assert [float(model(torch.ones(1, 4)).mean()) for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert len(fallen(seen)) == 1


@pytest.mark.parametrize("is_frozen", [True, False])
def test_beyond_the_limit_known_inputs_stay_compiled(is_frozen: bool, traced: list[Any], seen: list[Event]) -> None:
    torch.manual_seed(0)
    model = Repeats().eval()
    inputs = torch.ones(2, 4)
    expected = {steps: run(model, inputs, steps) for steps in range(1, 6)}
    call = CompiledCall(model, "model", "default", frozen=is_frozen)
    call.on()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 2}):
        for steps in (1, 2):
            torch.testing.assert_close(run(model, inputs, steps), expected[steps])
        assert call.graphs == 2
        assert len(traced) == 2
        for _ in range(2):
            for steps in (3, 4, 5):
                assert torch.equal(run(model, inputs, steps), expected[steps])
        assert len(traced) == 2
        (event,) = fallen(seen)  # not one for each call
        assert "at further lengths" in event.stage
        assert "lengths=" in event.reason
        for steps in (2, 1, 2):
            torch.testing.assert_close(run(model, inputs, steps), expected[steps])
        assert len(traced) == 5
        assert torch.equal(run(model, inputs, 5), expected[5])
        assert len(fallen(seen)) == 1
    assert call.graphs == 2
    assert model._compiled_call_impl is call


@pytest.mark.parametrize("is_frozen", [True, False])
def test_what_was_not_warmed_up_is_an_event_and_right(is_frozen: bool, traced: list[Any], seen: list[Event]) -> None:
    """A request must not wait half a minute for a frozen graph; a plain one is compiled, and said."""
    torch.manual_seed(0)
    model = Repeats().eval()
    inputs = torch.ones(2, 4)
    expected = {steps: run(model, inputs, steps) for steps in (1, 2)}
    call = CompiledCall(model, "model", "default", frozen=is_frozen)
    call.on()
    run(model, inputs, 1)
    call.end_warmup()
    for steps in (1, 2, 1, 2, 1):
        torch.testing.assert_close(run(model, inputs, steps), expected[steps])
    assert [event.graphs for event in seen if isinstance(event, Recompiled)] == ([] if is_frozen else [2])
    events = fallen(seen)
    assert len(events) == (1 if is_frozen else 0)
    assert all("not warmed up" in event.stage for event in events)
    assert len(traced) == (4 if is_frozen else 6)
    assert model._compiled_call_impl is call


# --- the stage -----------------------------------------------------------------------------------------------------


def part_of(model: nn.Module, **options: Any) -> Part:
    return Part("model", "decoder", model, **options)


def test_where_it_applies() -> None:
    stage = FrozenCompileStage()
    assert stage.applies(part_of(build())) is None
    assert stage.applies(part_of(nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 8)))) == "not made of linear layers"
    assert stage.applies(part_of(nn.Identity())) == "not made of linear layers"
    assert stage.group == "linear layers"


def test_what_the_user_has_compiled_is_left_alone(traced: list[Any]) -> None:
    model = build()
    model.compile()
    assert obstacle(FrozenCompileStage(), part_of(model)) == "is compiled already"
    model = build()
    call = CompiledCall(model, "model", "default")  # as compile_model() does
    call.on()
    for stage in (FrozenCompileStage(), CompileStage("default")):
        assert obstacle(stage, part_of(model)) == "is compiled already"
    assert model._compiled_call_impl is call


def test_kept_by_tuning_and_undone(traced: list[Any], decide: Any, seen: list[Event]) -> None:
    decide(compare=pays_off, hopeless=float("inf"))
    model = build()
    reference = run(model, x())
    plan = ModelPlan("model", (model,), (part_of(model),))
    calls = warmup_calls([x(5), x(9)], Loaded(model), "inference")
    stages = [FrozenCompileStage(), CompileStage("default")]
    tuning = tune(plan, calls, stages, DeviceInfo("cpu", "test"), Limits(60.0))
    (result,) = tuning.receipt.stages  # the other one does not apply to what is compiled
    assert (result.stage, result.kept) == (FrozenCompileStage.name, True)
    assert result.graphs
    for length in (3, 7, 30):
        run(model, x(length))
    assert tuning.receipt.recompiles == 0
    assert not [event for event in seen if event.degraded]
    with torch.no_grad():
        torch.testing.assert_close(model(x()), reference)  # a mode that service was not said to use
    assert not [event for event in seen if event.degraded]
    tuning.undo()
    assert model._compiled_call_impl is None
    assert torch.equal(run(model, x()), reference)


# --- inductor's workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("set_already", [True, False])
def test_workers_are_told_the_path_only_where_a_typing_py_stands_in_the_way(
    there: bool, set_already: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(sys, "path", ["", "/first", "/second"])
    monkeypatch.delenv("TORCH_CUSTOM_PYTHONPATH", raising=False)
    if there:
        (tmp_path / "typing.py").write_text("raise SystemError('a Python 2 backport')")
    if set_already:
        monkeypatch.setenv("TORCH_CUSTOM_PYTHONPATH", "/the/users")
    inductor.mend_workers()
    expected = "/the/users" if set_already else os.pathsep.join(["/first", "/second"]) if there else None
    assert os.environ.get("TORCH_CUSTOM_PYTHONPATH") == expected
