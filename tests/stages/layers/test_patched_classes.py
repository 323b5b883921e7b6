"""A linear layer's class is given another forward, as libraries for adapters do: it is what is called then."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeStage
from accelerate_tts.stages.layers.skinny import SkinnyStage

STAGES = {
    "few rows": FewRowsStage,
    "skinny": SkinnyStage,
    "skinny in bf16": lambda: SkinnyStage("bf16"),
    "int8": lambda: QuantizeStage(torch.backends.quantized.engine),
}


class Layer(nn.Linear):
    """A class of its own, which upstream's other models do not share."""


def patch(monkeypatch: pytest.MonkeyPatch, cls: type[nn.Linear]) -> None:
    plain = nn.Linear.forward

    @functools.wraps(plain)
    def doubled(self: Any, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        return 2 * plain(self, input)

    monkeypatch.setattr(cls, "forward", doubled, raising=False)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("whose", [nn.Linear, Layer])
def test_a_patch_after_the_change_is_called_and_told_once(
    name: str, whose: type[nn.Linear], monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    model = nn.Sequential(Layer(512, 512)).eval()
    x = torch.randn(2, 512)
    change = STAGES[name]().prepare(Part("model", "decoder", model, few_rows=1.0))
    with torch.no_grad():
        expected = model(x)
        change.on()
        assert type(model[0]) is not Layer, "nothing was changed"
        near = (model(x) - expected).norm() / expected.norm()
        assert near < 0.05
        with monkeypatch.context() as patched:
            patch(patched, whose)
            for _ in range(3):
                assert torch.equal(model(x), 2 * expected)
        assert (model(x) - expected).norm() / expected.norm() == near
        change.off()
        assert torch.equal(model(x), expected)
    assert len([event for event in seen if "another forward" in str(event)]) == 1


@pytest.mark.parametrize("below", ["half layers", "skinny", "few rows"])
@pytest.mark.parametrize("name", ["skinny", "skinny in bf16", "int8"])
def test_a_patch_beneath_two_changes(
    name: str, below: str, monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:  # fmt: skip
    """The upper one has the class of the lower one beneath it, which is as it was."""
    if name == below:
        return
    model = nn.Sequential(Layer(512, 512)).eval()
    x = torch.randn(2, 512)
    stages = STAGES | {"half layers": lambda: HalfStage(torch.bfloat16, carried=False)}
    changes: list[Any] = []
    with torch.no_grad():
        expected = model(x)
        for each in (below, name):
            changes.append(stages[each]().prepare(Part("model", "decoder", model, few_rows=1.0)))
            changes[-1].on()
        before = model(x)
        with monkeypatch.context() as patched:
            patch(patched, nn.Linear)
            for _ in range(2):
                assert torch.equal(model(x), 2 * expected)
        assert torch.equal(model(x), before)
        for change in reversed(changes):
            change.off()
        assert torch.equal(model(x), expected)
    assert len([event for event in seen if "another forward" in str(event)]) == 1


@pytest.mark.parametrize("name", STAGES)
def test_a_patch_before_it_leaves_nothing_to_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, nn.Linear)
    part = Part("model", "decoder", nn.Sequential(nn.Linear(512, 512)).eval(), few_rows=1.0)
    assert STAGES[name]().applies(part) is not None
