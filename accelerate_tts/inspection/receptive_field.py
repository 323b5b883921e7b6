"""The receptive field of a convolutional vocoder, measured by probing, and the pieces that it can be run on.

One frame of an input is changed, and the samples that change with it are looked at. A vocoder whose samples depend on a
bounded number of frames can be run on overlapping pieces, and the joined pieces equal the whole to rounding. That is
tried before anything is streamed or recorded in pieces.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.errors import ModelError
from accelerate_tts.inspection.signatures import hooks_of
from accelerate_tts.settings import EXACT_TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor, nn

Vocoder = Callable[..., "Tensor"]
"""Takes one tensor or several, whose last dimensions are multiples of the frames, and returns samples."""

_FIRST_FRAMES, _MOST_FRAMES = 64, 1024
"""Lengths of the probes: the first one, and the one after which a field counts as unbounded."""
_KICK = 8.0
"""A finite change of a frame of normal noise, so large that no rounding hides its effect at the field's edges."""


@dataclass(frozen=True)
class ReceptiveField:
    """Frames that the samples of one frame depend on.

    Attributes:
        left: Number of frames before it.
        right: Number of frames after it.
        hop: Samples of a frame.
    """

    left: int
    right: int
    hop: int

    @property
    def overlap(self) -> int:
        """Frames that two neighbouring pieces have in common."""
        return self.left + self.right


class PieceOfWhole(NamedTuple):
    """One of the pieces that make up a whole.

    Attributes:
        begin: Its first frame.
        start: The first of its samples that belongs to the whole.
        end: The sample after the last; `None` for all that follow, at the end of the whole.
    """

    begin: int
    start: int
    end: int | None


def pieces_of(frames: int, size: int, field: ReceptiveField) -> list[PieceOfWhole]:
    """Return pieces of one size that make up a whole.

    The first and the last piece end where the whole ends, so that the vocoder pads there as it pads the whole. The last
    one is moved back for that.

    Args:
        frames: Frames of the whole, at least `size`.
        size: Frames of a piece, more than the overlap.
        field: The vocoder's receptive field.
    """
    step, last = size - field.overlap, frames - size
    begins = [*range(0, last, step), last]
    done = 0  # frames whose samples are made
    found = []
    for begin in begins:
        end = None if begin == last else (size - field.right) * field.hop
        found.append(PieceOfWhole(begin, (done - begin) * field.hop, end))
        done = begin + size - field.right
    return found


def measure(vocoder: Vocoder, *like: Tensor) -> ReceptiveField:
    """Measure a vocoder's receptive field.

    Args:
        vocoder: Takes as many tensors as `like` has, and returns samples of shape (..., samples).
        *like: Inputs of shape (1, ..., frames), and (1, ..., a multiple of frames) for each further one. Their shapes,
            dtypes and devices count, not their values.

    Raises:
        ModelError: The samples of a frame depend on frames at any distance, or on none.
    """
    rates = _rates(like)

    def run(inputs: list[Tensor]) -> Tensor:
        samples: Any = vocoder(*inputs)
        if not isinstance(samples, torch.Tensor) or samples.dim() < 2:  # noqa: PLR2004 - samples of a row
            raise ModelError(f"it returns a {type(samples).__name__}, and no rows of samples")
        return samples.flatten(0, -2)

    frames = _FIRST_FRAMES
    hop = run(_noise(like, frames)).shape[-1] - run(_noise(like, frames - 1)).shape[-1]
    if hop < 1:
        raise ModelError(f"one frame more makes {hop} samples more, so it is no vocoder of frames")
    while frames <= _MOST_FRAMES:
        at, plain = frames // 2, _noise(like, frames)
        whole = run(plain)
        span = _span(whole, run(_changed(plain, rates, at, _KICK)), finite=True)
        if span is None:
            raise ModelError("no sample changes with a frame, so it does not read its input")
        # A change that is not a number also passes through what was too small to be seen: an LSTM forgets noise, and
        # may remember speech for ever.
        beyond = _span(whole, run(_changed(plain, rates, at, math.nan)), finite=False) or span
        span = min(span[0], beyond[0]), max(span[1], beyond[1])
        if _is_inside(span, whole):
            left, right = math.ceil(span[1] / hop) - at - 1, at - span[0] // hop
            return ReceptiveField(max(left, 0), max(right, 0), hop)
        frames *= 2
    raise ModelError(f"the samples of a frame depend on frames more than {_MOST_FRAMES // 2} away")


def _rates(like: tuple[Tensor, ...]) -> list[int]:
    """Return the values a frame of each input."""
    return [each.shape[-1] // like[0].shape[-1] for each in like]


def _noise(like: tuple[Tensor, ...], frames: int) -> list[Tensor]:
    """Return normal noise of that many frames, the same at each call."""
    generator = torch.Generator().manual_seed(frames)
    return [
        torch.randn(*each.shape[:-1], frames * rate, generator=generator).to(each.device, each.dtype)
        for each, rate in zip(like, _rates(like), strict=True)
    ]


def _changed(inputs: list[Tensor], rates: list[int], at: int, by: float) -> list[Tensor]:
    """Return copies of the inputs with one changed frame."""
    copies = [each.clone() for each in inputs]
    for each, rate in zip(copies, rates, strict=True):
        each[..., at * rate : (at + 1) * rate] += by
    return copies


def _span(whole: Tensor, other: Tensor, *, finite: bool) -> tuple[int, int] | None:
    """Return the first sample that changed in any row, and the one after the last."""
    changed = (whole != other if finite else ~torch.isfinite(other)).any(0).nonzero()
    return (int(changed[0]), int(changed[-1]) + 1) if len(changed) else None


def _is_inside(span: tuple[int, int], whole: Tensor) -> bool:
    return span[0] > 0 and span[1] < whole.shape[-1]


def checked_field(module: nn.Module, run: Callable[..., Tensor], *like: Tensor) -> ReceptiveField:
    """Measure a module's receptive field, and check that joined pieces equal the whole.

    Both are done on an untouched copy, so that nothing that watches, compiles or serves the module meets the probes.

    Args:
        module: The module.
        run: Takes the module (or its copy) and what `Vocoder` takes, and returns samples of shape (..., samples).
        *like: See `measure`.

    Raises:
        ModelError: It has no receptive field, or joined pieces differ from the whole.
    """
    vocoder = partial(run, _untouched(module))
    with torch.no_grad():
        field = measure(vocoder, *like)
        overlap = field.overlap
        inputs = _noise(like, 2 * overlap + 17)
        whole, size = vocoder(*inputs), overlap + (overlap + 17) // 3 + 1  # three pieces: one has neither end
        rates, joined = _rates(like), []
        for begin, start, end in pieces_of(inputs[0].shape[-1], size, field):
            frames = [
                each[..., begin * rate : (begin + size) * rate].clone()
                for each, rate in zip(inputs, rates, strict=True)
            ]
            joined.append(vocoder(*frames)[..., start:end])
        error = _difference(torch.cat(joined, dim=-1), whole)
    if not error <= EXACT_TOLERANCE:  # NaN fails
        raise ModelError(f"joined pieces differ from the whole by {error:.1e}")
    return field


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, of the largest value."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _untouched(module: nn.Module) -> nn.Module:
    """Return a copy without hooks; the module itself if it cannot be copied."""
    try:
        copied = copy.deepcopy(module)
    except Exception:  # old weight norm cannot be copied, foreign modules may raise anything; the result is the same
        return module
    for hooks in hooks_of(*copied.modules()):
        # torch's own compute weights.
        for number in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.")]:
            del hooks[number]
    return copied
