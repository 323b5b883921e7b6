"""Arguments of decoder_block.cpp: structs that describe blocks and tokens, with pointers into the user's tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.kernels.calls import decoder_blocks
from accelerate_tts.kernels.structs import FORMATS, STRUCTS
from accelerate_tts.kernels.weight_formats import WeightFormat, in_bf16, in_int8, is_transposed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from accelerate_tts.kernels.block_layout import BlockLayout

_POINTER = ctypes.c_void_p
_Linear, _Block, _Row, _Token = (STRUCTS[name] for name in ("Linear", "DecoderBlock", "Row", "Token"))


class Described:
    """A block's struct, and the tensors that it points to.

    Attributes:
        copies: Copies of the layers' weights, and their scales.
        takes: Hidden size, number of key heads, and head size of its inputs.
    """

    def __init__(self, layout: BlockLayout, weights: WeightFormat) -> None:
        self._kept: list[torch.Tensor] = []
        self.copies: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}
        layers = layout.layers()
        transposed = is_transposed(layout.q)
        own = "transposed" if transposed else "bf16" if layout.q.weight.dtype == torch.bfloat16 else "fp32"
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors, since they outlive this scope
            norms = {
                f"{name}{suffix}": self._pointer(getattr(norm, attribute, None), torch.float32)
                for name, norm in (("norm1", layout.norm1), ("norm2", layout.norm2))
                for suffix, attribute in (("", "weight"), ("_bias", "bias"))
            }
            linears = {name: self._linear(layer, weights) for name, layer in layers.items()}
        self.struct = _Block(
            hidden=layout.norm1.weight.shape[0], heads=layout.heads, kv_heads=layout.kv_heads,
            head_dim=layout.head_dim, inner=linears["up"].outputs,
            format=FORMATS.index(own if weights == "fp32" else weights),
            layer_norm=hasattr(layout.norm1, "eps"), gated=layout.gate is not None, activation=layout.activation,
            eps1=_epsilon(layout.norm1), eps2=_epsilon(layout.norm2), scaling=layout.scaling, **norms, **linears,
        )  # fmt: skip
        self.takes = (layout.norm1.weight.shape[0], layout.kv_heads, layout.head_dim)
        self.address = ctypes.addressof(self.struct)

    def _pointer(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().to(dtype or tensor.dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _linear(self, layer: Any, weights: WeightFormat) -> Any:
        outputs, inputs = layer.weight.shape[::-1] if is_transposed(layer) else layer.weight.shape
        if weights == "fp32":
            weight, scale = layer.weight, None
        else:
            weight, scale = self.copies[layer] = {"bf16": in_bf16, "int8": in_int8}[weights](layer)
        return _Linear(
            w=self._pointer(weight), scale=self._pointer(scale), bias=self._pointer(layer.bias, torch.float32),
            outputs=outputs, inputs=inputs,
        )  # fmt: skip


def _epsilon(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


class Shared(NamedTuple):
    """Arguments that all blocks of one decoder share for one token: rotary position and mask."""

    fields: tuple[Any, ...]
    kept: tuple[Any, ...]
    """Tensors that the fields point to. They must outlive the call."""


def shared(rotated: Any, mask: Any, rows: int, head_size: int, positions: int) -> Shared | None:
    """Convert a call's rotation and mask to the kernel's fields; `None` if the kernel does not support them.

    Args:
        rotated: Cosines and sines of the position, each (rows or 1, 1, head size), or `None`.
        mask: Attention mask, (rows or 1, 1, 1, positions), in bool or as numbers that are added; or `None`.
        rows: Batch size.
        head_size: Size of a key's head.
        positions: Number of positions, the token included.
    """
    rotation, seen = _rotation(rotated, rows, head_size), _mask(mask, rows, positions)
    if rotation is None or seen is None:
        return None
    return Shared((rows, *rotation[:3], *seen[:3]), (rotation[3:], seen[3:]))


class Call(NamedTuple):
    """One token of one caller through consecutive blocks."""

    x: torch.Tensor
    """Hidden states, (rows, 1, hidden), fp32 and contiguous."""
    given: Shared
    """Rotation and mask."""
    buffers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each block with spare capacity, (rows, heads, capacity, head size)."""
    length: int
    """Number of positions in them."""
    attentions: torch.Tensor | None = None
    """Receives each block's attention weights, (blocks, rows, heads, length + 1), fp32 and contiguous."""

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.x.shape[0]

    def size(self) -> int:
        """Return the bytes of its cache."""
        return sum(tensor.numel() * tensor.element_size() for pair in self.buffers for tensor in pair)

    def copied(self) -> Call:
        """Return the same call over a copy of its cache, without attention weights."""
        return self._replace(buffers=[(keys.clone(), values.clone()) for keys, values in self.buffers], attentions=None)

    def undo(self) -> None:
        """Do nothing: the length is an input, and the token's place is written again."""

    def following(self, number: int) -> Call | None:
        """Return this call for the first token, and `None` for later ones."""
        return None if number else self

    def tensors(self, result: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of a result."""
        return [result]

    def layout(self) -> tuple[Any, ...] | None:
        """Return what must be equal in calls that are computed together; `None` if this one is computed alone."""
        keys, values = self.buffers[0]
        strides = keys.stride(2), values.stride(2)
        if any((keys.stride(2), values.stride(2)) != strides for keys, values in self.buffers):
            return None
        cos, mask = self.given.fields[1], self.given.fields[4:]
        return keys.dtype, strides, cos is None, None if mask[0] is None else mask[2]


def run(blocks: Sequence[Described], call: Call) -> torch.Tensor:
    """Compute one token through consecutive blocks, and write its keys and values behind the cached sequence.

    Args:
        blocks: The blocks, in order.
        call: Their inputs.

    Returns:
        Hidden states behind each block, (blocks, rows, 1, hidden), fp32; for a bf16 model rounded to bf16.
    """
    tokens = [
        (
            *call.given.fields, keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3],
            keys.dtype == torch.bfloat16, call.length,
            None if call.attentions is None else call.attentions[number].data_ptr(), None,
        )
        for number, (keys, values) in enumerate(call.buffers)
    ]  # fmt: skip
    return _computed(blocks, call.x, tokens)


def run_together(blocks: Sequence[Described], calls: Sequence[Call]) -> torch.Tensor:
    """Compute one token of several callers, each with its own cache, in one pass over the weights.

    A row's result is bit for bit the same as by `run`.

    Args:
        blocks: The blocks, in order.
        calls: Inputs of each caller, with equal layouts that are not `None`.

    Returns:
        Hidden states behind each block, (blocks, rows of all callers, 1, hidden), in the order of the callers.
    """
    rows, count = sum(call.rows for call in calls), len(blocks)
    own = (_Row * (count * rows))(
        *(_Row(*row) for number in range(count) for call in calls for row in _rows(call, number))
    )
    kept: tuple[Any, ...] = ()
    rotation: tuple[Any, ...] = (None, None, 0)
    if calls[0].given.fields[1] is not None:
        kept = tuple(
            torch.cat([call.given.kept[0][which].expand(call.rows, -1, -1) for call in calls]) for which in (0, 1)
        )
        rotation = (kept[0].data_ptr(), kept[1].data_ptr(), kept[0].shape[-1])
    in_bytes = any(call.given.fields[6] for call in calls)
    keys, values = calls[0].buffers[0]
    ends = (
        None, None, 0, 0, keys.stride(2), 0, 0, values.stride(2), keys.dtype == torch.bfloat16,
        max(call.length for call in calls), None,
    )  # fmt: skip
    address, size = ctypes.addressof(own), ctypes.sizeof(_Row) * rows
    tokens = [(rows, *rotation, None, 0, in_bytes, *ends, address + number * size) for number in range(count)]
    return _computed(blocks, torch.cat([call.x for call in calls]), tokens)


def _rows(call: Call, number: int) -> list[tuple[Any, ...]]:
    """Return the kernel's rows of one caller in one block."""
    keys, values = call.buffers[number]
    mask, mask_stride, in_bytes = call.given.fields[4:]
    attention = None if call.attentions is None else call.attentions[number]
    steps = (
        keys.stride(0) * keys.element_size(), values.stride(0) * values.element_size(),
        mask_stride if in_bytes else 4 * mask_stride, 0 if attention is None else 4 * attention.stride(0),
    )  # fmt: skip
    starts = (keys.data_ptr(), values.data_ptr(), mask, None if attention is None else attention.data_ptr())
    found = []
    for row in range(call.rows):
        at = [None if start is None else start + row * step for start, step in zip(starts, steps, strict=True)]
        found.append((at[0], at[1], keys.stride(1), values.stride(1), call.length, at[2], at[3]))
    return found


def _computed(blocks: Sequence[Described], x: torch.Tensor, tokens: Sequence[tuple[Any, ...]]) -> torch.Tensor:
    """Call the kernel with the tokens' fields behind `x` and `y`; return the hidden states behind each block."""
    y = torch.empty((len(blocks), *x.shape), dtype=torch.float32, device="cpu")  # independent of the user's defaults
    source, target, size = x.data_ptr(), y.data_ptr(), 4 * x.numel()
    structs: list[Any] = []
    for fields in tokens:
        structs.append(_Token(source, target, *fields))
        source, target = target, target + size
    count = len(blocks)
    addresses = (_POINTER * count)(*(block.address for block in blocks))
    decoder_blocks()(addresses, (_Token * count)(*structs), count, torch.get_num_threads())
    return y


def holds(keys: torch.Tensor, values: torch.Tensor, rows: int, length: int) -> bool:
    """Check that buffers, (rows, heads, capacity, head size), have this batch size and capacity behind `length`."""
    return bool(
        keys.is_cpu and values.is_cpu and keys.dtype == values.dtype and keys.shape == values.shape
        and keys.shape[0] == rows and keys.shape[2] > length and keys.stride(3) == values.stride(3) == 1
    )  # fmt: skip


# The next two return three fields and the tensors that they point to, or `None` for unsupported inputs.


def _rotation(given: Any, rows: int, size: int) -> tuple[Any, ...] | None:
    if given is None:
        return None, None, 0
    cos, sin = map(plain, given)
    shape = cos.shape
    if shape != sin.shape or len(shape) != 3 or shape[1:] != (1, size) or shape[0] not in {1, rows}:  # noqa: PLR2004
        return None
    if not (cos.is_cpu and sin.is_cpu):
        return None
    return cos.data_ptr(), sin.data_ptr(), 0 if shape[0] == 1 else size, cos, sin


def _mask(given: Any, rows: int, positions: int) -> tuple[Any, ...] | None:
    if given is None:
        return None, 0, False
    if not given.is_cpu or given.dim() != 4 or given.shape[1:] != (1, 1, positions) or given.shape[0] not in {1, rows}:  # noqa: PLR2004
        return None
    in_bytes = given.dtype == torch.bool
    mask = given.contiguous() if in_bytes else plain(given)
    return mask.data_ptr(), 0 if mask.shape[0] == 1 else positions, in_bytes, mask


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp32, contiguous and with its numbers in memory.

    Most already are, and the checks cost less than no-op conversions.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()
