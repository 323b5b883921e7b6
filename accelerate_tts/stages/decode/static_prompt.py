"""A prompt for a graph, with the same addresses and shapes for every length up to a bucket's.

The prompt stands at the beginning of buffers, and nothing that counts behind it: in a causal decoder a position does
not see what is behind it. The prompt's length is a number on the device, as is its padding on the left (`valid`), so
that no shape and no value of the host depends on it (tests/stages/decode/test_recorded_prompts.py traces it). Never run
on a device; docs/decisions/0009-cuda.md says what a CPU has shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.patching.class_swap import keeps_copies
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, attention_of, cache_name, cache_of
from accelerate_tts.stages.decode.token_call import POSITIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate_tts.stages.decode.prompt_call import PromptCall
    from accelerate_tts.stages.graphs.recorder import Recorder, Replayable

_HALF_TOLERANCE = 0.05
"""The same where something rounds to half precision. Tuning compares by its own, stricter limits; this finds decoders
that see what is behind a position."""

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (rows, heads, positions, head size)."""


class PromptError(Exception):
    """A prompt cannot be computed in a bucket; the message says why."""


class PromptBuffers(NamedTuple):
    """Tensors that a recorded prompt reads at fixed addresses, besides the weights."""

    inputs: dict[str, torch.Tensor]
    """Tensor arguments of the decoder, (rows, bucket, ...)."""
    positions: torch.Tensor
    """Position ids where the caller gives them, (rows, bucket)."""
    valid: torch.Tensor
    """True for the positions that are attended to, (rows, bucket)."""
    length: torch.Tensor
    """Positions of the prompt: one number."""

    @classmethod
    def of(cls, call: PromptCall) -> PromptBuffers:
        """Allocate the buffers for a kind of call."""
        shape, device = (call.prompt.rows, call.bucket), call.prompt.device
        return cls(
            {name: tensor.new_zeros((*shape, *tensor.shape[2:])) for name, tensor in call.inputs.items()},
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.ones(shape, dtype=torch.bool, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )

    def fill(self, call: PromptCall) -> None:
        """Copy a call's tensors in. Behind them are zeros: a NaN of an earlier prompt would reach every sum."""
        length = call.prompt.length
        for name, tensor in call.inputs.items():
            self.inputs[name][:, :length].copy_(tensor)
            self.inputs[name][:, length:].zero_()
        if call.positions is not None:
            self.positions.zero_()
            self.positions[:, :length].copy_(call.positions)
        self.valid.fill_(True)
        if call.mask is not None:
            self.valid[:, :length].copy_(call.mask)
        self.length.fill_(length)


class StaticPrompt:
    """A decoder's prompt over buffers of one bucket, and its recording.

    Attributes:
        buffers: Its inputs.

    Args:
        decoder: The module.
        forward: Its unchanged forward, which takes the module first.
        call: A call of the kind that it serves.
        dtype: Dtype of keys and values, and of the mask.
        layers: Number of layers in the cache.
    """

    def __init__(
        self, decoder: Any, forward: Callable[..., Any], call: PromptCall, dtype: torch.dtype, layers: int
    ) -> None:
        self._decoder, self._forward, self._constants, self._layers = decoder, forward, call.constants, layers
        self._cache = cache_name(parameters_of(plain_class(decoder))) or CACHE_NAMES[0]
        self._counts = call.positions is None
        self._is_sdpa = attention_of(decoder.config) == "sdpa"
        self._recording: Replayable | None = None
        self._cuts: list[tuple[int, ...]] = []  # of each tensor of a result, the dimensions that are positions
        device = call.prompt.device
        self.buffers = PromptBuffers.of(call)
        self._bucket = call.bucket
        self._places = torch.arange(call.bucket, device=device)
        self._open = torch.zeros((), dtype=dtype, device=device)
        self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        self._never = torch.full((), -torch.inf, dtype=dtype, device=device)

    # --- what is recorded ---

    def compute(self, buffers: PromptBuffers) -> tuple[Any, Pairs]:
        """Run the prompt in some buffers.

        Returns:
            The decoder's result, with a cache that keeps nothing, and the keys and values.

        Raises:
            PromptError: A layer of its cache was given nothing.
        """
        inside = self._places < buffers.length
        # Positions behind the prompt are 0, as a table of positions may end before the bucket does.
        ids = (self._places * inside)[None].expand_as(buffers.positions) if self._counts else buffers.positions
        mask = (self._places <= self._places[:, None]) & buffers.valid[:, None, None, :]
        if not self._is_sdpa:
            # A row that attends to nothing, as padding on the left, takes the mean of the prompt alone, as upstream's.
            mask = torch.where(mask, self._open, torch.where(inside, self._hidden, self._never))
        classes = kv_cache.cache_classes()
        layer = kv_cache.upstream_class(PromptLayer, classes.DynamicLayer)
        whole = kv_cache.upstream_class(kv_cache.CacheOfLayers, classes.Cache)
        layers = [layer() for _ in range(self._layers)]
        result = self._forward(
            self._decoder, **buffers.inputs, **self._constants, **{POSITIONS: ids, self._cache: whole(layers)},
            attention_mask=mask, use_cache=True,
        )  # fmt: skip
        pairs = []
        for made in layers:
            if made.given is None:
                raise PromptError("a layer of its cache is not written once by each prompt")
            pairs.append(made.given)
            made.given = None  # memory of the recording, which others may use again
        return result, pairs

    def record(self, recorder: Recorder, call: PromptCall, room: Pairs) -> None:
        """Record the prompt, which writes keys and values to the first positions of a room.

        Raises:
            Exception: It cannot be recorded.
        """

        def run() -> Any:
            result, pairs = self.compute(self.buffers)
            for kept, made in zip(room, pairs, strict=True):
                for buffer, tensor in zip(kept, made, strict=True):
                    buffer[..., : self._bucket, :].copy_(tensor)
            return result

        self.buffers.fill(call)
        self._recording = recorder.record(run)
        self._room = room

    # --- its use ---

    def check(self, call: PromptCall, reference: Any) -> None:
        """Compare the prompt with upstream's own, and learn which dimensions of its results are positions.

        Args:
            call: The prompt.
            reference: Upstream's result, with its cache.

        Raises:
            PromptError: They differ by more than rounding, or the result has no such dimensions.
        """
        found, pairs = self._replayed(call)
        length, bucket = call.prompt.length, call.bucket
        fields, spec = _pytree.tree_flatten(fields_of(found))
        expected, wanted = _pytree.tree_flatten(fields_of(reference))
        if spec != wanted or [*map(type, fields)] != [*map(type, expected)]:
            raise PromptError("it returns other fields in a bucket than upstream's")
        ours = [leaf for leaf in fields if isinstance(leaf, torch.Tensor)]
        theirs = [leaf for leaf in expected if isinstance(leaf, torch.Tensor)]
        for one, other in zip(ours, theirs, strict=True):
            cut = tuple(d for d in range(one.dim()) if one.dim() == other.dim() and one.shape[d] != other.shape[d])
            if one.dim() != other.dim() or any((one.shape[d], other.shape[d]) != (bucket, length) for d in cut):
                shapes = f"{tuple(one.shape)} in a bucket of {bucket}, {tuple(other.shape)} of {length} positions"
                raise PromptError(f"its results have shapes that cannot be cut: {shapes}")
            self._cuts.append(cut)
        layers = cache_of(reference).layers
        ours = [_cut(one, cut, length) for one, cut in zip(ours, self._cuts, strict=True)]
        ours += [tensor[..., :length, :] for pair in pairs for tensor in pair]
        theirs += [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        worst = max(map(_error, ours, theirs), default=0.0)
        limit = self._limit()
        if not worst <= limit:  # NaN fails
            raise PromptError(f"a prompt in a bucket differs from upstream's by {worst:.0e}, limit {limit:.0e}")

    def run(self, call: PromptCall) -> Any:
        """Replay the prompt for a call, in the recorder's turn. Its cache gets keys and values.

        Returns:
            The decoder's result in new tensors, with the caller's cache.
        """
        found, pairs = self._replayed(call)
        length, past = call.prompt.length, call.prompt.past
        for number, pair in enumerate(pairs):
            past.update(*(tensor[..., :length, :] for tensor in pair), number)
        cuts = iter(self._cuts)
        fields = _pytree.tree_map_only(torch.Tensor, lambda t: _cut(t, next(cuts), length).clone(), fields_of(found))
        return type(found)(**fields, **{cache_name(found.keys()) or CACHE_NAMES[0]: past})

    def bytes(self) -> int:
        """Return the bytes of its inputs and results."""
        given = [*self.buffers.inputs.values(), *self.buffers[1:]]
        made = [] if self._recording is None else _pytree.tree_leaves(fields_of(self._recording.outputs))
        return sum(t.numel() * t.element_size() for t in [*given, *made] if isinstance(t, torch.Tensor))

    def _replayed(self, call: PromptCall) -> tuple[Any, Pairs]:
        assert self._recording is not None  # noqa: S101 - recorded before it is used
        self.buffers.fill(call)
        self._recording.replay()
        return self._recording.outputs, self._room

    def _limit(self) -> float:
        halves = {torch.float16, torch.bfloat16}
        kept = {tensor.dtype for tensor in self._decoder.parameters()} | {self._open.dtype}
        return _HALF_TOLERANCE if kept & halves or keeps_copies(self._decoder) else EXACT_TOLERANCE


class PromptLayer:
    """One layer of an empty cache for a prompt, which keeps what it is given for whoever made it.

    Attributes:
        given: Keys and values; `None` before.
    """

    def __init__(self) -> None:
        self.given: tuple[Any, Any] | None = None
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        if self.given is not None:
            raise PromptError("a layer of its cache is not written once by each prompt")
        self.given = (key_states, value_states)
        return self.given

    def get_seq_length(self, *_args: Any) -> int:
        return 0

    def get_mask_sizes(self, query: Any, *_args: Any) -> tuple[int, int]:
        return (query if isinstance(query, int) else int(query.shape[0])), 0


def room_for(pairs: Pairs, positions: int) -> Pairs:
    """Allocate keys and values like these, with so many positions."""
    shapes = [[(*t.shape[:-2], positions, t.shape[-1]) for t in pair] for pair in pairs]
    return [
        (pair[0].new_zeros(keys), pair[1].new_zeros(values)) for pair, (keys, values) in zip(pairs, shapes, strict=True)
    ]


def fields_of(result: Any) -> dict[str, Any]:
    """Return the fields of a result without its cache."""
    return {name: value for name, value in result.items() if name not in CACHE_NAMES}


def _cut(tensor: torch.Tensor, dimensions: Sequence[int], length: int) -> torch.Tensor:
    for dimension in dimensions:
        tensor = tensor.narrow(dimension, 0, length)
    return tensor


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative error of a tensor, where a NaN equals a NaN."""
    if one.shape != other.shape:
        return torch.inf
    a, b = (t.double().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0) for t in (one, other))
    if bool((one.isfinite() != other.isfinite()).any()):
        return torch.inf
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
