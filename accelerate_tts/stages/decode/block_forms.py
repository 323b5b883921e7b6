"""Forms of a decoder block's calls: the arguments that it may get, and the items that it returns."""

from __future__ import annotations

from typing import Any, Literal

import torch

IGNORED = {
    "hidden_states", "attention_mask", "position_embeddings", "audio_token_mask", "position_ids", "cache_position",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_causal",
}  # fmt: skip
"""Arguments that a block may get beside a kernel's inputs, and that change nothing for one token."""

WEIGHTS, CACHE, NOTHING = "weights", "cache", "nothing"
Form = tuple[str, ...] | None


class Forms:
    """Forms of results: the kinds of the items behind the hidden states; `None` for the states alone."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Form] = {}

    def learn(self, key: tuple[Any, ...], result: Any, past: Any) -> None:
        """Store the form of one of upstream's results."""
        if key not in self._found:
            form = tuple(_kind(item, past) for item in result[1:]) if isinstance(result, tuple) else None
            if form is None or "" not in form:
                self._found[key] = form

    def of(self, key: tuple[Any, ...]) -> Form | Literal[False]:
        """Return the form of upstream's results; `False` if none was seen yet."""
        return self._found.get(key, False)


def _kind(item: Any, past: Any) -> str:
    if item is None:
        return NOTHING
    if item is past or isinstance(item, tuple):
        return CACHE
    return WEIGHTS if isinstance(item, torch.Tensor) and item.dim() == 4 else ""  # noqa: PLR2004
