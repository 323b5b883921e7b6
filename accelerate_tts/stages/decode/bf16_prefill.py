"""Prefill through fused blocks in bf16, from the weight copies that serve the decode steps. For CPUs.

A fused block (fused_decoder.py) has a bf16 or int8 copy of its weights, which the kernel reads in a decode step.
Prefill has many rows and takes upstream's own forward, in fp32. On processors that multiply in bf16, the copy serves
prefill too, without more memory. int8 values are exact in bf16, and their products are multiplied by the scale of each
output. Norms, attention and sums stay in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accelerate_tts.device.half_dtypes import half_dtypes
from accelerate_tts.inspection.tracing import is_plain, is_traced
from accelerate_tts.kernels.weight_formats import MOST_ROWS
from accelerate_tts.patching.class_swap import ClassSwap, fused_by, subclass_with
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch import nn

    from accelerate_tts.plan import Part, TimedCalls


@register_stage
class PromptStage(BaseStage):
    """Lets the linear layers of fused blocks run prefill in bf16, from the copies that the blocks already have."""

    name = "bf16 prompts"
    devices = ("cpu",)
    precisions = ("balanced", "fast")
    after = ("fused decoder blocks",)
    times: TimedCalls = "prefill"

    def applies(self, part: Part) -> str | None:
        if not half_dtypes("cpu"):
            return "this processor does not multiply in bf16"
        return None if _layers(part.module) else "no fused blocks with copies of fp32 weights in it"

    def prepare(self, part: Part) -> ClassSwap:
        layers = _layers(part.module)
        return ClassSwap(list(layers), lambda layer: _prompt_class(type(layer), layers[layer]))


def _layers(module: nn.Module) -> dict[nn.Module, Any]:
    """Return the fp32 layers of fused blocks that have a copy, each with the object that holds the copy."""
    return {
        layer: fused
        for block in module.modules()
        if (fused := fused_by(block)) is not None
        for layer in fused.copied()
        if layer.weight.dtype == torch.float32
    }


def _prompt_class(plain: type, fused: Any) -> type:
    def forward(self: Any, x: Any) -> Any:
        if not _is_prompt(x):
            return plain.forward(self, x)  # type: ignore[attr-defined]
        copied = fused.copy_of(self)
        if copied is None or x.shape[-1] != copied[0].shape[1]:  # torch raises its own error
            return plain.forward(self, x)  # type: ignore[attr-defined]
        weight, scale = copied
        if weight.dtype != torch.bfloat16:
            weight = weight.to(torch.bfloat16)  # -127 .. 127 are exact
        y = functional.linear(x.to(torch.bfloat16), weight)
        y = y.float() if scale is None else y * scale  # in fp32 either way
        if self.bias is not None:
            y += self.bias
        return y

    return subclass_with(plain, forward, copies="bf16 prompts")


def _is_prompt(x: Any) -> TypeGuard[torch.Tensor]:
    return bool(
        is_plain(x)
        and x.dtype == torch.float32
        and x.dim() > 0
        and x.numel() > MOST_ROWS * x.shape[-1] > 0
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )
