"""Search of an object for modules, by attribute paths."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_PLAIN = (str, bytes, int, float, complex, type(None))
# Search depth. Chatterbox, XTTS and transformers' pipelines need two levels; a backend that holds such an object needs
# one or two more.
_DEPTH = 4


def find_modules(subject: object) -> dict[str, nn.Module]:
    """Return the outermost `nn.Module`s of an object, by their attribute path.

    Searches tuples, lists, sets, dictionaries and the attributes of other objects, four levels deep. Modules are not
    searched. The path of `subject` itself is "".
    """
    found = reachable_modules(subject)
    # `self.vocoder = self.model.vocoder` is an alias of a submodule.
    inside = {id(inner) for module in found.values() for inner in module.modules() if inner is not module}
    return {path: module for path, module in found.items() if id(module) not in inside}


def reachable_modules(subject: object) -> dict[str, nn.Module]:
    """Like `find_modules`, but include submodules of other modules that an attribute refers to."""
    from torch import nn

    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    queue: deque[tuple[str, object, int]] = deque([("", subject, 0)])
    while queue:
        path, value, depth = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[path] = value
        elif depth < _DEPTH:
            queue += [
                (f"{path}.{name}" if path else name, item, depth + 1)
                for name, item in members_of(value)
                if not isinstance(item, _PLAIN) and not isinstance(item, type)
            ]
    return found


def members_of(value: object) -> Iterator[tuple[str, Any]]:
    """Yield what a container or an object holds, with its name or index."""
    if callable(getattr(type(value), "__torch_function__", None)):
        return  # a class or a tensor
    if isinstance(value, dict):  # no other mappings, since reading a lazy one may load its content
        yield from [(str(key), item) for key, item in list(dict.items(value))]  # other threads may write to it
    elif isinstance(value, (tuple, list, set, frozenset, deque)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif not isinstance(value, ModuleType):
        yield from list(getattr(value, "__dict__", {}).items())
        for name in (name for cls in type(value).__mro__ for name in slots_of(cls)):
            with suppress(AttributeError):  # not set
                yield name, object.__getattribute__(value, name)  # a class's own __getattr__ may raise anything


def items_of(value: Any) -> Iterable[Any] | None:
    """Return what a mapping (transformers' ModelOutput too), a list, a tuple or a dataclass holds, else `None`."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return None


_LEVELS, _MOST_ITEMS = 3, 64
"""Limits of the search for what can be read once: levels of containers, and items of each."""


def can_be_read_once(values: Iterable[Any]) -> bool:
    """Check for iterators among values, and in containers and dataclasses among them. An open file is one, too."""
    level = list(values)
    with suppress(Exception):  # a proxy that is not bound raises at any question, and so may a user's mapping
        for _ in range(_LEVELS):
            if any(isinstance(value, (Iterator, AsyncIterator)) for value in level):
                return True
            level = [item for value in level for item in islice(items_of(value) or (), _MOST_ITEMS)]
    return False


def attributes_of(value: object) -> dict[str, Any]:
    """Return an object's attributes without running code of its class: a proxy that is not bound raises at any.

    Empty for a class with slots, of an extension module, or with a `__dict__` of its own that raises or is none.
    """
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:  # a class of the user's may raise anything
        return {}
    return found if isinstance(found, dict) else {}


def base_of(kind: type) -> Any:
    """Return `dict`, `list` or `tuple` if a class is one of them or derived from one, else `None`."""
    if issubclass(kind, dict):
        return dict
    return list if issubclass(kind, list) else tuple if issubclass(kind, tuple) else None


def slots_of(cls: type) -> tuple[str, ...]:
    """Return the names of the slots that a class itself declares."""
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in {"__dict__", "__weakref__"})
