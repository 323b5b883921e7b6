"""1-D convolutions in `(time, channels)` layout, in fp32 in fewer products, otherwise by oneDNN.

Most fp32 convolutions of a vocoder take half of their products by Toom and Cook's method (kernels/toom_cook.py), where
there are kernels. The others, and all in half precision, are oneDNN's, with weights that are reordered once.

oneDNN chooses the layout of the weights by the length of the signal and the number of threads. Weights in another
layout are reordered at each call, by a routine that may take fifty times as long as the convolution (11 ms and 0.25 ms,
192 to 384 channels, 80 frames, torch 2.14, oneDNN 3.12). So weights are kept in each layout that was needed.
"""

from __future__ import annotations

import bisect
import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from accelerate_tts.kernels.library import NONE, level
from accelerate_tts.kernels.toom_cook import (
    LEAST_FRAMES,
    MOST_DILATION,
    MOST_TAPS,
    Ending,
    Geometry,
    Packed,
    convolve,
)

_LEAST_CHANNELS, _FEW_TAPS = 32, 3
"""Minimum inputs and outputs of a convolution in fewer products; with so few taps, twice as many. With less, turning
tiles takes as long as the products that are saved (docs/decisions/0005-vocoders.md)."""
_MOST_PROBES = 64
"""Maximum lengths whose layout is asked for; another length then takes that of its neighbour."""


def wide(rows: torch.Tensor) -> torch.Tensor:
    """View `(time, channels)` as `(1, channels, 1, time)`, which is channels-last for contiguous rows."""
    return rows[None, None].permute(0, 3, 1, 2)


def narrow(image: torch.Tensor) -> torch.Tensor:
    """View `(1, channels, 1, time)` in channels-last layout as `(time, channels)`."""
    return image.permute(0, 2, 3, 1)[0, 0]


