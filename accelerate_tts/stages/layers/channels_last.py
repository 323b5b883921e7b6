"""1-D convolutions in channels-last layout on a CPU. Exact to rounding.

oneDNN computes a `Conv1d` of a contiguous tensor in a blocked layout, and reorders its input and output at every call.
In channels-last layout nothing is reordered, and element-wise operations between two convolutions keep that layout. A
vocoder spends much of its time on reordering, since its last levels have few channels and very many samples
(docs/decisions/0005-vocoders.md has the figures).

The convolution is computed as a 2-D one of height 1, and the weights are read at each call. The outputs of a part are
made contiguous again, since callers may rely on that. So is the output of a convolution outside a call of its part: a
service may call another method of the model, or a module inside the part.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import channels_last, nn
from torch.nn import functional
from torch.utils import _pytree

from accelerate_tts.inspection.classes import class_of
from accelerate_tts.inspection.tracing import is_plain, is_watched
from accelerate_tts.patching.class_swap import ClassSwap, call_patched, open_modules, per_class, subclass_with
from accelerate_tts.plan import CALL, Part
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage


@register_stage
class ChannelsLastStage(BaseStage):
    """Runs a part's 1-D convolutions in channels-last layout. For CPUs."""

    name = "channels-last convolutions"
    devices = ("cpu",)
    after = ("fewer operators", "checked by margin")

    def applies(self, part: Part) -> str | None:
        return None if _convolutions(part.module) else "no 1-D convolution in it"

    def prepare(self, part: Part) -> ClassSwap:
        convolutions = set(_convolutions(part.module))
        method = "forward" if part.method == CALL else part.method

        def swapped(module: nn.Module) -> type:
            cls = _channels_last_class(class_of(module)) if module in convolutions else class_of(module)
            return _border_class(cls, method) if module is part.module else cls

        others = [module for module in _convolutions(part.module) if module is not part.module]
        return ClassSwap([*others, part.module], swapped)


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [
        inner
        for inner in open_modules(module)
        if isinstance(inner, (nn.Conv1d, nn.ConvTranspose1d))
        and _is_usual(inner)
        and _is_plain(inner)  # the forward of a subclass is unknown
    ]


def _is_usual(convolution: Any) -> bool:
    """Check for what the replacement computes, by attributes that somebody may change.

    Depthwise convolutions are bound by memory, not by layout. torch also takes whole numbers and lists, which nobody
    but a user writes there, and refuses what has two numbers.
    """
    sizes = (convolution.stride, convolution.padding, convolution.dilation, convolution.output_padding)
    return bool(
        convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and all(type(size) is tuple and len(size) == 1 for size in sizes)
    )


def _is_plain(convolution: Any) -> bool:
    """Check that a convolution uses torch's own forward, whatever its class."""
    cls = nn.ConvTranspose1d if isinstance(convolution, nn.ConvTranspose1d) else nn.Conv1d
    steps = ("forward", "_conv_forward", "_output_padding")
    return all(
        getattr(type(convolution), step, None) is getattr(cls, step, None) and step not in vars(convolution)
        for step in steps
    )


_in_part: ContextVar[bool] = ContextVar("in_part", default=False)
"""True during a call of a part, whose outputs are made contiguous."""


@per_class
def _border_class(plain: Any, method: str) -> type:
    """Make the part's class, whose outputs are contiguous again: callers may use `.view()` on them."""
    run = getattr(plain, method)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a part is compiled with its border
            return _in_usual_order(run(self, *args, **kwargs))
        outside = _in_part.set(True)
        try:
            result = run(self, *args, **kwargs)
        finally:
            _in_part.reset(outside)
        return _in_usual_order(result)

    return subclass_with(plain, forward, method=method)


def _in_usual_order(result: Any) -> Any:
    def is_changed(value: Any) -> bool:
        # (batch, channels, time) with channels innermost in memory. Other strides are the model's own.
        return isinstance(value, torch.Tensor) and (
            value.dim() == 3 and value.stride(1) == 1 and not value.is_contiguous()  # noqa: PLR2004 - see `convolve`
        )

    if isinstance(result, torch.Tensor):
        return result.contiguous() if is_changed(result) else result
    leaves, spec = _pytree.tree_flatten(result)
    if not any(map(is_changed, leaves)):
        return result  # the same object, not a copy
    return _pytree.tree_unflatten([leaf.contiguous() if is_changed(leaf) else leaf for leaf in leaves], spec)


def _is_kept() -> bool:
    """Check that a result may stay in channels-last layout: a call of a part, which puts it in order, is under way."""
    return torch.compiler.is_compiling() or _in_part.get()  # a part is compiled with its border


def keeps_channels_last(cls: type) -> bool:
    """Check that a layer of this class gives results in channels-last layout now, as the next layers take them."""
    return hasattr(cls, _KEEPS) and _is_kept()


_KEEPS = "_accelerate_tts_channels_last"
"""Attribute of the classes of layers that compute in channels-last layout."""


def _of_layer(y: torch.Tensor) -> torch.Tensor:
    return y if _is_kept() else y.contiguous()


@per_class
def _channels_last_class(plain: Any) -> type:

    own = plain.forward
    name = "_output_padding" if issubclass(plain, nn.ConvTranspose1d) else "_conv_forward"
    step = getattr(plain, name)

    def is_as_before(self: Any) -> bool:
        return (
            _is_usual(self) and getattr(plain, name) is step and name not in self.__dict__
        )  # see short_convolutions.py

    def convolve(self: Any, input: Any) -> Any:  # noqa: A002 - torch's own name
        if plain.forward is not own:
            return call_patched(plain, self, input)
        if input.dim() != 3 or is_watched(input) or not is_as_before(self):  # noqa: PLR2004 - (batch, channels, time)
            return plain.forward(self, input)
        weight = self.weight  # read once: a parametrization computes it
        if not is_plain(weight):  # its class may know `F.conv1d` alone
            return plain.forward(self, input)
        y = functional.conv2d(
            input.unsqueeze(2).contiguous(memory_format=channels_last), weight.unsqueeze(2), self.bias,
            (1, self.stride[0]), (0, self.padding[0]), (1, self.dilation[0]),
        )  # fmt: skip
        return _of_layer(y.squeeze(2))

    def convolve_transposed(self: Any, input: Any, output_size: list[int] | None = None) -> Any:  # noqa: A002
        if plain.forward is not own:
            return call_patched(plain, self, input, output_size)
        if input.dim() != 3 or output_size is not None or is_watched(input) or not is_as_before(self):  # noqa: PLR2004
            return plain.forward(self, input, output_size)
        weight = self.weight
        if not is_plain(weight):
            return plain.forward(self, input, output_size)
        y = functional.conv_transpose2d(
            input.unsqueeze(2).contiguous(memory_format=channels_last), weight.unsqueeze(2), self.bias,
            (1, self.stride[0]), (0, self.padding[0]), (0, self.output_padding[0]), 1, (1, self.dilation[0]),
        )  # fmt: skip
        return _of_layer(y.squeeze(2))

    made = subclass_with(plain, convolve_transposed if issubclass(plain, nn.ConvTranspose1d) else convolve)
    setattr(made, _KEEPS, True)
    return made
