"""What most stages and changes have in common, as defaults to override. The protocols are in `stages/__init__`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate_tts.engine.capture import Which
    from accelerate_tts.engine.plan import Part

__all__ = ["LEAST_FEW_ROWS", "BaseChange", "BaseStage"]


LEAST_FEW_ROWS = 0.05
"""Of less, not even twice the speed would be a gain that counts (`MARGIN`); a trial takes seconds."""


class BaseStage:
    """A cheap stage without alternatives, tried on each part that takes 2 % of the time."""

    least_share: float = 0.02
    group: str = ""
    cost: float = 0.0
    process: bool = False
    times: Which = "loop"
    spared_by: tuple[str, ...] = ()

    def cost_of(self, part: Part) -> float:
        """See `Stage.cost_of`."""
        del part
        return self.cost


class BaseChange:
    """A change that compiles nothing."""

    @property
    def graphs(self) -> int | None:
        """Graphs compiled so far; none, ever."""
        return None

    def seal(self) -> None:
        """Nothing is compiled."""
