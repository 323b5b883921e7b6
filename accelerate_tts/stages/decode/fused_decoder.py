"""A decoder block's decode step as one kernel call (decoder_block.cpp). For CPUs. Exact to rounding.

A decode step is a loop over blocks of some twenty operators each. Eager PyTorch spends about as much time on waking
threads and on Python as on reading the weights from memory. Here a block is one call. In fp32 it reads the model's own
weights, without a copy. The level `balanced` may keep bf16 copies of them, and `fast` int8 copies with a scale for each
output. Norms, attention, softmax, sums and the cache stay in fp32.

Supported are Llama's block and its relatives (Chatterbox's T3, Mistral, Qwen2), Higgs Audio's with two feed-forwards,
and GPT-2's (XTTS). A call is served if it is one token for a batch of up to eight, with a growing cache (kv_cache/).
Everything else takes upstream's own forward and the same cache.

The items that a block and its attention layer return behind the hidden states differ by release, by attention
implementation and by request: none, the attention weights, the cache. They are learnt from upstream's own calls in
prefill, and decode steps return the same form (`Forms`). Hooks that read attention weights still run: the attention
layer is called once and returns the kernel's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.inspection.tracing import is_plain, is_traced
from accelerate_tts.kernels.block_layout import block_layouts
from accelerate_tts.kernels.calls import decoder_blocks
from accelerate_tts.kernels.decoder_block import Call, Described, holds, plain, shared
from accelerate_tts.kernels.library import missing
from accelerate_tts.kernels.weight_formats import MOST_ROWS, WeightFormat
from accelerate_tts.patching.change import Changes
from accelerate_tts.patching.class_swap import FUSED, ClassSwap, fused_by, subclass_with
from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.runtime.own_random import outside
from accelerate_tts.stages.base import FormatStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.block_forms import CACHE, IGNORED, NOTHING, WEIGHTS, Form, Forms
from accelerate_tts.stages.decode.call_args import (
    Obstacles,
    attention_of,
    attentions_wanted,
    cache_of,
    is_read,
    is_spied,
    take_cache,
    tidy,
    token_layer,
    whole_tuple,
)
from accelerate_tts.stages.decode.growing_cache import decoders, growing_caches
from accelerate_tts.stages.decode.lookahead import Ahead, BlockStack, Made
from accelerate_tts.stages.decode.shared_steps import SharedSteps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeGuard

    from torch import nn

    from accelerate_tts.plan import Part


@register_stage
class FusedBlocksStage(FormatStage):
    """Computes the decode steps of a decoder's blocks by one kernel."""

    name = "fused decoder blocks"
    group = "decoder blocks"
    devices = ("cpu",)
    # Before all other stages that change linear layers, since these skip layers inside fused blocks.
    after = ("channels-last convolutions",)

    def applies(self, part: Part) -> str | None:
        if (reason := missing()) is not None:
            return reason
        if not kv_cache.are_caches_loaded():
            return "no cache of transformers is loaded"
        return None if _blocks(part.module, self._weights) else "no decoder's blocks that the kernel knows in it"

    def prepare(self, part: Part) -> _FusedBlocks:
        decoder_blocks()
        return _FusedBlocks(part, self._weights)


def _blocks(module: nn.Module, weights: WeightFormat) -> list[nn.Module]:
    return [inner for inner in module.modules() if block_layouts(inner, weights)]


class _FusedBlocks(Changes):
    """The change: the forward of each block's class tries the kernel first."""

    def __init__(self, part: Part, weights: WeightFormat) -> None:
        blocks = _blocks(part.module, weights)
        obstacles = Obstacles(f"the fused blocks of {part.name}")
        self._fused = {block: _Fused(block, obstacles, weights) for block in blocks}
        for decoder in decoders(part.module):
            _join_stacks([self._fused[inner] for inner in decoder.modules() if inner in self._fused], obstacles.what)
        attentions: dict[nn.Module, _Fused] = {fused.attention: fused for fused in self._fused.values()}
        self.steps = [block.steps for block in self._fused.values() if block.number == 0]
        super().__init__(
            growing_caches(part.module),  # the kernel needs them, even where that change alone was not worth keeping
            ClassSwap(blocks, lambda block: self._fused[block].class_for(type(block))),
            ClassSwap(list(attentions), lambda attention: attentions[attention].attention_class(type(attention))),
        )

    def on(self) -> None:
        for block, fused in self._fused.items():
            tidy(block)
            tidy(fused.attention)
        super().on()


