"""A slot: memory for one sequence at a time, and the recorded step over it.

A sequence comes into a slot in a call with its cache, and stays until nobody has a tensor of it any more. No other call
moves it or writes to it: its thread may be reading it, or about to assign what it has read. A call that finds no free
slot may visit one of its own instead, where nothing stays.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.lent_memory import LentMemory
from accelerate_tts.stages.decode.static_step import ABSENT, Memory, StaticStep, own_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from accelerate_tts.stages.decode.static_step import StepKind


class StaticSlot(StaticStep):
    """Buffers for one sequence, the inputs of a step over them, and the step's recording.

    Attributes:
        lane: Its place among the joined slots that it is one of; `None` for a slot by itself.
        bytes: Bytes of its buffers.

    Args:
        kind: The kind of step, which is recorded now. Its recorder records nothing else.
        past: A growable cache, for the shapes of its layers.
        inputs: Tensor arguments of the decoder for one token, without the mask.
        capacity: Maximum positions.

    Raises:
        TypeError: The decoder returns an object without named fields.
    """

    def __init__(self, kind: StepKind, past: Any, inputs: dict[str, torch.Tensor], capacity: int) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors: later calls may run in another mode
            memory = Memory.of_a_slot(past, inputs, capacity)
            super().__init__(kind, memory)
            self._begin(memory, memory.position, {})
            self.recording()

    @classmethod
    def of_lane(cls, kind: StepKind, lane: int, memory: Memory, known: dict[str, Any]) -> StaticSlot:
        """Return one of several slots side by side. Its step is recorded when it runs alone for the first time.

        Args:
            kind: The kind of step.
            lane: Its place among them.
            memory: Its memory, with a position for each row.
            known: What a layer of such a cache has besides keys and values.
        """
        made = cls.__new__(cls)
        alone = memory._replace(position=memory.position[:1])  # its rows are at one position
        StaticStep.__init__(made, kind, alone)
        made._begin(memory, memory.position, known)
        made.lane = lane
        return made

    def _begin(self, memory: Memory, positions: torch.Tensor, known: dict[str, Any]) -> None:
        self.lane: int | None = None
        self._positions = positions  # of all rows
        self._known = known  # what a layer of such a cache has besides keys and values
        self._lent = LentMemory([tensor for pair in memory.buffers for tensor in pair])
        self._owner: weakref.ref[Any] | None = None
        self._stream: Any = None  # of the last sequence's work
        self._is_present = False
        self._visited = 0  # positions that the last visit has written
        self.bytes = sum(tensor.numel() * tensor.element_size() for pair in memory.buffers for tensor in pair)

    # --- who is in it ---

    def holds(self, past: Any) -> bool:
        """Check that a cache's sequence lies in this slot, and may grow there."""
        if not self.is_of(past):  # of all slots but one, at each token
            return False
        growing_class = kv_cache.growing_class()
        layers = past.layers
        return all(type(layer) is growing_class for layer in layers) and self._lent.is_all_of(
            [buffer for layer in layers for buffer in layer.buffers()]
        )

    def is_free(self) -> bool:
        """Check that nobody has a tensor of the last sequence any more."""
        return not self._lent.is_lent()

    def is_of(self, past: Any) -> bool:
        """Check that a cache was the last one to come into this slot. Its sequence may be elsewhere by now."""
        return self._owner is not None and self._owner() is past

    def move_out(self, past: Any, stream: Any) -> None:
        """Copy what its last cache has in this slot to memory of the cache's own, in a call with that cache.

        That of a cropped cache are views, which are no place for more tokens.
        """
        with torch.inference_mode(mode=False), torch.no_grad(), self._recorder.in_turn(stream=stream):
            for layer in past.layers:
                for name in ("keys", "values"):
                    tensor = getattr(layer, name)
                    if self._lent.has(tensor):
                        setattr(layer, name, tensor.clone())
        self._owner = None

    # --- steps ---

    def prepare(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any) -> None:
        """Record the step of a slot among others, if it has not run alone so far. See `run`.

        Raises:
            Exception: The step cannot be recorded. The sequence is in the slot, and has not grown.
        """
        if self._recording is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.make_way(past)
                with self._recorder.in_turn(stream=stream):
                    self.enter(past, inputs, mask, stream)
                    self.recording()

    def run(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any) -> Any:
        """Run one more token of a sequence, which is in this slot, or comes in if it is free.

        Args:
            past: Its growing cache. It grows by one position.
            inputs: Tensors with the names and shapes that the slot was made with.
            mask: Attended positions, (batch, positions including the token); `None` attends all.
            stream: The stream of the caller's thread; see `stream_of`.

        Returns:
            The decoder's result in new tensors, with the caller's cache.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            self.make_way(past)
            with self._recorder.in_turn(stream=stream):
                length = self.enter(past, inputs, mask, stream)
                recording = self.recording()
                recording.replay()
                for layer in past.layers:
                    layer.advance(1)
                return own_result(recording.outputs, past, length + 1)

    def visit(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any) -> Any:
        """Run one more token of a sequence that stays where it is. It is copied in, and the token's part out.

        See `run`.
        """
        with torch.inference_mode(mode=False), torch.no_grad(), self._recorder.in_turn(stream=stream):
            length = int(past.layers[0].length())
            if length < self._visited:
                _clear([buffer for pair in self.buffers for buffer in pair], length)
            self._visited = length + 1
            for layer, buffers in zip(past.layers, self.buffers, strict=True):
                for buffer, tensor in zip(buffers, (layer.keys, layer.values), strict=True):
                    buffer[..., :length, :].copy_(tensor)
            self._give(length, inputs, mask)
            recording = self.recording()
            recording.replay()
            for layer, buffers in zip(past.layers, self.buffers, strict=True):
                layer.update(*(buffer[..., length : length + 1, :] for buffer in buffers))
            return own_result(recording.outputs, past, length + 1)

    def make_way(self, past: Any) -> None:
        """Order what follows behind all work on the sequence that was here before this cache's, if it is another."""
        if self._stream is not None and not self.holds(past):
            with self._recorder.in_turn(stream=self._stream):
                self._stream = None

    def enter(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, stream: Any) -> int:
        """Prepare a token of a sequence; see `run`. Returns the sequence's length."""
        if not self.holds(past):
            given = self._lent.lend()
            _clear(given, int(past.layers[0].length()))
            lent = iter(given)
            for layer in past.layers:
                layer.move_to(next(lent), next(lent))
            self._owner = weakref.ref(past)
            self._known = past.layers[0].state()
        self._stream, self._is_present = stream, True
        length = int(past.layers[0].length())
        self._give(length, inputs, mask)
        return length

    def _give(self, length: int, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None) -> None:
        self._positions.fill_(length)
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.valid.fill_(True)
        if mask is not None:
            self.valid[:, : length + 1].copy_(mask)

    def step_aside(self) -> None:
        """Take no part in the next step of several. The sequence stays as it is."""
        if self._is_present:
            self._positions.fill_(ABSENT)
            self._is_present = False

    def take_prompt(self, past: Any, run: Callable[[], Any], stream: Any) -> Any:
        """Run a prompt whose keys and values are written into this slot, where they need not be moved to.

        It is one turn of the recorder, and so not for a slot among others.

        Args:
            past: An empty `DynamicCache`, which the prompt fills. It gets growing layers over the slot's memory.
            run: Runs the prompt.
            stream: See `run`.
        """
        self.make_way(past)
        with self._recorder.in_turn(stream=stream):
            lent = self._lent.lend()
            with torch.inference_mode(mode=False), torch.no_grad():
                _clear(lent, 0)
            begun = kv_cache.Begun(past, self._known, list(zip(lent[::2], lent[1::2], strict=True)))
            self._owner, self._stream = weakref.ref(past), stream
            try:
                return run()
            finally:
                begun.end()

    # --- its end ---

    def give_up(self) -> None:
        """Wait for all work on the slot so far, which is not used any more.

        A sequence that is in it stays there, and keeps its memory as long as it needs that.
        """
        if self._stream is not None:
            with self._recorder.in_turn(stream=self._stream):
                pass
            if not self.is_free():  # to be freed on another stream than it came from
                for tensor in (tensor for pair in self.buffers for tensor in pair):
                    tensor.record_stream(self._stream)
        self.finish()

    def finish(self) -> None:
        """Wait for all work in turns so far."""
        self._recorder.finish()


def _clear(buffers: Iterable[torch.Tensor], first: int) -> None:
    """Write zeros from a position on: a NaN of the last sequence, times the weight 0 of a hidden place, were a NaN."""
    for buffer in buffers:
        buffer[..., first:, :].zero_()


def bytes_of(past: Any, capacity: int) -> int:
    """Return the bytes of a slot's buffers for such a cache."""
    each = (tensor for layer in past.layers for tensor in (layer.keys, layer.values))
    return sum(t.numel() // max(1, t.shape[-2]) * capacity * t.element_size() for t in each)
