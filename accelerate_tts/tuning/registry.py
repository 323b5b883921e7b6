"""Registry of tuned objects: a tuning lives as long as the module it changed, and no longer."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.tuning.findings import Tuning

_KEEPER = "_accelerate_tts_tuning"


class Keeper:
    """Attaches a tuning to the module that it changed, so that both have the same lifetime.

    It is None in a copy or a pickle of the module: those are untouched, and load without accelerate_tts.
    """

    __slots__ = ("tuning",)

    def __init__(self) -> None:
        self.tuning: Tuning | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, _memo: object) -> None:
        return None


def keep(module: nn.Module) -> Keeper:
    """Attach an empty keeper to a module."""
    keeper = vars(module)[_KEEPER] = Keeper()
    return keeper


def keeper_of(module: nn.Module) -> Keeper:
    """Return the keeper of a module."""
    return vars(module)[_KEEPER]  # type: ignore[no-any-return]


def drop_keeper(module: nn.Module) -> None:
    """Remove the keeper of a module. Idempotent."""
    vars(module).pop(_KEEPER, None)


class TuningMap:
    """Tunings by the identity of objects, with weak references to both. Objects need not be hashable.

    A tuning refers to the modules that it changed, so a strong reference to it would keep a model alive forever.
    """

    def __init__(self) -> None:
        self._lock = rlock()  # reentrant: an object that is freed here may undo its own tuning
        self._entries = IdentityMap[tuple[weakref.ref[Any], ...]]()

    def get(self, item: object) -> Tuning | None:
        """Return the last tuning of an object, or `None`."""
        tunings = self.all(item)
        return tunings[-1] if tunings else None

    def all(self, item: object) -> list[Tuning]:
        """Return all tunings of an object, such as a backend that loaded a model and a vocoder separately."""
        return [tuning for reference in self._entries.get(item) or () if (tuning := reference()) is not None]

    def put(self, item: object, tuning: Tuning) -> None:
        """Add a tuning of an object. An object without support for weak references is skipped."""
        # Without support: a tuple or a class with slots. Its modules are registered themselves.
        with self._lock, suppress(TypeError):
            # A module has one tuning: an earlier one was given up.
            others = [] if _KEEPER in getattr(item, "__dict__", {}) else self.all(item)
            known = (*(weakref.ref(other) for other in others if other is not tuning), weakref.ref(tuning))
            self._entries.put(item, known)

    def forget(self, tuning: Tuning) -> bool:
        """Remove a tuning from all objects, and from the modules that keep it alive.

        Returns:
            True if it was registered.
        """
        known = False
        with self._lock:
            for item, references in self._entries.items():
                others = tuple(reference for reference in references if reference() is not tuning)
                if len(others) == len(references):
                    continue
                known = True
                if others:
                    self._entries.put(item, others)
                else:
                    self._entries.remove(item)
                own = getattr(item, "__dict__", {})
                keeper = own.get(_KEEPER)
                if isinstance(keeper, Keeper) and keeper.tuning is tuning:
                    del own[_KEEPER]
        return known
