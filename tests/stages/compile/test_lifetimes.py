"""Compiled models that are dropped leave nothing: neither their weights nor what their graphs have copies of."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch._dynamo import eval_frame
from torch.nn.utils.parametrizations import spectral_norm

from accelerate_tts.plan import Part
from accelerate_tts.stages.compile import inductor
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompiledCall

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.up, self.down = norm(nn.Linear(32, 64)), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Blocks of torch's own class; dynamo guards on more of them than of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def constants() -> list[weakref.ref[torch.Tensor]]:
    """The tensors that modules of generated code have."""
    from torch._inductor.codecache import PyCodeCache

    return [
        weakref.ref(value)
        for module in PyCodeCache.modules
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
    ]


def backends() -> int:
    """The number of backends that dynamo keeps. torch 2.8 has marks among them: None, and False for `run`.

    Without the wrappers, of nothing, that torch 2.6 needs (docs/decisions/0004-compiling.md).
    """
    found = [getattr(kept, "compiler_fn", kept) for kept in eval_frame.cached_backends.values() if callable(kept)]
    return sum(getattr(backend, "__name__", "") != "_released" for backend in found)


@pytest.mark.parametrize(
    ("norm", "frozen", "undone"),
    [
        pytest.param(spectral_norm, True, False, id="frozen, spectral norm, dropped"),
        pytest.param(nn.Sequential, True, True, id="frozen, undone, dropped"),
        pytest.param(spectral_norm, False, False, id="compiled, dropped"),
    ],
)
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="before torch 2.7 frozen graphs of linear layers do not compile here, and parametrized ones are not let go",
)
def test_weights_die_with_their_model(norm: Callable[[nn.Module], nn.Module], *, undone: bool, frozen: bool) -> None:
    from torch._inductor.codecache import PyCodeCache

    gc.collect()
    kept = (len(PyCodeCache.modules), backends(), set(vars(inductor)))
    weights = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Block(norm).eval()
        change = CompiledCall(model, "model", "default", frozen=frozen)
        x = torch.randn(1, 5, 32)
        with torch.no_grad():
            expected = model(x)
            change.on()
            torch.testing.assert_close(model(x), expected)
        assert change.graphs, "nothing was compiled"
        assert constants() or not frozen, "nothing was frozen"
        weights += [weakref.ref(tensor) for tensor in model.state_dict(keep_vars=True).values()] + constants()
        if undone:
            change.off()
        del model, change
    gc.collect()  # finds the model, and with it what dynamo has of it
    gc.collect()
    assert [ref() for ref in weights if ref() is not None] == []
    assert backends() == kept[1]
    assert set(vars(inductor)) == kept[2], "dynamo has left something in the globals of the compiled function"
    assert not constants()
    if frozen:
        assert len(PyCodeCache.modules) == kept[0]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("undone", [False, True])
def test_blocks_die_with_their_model(*, undone: bool) -> None:
    """Their class led to the graphs, and dynamo's graphs to the class: all blocks stayed for ever."""
    gc.collect()
    kept, found = backends(), []
    for _ in range(2):
        model = Stack().eval()
        change = CompiledBlocksStage("default").prepare(Part("part", "model", model))
        change.on()
        with torch.no_grad():
            model(torch.randn(1, 5, 32))
        assert change.graphs
        found += [weakref.ref(module) for module in model.modules()]
        if undone:
            change.off()
        del model, change
    gc.collect()
    gc.collect()
    assert [ref() for ref in found if ref() is not None] == []
    assert backends() == kept
