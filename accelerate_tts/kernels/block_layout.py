"""Layouts of the decoder blocks that kernels support: their layers, sizes and activations.

There are kernels for CPUs (fused_decoder.py), and Triton's for GPUs (token_kernels.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.tracing import is_plain
from accelerate_tts.kernels.weight_formats import is_transposed

if TYPE_CHECKING:
    from accelerate_tts.kernels.weight_formats import WeightFormat

# Known by class name, since shapes do not show what else another class may do.
_LLAMA = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
_HIGGS = {"HiggsAudioV2DecoderLayer"}
_GPT2 = {"GPT2Block"}
_SILU, GELU_TANH = 0, 1
_ACTIVATIONS = {
    "SiLU": _SILU, "SiLUActivation": _SILU,
    "NewGELUActivation": GELU_TANH, "PytorchGELUTanh": GELU_TANH, "GELUTanh": GELU_TANH,
}  # fmt: skip


@dataclass(frozen=True)
class BlockLayout:
    """Layers and sizes of a block.

    `k` and `v` are `None` if `q` computes all three projections. `gate` is `None` if the feed-forward is not gated.
    """

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
        """Return its linear layers by name."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        return {name: layer for name, layer in named.items() if layer is not None}


def block_layouts(block: nn.Module, weights: WeightFormat) -> dict[bool, BlockLayout]:
    """Return the layouts with which the CPU's kernel serves a block; empty if it does not.

    Args:
        block: The block.
        weights: Format in which the kernel reads the weights.

    Returns:
        The layouts for text tokens (key `True`) and audio tokens (`False`). Only Higgs Audio's blocks have the latter.
    """
    found = _known_layouts(block)
    return found if all(_suits_cpu(layout, weights) for layout in found.values()) else {}


def triton_layouts(block: nn.Module, weights: WeightFormat) -> dict[bool, BlockLayout]:
    """Return the layouts with which Triton's kernels serve a block, as `block_layouts` does; empty if they do not."""
    found = _known_layouts(block)
    return found if all(_suits_triton(layout, weights) for layout in found.values()) else {}


def _known_layouts(block: nn.Module) -> dict[bool, BlockLayout]:
    cls = plain_class(block)
    known = cls.__name__ in _LLAMA | _HIGGS | _GPT2 and cls.__module__.startswith("transformers.models.")
    if not known or hasattr(block, "crossattention"):
        return {}
    try:
        if cls.__name__ in _GPT2:
            found = {True: _of_gpt2(block)}
        elif cls.__name__ in _HIGGS:
            found = {True: _of_llama(block), False: _of_llama(block, "audio_")}
        else:
            found = {True: _of_llama(block)}
    except AttributeError:
        return {}  # a release with another structure
    return found if all(map(_is_known, found.values())) else {}


def _scaling(attention: Any) -> float:
    """Return the factor of the attention scores. Before transformers 4.48 it is not an attribute of the layer.

    Raises:
        AttributeError: The factor depends on more than the head size, or is not a number.
    """
    if hasattr(attention, "scaling"):
        if not isinstance(attention.scaling, (int, float)):  # a tensor: it may differ by head, or be written in place
            raise AttributeError("scaling")
        return float(attention.scaling)
    odd = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    if any(getattr(attention, name, False) for name in odd) or not getattr(attention, "scale_attn_weights", True):
        raise AttributeError("scaling")
    return float(attention.head_dim**-0.5)


def _of_llama(block: Any, of: str = "") -> BlockLayout:
    attention, feed = block.self_attn, getattr(block, f"{of}mlp")
    if getattr(attention.config, "pretraining_tp", 1) > 1:
        raise AttributeError("in pieces")  # before 4.48, such layers compute their products in slices
    size = attention.head_dim
    return BlockLayout(
        attention.q_proj.out_features // size, attention.k_proj.out_features // size, size, _scaling(attention),
        _ACTIVATIONS.get(type(feed.act_fn).__name__, -1),
        getattr(block, f"{of}input_layernorm"), getattr(block, f"{of}post_attention_layernorm"),
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        feed.gate_proj, feed.up_proj, feed.down_proj,
    )  # fmt: skip