class Convolution:
    """A 1-D convolution of stride 1.

    Args:
        weight: `(outputs, inputs, frames)`.
        bias: `(outputs,)`, or `None`.
        padding: Frames of zeros at both ends.
        dilation: Distance of two taps in frames.
        dtype: Dtype of weights and results; fp32 by default.
        short: False to compute each product, by oneDNN.
    """

    def __init__(  # noqa: PLR0913 - what a convolution consists of
        self, weight: torch.Tensor, bias: torch.Tensor | None, padding: int, dilation: int = 1, dtype: Any = None,
        *, short: bool = True,
    ) -> None:  # fmt: skip
        dtype = dtype or torch.float32
        self._bias = None if bias is None else bias.detach().clone().to(dtype)
        self._geometry = _geometry(padding, dilation)
        self._plain = weight.detach().to(dtype).unsqueeze(2)
        self._layouts = _layouts(tuple(self._plain.shape), padding, dilation, dtype)
        self._weights: dict[int, torch.Tensor] = {}
        self._short: _Short | None = None
        if short and dtype == torch.float32 and _is_worth_it(weight, dilation) and level() not in {NONE, "base"}:
            outputs, _, taps = (int(size) for size in weight.shape)
            self._short = _Short(Packed.of(weight, bias), Geometry(outputs, taps, dilation, padding, padding))

    @classmethod
    def of(cls, layer: Any, dtype: Any = None) -> Convolution:
        """Make the convolution of a `Conv1d`."""
        return cls(layer.weight, layer.bias, layer.padding[0], layer.dilation[0], dtype)

    def __call__(self, rows: torch.Tensor, activation: str = "none", *scalars: float) -> torch.Tensor:
        """Convolve `(batch, channels, 1, time)` in channels-last layout, and apply an activation if one is named.

        Args:
            rows: The signal.
            activation: "none", "relu", or "leaky_relu" with its slope.
            scalars: The activation's numbers.

        Raises:
            KeyError: There is no such activation.
        """
        slope = {"none": 1.0, "relu": 0.0, "leaky_relu": scalars[0] if scalars else 0.0}[activation]
        if self._short is not None and self._short.takes(rows):
            return self._short(rows, Ending(slope=slope))
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            rows, self._weight_for(rows), self._bias, *self._geometry, activation, list(scalars), ""
        )

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Convolve, and add `other`."""
        if self._short is not None and self._short.takes(rows):
            return self._short(rows, Ending(_rows(other.contiguous(memory_format=torch.channels_last))))
        return torch.ops.mkldnn._convolution_pointwise.binary(  # type: ignore[no-any-return]
            rows, other, self._weight_for(rows), self._bias, *self._geometry, "add", 1.0, None, [], None
        )

    def onto(self, other: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Convolve, and add the result to `other` in place."""
        if self._short is not None and self._short.takes(rows):
            self._short(rows, Ending(_rows(other), out=_rows(other)))
            return other
        return torch.ops.mkldnn._convolution_pointwise_.binary(  # type: ignore[no-any-return]
            other, rows, self._weight_for(rows), self._bias, *self._geometry, "add", 1.0, None, [], None
        )

    def _weight_for(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the weight in the layout for an input."""
        batch, _, _, length = rows.shape
        layout = self._layouts.at(batch, length)
        weight = self._weights.get(layout)
        if weight is None:
            weight = self._weights[layout] = _reordered(self._plain, self._geometry, batch, length)
        return weight


class _Short(NamedTuple):
    """A convolution in fewer products."""

    weights: Packed
    geometry: Geometry

    def takes(self, image: torch.Tensor) -> bool:
        return bool(self.geometry.results(image.shape[3]) >= LEAST_FRAMES)

    def __call__(self, image: torch.Tensor, ending: Ending) -> torch.Tensor:
        return convolve(_rows(image), self.weights, self.geometry, last=True, ending=ending).unsqueeze(2)


def _rows(image: torch.Tensor) -> torch.Tensor:
    """View `(batch, channels, 1, time)` as `(batch, channels, time)`."""
    return image.squeeze(2)


def _is_worth_it(weight: torch.Tensor, dilation: int) -> bool:
    outputs, inputs, taps = weight.shape
    fewest = _LEAST_CHANNELS if taps > _FEW_TAPS else 2 * _LEAST_CHANNELS
    return min(outputs, inputs) >= fewest and 1 < taps <= MOST_TAPS and dilation <= MOST_DILATION


def _geometry(padding: int, dilation: int) -> tuple[Any, ...]:
    """Return padding, stride, dilation and groups, as torch's operators take them."""
    return [0, padding], [1, 1], [1, dilation], 1


def _reordered(plain: torch.Tensor, geometry: tuple[Any, ...], batch: int, length: int) -> torch.Tensor:
    size = [batch, plain.shape[1], 1, length]
    return torch.ops.mkldnn._reorder_convolution_weight(plain, *geometry, size)  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def _layouts(shape: tuple[int, ...], padding: int, dilation: int, dtype: torch.dtype) -> _Layouts:
    return _Layouts(shape, _geometry(padding, dilation), dtype)


class _Layouts:
    """Layouts that oneDNN wants for the weights of convolutions of one geometry, by the input's length.

    Where two lengths have the same layout, so have those between them: oneDNN divides the frames into blocks, and
    longer signals have larger ones. If that is wrong for a length, the convolution is slow there, and right.

    Args:
        shape: Of the weight: `(outputs, inputs, 1, frames)`.
        geometry: See `_geometry`.
        dtype: Of the weight.
    """

    def __init__(self, shape: tuple[int, ...], geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
        self._shape, self._geometry, self._dtype = shape, geometry, dtype
        self._known: dict[tuple[int, int], list[tuple[int, int]]] = {}  # pairs of a length and its layout

    def at(self, batch: int, length: int) -> int:
        """Return a number that stands for the layout."""
        known = self._known.setdefault((torch.get_num_threads(), batch), [])
        place = bisect.bisect(known, (length,))
        above = known[place] if place < len(known) else None
        if above is not None and above[0] == length:
            return above[1]
        below = known[place - 1] if place else None
        nearest = above or below
        if nearest is not None and ((above and below and above[1] == below[1]) or len(known) >= _MOST_PROBES):
            return nearest[1]
        layout = self._probe(batch, length)
        bisect.insort(known, (length, layout))
        return layout

    def _probe(self, batch: int, length: int) -> int:
        """Reorder numbers, and return a hash of the order in which they lie in memory then."""
        with torch.no_grad():
            numbers = torch.arange(torch.Size(self._shape).numel(), device="cpu").remainder_(251).to(self._dtype)
            reordered = _reordered(numbers.view(self._shape), self._geometry, batch, length)
            operators = torch.ops.mkldnn
            return hash(ctypes.string_at(operators.data_ptr(reordered), operators._nbytes(reordered)))
