"""Decoders of transformers at small size, seeded, and edits of them that no replay would read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

WIDTH = 32


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=50, **options)
    return transformers.GPT2Model(config).eval()


UNREAD = ("factor", "epsilon", "forward", "class", "training", "global hook")
"""Names of the edits."""


@contextmanager
def edited(how: str, *models: Any) -> Iterator[None]:
    """Edit Llamas. An edit of torch itself is taken back in the end."""
    for each in models:
        if how == "factor":
            each.layers[0].self_attn.scaling *= 2
        elif how == "epsilon":
            each.norm.variance_epsilon = 0.5
        elif how == "forward":
            each.layers[0].mlp.forward = lambda x: x * 0.5
        elif how == "training":
            each.layers[0].train()
        elif how == "class":
            each.layers[0].mlp.act_fn.__class__ = nn.Tanh
    if how != "global hook":
        yield
        return
    handle = nn.modules.module.register_module_forward_hook(lambda _module, _given, result: result)
    try:
        yield
    finally:
        handle.remove()
