"""Defaults that most stages share. `stages/protocol.py` has the protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.patching.class_swap import in_fused

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part, Which

__all__ = ["LEAST_FEW_ROWS", "BaseStage", "are_left_over"]


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


def are_left_over(layers: list[nn.Module], module: nn.Module) -> bool:
    """Whether layers are what is left beside fused blocks, with next to nothing of a module's weights in them.

    A layer's work is its weights times what it is given: of so little, not even twice the speed would be a gain.
    """
    everything = sum(weight.numel() for weight in module.parameters())
    some = sum(weight.numel() for layer in layers for weight in layer.parameters())
    return some < LEAST_FEW_ROWS * everything and bool(in_fused(module))
