"""A decode step for a CUDA graph, with the same addresses and shapes for every length of the sequence.

The sequence lies in buffers of a fixed capacity, and its length is a number on the device. Attention runs over the
whole capacity, with a mask computed from that number. The step reads no value back from the device, and no shape
depends on one (tests/stages/decode/test_cuda_graph.py traces it). A `StaticSlot` is one set of such buffers with its
recording. It holds the sequence of the cache that it served last.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, cache_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate_tts.stages.graphs.recorder import Recorder

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)
"""Capacities of slots, in positions. Each doubles the one before, so a sequence is moved at most five times."""


class StaticSlot:
    """Buffers for one sequence, the inputs of a step over them, and the step's recording.

    Args:
        decoder: The module.
        forward: Its unchanged forward, which takes the module first.
        past: A growable cache, for the shapes of its layers.
        inputs: Tensor arguments of the decoder for one token, without the mask.
        constants: The other arguments; they become part of the recording.
        capacity: Maximum positions.
        recorder: Records the step, and nothing else.

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
    ) -> None:
        self._decoder, self._forward, self._constants = decoder, forward, constants
        self._cache = cache_name(parameters_of(plain_class(decoder))) or CACHE_NAMES[0]
        self.capacity = capacity
        self._recorder = recorder
        self._owner: weakref.ref[Any] | None = None
        self._known: dict[str, Any] = {}  # what a layer of such a cache has besides keys and values
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors: later calls may run in another mode
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            first = past.layers[0].keys
            self.rows, dtype = first.shape[0], first.dtype  # the mask has the dtype of the attention
            self.buffers = [
                tuple(t.new_zeros((*t.shape[:-2], capacity, t.shape[-1])) for t in (layer.keys, layer.values))
                for layer in past.layers
            ]
            self.bytes = sum(tensor.numel() * tensor.element_size() for pair in self.buffers for tensor in pair)
            self.position = torch.zeros(1, dtype=torch.long, device=first.device)
            self._places = torch.arange(capacity, device=first.device)
            self.valid = torch.ones(self.rows, capacity, dtype=torch.bool, device=first.device)
            self._open = torch.zeros((), dtype=dtype, device=first.device)
            self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=first.device)
            self._recording = recorder.record(self.step)
        if not hasattr(self._recording.outputs, "items"):
            raise TypeError(f"{type(decoder).__name__} returns {type(self._recording.outputs).__name__}, without names")

    def step(self) -> Any:
        """Run one token at `position`. This function is recorded."""
        seen = (self._places <= self.position) & self.valid
        mask = torch.where(seen, self._open, self._hidden)[:, None, None, :]
        inputs = {"position_ids": self.position.expand(self.rows, 1), **self.inputs}
        classes = kv_cache.cache_classes()
        layer = kv_cache.upstream_class(StaticLayer, classes.DynamicLayer)
        whole = kv_cache.upstream_class(kv_cache.CacheOfLayers, classes.Cache)
        past = whole([layer(keys, values, self.position) for keys, values in self.buffers])
        return self._forward(
            self._decoder, **inputs, **self._constants, attention_mask=mask, **{self._cache: past}, use_cache=True
        )

    def run(self, past: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None) -> Any:
        """Run one more token of a sequence.

        Args:
            past: Its growing cache. It is moved into this slot if it lies elsewhere, and grows by one position.
            inputs: Tensors with the names and shapes that the slot was made with.
            mask: Attended positions, (batch, positions including the token); `None` attends all.

        Returns:
            The decoder's result in new tensors, with the caller's cache.
        """
        with torch.inference_mode(mode=False), torch.no_grad(), self._recorder.in_turn():
            if self.is_of(past):
                for layer, buffers in zip(past.layers, self.buffers, strict=True):
                    layer.return_to(*buffers)
            if not self.holds(past):
                self.leave()
                for layer, buffers in zip(past.layers, self.buffers, strict=True):
                    layer.move_to(*buffers)
                self._owner = weakref.ref(past)
                self._known = past.layers[0].state()
            length = past.layers[0].length()
            self.position.fill_(length)
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self.valid.fill_(True)
            if mask is not None:
                self.valid[:, : length + 1].copy_(mask)
            self._recording.replay()
            for layer in past.layers:
                layer.advance(1)
            return _own(self._recording.outputs, past, length + 1)

    def take_prompt(self, past: Any, run: Callable[[], Any]) -> Any:
        """Run a prompt whose keys and values are written into this slot, where they need not be moved to.

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
        own = {_storage(tensor) for pair in self.buffers for tensor in pair}
        layers: list[Any] = [] if owner is None else owner.layers
        for layer in layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name, None)
                if isinstance(tensor, torch.Tensor) and _storage(tensor) in own:
                    yield layer, name

    def leave(self) -> None:
        """Move the sequence to buffers of its own and wait for all work on the slot's buffers."""
        with self._recorder.in_turn(for_the_last=True):
            for layer, name in list(self._uses()):
                setattr(layer, name, getattr(layer, name).clone())
        self._owner = None
        self._recorder.finish()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def bytes_of(past: Any, capacity: int) -> int:
    """Return the bytes of a slot's buffers for such a cache."""
    each = (tensor for layer in past.layers for tensor in (layer.keys, layer.values))
    return sum(t.numel() // max(1, t.shape[-2]) * capacity * t.element_size() for t in each)


def _own(result: Any, past: Any, positions: int) -> Any:
    """Copy a result into tensors that the next replay does not overwrite, with the caller's own cache.

    Attention weights cover the whole capacity in the recording; positions beyond the sequence are cut off.
    """
    cache = cache_name(result.keys()) or CACHE_NAMES[0]
    fields = {name: value for name, value in result.items() if name != cache}
    if "attentions" in fields:
        fields["attentions"] = tuple(weights[..., :positions] for weights in fields["attentions"])
    fields = _pytree.tree_map_only(torch.Tensor, torch.clone, fields)
    return type(result)(**fields, **{cache: past})


class StaticLayer:
    """One layer, which writes a token at the position that a device tensor holds."""

    def __init__(self, keys: Any, values: Any, position: Any) -> None:
        self.buffers = (keys, values)
        self.position = position
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.position, states.to(buffer.dtype))
        return self.buffers

    def get_seq_length(self, *_args: Any) -> int:
        return int(self.buffers[0].shape[-2]) - 1  # a constant: positions and mask are given explicitly

    def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
        return int(self.buffers[0].shape[-2]), 0
