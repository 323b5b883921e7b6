"""One token through a decoder's block by one kernel of ours (block.cpp). For CPUs. Exact to rounding.

A decode step is a loop over blocks, each of which is some twenty operators: beside the time in which the memory gives
the weights, eager PyTorch spends as much again on waking threads and on Python. Here a block is one call. In fp32 it
computes from the model's own weights, without a copy; `balanced` may keep bf16 copies of them, `fast` int8 ones with a
scale for each output. Norms, attention, softmax and sums stay in fp32, and so does the cache.

What is served: Llama's block and its likes (Chatterbox's T3, Mistral, Qwen2), Higgs Audio's with its two feed-forwards,
and GPT-2's (XTTS), with one token for up to eight rows, and a growing cache (growing.py). Everything else takes
upstream's own forward and the same cache.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages import growing
from accelerate_tts.engine.stages.anatomy import Anatomy, anatomies
from accelerate_tts.engine.stages.base import BaseChange, BaseStage
from accelerate_tts.engine.stages.decode import growing_caches
from accelerate_tts.engine.stages.inductor import Weights as Watched
from accelerate_tts.engine.stages.native import decoder_block
from accelerate_tts.engine.stages.skinny import MOST_ROWS, Weights, in_bf16, in_int8, is_transposed
from accelerate_tts.engine.stages.swap import FUSED, ClassSwap, plain_class, subclass_with
from accelerate_tts.engine.stages.tokens import has_hooks, parameters_of, take_cache, token_layer
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from typing import TypeGuard

    import torch
    from torch import nn

    from accelerate_tts.engine.plan import Part

__all__ = ["FusedBlocksStage"]

_FP32, _BF16, _INT8, _TRANSPOSED = range(4)
# What a block may be told beside what the kernel is given, and what then changes nothing for one token.
_IGNORED = {
    "hidden_states", "attention_mask", "position_embeddings", "audio_token_mask", "position_ids", "cache_position",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_causal",
}  # fmt: skip


class FusedBlocksStage(BaseStage):
    """Serves the single tokens of a decoder's blocks by one kernel.

    Args:
        weights: What the weights are stored in for it.
    """

    group = "decoder blocks"

    def __init__(self, weights: Weights = "fp32") -> None:
        self.name = f"fused decoder blocks ({weights})"
        self._weights: Weights = weights

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        if growing.cache_classes() is None:
            return "no cache of transformers 4.56 or later is loaded"
        return None if _blocks(part.module, self._weights) else "no decoder's blocks that the kernel knows in it"

    def prepare(self, part: Part) -> _FusedBlocks:
        """See `Stage.prepare`. Builds the kernel."""
        decoder_block()
        return _FusedBlocks(part, self._weights)


def _blocks(module: nn.Module, weights: Weights) -> list[nn.Module]:
    return [inner for inner in module.modules() if anatomies(inner, weights)]


# --- the structs of block.cpp --------------------------------------------------------------------------------------

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = (
        ("w", _POINTER), ("scale", _POINTER), ("bias", _POINTER), ("outputs", _INTEGER), ("inputs", _INTEGER),
    )  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "format", "layer_norm",
                                        "gated", "activation")),
        *((name, ctypes.c_double) for name in ("eps1", "eps2", "scaling")),
        *((name, _POINTER) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    )  # fmt: skip


class _Token(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER), ("y", _POINTER), ("rows", _INTEGER), ("cos", _POINTER), ("sin", _POINTER),
        ("rotation_stride", _INTEGER), ("mask", _POINTER), ("mask_stride", _INTEGER), ("mask_is_bytes", _INTEGER),
        ("keys", _POINTER), ("values", _POINTER), ("key_row", _INTEGER), ("key_head", _INTEGER),
        ("key_position", _INTEGER), ("value_row", _INTEGER), ("value_head", _INTEGER), ("value_position", _INTEGER),
        ("cache_is_bf16", _INTEGER), ("length", _INTEGER),
    )  # fmt: skip


class _Described:
    """A block's struct, and the tensors that it points to."""

    def __init__(self, anatomy: Anatomy, weights: Weights) -> None:
        import torch

        self._kept: list[torch.Tensor] = []
        self.copies: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}
        layers = anatomy.layers()
        transposed = is_transposed(anatomy.q)
        own = _TRANSPOSED if transposed else _BF16 if anatomy.q.weight.dtype == torch.bfloat16 else _FP32
        with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors: they outlive the tuning's own mode
            norms = {
                f"{name}{suffix}": self._pointer(getattr(norm, attribute, None), torch.float32)
                for name, norm in (("norm1", anatomy.norm1), ("norm2", anatomy.norm2))
                for suffix, attribute in (("", "weight"), ("_bias", "bias"))
            }
            linears = {name: self._linear(layer, weights) for name, layer in layers.items()}
        self.struct = _Block(
            hidden=anatomy.norm1.weight.shape[0], heads=anatomy.heads, kv_heads=anatomy.kv_heads,
            head_dim=anatomy.head_dim, inner=linears["up"].outputs,
            format={"fp32": own, "bf16": _BF16, "int8": _INT8}[weights],
            layer_norm=hasattr(anatomy.norm1, "eps"), gated=anatomy.gate is not None, activation=anatomy.activation,
            eps1=_epsilon(anatomy.norm1), eps2=_epsilon(anatomy.norm2), scaling=anatomy.scaling, **norms, **linears,
        )  # fmt: skip
        self.reference = ctypes.byref(self.struct)

    def _pointer(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().to(dtype or tensor.dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _linear(self, layer: Any, weights: Weights) -> _Linear:
        import torch

        outputs, inputs = layer.weight.shape[::-1] if is_transposed(layer) else layer.weight.shape
        if weights == "fp32":
            weight, scale = layer.weight, None
        else:
            weight, scale = self.copies[layer] = {"bf16": in_bf16, "int8": in_int8}[weights](layer)
        return _Linear(
            w=self._pointer(weight), scale=self._pointer(scale), bias=self._pointer(layer.bias, torch.float32),
            outputs=outputs, inputs=inputs,
        )  # fmt: skip


def _epsilon(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


# --- the change ----------------------------------------------------------------------------------------------------


class _FusedBlocks(BaseChange):
    """The change: each block's class gets a forward that asks the kernel first."""

    def __init__(self, part: Part, weights: Weights) -> None:
        blocks = _blocks(part.module, weights)
        # Caches have to grow in place for it, also where that alone was not worth keeping.
        self._growing = growing_caches(part.module)
        self._fused = {block: _Fused(block, part.name, weights) for block in blocks}
        self._swap = ClassSwap(blocks, lambda block: self._fused[block].class_for(type(block)))

    def on(self) -> None:
        """See `Change.on`."""
        self._growing.on()
        self._swap.on()

    def off(self) -> None:
        """See `Change.off`."""
        self._swap.off()
        self._growing.off()


class _Fused:
    """One block and what the kernel needs of it, made when first needed and anew when its weights were written."""

    def __init__(self, block: nn.Module, what: str, weights: Weights) -> None:
        self._block: Any = block
        self._what = f"the fused blocks of {what}"
        self._weights: Weights = weights
        self._names = parameters_of(plain_class(block))
        attention: Any = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        self._number = attention.layer_idx
        self._config = attention.config
        # What was computed from the weights, and what tells when they were written: one pair, for threads.
        self._known: tuple[Watched, dict[bool, _Described]] = (Watched(block), {})
        found = anatomies(block, weights)
        self._kinds = list(found)
        one = next(iter(found.values()))
        self._dtype = one.q.weight.dtype
        self._cache_shape = (one.kv_heads, one.head_dim)
        self._hidden = one.norm1.weight.shape[0]
        self._inner = [inner for inner in block.modules() if inner is not block]
        self._places = [(inner._modules, name, m) for inner in block.modules() for name, m in inner._modules.items()]

    def class_for(self, plain: Any) -> type:
        """The block's class while the change is on."""

        def forward(_block: Any, *args: Any, **kwargs: Any) -> Any:
            result = self._token(args, kwargs)
            return plain.forward(self._block, *args, **kwargs) if result is None else result

        vars(forward)["__signature__"] = inspect.signature(plain.forward)
        cls = subclass_with(plain, forward, copies="" if self._weights == "fp32" else self._weights)
        setattr(cls, FUSED, self)
        return cls

    def copied(self) -> list[nn.Module]:
        """The linear layers of which the kernel has copies."""
        if self._weights == "fp32":
            return []
        found = anatomies(self._block, self._weights).values()
        return [layer for anatomy in found for layer in anatomy.layers().values()]

    def copy_of(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The copy of a layer's weight as it is now, (outputs, inputs), and the scale of each output if it is int8."""
        described = (self._describe(of_text) for of_text in self._kinds)
        return next(each.copies[layer] for each in described if each is not None and layer in each.copies)

    def _token(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block makes of one token, or `None` if this call is upstream's business."""
        import torch

        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._block.training:
            return None
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        past, hidden = take_cache(named), named.get("hidden_states")
        if past is None or not self._fits(hidden):
            return None
        layer = token_layer(self._what, past, self._number, named)
        if layer is None or self._is_unknown(named):
            return None
        of_text = _of_text(named.get("audio_token_mask"), self._names)
        return None if of_text is None else self._run(hidden, layer, of_text, named)

    def _run(self, hidden: torch.Tensor, layer: Any, of_text: bool, named: dict[str, Any]) -> Any:
        import torch

        keys, values = layer.buffers()
        if keys.dtype != self._dtype or values.shape != keys.shape or keys.device.type != "cpu":
            return None
        if (keys.shape[1], keys.shape[3]) != self._cache_shape or hidden.shape[-1] != self._hidden:
            return None  # upstream's own error
        rotated = named.get("position_embeddings")
        if rotated is None and "position_embeddings" in self._names:
            return None  # the same
        rotation = _rotation(rotated, hidden.shape[0], keys.shape[-1])
        mask = _mask(named.get("attention_mask"), hidden.shape[0], layer.length() + 1)
        strides = keys.stride(), values.stride()
        if rotation is None or mask is None or strides[0][3] != 1 or strides[1][3] != 1:
            return None
        described = self._describe(of_text)
        if described is None:
            return None
        x = _plain(hidden)
        y = torch.empty(x.shape, dtype=torch.float32, device="cpu")  # whatever the user's defaults are
        token = _Token(
            x.data_ptr(), y.data_ptr(), x.shape[0], *rotation[:3], *mask[:3], keys.data_ptr(), values.data_ptr(),
            *strides[0][:3], *strides[1][:3], self._dtype == torch.bfloat16, layer.length(),
        )  # fmt: skip
        decoder_block()(described.reference, ctypes.byref(token), torch.get_num_threads())
        layer.advance(1)
        return y if hidden.dtype == torch.float32 else y.to(hidden.dtype)

    def _fits(self, hidden: Any) -> TypeGuard[torch.Tensor]:
        import torch

        return bool(
            type(hidden) is torch.Tensor
            and hidden.dtype == self._dtype
            and hidden.dim() == 3  # noqa: PLR2004
            and hidden.shape[1] == 1
            and 0 < hidden.shape[0] <= MOST_ROWS
            and hidden.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )

    def _is_unknown(self, named: dict[str, Any]) -> bool:
        unknown = [name for name, value in named.items() if name not in _IGNORED and value is not None]
        how = getattr(self._config, "_attn_implementation", None)
        if unknown:
            obstacle = f"it is called with {', '.join(sorted(unknown))}"
        elif how not in {"eager", "sdpa", None}:
            obstacle = f"attention is made by {how!r}"
        elif has_hooks(*self._inner):
            obstacle = "there are hooks on what is inside a block, and nothing inside it is called"
        elif self._is_altered():
            obstacle = "a module inside a block was exchanged, or given a forward of its own"
        else:
            return False
        emit(NotApplied(self._what, obstacle))
        return True

    def _is_altered(self) -> bool:
        """Whether an adapter was put in the place of a layer, or over its forward, since the change was made."""
        return any(holder.get(name) is not module for holder, name, module in self._places) or any(
            "forward" in vars(inner) for inner in self._inner
        )

    def _describe(self, of_text: bool) -> _Described | None:
        watched, known = self._known
        if watched.outdated():
            known = {}
            self._known = (Watched(self._block), known)  # before: what is written meanwhile is seen next time
        described = known.get(of_text)
        if described is None:
            anatomy = anatomies(self._block, self._weights).get(of_text)
            if anatomy is None:
                emit(NotApplied(self._what, "weights were exchanged for others, which the kernel does not know"))
                return None
            described = known[of_text] = _Described(anatomy, self._weights)
        return described


def _of_text(mask: Any, names: list[str]) -> bool | None:
    """Whether the tokens are of text, by Higgs' mask of those that are of audio; `None` if they are of both."""
    if "audio_token_mask" not in names:
        return True
    if mask is None or bool(mask.all()):
        return False
    return None if bool(mask.any()) else True


# The next two give what `_Token` has of a tensor, with the tensors behind it, which must live as long as the call;
# `None` if it is not of the kernel's kind.


def _rotation(given: Any, rows: int, size: int) -> tuple[Any, ...] | None:
    if given is None:
        return None, None, 0
    cos, sin = map(_plain, given)
    shape = cos.shape
    if shape != sin.shape or len(shape) != 3 or shape[1:] != (1, size) or shape[0] not in {1, rows}:  # noqa: PLR2004
        return None
    return cos.data_ptr(), sin.data_ptr(), 0 if shape[0] == 1 else size, cos, sin


def _mask(given: Any, rows: int, positions: int) -> tuple[Any, ...] | None:
    import torch

    if given is None:
        return None, 0, False
    if given.dim() != 4 or given.shape[1:] != (1, 1, positions) or given.shape[0] not in {1, rows}:  # noqa: PLR2004
        return None
    in_bytes = given.dtype == torch.bool
    mask = given.contiguous() if in_bytes else _plain(given)
    return mask.data_ptr(), 0 if mask.shape[0] == 1 else positions, in_bytes, mask


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32 and contiguous; most are, and asking costs less than converting them to what they are."""
    import torch

    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()
