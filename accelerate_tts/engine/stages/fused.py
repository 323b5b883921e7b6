"""One token through a decoder's block by one kernel of ours (decoder_block.cpp). For CPUs. Exact to rounding.

A decode step is a loop over blocks, each of which is some twenty operators: beside the time in which the memory gives
the weights, eager PyTorch spends as much again on waking threads and on Python. Here a block is one call. In fp32 it
computes from the model's own weights, without a copy; `balanced` may keep bf16 copies of them, `fast` int8 ones with a
scale for each output. Norms, attention, softmax and sums stay in fp32, and so does the cache.

What is served: Llama's block and its likes (Chatterbox's T3, Mistral, Qwen2), Higgs Audio's with its two feed-forwards,
and GPT-2's (XTTS), with one token for up to eight rows, and a growing cache (growing.py). Everything else takes
upstream's own forward and the same cache.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate_tts.engine.stages import growing
from accelerate_tts.engine.stages.ahead import Ahead, Row
from accelerate_tts.engine.stages.anatomy import anatomies
from accelerate_tts.engine.stages.base import BaseChange, BaseStage
from accelerate_tts.engine.stages.block_kernel import Described, holds, plain, run, shared
from accelerate_tts.engine.stages.decode import decoders, growing_caches
from accelerate_tts.engine.stages.inductor import Weights as Watched
from accelerate_tts.engine.stages.intact import Inside
from accelerate_tts.engine.stages.native import decoder_blocks, missing
from accelerate_tts.engine.stages.skinny import FORMATS, MOST_ROWS, Weights
from accelerate_tts.engine.stages.swap import FUSED, ClassSwap, plain_class, subclass_with
from accelerate_tts.engine.stages.tokens import parameters_of, take_cache, token_layer
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from typing import TypeGuard

    import torch
    from torch import nn

    from accelerate_tts.engine.plan import Part

__all__ = ["FusedBlocksStage"]

_NAME = "fused decoder blocks ({})"
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
        self.name = _NAME.format(weights)
        self.spared_by = tuple(_NAME.format(smaller) for smaller in FORMATS[: FORMATS.index(weights)])
        self._weights: Weights = weights

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        if (reason := missing()) is not None:
            return reason
        if growing.cache_classes() is None:
            return "no cache of transformers 4.56 or later is loaded"
        return None if _blocks(part.module, self._weights) else "no decoder's blocks that the kernel knows in it"

    def prepare(self, part: Part) -> _FusedBlocks:
        """See `Stage.prepare`."""
        decoder_blocks()
        return _FusedBlocks(part, self._weights)


def _blocks(module: nn.Module, weights: Weights) -> list[nn.Module]:
    return [inner for inner in module.modules() if anatomies(inner, weights)]


class _FusedBlocks(BaseChange):
    """The change: each block's class gets a forward that asks the kernel first."""

    def __init__(self, part: Part, weights: Weights) -> None:
        blocks = _blocks(part.module, weights)
        # Caches have to grow in place for it, also where that alone was not worth keeping.
        self._growing = growing_caches(part.module)
        self._fused = {block: _Fused(block, part.name, weights) for block in blocks}
        for decoder in decoders(part.module):
            _put_in_rows([self._fused[inner] for inner in decoder.modules() if inner in self._fused], part.name)
        self._swap = ClassSwap(blocks, lambda block: self._fused[block].class_for(type(block)))

    def on(self) -> None:
        """See `Change.on`."""
        self._growing.on()
        self._swap.on()

    def off(self) -> None:
        """See `Change.off`."""
        self._swap.off()
        self._growing.off()


def _put_in_rows(blocks: list[_Fused], what: str) -> None:
    """Tell the blocks of a decoder of each other, where they are its blocks from the first to the last."""
    blocks.sort(key=lambda block: block.number)
    numbers = [block.number for block in blocks]
    if numbers == list(range(len(blocks))) and len({block.kind for block in blocks}) == 1:
        row = Row(len(blocks), what)
        for block in blocks:
            block.row, block.others = row, blocks[1:]


class _Ready(NamedTuple):
    described: Described
    layer: Any


