"""Prompts of a decoder as graphs, one for each bucket of lengths. For CUDA and XPU.

A prompt launches as many kernels as a token, and texts have other lengths at each request, so that exact shapes seldom
come again. Here a prompt is computed in a bucket, with nothing that counts behind it (static_prompt.py). What a
recording serves is told in prompt_call.py, and their number is bounded in prompt_recordings.py. Keys and values go to
the caller's cache: into a free slot of the recorded step, where the tokens will be, or else into tensors of its own.

It is a stage of its own beside the recorded step, whose prompts it serves: it is timed by prompts, and dropped where
they gain nothing. Never run on a device; docs/decisions/0009-cuda.md says what a CPU has shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.inspection.classes import beneath_swaps
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.patching.change import Changes, CountedChange, Counter
from accelerate_tts.patching.class_swap import ClassSwap, is_recorded, subclass_with
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode.cuda_graph import IN_A_SLOT
from accelerate_tts.stages.decode.growing_cache import decoders
from accelerate_tts.stages.decode.prompt_recordings import PromptBounds, PromptRecordings
from accelerate_tts.stages.decode.token_call import window_of
from accelerate_tts.stages.graphs.recorder import GraphRecorder
from accelerate_tts.stages.graphs.stage import RECORDING_DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from accelerate_tts.plan import Part, TimedCalls
    from accelerate_tts.stages.graphs.recorder import Recorder
    from accelerate_tts.stages.protocol import State

_BOUNDS = PromptBounds()


@register_stage
class RecordedPromptsStage(BaseStage):
    """Records a decoder's prompts as graphs, in buckets of lengths, and replays them.

    Args:
        recorder: Makes the recorder for a device. Tests without a device pass another one than `GraphRecorder`.
        bounds: Bounds of each decoder's recordings.
    """

    name = "recorded prompts"
    devices = RECORDING_DEVICES
    excluded_by: tuple[State, ...] = ("compiled",)
    after = ("captured decode step", "recorded by shape")
    times: TimedCalls = "prefill"
    cost = 2.0

    def __init__(
        self, recorder: Callable[[torch.device], Recorder] = GraphRecorder, bounds: PromptBounds = _BOUNDS
    ) -> None:
        self._recorder, self._bounds = recorder, bounds

    def applies(self, part: Part) -> str | None:
        found = decoders(part.module)
        if not found or not is_recorded(part.module):
            return "no decoder in it whose steps are recorded"
        windows = [window for decoder in found if (window := window_of(decoder.config)) is not None]
        return f"it attends to the last {min(windows)} positions only" if windows else None

    def prepare(self, part: Part) -> RecordedPrompts:
        """See `Stage.prepare`. Nothing is recorded yet."""
        return RecordedPrompts(part, self.name, self._recorder, self._bounds)


class RecordedPrompts(CountedChange, Changes):
    """The change: the forward of each decoder's class looks for the recording of a prompt first."""

    def __init__(
        self, part: Part, stage: str, recorder: Callable[[torch.device], Recorder], bounds: PromptBounds
    ) -> None:
        self._counter = Counter(part.name)
        self._recordings = {
            decoder: PromptRecordings(decoder, self._counter, stage, recorder, bounds)
            for decoder in decoders(part.module)
        }
        super().__init__(
            ClassSwap(list(self._recordings), lambda decoder: _class_for(type(decoder), self._recordings[decoder]))
        )

    @property
    def kept(self) -> int:
        """Number of recordings that are kept."""
        return sum(each.kept for each in self._recordings.values())

    @property
    def bytes(self) -> int:
        """Bytes of the recordings."""
        return sum(each.bytes for each in self._recordings.values())


def _class_for(plain: Any, recordings: PromptRecordings) -> type:
    names = parameters_of(beneath_swaps(plain))
    in_a_slot = getattr(plain, IN_A_SLOT, None)  # none while tuning tries something else in the step's place

    def forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = None
        if in_a_slot is not None:
            result = recordings.run(plain, {**dict(zip(names, args, strict=False)), **kwargs}, in_a_slot)
        return plain.forward(decoder, *args, **kwargs) if result is None else result

    return subclass_with(plain, forward)
