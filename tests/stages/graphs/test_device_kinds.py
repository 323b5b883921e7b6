"""All that is recorded, by the recorder that devices have, over stand-ins for the graphs of CUDA and of XPU.

What is recorded is shown in the suites of each stage; here it meets the streams, events and pools of each kind. Nothing
here ran on a device.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from device_kinds import KINDS, cpu_as
from small_decoders import WIDTH, gpt2, llama
from torch import nn
from torch.nn import functional

from accelerate_tts.events import Event, FellBack
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.growing_cache import GrowingCacheStage
from accelerate_tts.stages.decode.recorded_prompts import RecordedPromptsStage
from accelerate_tts.stages.graphs.recorded_parts import RecordedPartsStage
from accelerate_tts.stages.graphs.recorded_pieces import RecordedPiecesStage
from accelerate_tts.tuning.exclusions import obstacle

pytestmark = pytest.mark.usefixtures("layered_caches", "one_thread")


class Vocoder(nn.Module):
    """Convolutions with a reach of a few frames."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(functional.leaky_relu(x, 0.1))
        return torch.tanh(x)


def frames(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, count, generator=torch.Generator().manual_seed(seed))


def spoken(model: Any, length: int = 5, tokens: int = 6, seed: int = 0) -> torch.Tensor:
    """The states of a prompt and of tokens behind it."""
    generator, past, found = torch.Generator().manual_seed(seed), None, []
    with torch.inference_mode():
        for number in range(tokens + 1):
            x = torch.randn(2, 1 if number else length, WIDTH, generator=generator)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.last_hidden_state)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_steps_and_prompts_of_a_decoder(kind: str, make: Any, seen: list[Event]) -> None:
    model = make()
    expected = {seed: spoken(model, 5 + seed, seed=seed) for seed in range(3)}
    part = Part("model", "decoder", model)
    with cpu_as(kind, watched=False) as graphs:
        step, prompts = CapturedStepStage(), RecordedPromptsStage()
        assert step.applies(part) is None
        step = step.prepare(part)
        step.on()
        assert obstacle(GrowingCacheStage(), part) == "its steps are recorded", "a recorded step brings them"
        assert prompts.applies(part) is None
        prompts = prompts.prepare(part)
        prompts.on()
        for seed, states in expected.items():
            assert torch.allclose(spoken(model, 5 + seed, seed=seed), states, atol=1e-5)
        assert (step.graphs, prompts.graphs) == (1, 1)
        assert graphs.replays >= 3 * 6 + 3, "each token, and each prompt"
        prompts.off()
        step.off()
    assert torch.equal(spoken(model), expected[0])
    assert not [event for event in seen if isinstance(event, FellBack)]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_take_turns_on_streams_of_their_own(kind: str) -> None:
    model = llama()
    expected = [spoken(model, seed=seed) for seed in range(6)]
    found: dict[int, torch.Tensor] = {}
    with cpu_as(kind, watched=False) as graphs:
        change = CapturedStepStage().prepare(Part("model", "decoder", model))
        change.on()
        threads = [
            threading.Thread(target=lambda seed=seed: found.update({seed: spoken(model, seed=seed)}))
            for seed in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert graphs.replays == 6 * 6
        change.off()
    assert sorted(found) == list(range(6))
    for seed, states in found.items():
        assert torch.allclose(states, expected[seed], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_by_shape_and_in_pieces(kind: str, seen: list[Event]) -> None:
    model = Vocoder().eval()
    part = Part("vocoder", "vocoder", model)
    for stage, counts in ((RecordedPartsStage, (12, 12, 12)), (RecordedPiecesStage, (64, 90, 71))):
        with torch.inference_mode():
            expected = [model(frames(count, seed)) for seed, count in enumerate(counts)]
        with cpu_as(kind) as graphs, torch.inference_mode():
            made = stage()
            assert made.applies(part) is None
            change: Any = made.prepare(part)
            change.on()
            for seed, count in enumerate(counts):
                assert torch.allclose(model(frames(count, seed)), expected[seed], atol=1e-5)
            assert change.graphs == 1
            assert graphs.replays >= len(counts)
            change.off()
    assert not [event for event in seen if isinstance(event, FellBack)]


@pytest.mark.parametrize("kind", KINDS)
def test_where_torch_has_no_graphs_for_the_device_each_stage_says_so(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-in: a torch of before the class came."""
    decoder, vocoder = Part("model", "decoder", llama()), Part("vocoder", "vocoder", Vocoder().eval())
    tried = ((CapturedStepStage(), decoder), (RecordedPartsStage(), vocoder), (RecordedPiecesStage(), vocoder))
    for stage, part in tried:
        assert stage.applies(part) == "torch has no graphs for cpu"
    with cpu_as(kind):
        assert [stage.applies(part) for stage, part in tried] == [None] * 3
        name = {"cuda": "CUDAGraph", "xpu": "XPUGraph"}[kind]
        monkeypatch.delattr(getattr(torch, kind), name)
        for stage, part in tried:
            reason = stage.applies(part)
            assert reason is not None
            assert reason.startswith(f"torch {torch.__version__} has no torch.{kind}.{name}; torch ")
