"""A decode step for a CUDA graph, with the same addresses and shapes for every length of the sequence.

The sequence lies in buffers of a fixed capacity, and its length is a number on the device. Attention runs over the
whole capacity, with a mask computed from that number. The step reads no value back from the device, and no shape
depends on one (tests/stages/decode/test_cuda_graph.py traces it). A `StaticSlot` is one set of such buffers with its
recording. It holds the sequence of the cache that it served last.

`JoinedSlots` are several of them side by side in one set of buffers. A step over neighbouring slots computes a token of
each of their sequences, which have positions and masks of their own; it reads the weights once.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, cache_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate_tts.stages.graphs.recorder import Recorder, Replayable

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)
"""Capacities of slots, in positions. Each doubles the one before, so a sequence is moved at most five times."""

ABSENT = -1
"""Position of a row whose sequence is not in a step of several. It attends to nothing and is written to the last place
of its buffers, which is the place at this index; a sequence in such buffers leaves that place free."""

COMPARED = 8
"""How often a step of several is compared with each one's own, bit by bit, before it is used without."""


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


class StaticStep:
    """A decoder's step over memory that stays where it is, and its recording.

    Attributes:
        rows: Rows of the step.
        capacity: Maximum positions of each.

    Args:
        decoder: The module.
        forward: Its unchanged forward, which takes the module first.
        constants: Arguments of the decoder that become part of the recording.
        memory: The memory.
        recorder: Records the step.
        any_rows: Compute each row as in a step of any other number of rows, where kernels can.
        told: Called after the step was recorded.
    """

    def __init__(  # noqa: PLR0913 - what a step consists of
        self,
        decoder: Any,
        forward: Callable[..., Any],
        constants: dict[str, Any],
        memory: Memory,
        recorder: Recorder,
        *,
        any_rows: bool = False,
        told: Callable[[], object] = bool,
    ) -> None:
        self._decoder, self._forward, self._constants = decoder, forward, constants
        self._cache = cache_name(parameters_of(plain_class(decoder))) or CACHE_NAMES[0]
        self._recorder, self._any_rows, self._told = recorder, any_rows, told
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
                name = type(self._decoder).__name__
                raise TypeError(f"{name} returns {type(recording.outputs).__name__}, without names")
            self._recording = recording
            self._told()
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
        layers = [layer(*pair, position, self._row_numbers, any_rows=self._any_rows) for pair in self.buffers]
        return self._forward(
            self._decoder, **inputs, **self._constants, attention_mask=mask, **{self._cache: whole(layers)},
            use_cache=True,
        )  # fmt: skip


