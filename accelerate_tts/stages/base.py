"""Base class with the defaults of most stages. `stages/protocol.py` has the protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from accelerate_tts.kernels.weight_formats import FORMATS, formats_under
from accelerate_tts.patching.class_swap import in_fused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from accelerate_tts.kernels.weight_formats import WeightFormat
    from accelerate_tts.plan import Part, TimedCalls
    from accelerate_tts.settings import Precision
    from accelerate_tts.stages.protocol import Stage, State, Target

LEAST_FEW_ROWS = 0.05
"""Minimum share of the time. Below it, even twice the speed is less than `MARGIN`, and a trial costs seconds."""


class BaseStage:
    """A cheap stage without alternatives. It is tried on each part that takes at least 2 % of the time.

    Subclasses declare where they belong, which the catalogue reads. `Stage` describes the attributes that a trial
    reads.

    Attributes:
        name: Name of the stage. For a class with several variants, the name by which other stages refer to all of them.
        devices: torch's names of the device types that it supports; empty for all.
        precisions: Values of `Settings.precision` under which it is tried.
        needs_compiler: True if it needs torch.compile. Of a stage that is made, also if it imports the compiler only.
        after: Names of stages that are tried before this one. Unknown names are allowed, since they may belong to a
            package that is not installed.
        before: Names of stages that are tried after this one. Meant for stages of other packages; in this package, the
            later stage declares `after`.
    """

    name: str = ""
    devices: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ("exact", "balanced", "fast")
    needs_compiler: bool = False
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    least_share: float = 0.02
    group: str = ""
    cost: float = 0.0
    process: bool = False
    times: TimedCalls = "loop"
    excluded_by: tuple[State, ...] = ()
    superseded_by: tuple[str, ...] = ()
    passes: int = 2

    @classmethod
    def variants(cls, target: Target) -> Iterable[Stage]:
        """Return the stages of this class that are tried on `target`, in order. By default one without arguments.

        Args:
            target: The device, the precision and the compiler's mode. `devices`, `precisions` and `needs_compiler`
                are checked before.
        """
        del target
        return (cast("Stage", cls()),)

    def cost_of(self, part: Part) -> float:
        del part
        return self.cost


def are_left_over(layers: list[nn.Module], module: nn.Module) -> bool:
    """Check that layers are left over beside fused blocks and have less than `LEAST_FEW_ROWS` of a module's weights.

    A layer's work grows with its weights, so speeding up such layers gains nothing.
    """
    everything = sum(weight.numel() for weight in module.parameters())
    some = sum(weight.numel() for layer in layers for weight in layer.parameters())
    return some < LEAST_FEW_ROWS * everything and bool(in_fused(module))


class FormatStage(BaseStage):
    """A stage whose kernel reads weights in one of several formats; each format is a variant of its own.

    Args:
        weights: Format in which the kernel reads the weights.
    """

    @classmethod
    def variants(cls, target: Target) -> Iterable[Stage]:
        """See `BaseStage.variants`: one for each format, the fewest bytes first."""
        return cast("Iterable[Stage]", map(cls, formats_under(target.precision)))  # a subclass is a whole stage

    def __init__(self, weights: WeightFormat = "fp32") -> None:
        smaller = FORMATS[: FORMATS.index(weights)]
        self.superseded_by = tuple(f"{self.name} ({weights})" for weights in smaller)
        self.name = f"{self.name} ({weights})"
        self._weights: WeightFormat = weights
