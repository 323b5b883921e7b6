"""Classes of modules, seen through the class swaps of a tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["class_of", "plain_class"]

PLAIN = "_accelerate_tts_plain"


def class_of(module: Any) -> Any:
    """The module's present class, in a type that can be a cache's key (torch types `Module.__hash__` otherwise)."""
    return type(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what stages made of it by class swaps."""
    cls = type(module)
    while PLAIN in vars(cls):
        cls = vars(cls)[PLAIN]
    return cls
