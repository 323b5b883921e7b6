"""Places that a load function binds to the modules it makes, beside its own object: restored after a second call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from accelerate_tts.inspection.object_tree import attributes_of, find_modules, slots_of

_DEPTH = 4  # as `find_modules` searches
_LEAVES = (nn.Module, type, ModuleType, FunctionType, str, bytes, int, float, complex, type(None))
_ITEMS = (list, set, deque, tuple, frozenset)
_MISSING = object()


class Bindings:
    """The global variables of a function, its class's attributes, and what these, its closure and its object hold.

    Containers and objects are searched four levels deep: `MODELS["voice"]`, `self.state.model`.

    Args:
        function: The function.
        kind: The class of its object, or `None`.
        held: The attributes of its object. These themselves are not among the places.
    """

    def __init__(self, function: Any, kind: type | None, held: Mapping[str, Any]) -> None:
        cells = [_cell(cell) for cell in getattr(function, "__closure__", None) or ()]
        classes = [cls for cls in getattr(kind, "__mro__", ()) if cls is not object]
        self._before: list[tuple[Any, Any]] = [(cls, dict(vars(cls))) for cls in classes]
        roots = [*cells, *held.values(), *(value for _, content in self._before for value in content.values())]
        self._collect([getattr(function, "__globals__", None), *roots])

    def _collect(self, roots: Iterable[Any]) -> None:
        pending, seen = deque((root, 0) for root in roots), set[int]()
        while pending:
            value, depth = pending.popleft()
            if id(value) in seen or issubclass(type(value), _LEAVES):  # not `isinstance`, at which a proxy may raise
                continue
            seen.add(id(value))
            content = _content(value)
            if content is not None:
                self._before.append((value, content))
                if depth < _DEPTH:
                    inner = content.values() if isinstance(content, dict) else content
                    pending += [(item, depth + 1) for item in inner]

    def restore(self, made: Mapping[str, nn.Module] | None) -> None:
        """Bind as before what is bound to modules of a second call.

        Args:
            made: The modules that the call has loaded. `None` if it failed: all other modules than before count.
        """
        fresh = None if made is None else {inner for module in made.values() for inner in module.modules()}
        for holder, before in self._before:
            now = _content(holder)
            if isinstance(before, dict) and isinstance(now, dict):
                for name, value in now.items():
                    earlier = before.get(name, _MISSING)
                    if value is not earlier and _holds(value, fresh):
                        _bind(holder, name, earlier)
            elif list(map(id, now or ())) != list(map(id, before)) and _holds(now, fresh):
                holder.clear()
                (holder.update if isinstance(holder, set) else holder.extend)(before)


def _content(value: Any) -> Any:
    """Copy what a container, an object or a class holds: a dictionary, or a list of items."""
    kind = type(value)
    try:
        if issubclass(kind, dict):
            return dict(dict.items(value))  # not by the methods of a subclass, which may load what it holds
        if issubclass(kind, _ITEMS):
            return list(value)
    except Exception:  # a class of the user's, or another thread that adds to it meanwhile
        return None
    if issubclass(kind, type):
        return dict(vars(value))
    found = dict(attributes_of(value))
    for name in (name for cls in kind.__mro__ for name in slots_of(cls)):
        with suppress(AttributeError):  # not set
            found[name] = object.__getattribute__(value, name)
    return found


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _holds(value: Any, modules: set[nn.Module] | None) -> bool:
    found = find_modules(value).values()
    return bool(found) if modules is None else any(inner in modules for module in found for inner in module.modules())


def _bind(holder: Any, name: Any, value: Any) -> None:
    if issubclass(type(holder), dict):
        if value is _MISSING:
            del holder[name]
        else:
            holder[name] = value
    elif value is _MISSING:
        delattr(holder, name)
    else:
        setattr(holder, name, value)
