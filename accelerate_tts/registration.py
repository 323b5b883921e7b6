"""Registries of stages, systems and devices, from this package and from entry points of other packages."""

from __future__ import annotations

import pkgutil
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

from accelerate_tts.errors import described, shown
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from collections.abc import Generator
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(Generic[T]):
    """Values by name. Modules add their values when they are imported.

    Args:
        package: Package whose modules are all imported at the first read of the entries.
        group: Group of entry points by which other packages name modules with further values; "" for none.
    """

    def __init__(self, package: str, group: str = "") -> None:
        self._package = package
        self._group = group
        self._entries: dict[str, T] = {}
        self._asked: set[EntryPoint] = set()
        self._has_ours = False
        self._lock = rlock()

    def add(self, name: str, value: T) -> None:
        """Register a value. The same definition may be registered again, as when a notebook's cell runs again.

        Raises:
            ValueError: Another value has this name.
        """
        # Without the lock, to avoid a deadlock: a module is imported under its import lock, and `entries` imports
        # modules under this lock.
        known = self._entries.get(name)
        if known is not None and known != value and _origin(known) != _origin(value):
            raise ValueError(f"{shown(name)} is registered already, as {shown(known)}; choose another name")
        self._entries[name] = value

    def entries(self) -> dict[str, T]:
        """Return all registered values by name.

        A module of another package that cannot be imported, or registers nothing, causes a `NotApplied` event once.
        Values that it has registered before it failed are removed.
        """
        with self._lock:
            self._load_ours()
            for point in self._points():
                if point not in self._asked:
                    self._load(point)
                    self._asked.add(point)  # last, so that a load interrupted by Ctrl-C is repeated
            return dict(self._entries)

    def get(self, name: str) -> T | None:
        """Return the value of a name, or `None`. For hot paths: what is registered is found without the lock."""
        found = self._entries.get(name) if self._has_ours else None
        return self.entries().get(name) if found is None else found

    @contextmanager
    def scope(self, **instead: T) -> Generator[None, None, None]:
        """Restore the entries at the end of the scope. For tests.

        Args:
            **instead: Replacements of entries while open.
        """
        self._load_ours()  # a module imported inside the scope would not be imported again
        before = dict(self._entries), set(self._asked)
        try:
            self._entries = {**self._entries, **instead}
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
        except Exception as error:  # broken metadata of one package must not fail the user's load
            emit(NotApplied(f"every plugin of {self._group}", described(error)))
            return ()

    def _load(self, point: EntryPoint) -> None:
        before = dict(self._entries)
        is_new = point.module not in sys.modules
        try:
            point.load()
            if is_new and self._entries == before:
                raise ValueError(f"{point.module} registers nothing")  # noqa: TRY301 - reported like other faults
        except Exception as error:  # a plugin must not fail the user's load
            self._entries = before
            what = f"the plugin {point.name} = {point.value} of {self._group}"
            emit(NotApplied(what, described(error)))


def _origin(value: object) -> object:
    """Return the qualified name of a class or a function, or the value itself for other objects."""
    name = getattr(value, "__qualname__", None)
    return value if name is None else (value.__module__, name)
