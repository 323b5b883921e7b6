"""Registered stages and systems: our own, found in their package, and those of other packages, by entry point."""

from __future__ import annotations

import pkgutil
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

from accelerate_tts.errors import message_of, shown
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from collections.abc import Generator
    from importlib.metadata import EntryPoint

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name. A module that is imported adds its own.

    Args:
        package: The package whose modules are all imported when the entries are first asked for.
        group: The group of entry points under which other packages name modules that add more; "" for none.
    """

    def __init__(self, package: str, group: str = "") -> None:
        self._package = package
        self._group = group
        self._entries: dict[str, T] = {}
        self._asked: set[EntryPoint] = set()
        self._has_ours = False
        self._lock = rlock()

    def add(self, name: str, value: T) -> None:
        """Register a value. The same one may be registered again, as a notebook does when a cell is run again.

        Raises:
            ValueError: Something else has this name.
        """
        # Without the lock: a module is imported under its import lock, and `entries` imports modules under this one.
        known = self._entries.get(name)
        if known is not None and known != value and _origin(known) != _origin(value):
            raise ValueError(f"{shown(name)} is registered already, as {shown(known)}; choose another name")
        self._entries[name] = value

    def entries(self) -> dict[str, T]:
        """Everything that is registered, by name.

        A module of another package that cannot be imported, or registers nothing, is named in a `NotApplied` event,
        once. Whatever it had registered until then is taken back.
        """
        with self._lock:
            self._load_ours()
            for point in self._points():
                if point not in self._asked:
                    self._load(point)
                    self._asked.add(point)  # behind it: a load that Ctrl-C ends is begun anew
            return dict(self._entries)

    @contextmanager
    def scope(self, **instead: T) -> Generator[None, None, None]:
        """While open, more may be registered, which is forgotten at the end. For tests.

        Args:
            **instead: What stands in for entries of these names meanwhile.
        """
        self._load_ours()  # a module that is imported meanwhile is not imported again
        before = dict(self._entries), set(self._asked)
        self._entries |= instead
        try:
            yield
        finally:
            self._entries, self._asked = before

    def _load_ours(self) -> None:
        if not self._has_ours:
            package = import_module(self._package)
            for found in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                import_module(found.name)
            self._has_ours = True

    def _points(self) -> tuple[EntryPoint, ...]:
        if not self._group:
            return ()
        from importlib.metadata import entry_points

        try:
            return tuple(entry_points(group=self._group))
        except Exception as error:  # one package's broken metadata must not cost the user the load
            emit(NotApplied(f"every plugin of {self._group}", f"{type(error).__name__}: {message_of(error)}"))
            return ()

    def _load(self, point: EntryPoint) -> None:
        before = dict(self._entries)
        is_new = point.module not in sys.modules
        try:
            point.load()
            if is_new and self._entries == before:
                raise ValueError(f"{point.module} registers nothing")  # noqa: TRY301 - told like every other fault
        except Exception as error:  # a plugin must not cost the user the load
            self._entries = before
            what = f"the plugin {point.name} = {point.value} of {self._group}"
            emit(NotApplied(what, f"{type(error).__name__}: {message_of(error)}"))


def _origin(value: object) -> object:
    """The place in the source where a class or a function is defined; the value itself of anything else."""
    name = getattr(value, "__qualname__", None)
    return value if name is None else (value.__module__, name)
