"""The receptive field of a convolutional vocoder, measured by probing.

One frame of an input is changed, and the samples that change with it are looked at. A vocoder whose samples depend on a
bounded number of frames can be run on overlapping pieces, and the joined pieces equal the whole to rounding. That is
tried once for each vocoder before anything is streamed.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.errors import ModelError, message_of
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.signatures import hooks_of
from accelerate_tts.locks import rlock
from accelerate_tts.tuning.compare import EXACT_TOLERANCE

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
        return vocoder(*inputs).flatten(0, -2)[0]

    frames = _FIRST_FRAMES
    hop = len(run(_noise(like, frames))) - len(run(_noise(like, frames - 1)))
    if hop < 1:
        raise ModelError(f"one frame more makes {hop} samples more: {vocoder!r} is no vocoder of frames")
    while frames <= _MOST_FRAMES:
        at, plain = frames // 2, _noise(like, frames)
        whole = run(plain)
        span = _span(whole, run(_changed(plain, rates, at, _KICK)), finite=True)
        if span is None:
            raise ModelError(f"no sample changes with a frame: {vocoder!r} does not read its input")
        if _is_inside(span, whole):
            # A change that is not a number also passes through what was too small to be seen.
            beyond = _span(whole, run(_changed(plain, rates, at, math.nan)), finite=False)
            if beyond is not None and _is_inside(beyond, whole):
                span = min(span[0], beyond[0]), max(span[1], beyond[1])
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
    """Return the first changed sample, and the one after the last."""
    changed = (whole != other if finite else ~torch.isfinite(other)).nonzero()
    return (int(changed[0]), int(changed[-1]) + 1) if len(changed) else None


def _is_inside(span: tuple[int, int], whole: Tensor) -> bool:
    return span[0] > 0 and span[1] < len(whole)


_known: weakref.WeakKeyDictionary[Any, dict[str, ReceptiveField | None]] = weakref.WeakKeyDictionary()
_lock = rlock()


def field_of(module: nn.Module, run: Callable[..., Tensor], *like: Tensor, method: str = "") -> ReceptiveField | None:
    """Return the measured and checked receptive field of a module, which is remembered with it.

    It is measured on an untouched copy, so that nothing that watches, compiles or serves the module meets the probes.

    Args:
        module: The module.
        run: Takes the module (or its copy) and what `Vocoder` takes, and returns samples of shape (1, 1, samples).
        *like: See `measure`.
        method: Name of what `run` runs, if a module has several.

    Returns:
        The field; `None` with a `NotApplied` event if there is none, or if joined pieces do not equal the whole.
    """
    with _lock:  # many streams begin at once, and one measures
        known = _known.setdefault(module, {})
        if method not in known:
            with torch.no_grad():
                known[method] = _checked(type(module).__name__, partial(run, _untouched(module)), like)
        return known[method]


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


def _checked(name: str, vocoder: Vocoder, like: tuple[Tensor, ...]) -> ReceptiveField | None:
    from accelerate_tts.streaming.pieces import Pieces

    try:
        field = measure(vocoder, *like)
        inputs = _noise(like, 2 * (field.left + field.right) + 16)
        whole, pieces = vocoder(*inputs), Pieces(vocoder, field)
        first, rest = zip(*(each.tensor_split([each.shape[-1] // 2], dim=-1) for each in inputs), strict=True)
        joined = torch.cat([pieces.push(*first), pieces.push(*rest, last=True)], dim=-1)
        error = float((joined - whole).abs().max() / whole.abs().max().clamp_min(1e-12))
    except (RuntimeError, ModelError) as raised:
        reason = f"{type(raised).__name__}: {message_of(raised)}"
    else:
        if error <= EXACT_TOLERANCE:
            return field
        reason = f"joined pieces differ from the whole by {error:.1e}"
    emit(NotApplied(f"streaming of {name}", f"{reason}; its sound is made in one piece"))
    return None
