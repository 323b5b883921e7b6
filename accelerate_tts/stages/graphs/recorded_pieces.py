"""Convolutional vocoders as graphs in pieces of one shape, so that each length is replayed. For CUDA and XPU.

A recording by shape (recorded_parts.py) serves the lengths that came before, and each sentence has another. A vocoder
whose samples depend on a bounded number of frames can be run on pieces of one length that overlap by its receptive
field (inspection/receptive_field.py). One recording of a piece then serves all calls that are at least as long. The
first and the last piece end where the call's frames end, so that upstream's own padding is at the ends, and nowhere
else. To rounding: other lengths may be computed by other kernels.

A module is *local* if joined pieces equal the whole, and if traces of a piece and of much longer calls consist of the
same operators with the same numbers. A mean over time, attention, and what is computed from the length are not. A part
that is not local is not changed: the stage fails, with an event. Where something in a part cannot be recorded (the
random numbers of a source), the modules inside it are run in pieces, each by itself, and those that are not local are
recorded by shape. So are calls that are shorter than a piece.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.errors import ModelError, TimeLimitError, described
from accelerate_tts.inspection.receptive_field import ReceptiveField, checked_field, pieces_of
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.graphs.arguments import CallArguments
from accelerate_tts.stages.graphs.obstacles import ObstacleError
from accelerate_tts.stages.graphs.recorded_parts import (
    IN_PIECES,
    Node,
    PartBounds,
    RecordedParts,
    modes_of,
    unrecordable,
)
from accelerate_tts.stages.graphs.recorder import recording
from accelerate_tts.stages.graphs.stage import RecordingStage

if TYPE_CHECKING:
    from collections.abc import Hashable

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import State

_PIECES = 4
"""Pieces that the first call is divided into. More of them serve shorter calls, too, and compute more overlaps."""
_LONGEST = 64
"""Pieces of the longest call that is traced, and so of the longest that is served."""


@register_stage
class RecordedPiecesStage(RecordingStage[PartBounds]):
    """Records one piece of a vocoder as a graph, and replays it for the pieces of calls of any length.

    Args:
        recorder: See `RecordingStage`. Each part has a recorder.
        inside: See `RecordingStage`.
        bounds: Bounds of each part's recordings.
    """

    bounds = PartBounds()

    name = "recorded in pieces"
    excluded_by: tuple[State, ...] = ("compiled", "fused")
    # Before recordings by shape: those are faster for the lengths of the warm-up, and serve no others.
    after = ("fold weight norm", "captured decode step")

    def applies(self, part: Part) -> str | None:
        if part.kind != "vocoder":
            return "it is no vocoder"
        return unrecordable(part) or super().applies(part)

    def prepare(self, part: Part) -> _RecordedPieces:
        """See `Stage.prepare`. Nothing is measured or recorded yet."""
        return _RecordedPieces(part, self.name, self._recorder, self.half_precision(part), self.bounds)


class Division(NamedTuple):
    """Division of a local module's calls into pieces.

    Attributes:
        field: Its receptive field.
        size: Frames of a piece.
        longest: Maximum frames of a call.
    """

    field: ReceptiveField
    size: int
    longest: int


class _RecordedPieces(RecordedParts):
    """The change: calls are replayed in pieces, where that is known to be right, and by shape elsewhere."""

    mark = IN_PIECES

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._divisions: dict[tuple[Node, Hashable], Division | None] = {}  # by kind of call, whatever its length

    @property
    def divisions(self) -> list[Division]:
        """Divisions of the modules that are run in pieces, one for each kind of call."""
        return [division for division in self._divisions.values() if division is not None]

    def _serve(self, node: Node, run: Any, call: CallArguments) -> tuple[Any] | None:
        if call.obstacle or not _has_frames(call):
            return super()._serve(node, run, call)
        if self._busy:  # another thread is measuring or recording, which takes long
            return None
        frames = call.tensors[0]
        division = self._division_of(node, run, call)
        if self._broken or node.cut or node.small:
            return None
        if division is None or not division.size <= frames.shape[-1] <= division.longest:
            return super()._serve(node, run, call)
        made = []
        for begin, start, end in pieces_of(frames.shape[-1], division.size, division.field):
            # Its strides and alignment are a new tensor's, whatever those of the call's.
            piece = frames[..., begin : begin + division.size].clone(memory_format=torch.contiguous_format)
            served = super()._serve(node, run, self._with_frames(call, piece))
            if served is None:
                return None
            made.append(served[0][..., start:end])
        return (torch.cat(made, dim=-1),)

    def _with_frames(self, call: CallArguments, frames: torch.Tensor) -> CallArguments:
        args, kwargs = call.filled([frames, *call.tensors[1:]])
        return CallArguments(args, kwargs, self._device)

    def _division_of(self, node: Node, run: Any, call: CallArguments) -> Division | None:
        """Return how a module's calls of this kind are divided; `None` if they are not, or not yet."""
        frames = call.tensors[0]
        no_frames = torch.empty((*frames.shape[:-1], 1), dtype=frames.dtype, device=frames.device)
        key = (node, ("any length", self._with_frames(call, no_frames).key, modes_of(self._device.type)))
        with self._lock:
            self._check(node)
            if key in self._divisions or not self._is_due(key):
                return self._divisions.get(key)
            while len(self._divisions) >= self._bounds.kinds:
                del self._divisions[next(iter(self._divisions))]
            self._busy = True
            try:
                division = self._measured(node, run, call)
            except ObstacleError as obstacle:
                self._cut(node, str(obstacle))
                return None
            except TimeLimitError:
                raise
            except Exception as error:  # whatever a module raises at another length is a reason not to divide it
                self._refuse(node, described(error).splitlines()[0])
                division = None
            else:
                if division is None:
                    self._put_off(key)
                    return None
            finally:
                self._busy = False
            self._divisions[key] = division
            return division

    def _forget(self, node: Node) -> None:
        super()._forget(node)
        for key in [key for key in self._divisions if key[0] is node]:
            del self._divisions[key]
            self._put_off(key)

    def _refuse(self, node: Node, reason: str) -> None:
        """Give the part up if it is not local; a module inside it is recorded by shape."""
        if node is self._root:
            self._give_up(f"no pieces: {reason}")
        else:
            self._obstacles.report(f"no pieces of {type(node.module).__name__}: {reason}", 0)

    # --- is it local? ------------------------------------------------------------------------------------------------

    def _measured(self, node: Node, run: Any, call: CallArguments) -> Division | None:
        """Return how calls are divided; `None` if no recording can serve this one.

        Raises:
            ObstacleError: The module cannot be recorded.
            Exception: The module is not local.
        """
        if node.watches is None and node.watch() is not None:
            return None  # hooks, which are reported where it is recorded
        run_on, frames = self._runs(node, run, call), call.tensors[0].shape[-1]
        whole = self._look(node, run_on, call, frames)
        if whole.launches < self._bounds.launches:
            return None
        field = self._field(node, call)
        size = _size(frames, field)
        longest = _LONGEST * size
        for length in (size, longest, longest - 1):
            if self._look(node, run_on, call, length).operators != whole.operators:
                raise ModelError(f"what {type(node.module).__name__} computes depends on the length")
        return Division(field, size, longest)

    @staticmethod
    def _field(node: Node, call: CallArguments) -> ReceptiveField:
        others: list[torch.Tensor] = []

        def called(module: Any, frames: torch.Tensor) -> Any:
            args, kwargs = call.filled([frames, *others])
            return getattr(type(module), node.method)(module, *args, **kwargs)

        device = call.tensors[0].device.type
        # Normal tensors and no casts: upstream's module is measured, as it was loaded.
        with torch.inference_mode(mode=False), torch.autocast(device, enabled=False), recording():
            others += [tensor.clone() for tensor in call.tensors[1:]]
            return checked_field(node.module, called, call.tensors[0][..., :1])


def _has_frames(call: CallArguments) -> bool:
    """Check that the last dimension of a call's first tensor may be frames."""
    first = call.tensors[0]
    return first.is_floating_point() and first.dim() > 1 and first.shape[-1] > 1


def _size(frames: int, field: ReceptiveField) -> int:
    """Return the frames of a piece, from those of the first call: a quarter of them with its overlaps.

    It is twice the overlap at least, and four times if the call is twice as long.
    """
    overlap = field.overlap
    quarter = math.ceil((frames + (_PIECES - 1) * overlap) / _PIECES)
    return max(quarter, min(4 * overlap, max(frames // 2, 2 * overlap)), overlap + 1)