def _join_stacks(blocks: list[_Fused], what: str) -> None:
    """Join the blocks of a decoder to one stack, if they are all of its blocks and of one kind."""
    blocks.sort(key=lambda block: block.number)
    numbers = [block.number for block in blocks]
    if numbers == list(range(len(blocks))) and len({block.kind for block in blocks}) == 1:
        stack, forms, steps, watch = BlockStack(len(blocks), what), Forms(), SharedSteps(what), _StackWatch(blocks)
        for block in blocks:
            block.stack, block.blocks, block.forms, block.steps, block.watch = stack, blocks, forms, steps, watch


class _StackWatch:
    """One check of all blocks of a stack, which costs half as much as asking each of them."""

    def __init__(self, blocks: Sequence[_Fused]) -> None:
        self._blocks = blocks
        self._inside = Inside.joined([block.inside for block in blocks])
        self._weights: tuple[list[WeightWatch], WeightWatch | None] = ([], None)

    def is_unchanged(self) -> bool:
        """Check that no block's structure or weights have changed. If one has, each block must be asked."""
        each = [block.weights for block in self._blocks]
        known, joined = self._weights
        if joined is None or known != each:  # a block was described anew
            joined = WeightWatch.joined(each)
            self._weights = (each, joined)
        if self._inside.altered() is not None:
            return False
        if joined.outdated():
            # A check compares one piece of each tensor. A block's own check compares the next one, and may miss this.
            for block in [block for block in self._blocks if block.weights.outdated()] or self._blocks:
                block.forget()
            return False
        return True


class _Ready(NamedTuple):
    described: Described
    layer: Any
    weights: bool
    """True if the attention weights are requested."""


class _Answer(NamedTuple):
    """A finished result, passed to an attention layer in place of its input. The layer returns it to its hooks."""

    result: tuple[Any, ...]


