"""A recorded step by Triton's kernels on a device: upstream's states and tokens, in fewer kernels. Never run so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from accelerate_tts import Event
from accelerate_tts.events import FellBack
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.token_kernels import TokenKernels

pytest.importorskip("triton")


def capture(model: Any, weights: Any = "fp32") -> Any:
    stage, part = CapturedStepStage(kernels=TokenKernels(weights)), Part("model", "decoder", model)
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


def states(model: Any, count: int = 12, rows: int = 1, prompt: int = 6) -> torch.Tensor:
    """The logits of each token of a loop, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    past, found = None, []
    with torch.inference_mode():
        for number in range(count):
            ids = torch.randint(3, 50, (rows, 1 if number else prompt), generator=generator).cuda()
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[:, -1].float().cpu())
    return torch.stack(found)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_states_are_upstreams(model: Any, rows: int, seen: list[Event]) -> None:
    expected = states(model, rows=rows)
    change = capture(model)
    assert torch.allclose(states(model, rows=rows), expected, atol=1e-5)
    assert change.graphs == 1
    assert not [event for event in seen if isinstance(event, FellBack)]
    change.off()
    assert torch.equal(states(model, rows=rows), expected)


def test_three_hundred_sampled_tokens_across_buckets(model: Any) -> None:
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3)).cuda()

    def generate() -> torch.Tensor:
        torch.manual_seed(3)
        found: torch.Tensor = model.generate(
            ids, max_new_tokens=300, min_new_tokens=300, do_sample=True, pad_token_id=0
        )
        return found

    expected = generate()
    change = capture(model)
    assert torch.equal(generate(), expected)
    assert change.graphs == 2, "up to 256 positions, and up to 512"


@pytest.mark.parametrize(("weights", "limit"), [("bf16", 1e-2), ("int8", 2e-2)])
def test_weights_in_fewer_bytes(make: dict[str, Callable[[], Any]], weights: Any, limit: float) -> None:
    model = make["Llama"]()
    expected = states(model, rows=2)
    capture(model, weights)
    assert 0 < float((states(model, rows=2) - expected).norm() / expected.norm()) < limit


def test_a_model_in_bf16(make: dict[str, Callable[[], Any]], seen: list[Event]) -> None:
    model = make["Llama"]()
    exact = states(model)
    model = model.to(torch.bfloat16)
    upstreams = float((states(model) - exact).norm() / exact.norm())
    capture(model)
    assert float((states(model) - exact).norm() / exact.norm()) < 1.5 * upstreams
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_new_weights_are_served(make: dict[str, Callable[[], Any]]) -> None:
    model = make["Llama"]()
    change = capture(model)
    states(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = states(model)
    change.off()
    assert torch.allclose(found, states(model), atol=1e-5)


def test_a_token_is_started_in_fewer_kernels(make: dict[str, Callable[[], Any]]) -> None:
    model = make["Llama"]()

    def kernels() -> int:
        states(model)  # recorded
        (slot,) = change.slots
        recording: Any = vars(slot)["_recording"]
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as told:
            recording.replay()
            torch.cuda.synchronize()
        return sum(event.count for event in told.key_averages())

    change: Any = CapturedStepStage().prepare(Part("model", "decoder", model))
    change.on()
    upstreams = kernels()
    change.off()
    change = capture(model)
    ours = kernels()
    assert ours <= upstreams - 25 * model.config.num_hidden_layers, f"{ours} for {upstreams}"
