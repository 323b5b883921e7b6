"""A transformer's blocks over a whole sequence by one kernel of ours (sequence.cpp). For CPUs with AMX, in bf16.

A flow's estimator (Chatterbox's S3Gen, CosyVoice, Matcha-TTS) has dozens of small blocks, and runs them at each step of
its solver. At a few hundred frames a third of such a block is attention, which torch does not multiply in AMX at these
sizes, and another third lies between the products. The kernel multiplies bf16 copies of the weights, with sums in fp32;
norms, softmax, GELU, and what one block hands to the next stay in fp32.

Anything but a plain call (a mask of another kind, another dtype, gradients, hooks inside) takes upstream's own forward.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages.base import BaseStage
from accelerate_tts.engine.stages.inductor import Weights
from accelerate_tts.engine.stages.intact import Inside
from accelerate_tts.engine.stages.native import multiplies_in_bf16, sequence_block
from accelerate_tts.engine.stages.precision import half_dtypes
from accelerate_tts.engine.stages.sequence_kernel import Described, anatomy_of, run
from accelerate_tts.engine.stages.swap import FUSED, ClassSwap, subclass_with
from accelerate_tts.engine.stages.tokens import parameters_of
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from typing import TypeGuard

    import torch
    from torch import nn

    from accelerate_tts.engine.plan import Part

__all__ = ["FusedSequenceStage"]

# What a block may be told that changes nothing in it: it has no norm that asks for the time.
_IGNORED = {"hidden_states", "attention_mask", "timestep"}


class FusedSequenceStage(BaseStage):
    """Serves the blocks of a transformer without a cache by one kernel, from bf16 copies of their weights."""

    name = "fused transformer blocks (bf16)"
    group = "transformer blocks"

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        if not has_matrix_unit():
            return "this processor has no AMX"
        return None if _blocks(part.module) else "no transformer's blocks that the kernel knows in it"

    def prepare(self, part: Part) -> ClassSwap:
        """See `Stage.prepare`. Builds the kernel.

        Raises:
            RuntimeError: torch's oneDNN may not use AMX.
        """
        sequence_block()
        if not multiplies_in_bf16():
            raise RuntimeError("torch's oneDNN does not use AMX here: is ONEDNN_MAX_CPU_ISA set?")
        fused = {block: _Fused(block, part.name) for block in _blocks(part.module)}
        return ClassSwap(list(fused), lambda block: fused[block].class_for(type(block)))


def has_matrix_unit() -> bool:
    """Whether the processor multiplies bf16 in tiles, and torch knows it."""
    import torch

    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return known is not None and bool(known()) and bool(half_dtypes("cpu"))


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if anatomy_of(inner) is not None]


class _Fused:
    """One block and what the kernel needs of it, made when first needed and anew when its weights were written."""

    only_tokens = False

    def __init__(self, block: Any, what: str) -> None:
        self._block = block
        self._attention = block.attn1
        self._what = f"the fused blocks of {what}"
        self._names: list[str] = []
        self._inside = Inside(block)
        self._processor = self._attention.processor
        # What was computed from the weights, and what tells when they were written: one pair, for threads.
        self._known: tuple[Weights, Described | None] = (Weights(block), None)

    def class_for(self, plain: Any) -> type:
        """The block's class while the change is on."""
        self._names = parameters_of(plain)

        def forward(_block: Any, *args: Any, **kwargs: Any) -> Any:
            result = self._sequence(args, kwargs)
            return plain.forward(self._block, *args, **kwargs) if result is None else result

        vars(forward)["__signature__"] = inspect.signature(plain.forward)
        cls = subclass_with(plain, forward, copies="bf16")
        setattr(cls, FUSED, self)
        return cls

    def copied(self) -> list[nn.Module]:
        """The linear layers whose copies could serve them by themselves: none, as the kernel's are in panels."""
        return []

    def _sequence(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """What the block makes of a sequence, or `None` if this call is upstream's business."""
        import torch

        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._block.training:
            return None
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        x, mask = named.get("hidden_states"), named.get("attention_mask")
        if len(args) > len(self._names) or not _is_sequence(x) or not (mask is None or _is_bias(mask, x)):
            return None
        if [name for name, value in named.items() if name not in _IGNORED and value is not None]:
            return None
        obstacle = self._inside.altered()
        if obstacle is None and self._attention.processor is not self._processor:
            obstacle = "its attention was given another processor"
        if obstacle is not None:
            emit(NotApplied(self._what, obstacle))
            return None
        described = self._describe()
        if described is None or x.shape[-1] != described.hidden:  # upstream's own error
            return None
        return run(described, x, None if mask is None else mask[:, 0])

    def _describe(self) -> Described | None:
        watched, described = self._known
        if described is None or watched.outdated():
            watched = Weights(self._block)  # before: what is written meanwhile is seen next time
            anatomy = anatomy_of(self._block)
            if anatomy is None:
                emit(NotApplied(self._what, "weights were exchanged for others, which the kernel does not know"))
                return None
            described = Described(anatomy)
            self._known = (watched, described)
        return described


def _is_sequence(x: Any) -> TypeGuard[torch.Tensor]:
    import torch

    return bool(
        type(x) is torch.Tensor
        and x.dtype == torch.float32
        and x.dim() == 3  # noqa: PLR2004
        and x.numel() > 0
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def _is_bias(mask: Any, x: torch.Tensor) -> bool:
    """Whether a mask is one number for each key, the same for all that look at it: what is hidden is not there."""
    import torch

    return bool(
        type(mask) is torch.Tensor
        and mask.dtype == torch.float32
        and mask.device.type == "cpu"
        and mask.shape == (x.shape[0], 1, x.shape[1])
    )