class _Fused:
    """One block and what the kernel needs of it, made when first needed and anew when its weights were written."""

    only_tokens = True

    def __init__(self, block: nn.Module, what: str, weights: Weights) -> None:
        self._block: Any = block
        self._what = f"the fused blocks of {what}"
        self._weights: Weights = weights
        self._names = parameters_of(plain_class(block))
        attention: Any = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        self.number = attention.layer_idx
        self._config = attention.config
        # What was computed from the weights, and what tells when they were written: one pair, for threads.
        self._known: tuple[Watched, dict[bool, Described]] = (Watched(block), {})
        found = anatomies(block, weights)
        self._kinds = list(found)
        one = next(iter(found.values()))
        self._dtype = one.q.weight.dtype
        self._cache_shape = (one.kv_heads, one.head_dim)
        self._hidden = one.norm1.weight.shape[0]
        self.kind = (plain_class(block), self._dtype, self._cache_shape, self._hidden)
        self.row = Row(1, self._what)
        self.others: list[_Fused] = []
        self._inside = Inside(block)

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
        foreseen = self.row.take(self.number, hidden, past, named)
        if foreseen is not None:
            past.layers[self.number].advance(1)
            return foreseen
        of_text = _of_text(named.get("audio_token_mask"), self._names)
        if of_text is None or self._is_unknown(named):
            return None
        return self._run(hidden, past, of_text, named)

    def _run(self, hidden: torch.Tensor, past: Any, of_text: bool, named: dict[str, Any]) -> Any:
        first = self._ready(hidden, past, of_text, named)
        rotated = named.get("position_embeddings")
        if first is None or (rotated is None and "position_embeddings" in self._names):
            return None  # upstream's business, and its own error
        length = first.layer.length()
        given = shared(rotated, named.get("attention_mask"), hidden.shape[0], self._cache_shape[1], length + 1)
        if given is None:
            return None
        asked = [first]
        if self.row.starts_at(self.number):
            others = [block._ready(hidden, past, of_text, named) for block in self.others]
            known = [other for other in others if other is not None and other.layer.length() == length]
            asked += known if len(known) == len(others) else []
        buffers = [one.layer.buffers() for one in asked]
        made = run([one.described for one in asked], plain(hidden), given, buffers, length).to(hidden.dtype)
        if len(asked) > 1:
            self.row.remember(Ahead(past, [one.layer for one in asked], named, made))
        first.layer.advance(1)
        return made[0].clone() if len(asked) > 1 else made[0]

    def _ready(self, hidden: torch.Tensor, past: Any, of_text: bool, named: dict[str, Any]) -> _Ready | None:
        """What the kernel needs of this block for a token, with room in its cache; `None` if it is upstream's."""
        layer = token_layer(self._what, past, self.number, named)
        if layer is None or self._is_altered():
            return None
        keys, values = layer.buffers()
        if keys.dtype != self._dtype:
            return None
        if (keys.shape[1], keys.shape[3]) != self._cache_shape or hidden.shape[-1] != self._hidden:
            return None  # upstream's own error
        if not holds(keys, values, hidden.shape[0], layer.length()):
            return None
        described = self._describe(of_text)
        if described is None or described.takes != (hidden.shape[-1], keys.shape[1], keys.shape[3]):
            return None  # weights of other sizes were put in
        return _Ready(described, layer)

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
        else:
            return False
        emit(NotApplied(self._what, obstacle))
        return True

    def _is_altered(self) -> bool:
        """Whether, since the change was made, something came into a block that the kernel would pass by."""
        obstacle = self._inside.altered()
        if obstacle is not None:
            emit(NotApplied(self._what, obstacle))
        return obstacle is not None

    def _describe(self, of_text: bool) -> Described | None:
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
            described = known[of_text] = Described(anatomy, self._weights)
        return described


def _of_text(mask: Any, names: list[str]) -> bool | None:
    """Whether the tokens are of text, by Higgs' mask of those that are of audio; `None` if they are of both."""
    if "audio_token_mask" not in names:
        return True
    if mask is None or bool(mask.all()):
        return False
    return None if bool(mask.any()) else True
