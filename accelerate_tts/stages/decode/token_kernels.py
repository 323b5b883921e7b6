"""A decoder block's recorded step in five launches of Triton kernels (kernels/triton/). Exact to rounding.

For CUDA and XPU, whose releases of torch bring a Triton along.

On an H100 a recorded token of T3 is 1,101 small kernels, which take seven times as long as the memory needs for the
weights. Here a block is five. Attention runs over the positions so far rather than over the capacity of the buffers.
In fp32 the kernels read the model's own weights; "balanced" may keep bf16 copies of them, and "fast" int8 copies.
Sums, norms and softmax are in fp32.

Only recordings call the kernels: a block looks for the static cache of a recorded step (static_step.py), and takes
upstream's own forward otherwise. Never run on a device; docs/decisions/0009-cuda.md says what a CPU has shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.inspection.tracing import is_plain, is_traced
from accelerate_tts.kernels.block_layout import triton_layouts
from accelerate_tts.kernels.triton.token_block import Copies, Token, copied, missing, run, runs_on
from accelerate_tts.kernels.weight_formats import FORMATS, MOST_ROWS, WeightFormat
from accelerate_tts.patching.class_swap import ClassSwap, subclass_with
from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.stages.decode.block_forms import CACHE, IGNORED, WEIGHTS, Forms
from accelerate_tts.stages.decode.call_args import (
    Obstacles,
    attention_of,
    attentions_wanted,
    cache_of,
    take_cache,
    tidy,
)
from accelerate_tts.stages.decode.static_step import StaticLayer

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part


class TokenKernels:
    """Kernels for the blocks of a recorded step, as `CapturedStepStage` takes them.

    Args:
        weights: Format in which the kernels read the weights; "fp32" stands for the model's own.

    Attributes:
        name: Their name.
        smaller: Names of those that read fewer bytes.
    """

    def __init__(self, weights: WeightFormat = "fp32") -> None:
        self._weights: WeightFormat = weights
        self.name, *self.smaller = (f"token kernels ({each})" for each in FORMATS[FORMATS.index(weights) :: -1])

    def applies(self, part: Part) -> str | None:
        """Return the reason why they do not serve a part, or `None`."""
        if (reason := missing()) is not None:
            return reason
        blocks = _blocks(part.module, self._weights)
        if not blocks:
            return "no decoder's blocks that the kernels know in it"
        is_there = all(runs_on(parameter.device) for block in blocks for parameter in block.parameters())
        return None if is_there else "it is on no device that Triton computes on"

    def prepare(self, part: Part) -> TokenBlocks:
        """Make the change. Nothing is compiled or copied yet."""
        return TokenBlocks(part, self._weights)


def _blocks(module: nn.Module, weights: WeightFormat) -> list[nn.Module]:
    return [inner for inner in module.modules() if triton_layouts(inner, weights)]


class TokenBlocks(ClassSwap):
    """The change: the forward of each block's class computes a recorded step by the kernels.

    Attributes:
        makes_copies: True if they read copies of the weights.
    """

    def __init__(self, part: Part, weights: WeightFormat) -> None:
        obstacles, forms = Obstacles(f"the token kernels of {part.name}"), Forms()
        blocks = _blocks(part.module, weights)
        self._blocks = {block: _Block(block, weights, obstacles, forms) for block in blocks}
        self.makes_copies = weights != "fp32"
        super().__init__(blocks, lambda block: self._blocks[block].class_for(type(block)))

    def on(self) -> None:
        for block in self._blocks:
            tidy(block)
        super().on()

    def forget(self, decoder: nn.Module) -> None:
        """Drop the copies of a decoder's weights. No recording may use them any more."""
        for block in self._of(decoder):
            block.copies.clear()

    def give_up(self, decoder: nn.Module) -> bool:
        """Have upstream's forward recorded from now on; return False if it was already.

        Earlier recordings keep their copies, which they read.
        """
        blocks = self._of(decoder)
        serve = any(block.serves for block in blocks)
        for block in blocks:
            block.serves = False
        return serve

    def _of(self, decoder: nn.Module) -> list[_Block]:
        return [self._blocks[inner] for inner in decoder.modules() if inner in self._blocks]


