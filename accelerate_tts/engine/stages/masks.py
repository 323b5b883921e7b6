"""Attention without masks that mask nothing. Exact to rounding. For CPUs.

A flow-matching estimator of Matcha's kind (Chatterbox's S3Gen, CosyVoice) gives each attention a mask of (batch, time,
time) zeros for a request of one length, and diffusers repeats it for every head: at 500 frames sixteen megabytes, 56
times in each of ten steps, that are written, read and added. Zeros change nothing, so the mask is left out.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages.base import BaseStage
from accelerate_tts.engine.stages.swap import ClassSwap, class_of, plain_class, subclass_with

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.engine.plan import Part

__all__ = ["EmptyMaskStage"]


class EmptyMaskStage(BaseStage):
    """Leaves out the masks of diffusers' `Attention` layers where they are all zeros."""

    name = "no empty attention masks"

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        return None if _attentions(part.module) else "no attention of diffusers in it"

    def prepare(self, part: Part) -> ClassSwap:
        """See `Stage.prepare`."""
        return ClassSwap(_attentions(part.module), lambda module: _unmasked_class(class_of(module)))


def _attentions(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if _is_attention(plain_class(inner))]


def _is_attention(cls: Any) -> bool:
    return bool(cls.__name__ == "Attention" and cls.__module__ == "diffusers.models.attention_processor")


@cache
def _unmasked_class(plain: Any) -> type:
    import torch

    def forward(
        self: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if (
            attention_mask is not None
            and encoder_hidden_states is None
            and not torch.compiler.is_compiling()
            and _is_empty(attention_mask, hidden_states)
        ):
            attention_mask = None
        return plain.forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    return subclass_with(plain, forward)


def _is_empty(mask: Any, hidden: Any) -> bool:
    """Whether a mask adds nothing, and has the shape that it must have: upstream pads or refuses others."""
    import torch

    return bool(
        isinstance(mask, torch.Tensor)
        and mask.is_floating_point()
        and mask.device.type == "cpu"
        and not mask.requires_grad
        and hidden.dim() == 3  # noqa: PLR2004
        and mask.shape == (hidden.shape[0], hidden.shape[1], hidden.shape[1])
        and not mask.any()
    )
