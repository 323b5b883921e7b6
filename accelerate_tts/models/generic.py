"""A model that nobody told us about: one part, the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.engine.plan import Part

if TYPE_CHECKING:
    from torch import nn

__all__ = ["parts"]


def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
    """The module as one part, if it has anything to optimise."""
    return (
        (Part(path or type(module).__name__, "model", module),) if next(module.parameters(), None) is not None else ()
    )
