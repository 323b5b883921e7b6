"""Registry of tuned objects: a tuning lives as long as the module it changed, and no longer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from accelerate_tts.locks import lock

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.tuning.findings import Tuning

__all__ = ["Keeper", "TuningMap", "drop_keeper", "keep", "keeper_of"]


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


def drop_keeper(module: nn.Module) -> None:
    """Take the keeper off a module. Harmless a second time."""
    vars(module).pop(_KEEPER, None)


class TuningMap:
    """Tunings by the identity of objects: it keeps neither alive, and objects need not be hashable.

    A tuning refers to the modules it changed, so a strong reference to it from here would keep a model for ever.
    """

    def __init__(self) -> None:
        self._lock = lock()
        self._entries: dict[int, tuple[weakref.ref[Any], tuple[weakref.ref[Tuning], ...]]] = {}

    def get(self, item: object) -> Tuning | None:
        """The last tuning of an object, or `None`."""
        tunings = self.all(item)
        return tunings[-1] if tunings else None

    def all(self, item: object) -> list[Tuning]:
        """Every tuning of an object, such as a backend that loaded a model and a vocoder one after the other."""
        entry = self._entries.get(id(item))
        if entry is None or entry[0]() is not item:
            return []
        return [tuning for reference in entry[1] if (tuning := reference()) is not None]

    def put(self, item: object, tuning: Tuning) -> None:
        """Remember how an object was tuned, beside what is known; one that takes no weak reference is passed over."""
        number = id(item)

        def gone(_reference: object) -> None:
            self._entries.pop(number, None)

        try:
            reference = weakref.ref(item, gone)
        except TypeError:  # a tuple or a class with slots: its modules are known, and that is enough
            return
        with self._lock:
            # Of one module the last tuning is the one in force: the one before was given up, or there was none.
            others = [] if _KEEPER in getattr(item, "__dict__", {}) else self.all(item)
            known = (*(weakref.ref(other) for other in others if other is not tuning), weakref.ref(tuning))
            self._entries[number] = (reference, known)

    def forget(self, tuning: Tuning) -> bool:
        """Forget a tuning for every object, and take it off the modules that kept it alive with all its copies.

        Returns:
            Whether it was known.
        """
        known = False
        with self._lock:
            for number, (item, references) in list(self._entries.items()):
                others = tuple(reference for reference in references if reference() is not tuning)
                if len(others) == len(references):
                    continue
                known = True
                if others:
                    self._entries[number] = (item, others)
                else:
                    del self._entries[number]
                own = getattr(item(), "__dict__", {})
                keeper = own.get(_KEEPER)
                if isinstance(keeper, Keeper) and keeper.tuning is tuning:
                    del own[_KEEPER]
        return known
