"""Common parts of the kernels for whole sequences: weights packed in panels (packed_gemm.h), and checks of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.tracing import is_plain
from accelerate_tts.kernels.structs import STRUCTS

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterable, Sequence

PANEL = 64
"""Outputs of a panel. Sizes of supported layers are multiples of it."""


@dataclass(frozen=True)
class Kernel:
    """A kernel for blocks of one kind, as `FusedSequenceStage` uses it.

    Attributes:
        name: Kind of blocks, for people.
        parts_of: Returns the parts of a block, or `None` if the kernel does not support it; see `of_class`.
        described: Makes the kernel's description of a block from its parts.
        serve: Computes a block's result from the description and the named arguments; `None` if upstream must run.
        watched: Returns pairs of an object and an attribute's name that must not change after the description is made.
    """

    name: str
    parts_of: Callable[[nn.Module], Any]
    described: Callable[[Any], Any]
    serve: Callable[[Any, dict[str, Any]], Any]
    watched: Callable[[Any], Iterable[tuple[Any, str]]] = field(default=lambda _block: ())


def of_class(name: str, taken_apart: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
    """Make the `parts_of` of a kernel for blocks of one class. Shapes do not show what else another class computes.

    Args:
        name: Name of the class.
        taken_apart: Returns the parts of such a block, or `None`. It may raise on a release with another structure.
    """

    def parts_of(block: nn.Module) -> Any:
        if plain_class(block).__name__ != name:
            return None
        try:
            return taken_apart(block)
        except (AttributeError, IndexError, TypeError, ValueError):
            return None

    return parts_of


class Kept:
    """Holder of the weight copies that a struct points to."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def pointer(self, tensor: torch.Tensor) -> int:
        """Copy a tensor and return the address of the copy."""
        self._tensors.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return self._tensors[-1].data_ptr()

    def norms(self, first: Any, second: Any) -> dict[str, Any]:
        """Copy two LayerNorms and return their fields of a struct."""
        return {
            "eps1": first.eps, "norm1": self.pointer(first.weight), "norm1_bias": self.pointer(first.bias),
            "eps2": second.eps, "norm2": self.pointer(second.weight), "norm2_bias": self.pointer(second.bias),
        }  # fmt: skip

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ctypes.Structure:
        """Pack a weight, (outputs, inputs), into bf16 panels of 64 outputs, each [inputs / 2][64][2]."""
        outputs, inputs = weight.shape
        panels = weight.to(torch.bfloat16).reshape(outputs // PANEL, PANEL, inputs // 2, 2).permute(0, 2, 1, 3)
        place = None if bias is None else self.pointer(bias)
        return STRUCTS["Dense"](w=self.pointer(panels), bias=place, outputs=outputs, inputs=inputs)


def are_plain(modules: Iterable[Any]) -> bool:
    """Check that all weights of modules are plain fp32 tensors on the CPU, and biases have one number for each output.

    torch broadcasts biases of other shapes; a kernel does not.
    """
    modules = list(modules)

    def outputs(module: Any) -> int:  # the weight of a transposed convolution has them as its second dimension
        return int(module.out_channels if isinstance(module, nn.ConvTranspose1d) else module.weight.shape[0])

    return all(module.bias is None or tuple(module.bias.shape) == (outputs(module),) for module in modules) and all(
        is_plain(tensor) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for module in modules
        for tensor in (module.weight, module.bias)
        if tensor is not None
    )


def is_fp32(tensor: Any, shape: Sequence[int] | None = None) -> bool:
    """Check for a plain, non-empty fp32 tensor on the CPU, of the given shape if there is one."""
    return bool(
        is_plain(tensor)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        and (shape is None or tuple(tensor.shape) == tuple(shape))
    )