class StaticSlot(StaticStep):
    """Buffers for one sequence, the inputs of a step over them, and the step's recording.

    Attributes:
        lane: Its place among the joined slots that it is one of; `None` for a slot by itself.

    Args:
        decoder: The module.
        forward: Its unchanged forward, which takes the module first.
        past: A growable cache, for the shapes of its layers.
        inputs: Tensor arguments of the decoder for one token, without the mask.
        constants: The other arguments; they become part of the recording.
        capacity: Maximum positions.
        recorder: Records the step, and nothing else, now.
        any_rows: See `StaticStep`.

    Raises:
        TypeError: The decoder returns an object without named fields.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a call consists of
        self,
        decoder: Any,
        forward: Callable[..., Any],
        past: Any,
        inputs: dict[str, torch.Tensor],
        constants: dict[str, Any],
        capacity: int,
        recorder: Recorder,
        *,
        any_rows: bool = False,
    ) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors: later calls may run in another mode
            memory = Memory.of_a_slot(past, inputs, capacity)
            super().__init__(decoder, forward, constants, memory, recorder, any_rows=any_rows)
            self._begin(memory, memory.position, {})
            self.recording()

    @classmethod
    def of_lane(  # noqa: PLR0913, PLR0917 - what a step consists of
        cls,
        lane: int,
        memory: Memory,
        known: dict[str, Any],
        decoder: Any,
        forward: Callable[..., Any],
        constants: dict[str, Any],
        recorder: Recorder,
        told: Callable[[], object],
    ) -> StaticSlot:
        """Return one of several slots side by side. Its step is recorded when it runs alone for the first time.

        Args:
            lane: Its place among them.
            memory: Its memory, with a position for each row.
            known: What a layer of such a cache has besides keys and values.
            decoder: See `StaticStep`, as for the others.
            forward: Likewise.
            constants: Likewise.
            recorder: Likewise.
            told: Likewise.
        """
        made = cls.__new__(cls)
        alone = memory._replace(position=memory.position[:1])  # its rows are at one position
        StaticStep.__init__(made, decoder, forward, constants, alone, recorder, any_rows=True, told=told)
        made._begin(memory, memory.position, known)
        made.lane = lane
        return made

    def _begin(self, memory: Memory, positions: torch.Tensor, known: dict[str, Any]) -> None:
        self.lane: int | None = None
        self._positions = positions  # of all rows
        self._known = known  # what a layer of such a cache has besides keys and values
        self._owner: weakref.ref[Any] | None = None
        self._stream: Any = None  # of the owner's work
        self._is_present = False
        self.bytes = sum(tensor.numel() * tensor.element_size() for pair in memory.buffers for tensor in pair)

    def prepare(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any) -> None:
        """Record the step of a slot among others, if it has not run alone so far. See `run`.

        Raises:
            Exception: The step cannot be recorded. The sequence is in the slot, and has not grown.
        """
        if self._recording is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.make_way(past)
                with self._recorder.in_turn():
                    self.enter(past, inputs, mask, stream)
                    self.recording()

    def run(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any = None) -> Any:
        """Run one more token of a sequence.

        Args:
            past: Its growing cache. It is moved into this slot if it lies elsewhere, and grows by one position.
            inputs: Tensors with the names and shapes that the slot was made with.
            mask: Attended positions, (batch, positions including the token); `None` attends all.
            stream: The stream of this thread, for a slot among others.

        Returns:
            The decoder's result in new tensors, with the caller's cache.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            self.make_way(past)
            with self._recorder.in_turn():
                length = self.enter(past, inputs, mask, stream)
                recording = self.recording()
                recording.replay()
                for layer in past.layers:
                    layer.advance(1)
                return _own(recording.outputs, past, length + 1)

    def make_way(self, past: Any) -> None:
        """Move another sequence than this cache's out of the slot."""
        if self.is_of(past):
            for layer, buffers in zip(past.layers, self.buffers, strict=True):
                layer.return_to(*buffers)
        if not self.holds(past):
            self.leave()

    def enter(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any) -> int:
        """Prepare a token of a sequence; see `run`. Returns the sequence's length."""
        if not self.holds(past):
            for layer, buffers in zip(past.layers, self.buffers, strict=True):
                layer.move_to(*buffers)
            self._owner = weakref.ref(past)
            self._known = past.layers[0].state()
        self._stream, self._is_present = stream, True
        length = int(past.layers[0].length())
        self._positions.fill_(length)
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.valid.fill_(True)
        if mask is not None:
            self.valid[:, : length + 1].copy_(mask)
        return length

    def step_aside(self) -> None:
        """Take no part in the next step of several. Its sequence stays as it is."""
        if self._is_present:
            self._positions.fill_(ABSENT)
            self._is_present = False

    def take_prompt(self, past: Any, run: Callable[[], Any]) -> Any:
        """Run a prompt whose keys and values are written into this slot, where they need not be moved to.

        It is one turn of the recorder, and so not for a slot among others.

        Args:
            past: An empty `DynamicCache`, which the prompt fills. It gets growing layers over the slot's buffers.
            run: Runs the prompt.
        """
        past.layers[:] = [kv_cache.growing_class().over(self._known, *buffers) for buffers in self.buffers]
        self._owner = weakref.ref(past)
        with self._recorder.in_turn():
            return run()

    def holds(self, past: Any) -> bool:
        """Check that a cache's sequence lies in this slot's buffers."""
        growing_class = kv_cache.growing_class()
        return all(
            type(layer) is growing_class and layer.buffers()[0] is keys and layer.buffers()[1] is values
            for layer, (keys, values) in zip(past.layers, self.buffers, strict=True)
        )

    def is_of(self, past: Any) -> bool:
        """Check that the last sequence in this slot was that of a cache."""
        owner = None if self._owner is None else self._owner()
        return len(past.layers) == len(self.buffers) and owner is past

    def is_free(self) -> bool:
        """Check that the cache that used this slot last is gone, or has no tensor in its buffers any more."""
        return not any(self._uses())

    def _uses(self) -> Iterator[tuple[Any, str]]:
        """Find the layers of the slot's cache with "keys" or "values" in its buffers: those of a cropped one are views.

        The layers may be others by now, and their tensors too: it was reordered, repeated, or outgrew its bucket.
        """
        owner = None if self._owner is None else self._owner()
        own = {_storage(tensor): _extent(tensor) for pair in self.buffers for tensor in pair}
        layers: list[Any] = [] if owner is None else owner.layers
        for layer in layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name, None)
                if isinstance(tensor, torch.Tensor) and tensor.storage_offset() in own.get(_storage(tensor), ()):
                    yield layer, name

    def leave(self) -> None:
        """Move the sequence to buffers of its own and wait for all work on the slot's buffers.

        The buffers of a slot among others are not freed by it, and nothing is waited for.
        """
        turn = {"for_the_last": True} if self.lane is None else {"stream": self._stream}
        uses = list(self._uses())
        if uses or self.lane is None:
            with self._recorder.in_turn(**turn):
                for layer, name in uses:
                    setattr(layer, name, getattr(layer, name).clone())
        self._owner = None
        if self.lane is None:
            self._recorder.finish()

    def finish(self) -> None:
        """Wait for all work on the slot's buffers."""
        self._recorder.finish()


