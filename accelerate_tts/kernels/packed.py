"""What kernels for whole sequences have in common (packed_gemm.h): layers in panels, and which tensors they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate_tts.kernels.structs import STRUCTS

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import nn

__all__ = ["PANEL", "Kept", "Kernel", "are_plain", "is_fp32"]

PANEL = 64
"""What sizes must be multiples of: the kernels' products have so many columns."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that serves blocks of one kind, as `FusedSequenceStage` needs it.

    Attributes:
        name: What is served, in a few words.
        parts_of: A block's parts, or `None` if it is none that the kernel knows.
        described: What the kernel is told of a block, made from its parts.
        serve: What a block makes of a call's arguments, by name; `None` if they are upstream's business.
        watched: Places (an object and an attribute) that must hold the same as when the kernel was told.
    """

    name: str
    parts_of: Callable[[nn.Module], Any]
    described: Callable[[Any], Any]
    serve: Callable[[Any, dict[str, Any]], Any]
    watched: Callable[[Any], Iterable[tuple[Any, str]]] = field(default=lambda _block: ())


class Kept:
    """Copies of weights that a struct points to."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def pointer(self, tensor: torch.Tensor) -> int:
        """Where a copy of it lies."""
        import torch

        self._tensors.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return self._tensors[-1].data_ptr()

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ctypes.Structure:
        """A layer's weight, (outputs, inputs), in bf16 and in panels of 64 outputs, each [inputs / 2][64][2]."""
        import torch

        outputs, inputs = weight.shape
        panels = weight.to(torch.bfloat16).reshape(outputs // PANEL, PANEL, inputs // 2, 2).permute(0, 2, 1, 3)
        place = None if bias is None else self.pointer(bias)
        return STRUCTS["Dense"](w=self.pointer(panels), bias=place, outputs=outputs, inputs=inputs)


def are_plain(modules: Iterable[Any]) -> bool:
    """Whether all weights of modules are fp32, on the CPU, with memory of their own to copy, and biases of their size.

    torch adds a bias of any shape that can be broadcast; a kernel reads one number for each output.
    """
    import torch
    from torch import nn

    plain, modules = {torch.Tensor, nn.Parameter}, list(modules)  # not quantised or sharded

    def outputs(module: Any) -> int:  # a transposed convolution has them in the second place
        return int(module.out_channels if isinstance(module, nn.ConvTranspose1d) else module.weight.shape[0])

    return all(module.bias is None or tuple(module.bias.shape) == (outputs(module),) for module in modules) and all(
        type(tensor) in plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for module in modules
        for tensor in (module.weight, module.bias)
        if tensor is not None
    )


def is_fp32(tensor: Any, shape: Sequence[int] | None = None) -> bool:
    """Whether it is a plain fp32 tensor on the CPU, with something in it, and of a shape if one is given."""
    import torch

    return bool(
        type(tensor) is torch.Tensor
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        and (shape is None or tuple(tensor.shape) == tuple(shape))
    )
