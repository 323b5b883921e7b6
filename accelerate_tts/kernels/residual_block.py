"""Description of a residual block for residual_block.cpp, and checks of the blocks and calls that it supports."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.kernels.calls import residual_block
from accelerate_tts.kernels.packed import PANEL, Kept, Kernel, are_plain, is_fp32, of_class
from accelerate_tts.kernels.structs import STRUCTS

_Block, _Call = STRUCTS["ResidualBlock"], STRUCTS["ResidualCall"]


@dataclass(frozen=True)
class _ResidualParts:
    first: Any
    norm1: Any
    second: Any
    norm2: Any
    beside: Any
    time: Any


# Classes of CosyVoice and Chatterbox.
_BLOCK, _HALF, _CONVOLUTION = "CausalResnetBlock1D", "CausalBlock1D", "CausalConv1d"
_FRAMES = 3


def _taken_apart(block: Any) -> _ResidualParts | None:
    halves = block.block1, block.block2
    convolutions, norms = [], []
    for half in halves:
        convolution, turn, norm, back, activation = half.block
        names = [type(module).__name__ for module in (convolution, turn, back)]
        dims = [tuple(module.__dict__.get(name) for name in ("dim0", "dim1")) for module in (turn, back)]
        if plain_class(half).__name__ != _HALF or names != [_CONVOLUTION, "Transpose", "Transpose"]:
            return None
        if dims != [(1, 2), (1, 2)] or type(activation) is not nn.Mish or plain_class(norm) is not nn.LayerNorm:
            return None
        convolutions.append(convolution)
        norms.append(norm)
    parts = _ResidualParts(convolutions[0], norms[0], convolutions[1], norms[1], block.res_conv, block.mlp)
    return parts if _can_be_served(parts) else None


def _can_be_served(parts: _ResidualParts) -> bool:
    convolutions, norms = (parts.first, parts.second, parts.beside), (parts.norm1, parts.norm2)
    if any(norm.weight is None or norm.bias is None for norm in norms) or not are_plain((*convolutions, *norms)):
        return False
    outputs, channels = parts.first.weight.shape[:2]
    shapes = [(outputs, channels, _FRAMES), (outputs, outputs, _FRAMES), (outputs, channels, 1)]
    return (
        [tuple(layer.weight.shape) for layer in convolutions] == shapes
        and all(layer.stride == layer.dilation == (1,) and layer.groups == 1 and layer.padding == (0,)
                for layer in convolutions)
        and all(layer.causal_padding == (_FRAMES - 1, 0) for layer in convolutions[:2])
        and plain_class(parts.beside) is nn.Conv1d
        and [tuple(norm.weight.shape) for norm in norms] == [(outputs,)] * 2
        and channels % PANEL == outputs % PANEL == 0
    )  # fmt: skip


class _DescribedResidual(Kept):
    """A block's struct, and the tensors that it points to."""

    def __init__(self, parts: _ResidualParts) -> None:
        super().__init__()
        self.outputs, self.channels = (int(size) for size in parts.first.weight.shape[:2])
        self.time = parts.time
        self._struct = _Block(
            channels=self.channels, outputs=self.outputs, **self.norms(parts.norm1, parts.norm2),
            first=self._convolution(parts.first), second=self._convolution(parts.second),
            beside=self._convolution(parts.beside),
        )  # fmt: skip
        self.address = ctypes.addressof(self._struct)

    def _convolution(self, layer: Any) -> ctypes.Structure:
        """Pack a convolution as a matrix, (outputs, frames * channels)."""
        return self.dense(layer.weight.permute(0, 2, 1).reshape(layer.weight.shape[0], -1), layer.bias)


def _serve(block: _DescribedResidual, named: dict[str, Any]) -> torch.Tensor | None:
    x, mask, embedded = (named.get(name) for name in ("x", "mask", "time_emb"))
    if len(named) != 3 or not is_fp32(x) or x.dim() != 3 or x.shape[1] != block.channels:  # type: ignore[union-attr]  # noqa: PLR2004
        return None  # upstream may raise its own error
    batch, _, length = x.shape  # type: ignore[union-attr]
    if not is_fp32(mask, (batch, 1, length)):
        return None
    time = block.time(embedded)
    if not is_fp32(time, (batch, block.outputs)):
        return None
    x, mask, time = x.contiguous(), mask.contiguous(), time.contiguous()  # type: ignore[union-attr]
    y = torch.empty(
        (batch, block.outputs, length), dtype=torch.float32, device="cpu"
    )  # independent of the user's defaults
    call = _Call(x.data_ptr(), y.data_ptr(), mask.data_ptr(), time.data_ptr(), batch, length)
    residual_block()(block.address, ctypes.addressof(call), torch.get_num_threads())
    return y


RESIDUAL = Kernel("residual blocks", of_class(_BLOCK, _taken_apart), _DescribedResidual, _serve)
"""Residual blocks: twice a causal convolution of three frames, LayerNorm and Mish. The time embedding is added between
them, and the residual path has a convolution."""
