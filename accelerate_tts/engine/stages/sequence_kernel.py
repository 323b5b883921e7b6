"""What sequence.cpp is told, field by field: the structs, and the bf16 copies of a block's weights they point to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages.native import sequence_block
from accelerate_tts.engine.stages.swap import plain_class

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Anatomy", "Described", "anatomy_of", "run"]

_PANEL = 64
"""What heads must be wide, and all sizes multiples of: the kernel's products have so many columns."""

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Dense(ctypes.Structure):
    _fields_ = (("w", _POINTER), ("bias", _POINTER), ("outputs", _INTEGER), ("inputs", _INTEGER))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("hidden", "heads", "inner")),
        *((name, ctypes.c_double) for name in ("eps1", "eps2", "scaling")),
        *((name, _POINTER) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
        *((name, _Dense) for name in ("qkv", "o", "up", "down")),
    )


class _Call(ctypes.Structure):
    _fields_ = (("x", _POINTER), ("y", _POINTER), ("mask", _POINTER), ("batch", _INTEGER), ("length", _INTEGER))


@dataclass(frozen=True)
class Anatomy:
    """A block, taken apart."""

    heads: int
    norm1: Any
    norm2: Any
    q: Any
    k: Any
    v: Any
    o: Any
    up: Any
    down: Any

    def layers(self) -> list[Any]:
        """Its linear layers."""
        return [self.q, self.k, self.v, self.o, self.up, self.down]


# By class, since a class of another name may do something more that no shape shows. Matcha-TTS's block, which
# Chatterbox and CosyVoice have too; diffusers has one of the same name, with other parts.
_BLOCK, _ATTENTION, _LORA = "BasicTransformerBlock", "Attention", "LoRACompatibleLinear"
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0"}
# What makes of such a block another one than the kernel's, if it is anything but this.
_OF_BLOCK = {"use_ada_layer_norm": False, "use_ada_layer_norm_zero": False, "only_cross_attention": False,
             "attn2": None, "_chunk_size": None}  # fmt: skip
_OF_ATTENTION = {"spatial_norm": None, "group_norm": None, "norm_q": None, "norm_k": None, "norm_cross": None,
                 "residual_connection": False, "rescale_output_factor": 1.0}  # fmt: skip


def anatomy_of(block: nn.Module) -> Anatomy | None:
    """The block as the kernel needs it, or `None` if it is none that is known."""
    cls = plain_class(block)
    if cls.__name__ != _BLOCK or cls.__module__.startswith("diffusers."):
        return None
    try:
        return _taken_apart(block)
    except (AttributeError, IndexError, TypeError):
        return None  # a release in which it has another shape


def _taken_apart(block: Any) -> Anatomy | None:
    attention, feed = block.attn1, block.ff.net
    known = _is_as(block, _OF_BLOCK) and _is_as(attention, _OF_ATTENTION)
    of_diffusers = type(attention).__name__ == _ATTENTION and type(attention).__module__.startswith("diffusers.")
    gelu = feed[0]
    if (
        not known
        or not of_diffusers
        or type(attention.processor).__name__ not in _PROCESSORS
        or type(gelu).__name__ != "GELU"
        or gelu.approximate != "none"
        or len(feed) not in {3, 4}  # a dropout between the layers, and perhaps one at the end
    ):
        return None
    anatomy = Anatomy(
        attention.heads, block.norm1, block.norm3, attention.to_q, attention.to_k, attention.to_v,
        attention.to_out[0], gelu.proj, feed[2],
    )  # fmt: skip
    return anatomy if _can_be_served(anatomy) and attention.scale == _PANEL**-0.5 else None


def _is_as(module: Any, expected: dict[str, Any]) -> bool:
    return all(getattr(module, name, value) == value for name, value in expected.items())


