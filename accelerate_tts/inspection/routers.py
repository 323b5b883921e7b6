"""Routers of mixtures of experts: the layers whose result says which experts compute a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.inspection.classes import plain_class

if TYPE_CHECKING:
    from torch import nn

_WORDS = ("router", "gating")


def routers(module: nn.Module) -> set[nn.Module]:
    """Return the modules inside a module that choose experts, and the modules inside those.

    Rounding their weights or their result lets them choose another expert where two are nearly as good, and another
    expert computes something else altogether. They are small: those who quantise such models leave them in fp32 or
    bf16. They are known by their names and by the names of their classes, in which packages agree. A module with more
    than half of the weights of what holds it is none: a service's own `Router` of requests among models.
    """
    found: set[nn.Module] = set()
    for holder in module.modules():
        children = [(name, child) for name, child in holder.named_children() if _is_named(holder, name, child)]
        if children:
            whole = _size(holder)
            found |= {inner for _, child in children if 2 * _size(child) < whole for inner in child.modules()}
    return found


def _is_named(holder: nn.Module, name: str, child: nn.Module) -> bool:
    texts = (name.lower(), plain_class(child).__name__.lower())
    if any(word in text for word in _WORDS for text in texts):
        return True
    return name == "gate" and any("expert" in other for other in holder._modules)  # elsewhere a gate only scales


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
