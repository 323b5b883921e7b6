"""A decode step as a CUDA graph, independent of the loop that drives the decoder. For CUDA.

On a GPU, a decode step launches hundreds of kernels of a few microseconds each, and the launches dominate its time. A
recorded step is replayed by one launch. A recording needs fixed addresses and shapes; see static_step.py. It serves one
token for a growing cache (kv_cache/), with the attention weights if upstream returns them. Prefill, arguments that
were absent when the step was recorded, autocast, hooks and sequences beyond the largest bucket take upstream's own
forward on the same cache. A prompt writes its keys and values into a free slot at once, if there is one. The number and
the bytes of recordings are bounded; the least recently used one is evicted.

Where Triton is installed, a step may be recorded in fewer kernels (token_kernels.py). If they cannot be compiled or
started, upstream's own step is recorded, with one event.

Steps of several threads may be one step of more rows (shared_steps.py): one recording for each number of callers. Their
sequences then live in slots side by side (`JoinedSlots`), whoever else is there, so that no cache is copied for a step.

Half precision belongs inside the recording. By itself it slows an eager step down, since each cast is one more kernel
launch, and a recording does not see later changes of the layers.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from accelerate_tts.errors import described
from accelerate_tts.events import FellBack, NotApplied, emit
from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import has_hooks, parameters_of
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.kernels.weight_formats import MOST_ROWS, formats_under
from accelerate_tts.locks import rlock
from accelerate_tts.patching.change import Changes, CountedChange, Counter
from accelerate_tts.patching.class_swap import RECORDED, ClassSwap, keeps_copies, subclass_with
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, Obstacles, attention_of, cache_name, cache_of, is_spied
from accelerate_tts.stages.decode.growing_cache import decoders, growing_caches
from accelerate_tts.stages.decode.shared_steps import Rules, SharedSteps
from accelerate_tts.stages.decode.static_step import (
    CAPACITIES,
    JoinedSlots,
    StaticSlot,
    Work,
    bytes_of,
    tensors_of,
)
from accelerate_tts.stages.decode.token_kernels import TokenKernels
from accelerate_tts.stages.graphs.recorder import CudaRecorder, stream_of
from accelerate_tts.stages.graphs.stage import RecordingStage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from accelerate_tts.patching.class_swap import CarryingSwap
    from accelerate_tts.plan import Part, TimedCalls
    from accelerate_tts.stages.decode.token_kernels import TokenBlocks
    from accelerate_tts.stages.graphs.recorder import Recorder
    from accelerate_tts.stages.layers.half_precision import HalfStage
    from accelerate_tts.stages.protocol import Stage, Target

_NUMBERS = (2, 4, 8)
_POSITIONS = "position_ids"
_PROMPTS = ("inputs_embeds", "input_ids")
_OWN = {*CACHE_NAMES, "attention_mask", "use_cache", "cache_position", "return_dict"}


class Bounds(NamedTuple):
    """Bounds of the slots of one decoder.

    Attributes:
        slots: Maximum slots, that is, sequences that can alternate without a copy.
        bytes: Maximum bytes of all slots. A slot of T3 for 1,024 positions takes half a gigabyte.
        joined: Maximum bytes of slots side by side, where steps are shared; these do not count as slots above.
    """

    slots: int = 4
    bytes: int = 2 << 30
    joined: int = 4 << 30


@register_stage
class CapturedStepStage(RecordingStage[Bounds]):
    """Records a decode step as a CUDA graph and replays it.

    Args:
        recorder: See `RecordingStage`. Each slot has a recorder of its own.
        inside: See `RecordingStage`. Prefill computes in it, too.
        bounds: Bounds of each decoder's slots.
        kernels: Kernels for the blocks of a step; upstream's own operators if not given. Prefill stays upstream's.
    """

    bounds = Bounds()

    name = "captured decode step"
    after = ("fused decoder blocks", "fused sequence blocks")
    # A single replayed call brings a sequence of its own, which must be copied in first; in a loop it is there already.
    times: TimedCalls = "end_to_end"

    @classmethod
    def variants(cls, target: Target) -> Iterable[Stage]:
        """See `BaseStage.variants`: as `RecordingStage`'s, and by kernels for each format of the weights.

        The kernels are compiled, so there are none where nothing may be.
        """
        plain, *halves = super().variants(target)
        if target.compile_mode is None:
            return [plain, *halves]
        has_bf16 = torch.bfloat16 in target.half_dtypes
        kernels = [TokenKernels(f) for f in formats_under(target.precision) if f != "bf16" or has_bf16]
        return [plain, *(cast("Stage", cls(kernels=each)) for each in kernels), *halves]  # a subclass is a whole stage

    def __init__(
        self,
        recorder: Callable[[torch.device], Recorder] = CudaRecorder,
        inside: HalfStage | None = None,
        bounds: Bounds | None = None,
        kernels: TokenKernels | None = None,
    ) -> None:
        super().__init__(recorder, inside, bounds)
        self._kernels = kernels
        if kernels is not None:
            self.needs_compiler = True  # Triton's
            self.superseded_by = tuple(f"{self.name}, {smaller}" for smaller in kernels.smaller)
            self.name = f"{self.name}, {kernels.name}"

    def applies(self, part: Part) -> str | None:
        if kv_cache.cache_classes() is None:
            return "no cache of transformers 4.54 or later is loaded"
        if not decoders(part.module):
            return "no decoder with a cache in it"
        reason = super().applies(part)
        return self._kernels.applies(part) if reason is None and self._kernels is not None else reason

    def prepare(self, part: Part) -> _Captured:
        """See `Stage.prepare`. Nothing is recorded yet."""
        kernels = None if self._kernels is None else self._kernels.prepare(part)
        return _Captured(part, self.name, self._recorder, self.half_precision(part), self.bounds, kernels)


class _Captured(CountedChange, Changes):
    """The change: the forward of each decoder's class looks for a recording first.

    Once it is off, sequences in slots stay valid: upstream's forward continues them in place.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the part, and the options of the stage
        self,
        part: Part,
        name: str,
        recorder: Callable[[torch.device], Recorder],
        inside: CarryingSwap | None,
        bounds: Bounds,
        kernels: TokenBlocks | None,
    ) -> None:
        found = decoders(part.module)
        self._counter = Counter(part.name)
        copies = inside is not None or (kernels is not None and kernels.makes_copies)
        self._steps = {
            decoder: _Steps(decoder, self._counter, name, recorder, bounds, kernels, copies=copies) for decoder in found
        }
        swap = ClassSwap(found, lambda decoder: self._steps[decoder].class_for(type(decoder)))
        super().__init__(inside, kernels, growing_caches(part.module), swap)

    @property
    def slots(self) -> list[StaticSlot]:
        """Slots of all decoders, least recently used first for each."""
        return [slot for steps in self._steps.values() for slot in steps.slots]

    @property
    def steps(self) -> list[SharedSteps]:
        """Meeting points of the steps of each decoder."""
        return [steps.shared for steps in self._steps.values()]


