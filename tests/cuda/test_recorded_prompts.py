"""Prompts recorded in buckets of lengths on a device: upstream's states, in every length. Never run so far."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from accelerate_tts import Event
from accelerate_tts.events import FellBack, NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.recorded_prompts import RecordedPromptsStage

LENGTHS = (5, 31, 32, 47)
"""Two buckets."""


def record(model: Any) -> Any:
    part, stage = Part("model", "decoder", model), RecordedPromptsStage()
    CapturedStepStage().prepare(part).on()
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


def states(model: Any, length: int, rows: int = 2, padded: bool = False, count: int = 4) -> torch.Tensor:
    """The logits of a prompt's last position and of each token, on the CPU."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3 if padded else 0] = 0
    past, found = None, []
    with torch.inference_mode():
        for number in range(count):
            ids = torch.randint(3, 50, (rows, 1 if number else length), generator=generator).cuda()
            out = model(input_ids=ids, past_key_values=past, use_cache=True, attention_mask=mask.cuda())
            past, mask = out.past_key_values, torch.cat([mask, mask.new_ones(rows, 1)], 1)
            found.append(out.logits[:, -1].cpu())
    return torch.stack(found)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_prompts_and_their_tokens_are_upstreams(model: Any, rows: int, padded: bool, seen: list[Event]) -> None:
    expected = [states(model, length, rows, padded) for length in LENGTHS]
    change = record(model)
    for _ in range(3):  # from the second one on, keys and values are copied into a slot
        for length, wanted in zip(LENGTHS, expected, strict=True):
            assert torch.allclose(states(model, length, rows, padded), wanted, atol=1e-4)
    assert change.graphs == 2
    assert not [event for event in seen if isinstance(event, (FellBack, NotApplied))]


def test_threads_with_streams_of_their_own_have_the_same_bits(model: Any) -> None:
    record(model)
    expected = [states(model, 5 + length, count=1) for length in range(8)]

    def ask(length: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            return states(model, 5 + length, count=1)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert all(map(torch.equal, expected, pool.map(ask, range(8))))
