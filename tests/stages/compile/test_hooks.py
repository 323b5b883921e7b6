"""Compiled parts whose hooks or classes change later: dynamo does not notice, so this package does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from accelerate_tts import Event, add_hook
from accelerate_tts.events import FellBack, NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompileStage, FrozenCompileStage

pytestmark = pytest.mark.usefixtures("uncompiled")
X = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.mlp(self.norm(x))
        return found


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tripled(_module: Any, _given: Any, output: Any) -> Any:
    return output * 3


def other_class(cls: Any) -> Callable[[Any], Callable[[], Any]]:
    def change(_model: Any) -> Callable[[], Any]:
        forward = cls.forward
        cls.forward = lambda self, x: forward(self, x) * 3
        return lambda: setattr(cls, "forward", forward)

    return change


CHANGES: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "hook": lambda model: model.layers[0].mlp.up.register_forward_hook(tripled).remove,
    "pre-hook": lambda model: model.layers[1].mlp.register_forward_pre_hook(lambda _m, given: (given[0] * 3,)).remove,
    "global hook": lambda _: register_module_forward_hook(
        lambda module, _g, out: out * 3 if type(module) is nn.LayerNorm else None
    ).remove,
    "class": other_class(Mlp),
    "class of torch": other_class(nn.LayerNorm),
}  # fmt: skip
STAGES = {"whole": CompileStage("default"), "blocks": CompiledBlocksStage("default")}


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(X)
        return found


@pytest.fixture(params=STAGES)
def tuned(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    plain = Stack().eval()
    model = copy.deepcopy(plain)
    change: Any = STAGES[request.param].prepare(Part("model", "decoder", model))
    change.on()
    run(model)
    change.end_warmup()
    return plain, model, change


def test_upstreams_path_and_one_event_while_it_is_so(tuned: tuple[Any, Any, Any], seen: list[Event]) -> None:
    plain, model, change = tuned
    before, graphs = run(model), change.graphs
    for number, (name, alter) in enumerate(CHANGES.items(), 1):
        local = name in {"hook", "pre-hook"}
        undo = [alter(each) for each in ((plain, model) if local else (model,))]
        expected = run(plain)
        assert not torch.allclose(expected, before, rtol=0.1), name
        assert torch.equal(run(model), expected), name
        run(model)
        assert len(seen) == number, seen
        assert isinstance(seen[-1], NotApplied)
        for each in undo:
            each()
        assert torch.equal(run(model), before), name
    assert change.graphs == graphs, "the graph serves again, and no other one was made"
    change.off()
    assert torch.equal(run(model), run(plain))


def test_a_hook_from_before_is_a_part_of_the_graph(seen: list[Event]) -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    model.layers[0].mlp.register_forward_hook(tripled)
    expected = run(model)
    change = CompileStage("default").prepare(Part("model", "decoder", model))
    change.on()
    assert torch.allclose(run(model), expected)
    assert change.graphs
    assert not seen


def tokens(model: nn.Module, *dims: int) -> list[Event]:
    """A hundred tokens, of each number of dimensions in turn; return the degradations."""
    plain = copy.deepcopy(model)
    found: list[Event] = []
    remove = add_hook(lambda event: found.append(event) if event.degraded else None)
    with torch.inference_mode():
        for number in range(100):
            x = X[:, :1] * number
            x = x if dims[number % len(dims)] == 3 else x[0]
            assert torch.allclose(model(x), plain(x), atol=1e-5)
    remove()
    return found


@pytest.mark.parametrize("stage", [CompiledBlocksStage("default"), FrozenCompileStage()], ids=["blocks", "frozen"])
def test_a_hundred_tokens_without_a_graph_are_one_event(stage: Any) -> None:
    """Not one for each block of each token, whether tokens with a graph come in between or not."""
    torch.manual_seed(0)
    model = Stack().eval()
    change = stage.prepare(Part("model", "decoder", model))
    change.on()
    assert not tokens(model, 3)
    change.end_warmup()
    assert not tokens(model, 3)
    (event,) = tokens(model, 2)
    assert isinstance(event, FellBack)
    assert "not warmed up" in event.stage
    assert not tokens(model, 2, 3)
    assert change.graphs == 1


@pytest.mark.parametrize("stage", [CompiledBlocksStage("default"), CompileStage("default")], ids=["blocks", "whole"])
def test_a_hundred_tokens_beyond_the_limit_of_graphs_are_one_event(stage: Any) -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    change = stage.prepare(Part("model", "decoder", model))
    change.on()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 1}):
        assert not tokens(model, 3)
        (event,) = tokens(model, 2, 3)
        assert isinstance(event, FellBack)
        assert not tokens(model, 2)
    assert change.graphs == 1
