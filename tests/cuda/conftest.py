"""Tests that need a CUDA device, and are skipped without one. The other tests use stand-ins for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

WIDTH = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch TF32 off, since its errors would hide others of the same size, and those of bf16."""
    monkeypatch.setenv("ACCELERATE_TTS_TF32", "0")


def reserved() -> int:
    """Return the bytes that torch holds for what is alive, without cuBLAS's workspaces: one a thread and stream."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.fixture
def held() -> Callable[[], int]:
    """`reserved`."""
    return reserved


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().cuda()


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=4, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=None, **options
    )
    return transformers.GPT2LMHeadModel(config).eval().cuda()


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Llama by eager attention": lambda: llama(attn_implementation="eager"),
    "GPT-2": gpt2,
}


@pytest.fixture
def make() -> dict[str, Callable[[], Any]]:
    """Functions that make the models."""
    return MODELS


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()
