"""Calls of a decoder that a recorded step serves: one token of a sequence in a growing cache."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from accelerate_tts.device.graphs import is_capturing
from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, Obstacles, attention_of, cache_name, cache_of
from accelerate_tts.stages.decode.static_slot import bytes_of
from accelerate_tts.stages.decode.static_step import tensors_of
from accelerate_tts.stages.graphs.recorder import stream_of

if TYPE_CHECKING:
    from collections.abc import Callable

POSITIONS = "position_ids"
_PROMPTS = ("inputs_embeds", "input_ids")
OWN = {*CACHE_NAMES, "attention_mask", "use_cache", "cache_position", "return_dict"}


class TokenCall(NamedTuple):
    """A token of one caller. It can be computed with others; see `Joinable`."""

    plain: Any
    """The decoder's class without ours."""
    past: Any
    """The cache."""
    inputs: dict[str, torch.Tensor]
    """Tensor arguments besides the cache and the mask; the first dimension is the batch."""
    constants: dict[str, Any]
    """The other arguments."""
    mask: torch.Tensor | None
    """Attended positions, (batch, positions including the token)."""
    capacity: int
    """Positions of the slot that it needs."""
    key: Any
    """Kind of call that a slot's recording serves; begins with the capacity and the number of rows."""
    stream: Any
    """The stream of the caller's thread; see `stream_of`."""
    may_join: Callable[[TokenCall], bool]
    """Tells if it may be computed with others, as steps are arranged now."""

    @property
    def rows(self) -> int:
        """Batch size."""
        return int(self.past.layers[0].keys.shape[0])

    @property
    def device(self) -> torch.device:
        """The cache's device."""
        device: torch.device = self.past.layers[0].keys.device
        return device

    def shapes(self) -> str:
        """Return the shapes of the inputs, for events."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.inputs.values())

    def layout(self) -> tuple[object, ...] | None:
        """See `Joinable`. The decoder's class is another after a change of it."""
        return (self.plain, self.key) if self.may_join(self) else None

    def size(self) -> int:
        """See `Joinable`."""
        return bytes_of(self.past, self.capacity)

    def copied(self) -> TokenCall:
        """See `Joinable`."""
        return self._replace(past=copy.deepcopy(self.past))

    def undo(self) -> None:
        """See `Joinable`. The token's place is written again."""
        for layer in self.past.layers:
            layer.advance(-1)

    @property
    def length(self) -> int:
        """Positions of its sequence."""
        return int(self.past.layers[0].keys.shape[-2])

    def shorten(self, length: int) -> None:
        """Have its cache at a length again, whichever of its layers have grown since."""
        for layer in self.past.layers:
            if kv_cache.is_growing(layer):
                layer.shorten(length)

    def following(self, number: int) -> TokenCall | None:
        """See `Joinable`."""
        if self.length + 1 >= self.capacity:
            return None
        return self if self.mask is None else self._replace(mask=nn.functional.pad(self.mask, (0, number), value=1))

    def tensors(self, result: Any) -> list[torch.Tensor]:
        """See `Joinable`. The cache is not among them."""
        if result is None:
            raise ValueError("its step cannot be recorded")
        return tensors_of(result)


class Prompt(NamedTuple):
    """A call that begins a sequence."""

    rows: int
    length: int
    dtype: torch.dtype | None
    """Dtype of the keys and values that it will make."""
    device: torch.device
    past: Any
    """The empty cache."""
    arguments: dict[str, Any]
    """All arguments, with the cache."""


