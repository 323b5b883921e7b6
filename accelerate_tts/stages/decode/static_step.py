"""A decode step for a graph, with the same addresses and shapes for every length of the sequence.

The sequence lies in buffers of a fixed capacity, and its length is a number on the device. Attention runs over the
whole capacity, with a mask computed from that number. The step reads no value back from the device, and no shape
depends on one (tests/stages/decode/test_cuda_graph.py traces it). static_slot.py has such a step for one sequence at a
time, and joined_slots.py one for several side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, cache_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate_tts.stages.graphs.recorder import Recorder, Replayable

ABSENT = -1
"""Position of a row whose sequence is not in a step of several. It attends to nothing and is written to the last place
of its buffers, which is the place at this index; a sequence in such buffers leaves that place free."""


class Memory(NamedTuple):
    """Tensors that a step reads and writes at fixed addresses, besides the weights."""

    inputs: dict[str, torch.Tensor]
    """Tensor arguments of the decoder for one token, without the mask."""
    buffers: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, (rows, heads, capacity, head size)."""
    position: torch.Tensor
    """Positions before the token: one number for all rows, or one for each, where `ABSENT` may be."""
    valid: torch.Tensor
    """True for the positions that are attended to, (rows, capacity)."""

    @classmethod
    def of_a_slot(cls, past: Any, inputs: dict[str, torch.Tensor], capacity: int) -> Memory:
        """Allocate the memory of one slot, with copies of the inputs."""
        memory = cls.of_lanes(past, inputs, capacity, 1)
        return memory._replace(position=torch.zeros(1, dtype=torch.long, device=memory.position.device))

    @classmethod
    def of_lanes(cls, past: Any, inputs: dict[str, torch.Tensor], capacity: int, lanes: int) -> Memory:
        """Allocate the memory of slots side by side, with copies of the inputs for each."""
        first = past.layers[0].keys
        rows = lanes * first.shape[0]
        return cls(
            {name: torch.cat([tensor] * lanes) for name, tensor in inputs.items()},
            [
                tuple(t.new_zeros((rows, *t.shape[1:-2], capacity, t.shape[-1])) for t in (layer.keys, layer.values))
                for layer in past.layers
            ],
            torch.full((rows,), ABSENT, dtype=torch.long, device=first.device),
            torch.ones(rows, capacity, dtype=torch.bool, device=first.device),
        )

    def part(self, first: int, rows: int) -> Memory:
        """Return views of some rows."""
        inside = slice(first, first + rows)
        return Memory(
            {name: tensor[inside] for name, tensor in self.inputs.items()},
            [(keys[inside], values[inside]) for keys, values in self.buffers],
            self.position[inside],
            self.valid[inside],
        )


class StepKind(NamedTuple):
    """Steps for one kind of call, whatever memory they run over."""

    decoder: Any
    """The module."""
    forward: Callable[..., Any]
    """Its unchanged forward, which takes the module first."""
    constants: dict[str, Any]
    """Arguments of the decoder that become part of a recording."""
    recorder: Recorder
    """Records the steps."""
    any_rows: bool = False
    """Compute each row as in a step of any other number of rows, where kernels can."""
    told: Callable[[], object] = bool
    """Called after a step was recorded."""


