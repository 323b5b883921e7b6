"""Blocks of a flow-matching estimator, each as one kernel call (transformer_block.cpp, residual_block.cpp). bf16, AMX.

An estimator (Chatterbox's S3Gen, CosyVoice, Matcha-TTS) has dozens of small blocks and runs them at each step of its
solver. At a few hundred frames, a third of its time is attention, for which torch does not use AMX at these sizes;
another third is spent between the matrix products. The kernels multiply bf16 copies of the weights with sums in fp32.
Norms, softmax, activations and the outputs of blocks stay in fp32.

Calls with another kind of mask, another dtype, gradients or hooks inside take upstream's own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.device.half_dtypes import half_dtypes
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.kernels.calls import multiplies_in_bf16
from accelerate_tts.kernels.library import missing
from accelerate_tts.kernels.residual_block import RESIDUAL
from accelerate_tts.kernels.transformer_block import TRANSFORMER
from accelerate_tts.patching.class_swap import FUSED, ClassSwap, fused_by, subclass_with
from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode.call_args import Obstacles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from accelerate_tts.kernels.packed import Kernel
    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Target

KERNELS = (TRANSFORMER, RESIDUAL)
"""Kernels for whole sequences. Each makes a stage of its own."""


@register_stage
class FusedSequenceStage(BaseStage):
    """Computes blocks of one kind by one kernel call for a whole sequence, from bf16 copies of their weights."""

    name = "fused sequence blocks"
    devices = ("cpu",)
    precisions = ("balanced", "fast")
    after = ("bf16 prompts",)

    @classmethod
    def variants(cls, target: Target) -> Iterable[FusedSequenceStage]:
        del target
        return map(cls, KERNELS)

    def __init__(self, kernel: Kernel) -> None:
        self.name = f"fused {kernel.name} (bf16)"
        self._kernel = kernel

    def applies(self, part: Part) -> str | None:
        if not has_matrix_unit():
            return "this processor has no AMX"
        if (reason := missing()) is not None:
            return reason
        return None if self._blocks(part) else f"no {self._kernel.name} that the kernel knows in it"

    def _blocks(self, part: Part) -> list[nn.Module]:
        return [inner for inner in part.module.modules() if self._kernel.parts_of(inner) is not None]

    def prepare(self, part: Part) -> ClassSwap:
        """See `Stage.prepare`.

        Raises:
            RuntimeError: The kernels do not use AMX.
        """
        if not multiplies_in_bf16():
            raise RuntimeError("the kernels do not use AMX here: does ACCELERATE_TTS_KERNELS limit them?")
        obstacles = Obstacles(f"the fused {self._kernel.name} of {part.name}")
        fused = {
            block: Served(block, self._kernel, part.name, obstacles=obstacles, number=number)
            for number, block in enumerate(self._blocks(part))
        }
        return ClassSwap(list(fused), lambda block: fused[block].class_for(type(block)))


def has_matrix_unit() -> bool:
    """Check that the processor has AMX tiles for bf16, and that torch reports them."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return known is not None and bool(known()) and bool(half_dtypes("cpu"))


class Served:
    """One block and the kernel's description of it, which is rebuilt when the weights were written.

    Args:
        block: The block.
        kernel: The kernel that computes it.
        what: Name of its part in events.
        copies: Format of the kernel's copies of the weights.
        obstacles: Reports why a block is not served; shared by the blocks of a part.
        number: The block's index among them.
    """

    only_tokens = False

    def __init__(  # noqa: PLR0913 - a kernel, a block, and its reports
        self,
        block: nn.Module,
        kernel: Kernel,
        what: str,
        copies: str = "bf16",
        *,
        obstacles: Obstacles | None = None,
        number: int = 0,
    ) -> None:
        self._block: Any = block
        self._copies = copies
        self._kernel = kernel
        self._obstacles, self._number = obstacles or Obstacles(f"the fused {kernel.name} of {what}"), number
        self._inside = Inside(block, kernel.watched(block))
        # The watch on the weights and the description made from them. One pair, replaced atomically.
        self._known: tuple[WeightWatch, Any] = (WeightWatch(block), None)

    def class_for(self, plain: Any) -> type:
        """Return the block's class while the change is on."""
        names = parameters_of(plain)

        def forward(_block: Any, *args: Any, **kwargs: Any) -> Any:
            if is_traced() or fused_by(self._block) is not self:  # undone; somebody has kept this forward
                return plain.forward(self._block, *args, **kwargs)
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            result = self.serve(named) if len(args) <= len(names) else None
            return plain.forward(self._block, *args, **kwargs) if result is None else result

        cls = subclass_with(plain, forward, copies=self._copies)
        setattr(cls, FUSED, self)
        return cls

    def copied(self) -> list[nn.Module]:
        """Return the layers whose copies could be used outside the kernel: none, since they are packed in panels."""
        return []

    @property
    def described(self) -> Any:
        """Description that was last built for the kernel."""
        return self._known[1]

    def serve(self, named: dict[str, Any]) -> Any:
        """Return the block's result for a call's arguments, or `None` if upstream's forward must run."""
        if torch.is_grad_enabled() or self._block.training or is_traced():
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        obstacle = self._inside.altered()
        if obstacle is not None:
            self._obstacles.report(obstacle, self._number)
            return None
        described = self._describe()
        if described is None:
            return None
        self._obstacles.served(self._number)
        return self._kernel.serve(described, named)

    def _describe(self) -> Any:
        watched, described = self._known
        if described is None or watched.outdated():
            watched = WeightWatch(self._block)  # first the watch, so that a concurrent write is seen next time
            parts = self._kernel.parts_of(self._block)
            if parts is None:
                reason = "weights were exchanged for others, which the kernel does not know"
                self._obstacles.report(reason, self._number)
                return None
            with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors, since they outlive this call
                described = self._kernel.described(parts)
            self._known = (watched, described)
        return described