class _Block:
    """One block.

    Attributes:
        serves: False once the kernels could not be compiled or started.
        copies: Copies of the weights, for text (`True`) and audio tokens; valid until `TokenBlocks.forget`.
    """

    def __init__(self, block: nn.Module, weights: WeightFormat, obstacles: Obstacles, forms: Forms) -> None:
        self._block: Any = block
        self._weights: WeightFormat = weights
        self._obstacles, self._forms = obstacles, forms
        self._names = parameters_of(plain_class(block))
        attention: Any = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        self._number, self._config = attention.layer_idx, attention.config
        self._inside = Inside(block, [(attention, "config")], read=attention)
        self.serves = True
        self.copies: dict[bool, Copies] = {}

    def class_for(self, plain: Any) -> type:
        """Return the block's class while the change is on."""

        def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            result = self._token(named)
            if result is not None:
                return result[0]
            result = plain.forward(block, *args, **kwargs)
            if not is_traced():
                self._forms.learn(self._key(named), result, cache_of(named))
            return result

        return subclass_with(plain, forward, copies="" if self._weights == "fp32" else self._weights)

    def _key(self, named: dict[str, Any]) -> tuple[Any, ...]:
        """Return the key of a result's form."""
        return attention_of(self._config), bool(named.get("output_attentions")), bool(named.get("use_cache"))

    def _token(self, named: dict[str, Any]) -> tuple[Any] | None:
        """Return the block's result for a recorded token in a tuple, or `None` if upstream's forward must run."""
        if not self.serves or torch.is_grad_enabled() or is_traced():
            return None
        key, given = self._key(named), dict(named)
        past = take_cache(given)
        layers = getattr(past, "layers", ())
        layer = layers[self._number] if self._number < len(layers) else None
        form = self._forms.of(key)
        if not isinstance(layer, StaticLayer) or form is False:
            return None  # upstream's call shows the form; a step runs a few times before it is recorded
        obstacle = self._obstacle(given, form)
        hidden = self._computed(given, layer) if obstacle is None else None
        if hidden is None:
            reason = obstacle or "weights, shapes or a device that the kernels do not know"
            self._obstacles.report(reason, self._number)
            return None
        self._obstacles.served(self._number)
        return (hidden if form is None else (hidden, *(past if kind == CACHE else None for kind in form)),)

    def _obstacle(self, given: dict[str, Any], form: tuple[str, ...] | None) -> str | None:
        unknown = [name for name, value in given.items() if name not in IGNORED and value is not None]
        if given.get("audio_token_mask") is not None:
            unknown.append("audio_token_mask")  # its values would have to be read from the device
        if unknown:
            return f"it is called with {', '.join(sorted(unknown))}"
        has_weights = attention_of(self._config) != "sdpa"  # released Chatterbox asks for them, and gets none
        if (attentions_wanted.get() and has_weights) or (form is not None and WEIGHTS in form):
            return "attention weights are asked for"
        return self._inside.altered()

    def _computed(self, given: dict[str, Any], layer: StaticLayer) -> torch.Tensor | None:
        of_text = "audio_token_mask" not in self._names
        layout = triton_layouts(self._block, self._weights).get(of_text)
        hidden: Any = given.get("hidden_states")
        mask: Any = given.get("attention_mask")
        rotation = given.get("position_embeddings")
        if layout is None or not is_plain(hidden) or not is_plain(mask) or hidden.dim() != 3:  # noqa: PLR2004
            return None
        is_rotated = "position_embeddings" in self._names
        if (rotation is not None) != is_rotated or not 0 < hidden.shape[0] <= MOST_ROWS or not runs_on(hidden.device):
            return None
        token = Token(hidden, rotation, mask, layer.position, *layer.buffers, layer.any_rows)
        if not token.fits(layout):
            return None
        if of_text not in self.copies:
            with torch.inference_mode(mode=False), torch.no_grad():  # normal tensors, which outlive this scope
                self.copies[of_text] = copied(layout, self._weights)
        return run(layout, self.copies[of_text], token)