class Work(NamedTuple):
    """A token of one of several sequences."""

    slot: StaticSlot
    past: Any
    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    stream: Any
    """The stream of the caller's thread."""


class JoinedSlots:
    """Slots side by side, so that the steps of several sequences are one step of more rows, without a copy.

    A step of several computes neighbouring slots. Rows of those that are absent are computed, too; see `ABSENT`.

    Attributes:
        slots: The slots.

    Args:
        decoder: The module.
        forward: Its unchanged forward, which takes the module first.
        past: A growable cache, for the shapes of its layers.
        inputs: Tensor arguments of the decoder for one token, without the mask; the first dimension is the batch.
        constants: The other arguments; they become part of the recordings.
        capacity: Maximum positions.
        recorder: Records the steps, each when it is needed for the first time.
        lanes: Number of slots, a multiple of the largest of `numbers`.
        numbers: Numbers of slots for which a step of several may be recorded, powers of two, from 1 on.
        told: Called after a step was recorded.
        differs: Called with a number of slots for which a step differs in bits from each slot's own. It is not used any
            more. `None` if steps are not compared.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a call consists of
        self,
        decoder: Any,
        forward: Callable[..., Any],
        past: Any,
        inputs: dict[str, torch.Tensor],
        constants: dict[str, Any],
        capacity: int,
        recorder: Recorder,
        lanes: int,
        numbers: tuple[int, ...],
        told: Callable[[], object],
        differs: Callable[[int], object] | None,
    ) -> None:
        self._recorder, self._numbers, self._differs = recorder, numbers, differs
        self._step: Callable[[Memory], StaticStep] = lambda memory: StaticStep(
            decoder, forward, constants, memory, recorder, any_rows=True, told=told
        )
        with torch.inference_mode(mode=False), torch.no_grad():  # as in a slot
            self._memory = Memory.of_lanes(past, inputs, capacity, lanes)
            self._rows = len(self._memory.position) // lanes
            known = past.layers[0].state()
            self.slots = [
                StaticSlot.of_lane(
                    lane,
                    self._memory.part(lane * self._rows, self._rows),
                    known,
                    decoder,
                    forward,
                    constants,
                    recorder,
                    told,
                )
                for lane in range(lanes)
            ]
        self.bytes = sum(slot.bytes for slot in self.slots)
        self._several: dict[tuple[int, int], StaticStep] = {}  # by the number of slots, and the first one's lane
        self._compared: dict[StaticStep, int] = {}  # how often a step was compared

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Run a token of several sequences.

        Returns:
            The decoder's results as `StaticSlot.run` has them, each in memory of its caller's stream.

        Raises:
            Exception: A step cannot be recorded, or has failed. No sequence has grown.
        """
        results: dict[int, Any] = {}
        with torch.inference_mode(mode=False), torch.no_grad():
            lengths = []
            for work in works:
                work.slot.make_way(work.past)
                with self._recorder.in_turn(stream=work.stream):
                    lengths.append(work.slot.enter(work.past, work.inputs, work.mask, work.stream))
            for step, first, here in self._divided([int(work.slot.lane or 0) for work in works]):
                with self._recorder.in_turn():
                    for slot in self.slots[first : first + step.rows // self._rows]:
                        if not any(slot is works[number].slot for number in here):
                            slot.step_aside()
                made = [*self._replayed(step, first, [(works[number], lengths[number]) for number in here])]
                if step.rows > self._rows and self._differs is not None and self._compared.get(step, 0) < COMPARED:
                    alone = []
                    for number in here:
                        slot = works[number].slot
                        alone += self._replayed(slot, int(slot.lane or 0), [(works[number], lengths[number])])
                    if all(map(_same, made, alone)):
                        self._compared[step] = self._compared.get(step, 0) + 1
                    else:
                        made, size = alone, step.rows // self._rows
                        self._numbers = tuple(each for each in self._numbers if each != size)
                        self._differs(size)
                results.update(zip(here, made, strict=True))
        for work in works:
            for layer in work.past.layers:
                layer.advance(1)
        return [results[number] for number in range(len(works))]

    def _replayed(self, step: StaticStep, first: int, works: list[tuple[Work, int]]) -> list[Any]:
        """Run a step; return the results of sequences, whose present lengths are given."""
        with self._recorder.in_turn():
            recording = step.recording()
            _check_rows(recording.outputs, step.rows)
            recording.replay()
        found = []
        for work, length in works:
            row = (int(work.slot.lane or 0) - first) * self._rows
            with self._recorder.in_turn(stream=work.stream):
                found.append(_own(recording.outputs, work.past, length + 1, slice(row, row + self._rows)))
        return found

    def _divided(self, lanes: list[int]) -> list[tuple[StaticStep, int, list[int]]]:
        """Find the fewest steps for some lanes. Returns each with its first lane, and the places of its lanes here."""
        left, found = list(range(len(lanes))), []
        while left:
            size, first, here = self._largest(lanes, left)
            left = [number for number in left if number not in here]
            found.append((self._of_several(size, first), first, here))
        return found

    def _largest(self, lanes: list[int], left: list[int]) -> tuple[int, int, list[int]]:
        """Return the step for most of the lanes that are left, and of these the smallest."""
        steps = []
        for size in self._numbers:
            for first in sorted({lanes[number] // size * size for number in left}):
                here = [number for number in left if lanes[number] // size * size == first]
                steps.append((len(here), -size, -first, here))
        _, size, first, here = max(steps)
        return -size, -first, here

    def _of_several(self, size: int, first: int) -> StaticStep:
        if size == 1:
            return self.slots[first]
        if (size, first) not in self._several:
            memory = self._memory.part(first * self._rows, size * self._rows)
            self._several[size, first] = self._step(memory)
        return self._several[size, first]

    def leave(self) -> None:
        """Move all sequences to buffers of their own and wait for all work on the slots."""
        for slot in self.slots:
            slot.leave()
        self.finish()

    def finish(self) -> None:
        """Wait for all work on the slots."""
        self._recorder.finish()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _extent(tensor: torch.Tensor) -> range:
    return range(tensor.storage_offset(), tensor.storage_offset() + max(1, tensor.numel()))


def bytes_of(past: Any, capacity: int) -> int:
    """Return the bytes of a slot's buffers for such a cache."""
    each = (tensor for layer in past.layers for tensor in (layer.keys, layer.values))
    return sum(t.numel() // max(1, t.shape[-2]) * capacity * t.element_size() for t in each)


def _check_rows(result: Any, rows: int) -> None:
    """Check that each tensor of a result has these rows.

    Raises:
        ValueError: One has not.
    """
    if not all(tensor.dim() and tensor.shape[0] == rows for tensor in tensors_of(result)):
        raise ValueError("the decoder returns tensors that are not divided into rows")


def _same(one: Any, other: Any) -> bool:
    """Check that two results have the same tensors, a NaN for a NaN."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result, without its cache's."""
    fields = [value for name, value in result.items() if name not in CACHE_NAMES]
    return [leaf for leaf in _pytree.tree_leaves(fields) if isinstance(leaf, torch.Tensor)]


def _own(result: Any, past: Any, positions: int, rows: slice | None = None) -> Any:
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
