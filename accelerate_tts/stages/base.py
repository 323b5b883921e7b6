"""Base class with the defaults of most stages. `stages/protocol.py` has the protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.patching.class_swap import in_fused

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part, Which

__all__ = ["LEAST_FEW_ROWS", "BaseStage", "are_left_over"]


LEAST_FEW_ROWS = 0.05
"""Minimum share of the time. Below it, even twice the speed is less than `MARGIN`, and a trial costs seconds."""


class BaseStage:
    """A cheap stage without alternatives. It is tried on each part that takes at least 2 % of the time."""

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


def are_left_over(layers: list[nn.Module], module: nn.Module) -> bool:
    """Check that layers are left over beside fused blocks and have less than `LEAST_FEW_ROWS` of a module's weights.

    A layer's work grows with its weights, so speeding up such layers gains nothing.
    """
    everything = sum(weight.numel() for weight in module.parameters())
    some = sum(weight.numel() for layer in layers for weight in layer.parameters())
    return some < LEAST_FEW_ROWS * everything and bool(in_fused(module))
