"""The decode step as a CUDA graph, recorded and replayed: upstream's tokens, in every loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from accelerate_tts import Event
from accelerate_tts.events import FellBack
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.slot_pool import Bounds

PROMPT = 6


BOUNDS = Bounds()


def capture(model: Any, bounds: Bounds = BOUNDS) -> Any:
    stage, part = CapturedStepStage(bounds=bounds), Part("model", "decoder", model)
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


def generate(model: Any, count: int = 40, rows: int = 1, seed: int = 3, **options: Any) -> torch.Tensor:
    ids = torch.randint(3, 50, (rows, PROMPT), generator=torch.Generator().manual_seed(seed)).cuda()
    torch.manual_seed(seed)
    found: torch.Tensor = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=True, pad_token_id=0, **options
    )
    return found


def states(model: Any, count: int = 12, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """The logits of each token of a loop, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    past, found = None, []
    with torch.inference_mode():
        for number in range(count):
            ids = torch.randint(3, 50, (rows, 1 if number else PROMPT), generator=generator).cuda()
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[:, -1].cpu())
    return torch.stack(found)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tokens_are_upstreams(model: Any, rows: int, seen: list[Event]) -> None:
    expected = states(model, rows=rows)
    change = capture(model)
    for _ in range(3):  # from the second one on the prompt is written into the slot
        assert torch.allclose(states(model, rows=rows), expected, atol=1e-5)
    assert change.graphs == 1
    assert not [event for event in seen if isinstance(event, FellBack)]
    change.off()
    assert torch.equal(states(model, rows=rows), expected)


def test_three_hundred_sampled_tokens_across_buckets(model: Any) -> None:
    expected = generate(model, 300, rows=2)
    change = capture(model)
    assert torch.equal(generate(model, 300, rows=2), expected)
    assert change.graphs == 2, "up to 256 positions, and up to 512"


def test_threads_with_streams_of_their_own_share_recordings(model: Any) -> None:
    expected = [states(model, seed=seed) for seed in range(8)]
    change = capture(model)

    def ask(seed: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            return states(model, seed=seed)

    with ThreadPoolExecutor(8) as pool:
        for a, b in zip(expected, pool.map(ask, range(8)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert len(change.slots) <= BOUNDS.slots


def test_two_sequences_over_one_slot(model: Any) -> None:
    """One is in it, and the other one visits another."""
    ids = torch.randint(3, 50, (2, 9, 1, 5), generator=torch.Generator().manual_seed(0)).cuda()

    def run() -> list[torch.Tensor]:
        pasts: list[Any] = [None, None]
        found = []
        with torch.inference_mode():
            for number in range(9):
                for which in (0, 1):
                    given = ids[which, number] if number == 0 else ids[which, number][:, :1]
                    out = model(input_ids=given, past_key_values=pasts[which], use_cache=True)
                    pasts[which] = out.past_key_values
                    found.append(out.logits[:, -1])
        return found

    expected = run()
    change = capture(model, Bounds(slots=1))
    for a, b in zip(expected, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert change.graphs == 2


def test_keys_that_are_kept_stay_as_they_are(model: Any) -> None:
    """As those of a voice's prompt, on a stream of the caller's own."""
    capture(model, Bounds(slots=1))
    ids = torch.randint(3, 50, (4, 1, 6), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        for request in range(4):
            past = None
            for number in range(3):
                past = model(input_ids=ids[request][:, : 1 if number else 6], past_key_values=past).past_key_values
            if request == 1:
                kept = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
                before = [tensor.clone() for tensor in kept]
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_new_weights_are_served(model: Any) -> None:
    capture(model)
    states(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = states(model)
    model.cpu().cuda()  # other addresses
    assert torch.allclose(found, states(model), atol=1e-5)


def test_what_is_recorded_is_freed(make: dict[str, Callable[[], Any]], held: Callable[[], int]) -> None:
    before = held()
    model = make["Llama"]()
    change = capture(model)
    states(model)
    assert change.graphs == 1
    change.off()
    del model, change
    assert held() <= before


def test_eight_threads_over_four_slots(model: Any, seen: list[Event]) -> None:
    """No sequence's buffers are written from another stream: longer than a slot lives, and each state is compared."""
    work = [(seed, 1 + seed % 2) for seed in range(24)]
    expected = [states(model, 40, rows, seed) for seed, rows in work]
    change = capture(model)

    def ask(each: tuple[int, int]) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            return states(model, 40, each[1], each[0])

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            for (seed, rows), a, b in zip(work, expected, pool.map(ask, work), strict=True):
                assert torch.allclose(a, b, atol=1e-5), f"seed {seed}, {rows} rows, {float((a - b).abs().max())}"
    assert len(change.slots) <= BOUNDS.slots
    assert not [event for event in seen if isinstance(event, FellBack)]
