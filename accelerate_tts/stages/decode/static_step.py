"""One token through a decoder as a CUDA graph needs it: the same addresses and shapes however long the sequence is.

The sequence lies in buffers of a fixed capacity; how long it is, is a number on the device. Attention goes over the
whole capacity, with a mask made of that number. Nothing asks the device for a value, and no shape depends on one
(tests/stages/decode/test_cuda_graph.py traces it). A `Slot` is one set of such buffers with the recording that belongs
to them; a cache of upstream's class is moved in for as long as it is the last one that was served.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, cache_name

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    import torch

__all__ = ["CAPACITIES", "CudaRecording", "Recording", "Slot", "bytes_of"]

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)
"""Positions that a slot may have room for. Each doubles the one before: a sequence is moved five times at most."""


class Recording(Protocol):
    """A step that was recorded; made of the step."""

    outputs: Any
    """What the step returned. Overwritten by each replay."""

    def replay(self) -> None:
        """Run the step again on what is in its inputs now."""
        ...

    def in_turn(self, *, for_the_last: bool = False) -> AbstractContextManager[object]:
        """While open, this thread's work on inputs, buffers and outputs is behind that of all others before it.

        Args:
            for_the_last: It is done for whoever had the last turn, who may use and free what is made in it.
        """
        ...

    def finish(self) -> None:
        """Wait until all that work is done: what it is done on may be freed then."""
        ...


class CudaRecording:
    """A CUDA graph of a step.

    It is a plain graph, not one of inductor's trees: it may be replayed by any thread, one at a time, on that thread's
    own stream. Run on an H100: decision 0031.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        import torch

        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._last = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries allocate their workspaces at first calls, which a capture must not contain
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on with their own work on the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.outputs = step()

    def replay(self) -> None:
        """See `Recording.replay`."""
        self._graph.replay()

    @contextmanager
    def in_turn(self, *, for_the_last: bool = False) -> Generator[None, None, None]:
        """See `Recording.in_turn`. Each thread has a stream of its own, and streams wait for nobody by themselves.

        Memory belongs to the stream that it was taken on: freed by whoever works on another one, it would be given out
        again before that work is done.
        """
        import torch

        stream = self._last if for_the_last else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)
                self._last = stream

    def finish(self) -> None:
        """See `Recording.finish`. The allocator gives freed memory to the stream that it came from, at once."""
        self._done.synchronize()


