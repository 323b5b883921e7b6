"""A decode step as a graph of its device, independent of the loop that drives the decoder. For CUDA and XPU.

On a GPU, a decode step launches hundreds of kernels of a few microseconds each, and the launches dominate its time. A
recorded step is replayed by one launch. A recording needs fixed addresses and shapes; see static_step.py. It serves one
token for a growing cache (kv_cache/), with the attention weights if upstream returns them. Prefill, arguments that were
absent when the step was recorded, autocast, hooks and sequences beyond the largest bucket take upstream's own forward
on the same cache; token_call.py tells which call is which. A prompt writes its keys and values into a free slot at
once, if there is one; recorded_prompts.py may record it. Which slot serves a sequence, and how many there are, is the
matter of slot_pool.py.

Where Triton is installed, a step may be recorded in fewer kernels (token_kernels.py). If they cannot be compiled or
started, upstream's own step is recorded, with one event.

Steps of several threads may be one step of more rows (shared_steps.py): one recording for each number of callers. Their
sequences then live in slots side by side (`JoinedSlots`), whoever else is there, so that no cache is copied for a step.

Half precision belongs inside the recording. By itself it slows an eager step down, since each cast is one more kernel
launch, and a recording does not see later changes of the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from accelerate_tts.kernels.weight_formats import formats_under
from accelerate_tts.locks import rlock
from accelerate_tts.patching.change import Changes, CountedChange, Counter
from accelerate_tts.patching.class_swap import RECORDED, ClassSwap, keeps_copies, subclass_with
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import Obstacles
from accelerate_tts.stages.decode.growing_cache import decoders, growing_caches
from accelerate_tts.stages.decode.joined_slots import Work
from accelerate_tts.stages.decode.shared_steps import Rules, SharedSteps
from accelerate_tts.stages.decode.slot_pool import Bounds, SlotPool
from accelerate_tts.stages.decode.step_watch import StepWatch
from accelerate_tts.stages.decode.token_call import CallReader
from accelerate_tts.stages.decode.token_kernels import TokenKernels
from accelerate_tts.stages.graphs.recorder import GraphRecorder, is_recording, stream_of
from accelerate_tts.stages.graphs.stage import RecordingStage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from accelerate_tts.patching.class_swap import CarryingSwap
    from accelerate_tts.plan import Part, TimedCalls
    from accelerate_tts.stages.decode.slot_pool import Place
    from accelerate_tts.stages.decode.static_slot import StaticSlot
    from accelerate_tts.stages.decode.token_call import Prompt, TokenCall
    from accelerate_tts.stages.decode.token_kernels import TokenBlocks
    from accelerate_tts.stages.graphs.recorder import Recorder
    from accelerate_tts.stages.layers.half_precision import HalfStage
    from accelerate_tts.stages.protocol import Stage, Target

IN_A_SLOT = "_accelerate_tts_in_a_slot"
"""Attribute of a decoder's class while its steps are recorded: runs a prompt in a free slot, if there is one."""