class _SharedCall(NamedTuple):
    """A token of one caller."""

    plain: Any
    """The decoder's class without ours."""
    past: Any
    inputs: dict[str, torch.Tensor]
    constants: dict[str, Any]
    mask: torch.Tensor | None
    capacity: int
    key: Any
    """Kind of call that a slot's recording serves."""
    stream: Any
    may_join: Callable[[_SharedCall], bool]
    """Tells if it may be computed with others, as steps are arranged now."""

    @property
    def rows(self) -> int:
        """Batch size."""
        return int(self.past.layers[0].keys.shape[0])

    def shapes(self) -> str:
        """Return the shapes of the inputs, for events."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.inputs.values())

    def layout(self) -> tuple[object, ...] | None:
        """See `Joinable`. The decoder's class is another after a change of it."""
        return (self.plain, self.key) if self.may_join(self) else None

    def size(self) -> int:
        """See `Joinable`."""
        return bytes_of(self.past, self.capacity)

    def copied(self) -> _SharedCall:
        """See `Joinable`."""
        return self._replace(past=copy.deepcopy(self.past))

    def undo(self) -> None:
        """See `Joinable`. The token's place is written again."""
        for layer in self.past.layers:
            layer.advance(-1)

    def following(self, number: int) -> _SharedCall | None:
        """See `Joinable`."""
        if int(self.past.layers[0].keys.shape[-2]) + 1 >= self.capacity:
            return None
        return self if self.mask is None else self._replace(mask=nn.functional.pad(self.mask, (0, number), value=1))

    def tensors(self, result: Any) -> list[torch.Tensor]:
        """See `Joinable`. The cache is not among them."""
        if result is None:
            raise ValueError("its step cannot be recorded")
        return tensors_of(result)