class _Fused:
    """One block and the kernel's description of it, which is rebuilt when the weights were written."""

    only_tokens = True

    def __init__(self, block: nn.Module, obstacles: Obstacles, weights: WeightFormat) -> None:
        self._block: Any = block
        self._obstacles = obstacles
        self._weights: WeightFormat = weights
        self._names = parameters_of(plain_class(block))
        attention: Any = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        self.attention = attention
        self.number = attention.layer_idx
        self._config = attention.config
        # Descriptions of the weights and the watch that tells when they were written. One pair, replaced atomically.
        found = block_layouts(block, weights)
        self._kinds = list(found)
        one = next(iter(found.values()))
        self._dtype = one.q.weight.dtype
        self._known: tuple[WeightWatch, dict[bool, Described]] = (self._watched(), {})
        self._heads = one.heads
        self._cache_shape = (one.kv_heads, one.head_dim)
        self._hidden = one.norm1.weight.shape[0]
        rotation = getattr(getattr(attention, "rotary_emb", None), "inv_freq", None)
        rotation = None if rotation is None else tuple(rotation.tolist())
        self.kind = (plain_class(block), self._dtype, self._heads, self._cache_shape, self._hidden, rotation)
        self.stack, self.steps = BlockStack(1, obstacles.what), SharedSteps(obstacles.what)
        self.blocks: list[_Fused] = [self]
        self.forms = Forms()
        self.inside = Inside(block, [(self.attention, "config")], read=self.attention)
        self.watch = _StackWatch([self])

    @property
    def weights(self) -> WeightWatch:
        """The watch on the weights that are described."""
        return self._known[0]

    def forget(self) -> None:
        """Have the weights described anew."""
        self._known = (self._watched(), {})  # a new watch first, so that a concurrent write is seen next time

    def class_for(self, plain: Any) -> type:
        """Return the block's class while the change is on."""

        def forward(_block: Any, *args: Any, **kwargs: Any) -> Any:
            with outside():
                result = self._token(args, kwargs)
            if result is not None:
                return result[0]
            result = plain.forward(self._block, *args, **kwargs)
            if is_traced():
                return result
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            self.forms.learn(self._key("block", named), result, cache_of(named))
            return result

        cls = subclass_with(plain, forward, copies="" if self._weights == "fp32" else self._weights)
        setattr(cls, FUSED, self)
        return cls

    def attention_class(self, plain: Any) -> type:
        """Return the class of the block's attention layer while the change is on."""

        def forward(attention: Any, *args: Any, **kwargs: Any) -> Any:
            if args and type(args[0]) is _Answer:
                return args[0].result
            result = plain.forward(attention, *args, **kwargs)
            if not is_traced():
                self.forms.learn(self._key("attention", kwargs), result, cache_of(kwargs))
            return result

        return subclass_with(plain, forward)

    def _key(self, what: str, named: dict[str, Any]) -> tuple[Any, ...]:
        """Return the key of a result's form."""
        how = attention_of(self._config)
        return what, how, bool(named.get("output_attentions")), bool(named.get("use_cache"))

    def copied(self) -> list[nn.Module]:
        """Return the linear layers that the kernel has copies of."""
        if self._weights == "fp32":
            return []
        found = block_layouts(self._block, self._weights).values()
        return [layer for layout in found for layer in layout.layers().values()]

    def copy_of(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Return the present copy of a layer's weight, (outputs, inputs), and for int8 the scale of each output.

        `None` if the block was changed or the kernel does not know its weights.
        """
        if self._is_altered():
            return None
        described = (self._describe(of_text, checked=False) for of_text in self._kinds)
        return next((each.copies[layer] for each in described if each is not None and layer in each.copies), None)

    def _token(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """Return the block's result for one token in a tuple, or `None` if upstream's forward must run."""
        if torch.is_grad_enabled() or self._block.training or is_traced() or torch.is_autocast_enabled("cpu"):
            return None
        if fused_by(self._block) is not self:
            return None  # undone; somebody has kept this forward, as accelerate's hooks do
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        past, hidden = take_cache(named), named.get("hidden_states")
        if past is None:
            return None
        made = self.stack.take(self.number, hidden, past, named)
        if made is None and self._fits(hidden):
            made = self._run(hidden, past, named)
        if made is None:
            return None
        made.layer.advance(1)
        self._obstacles.served(self.number)
        return (self._answered(made, past, named),)

    def _answered(self, made: Made, past: Any, named: dict[str, Any]) -> Any:
        """Return the result in upstream's form, after showing the attention weights to the layer's hooks."""
        weights = made.weights
        if weights is not None and weights.dtype != self._dtype:
            weights = weights.to(self._dtype)
        if isinstance(past, tuple):
            past = made.layer.pair()
        given = {WEIGHTS: weights, CACHE: past, NOTHING: None}
        if weights is not None and is_read(self.attention):
            shown = self.forms.of(self._key("attention", named)) or ()
            self.attention(_Answer((made.hidden, *(given[kind] for kind in shown))))
        return made.hidden if made.form is None else (made.hidden, *(given[kind] for kind in made.form))

    def _run(self, hidden: torch.Tensor, past: Any, named: dict[str, Any]) -> Made | None:
        of_text = _of_text(named.get("audio_token_mask"), self._names)
        if of_text is None or self._is_unknown(named):
            return None
        rotated = self._rotation(hidden, named)
        form = self.forms.of(self._key("block", named))
        if form is False:
            return None  # upstream's call shows the form
        checked = self.watch.is_unchanged()
        first = self._ready(hidden, past, of_text, named, form, checked)
        if first is None:
            return None
        length = first.layer.length()
        mask = named.get("attention_mask")
        if mask is not None and mask.dim() == 4 and mask.shape[-1] == length + 2:  # noqa: PLR2004
            mask = mask[..., :-1]  # before 4.49 it has one more position, which attention cuts off, too
        given = None
        if mask is None or _is_usual_mask(mask, attention_of(self._config), hidden.dtype):
            given = shared(rotated, mask, hidden.shape[0], self._cache_shape[1], length + 1)
        if given is None or (rotated is None and "position_embeddings" in self._names):
            first.layer.release()
            return None  # upstream's forward, which raises its own error
        asked = [first, *self._others(hidden, past, of_text, named, form, checked, length)]
        weights = None
        if any(one.weights for one in asked):
            weights = hidden.new_empty((len(asked), hidden.shape[0], self._heads, length + 1), dtype=torch.float32)
        call = Call(plain(hidden), given, [one.layer.buffers() for one in asked], length, weights)
        made = self.steps.run([one.described for one in asked], call).to(hidden.dtype)
        if weights is not None:
            weights = weights.unsqueeze(3)
        self.stack.remember(Ahead(self.number, past, [one.layer for one in asked], named, made, weights, form))
        return Made(made[0].clone(), None if weights is None else weights[0], first.layer, form)

    def _others(  # noqa: PLR0913, PLR0917 - what the call consists of
        self, hidden: torch.Tensor, past: Any, of_text: bool, named: dict[str, Any], form: Form, checked: bool,
        length: int,
    ) -> list[_Ready]:  # fmt: skip
        """Return the blocks behind this one that are computed with it, up to the first with an obstacle."""
        whole = whole_tuple.get()
        found = []
        for place in self.stack.together(self.number):
            theirs = past
            if isinstance(past, tuple):
                if whole is None or len(whole) != len(self.blocks) or whole[self.number][0] is not past[0]:
                    break
                theirs = whole[place]
            ready = self.blocks[place]._ready(hidden, theirs, of_text, named, form, checked)
            if ready is None:
                break
            if ready.layer.length() != length:
                ready.layer.release()
                break
            found.append(ready)
        return found

    def _ready(  # noqa: PLR0913, PLR0917 - what the call consists of
        self, hidden: torch.Tensor, past: Any, of_text: bool, named: dict[str, Any], form: Form, checked: bool
    ) -> _Ready | None:
        """Return the kernel's inputs of this block, with cache capacity reserved; `None` if upstream must run.

        `checked` says that the stack's watch has found no change.
        """
        if not checked and self._is_altered():
            return None
        wanted = form is not None and WEIGHTS in form
        if is_read(self.attention):
            shown = self.forms.of(self._key("attention", named))
            if shown is False or shown is None:
                return None
            if WEIGHTS in shown and not wanted:  # read: they were requested, or an analyzer has a hook
                collected = attentions_wanted.get() or "forward" in self.attention.__dict__
                wanted = collected or is_spied(self.attention)
        layer = token_layer(self._obstacles, past, self.number, named)
        if layer is None:
            return None
        keys, values = layer.buffers()
        described = None
        if (
            keys.dtype == self._dtype
            and (keys.shape[1], keys.shape[3]) == self._cache_shape
            and hidden.shape[-1] == self._hidden
            and holds(keys, values, hidden.shape[0], layer.length())
        ):  # otherwise upstream runs, and raises its own error
            described = self._describe(of_text, checked=checked)
        if described is None or described.takes != (hidden.shape[-1], keys.shape[1], keys.shape[3]):
            layer.release()
            return None  # weights of other sizes were put in
        return _Ready(described, layer, wanted)

    def _rotation(self, hidden: torch.Tensor, named: dict[str, Any]) -> Any:
        """Return the rotary cosines and sines; before 4.48 some attention layers compute them themselves."""
        given = named.get("position_embeddings")
        own = getattr(self.attention, "rotary_emb", None)
        return own(hidden, named["position_ids"]) if given is None and own is not None else given

    def _fits(self, hidden: Any) -> TypeGuard[torch.Tensor]:
        return bool(
            is_plain(hidden)
            and hidden.dtype == self._dtype
            and hidden.dim() == 3  # noqa: PLR2004
            and hidden.shape[1] == 1
            and 0 < hidden.shape[0] <= MOST_ROWS
            and hidden.device.type == "cpu"
        )

    def _is_unknown(self, named: dict[str, Any]) -> bool:
        unknown = [name for name, value in named.items() if name not in IGNORED and value is not None]
        how = attention_of(self._config)
        if unknown:
            obstacle = f"it is called with {', '.join(sorted(unknown))}"
        elif how not in {"eager", "sdpa", None}:
            obstacle = f"attention is made by {how!r}"
        else:
            return False
        self._obstacles.report(obstacle, self.number)
        return True

    def _is_altered(self) -> bool:
        """Check for changes inside the block since the stage was applied, such as hooks, that the kernel would skip."""
        obstacle = self.inside.altered()
        if obstacle is not None:
            self._obstacles.report(obstacle, self.number)
        return obstacle is not None

    def _watched(self) -> WeightWatch:
        # In fp32 the kernel reads the model's own weights; of norms and biases in other dtypes or with gaps, copies.
        is_copied = self._weights != "fp32" or not all(map(_is_read_in_place, self._block.parameters()))
        return WeightWatch(self._block, content=is_copied)

    def _describe(self, of_text: bool, *, checked: bool) -> Described | None:
        watched, known = self._known
        if not checked and watched.outdated():
            self.forget()
            known = self._known[1]
        described = known.get(of_text)
        if described is None:
            layout = block_layouts(self._block, self._weights).get(of_text)
            if layout is None:
                self._obstacles.report("weights were exchanged for others, which the kernel does not know", self.number)
                return None
            described = known[of_text] = Described(layout, self._weights)
        return described


def _is_read_in_place(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.layout is torch.strided and tensor.is_contiguous()


def _is_usual_mask(mask: torch.Tensor, how: str | None, dtype: torch.dtype) -> bool:
    """Check that an attention function takes a mask as the kernel does: bools hide positions, numbers are added.

    Eager attention adds bools, too. torch's own refuses numbers of other dtypes.
    """
    if how == "eager":
        return mask.dtype != torch.bool
    return how is None or mask.dtype in {torch.bool, torch.float32, dtype}


def _of_text(mask: Any, names: list[str]) -> bool | None:
    """Check by Higgs' mask of audio tokens that all tokens are text; `None` if they are mixed."""
    if "audio_token_mask" not in names:
        return True
    if mask is None or bool(mask.all()):
        return False
    return None if bool(mask.any()) else True
