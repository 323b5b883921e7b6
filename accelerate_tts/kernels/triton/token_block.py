"""One token through a decoder block in five launches of Triton kernels (source.py). Nothing waits for the device.

1. norm, queries, keys and values;
2. rotation, the cache's new position, attention over the positions so far, by shares;
3. the shares joined, output projection, residual;
4. norm, gate and up projection, activation;
5. down projection, residual.

Tensors between them are fp32. The number of positions is read on the device. Triton is imported at the first launch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.kernels.block_layout import GELU_TANH
from accelerate_tts.kernels.weight_formats import MOST_ROWS, WeightFormat, in_bf16, in_int8, is_transposed

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.kernels.block_layout import BlockLayout

_WARPS = 4
_TILE = 4096
"""Products that a program adds up at once: 32 numbers in each of its 128 threads."""
_OUTPUTS, _OUTPUTS_TRANSPOSED = 4, 32
"""Outputs of a program. Where the outputs are side by side in memory, more of them make whole cache lines."""
_PLACES = 32
"""Positions that a program of attention reads at once."""
_PROGRAMS, _LEAST_SHARE, _MOST_SHARES = 128, 64, 8
"""Programs that attention is split into, as far as each has so many positions of the capacity, by so many shares."""

Copies = dict["nn.Module", tuple[torch.Tensor, "torch.Tensor | None"]]
"""Copies of linear layers' weights, (outputs, inputs), and for int8 the scale of each output."""


def missing() -> str | None:
    """Return the reason why there are no Triton kernels here, or `None`."""
    return "Triton is not installed" if find_spec("triton") is None else None


def runs_on(device: torch.device) -> bool:
    """Check that Triton kernels run on tensors of a device; on those of a CPU in its interpreter only.

    The Triton that torch's wheels for CUDA, ROCm or XPU bring along is one for their device.
    """
    return device.type in {"cuda", "xpu"} or os.environ.get("TRITON_INTERPRET") == "1"


def copied(layout: BlockLayout, weights: WeightFormat) -> Copies:
    """Return copies of a block's weights in a format; empty for "fp32", which stands for the layers' own."""
    if weights == "fp32":
        return {}
    make = in_bf16 if weights == "bf16" else in_int8
    return {layer: make(layer) for layer in layout.layers().values()}


class Token(NamedTuple):
    """Inputs of a block for one token."""

    hidden: torch.Tensor
    """Hidden states, (rows, 1, hidden)."""
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    """Cosines and sines of the position, each (rows or 1, 1, head size)."""
    mask: torch.Tensor
    """Numbers that are added to the scores, (rows or 1, 1, 1, capacity)."""
    position: torch.Tensor
    """Number of positions before the token: one integer, or one for each row. A row with a negative one attends to
    nothing; its key and value are written to the last place."""
    keys: torch.Tensor
    """The block's keys, (rows, key heads, capacity, head size). The token's are written behind them."""
    values: torch.Tensor
    """Its values, likewise."""
    any_rows: bool = False
    """True if a row is to be computed as in a token of any other number of rows, bit by bit: by the same compiled
    kernels, whose tiles have eight rows."""

    def fits(self, layout: BlockLayout) -> bool:
        """Check shapes and memory layouts; the kernels read memory without checks."""
        rows, positions, hidden = self.hidden.shape
        cache = (rows, layout.kv_heads, self.keys.shape[2], layout.head_dim)
        tensors = [self.hidden, self.mask, self.keys, self.values, self.position, *(self.rotation or ())]
        return bool(
            len({tensor.device for tensor in tensors}) == 1
            and positions == 1 and hidden == layout.norm1.weight.shape[0]
            and tuple(self.keys.shape) == tuple(self.values.shape) == cache
            and self.position.numel() in {1, rows} and self.position.is_contiguous()
            and self.keys.is_contiguous() and self.values.is_contiguous()
            and self.mask.dim() == 4 and self.mask.shape[0] in {1, rows}  # noqa: PLR2004
            and tuple(self.mask.shape[1:]) == (1, 1, cache[2]) and self.mask.is_floating_point()
            and {tuple(given.shape) for given in self.rotation or ()} in _one_of((1, 1, cache[3]), (rows, 1, cache[3]))
        )  # fmt: skip


def _one_of(*shapes: tuple[int, ...]) -> list[set[tuple[int, ...]]]:
    """Return the sets of shapes that tensors of one shape, or none, may have."""
    return [set(), *({shape} for shape in shapes)]


