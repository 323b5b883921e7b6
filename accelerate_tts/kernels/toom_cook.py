"""Convolutions along time in fewer products, in fp32: description of a layer for toom_cook.cpp.

Toom and Cook's method computes `frames` results of a filter of `taps` taps from `frames + taps - 1` products in place
of `frames * taps`: as many as the product of two polynomials has coefficients. That is known from its values at as many
points (numbers, and infinity), each the product of two values. Winograd's convolutions are the same. The matrices are
those of A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): with `G` of the weights,
`before` of the input and `after` of the sums over channels, y = after @ ((G @ w) * (before @ x)).

The points are small numbers, so that rounding errors stay small: 3e-7 to 8e-7 of the result with 64 channels, and up to
3e-6 with 512, where a convolution of torch has 1e-7 to 3e-7 (docs/decisions/0005-vocoders.md).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from accelerate_tts.kernels.calls import short_convolution
from accelerate_tts.kernels.structs import STRUCTS

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = 32
"""Outputs of a panel of weights."""
MOST_POINTS = 8
"""Maximum products of a tile. With more, numbers grow, and rounding errors with them."""
MOST_DILATION = 16
"""Maximum distance of two taps, since a piece of the signal has tiles of each phase."""
MOST_TAPS = 64
"""Maximum taps. Longer filters are seldom, and better computed by a Fourier transform."""
LEAST_FRAMES = 24
"""Minimum frames of a result that is worth it: the kernel computes at least some fifty."""
_SQUARE = 4
"""Taps of a chunk, and results of a tile, where taps are more than a tile has."""
_POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2")))


@dataclass(frozen=True)
class Tiling:
    """Division of a filter's taps.

    Attributes:
        taps: Taps of a chunk.
        frames: Results of a tile.
        chunks: Chunks of taps. With more than one, `frames` is `taps`: tiles of a chunk are the next tiles of the chunk
            before it.
    """

    taps: int
    frames: int
    chunks: int

    @classmethod
    def of(cls, taps: int) -> Tiling:
        """Return the division with the fewest products."""
        if taps <= MOST_POINTS - 2:
            return cls(taps, MOST_POINTS + 1 - taps, 1)
        return cls(_SQUARE, _SQUARE, -(-taps // _SQUARE))

    @property
    def points(self) -> int:
        """Products of a tile, for each chunk."""
        return self.taps + self.frames - 1


@dataclass(frozen=True)
class Matrices:
    """Matrices of a tiling, in float64.

    Attributes:
        before: `(points, points)`, for a tile of the input.
        weight: `(points, taps)`, for the taps of a chunk.
        after: `(frames, points)`, for the sums of products.
    """

    before: torch.Tensor
    weight: torch.Tensor
    after: torch.Tensor


@cache
def matrices(taps: int, frames: int) -> Matrices:
    """Compute the matrices of `frames` results of `taps` taps.

    Raises:
        ValueError: There are not enough points.
    """
    count = taps + frames - 1
    if count - 1 > len(_POINTS) or min(taps, frames) < 1:
        raise ValueError(f"taps={taps} with frames={frames} take {count} points: at most {MOST_POINTS} are supported")
    points = _POINTS[: count - 1]
    before: list[list[Fraction]] = []
    weight: list[list[Fraction]] = []
    for point in points:
        others = [other for other in points if other != point]
        before.append([*_product(others), Fraction(0)])
        weight.append([point**power / math.prod(point - other for other in others) for power in range(taps)])
    before.append(_product(points))
    weight.append(_last(taps))
    after = [[point**power for point in points] + [Fraction(int(power == frames - 1))] for power in range(frames)]
    # Factors of two, which are exact, keep the turned numbers as large as those of the input.
    for number, row in enumerate(before):
        factor = Fraction(2) ** round(math.log2(max(map(abs, row))))
        before[number] = [value / factor for value in row]
        weight[number] = [value * factor for value in weight[number]]
    return Matrices(*(_tensor(rows) for rows in (before, weight, after)))


def _tensor(rows: Sequence[Sequence[Fraction]]) -> torch.Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64, device="cpu")


def _last(size: int) -> list[Fraction]:
    return [Fraction(int(place == size - 1)) for place in range(size)]


def _product(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of `x - root`, the lowest first."""
    found = [Fraction(1)]
    for root in roots:
        found = [high - root * low for high, low in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


class Packed(NamedTuple):
    """Weights of a convolution, turned and packed as the kernel reads them.

    Attributes:
        weight: `(outputs / 32, points, chunks, inputs, 32)`, fp32; outputs that there are not are zeros.
        bias: `(outputs,)`, with zeros for the outputs that there are not; or `None`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """Turn and pack a weight, `(outputs, inputs, taps)`, and a bias, `(outputs,)`."""
        outputs, _, taps = weight.shape
        tiling, more = Tiling.of(taps), _up(outputs) - outputs
        filled = functional.pad(weight.detach().double(), (0, tiling.chunks * tiling.taps - taps, 0, 0, 0, more))
        chunks = filled.view(*filled.shape[:2], tiling.chunks, tiling.taps)
        by_points = (chunks @ matrices(tiling.taps, tiling.frames).weight.T).float()
        panels = by_points.view(-1, COLUMNS, *by_points.shape[1:]).permute(0, 4, 3, 2, 1).contiguous()
        return cls(panels, None if bias is None else functional.pad(bias.detach().float(), (0, more)).contiguous())


def _up(outputs: int) -> int:
    return -(-outputs // COLUMNS) * COLUMNS


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution of stride 1 and one group.

    Attributes:
        outputs: Output channels.
        taps: Taps of the filter.
        dilation: Distance of two taps in frames, up to `MOST_DILATION`.
        left: Frames of zeros before the signal.
        right: Frames of zeros behind it.
    """

    outputs: int
    taps: int
    dilation: int = 1
    left: int = 0
    right: int = 0

    def results(self, length: Any) -> Any:
        """Return the frames of the result for a signal of a length."""
        return length + self.left + self.right - self.dilation * (self.taps - 1)


@dataclass(frozen=True)
class Ending:
    """Steps after a convolution: an addition, an activation, the memory of the result.

    Attributes:
        plus: What is added, of the result's shape and layout.
        slope: Slope below zero of a leaky ReLU of the sum.
        out: Memory of the result, of its shape and layout; it may be `plus`.
    """

    plus: torch.Tensor | None = None
    slope: float = 1.0
    out: torch.Tensor | None = None


def convolve(
    x: torch.Tensor, weights: Packed, geometry: Geometry, *, last: bool, ending: Ending = Ending()
) -> torch.Tensor:
    """Convolve a signal.

    Args:
        x: `(batch, inputs, length)`, fp32, on the CPU, in any layout.
        weights: The layer's weights.
        geometry: The sizes.
        last: True for a result with its channels next to each other in memory, False for a contiguous one.
        ending: What is done with the result.

    Returns:
        `(batch, outputs, results)`.

    Raises:
        KernelError: There are no kernels; `missing()` checks for that.
        ValueError: A tensor is not as it has to be.
    """
    (batch, inputs, length), (weight, bias) = x.shape, weights
    tiling, results = Tiling.of(geometry.taps), geometry.results(length)
    outputs = _up(geometry.outputs)
    y = _empty(batch, geometry.outputs, max(results, 0), last=last) if ending.out is None else ending.out
    fits = (
        weight.shape == (outputs // COLUMNS, tiling.points, tiling.chunks, inputs, COLUMNS)
        and (bias is None or bias.shape == (outputs,))
        and all(given is None or (_is_fp32(given) and given.is_contiguous()) for given in (weight, bias))
        and all(given is None or (_is_fp32(given) and given.shape == (batch, geometry.outputs, results)
                                  and _is_alike(given, y)) for given in (ending.plus, y))
        and _is_fp32(x)
        and 1 <= geometry.dilation <= MOST_DILATION
        and results > 0
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"a signal {tuple(x.shape)} of {x.dtype} and a packed weight {tuple(weight.shape)} do not fit {geometry}"
        )
    before, after = _turning(tiling)
    layer = STRUCTS["ShortConvolution"](
        weight.data_ptr(), None if bias is None else bias.data_ptr(), before.data_ptr(), after.data_ptr(), outputs,
        inputs, tiling.points, tiling.frames, tiling.chunks, geometry.dilation, geometry.left,
    )  # fmt: skip
    call = STRUCTS["ConvolutionCall"](
        x.data_ptr(), y.data_ptr(), None if ending.plus is None else ending.plus.data_ptr(), ending.slope,
        *x.stride(), *y.stride(), batch, length, geometry.outputs, results,
    )  # fmt: skip
    short_convolution()(ctypes.addressof(layer), ctypes.addressof(call), torch.get_num_threads())
    return y


def _is_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Check that two tensors of one shape lie in memory in one order."""
    places = range(0 if first.shape[0] > 1 else 1, 3)  # the stride of a single sequence means nothing
    return all(first.stride(place) == second.stride(place) for place in places)


def _is_fp32(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_cpu


def _empty(batch: Any, outputs: int, results: Any, *, last: bool) -> torch.Tensor:
    # The device and the dtype do not depend on the user's defaults.
    if last:
        return torch.empty((batch, results, outputs), dtype=torch.float32, device="cpu").transpose(1, 2)
    return torch.empty((batch, outputs, results), dtype=torch.float32, device="cpu")


@cache
def _turning(tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(mode=False):  # they outlive the scope of the first call
        found = matrices(tiling.taps, tiling.frames)
        return found.before.float().contiguous(), found.after.float().contiguous()


@cache
def operator() -> Any:
    """Register `torch.ops.accelerate_tts.short_convolution`, which traced code calls.

    Its arguments are those of `convolve`, with the geometry as a list of its sizes. It is alive as long as what is
    returned, which is kept.
    """

    def run(x: Any, weight: Any, bias: Any, geometry: list[int], last: bool) -> Any:
        return convolve(x, Packed(weight, bias), Geometry(*geometry), last=last)

    def fake(x: Any, weight: Any, bias: Any, geometry: list[int], last: bool) -> Any:
        del weight, bias
        sizes = Geometry(*geometry)
        batch, results = x.shape[0], sizes.results(x.shape[2])
        if last:
            return x.new_empty(batch, results, sizes.outputs).transpose(1, 2)
        return x.new_empty(batch, sizes.outputs, results)

    library: Any = torch.library.Library("accelerate_tts", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("short_convolution(Tensor x, Tensor weight, Tensor? bias, int[] geometry, bool last) -> Tensor")
    library.impl("short_convolution", run, "CPU")
    torch.library.register_fake("accelerate_tts::short_convolution", fake, lib=library)
    return library  # kept alive by the cache: the operator disappears with its library
