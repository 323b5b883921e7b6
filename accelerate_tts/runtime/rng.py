"""Saved states of all random number generators that a call may use."""

from __future__ import annotations

import random
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from accelerate_tts.inspection.object_tree import attributes_of, base_of
from accelerate_tts.runtime.seeding import other_threads, sources_of, without_collection

_MOMENT = 0.02
"""Seconds for which other threads are watched before a generator is put back. Nobody waits for it but a second attempt.
"""


class _Kept(NamedTuple):
    get: Callable[[], Any]
    put: Callable[[Any], object]
    state: Any


def random_states(given: tuple[Any, ...]) -> Callable[[], None]:
    """Save the states of all random number generators, and return a function that restores them.

    The function leaves those alone from which another thread is seen to draw: it would be given numbers twice, and the
    caller does not have its own numbers to itself in any case.

    Args:
        given: Arguments of a call, and its object. Generators among them and in their attributes are included.
    """
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    restore = [_kept(source.get, source.put) for source in sources_of(_devices_in_use(torch)).values()]
    restore += _generators_in(given, numpy, torch)

    def put_back() -> None:
        alone = restore
        if other_threads():
            states = [each.get() for each in restore]
            time.sleep(_MOMENT)
            alone = [each for each, state in zip(restore, states, strict=True) if _same(each.get(), state)]
        for each in alone:
            each.put(each.state)

    return put_back


def _devices_in_use(torch: Any) -> list[str]:
    if torch is None:
        return []
    used = {
        "cuda": torch.cuda.is_initialized(),
        "mps": torch.backends.mps.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_initialized(),
    }
    return [device for device, is_used in used.items() if is_used]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, (tuple, list)):
        return all(map(_same, one, other))
    return bool((one == other).all()) if hasattr(one, "shape") else bool(one == other)


_MOST_LOOKED_AT, _DEEPEST = 256, 3
_PLAIN = (str, bytes, int, float, complex, type, types.FunctionType, types.ModuleType, type(None))


def _generators_in(given: tuple[Any, ...], numpy: Any, torch: Any) -> list[_Kept]:
    """Return the generators among the arguments, their attributes and items."""
    found: list[_Kept] = []
    seen: set[int] = set()
    level = list(given)
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for item in level:
            kind = type(item)  # not isinstance, which would resolve a proxy, and an unbound one raises
            if issubclass(kind, _PLAIN) or id(item) in seen or len(seen) >= _MOST_LOOKED_AT:
                continue
            seen.add(id(item))
            kept = _of_generator(item, kind, numpy, torch)
            if kept is not None:
                found.append(kept)
            elif (base := base_of(kind)) is dict:  # the base's methods, since those of a user's class may raise
                inner += list(dict.values(item))[:_MOST_LOOKED_AT]
            elif base is not None:
                inner += islice(base.__iter__(item), _MOST_LOOKED_AT)
            elif torch is None or not issubclass(kind, torch.Tensor):
                # A module's tensors and submodules are in dictionaries of their own, which hold no generators.
                inner += [value for name, value in list(attributes_of(item).items()) if name not in _OF_MODULES]
        level = inner
    return found


_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules"})


def _of_generator(item: Any, kind: type, numpy: Any, torch: Any) -> _Kept | None:
    """Return a generator and its state; `None` for any other object, and for a generator without a state."""
    with suppress(Exception):  # such as NotImplementedError of a user's class over a device
        return _with_state(item, kind, numpy, torch)
    return None


def _with_state(item: Any, kind: type, numpy: Any, torch: Any) -> _Kept | None:
    if issubclass(kind, random.Random):
        return None if issubclass(kind, random.SystemRandom) else _kept(item.getstate, item.setstate)
    if torch is not None and issubclass(kind, torch.Generator):
        return _kept(partial(without_collection, item.get_state), item.set_state)
    if numpy is not None and issubclass(kind, numpy.random.RandomState):
        return _kept(item.get_state, item.set_state)
    if numpy is not None and issubclass(kind, numpy.random.Generator):
        bits = item.bit_generator
        return _kept(lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def _kept(get: Callable[[], Any], put: Callable[[Any], object]) -> _Kept:
    return _Kept(get, put, get())