def run(layout: BlockLayout, copies: Copies, token: Token) -> torch.Tensor:
    """Compute one token through a block.

    Args:
        layout: The block's layers and sizes.
        copies: See `copied`.
        token: The inputs; `token.fits(layout)`.

    Returns:
        The hidden states behind the block, in the shape and dtype of those before it.
    """
    from accelerate_tts.kernels.triton import source

    x = token.hidden.contiguous()
    rows, _, hidden = x.shape
    linears = {name: _Linear.of(layer, copies) for name, layer in layout.layers().items()}
    q, up, o, down = (linears[name] for name in ("q", "up", "o", "down"))
    k, v, gate = (linears.get(name, _NO_LINEAR) for name in ("k", "v", "gate"))
    first = _norm(layout.norm1)
    second = _norm(layout.norm2)

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    width = (layout.heads + 2 * layout.kv_heads) * layout.head_dim
    qkv = scratch(rows, width)
    tiled = MOST_ROWS if token.any_rows else rows
    sizes = q.tile(tiled)
    programs = -(-q.outputs // sizes["OUTPUTS"]) + 2 * -(-k.outputs // sizes["OUTPUTS"])
    launch(
        source.projections, (programs,), x, *first[:3],
        *(getattr(each, what) for what in ("weight", "scale", "bias") for each in (q, k, v)), qkv,
        rows, hidden, q.outputs, k.outputs, width, *q.steps, LAYER_NORM=first.is_layer_norm, **sizes,
    )  # fmt: skip

    shares = _shares(tiled * layout.heads, token.keys.shape[2])
    sums = scratch(rows, layout.heads, shares, layout.head_dim)
    maxima, totals = scratch(rows, layout.heads, shares), scratch(rows, layout.heads, shares)
    cos, sin = (None, None) if token.rotation is None else (given.contiguous() for given in token.rotation)
    mask = token.mask if token.mask.stride(-1) == 1 else token.mask.contiguous()
    launch(
        source.attention, (rows * layout.heads, shares), qkv, cos, sin, token.keys, token.values, mask,
        token.position, sums, maxima, totals, layout.scaling, layout.heads, layout.kv_heads, token.keys.shape[2],
        0 if cos is None or cos.shape[0] == 1 else layout.head_dim, 0 if mask.shape[0] == 1 else mask.stride(0),
        0 if token.position.numel() == 1 else 1,
        SPLITS=shares, HEAD=layout.head_dim, WIDTH=_power(layout.head_dim), PLACES=_PLACES,
    )  # fmt: skip

    def product(linear: _Linear, given: tuple[Any, ...], residual: torch.Tensor, y: torch.Tensor, shares: int) -> None:
        sizes = linear.tile(tiled)
        launch(
            source.residual_product, (-(-hidden // sizes["OUTPUTS"]),), *given, linear.weight, linear.scale,
            linear.bias, residual, y, rows, linear.inputs, hidden, *linear.steps,
            SPLITS=shares, HEAD=layout.head_dim, **sizes,
        )  # fmt: skip

    between = scratch(rows, hidden)
    product(o, (sums, maxima, totals), x, between, shares)

    inner = scratch(rows, up.outputs)
    sizes = up.tile(tiled)
    launch(
        source.feed_forward, (-(-up.outputs // sizes["OUTPUTS"]),), between, *second[:3],
        *(getattr(each, what) for what in ("weight", "scale", "bias") for each in (gate, up)), inner,
        rows, hidden, up.outputs, *up.steps,
        LAYER_NORM=second.is_layer_norm, GELU=layout.activation == GELU_TANH, **sizes,
    )  # fmt: skip
    y = torch.empty_like(x)
    product(down, (inner, None, None), between, y, 0)
    return y


def launch(kernel: Any, programs: tuple[int, ...], *given: Any, **sizes: Any) -> None:
    """Start a kernel.

    Args:
        kernel: A function of source.py.
        programs: Numbers of its programs.
        given: Its arguments: tensors, numbers, or `None`.
        sizes: What it is compiled for.
    """
    kernel[programs](*given, **sizes, num_warps=_WARPS)


class _Linear(NamedTuple):
    weight: torch.Tensor | None
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    outputs: int
    inputs: int
    steps: tuple[int, int]
    """Distances in memory of two outputs, and of two inputs."""

    @classmethod
    def of(cls, layer: Any, copies: Copies) -> _Linear:
        weight, scale = copies.get(layer, (layer.weight, None))
        transposed = layer not in copies and is_transposed(layer)
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        return cls(weight, scale, layer.bias, outputs, inputs, (1, outputs) if transposed else (inputs, 1))

    def tile(self, rows: int) -> dict[str, int]:
        """Return the sizes of a program's tile."""
        rows = _power(rows)
        outputs = _OUTPUTS if self.steps[1] == 1 else _OUTPUTS_TRANSPOSED
        return {"ROWS": rows, "OUTPUTS": outputs, "WIDTH": min(_TILE // (rows * outputs), _power(self.inputs))}


_NO_LINEAR = _Linear(None, None, None, 0, 0, (0, 0))


class _Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    is_layer_norm: bool


def _norm(norm: Any) -> _Norm:
    is_layer_norm = hasattr(norm, "eps")
    eps = norm.eps if is_layer_norm else norm.variance_epsilon
    return _Norm(norm.weight, getattr(norm, "bias", None), float(eps), is_layer_norm)


def _power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


def _shares(heads: int, capacity: int) -> int:
    """Return the shares of the positions of a capacity, a power of two, for heads of all rows."""
    shares = 1
    while shares < _MOST_SHARES and 2 * shares * heads <= _PROGRAMS and capacity // (2 * shares) >= _LEAST_SHARE:
        shares *= 2
    return shares
