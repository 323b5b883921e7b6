"""Divergence of the next token's probabilities from the untouched model's: what counts of a decoder that samples.

A sampled sequence says little about a decoder whose weights were rounded: one token of three hundred that falls the
other way gives other speech of the same quality. So each step is compared by itself, given the same past.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate_tts.plan import Head

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

__all__ = ["divergence", "head_of"]


def divergence(reference: Iterable[Any], candidate: Iterable[Any], head: Head | None) -> float | None:
    """The largest Kullback-Leibler divergence of a step's next-token distribution, KL(reference || candidate), in nats.

    Args:
        reference: What the untouched decoder returned for each call: something with `logits` of shape (rows,
            positions, vocabulary) and perhaps `audio_logits` of shape (frames, codebooks, vocabulary), or with
            `last_hidden_state` of shape (rows, positions, width), for which a `head` is needed.
        candidate: The same of the changed one.
        head: What makes logits of hidden states.

    Returns:
        The largest over calls and rows, at the last position, which is what a loop samples from (with guidance, also of
        the guided distribution); `None` where the results are not a decoder's, infinite where one is not finite.
    """
    import torch

    worst: float | None = None
    with torch.inference_mode():
        for left, right in _pairs(reference, candidate, head):
            # Where the reference gives no probability at all (a masked token), there is nothing to lose.
            each = torch.where(left.isneginf(), 0.0, left.exp() * (left - right)).sum(-1)
            value = float(each.max())
            value = max(value, 0.0) if math.isfinite(value) else math.inf
            worst = value if worst is None else max(worst, value)
    return worst


def head_of(decoder: nn.Module, roots: Iterable[nn.Module]) -> Head | None:
    """The head of a decoder inside a model of transformers' kind, which tells it by `get_output_embeddings()`.

    Of all models around the decoder, the innermost counts that has a head, or generates by itself: the depth decoder of
    CSM lies inside a model with a head, which is not its own. A head of another width than the decoder's is none.
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
                return Head((head,)) if _reads(head, decoder) else None
            generates = getattr(owner, "can_generate", None)
            if callable(generates) and generates():
                return None
    return None


def _own_head(owner: Any) -> nn.Module | None:
    try:
        head: nn.Module | None = owner.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # transformers' way of saying that it has none
        return None
    return head


def _reads(head: Any, decoder: Any) -> bool:
    """Tell if a head is as wide as a decoder's hidden states, as far as either says."""
    width = getattr(getattr(decoder, "config", None), "hidden_size", None)
    inputs = getattr(head, "in_features", None)
    return width is None or inputs is None or bool(width == inputs)


def _pairs(reference: Iterable[Any], candidate: Iterable[Any], head: Head | None) -> Iterator[tuple[Any, Any]]:
    """Log-probabilities of the same steps. A model that speaks may write text as well, and is held to both."""
    for a, b in zip(reference, candidate, strict=False):
        for log_probabilities in (_of_sound, partial(_of_tokens, head=head)):
            left, right = log_probabilities(a), log_probabilities(b)
            if left is not None and right is not None and left.shape == right.shape:
                yield left, right


def _of_sound(output: Any) -> Any:
    """Of boson-multimodal's Higgs Audio: a distribution of each codebook for each frame, none while it writes text."""
    import torch

    logits: Any = getattr(output, "audio_logits", None)
    if not _has_steps(logits) or not logits.numel():
        return None
    return torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1)


def _of_tokens(output: Any, head: Head | None) -> Any:
    import torch

    logits: Any = getattr(output, "logits", None)
    if not _has_steps(logits):
        hidden: Any = getattr(output, "last_hidden_state", None)
        if head is None or not _has_steps(hidden):
            return None
        logits = head(hidden[:, -1:])
    # float64 of float32 logits: the divergence of a rounding is a difference of numbers that nearly agree.
    last = logits[:, -1].detach().to("cpu", torch.float64)
    if head is not None and head.guidance is not None and len(last) % 2 == 0:
        conditioned, unconditioned = last.chunk(2)
        last = torch.cat([last, conditioned + head.guidance * (conditioned - unconditioned)])
    return torch.log_softmax(last, dim=-1)


def _has_steps(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.is_floating_point()  # noqa: PLR2004
