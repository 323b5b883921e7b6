"""Findings of a tuning or of a warm pack, and the `Tuning` that a loaded object keeps of them."""

from __future__ import annotations

import platform
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from accelerate_tts._version import __version__
from accelerate_tts.plan import PROCESS, Part
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.tuning.ledger import AppliedChange, switch_off

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from accelerate_tts.patching.lazy_parameters import WeightOffloader
    from accelerate_tts.runtime.guard.checks import Expectation
    from accelerate_tts.stages.protocol import Change


@dataclass(frozen=True)
class Findings:
    """The changes in force, and the facts for their receipt.

    Attributes:
        facts: Values of the receipt's attributes, by their names.
        notes: Notes of the receipt.
        kept: The changes in force.
        complete: False if the warm-up failed, or there was none: it may be tried again.
        parts: Parts that the model was divided into.
        expected: Outputs of the untouched object's `@inference` functions for the warm-up.
    """

    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    kept: tuple[AppliedChange, ...] = ()
    complete: bool = False
    parts: tuple[Part, ...] = ()
    expected: Mapping[str, Expectation] = field(default_factory=dict)

    def receipt(self, *notes: str) -> Receipt:
        """Make the receipt.

        Args:
            notes: Further notes, on what is done with the object afterwards.
        """
        return Receipt(**self.facts, notes=(*self.notes, *notes))

    def tuning(self, *notes: str, offloader: WeightOffloader | None = None) -> Tuning:
        """Make the tuning that the object keeps.

        Args:
            notes: As for `receipt`.
            offloader: Original weights that are offloaded or freed while copies serve.
        """
        changes = tuple(kept.change for kept in self.kept)
        return Tuning(self.receipt(*notes), changes, self.complete, self.kept, self.expected, offloader)


@dataclass(frozen=True)
class Tuning:
    """A finished tuning: its receipt and the changes in force.

    Attributes:
        receipt: Verdicts on all stages that were tried.
        changes: The changes in force.
        complete: False if the warm-up failed, or there was none: it may be tried again.
        kept: The changes again, with the part and the stage of each.
        expected: Outputs of the untouched object's `@inference` functions for the warm-up.
        offloader: Original weights that are offloaded or freed while copies serve, if `guard_weights` asks for it.
    """

    receipt: Receipt
    changes: tuple[Change, ...] = ()
    complete: bool = False
    kept: tuple[AppliedChange, ...] = ()
    expected: Mapping[str, Expectation] = field(default_factory=dict)
    offloader: WeightOffloader | None = None

    def undo(self) -> None:
        """Put the object back exactly as it was loaded.

        Raises:
            ReloadError: Its weights were freed and cannot be reloaded. Nothing is changed then.
        """
        self.keep_loaded()
        switch_off(reversed(self.changes))

    def on(self) -> None:
        """Switch every change of the object on again."""
        for change in self._of_object():
            change.on()

    def off(self) -> None:
        """Switch the changes of the object off. Changes of the process compute the same, and stay.

        The caller must hold the original weights `at_hand` until the changes are `on` again.
        """
        switch_off(reversed(self._of_object()))

    def at_hand(self) -> object:
        """Reload the original weights and keep them as long as the returned object lives. May take as long as the load.

        Raises:
            ReloadError: As for `undo`.
        """
        return None if self.offloader is None else self.offloader.at_hand()

    def keep_loaded(self) -> None:
        """Reload the original weights and keep them.

        Raises:
            ReloadError: As for `undo`.
        """
        if self.offloader is not None:
            self.offloader.keep()

    def put_back(self) -> Receipt:
        """Return the receipt after the guard has undone the tuning for good."""
        reason = "undone by the guard: faulty output in service"
        stages = (s.dropped(reason) if s.kept and s.part != PROCESS else s for s in self.receipt.stages)
        return replace(self.receipt, stages=tuple(stages), notes=(*self.receipt.notes, reason))

    def of_process(self) -> list[Change]:
        """Return the changes of the process, in the order in which they were made."""
        found = {id(kept.change) for kept in self.kept if kept.part == PROCESS}
        return [change for change in self.changes if id(change) in found]

    def _of_object(self) -> list[Change]:
        of_process = set(map(id, self.of_process()))
        return [change for change in self.changes if id(change) not in of_process]


def recompile_counter(kept: Sequence[AppliedChange]) -> Callable[[], int]:
    """Return a function that counts the graphs compiled from now on."""
    # Weak references: a stored receipt must not keep the model's weights alive.
    changes = [applied.change for applied in kept if applied.change.graphs is not None]
    known = [weakref.ref(change) for change in changes]
    sealed = sum(change.graphs or 0 for change in changes)

    def count() -> int:
        alive = [change for reference in known if (change := reference()) is not None]
        return max(0, sum(change.graphs or 0 for change in alive) - sealed)

    return count


def versions() -> dict[str, str]:
    """Return the versions that a receipt names."""
    import torch

    return {"accelerate_tts": __version__, "torch": torch.__version__, "python": platform.python_version()}
