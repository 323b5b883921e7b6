"""Recorded prompts of one decoder: which recording serves a prompt, and how many there are.

The first prompt of a kind is computed twice: by upstream's forward, and by its new recording, which is compared with it
and gives the result. So a prompt has the bits of its bucket's recording whenever it comes, or always upstream's. Where
a kind of prompt differs by more than rounding, as in a decoder that sees what is behind a position, it stays upstream's
for as long as the weights are the same.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree

from accelerate_tts.errors import TimeLimitError, described
from accelerate_tts.events import FellBack, emit
from accelerate_tts.locks import rlock
from accelerate_tts.patching.class_swap import keeps_copies, make_copies
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import CACHE_NAMES, Obstacles, cache_name, cache_of
from accelerate_tts.stages.decode.prompt_call import PromptReader
from accelerate_tts.stages.decode.static_prompt import (
    Pairs,
    PromptBuffers,
    PromptError,
    StaticPrompt,
    fields_of,
    room_for,
)  # fmt: skip
from accelerate_tts.stages.decode.step_watch import StepWatch
from accelerate_tts.stages.graphs.obstacles import ObstacleError, look, unchanged_attributes
from accelerate_tts.stages.graphs.recorder import recording

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from accelerate_tts.patching.change import Counter
    from accelerate_tts.stages.decode.prompt_call import PromptCall
    from accelerate_tts.stages.graphs.obstacles import Look
    from accelerate_tts.stages.graphs.recorder import Recorder

_ROOMS = (256, 512, 1024, 2048)


class PromptBounds(NamedTuple):
    """Bounds of the recorded prompts of one decoder.

    Attributes:
        recordings: Maximum recordings. The least recently used one goes, and is made again when it is needed.
        bytes: Maximum bytes of inputs, results, keys and values, and intermediate tensors.
    """

    recordings: int = 32
    bytes: int = 1 << 30


class _Recorded(NamedTuple):
    prompt: StaticPrompt
    room: Hashable
    """Key of its keys and values, which recordings share."""
    most: int
    """Bytes of its intermediate tensors, which they share, too."""
    dtype: torch.dtype
    """Dtype of keys and values."""
    recorder: Recorder


class PromptRecordings:
    """The recorded prompts of one decoder.

    Args:
        decoder: The module.
        counter: Counts recordings.
        stage: The stage's name in events.
        recorder: Makes the recorder, which all of them share.
        bounds: Their bounds.
    """

    def __init__(
        self,
        decoder: Any,
        counter: Counter,
        stage: str,
        recorder: Callable[[torch.device], Recorder],
        bounds: PromptBounds,
    ) -> None:
        self._decoder, self._counter, self._stage, self._bounds = decoder, counter, stage, bounds
        self._make_recorder = recorder
        self._recorder: Recorder | None = None
        self._obstacles = Obstacles(f"the recorded prompts of {counter.what}")
        self._calls = PromptReader(decoder, self._obstacles)
        self._copies = keeps_copies(decoder)
        self._watch = StepWatch(decoder, copies=self._copies)
        self._lock = rlock()  # reentrant: a signal handler may call the model
        self._is_busy = False
        self._is_broken = False
        self._kept: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._rooms: dict[Hashable, Pairs] = {}
        self._never: set[Hashable] = set()

    @property
    def kept(self) -> int:
        """Number of recordings that are kept."""
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes of the recordings."""
        return self._bytes_with()

    def run(self, plain: Any, named: dict[str, Any], in_a_slot: Callable[..., Any]) -> Any:
        """Run a prompt by its recording; return `None` if upstream's forward must run.

        Args:
            plain: The decoder's class without ours.
            named: The arguments.
            in_a_slot: Runs a prompt in a slot of the recorded step; see `cuda_graph.IN_A_SLOT`.
        """
        call = None if self._is_broken else self._calls.recordable(named)
        if call is None:
            return None
        found = self._found(plain, call)
        if found is None:
            return None
        self._obstacles.served(0)
        prompt = call.prompt._replace(dtype=found.dtype)

        def run() -> Any:
            with self._lock, torch.inference_mode(mode=False), torch.no_grad(), found.recorder.in_turn():
                return found.prompt.run(call)

        result = in_a_slot(prompt, run)
        return run() if result is None else result

    # --- finding a recording ---

    def _found(self, plain: Any, call: PromptCall) -> _Recorded | None:
        told: list[Callable[[], object]] = []  # events, whose hooks may call the model: after the lock
        try:
            with self._lock, torch.inference_mode(mode=False), torch.no_grad():
                if self._is_busy or self._is_broken:
                    return None
                self._check_weights()
                obstacle = self._watch.obstacle()
                if obstacle is not None:
                    told.append(lambda: self._obstacles.report(obstacle, 0))
                    return None
                found = self._kept.get(call.key)
                if found is None and call.key not in self._never:
                    self._is_busy = True
                    try:
                        found = self._recorded(plain, call, told)
                    finally:
                        self._is_busy = False
                if found is not None:
                    self._kept.move_to_end(call.key)
                return found
        finally:
            for tell in told:
                tell()

    def _check_weights(self) -> None:
        """Drop recordings that read other weights than the decoder has. Writes in place reach them by themselves."""
        copies = keeps_copies(self._decoder)
        if copies == self._copies and not (self._watch.outdated() if copies else self._watch.moved()):
            return
        self._copies = copies
        self._watch = StepWatch(self._decoder, copies=copies)
        self._never.clear()
        self._drop_all()

    def _recorded(self, plain: Any, call: PromptCall, told: list[Callable[[], object]]) -> _Recorded | None:
        reference = self._upstreams(plain, call)  # what it raises is upstream's own error
        try:
            found = self._try_to_record(plain, call, reference)
        except PromptError as error:
            reason = str(error)
            told.append(lambda: self._obstacles.report(reason, 0))
        except TimeLimitError:
            raise
        except Exception as error:  # a capture may fail in any way, and so may a decoder with another mask
            why = str(error) if isinstance(error, ObstacleError) else described(error).splitlines()[0]
            self._is_broken = True
            self._drop_all()
            told.append(lambda: emit(FellBack(self._counter.what, self._stage, why)))
        else:
            told.append(lambda: self._count(call))
            return found
        self._never.add(call.key)
        self._tidy()
        return None

    def _count(self, call: PromptCall) -> None:
        self._counter.guard = f"a prompt of less than {call.bucket} positions"
        self._counter.count(", ".join(str(tuple(tensor.shape)) for tensor in call.inputs.values()))

    def _upstreams(self, plain: Any, call: PromptCall) -> Any:
        """Run a prompt by upstream's forward, in a copy of its empty cache."""
        given = call.prompt.arguments
        name = cache_name(given) or CACHE_NAMES[0]
        with recording():  # no slot is taken, so that this object's lock is never held while the steps' is taken
            return plain.forward(self._decoder, **{**given, name: copy.deepcopy(call.prompt.past)})

    # --- recording ---

    def _try_to_record(self, plain: Any, call: PromptCall, reference: Any) -> _Recorded:
        pairs = _pairs(reference, call.prompt.length)
        dtype = pairs[0][0].dtype
        made = StaticPrompt(self._decoder, plain.forward, call, dtype, len(pairs))
        key, positions = self._room_of(call, pairs)
        most = self._look(made).bytes
        self._make_room(made.bytes() + most, most, key, _bytes(pairs) // call.prompt.length * positions)
        if key not in self._rooms:
            self._rooms[key] = room_for(pairs, positions)
        recorder, room = self._ready(call), self._rooms[key]
        with recording(), recorder.in_turn(), unchanged_attributes(self._decoder):
            made.record(recorder, call, room)
            made.check(call, reference)
        found = self._kept[call.key] = _Recorded(made, key, most, dtype, recorder)
        return found

    def _look(self, made: StaticPrompt) -> Look:
        """Trace a prompt without values, in which what cannot be recorded is an error.

        Raises:
            ObstacleError: It cannot be recorded.
        """
        make_copies(self._decoder)  # a trace has no values to make them from
        names, given = list(made.buffers.inputs), [*made.buffers.inputs.values(), *made.buffers[1:]]

        def run(tensors: list[Any]) -> Any:
            inputs = dict(zip(names, tensors, strict=False))
            result, pairs = made.compute(PromptBuffers(inputs, *tensors[len(names) :]))
            return _pytree.tree_leaves((fields_of(result), pairs))

        with recording():
            return look(run, self._decoder, given)

    def _room_of(self, call: PromptCall, pairs: Pairs) -> tuple[Hashable, int]:
        """Return the key of a call's keys and values, and their positions."""
        positions = next(size for size in _ROOMS if size >= call.bucket)
        kinds = tuple((tensor.shape[:-2], tensor.shape[-1], tensor.dtype) for pair in pairs for tensor in pair)
        return (positions, kinds, call.prompt.device), positions

    def _ready(self, call: PromptCall) -> Recorder:
        if self._recorder is None:
            self._recorder = self._make_recorder(call.prompt.device)
            # Before the memory is freed, on whichever thread: a replay on another stream may still use it.
            weakref.finalize(self, self._recorder.finish).atexit = False
        return self._recorder

    # --- their number ---

    def _bytes_with(self, more: int = 0, most: int = 0) -> int:
        kept = self._kept.values()
        rooms = sum(_bytes(room) for room in self._rooms.values())
        return more + rooms + sum(one.prompt.bytes() for one in kept) + max([most, *(one.most for one in kept)])

    def _make_room(self, more: int, most: int, room: Hashable, size: int) -> None:
        """Drop recordings until one more fits, the least recently used first.

        Raises:
            PromptError: It takes more than is allowed by itself.
        """
        if more + most + size > self._bounds.bytes:
            raise PromptError(f"a recorded prompt takes more than {self._bounds.bytes} bytes")

        def is_full() -> bool:
            used = self._bytes_with(more + (0 if room in self._rooms else size), most)
            return len(self._kept) >= self._bounds.recordings or used > self._bounds.bytes

        while self._kept and is_full():
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Hashable) -> None:
        self._kept[key].recorder.finish()
        del self._kept[key]
        self._tidy()

    def _tidy(self) -> None:
        """Free keys and values that no recording uses."""
        used = {one.room for one in self._kept.values()}
        if self._recorder is not None and not used.issuperset(self._rooms):
            self._recorder.finish()
        self._rooms = {key: room for key, room in self._rooms.items() if key in used}

    def _drop_all(self) -> None:
        """Drop all recordings. The next one may be on another device."""
        for key in list(self._kept):
            self._drop(key)
        self._recorder = None


def _pairs(result: Any, length: int) -> Pairs:
    """Return keys and values of upstream's prompt.

    Raises:
        PromptError: A layer of its cache does not hold the prompt's positions.
    """
    past = cache_of(result)
    if not hasattr(result, "items") or past is None or not kv_cache.is_growable(past):
        raise PromptError("it returns no cache that grows")
    pairs = [(layer.keys, layer.values) for layer in past.layers]
    if any(tensor.shape[-2] != length for pair in pairs for tensor in pair):
        raise PromptError("layers of its cache hold other positions than the prompt's")
    return pairs


def _bytes(pairs: Pairs) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)
