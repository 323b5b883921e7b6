"""Masks of zeros are left out, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from accelerate_tts.engine.plan import Part
from accelerate_tts.engine.stages.masks import EmptyMaskStage


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(32, heads=4, dim_head=8)
        self.eval()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.attention(x, encoder_hidden_states=other, attention_mask=mask)


X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks that attention is made with."""
    seen: list[Any] = []
    plain = functional.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("attn_mask"))
        return plain(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return seen


def changed() -> tuple[Block, Any]:
    block = Block()
    change = EmptyMaskStage().prepare(Part("block", "estimator", block))
    change.on()
    return block, change


@torch.inference_mode()
def test_zeros_are_left_out_and_the_result_is_the_same(masks: list[Any]) -> None:
    block, change = changed()
    zeros = torch.zeros(2, 12, 12)
    found = block(X, zeros)
    assert masks == [None]
    change.off()
    expected = block(X, zeros)
    assert masks[1] is not None
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert type(block.attention) is Attention


@torch.inference_mode()
@pytest.mark.parametrize("hidden", ["one position", "all but one"])
def test_what_masks_something_is_kept(hidden: str, masks: list[Any]) -> None:
    mask = torch.zeros(2, 12, 12)
    if hidden == "one position":
        mask[1, :, 11] = -1e10
    else:
        mask[:, :, 1:] = -1e10
    block, change = changed()
    found = block(X, mask)
    change.off()
    assert torch.equal(found, block(X, mask))
    assert all(used is not None for used in masks)


@torch.inference_mode()
def test_masks_of_other_shapes_and_of_other_positions_are_upstreams_business(masks: list[Any]) -> None:
    other = torch.randn(2, 5, 32)
    for mask, given in ((torch.zeros(1, 12, 12), None), (torch.zeros(2, 12, 5), other)):
        results = []
        for block in (Block(), changed()[0]):
            try:
                results.append(block(X, mask, given))
            except RuntimeError as error:
                results.append(str(error))
        assert type(results[0]) is type(results[1])
        assert results[0] == results[1] if isinstance(results[0], str) else torch.equal(*results)


def test_only_diffusers_own_attention_is_changed() -> None:
    class Attention(nn.Module):
        """Somebody else's."""

    assert EmptyMaskStage().applies(Part("x", "model", nn.Sequential(Attention()))) is not None
    assert EmptyMaskStage().applies(Part("x", "model", Block())) is None
