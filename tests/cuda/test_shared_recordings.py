"""Recorded steps of several threads in one replay, on a device: bit for bit what each has alone. Never run so far."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from accelerate_tts import Event
from accelerate_tts.events import FellBack, NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.token_kernels import TokenKernels

CALLERS, LONG = 4, 60.0


def capture(model: Any, kernels: TokenKernels | None = None) -> tuple[Any, list[int]]:
    """Record a model's steps, and let up to four callers share them; return the change, and the callers of passes."""
    stage = CapturedStepStage(kernels=kernels)
    change: Any = stage.prepare(Part("model", "decoder", model))
    change.on()
    (steps,) = change.steps
    passes: list[int] = []

    def counted(blocks: Any, calls: Any) -> Any:
        passes.append(len(calls))
        return steps.usual.together(blocks, calls)

    steps.usual.arrange((1, 2, 4), 1)
    steps.rules = steps.usual._replace(most_rows=CALLERS, together=counted, window=5.0)
    steps.is_on = True
    return change, passes


def states(model: Any, seed: int, count: int = 30) -> torch.Tensor:
    """The logits of each token of a loop on a stream of its own, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    past, found = None, []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for number in range(count):
            ids = torch.randint(3, 50, (1, 1 if number else 3 + 5 * seed), generator=generator).cuda()
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[:, -1].cpu())
    return torch.stack(found)


def in_threads(model: Any, callers: int) -> list[torch.Tensor]:
    begin = threading.Barrier(callers)

    def ask(seed: int) -> torch.Tensor:
        begin.wait(LONG)
        return states(model, seed)

    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(ask, range(callers)))


@pytest.mark.parametrize("callers", [2, 4, 8])
def test_callers_of_upstreams_own_step(model: Any, callers: int, seen: list[Event]) -> None:
    """Numbers of rows whose bits differ are left out by an event, so that results are equal in any case."""
    expected = [states(model, seed) for seed in range(callers)]
    change, passes = capture(model)
    alone = [states(model, seed) for seed in range(callers)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, alone, strict=True))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(alone, in_threads(model, callers), strict=True))
    assert passes, "of 240 steps, some are shared"
    assert not [event for event in seen if isinstance(event, FellBack)]
    change.off()
    assert all(torch.equal(states(model, seed), each) for seed, each in enumerate(expected))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_rows_of_the_token_kernels_do_not_depend_on_each_other(
    make: dict[str, Callable[[], Any]], weights: Any, seen: list[Event]
) -> None:
    model = make["Llama"]()
    _, passes = capture(model, TokenKernels(weights))
    alone = [states(model, seed) for seed in range(CALLERS)]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(alone, in_threads(model, CALLERS), strict=True))
    assert passes
    # Norm and head behind the blocks are upstream's, and the only ones that might differ.
    assert not [event for event in seen if isinstance(event, (FellBack, NotApplied))]
