"""Convolutions along time in fewer products, on a CPU. Exact to rounding.

Vocoders and many encoders are bound by the arithmetic of their 1-D convolutions, which oneDNN computes at the
processor's rate. Toom and Cook's method takes half of the products (kernels/toom_cook.py;
docs/decisions/0005-vocoders.md has the figures). The weights are turned once, in fp32, and take about twice the bytes.

The result is contiguous, as torch's is, and a caller may `.view()` it. Over a convolution in channels-last layout, such
a signal gives such a result, as it does without this stage. Short signals, other dtypes and gradients take upstream's
own convolution.

Numbers that are not finite stay visible, but not as they are. Each result of a tile is a sum of all that the tile sees:
an infinity or a NaN makes NaN of what it reaches, and reaches up to six frames (times the dilation) more to either
side than upstream's. No other sequence of the batch sees it. A number beyond 1e37 may become infinite in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.inspection.classes import beneath_swaps, class_of, is_bias, plain_class
from accelerate_tts.inspection.tracing import is_plain, is_watched
from accelerate_tts.kernels.library import missing
from accelerate_tts.kernels.toom_cook import (
    LEAST_FRAMES,
    MOST_DILATION,
    MOST_TAPS,
    Geometry,
    Packed,
    convolve,
    operator,
)
from accelerate_tts.patching.class_swap import COPY, CarryingSwap, call_patched, open_modules, per_class, subclass_with
from accelerate_tts.patching.derived import Derived
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.layers.channels_last import keeps_channels_last

if TYPE_CHECKING:
    from accelerate_tts.plan import Part

_LEAST_CHANNELS = 32
"""Minimum inputs and outputs: with fewer, turning a tile takes as long as its products."""


@register_stage
class ShortConvolutionStage(BaseStage):
    """Computes a part's 1-D convolutions of stride 1 by Toom and Cook's method. For CPUs."""

    name = "convolutions in fewer products"
    devices = ("cpu",)
    after = ("channels-last convolutions", "half precision")

    def applies(self, part: Part) -> str | None:
        if (reason := missing()) is not None:
            return reason
        return None if _convolutions(part.module) else "no large 1-D convolution of stride 1 in fp32 in it"

    def prepare(self, part: Part) -> CarryingSwap:
        operator()
        layers = _convolutions(part.module)
        copies: dict[Any, Any] = {layer: Derived(layer, _turned) for layer in layers}
        return CarryingSwap(layers, lambda module: _short_class(class_of(module)), COPY, copies)


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [
        inner
        for inner in open_modules(module)
        if isinstance(inner, nn.Conv1d)
        and _is_torchs(inner)
        and _is_supported(inner)
        and is_plain(inner.weight)
        and inner.weight.dtype == torch.float32
        and inner.weight.device.type == "cpu"
    ]


_STEPS = ("forward", "_conv_forward")


def _is_torchs(layer: Any) -> bool:
    """Check that a convolution computes as torch's does: no class of its own and no patch has replaced a step of it."""
    cls, own = plain_class(layer), vars(layer)
    torchs = ((getattr(nn.Conv1d, step), getattr(cls, step), step in own) for step in _STEPS)
    # Not `__module__`, which `functools.wraps` copies.
    names = {getattr(getattr(nn.Conv1d, step), "__globals__", {}).get("__name__") for step in _STEPS}
    return names == {nn.Conv1d.__module__} and all(a is b and not has for a, b, has in torchs)


def _is_supported(layer: Any) -> bool:
    """Check for what the kernel computes, by attributes that somebody may change.

    torch also takes whole numbers and lists for them, which nobody but a user writes there.
    """
    return bool(
        layer.groups == 1
        and layer.stride == (1,)
        and layer.padding_mode == "zeros"
        and (layer.padding in ("same", "valid") or _number(layer.padding) >= 0)
        and 1 <= _number(layer.dilation) <= MOST_DILATION
        and 1 < layer.kernel_size[0] <= MOST_TAPS
        and min(layer.in_channels, layer.out_channels) >= _LEAST_CHANNELS
    )


def _number(size: Any) -> int:
    """Return the number in a size as torch has it; -1 for anything else."""
    return int(size[0]) if isinstance(size, tuple) and len(size) == 1 else -1


def _turned(layer: Any) -> Packed | None:
    """Return the packed weights; `None` if they are no longer such that the kernel takes."""
    weight, bias = layer.weight, layer.bias
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    fits = is_plain(weight) and weight.dtype == torch.float32 and tuple(weight.shape) == shape and weight.is_cpu
    if not fits or not is_bias(bias, layer.out_channels):
        return None
    if bias is not None and not (is_plain(bias) and bias.dtype == torch.float32 and bias.is_cpu):
        return None
    return Packed.of(weight, bias)


def _geometry(layer: Any) -> Geometry:
    taps, dilation, padding = layer.kernel_size[0], layer.dilation[0], layer.padding
    both = dilation * (taps - 1)
    left, right = both // 2, both - both // 2  # as torch has it for "same"
    if padding == "valid":
        left = right = 0
    elif padding != "same":
        left = right = padding[0]
    return Geometry(layer.out_channels, taps, dilation, left, right)


def _takes(x: Any, layer: Any) -> bool:
    """Check that the kernel supports an input. All others, wrong ones included, get torch's own result or error."""
    return bool(
        is_plain(x)
        and x.dtype == torch.float32
        and x.dim() == 3  # noqa: PLR2004 - (batch, channels, time)
        and x.shape[0] > 0
        and x.shape[1] == layer.in_channels
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_watched()
    )


@per_class
def _short_class(plain: Any) -> type:
    own, base = plain.forward, beneath_swaps(plain)
    torchs, step = base.forward, plain._conv_forward

    def forward(self: Any, input: Any) -> Any:  # noqa: A002 - torch's own name
        if plain.forward is not own:
            return call_patched(plain, self, input)
        if (
            base.forward is not torchs  # the class swap in between knows it, and says so
            or not _takes(input, self)
            or not _is_supported(self)
            or plain._conv_forward is not step
            or "_conv_forward" in self.__dict__  # dynamo of torch 2.6 does not trace vars()
        ):
            return plain.forward(self, input)
        geometry = _geometry(self)
        if geometry.results(input.shape[2]) < LEAST_FRAMES:
            return plain.forward(self, input)
        copy = getattr(self, COPY, None)  # another thread may have switched the change off
        made = None if copy is None else copy.get()
        if made is None:
            return plain.forward(self, input)
        last = keeps_channels_last(plain) and input.stride(1) == 1 and input.stride(2) >= input.shape[1]
        if torch.compiler.is_compiling():
            sizes = [geometry.outputs, geometry.taps, geometry.dilation, geometry.left, geometry.right]
            return torch.ops.accelerate_tts.short_convolution(input, *made, sizes, last)
        return convolve(input, made, geometry, last=last)

    return subclass_with(plain, forward, copies="fp32")
