"""Base class of the stages that record calls of a part as graphs of its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar, cast

from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.graphs.recorder import GraphRecorder, unrecordable_on
from accelerate_tts.stages.layers.half_precision import HalfStage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from accelerate_tts.patching.class_swap import CarryingSwap
    from accelerate_tts.plan import Part
    from accelerate_tts.stages.graphs.recorder import Recorder
    from accelerate_tts.stages.protocol import Stage, Target


B = TypeVar("B")

RECORDING_DEVICES = ("cuda", "xpu")
"""Device types on which stages record. Where this torch has no graphs for one, `applies` says so."""


class RecordingStage(BaseStage, Generic[B]):
    """A stage that records calls of a part, in fp32 or with half precision inside the recording.

    Args:
        recorder: Makes the recorder for a device. Tests without a device pass another one than `GraphRecorder`.
        inside: Half-precision stage for what is recorded.
        bounds: Bounds of the recordings; those of the class if not given.
    """

    group = "compilation"
    devices = RECORDING_DEVICES
    cost = 3.0
    bounds: B

    @classmethod
    def variants(cls, target: Target) -> Iterable[Stage]:
        """See `BaseStage.variants`: the part as it is, and in each half precision."""
        halves = [HalfStage(dtype, carried=True) for dtype in target.half_dtypes]
        return [cast("Stage", cls(inside=inside)) for inside in (None, *halves)]  # a subclass is a whole stage

    def __init__(
        self,
        recorder: Callable[[torch.device], Recorder] = GraphRecorder,
        inside: HalfStage | None = None,
        bounds: B | None = None,
    ) -> None:
        self._recorder = recorder
        self._inside = inside
        if bounds is not None:
            self.bounds = bounds
        if inside is not None:
            self.name = f"{self.name}, {inside.name}"

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`. Subclasses name their own obstacles first."""
        devices = {tensor.device for tensor in part.module.parameters()}
        if len(devices) != 1:
            return "it is not on one device"
        reason = unrecordable_on(*devices) if self._recorder is GraphRecorder else None
        if reason is not None:
            return reason
        return None if self._inside is None else self._inside.applies(part)

    def half_precision(self, part: Part) -> CarryingSwap | None:
        """Return the change that is recorded with the part, or `None`."""
        return None if self._inside is None else self._inside.prepare(part)
