"""Limits of a tuning: how long it may take, what it may change, and who may stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accelerate_tts.settings import Precision
from accelerate_tts.tuning.disturbance import Watcher
from accelerate_tts.tuning.policy import TuningPolicy, current_policy

if TYPE_CHECKING:
    from accelerate_tts.tuning.ledger import Ledger

__all__ = ["Budget", "Limits"]


@dataclass(frozen=True)
class Budget:
    """A tuning's time.

    Attributes:
        seconds: All of it.
        deadline: Its end, in seconds of the clock.
        clock: Seconds.
    """

    seconds: float
    deadline: float
    clock: Callable[[], float]

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - self.clock()


@dataclass(frozen=True)
class Limits:
    """Limits of tuning.

    Attributes:
        seconds: The budget; no further stage is begun after it, and one that ran over it is given up.
        precision: Precision level.
        stopped: Asked before each stage; once it is true, everything is undone.
        policy: The policy of tuning.
        began: Given the ledger of what is being tuned, before anything is changed.
    """

    seconds: float
    precision: Precision = "exact"
    stopped: Callable[[], bool] = lambda: False
    policy: TuningPolicy = field(default_factory=current_policy)
    began: Callable[[Ledger], object] = bool

    def budget(self) -> Budget:
        """Return the budget of a tuning that begins now."""
        clock = self.policy.clock
        return Budget(self.seconds, clock() + self.seconds, clock)

    def watcher(self) -> Watcher:
        """Tells how disturbed the machine is, for a tuning that begins now."""
        import torch

        policy = self.policy
        return Watcher(policy.machine(), torch.get_num_threads(), min(policy.patience, self.seconds / 4))
