"""A model that nobody told us about: its parts are found by watching where the first pass spends its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.growing_cache import decoders

if TYPE_CHECKING:
    from torch import nn

__all__ = ["parts", "refine", "refiner"]

# A module is taken apart if the modules inside it that were called explain this much of its time: what is lost between
# them is then lost to no stage.
_EXPLAINED = 0.8
# Layers of one class in a row are one part: thirty decoder layers are not thirty decisions.
_REPEATED = 3
_DEEPEST = 4


def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
    """The module as one part, if it has anything to optimise."""
    if next(module.parameters(), None) is None:
        return ()
    return (Part(path or type(module).__name__, "model", module),)


def refine(whole: tuple[Part, ...], seconds: Mapping[nn.Module, float]) -> tuple[Part, ...]:
    """Take the parts apart as far as the time of the first pass is explained by what is inside them.

    Args:
        whole: The parts as found without running anything.
        seconds: Seconds that each module took; one that was never called is missing.
    """
    found: list[Part] = []
    for part in whole:
        if part.kind != "model":  # known by name
            found.append(part)
            continue
        prefix = "" if part.name == type(part.module).__name__ else f"{part.name}."
        found += _taken_apart(part, prefix, seconds, 0)
    return tuple(found)


def refiner(whole: tuple[Part, ...]) -> Callable[[Mapping[nn.Module, float]], tuple[Part, ...]]:
    """`refine` with its first argument given."""
    return partial(refine, whole)


def _taken_apart(part: Part, prefix: str, seconds: Mapping[nn.Module, float], depth: int) -> list[Part]:
    if decoders(part.module) == [part.module]:  # its cache and its steps belong to all of its layers, be they but two
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
    """The outermost modules inside `module` that were called by themselves and hold parameters."""
    found: list[Part] = []
    for name, child in module.named_children():
        if child in seconds:
            if next(child.parameters(), None) is not None:
                found.append(Part(prefix + name, "model", child))
        else:  # a list, or a module of which another method is called
            found += _called(child, f"{prefix}{name}.", seconds)
    return found


def _are_layers(inner: list[Part]) -> bool:
    """Whether there is nothing left but single operations, or a row of layers of one class."""
    if all({name for name, _ in part.module.named_children()} <= {"parametrizations"} for part in inner):
        return True
    classes = [type(part.module).__name__ for part in inner]  # by name: torch makes a class for each parametrized one
    return max(classes.count(cls) for cls in classes) >= _REPEATED
