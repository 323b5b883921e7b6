"""Map from objects to values by identity, with weak references to the objects. They need not be hashable."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class IdentityMap(Generic[T]):
    """Values of objects, each as long as its object lives. Usable from any thread, and without a lock.

    Each change is one operation of a `dict`. The id of an object is not reused before its entry is removed, since
    Python calls back for a weak reference before it frees the object.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], T]] = {}

    def get(self, item: object) -> T | None:
        """Return the value of an object, or `None`."""
        entry = self._entries.get(id(item))
        return None if entry is None else entry[1]

    def put(self, item: object, value: T) -> None:
        """Set the value of an object.

        Raises:
            TypeError: The object's class does not support weak references.
        """
        self._entries[id(item)] = self._entry(item, value)

    def setdefault(self, item: object, make: Callable[[], T]) -> T:
        """Return the value of an object, after making it if there is none. One of several threads makes it.

        Raises:
            TypeError: The object's class does not support weak references.
        """
        entry = self._entries.get(id(item))
        return (entry or self._entries.setdefault(id(item), self._entry(item, make())))[1]

    def items(self) -> Iterator[tuple[Any, T]]:
        """Iterate over the live objects and their values; other threads may change the map meanwhile."""
        for reference, value in list(self._entries.values()):
            if (item := reference()) is not None:
                yield item, value

    def remove(self, item: object) -> None:
        """Remove an object, if it is there."""
        self._entries.pop(id(item), None)

    def clear(self) -> None:
        """Remove all objects."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _entry(self, item: object, value: T) -> tuple[weakref.ref[Any], T]:
        return weakref.ref(item, partial(self._forget, id(item))), value

    def _forget(self, number: int, _reference: object) -> None:
        self._entries.pop(number, None)
