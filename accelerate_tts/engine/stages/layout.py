"""Channels-last convolutions on a CPU: 1-D convolutions in the layout that oneDNN computes in. Exact to rounding.

A `Conv1d` of a plain tensor is computed in a blocked layout: its input is reordered on the way in and its output on the
way out, at every call. In channels-last order nothing has to be reordered, and the element-wise operations between two
convolutions keep that order by themselves. A vocoder, whose last levels have few channels and very many samples,
spends much of its time on those reorderings (docs/decisions/0006-channels-last.md has the figures).

The convolution is made as a 2-D one of height 1. Weights are read at each call, so nothing can become stale, and the
module's parameters, buffers, hooks and state dict are not touched: only its class is another one while this is on.
"""

from __future__ import annotations

import copy
import copyreg
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.engine.plan import Part

__all__ = ["ChannelsLastStage"]


class ChannelsLastStage:
    """Runs a part's 1-D convolutions in channels-last order. For CPUs."""

    name = "channels-last convolutions"
    least_share = 0.02

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        return None if _convolutions(part.module) else "no 1-D convolution in it"

    def prepare(self, part: Part) -> _ChannelsLast:
        """See `Stage.prepare`."""
        return _ChannelsLast(_convolutions(part.module))


class _ChannelsLast:
    graphs: int | None = None

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._before: list[type] = []

    def on(self) -> None:
        if not self._before:
            self._before = [type(module) for module in self._modules]
            for module, plain in zip(self._modules, self._before, strict=True):
                module.__class__ = _channels_last_class(plain)

    def off(self) -> None:
        for module, plain in zip(self._modules, self._before, strict=bool(self._before)):
            module.__class__ = plain
        self._before = []

    def seal(self) -> None:
        """Nothing is compiled."""


def _convolutions(module: nn.Module) -> list[nn.Module]:
    from torch import nn

    return [
        inner
        for inner in module.modules()
        if isinstance(inner, (nn.Conv1d, nn.ConvTranspose1d))
        # Depthwise convolutions are bound by memory, not by their layout; a subclass with a forward of its own does
        # something that we do not know.
        and inner.groups == 1
        and inner.padding_mode == "zeros"
        and isinstance(inner.padding, tuple)
        and type(inner).forward in (nn.Conv1d.forward, nn.ConvTranspose1d.forward)
    ]


@lru_cache(maxsize=256)
def _channels_last_class(plain: type) -> type:
    """A subclass of a convolution's class with another `forward`; copies and pickles are of the plain class."""
    from torch import channels_last, nn
    from torch.nn import functional

    def convolve(self: Any, x: Any) -> Any:
        if x.dim() != 3:  # noqa: PLR2004 - (batch, channels, time); without a batch it is rare and short
            return nn.Conv1d.forward(self, x)
        y = functional.conv2d(
            x.unsqueeze(2).contiguous(memory_format=channels_last), self.weight.unsqueeze(2), self.bias,
            (1, self.stride[0]), (0, self.padding[0]), (1, self.dilation[0]),
        )  # fmt: skip
        return y.squeeze(2)

    def convolve_transposed(self: Any, x: Any, output_size: list[int] | None = None) -> Any:
        if x.dim() != 3 or output_size is not None:  # noqa: PLR2004
            return nn.ConvTranspose1d.forward(self, x, output_size)
        y = functional.conv_transpose2d(
            x.unsqueeze(2).contiguous(memory_format=channels_last), self.weight.unsqueeze(2), self.bias,
            (1, self.stride[0]), (0, self.padding[0]), (0, self.output_padding[0]), 1, (1, self.dilation[0]),
        )  # fmt: skip
        return y.squeeze(2)

    def twin(self: Any) -> Any:
        plain_module = plain.__new__(plain)
        plain_module.__dict__ = vars(self)
        return plain_module

    def reduce_ex(self: Any, protocol: int) -> Any:
        if "__reduce_ex__" in vars(plain):  # folded: its own reduction makes an untouched module
            return twin(self).__reduce_ex__(protocol)
        return copyreg._reconstructor, (plain, object, None), twin(self).__getstate__()  # type: ignore[attr-defined]

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(twin(self), memo)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    forward = convolve_transposed if issubclass(plain, nn.ConvTranspose1d) else convolve
    return type(
        plain.__name__, (plain,), {**names, "forward": forward, "__reduce_ex__": reduce_ex, "__deepcopy__": deepcopy}
    )
