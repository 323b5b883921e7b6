"""Divergence of next-token probabilities from those of the untouched model, for decoders that sample.

A sampled sequence says little about a decoder with rounded weights: one different token of three hundred gives other
speech of the same quality. Each step is therefore compared by itself, given the same past.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.plan import Head

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def divergence(reference: Iterable[Any], candidate: Iterable[Any], head: Head | None) -> float | None:
    """Compute the largest Kullback-Leibler divergence of next-token distributions, KL(reference || candidate), in nats.

    Args:
        reference: Outputs of the untouched decoder's calls. They have `logits` of shape (batch, positions, vocabulary)
            and perhaps `audio_logits` of shape (frames, codebooks, vocabulary), or `last_hidden_state` of shape (batch,
            positions, width), which needs a `head`. Those of a part that is a head are tensors of logits, of shape
            (batch, vocabulary) or (batch, positions, vocabulary).
        candidate: Outputs of the changed part.
        head: Output head that computes logits from hidden states; one without modules for a part that is a head.

    Returns:
        The largest divergence over calls and the batch at the last position, which a loop samples from; with guidance,
        also of the guided distribution. `None` if the outputs are not a decoder's, infinite if one is not finite.
    """
    worst: float | None = None
    with torch.inference_mode():
        for left, right in _pairs(reference, candidate, head):
            # A token without probability in the reference (a masked one) contributes nothing.
            each = torch.where(left.isneginf(), 0.0, left.exp() * (left - right)).sum(-1)
            value = float(each.max())
            value = max(value, 0.0) if math.isfinite(value) else math.inf
            worst = value if worst is None else max(worst, value)
    return worst


def head_of(decoder: nn.Module, roots: Iterable[nn.Module]) -> Head | None:
    """Return the head of a decoder inside a transformers model, by `get_output_embeddings()`; `None` without one.

    The innermost model around the decoder that has a head, or can generate, decides: CSM's depth decoder lies inside
    another model with a head that is not its own. A head of another width than the decoder's does not count, nor one
    that needs more than hidden states. A list of heads, one for each codebook, is one head: Qwen3-TTS's code predictor
    uses another one at each step, so each step is compared by all of them.
    """
    around: dict[int, list[Any]] = {}
    for root in roots:
        for outer in root.modules():
            inside = set(outer.modules())
            if outer is not decoder and decoder in inside and callable(getattr(outer, "get_output_embeddings", None)):
                around.setdefault(len(inside), []).append(outer)
    for _, owners in sorted(around.items()):
        for owner in owners:
            head = _own_head(owner)
            if head is not None and head not in set(decoder.modules()):
                return _as_head(head, decoder)
            generates = getattr(owner, "can_generate", None)
            if callable(generates) and generates():
                return None
    return None


def _own_head(owner: Any) -> nn.Module | None:
    try:
        head: nn.Module | None = owner.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # raised by transformers if there is no head
        return None
    return head


class _SideBySide(nn.Module):
    """Heads of several codebooks, which read the same hidden states."""

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([head(hidden) for head in self.heads], -2)


def _as_head(found: nn.Module, decoder: nn.Module) -> Head | None:
    each = list(found) if isinstance(found, nn.ModuleList) else [found]
    if not all(_reads(head, decoder) for head in each):
        return None
    if not isinstance(found, nn.ModuleList):
        return Head((found,))
    sizes = {getattr(head, "out_features", None) for head in each}
    return Head((_SideBySide(found),)) if len(sizes) == 1 and None not in sizes else None


def _reads(head: nn.Module, decoder: Any) -> bool:
    """Check that a head takes hidden states alone, and has a decoder's width of them, if both widths are known."""
    if type(head).forward is nn.Module.forward:  # a container is never called
        return False
    try:
        inspect.signature(head.forward).bind(None)
    except TypeError:
        return False
    width = getattr(getattr(decoder, "config", None), "hidden_size", None)
    inputs = getattr(head, "in_features", None)
    return width is None or inputs is None or bool(width == inputs)


def _pairs(reference: Iterable[Any], candidate: Iterable[Any], head: Head | None) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of log-probabilities of the same steps, of sound and of text tokens."""
    for a, b in zip(reference, candidate, strict=False):
        for log_probabilities in (_of_sound, partial(_of_tokens, head=head)):
            left, right = log_probabilities(a), log_probabilities(b)
            if left is not None and right is not None and left.shape == right.shape:
                yield left, right


def _of_sound(output: Any) -> Any:
    """Return log-probabilities of boson-multimodal's Higgs Audio for each frame and codebook; `None` for text steps."""
    logits: Any = getattr(output, "audio_logits", None)
    if not _has_steps(logits) or not logits.numel():
        return None
    return torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1)


def _of_tokens(output: Any, head: Head | None) -> Any:
    logits: Any = getattr(output, "logits", None)
    if head is not None and not head.modules and isinstance(output, torch.Tensor):
        logits = head(output[:, None] if output.dim() == 2 else output)  # noqa: PLR2004
    elif not _has_steps(logits):
        hidden: Any = getattr(output, "last_hidden_state", None)
        if head is None or not _has_steps(hidden):
            return None
        logits = head(hidden[:, -1:])
    # float64, since the divergence of rounding errors is a difference of nearly equal numbers.
    last = logits[:, -1].detach().to("cpu", torch.float64)
    if head is not None and head.guidance is not None and len(last) % 2 == 0:
        conditioned, unconditioned = last.chunk(2)
        last = torch.cat([last, conditioned + head.guidance * (conditioned - unconditioned)])
    return torch.log_softmax(last, dim=-1)


def _has_steps(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.is_floating_point()  # noqa: PLR2004