class Slot:
    """Buffers for one sequence, the inputs of a step over them, and the step's recording.

    Args:
        decoder: The module.
        forward: Its untouched forward, given the module.
        past: A growable cache, for the shapes of its layers.
        inputs: The tensors that the decoder is called with, but for its mask: one token each.
        constants: What else it is called with, part of the recording.
        capacity: Positions.
        record: Makes the recording.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a call consists of
        self,
        decoder: Any,
        forward: Callable[..., Any],
        past: Any,
        inputs: dict[str, torch.Tensor],
        constants: dict[str, Any],
        capacity: int,
        record: Callable[[Callable[[], Any]], Recording],
    ) -> None:
        import torch

        self._decoder, self._forward, self._constants = decoder, forward, constants
        self._cache = cache_name(parameters_of(plain_class(decoder))) or CACHE_NAMES[0]
        self.capacity = capacity
        self._owner: weakref.ref[Any] | None = None
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors: others may be served in another mode
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            first = past.layers[0].keys
            self.rows, dtype = first.shape[0], first.dtype  # a mask is of the dtype that attention is computed in
            self.buffers = [
                tuple(t.new_zeros((*t.shape[:-2], capacity, t.shape[-1])) for t in (layer.keys, layer.values))
                for layer in past.layers
            ]
            self.bytes = sum(tensor.numel() * tensor.element_size() for pair in self.buffers for tensor in pair)
            self.position = torch.zeros(1, dtype=torch.long, device=first.device)
            self._places = torch.arange(capacity, device=first.device)
            self._valid = torch.ones(self.rows, capacity, dtype=torch.bool, device=first.device)
            self._open = torch.zeros((), dtype=dtype, device=first.device)
            self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=first.device)
            self._recording = record(self.step)
        if not hasattr(self._recording.outputs, "items"):
            raise TypeError(f"{type(decoder).__name__} returns {type(self._recording.outputs).__name__}, without names")

    def step(self) -> Any:
        """One token at `position`. This is what is recorded."""
        import torch

        seen = (self._places <= self.position) & self._valid
        mask = torch.where(seen, self._open, self._hidden)[:, None, None, :]
        inputs = {"position_ids": self.position.expand(self.rows, 1), **self.inputs}
        past = _static_cache(self.buffers, self.position)
        return self._forward(
            self._decoder, **inputs, **self._constants, attention_mask=mask, **{self._cache: past}, use_cache=True
        )

    def run(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None) -> Any:
        """One more token of a sequence.

        Args:
            past: Its growing cache, moved in here if it lies elsewhere; one position longer afterwards.
            inputs: As the slot was made with, of the same shapes.
            mask: (rows, positions with the token), of the positions that count; all do without one.

        Returns:
            What the decoder returns, in tensors of its own, with the caller's cache.
        """
        import torch

        with torch.inference_mode(mode=False), torch.no_grad(), self._recording.in_turn():
            if not self.holds(past):
                self._move_in(past)
            length = past.layers[0].length()
            self.position.fill_(length)
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self._valid.fill_(True)
            if mask is not None:
                self._valid[:, : length + 1].copy_(mask)
            self._recording.replay()
            for layer in past.layers:
                layer.advance(1)
            return _own(self._recording.outputs, past, length + 1)

    def holds(self, past: Any) -> bool:
        """Whether a cache's sequence lies in this slot's buffers."""
        growing_class = kv_cache.growing_class()
        return all(
            type(layer) is growing_class and layer.buffers()[0] is keys and layer.buffers()[1] is values
            for layer, (keys, values) in zip(past.layers, self.buffers, strict=True)
        )

    def is_free(self) -> bool:
        """Whether the cache that lay here is gone, or has buffers of its own again."""
        owner = None if self._owner is None else self._owner()
        return owner is None or len(owner.layers) != len(self.buffers) or not self.holds(owner)

    def _move_in(self, past: Any) -> None:
        self.leave()
        for layer, buffers in zip(past.layers, self.buffers, strict=True):
            layer.move_to(*buffers)
        self._owner = weakref.ref(past)

    def leave(self) -> None:
        """Give the sequence that lies here buffers of its own; nothing is left to be done on the slot's then."""
        owner = None if self._owner is None else self._owner()
        self._owner = None
        with self._recording.in_turn(for_the_last=True):
            for layer, (keys, values) in zip([] if owner is None else owner.layers, self.buffers, strict=False):
                # It may have left by itself: cropped, reordered, or grown out of its bucket.
                if isinstance(layer, kv_cache.growing_class()):
                    if layer.buffers()[0] is keys:
                        layer.keys = layer.keys.clone()
                    if layer.buffers()[1] is values:
                        layer.values = layer.values.clone()
        self._recording.finish()


def bytes_of(past: Any, capacity: int) -> int:
    """What the buffers of a slot for such a cache take."""
    each = (tensor for layer in past.layers for tensor in (layer.keys, layer.values))
    return sum(t.numel() // max(1, t.shape[-2]) * capacity * t.element_size() for t in each)


def _own(result: Any, past: Any, positions: int) -> Any:
    """A result in tensors that the next replay does not write to, with the caller's own cache.

    Attention weights are over the whole capacity there; of the positions beyond the sequence they are zero.
    """
    import torch
    from torch.utils import _pytree

    cache = cache_name(result.keys()) or CACHE_NAMES[0]
    fields = {name: value for name, value in result.items() if name != cache}
    if "attentions" in fields:
        fields["attentions"] = tuple(weights[..., :positions] for weights in fields["attentions"])
    fields = _pytree.tree_map_only(torch.Tensor, torch.clone, fields)
    return type(result)(**fields, **{cache: past})


def _static_cache(buffers: list[Any], position: torch.Tensor) -> Any:
    layer, whole = _static_classes(kv_cache.cache_classes())
    return whole([layer(keys, values, position) for keys, values in buffers])


@cache
def _static_classes(classes: Any) -> tuple[Any, Any]:
    class StaticLayer(classes.DynamicLayer):  # type: ignore[misc]
        """One layer: a token is written where a number on the device says."""

        def __init__(self, keys: Any, values: Any, position: Any) -> None:
            self.buffers = (keys, values)
            self.position = position
            self.is_initialized = True

        def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.position, states.to(buffer.dtype))
            return self.buffers

        def get_seq_length(self, *_args: Any) -> int:
            return int(self.buffers[0].shape[-2]) - 1  # a constant: who asks is given positions and mask already

        def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
            return int(self.buffers[0].shape[-2]), 0

    class StaticCache(classes.Cache):  # type: ignore[misc]
        """All layers."""

        def __init__(self, layers: list[Any]) -> None:
            self.layers = layers
            self.layer_class_to_replicate = None
            self.offloading = False

    return StaticLayer, StaticCache
