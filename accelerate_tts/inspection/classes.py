"""Classes of modules, beneath the class swaps of a tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["class_of", "plain_class"]

PLAIN = "_accelerate_tts_plain"


def class_of(module: Any) -> Any:
    """Return the module's present class, typed so that type checkers accept it as a cache key."""
    return type(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class beneath all class swaps."""
    cls = type(module)
    while PLAIN in vars(cls):
        cls = vars(cls)[PLAIN]
    return cls
