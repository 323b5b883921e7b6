"""Limits of a tuning: its time budget, its precision and its cancellation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accelerate_tts.settings import Precision
from accelerate_tts.tuning.disturbance import Watcher
from accelerate_tts.tuning.policy import TuningPolicy, current_policy

if TYPE_CHECKING:
    from accelerate_tts.tuning.ledger import Ledger


@dataclass(frozen=True)
class Budget:
    """Time budget of a tuning.

    Attributes:
        seconds: The whole budget.
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
        seconds: The budget. After it no stage is begun, and a stage that runs over it is stopped.
        precision: Precision level.
        stopped: Asked before each stage; once it is true, everything is undone.
        policy: The policy of tuning.
        began: Called with the ledger before anything is changed.
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
        """Return the watcher for disturbances of a tuning that begins now."""
        import torch

        policy = self.policy
        return Watcher(policy.machine(), torch.get_num_threads(), min(policy.patience, self.seconds / 4))
