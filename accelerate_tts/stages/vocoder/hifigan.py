"""HiFi-GAN's generator in fewer operators, in fp32 (exact to rounding) or bf16. For CPUs.

All tensors stay in channels-last layout (decision 0005), and:

- a convolution adds its block's residual, or applies the following activation, while its output is in registers
  (oneDNN's post-operations, on weights that are reordered once);
- a transposed convolution of stride `s` is a plain one of `kernel / s` taps with `s` times the channels. In
  channels-last layout its outputs lie in memory as the longer signal does, so nothing is moved;
- the mean over the blocks is folded into the weights of the following layer, since a leaky ReLU is homogeneous.

Supported is transformers' `VitsHifiGan`, with both of HiFi-GAN's types of residual blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.kernels.packed import Kernel, are_plain, is_fp32
from accelerate_tts.stages.vocoder.convolution import Convolution

_GENERATOR, _PAIRS, _SINGLES = "VitsHifiGan", "HifiGanResidualBlock", "TwoConvolutionBlock"
_LAST_SLOPE = 0.01
"""Slope of the activation before the last convolution: torch's default."""


class Piece(NamedTuple):
    """Size of a piece of the signal that is computed at once.

    Attributes:
        size: Bytes of one tensor of the piece.
        frames: Minimum frames of the piece, since its ends are computed twice.
    """

    size: int
    frames: int


PIECE = Piece(4 << 20, 1024)
"""The fastest size on two cores with 2 MB of cache each (decision 0005)."""


def hifigan(dtype: Any = None) -> Kernel:
    """Make the kernel, in fp32 or in another dtype."""
    return Kernel("HiFi-GAN", _parts_of, partial(_Generator, dtype=dtype), _serve)


def _parts_of(module: Any) -> Any:
    try:
        return module if plain_class(module).__name__ == _GENERATOR and _is_known(module) else None
    except (AttributeError, IndexError, TypeError):
        return None  # a release with another structure


def _is_known(generator: Any) -> bool:
    convolutions = [generator.conv_pre, generator.conv_post]
    for block in generator.resblocks:
        kind = plain_class(block).__name__
        if kind == _PAIRS:
            convolutions += [*block.convs1, *block.convs2]
        elif kind == _SINGLES:
            convolutions += block.convs
        else:
            return False
    return (
        generator.num_kernels * generator.num_upsamples == len(generator.resblocks)
        and not generator.training
        and all(isinstance(c, nn.Conv1d) and c.groups == 1 and c.stride == (1,) and c.padding_mode == "zeros"
                and 2 * c.padding[0] == c.dilation[0] * (c.kernel_size[0] - 1) for c in convolutions)
        and all(isinstance(u, nn.ConvTranspose1d) and u.groups == 1 and u.dilation == (1,)
                and u.output_padding == (0,) for u in generator.upsampler)
        and are_plain((*convolutions, *generator.upsampler))
    )  # fmt: skip