def _can_be_served(anatomy: Anatomy) -> bool:
    import torch
    from torch import nn

    def is_linear(layer: Any) -> bool:
        cls: Any = plain_class(layer)  # diffusers' own is a plain one, unless it has an adapter
        return cls is nn.Linear or (cls.__name__ == _LORA and getattr(layer, "lora_layer", None) is None)

    def is_norm(norm: Any) -> bool:
        cls: Any = plain_class(norm)
        return cls is nn.LayerNorm and norm.weight is not None and norm.bias is not None

    if not (all(map(is_linear, anatomy.layers())) and is_norm(anatomy.norm1) and is_norm(anatomy.norm2)):
        return False
    tensors = [
        tensor
        for module in (*anatomy.layers(), anatomy.norm1, anatomy.norm2)
        for tensor in (module.weight, module.bias)
        if tensor is not None
    ]
    plain = {torch.Tensor, nn.Parameter}  # a quantised or sharded weight has no memory of its own to copy
    if not all(
        type(tensor) in plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    ):
        return False
    hidden, attended, inner = anatomy.norm1.weight.shape[0], anatomy.heads * _PANEL, anatomy.up.weight.shape[0]
    shapes = [*[(attended, hidden)] * 3, (hidden, attended), (inner, hidden), (hidden, inner)]
    return (
        [tuple(layer.weight.shape) for layer in anatomy.layers()] == shapes
        and tuple(anatomy.norm2.weight.shape) == tuple(anatomy.norm1.weight.shape) == (hidden,)
        and len({layer.bias is None for layer in (anatomy.q, anatomy.k, anatomy.v)}) == 1
        and hidden % _PANEL == inner % _PANEL == 0
    )


class Described:
    """A block's struct, and the tensors that it points to."""

    def __init__(self, anatomy: Anatomy) -> None:
        import torch

        self._kept: list[torch.Tensor] = []
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors: they outlive the tuning's own mode
            norm1, norm2 = anatomy.norm1, anatomy.norm2
            self._struct = _Block(
                hidden=norm1.weight.shape[0], heads=anatomy.heads, inner=anatomy.up.weight.shape[0],
                eps1=norm1.eps, eps2=norm2.eps, scaling=_PANEL**-0.5,
                norm1=self._pointer(norm1.weight), norm1_bias=self._pointer(norm1.bias),
                norm2=self._pointer(norm2.weight), norm2_bias=self._pointer(norm2.bias),
                qkv=self._dense(anatomy.q, anatomy.k, anatomy.v), o=self._dense(anatomy.o),
                up=self._dense(anatomy.up), down=self._dense(anatomy.down),
            )  # fmt: skip
        self.address = ctypes.addressof(self._struct)
        self.hidden: int = self._struct.hidden

    def _pointer(self, tensor: torch.Tensor) -> int:
        import torch

        self._kept.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return self._kept[-1].data_ptr()

    def _dense(self, *layers: Any) -> _Dense:
        """Layers of the same inputs, as one: in bf16, in panels of 64 outputs, each as [inputs / 2][64][2]."""
        import torch

        weight = torch.cat(tuple(layer.weight for layer in layers)).to(torch.bfloat16)
        outputs, inputs = weight.shape
        panels = weight.view(outputs // _PANEL, _PANEL, inputs // 2, 2).permute(0, 2, 1, 3)
        biases = tuple(layer.bias for layer in layers if layer.bias is not None)
        bias = self._pointer(torch.cat(biases)) if biases else None
        return _Dense(w=self._pointer(panels), bias=bias, outputs=outputs, inputs=inputs)


def run(block: Described, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A whole sequence through a block.

    Args:
        block: The block.
        x: (batch, length, hidden), fp32, on the CPU, with something in it.
        mask: (batch, length), fp32: what is added to the scores of each key; or `None`.

    Returns:
        As `x`.
    """
    import torch

    x = x.contiguous()
    y = torch.empty_like(x)
    seen = None if mask is None else mask.contiguous()
    call = _Call(x.data_ptr(), y.data_ptr(), None if seen is None else seen.data_ptr(), x.shape[0], x.shape[1])
    sequence_block()(block.address, ctypes.addressof(call), torch.get_num_threads())
    return y
