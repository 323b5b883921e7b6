"""Description of a transformer block for transformer_block.cpp, and checks of the blocks and calls that it supports."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.kernels.calls import transformer_block
from accelerate_tts.kernels.packed import PANEL, Kept, Kernel, are_plain, is_fp32, of_class
from accelerate_tts.kernels.structs import STRUCTS

_Block, _Call = STRUCTS["TransformerBlock"], STRUCTS["TransformerCall"]


@dataclass(frozen=True)
class _Parts:
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
        return [self.q, self.k, self.v, self.o, self.up, self.down]


# Matcha-TTS's block, also in Chatterbox and CosyVoice. diffusers has a block of the same name with other parts.
_BLOCK, _ATTENTION, _LORA = "BasicTransformerBlock", "Attention", "LoRACompatibleLinear"
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0"}
# Attributes that must have these values; with others, the block computes something else than the kernel.
_OF_BLOCK = {"use_ada_layer_norm": False, "use_ada_layer_norm_zero": False, "only_cross_attention": False,
             "attn2": None, "_chunk_size": None}  # fmt: skip
_OF_ATTENTION = {"spatial_norm": None, "group_norm": None, "norm_q": None, "norm_k": None, "norm_cross": None,
                 "residual_connection": False, "rescale_output_factor": 1.0, "scale": PANEL**-0.5}  # fmt: skip
# Supported arguments. The timestep has no effect, since these blocks have no adaptive norm.
_TOLD = {"hidden_states", "attention_mask", "timestep"}


def _taken_apart(block: Any) -> _Parts | None:
    if plain_class(block).__module__.startswith("diffusers."):
        return None
    attention, feed = block.attn1, block.ff.net
    known = _is_as(block, _OF_BLOCK) and _is_as(attention, _OF_ATTENTION)
    of_diffusers = type(attention).__name__ == _ATTENTION and type(attention).__module__.startswith("diffusers.")
    processor, gelu = type(attention.processor).__name__, feed[0]
    if not known or not of_diffusers or processor not in _PROCESSORS:
        return None
    # A dropout lies between the two layers, and perhaps another one at the end.
    if type(gelu).__name__ != "GELU" or gelu.approximate != "none" or len(feed) not in {3, 4}:
        return None
    parts = _Parts(
        attention.heads, block.norm1, block.norm3, attention.to_q, attention.to_k, attention.to_v,
        attention.to_out[0], gelu.proj, feed[2],
    )  # fmt: skip
    return parts if _can_be_served(parts) else None


def _is_as(module: Any, expected: dict[str, Any]) -> bool:
    return all(getattr(module, name, value) == value for name, value in expected.items())


def _can_be_served(parts: _Parts) -> bool:
    def is_linear(layer: Any) -> bool:
        cls: Any = plain_class(layer)  # diffusers' class is a plain linear layer unless it has an adapter
        return cls is nn.Linear or (cls.__name__ == _LORA and getattr(layer, "lora_layer", None) is None)

    def is_norm(norm: Any) -> bool:
        return plain_class(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None

    if not (all(map(is_linear, parts.layers())) and is_norm(parts.norm1) and is_norm(parts.norm2)):
        return False
    if not are_plain((*parts.layers(), parts.norm1, parts.norm2)):
        return False
    hidden, attended, inner = parts.norm1.weight.shape[0], parts.heads * PANEL, parts.up.weight.shape[0]
    shapes = [*[(attended, hidden)] * 3, (hidden, attended), (inner, hidden), (hidden, inner)]
    return (
        [tuple(layer.weight.shape) for layer in parts.layers()] == shapes
        and tuple(parts.norm2.weight.shape) == tuple(parts.norm1.weight.shape) == (hidden,)
        and len({layer.bias is None for layer in (parts.q, parts.k, parts.v)}) == 1
        and hidden % PANEL == inner % PANEL == 0
    )


class _Described(Kept):
    """A block's struct, and the tensors that it points to."""

    def __init__(self, parts: _Parts) -> None:
        super().__init__()
        projected = (parts.q, parts.k, parts.v)
        bias = None if parts.q.bias is None else torch.cat([layer.bias for layer in projected])
        self.hidden: int = parts.norm1.weight.shape[0]
        self._struct = _Block(
            hidden=self.hidden, heads=parts.heads, inner=parts.up.weight.shape[0],
            scaling=PANEL**-0.5, **self.norms(parts.norm1, parts.norm2),
            qkv=self.dense(torch.cat([layer.weight for layer in projected]), bias),
            o=self.dense(parts.o.weight, parts.o.bias), up=self.dense(parts.up.weight, parts.up.bias),
            down=self.dense(parts.down.weight, parts.down.bias),
        )  # fmt: skip
        self.address = ctypes.addressof(self._struct)


def _serve(block: _Described, named: dict[str, Any]) -> torch.Tensor | None:
    x, mask = named.get("hidden_states"), named.get("attention_mask")
    if not is_fp32(x) or x.dim() != 3 or x.shape[-1] != block.hidden:  # type: ignore[union-attr]  # noqa: PLR2004
        return None  # upstream may raise its own error
    # The mask has one number for each key, which is added for all queries.
    if mask is not None and not is_fp32(mask, (x.shape[0], 1, x.shape[1])):  # type: ignore[union-attr]
        return None
    if [name for name, value in named.items() if name not in _TOLD and value is not None]:
        return None
    x, seen = x.contiguous(), None if mask is None else mask.contiguous()  # type: ignore[union-attr]
    y = torch.empty_like(x)
    call = _Call(x.data_ptr(), y.data_ptr(), None if seen is None else seen.data_ptr(), x.shape[0], x.shape[1])
    transformer_block()(block.address, ctypes.addressof(call), torch.get_num_threads())
    return y


TRANSFORMER = Kernel(
    "transformer blocks",
    of_class(_BLOCK, _taken_apart),
    _Described,
    _serve,
    watched=lambda block: [(block.attn1, "processor")],
)
"""Transformer blocks with bidirectional attention: LayerNorm, attention with heads of size 64, LayerNorm, GELU."""