def _of_gpt2(block: Any) -> BlockLayout:
    attention, feed = block.attn, block.mlp
    return BlockLayout(
        attention.num_heads, attention.num_heads, attention.head_dim, _scaling(attention),
        _ACTIVATIONS.get(type(feed.act).__name__, -1), block.ln_1, block.ln_2,
        attention.c_attn, None, None, attention.c_proj, None, feed.c_fc, feed.c_proj,
    )  # fmt: skip


def _is_known(layout: BlockLayout) -> bool:
    """Check that the layers are of known classes and fit together, with plain tensors on one device."""

    def is_linear(layer: Any) -> bool:
        cls: Any = plain_class(layer)
        return cls is nn.Linear or is_transposed(layer)

    def is_norm(norm: Any) -> bool:
        cls: Any = plain_class(norm)
        return (cls is nn.LayerNorm and norm.weight is not None and norm.weight.dim() == 1) or (
            cls.__name__.endswith("RMSNorm") and cls.__module__.startswith("transformers.models.")
            and isinstance(getattr(norm, "variance_epsilon", None), float)
        )  # fmt: skip

    layers = list(layout.layers().values())
    modules = (*layers, layout.norm1, layout.norm2)
    tensors = [tensor for m in modules for name in ("weight", "bias") if (tensor := getattr(m, name, None)) is not None]
    if not all(map(is_plain, tensors)) or len({tensor.device for tensor in tensors}) != 1:
        return False
    if any(getattr(module, "weight", None) is None for module in modules):
        return False
    if any(layer.bias is None for layer in layers if is_transposed(layer)):
        return False  # upstream raises its own error
    if layout.activation < 0 or layout.heads % layout.kv_heads or not all(map(is_linear, layers)):
        return False
    return (
        is_norm(layout.norm1) and is_norm(layout.norm2)
        and len({layer.weight.dtype for layer in layers}) == 1
        and all(layer.weight.is_contiguous() for layer in layers)
        and _fits_together(layout)
    )  # fmt: skip


def _suits_cpu(layout: BlockLayout, weights: WeightFormat) -> bool:
    weight = layout.q.weight
    stored = {torch.float32} if weights == "bf16" else {torch.float32, torch.bfloat16}
    is_turned = weight.dtype == torch.bfloat16 and is_transposed(layout.q)
    return weight.is_cpu and weight.dtype in stored and not is_turned


def _suits_triton(layout: BlockLayout, weights: WeightFormat) -> bool:
    stored = {torch.float32} if weights == "bf16" else {torch.float32, torch.bfloat16, torch.float16}
    linears = layout.layers()
    # What one kernel multiplies side by side has biases everywhere or nowhere.
    sides = [[linears[name] for name in names if name in linears] for names in (("q", "k", "v"), ("gate", "up"))]
    are_alike = all(len({layer.bias is None for layer in side}) == 1 for side in sides)
    return layout.q.weight.dtype in stored and layout.head_dim % 2 == 0 and are_alike


def _fits_together(layout: BlockLayout) -> bool:
    """Check that all shapes agree with the sizes that the kernel gets; it reads raw addresses without checks."""
    if len({is_transposed(layer) for layer in layout.layers().values()}) > 1:
        return False
    if hasattr(layout.norm1, "eps") != hasattr(layout.norm2, "eps"):
        return False
    shapes = {
        name: tuple(layer.weight.shape[::-1] if is_transposed(layer) else layer.weight.shape)
        for name, layer in layout.layers().items()
    }
    hidden, attended = layout.norm1.weight.shape[0], layout.heads * layout.head_dim
    keys, inner = layout.kv_heads * layout.head_dim, shapes["up"][0]
    expected = {
        "q": (attended if "k" in shapes else attended + 2 * keys, hidden), "k": (keys, hidden), "v": (keys, hidden),
        "o": (hidden, attended), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    biases = all(layer.bias is None or tuple(layer.bias.shape) == shapes[name][:1]
                 for name, layer in layout.layers().items())  # fmt: skip
    norms = (layout.norm1, layout.norm2)
    sizes = {tuple(tensor.shape) for norm in norms for tensor in (norm.weight, getattr(norm, "bias", None))
             if tensor is not None}  # fmt: skip
    return biases and sizes == {(hidden,)} and all(shape == expected[name] for name, shape in shapes.items())