class StaticStep:
    """A decoder's step over memory that stays where it is, and its recording.

    Attributes:
        rows: Rows of the step.
        capacity: Maximum positions of each.

    Args:
        kind: The kind of step.
        memory: The memory.
    """

    def __init__(self, kind: StepKind, memory: Memory) -> None:
        self._kind, self._recorder = kind, kind.recorder
        self._cache = cache_name(parameters_of(plain_class(kind.decoder))) or CACHE_NAMES[0]
        self.inputs, self.buffers, self.position, self.valid = memory
        self.rows, self.capacity = self.valid.shape
        keys = self.buffers[0][0]
        device, dtype = keys.device, keys.dtype  # the mask has the dtype of the attention
        self._places = torch.arange(self.capacity, device=device)
        self._row_numbers = torch.arange(self.rows, device=device) if len(self.position) > 1 else None
        self._open = torch.zeros((), dtype=dtype, device=device)
        self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        self._recording: Replayable | None = None

    def recording(self) -> Replayable:
        """Return the step's recording, which is made at the first call.

        Raises:
            TypeError: The decoder returns an object without named fields.
            Exception: The step cannot be recorded.
        """
        if self._recording is None:
            recording = self._recorder.record(self.step)
            if not hasattr(recording.outputs, "items"):
                name = type(self._kind.decoder).__name__
                raise TypeError(f"{name} returns {type(recording.outputs).__name__}, without names")
            self._recording = recording
            self._kind.told()
        return self._recording

    def step(self) -> Any:
        """Run one token at `position`. This function is recorded."""
        position, ids = self.position, self.position
        if self._row_numbers is not None:
            ids = position.clamp(min=0)  # a table of positions has none before the first
        seen = (self._places <= position[:, None]) & self.valid
        mask = torch.where(seen, self._open, self._hidden)[:, None, None, :]
        inputs = {"position_ids": ids[:, None].expand(self.rows, 1), **self.inputs}
        classes = kv_cache.cache_classes()
        layer = kv_cache.upstream_class(StaticLayer, classes.DynamicLayer)
        whole = kv_cache.upstream_class(kv_cache.CacheOfLayers, classes.Cache)
        layers = [layer(*pair, position, self._row_numbers, any_rows=self._kind.any_rows) for pair in self.buffers]
        return self._kind.forward(
            self._kind.decoder, **inputs, **self._kind.constants, attention_mask=mask, **{self._cache: whole(layers)},
            use_cache=True,
        )  # fmt: skip


class StaticLayer:
    """One layer, which writes a token at the position that a device tensor holds.

    Attributes:
        any_rows: True if a row is to be computed as in a step of any other number of rows, bit by bit.

    Args:
        keys: Keys of all rows and places.
        values: Values, likewise.
        position: One position of all rows, or one of each.
        rows: Numbers of the rows where each has a position; else `None`.
        any_rows: See above.
    """

    def __init__(self, keys: Any, values: Any, position: Any, rows: Any = None, *, any_rows: bool = False) -> None:
        self.buffers = (keys, values)
        self.position = position
        self.any_rows = any_rows
        self.is_initialized = True
        self._rows = rows

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if self._rows is None:
                buffer.index_copy_(2, self.position, states.to(buffer.dtype))
            else:  # -1 is the last place
                buffer[self._rows, :, self.position] = states[:, :, 0].to(buffer.dtype)
        return self.buffers

    def get_seq_length(self, *_args: Any) -> int:
        return int(self.buffers[0].shape[-2]) - 1  # a constant: positions and mask are given explicitly

    def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
        return int(self.buffers[0].shape[-2]), 0


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result, without its cache's."""
    fields = [value for name, value in result.items() if name not in CACHE_NAMES]
    return [leaf for leaf in _pytree.tree_leaves(fields) if isinstance(leaf, torch.Tensor)]


def own_result(result: Any, past: Any, positions: int, rows: slice | None = None) -> Any:
    """Copy a result into tensors that the next replay does not overwrite, with the caller's own cache.

    Attention weights cover the whole capacity in the recording; positions beyond the sequence are cut off. Of a step of
    several sequences the caller's rows are copied.
    """
    cache = cache_name(result.keys()) or CACHE_NAMES[0]
    fields = {name: value for name, value in result.items() if name != cache}
    if "attentions" in fields:
        fields["attentions"] = tuple(weights[..., :positions] for weights in fields["attentions"])
    fields = _pytree.tree_map_only(torch.Tensor, lambda t: (t if rows is None else t[rows]).clone(), fields)
    return type(result)(**fields, **{cache: past})
