"""The systems that are known, by the names of their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.errors import shown
from accelerate_tts.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part

__all__ = ["SYSTEMS", "System", "register_system"]

_Parts = TypeVar("_Parts", bound="Callable[[str, nn.Module], tuple[Part, ...]]")


@dataclass(frozen=True)
class System:
    """A class of a system, as it was registered.

    Attributes:
        parts: Names the parts of such a module, from its path and the module itself.
        package: See `register_system`.
        holders: See `register_system`.
    """

    parts: Callable[[str, nn.Module], tuple[Part, ...]]
    package: str = ""
    holders: tuple[str, ...] = ()


SYSTEMS: Registry[System] = Registry("accelerate_tts.models", "accelerate_tts.systems")
"""The systems, by the names of their classes."""


def register_system(*classes: str, package: str = "", holders: tuple[str, ...] = ()) -> Callable[[_Parts], _Parts]:
    """Say what the parts of a system's modules are, as a decorator.

    The system is not imported: its modules are told by the names of their classes, or of the classes these derive from.
    What is decorated is a function of a module's path and the module, or a `Known`, which is one made from a table.

    Args:
        *classes: Names of the classes that it is for, without their packages.
        package: The top-level package that upstream's objects come from. With `holders`, an object of that package in
            which nothing is of a registered class is reported by an event: a release of another shape.
        holders: How the names begin of upstream's classes that hold such a module.

    Raises:
        TypeError: A class is given in place of its name, or what is decorated cannot be called.
        ValueError: No name is given, or something else is registered for one of them.
    """
    if not classes:
        raise ValueError("register_system() needs the name of a class: @register_system('MyVocoder')")
    given: tuple[Any, ...] = classes
    for name in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"register_system() takes names of classes, got {shown(name)}")

    def registered(parts: _Parts) -> _Parts:
        if not callable(parts):
            raise TypeError(f"@register_system needs a function of a path and a module, got {shown(parts)}")
        for name in classes:
            SYSTEMS.add(name, System(parts, package, holders))
        return parts

    return registered
