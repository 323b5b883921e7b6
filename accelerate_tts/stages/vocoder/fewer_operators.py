"""Parts of known classes, computed in fewer operators. For CPUs.

`vits.py` and `hifigan.py` implement the classes. Parts that decide lengths belong to another stage
(`checked_lengths.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from accelerate_tts.patching.class_swap import ClassSwap
from accelerate_tts.plan import CALL
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.layers.fused_sequence import Served
from accelerate_tts.stages.vocoder.hifigan import hifigan
from accelerate_tts.stages.vocoder.vits import FLOW

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate_tts.kernels.packed import Kernel
    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Target


@register_stage
class FewerOperatorsStage(BaseStage):
    """Computes a whole part by an implementation of its class in fewer operators.

    Args:
        kernels: Implementations, each of one class.
        copies: Format of their copies of the weights.
    """

    name = "fewer operators"
    devices = ("cpu",)
    # Before all other stages that change parts, since a fused part is not tried again piece by piece.
    after = ("fold weight norm", "one OpenBLAS thread")

    @classmethod
    def variants(cls, target: Target) -> Iterable[FewerOperatorsStage]:
        """See `BaseStage.variants`: one to rounding, and one for each half precision that there are kernels for."""
        yield cls((FLOW, hifigan()))
        for dtype in target.half_dtypes:
            yield cls((hifigan(dtype),), str(dtype).removeprefix("torch."))

    def __init__(self, kernels: tuple[Kernel, ...], copies: str = "fp32") -> None:
        if copies != "fp32":
            self.name = f"{self.name} ({copies})"
        self._kernels = kernels
        self._copies = copies

    def applies(self, part: Part) -> str | None:
        if part.decides or part.method != CALL:
            return "lengths hang on it" if part.decides else f"it is run by .{part.method}()"
        return None if self._kernel(part) is not None else "no class that is known in fewer operators"

    def _kernel(self, part: Part) -> Kernel | None:
        return next((kernel for kernel in self._kernels if kernel.parts_of(part.module) is not None), None)

    def prepare(self, part: Part) -> ClassSwap:
        served = Served(part.module, cast("Kernel", self._kernel(part)), part.name, self._copies)
        return ClassSwap([part.module], lambda module: served.class_for(type(module)))
