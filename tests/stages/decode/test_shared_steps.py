"""Decode steps of several threads in one pass over the weights: bit for bit what each computes alone."""

from __future__ import annotations

import threading
from typing import Any

import torch
import transformers

from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.decode.shared_steps import Rules

WIDTH, LAYERS = 32, 3


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def speak(model: Any, seed: int, rows: int, prompt: int, count: int, meet: threading.Barrier | None = None) -> Any:
    """One caller's whole loop: a prompt and `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    past, states = None, []
    with torch.inference_mode():
        for number in range(count + 1):
            x = torch.randn(rows, 1 if number else prompt, WIDTH, generator=generator)
            if meet is not None:
                meet.wait(20)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
            past = out.past_key_values
            states.append(out.last_hidden_state[:, -1:])
    return torch.cat(states, 1)


def test_two_threads_in_step(blocks_a_call: list[int]) -> None:
    model = llama()
    change = FusedBlocksStage().prepare(Part("model", "decoder", model))
    change.on()
    speak(model, 0, 1, 3, 2)
    alone = [speak(model, seed, 1 + seed, 4 + 3 * seed, 20) for seed in range(2)]
    for steps in change.steps:
        steps.is_on, steps.rules = True, Rules(window=300.0)
    blocks_a_call.clear()
    found: list[Any] = [None, None]
    meet = threading.Barrier(2)

    def work(seed: int) -> None:
        found[seed] = speak(model, seed, 1 + seed, 4 + 3 * seed, 20, meet)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))
    assert len(blocks_a_call) < 40