class _Upsampling:
    """A transposed convolution, computed as a plain one."""

    def __init__(self, layer: Any, scale: float, dtype: Any) -> None:
        self.stride, self.crop = int(layer.stride[0]), int(layer.padding[0])
        self.channels, self.frames = int(layer.out_channels), int(layer.kernel_size[0])
        taps = -(-self.frames // self.stride)
        weight = functional.pad(layer.weight.detach() * scale, (0, taps * self.stride - self.frames))
        # (inputs, outputs, taps * stride) to (stride * outputs, inputs, taps), the last tap first
        weight = weight.reshape(*weight.shape[:2], taps, self.stride).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
        bias = None if layer.bias is None else layer.bias.repeat(self.stride)
        self.convolution = Convolution(weight, bias, taps - 1, dtype=dtype)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        length = (image.shape[3] - 1) * self.stride + self.frames - 2 * self.crop
        rows = self.convolution(image).permute(0, 2, 3, 1)
        rows = rows.reshape(rows.shape[0], 1, -1, self.channels)
        return rows.permute(0, 3, 1, 2)[..., self.crop : self.crop + length]


class _Generator:
    def __init__(self, generator: Any, dtype: Any) -> None:
        self.dtype = dtype or torch.float32
        count = int(generator.num_kernels)
        self.slope = float(generator.config.leaky_relu_slope)
        self.before = Convolution.of(generator.conv_pre, dtype)
        self.upsamplings = [
            _Upsampling(layer, 1.0 if number == 0 else 1 / count, dtype)
            for number, layer in enumerate(generator.upsampler)
        ]
        blocks = [_block(block, dtype) for block in generator.resblocks]
        self.levels = [blocks[first : first + count] for first in range(0, len(blocks), count)]
        after = generator.conv_post
        self.after = Convolution(after.weight / count, after.bias, after.padding[0], after.dilation[0], dtype)
        self.channels = int(generator.conv_pre.in_channels)

    def __call__(self, spectrogram: torch.Tensor) -> torch.Tensor:
        image = spectrogram.to(self.dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        image = self.before(image, "leaky_relu", self.slope)
        for number, (upsampling, blocks) in enumerate(zip(self.upsamplings, self.levels, strict=True), 1):
            image = _level(upsampling(image), blocks, _LAST_SLOPE if number == len(self.levels) else self.slope)
        return torch.tanh(self.after(image).float().squeeze(2))


def _level(image: torch.Tensor, blocks: list[Any], slope: float) -> torch.Tensor:
    """Compute the sum of the blocks' results and a leaky ReLU, piece by piece, so that a piece stays in the caches.

    Small pieces also stay in the heap: the C library returns large blocks to the system, and each page of a new block
    costs a page fault.
    """
    length = image.shape[3]
    frames = max(PIECE.frames, PIECE.size // (image.element_size() * image.shape[0] * image.shape[1]))
    pieces = max(1, round(length / frames))
    frames, reach = -(-length // pieces), max(block.reach for block in blocks)
    if pieces == 1:
        return functional.leaky_relu_(_sum(image, blocks), slope)
    whole = torch.empty_like(image)
    for start in range(0, length, frames):
        first, end = max(0, start - reach), min(length, start + frames)
        total = _sum(image[..., first : min(length, end + reach)], blocks)
        torch.ops.aten.leaky_relu.out(total[..., start - first : end - first], slope, out=whole[..., start:end])
    return whole


def _sum(image: torch.Tensor, blocks: list[Any]) -> torch.Tensor:
    """Return the sum of the blocks' results, in new memory."""
    bent = {slope: functional.leaky_relu(image, slope) for slope in {block.slope for block in blocks}}
    total = blocks[0](image, bent[blocks[0].slope])
    for block in blocks[1:]:
        total.add_(block(image, bent[block.slope]))
    return total  # type: ignore[no-any-return]


def _block(block: Any, dtype: Any) -> _Pairs | _Singles:
    return (_Pairs if plain_class(block).__name__ == _PAIRS else _Singles)(block, dtype)


class _Pairs:
    """HiFi-GAN's residual block of type 1: pairs of convolutions, each pair with a residual."""

    def __init__(self, block: Any, dtype: Any) -> None:
        self.slope = float(block.leaky_relu_slope)
        self.reach = sum(layer.padding[0] for layer in (*block.convs1, *block.convs2))
        self.pairs = [
            (Convolution.of(first, dtype), Convolution.of(second, dtype))
            for first, second in zip(block.convs1, block.convs2, strict=True)
        ]

    def __call__(self, image: torch.Tensor, bent: torch.Tensor) -> torch.Tensor:
        """Return the result in new memory. `bent` is the image behind the activation."""
        first, second = self.pairs[0]
        result = second.plus(first(bent, "leaky_relu", self.slope), image)
        for first, second in self.pairs[1:]:
            inner = first(functional.leaky_relu(result, self.slope), "leaky_relu", self.slope)
            result = second.onto(result, inner)
        return result


class _Singles:
    """HiFi-GAN's residual block of type 2: single convolutions, each with a residual."""

    def __init__(self, block: Any, dtype: Any) -> None:
        self.slope = float(block.slope)
        self.reach = sum(layer.padding[0] for layer in block.convs)
        self.convolutions = [Convolution.of(convolution, dtype) for convolution in block.convs]

    def __call__(self, image: torch.Tensor, bent: torch.Tensor) -> torch.Tensor:
        first, *others = self.convolutions
        result = first.plus(bent, image)
        for convolution in others:
            result = convolution.onto(result, functional.leaky_relu(result, self.slope))
        return result


def _serve(generator: _Generator, named: dict[str, Any]) -> torch.Tensor | None:
    spectrogram = named.get("spectrogram")
    if named.get("global_conditioning") is not None or not is_fp32(spectrogram):
        return None
    if spectrogram.dim() != 3 or spectrogram.shape[1] != generator.channels:  # type: ignore[union-attr]  # noqa: PLR2004
        return None
    return generator(spectrogram)  # type: ignore[arg-type]