@register_stage
class CapturedStepStage(RecordingStage[Bounds]):
    """Records a decode step as a graph and replays it.

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
        recorder: Callable[[torch.device], Recorder] = GraphRecorder,
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


def _taken(made: dict[int, Any], first: int, _rows: int) -> Any:
    return made[first]


class _Steps:
    """The recorded steps of one decoder."""

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
        self._obstacles = Obstacles(f"the captured step of {counter.what}")
        self._calls = CallReader(decoder, self._obstacles)
        self._copies = copies or keeps_copies(decoder)
        self._watch = StepWatch(decoder, copies=self._copies)
        self._lock = rlock()  # reentrant: a hook of an event that is emitted here may call the model
        self._last: StaticSlot | None = None  # used by the last step
        self._is_in_pass = False
        self.shared = SharedSteps(self._obstacles.what, Rules(
            alone=self._alone, together=self._together, taken=_taken, finish=self._finish, arrange=self._arrange,
            bits_vary=True,
        ))  # fmt: skip
        self._pool = SlotPool(decoder, counter, stage, recorder, bounds, kernels, self.shared)

    @property
    def slots(self) -> list[StaticSlot]:
        """See `SlotPool`."""
        return self._pool.slots

    def class_for(self, plain: Any) -> type:
        """Return the decoder's class while the change is on."""

        def forward(decoder: Any, *args: Any, **kwargs: Any) -> Any:
            named = {**dict(zip(self._calls.names, args, strict=False)), **kwargs}
            result = None
            if not self._pool.is_broken and not is_recording():
                result = self._token(plain, named) if self._calls.is_token(named) else self._prompt(plain, named)
            return plain.forward(decoder, *args, **kwargs) if result is None else result

        cls = subclass_with(plain, forward)
        setattr(cls, RECORDED, True)
        setattr(cls, IN_A_SLOT, self.in_a_slot)
        return cls

    def _prompt(self, plain: Any, named: dict[str, Any]) -> Any:
        """Run a prompt that writes into a free slot; return `None` if this is no prompt, or no slot is free for it."""
        prompt = self._calls.prompt(named)
        if prompt is None:
            return None
        return self.in_a_slot(prompt, lambda: plain.forward(self._decoder, **prompt.arguments))

    def in_a_slot(self, prompt: Prompt, run: Callable[[], Any]) -> Any:
        """Run a prompt whose keys and values are written into a free slot; return `None` if none is free for it.

        Args:
            prompt: The prompt. Its cache gets growing layers.
            run: Runs it, and returns its result.
        """
        # Where steps are shared, a prompt's bits must not depend on whether a slot is free.
        if self._pool.shares or self._pool.is_broken:
            return None
        with self._lock:
            watch, capacity = self._watch, self._pool.capacity_for(prompt.length)
            lent = self._pool.lend(capacity, prompt.rows, prompt.dtype, prompt.device)
        if lent is None:
            return None
        key, slot = lent
        try:
            return slot.take_prompt(prompt.past, run, stream_of(prompt.device))
        finally:
            with self._lock:
                self._pool.take_back(key, slot, is_stale=self._watch is not watch)

    def _token(self, plain: Any, named: dict[str, Any]) -> Any:
        """Run one token; return `None` if upstream's forward must run. Takes no lock: a step may be under way."""
        pool = self._pool
        call = self._calls.token(plain, named, pool.capacity_for, pool.bounds.bytes, pool.may_join)
        return None if call is None else self.shared.run((), call)

    # --- computing steps, as the rules of shared steps have it ---

    def _alone(self, _blocks: Sequence[Any], call: TokenCall) -> Any:
        """Run one token. Returns `None` if upstream's forward must run."""
        with self._lock:
            if self._is_in_pass:
                return None  # from inside a step of several: a signal handler's, or a hook's of an event
            if not self._refresh():
                return None
            kv_cache.adopt(call.past)
            place = self._pool.place(call)
            if place is None:
                return None
            self._obstacles.served(0)
            self._last = place.slot
            try:
                if not place.is_visit:
                    place.slot.prepare(call.past, call.inputs, call.mask, call.stream)
            except Exception as error:  # as where a slot by itself is recorded
                if not self._pool.fall_back(error):
                    return None
                self._clear()  # a row must not depend on which slot it is in
                return self._alone(_blocks, call)
            return _run(place, call)

    def _together(self, _blocks: Sequence[Any], calls: Sequence[TokenCall]) -> dict[int, Any]:
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
            lengths = [call.length for call in calls]
            try:
                results = self._run_each(calls) if self._refresh() else [None] * len(calls)
            except BaseException:  # also Ctrl-C of this thread, between two layers of another one's cache
                for call, length in zip(calls, lengths, strict=True):
                    call.shorten(length)
                raise
            finally:
                self._is_in_pass = False
        found, row = {}, 0
        for call, result in zip(calls, results, strict=True):
            found[row] = result
            row += call.rows
        return found

    def _run_each(self, calls: Sequence[TokenCall]) -> list[Any]:
        for call in calls:
            kv_cache.adopt(call.past)
        places = self._places(calls)
        self._obstacles.served(0)
        results: list[Any] = [None] * len(calls)
        works = {
            number: Work(place.slot, call.past, call.inputs, call.mask, call.stream)
            for number, (call, place) in enumerate(zip(calls, places, strict=True))
            if place is not None and place.slot.lane is not None
        }
        if works:
            made = self._pool.joined(calls[0].key).run(list(works.values()))
            for number, result in zip(works, made, strict=True):
                results[number] = result
        for number, (call, place) in enumerate(zip(calls, places, strict=True)):
            if place is not None:
                self._last = place.slot
                if place.slot.lane is None:
                    results[number] = _run(place, call)
        return results

    def _places(self, calls: Sequence[TokenCall]) -> list[Place | None]:
        """Find a slot for each call. Those that are in one come first, so that no other call takes it."""
        places: list[Place | None] = [None] * len(calls)
        is_in = [self._pool.has(call) for call in calls]
        taken: list[StaticSlot] = []
        for number in sorted(range(len(calls)), key=lambda number: not is_in[number]):
            place = places[number] = self._pool.place(calls[number], taken)
            if place is not None and not place.is_visit:
                taken.append(place.slot)
        return places

    def _finish(self) -> None:
        """Wait for the last step, without the lock: others may come meanwhile."""
        slot = self._last
        if slot is not None:
            slot.finish()

    def _arrange(self, numbers: tuple[int, ...], rows: int) -> None:
        """Make steps for so many callers each, of so many rows."""
        with self._lock:
            self._last = None
            self._pool.arrange(numbers, rows)
            self._watch = StepWatch(self._decoder, copies=self._copies)  # a slot that a prompt is in is not kept

    def _refresh(self) -> bool:
        """Give up recordings that are no longer valid. Returns False if upstream's forward must run for now."""
        if self._watch.outdated():  # a recording holds addresses, and copies of weights
            self._watch = StepWatch(self._decoder, copies=self._copies)
            self._clear()
        obstacle = self._watch.obstacle()
        if obstacle is not None:
            self._obstacles.report(obstacle, 0)
        return obstacle is None

    def _clear(self) -> None:
        self._last = None
        self._pool.clear()


def _run(place: Place, call: TokenCall) -> Any:
    run = place.slot.visit if place.is_visit else place.slot.run
    return run(call.past, call.inputs, call.mask, call.stream)
