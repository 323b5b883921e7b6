"""Registry of known systems by the names of their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.errors import shown
from accelerate_tts.registration import Registry

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part

_Parts = TypeVar("_Parts", bound="Callable[[str, nn.Module], tuple[Part, ...]]")


@dataclass(frozen=True)
class SystemEntry:
    """A registered class of a system.

    Attributes:
        parts: Returns the parts of such a module, from its path and the module.
        package: See `register_system`.
        holders: See `register_system`.
    """

    parts: Callable[[str, nn.Module], tuple[Part, ...]]
    package: str = ""
    holders: tuple[str, ...] = ()


SYSTEMS: Registry[SystemEntry] = Registry("accelerate_tts.models", "accelerate_tts.systems")
"""Systems by the names of their classes."""


def register_system(*classes: str, package: str = "", holders: tuple[str, ...] = ()) -> Callable[[_Parts], _Parts]:
    """Register a function that returns the parts of a system's modules, as a decorator.

    The system is not imported: its modules are identified by the names of their classes, or of their base classes. The
    decorated object is a function of a module's path and the module, or a `Known` table.

    Args:
        *classes: Names of the classes, without their packages.
        package: Top-level package of upstream's objects. With `holders`, an object of that package without any module
            of a registered class causes an event, since its release is unknown.
        holders: Prefixes of the names of upstream's classes that hold such a module.

    Raises:
        TypeError: A class is given instead of its name, or the decorated object is not callable.
        ValueError: No name is given, or another system is registered for one of them.
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
            SYSTEMS.add(name, SystemEntry(parts, package, holders))
        return parts

    return registered
