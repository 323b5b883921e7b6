"""Which object was tuned how: a tuning lives as long as the module it changed, and no longer."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.engine.tune import Tuning

__all__ = ["Keeper", "TuningMap", "keep", "keeper_of"]


_KEEPER = "_accelerate_tts_tuning"


class Keeper:
    """Hangs a tuning on the module that it changed, so that it lives as long as the module and no longer.

    In a copy or a pickle of the module it is None: those are untouched modules, and need no accelerate_tts to load.
    """

    __slots__ = ("tuning",)

    def __init__(self) -> None:
        self.tuning: Tuning | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, _memo: object) -> None:
        return None


def keep(module: nn.Module) -> Keeper:
    """Hang an empty keeper on a module."""
    keeper = vars(module)[_KEEPER] = Keeper()
    return keeper


def keeper_of(module: nn.Module) -> Keeper:
    """The keeper that hangs on a module."""
    return vars(module)[_KEEPER]  # type: ignore[no-any-return]


class TuningMap:
    """Tunings by the identity of objects: it keeps neither alive, and objects need not be hashable.

    A tuning refers to the modules it changed, so a strong reference to it from here would keep a model for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, tuple[weakref.ref[Any], weakref.ref[Tuning]]] = {}

    def get(self, item: object) -> Tuning | None:
        """The tuning of an object, or `None`."""
        entry = self._entries.get(id(item))
        return entry[1]() if entry is not None and entry[0]() is item else None

    def put(self, item: object, tuning: Tuning) -> None:
        """Remember how an object was tuned; one that cannot be referred to weakly is passed over."""
        number = id(item)

        def gone(_reference: object) -> None:
            self._entries.pop(number, None)

        try:
            reference = weakref.ref(item, gone)
        except TypeError:  # a tuple or a class with slots: its modules are known, and that is enough
            return
        with self._lock:
            self._entries[number] = (reference, weakref.ref(tuning))

    def forget(self, tuning: Tuning) -> None:
        """Forget a tuning for every object, and take it off the modules that kept it alive with all its copies."""
        with self._lock:
            for number in [key for key, entry in self._entries.items() if entry[1]() is tuning]:
                own = getattr(self._entries.pop(number)[0](), "__dict__", {})
                keeper = own.get(_KEEPER)
                if isinstance(keeper, Keeper) and keeper.tuning is tuning:
                    del own[_KEEPER]
