"""What a transformer decoder's block consists of, for those blocks that our kernel knows (fused.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages.skinny import is_transposed
from accelerate_tts.engine.stages.swap import plain_class

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.engine.stages.skinny import Weights

__all__ = ["Anatomy", "anatomies"]

# By class, since a class of another name may do something more that no shape shows.
_LLAMA = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
_HIGGS = {"HiggsAudioV2DecoderLayer"}
_GPT2 = {"GPT2Block"}
_SILU, _GELU_TANH = 0, 1
_ACTIVATIONS = {
    "SiLU": _SILU, "SiLUActivation": _SILU,
    "NewGELUActivation": _GELU_TANH, "PytorchGELUTanh": _GELU_TANH, "GELUTanh": _GELU_TANH,
}  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """A block, taken apart. `k`, `v` and `gate` are `None` where one layer makes all three, or nothing is gated."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    activation: int
    norm1: Any
    norm2: Any
    q: Any
    k: Any
    v: Any
    o: Any
    gate: Any
    up: Any
    down: Any

    def layers(self) -> dict[str, Any]:
        """Its linear layers that are there, by their names."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        return {name: layer for name, layer in named.items() if layer is not None}


def anatomies(block: nn.Module, weights: Weights) -> dict[bool, Anatomy]:
    """The block as the kernel needs it, by whether its tokens are of text; empty if it is no block that is known."""
    cls = plain_class(block)
    known = cls.__name__ in _LLAMA | _HIGGS | _GPT2 and cls.__module__.startswith("transformers.models.")
    if not known or not _returns_a_tensor(cls) or hasattr(block, "crossattention"):
        return {}
    try:
        if cls.__name__ in _GPT2:
            found = {True: _of_gpt2(block)}
        elif cls.__name__ in _HIGGS:
            found = {True: _of_llama(block), False: _of_llama(block, "audio_")}
        else:
            found = {True: _of_llama(block)}
    except AttributeError:
        return {}  # a release in which it has another shape
    return found if all(_can_be_served(anatomy, weights) for anatomy in found.values()) else {}


def _returns_a_tensor(cls: Any) -> bool:
    # Blocks of older releases returned tuples of one to three things.
    return (
        "Tensor" in str(returned := cls.forward.__annotations__.get("return")) and "tuple" not in str(returned).lower()
    )


def _of_llama(block: Any, of: str = "") -> Anatomy:
    attention, feed = block.self_attn, getattr(block, f"{of}mlp")
    size = attention.head_dim
    return Anatomy(
        attention.q_proj.out_features // size, attention.k_proj.out_features // size, size, float(attention.scaling),
        _ACTIVATIONS.get(type(feed.act_fn).__name__, -1),
        getattr(block, f"{of}input_layernorm"), getattr(block, f"{of}post_attention_layernorm"),
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        feed.gate_proj, feed.up_proj, feed.down_proj,
    )  # fmt: skip


def _of_gpt2(block: Any) -> Anatomy:
    attention, feed = block.attn, block.mlp
    return Anatomy(
        attention.num_heads, attention.num_heads, attention.head_dim, float(attention.scaling),
        _ACTIVATIONS.get(type(feed.act).__name__, -1), block.ln_1, block.ln_2,
        attention.c_attn, None, None, attention.c_proj, None, feed.c_fc, feed.c_proj,
    )  # fmt: skip


def _can_be_served(anatomy: Anatomy, weights: Weights) -> bool:
    import torch
    from torch import nn

    def is_linear(layer: Any) -> bool:
        cls: Any = plain_class(layer)
        return cls is nn.Linear or is_transposed(layer)

    def is_norm(norm: Any) -> bool:
        cls: Any = plain_class(norm)
        return (cls is nn.LayerNorm and norm.weight is not None and norm.weight.dim() == 1) or (
            cls.__name__.endswith("RMSNorm") and cls.__module__.startswith("transformers.models.")
            and isinstance(norm.variance_epsilon, float)
        )  # fmt: skip

    layers = list(anatomy.layers().values())
    if anatomy.activation < 0 or anatomy.heads % anatomy.kv_heads or not all(map(is_linear, layers)):
        return False
    dtypes = {layer.weight.dtype for layer in layers}
    stored = {torch.float32} if weights == "bf16" else {torch.float32, torch.bfloat16}
    return (
        is_norm(anatomy.norm1) and is_norm(anatomy.norm2)
        and len(dtypes) == 1 and dtypes <= stored
        and all(layer.weight.device.type == "cpu" and layer.weight.is_contiguous() for layer in layers)
        and not (dtypes == {torch.bfloat16} and any(map(is_transposed, layers)))
    )  # fmt: skip