class CallReader:
    """Reads a decoder's calls, and reports why one is not served.

    Args:
        decoder: The module.
        obstacles: Reports them.
    """

    def __init__(self, decoder: Any, obstacles: Obstacles) -> None:
        self._decoder, self._obstacles = decoder, obstacles
        self.names = parameters_of(plain_class(decoder))
        """Names of its forward's parameters."""
        self._counts_masks = any(_counts(plain_class(inner)) for inner in decoder.modules())

    def is_token(self, named: dict[str, Any]) -> bool:
        """Check for a call for one token that a recording can serve."""
        past: Any = cache_of(named)
        if not kv_cache.is_growable(past):
            return False
        keys = past.layers[0].keys
        if keys.is_meta:
            return False  # of tensors without memory, which have no autocast either
        # Token ids, embeddings, or what a custom model takes in their place: one position for each sequence.
        given = [t for name, t in tensors_in(named).items() if name != POSITIONS and _has(t, keys.shape[0], 1)]
        return bool(
            given
            and all(tensor.device == keys.device for tensor in given)
            and named.get("use_cache") is not False
            and named.get("return_dict") is not False
            and not (torch.is_grad_enabled() or self._decoder.training or is_traced())
            and not is_capturing(keys.device)
            and not torch.is_autocast_enabled(keys.device.type)
            and not self.is_odd(named, keys.shape[0])
        )

    def is_odd(self, named: dict[str, Any], rows: int, positions: int = 1) -> bool:
        """Check for arguments or a mask that no recording can serve, and report them.

        Args:
            named: The arguments.
            rows: Rows that each tensor argument has.
            positions: Positions that each has. More than one are a prompt's.
        """
        mask = named.get("attention_mask")
        how = attention_of(self._decoder.config)
        odd = [
            name
            for name, value in named.items()
            if name not in OWN
            and not isinstance(value, (bool, int, float, str, type(None)))
            and not (name in tensors_in(named) and (name == POSITIONS or _has(value, rows, positions)))
        ]
        if odd:
            obstacle = f"it is called with {', '.join(sorted(odd))}"
        elif how not in {"eager", "sdpa", None}:
            obstacle = f"attention is made by {how!r}"
        elif mask is not None and mask.dim() != 2:  # noqa: PLR2004
            obstacle = f"its mask has {mask.dim()} dimensions"
        elif mask is not None and self._counts_masks and named.get(POSITIONS) is None:
            obstacle = "it counts its positions in the mask"
        elif (window := window_of(self._decoder.config)) is not None and _reaches(cache_of(named), positions, window):
            obstacle = f"it attends to the last {window} positions only"
        else:
            return False
        self._obstacles.report(obstacle, 0)
        return True

    def token(
        self,
        plain: Any,
        named: dict[str, Any],
        capacity_for: Callable[[int], int | None],
        most_bytes: int,
        may_join: Callable[[TokenCall], bool],
    ) -> TokenCall | None:
        """Describe a call for a token; return `None` if upstream's forward must run.

        Args:
            plain: The decoder's class without ours.
            named: The arguments, for which `is_token` is true.
            capacity_for: Returns the capacity of a slot for a sequence of a length; `None` if there is none.
            most_bytes: Maximum bytes of a slot.
            may_join: See `TokenCall`.
        """
        past = cache_of(named)
        inputs = tensors_in(named)
        # The recording makes its own positions where they are None, as a head over the decoder passes them on.
        own = {*OWN, *inputs, POSITIONS}
        constants = {name: value for name, value in named.items() if name not in own}
        mask = named.get("attention_mask")
        rows, _, length, _ = past.layers[0].keys.shape
        if mask is not None and tuple(mask.shape) != (rows, length + 1):
            return None  # upstream raises its own error
        if any(layer.keys.shape[-2] != length for layer in past.layers):
            self._obstacles.report("layers of its cache have different lengths, as in cross attention", 0)
            return None
        capacity = capacity_for(length)
        if capacity is None or bytes_of(past, capacity) > most_bytes:
            self._obstacles.report("the sequence has more positions than any slot, or takes too much memory", 0)
            return None
        kinds = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
        config = self._decoder.config
        asked = tuple(getattr(config, f"output_{what}", False) for what in ("attentions", "hidden_states"))
        how = (*asked, attention_of(config))
        key = (capacity, rows, len(past.layers), kinds, tuple(sorted(constants.items())), how)
        stream = stream_of(past.layers[0].keys.device)
        return TokenCall(plain, past, inputs, constants, mask, capacity, key, stream, may_join)

    def prompt(self, named: dict[str, Any]) -> Prompt | None:
        """Describe a call that begins a sequence in a cache that can grow; return `None` for any other call."""
        given = next((t for name, t in tensors_in(named).items() if name in _PROMPTS and t.dim() > 1), None)
        if given is None or not begins(self._decoder, named):
            return None
        rows, length = given.shape[:2]
        dtype = next((weight.dtype for weight in self._decoder.parameters() if weight.is_floating_point()), None)
        past = cache_of(named)
        past = kv_cache.cache_classes().DynamicCache() if past is None else past
        filled = {**named, cache_name(named) or cache_name(self.names) or CACHE_NAMES[0]: past}
        return Prompt(rows, length, dtype, given.device, past, filled)


def begins(decoder: Any, named: dict[str, Any]) -> bool:
    """Check that a call begins a sequence in a cache that can grow."""
    past = cache_of(named)
    keeps = named.get("use_cache")
    keeps = getattr(decoder.config, "use_cache", False) if keeps is None else keeps
    if not keeps or not (past is None or kv_cache.is_empty(past)):
        return False
    if torch.is_grad_enabled() or decoder.training or is_traced() or window_of(decoder.config) is not None:
        return False
    return not any(
        tensor.is_meta or torch.is_autocast_enabled(tensor.device.type) or is_capturing(tensor.device)
        for tensor in tensors_in(named).values()
    )


def window_of(config: Any) -> int | None:
    """Return the number of positions that a decoder's attention reaches back, or `None`.

    Since transformers 4.56 such layers have caches of their own kind, which do not grow, unless a caller makes another.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and all(kind == "full_attention" for kind in kinds):
        return None
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in found if isinstance(size, int)), default=None)


def _counts(cls: Any) -> bool:
    """Check for a forward that counts positions in a mask (OPT, BioGPT). A recorded step has another mask."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "cumsum" in code.co_names


def tensors_in(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensor arguments of a decoder, without its cache, mask and cache positions."""
    return {name: named[name] for name in sorted(named) if name not in OWN and isinstance(named[name], torch.Tensor)}


def _has(tensor: torch.Tensor, rows: int, positions: int) -> bool:
    return tensor.dim() > 1 and tuple(tensor.shape[:2]) == (rows, positions)


def _reaches(past: Any, positions: int, window: int) -> bool:
    """Check that a sequence with so many more positions is longer than the reach of an attention."""
    return int(0 if past is None else past.get_seq_length()) + positions > window
