"""Parts of unknown models, found from the times of modules in the first pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.growing_cache import decoders

if TYPE_CHECKING:
    from torch import nn

# A module is divided if the called modules inside it explain this share of its time.
_EXPLAINED = 0.8
# From this many layers of one class on, they are one part: thirty decoder layers are not thirty decisions.
_REPEATED = 3
_DEEPEST = 4


def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
    """Return the module as one part; nothing for a module without parameters."""
    if next(module.parameters(), None) is None:
        return ()
    return (Part(path or type(module).__name__, "model", module),)


def refine(whole: tuple[Part, ...], seconds: Mapping[nn.Module, float]) -> tuple[Part, ...]:
    """Divide the parts as long as the modules inside them explain their time in the first pass.

    Args:
        whole: The parts before the first pass.
        seconds: Seconds of each module; modules that were never called are missing.
    """
    found: list[Part] = []
    for part in whole:
        if part.kind != "model":  # known by name
            found.append(part)
            continue
        prefix = "" if part.name == type(part.module).__name__ else f"{part.name}."
        found += _taken_apart(part, prefix, seconds, 0)
    return tuple(found)


def _taken_apart(part: Part, prefix: str, seconds: Mapping[nn.Module, float], depth: int) -> list[Part]:
    if decoders(part.module) == [part.module]:  # its cache and its steps belong to all layers together
        return [part]
    inner = _called(part.module, prefix, seconds)
    explained = sum(seconds[child.module] for child in inner)
    own = seconds.get(part.module, explained)
    if depth >= _DEEPEST or not inner or explained < _EXPLAINED * own or _are_layers(inner):
        return [part]
    found: list[Part] = []
    for child in inner:
        found += _taken_apart(child, f"{child.name}.", seconds, depth + 1)
    return found


def _called(module: nn.Module, prefix: str, seconds: Mapping[nn.Module, float]) -> list[Part]:
    """Return the outermost modules inside `module` that were called and have parameters."""
    found: list[Part] = []
    for name, child in module.named_children():
        if child in seconds:
            if next(child.parameters(), None) is not None:
                found.append(Part(prefix + name, "model", child))
        else:  # a list, or a module with another method that is called
            found += _called(child, f"{prefix}{name}.", seconds)
    return found


def _are_layers(inner: list[Part]) -> bool:
    """Check that only single operations are left, or several layers of one class."""
    if all({name for name, _ in part.module.named_children()} <= {"parametrizations"} for part in inner):
        return True
    classes = [type(part.module).__name__ for part in inner]  # by name, since each parametrized module has a class
    return max(classes.count(cls) for cls in classes) >= _REPEATED
