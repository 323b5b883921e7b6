"""The receptive field of a vocoder that is streamed: measured and checked once, and remembered with it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import ModelError, message_of
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.receptive_field import ReceptiveField, checked_field
from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


_known: weakref.WeakKeyDictionary[Any, dict[str, ReceptiveField | None]] = weakref.WeakKeyDictionary()
_lock = rlock()


def field_of(module: nn.Module, run: Callable[..., Tensor], *like: Tensor, method: str = "") -> ReceptiveField | None:
    """Return the measured and checked receptive field of a module, which is remembered with it.

    Args:
        module: The module.
        run: See `checked_field`.
        *like: See `measure`.
        method: Name of what `run` runs, if a module has several.

    Returns:
        The field; `None` with a `NotApplied` event if there is none, or if joined pieces do not equal the whole.
    """
    with _lock:  # many streams begin at once, and one measures
        known = _known.setdefault(module, {})
        if method not in known:
            try:
                known[method] = checked_field(module, run, *like)
            except (RuntimeError, ModelError) as raised:
                reason = f"{type(raised).__name__}: {message_of(raised)}; its sound is made in one piece"
                emit(NotApplied(f"streaming of {type(module).__name__}", reason))
                known[method] = None
        return known[method]