def _taken(made: dict[int, Any], first: int, _rows: int) -> Any:
    return made[first]


class _Steps:
    """The recordings of one decoder."""

    def __init__(  # noqa: PLR0913, PLR0917 - the decoder, names in events, and the options of the stage
        self,
        decoder: nn.Module,
        counter: Counter,
        stage: str,
        recorder: Callable[[torch.device], Recorder],
        bounds: Bounds,
        kernels: TokenBlocks | None,
        *,
        copies: bool,
    ) -> None:
        self._decoder: Any = decoder
        self._counter, self._stage = counter, stage
        self._obstacles = Obstacles(f"the captured step of {counter.what}")
        self._recorder = recorder
        self._bounds = bounds
        self._kernels = kernels
        self._names = parameters_of(plain_class(decoder))
        self._counts_masks = any(_counts(plain_class(inner)) for inner in decoder.modules())
        self._inner = [inner for inner in decoder.modules() if inner is not decoder]  # its own hooks run as usual
        self._copies = copies or keeps_copies(decoder)
        self._weights = WeightWatch(decoder, content=self._copies)
        self._slots: dict[Any, list[StaticSlot]] = {}  # least recently used first, in each list and among the keys
        self._lock = rlock()  # reentrant: a hook of an event that is emitted here may call the model
        self._broken = False
        self._numbers: tuple[int, ...] = (1,)  # numbers of callers for which there are steps
        self._rows = 1  # of their calls
        self._joined: dict[Any, JoinedSlots] = {}  # by the same keys as slots
        self._last: StaticSlot | None = None  # used by the last step
        self._is_in_pass = False
        self.shared = SharedSteps(self._obstacles.what, Rules(
            alone=self._alone, together=self._together, taken=_taken, finish=self._finish, arrange=self._arrange,
            bits_vary=True,
        ))  # fmt: skip

    def class_for(self, plain: Any) -> type:
        """Return the decoder's class while the change is on."""

        def forward(decoder: Any, *args: Any, **kwargs: Any) -> Any:
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            result = self._token(plain, named) if self._is_token(named) else self._prompt(plain, named)
            return plain.forward(decoder, *args, **kwargs) if result is None else result

        cls = subclass_with(plain, forward)
        setattr(cls, RECORDED, True)
        return cls

    def _is_token(self, named: dict[str, Any]) -> bool:
        decoder: Any = self._decoder
        past: Any = cache_of(named)
        if self._broken or not kv_cache.is_growable(past):
            return False
        keys = past.layers[0].keys
        if keys.is_meta:
            return False  # of tensors without memory, which have no autocast either
        # Token ids, embeddings, or what a custom model takes in their place: one position for each sequence.
        given = [t for name, t in _tensors(named).items() if name != _POSITIONS and _is_position(t, keys.shape[0])]
        return bool(
            given
            and all(tensor.device == keys.device for tensor in given)
            and named.get("use_cache") is not False
            and named.get("return_dict") is not False
            and not (torch.is_grad_enabled() or decoder.training or is_traced())
            and not torch.is_autocast_enabled(keys.device.type)
            and not self._is_odd(named, keys.shape[0])
        )

    def _is_odd(self, named: dict[str, Any], rows: int) -> bool:
        mask = named.get("attention_mask")
        how = attention_of(self._decoder.config)
        odd = [
            name
            for name, value in named.items()
            if name not in _OWN
            and not isinstance(value, (bool, int, float, str, type(None)))
            and not (name in _tensors(named) and (name == _POSITIONS or _is_position(value, rows)))
        ]
        if odd:
            obstacle = f"it is called with {', '.join(sorted(odd))}"
        elif how not in {"eager", "sdpa", None}:
            obstacle = f"attention is made by {how!r}"
        elif mask is not None and mask.dim() != 2:  # noqa: PLR2004
            obstacle = f"its mask has {mask.dim()} dimensions"
        elif mask is not None and self._counts_masks and named.get(_POSITIONS) is None:
            obstacle = "it counts its positions in the mask"
        elif (window := _window(self._decoder.config)) is not None and cache_of(named).get_seq_length() >= window:
            obstacle = f"it attends to the last {window} positions only"
        elif has_hooks(*self._inner) or any(map(is_spied, self._inner)):
            obstacle = "there are hooks inside it, which a replay does not call"
        else:
            return False
        self._obstacles.report(obstacle, 0)
        return True

    def _prompt(self, plain: Any, named: dict[str, Any]) -> Any:
        """Run a prompt that writes into a free slot; return `None` if this is no prompt, or no slot is free for it."""
        decoder = self._decoder
        given = next((t for name, t in _tensors(named).items() if name in _PROMPTS and t.dim() > 1), None)
        if given is None or self._broken or self._numbers[-1] > 1 or not _begins(decoder, named):
            return None  # where steps are shared, a prompt's bits must not depend on whether a slot is free
        with self._lock:
            weights, lent = self._weights, self._lend(given)
            if lent is None:
                return None
            key, slot = lent
        past = cache_of(named)
        past = kv_cache.cache_classes().DynamicCache() if past is None else past
        filled = {**named, cache_name(named) or cache_name(self._names) or CACHE_NAMES[0]: past}
        try:
            return slot.take_prompt(past, lambda: plain.forward(decoder, **filled))
        finally:
            with self._lock:
                self._take_back(key, slot, stale=self._weights is not weights)

    def _lend(self, given: torch.Tensor) -> tuple[Any, StaticSlot] | None:
        """Take a free slot for a prompt out of those that others may use."""
        rows, length = given.shape[:2]
        capacity = self._capacity(length)
        dtype = next((weight.dtype for weight in self._decoder.parameters() if weight.is_floating_point()), None)
        for key, slots in reversed(self._slots.items()):
            for slot in slots if key[:2] == (capacity, rows) else []:
                first = slot.buffers[0][0]
                if slot.is_free() and (first.dtype, first.device) == (dtype, given.device):
                    slots.remove(slot)
                    return key, slot
        return None

    def _take_back(self, key: Any, slot: StaticSlot, *, stale: bool) -> None:
        if stale:  # the weights were exchanged meanwhile
            slot.leave()
            return
        self._make_room(slot.bytes)
        self._slots.setdefault(key, []).append(slot)

    def _token(self, plain: Any, named: dict[str, Any]) -> Any:
        call = self._call(plain, named)
        return None if call is None else self.shared.run((), call)

    def _call(self, plain: Any, named: dict[str, Any]) -> _SharedCall | None:
        """Describe a token; return `None` if upstream's forward must run. Takes no lock: a step may be under way."""
        past = cache_of(named)
        inputs = _tensors(named)
        # The recording makes its own positions where they are None, as a head over the decoder passes them on.
        own = {*_OWN, *inputs, _POSITIONS}
        constants = {name: value for name, value in named.items() if name not in own}
        mask = named.get("attention_mask")
        rows, _, length, _ = past.layers[0].keys.shape
        if mask is not None and tuple(mask.shape) != (rows, length + 1):
            return None  # upstream raises its own error
        if any(layer.keys.shape[-2] != length for layer in past.layers):
            self._obstacles.report("layers of its cache have different lengths, as in cross attention", 0)
            return None
        capacity = self._capacity(length)
        if capacity is None or bytes_of(past, capacity) > self._bounds.bytes:
            reason = f"the sequence has more than {CAPACITIES[-1]} positions, or takes too much memory"
            self._obstacles.report(reason, 0)
            return None
        kinds = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
        config = self._decoder.config
        asked = tuple(getattr(config, f"output_{what}", False) for what in ("attentions", "hidden_states"))
        how = (*asked, attention_of(config))
        key = (capacity, rows, len(past.layers), kinds, tuple(sorted(constants.items())), how)
        stream = stream_of(past.layers[0].keys.device)
        return _SharedCall(plain, past, inputs, constants, mask, capacity, key, stream, self._may_join)

    def _may_join(self, call: _SharedCall) -> bool:
        rows = call.rows
        return (
            self._numbers_for(rows)[-1] > 1
            and self._lanes(rows) * bytes_of(call.past, call.capacity) <= self._bounds.joined
            and all(tensor.shape[0] == rows for tensor in call.inputs.values())
        )

    def _capacity(self, length: int) -> int | None:
        """Return the capacity of the slot for the next token. Where steps are shared, its last place stays free."""
        free = length + (self._numbers[-1] > 1)
        return next((size for size in CAPACITIES if size > free), None)

    def _numbers_for(self, rows: int) -> tuple[int, ...]:
        """Return the numbers of callers, of so many rows each, for which there are steps."""
        if rows == self._rows or self._numbers[-1] == 1:
            return self._numbers
        most = min(MOST_ROWS, self._numbers[-1] * self._rows) // rows
        return (1, *(number for number in _NUMBERS if number <= most))

    def _lanes(self, rows: int) -> int:
        """Return the number of slots side by side, of so many rows each."""
        most = self._numbers_for(rows)[-1]
        return -(-self._bounds.slots // most) * most

    # --- computing steps, as the rules of shared steps have it ---

    def _alone(self, _blocks: Sequence[Any], call: _SharedCall) -> Any:
        """Run one token. Returns `None` if upstream's forward must run."""
        with self._lock:
            if self._is_in_pass:
                return None  # from inside a step of several: a signal handler's, or a hook's of an event
            self._refresh()
            kv_cache.adopt(call.past)
            slot = self._slot_for(call, [])
            if slot is None:
                return None
            self._obstacles.served(0)
            self._last = slot
            try:
                slot.prepare(call.past, call.inputs, call.mask, call.stream)
            except Exception as error:  # as in `_recorded`
                if not self._falls_back(error):
                    return None
                self._clear()  # a row must not depend on which slot it is in
                return self._alone(_blocks, call)
            return slot.run(call.past, call.inputs, call.mask, call.stream)

    def _together(self, _blocks: Sequence[Any], calls: Sequence[_SharedCall]) -> dict[int, Any]:
        """Run a token of each of several callers.

        Returns:
            Results by the first row of each call, `None` where upstream's forward must run.

        Raises:
            Exception: A step has failed. No sequence has grown.
        """
        with self._lock:
            if self._is_in_pass:
                raise RuntimeError("a step of several was begun inside another")
            self._is_in_pass = True
            done: list[_SharedCall] = []
            try:
                self._refresh()
                results = self._run_each(calls, done)
            except BaseException:
                for call in done:
                    call.undo()
                raise
            finally:
                self._is_in_pass = False
        found, row = {}, 0
        for call, result in zip(calls, results, strict=True):
            found[row] = result
            row += call.rows
        return found

    def _run_each(self, calls: Sequence[_SharedCall], done: list[_SharedCall]) -> list[Any]:
        slots: list[StaticSlot | None] = [None] * len(calls)
        for call in calls:
            kv_cache.adopt(call.past)
        # Those that have a slot first, so that no other call takes it.
        has_one = [any(_is_in(slot, call.past) for slot in self._slots.get(call.key, ())) for call in calls]
        for number in sorted(range(len(calls)), key=lambda number: not has_one[number]):
            slots[number] = self._slot_for(calls[number], [slot for slot in slots if slot is not None])
        self._obstacles.served(0)
        results: list[Any] = [None] * len(calls)
        works = {
            number: Work(slot, call.past, call.inputs, call.mask, call.stream)
            for number, (call, slot) in enumerate(zip(calls, slots, strict=True))
            if slot is not None and slot.lane is not None
        }
        if works:
            made = self._joined[calls[0].key].run(list(works.values()))
            for number, result in zip(works, made, strict=True):
                done.append(calls[number])
                results[number] = result
        for number, (call, slot) in enumerate(zip(calls, slots, strict=True)):
            if slot is not None:
                self._last = slot
                if slot.lane is None:
                    results[number] = slot.run(call.past, call.inputs, call.mask, call.stream)
                    done.append(call)
        return results

    def _finish(self) -> None:
        """Wait for the last step, without the lock: others may come meanwhile."""
        slot = self._last
        if slot is not None:
            slot.finish()

    def _arrange(self, numbers: tuple[int, ...], rows: int) -> None:
        """Make steps for so many callers each, of so many rows. Sequences leave the slots that there are."""
        with self._lock:
            self._clear()
            self._numbers, self._rows = numbers, rows
            self._weights = WeightWatch(self._decoder, content=self._copies)  # a slot that a prompt is in is not kept

    # --- slots ---

    def _refresh(self) -> None:
        if self._weights.outdated():  # a recording holds addresses, and copies of weights
            self._weights = WeightWatch(self._decoder, content=self._copies)
            self._clear()

    def _slot_for(self, call: _SharedCall, taken: Sequence[StaticSlot]) -> StaticSlot | None:
        """Return the slot of a call, none of those that are taken; `None` if none could be recorded."""
        slots = self._slots.pop(call.key, [])
        self._slots[call.key] = slots
        # First the slot that holds the sequence, then a free slot, then the oldest slot if no other may be made.
        slot = next((slot for slot in slots if _is_in(slot, call.past)), None)
        slot = slot or next((slot for slot in _by_lane(slots) if slot not in taken and slot.is_free()), None)
        if slot is None and not slots and self._may_join(call) and self._join(call):
            slot = slots[0]
        size = bytes_of(call.past, call.capacity)
        if slot is None and (call.key in self._joined or self._is_full(size)):
            slot = next((slot for slot in slots if slot not in taken), None)
        if slot is None:
            self._make_room(size)
            slot = self._recorded(call)
        else:
            slots.remove(slot)
        if slot is not None:
            self._slots.setdefault(call.key, slots).append(slot)
        return slot

    def _recorded(self, call: _SharedCall) -> StaticSlot | None:
        try:
            slot = StaticSlot(
                self._decoder, call.plain.forward, call.past, call.inputs, call.constants, call.capacity,
                self._recorder(call.past.layers[0].keys.device), any_rows=self._numbers[-1] > 1,
            )  # fmt: skip
        except Exception as error:  # a capture may fail in any way, and so may a decoder that is given another mask
            return self._recorded(call) if self._falls_back(error) else None
        self._count(call.capacity, call.shapes())
        return slot

    def _falls_back(self, error: Exception) -> bool:
        """Give up the kernels after a failure, or else recordings. Returns True if recording can be tried again."""
        reason = described(error).splitlines()[0]
        if self._kernels is not None and self._kernels.give_up(self._decoder):  # a compiler may be missing
            emit(FellBack(self._counter.what, self._stage, f"{reason}; upstream's own step is recorded"))
            return True
        self._broken = True
        emit(FellBack(self._counter.what, self._stage, reason))
        return False

    def _count(self, capacity: int, shapes: str) -> None:
        self._counter.guard = f"a sequence of up to {capacity} positions"
        self._counter.count(shapes)

    def _differs(self, capacity: int, callers: int) -> None:
        reason = f"for {callers} callers of up to {capacity} positions it differs in bits from each one's own step"
        emit(NotApplied(f"shared steps of {self._obstacles.what}", reason))

    def _join(self, call: _SharedCall) -> bool:
        """Make slots side by side for a kind of calls, if there is room. Returns False if there is none."""
        lanes, size = self._lanes(call.rows), self._lanes(call.rows) * bytes_of(call.past, call.capacity)
        for key, joined in list(self._joined.items()):
            slots = self._slots.get(key, [])
            is_idle = len(slots) == len(joined.slots) and all(slot.is_free() for slot in slots)
            if is_idle and not self._has_room(size):
                joined.leave()
                del self._joined[key]
                self._slots.pop(key)
        if not self._has_room(size):
            return False
        try:
            joined = JoinedSlots(
                self._decoder, call.plain.forward, call.past, call.inputs, call.constants, call.capacity,
                self._recorder(call.past.layers[0].keys.device), lanes, self._numbers_for(call.rows),
                partial(self._count, call.capacity, call.shapes()),
                partial(self._differs, call.capacity) if self.shared.is_on else None,  # the trial compares by itself
            )  # fmt: skip
        except RuntimeError as error:  # the device's memory is used up
            self.shared.is_on, self._numbers = False, (1,)
            emit(NotApplied(f"shared steps of {self._obstacles.what}", f"no slots for them: {described(error)}"))
            return False
        self._joined[call.key] = joined
        self._slots[call.key].extend(joined.slots)
        return True

    def _has_room(self, more: int) -> bool:
        used = sum(joined.bytes for joined in self._joined.values())
        return len(self._joined) < max(2, self._bounds.slots) and used + more <= self._bounds.joined

    @property
    def slots(self) -> list[StaticSlot]:
        """All slots."""
        return [slot for slots in self._slots.values() for slot in slots]

    def _clear(self) -> None:
        for slot in self.slots:
            slot.leave()
        for joined in self._joined.values():
            joined.finish()
        self._slots, self._joined, self._last = {}, {}, None
        if self._kernels is not None:
            self._kernels.forget(self._decoder)

    def _is_full(self, more: int) -> bool:
        slots = [slot for slot in self.slots if slot.lane is None]
        used = sum(slot.bytes for slot in slots)
        return len(slots) >= self._bounds.slots or used + more > self._bounds.bytes

    def _make_room(self, more: int) -> None:
        for key, slots in list(self._slots.items()):
            while slots and key not in self._joined and self._is_full(more):
                slots.pop(0).leave()
        self._slots = {key: slots for key, slots in self._slots.items() if slots or key in self._joined}


def _is_in(slot: StaticSlot, past: Any) -> bool:
    return slot.holds(past) or slot.is_of(past)


def _by_lane(slots: list[StaticSlot]) -> list[StaticSlot]:
    """Return slots in the order of their lanes, so that those in use are neighbours; others in their own order."""
    return sorted(slots, key=lambda slot: slot.lane or 0)


def _begins(decoder: Any, named: dict[str, Any]) -> bool:
    """Check that a call begins a sequence in a cache that can grow."""
    past = cache_of(named)
    keeps = named.get("use_cache")
    keeps = getattr(decoder.config, "use_cache", False) if keeps is None else keeps
    if not keeps or not (past is None or kv_cache.is_empty(past)):
        return False
    if torch.is_grad_enabled() or decoder.training or is_traced() or _window(decoder.config) is not None:
        return False
    return not any(
        tensor.is_meta or torch.is_autocast_enabled(tensor.device.type) for tensor in _tensors(named).values()
    )


def _window(config: Any) -> int | None:
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


def _tensors(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensor arguments of a decoder, without its cache, mask and cache positions."""
    return {name: named[name] for name in sorted(named) if name not in _OWN and isinstance(named[name], torch.Tensor)}


def _is_position(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.dim() > 1 and tuple(tensor.shape[:2]) == (rows, 1)
