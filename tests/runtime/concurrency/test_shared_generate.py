"""Concurrent calls of a loaded language model, each in upstream's own `generate`: bit for bit what each is alone.

They sample, each by a seed of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from typing import Any

import pytest
import torch
import transformers
from meetings import Brief

from accelerate_tts import Event, carry_mode, fast_inference, inference, optimized_model, own_random, receipt_of
from accelerate_tts.events import DecodePasses
from accelerate_tts.kernels.decoder_block import run, run_together
from accelerate_tts.patching.class_swap import fused_by
from accelerate_tts.stages.decode.shared_steps import SharedSteps
from doubles import clock_of, pays_off

pytestmark = pytest.mark.usefixtures("one_thread")

CALLERS = 4
LONG = 60.0  # seconds after which a caller counts as stuck
LENGTHS = [(3, 20), (9, 12), (1, 16), (40, 25)]
"""Tokens of each caller's prompt, and those that it makes."""


class Speaker:
    """A backend as a service has it."""

    @optimized_model(warmup=lambda speaker: speaker.say(0), tune_seconds=10.0)
    def load(self) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.model.generation_config.eos_token_id = None  # nothing ends early

    def say(self, number: int) -> list[torch.Tensor]:
        """Return the sampled tokens and the scores of each."""
        prompt, count = LENGTHS[number]
        ids = torch.arange(prompt)[None] * 7 % 47 + number
        with own_random(number):
            made: Any = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=count, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        return [made.sequences, *made.scores]

    @inference(concurrency=CALLERS)
    def speak(self, number: int) -> list[torch.Tensor]:
        return self.say(number)

    @inference(concurrency=CALLERS)
    async def speak_async(self, number: int) -> list[torch.Tensor]:
        return await asyncio.to_thread(carry_mode(self.say), number)


@pytest.fixture
def speaker(decide: Callable[..., object]) -> Speaker:
    def look(run: Callable[[], Any], *_: object) -> float:
        """Says that a pass for several takes as long as one, so that steps are shared."""
        run()
        return 1e-3

    decide(
        compare=pays_off,
        clock=clock_of([0.0]),
        look=look,
        unworthy=lambda _baseline, _part, stage: None if "fused" in stage.name else "no",
    )
    made = Speaker()
    made.load()
    return made


def steps_of(speaker: Speaker) -> SharedSteps:
    fused: Any = fused_by(speaker.model.model.layers[0])
    assert fused is not None, str(receipt_of(speaker))
    return fused.steps


def let_meet(steps: SharedSteps) -> list[int]:
    """Have the first step wait until two others are there, whatever the machine does; return the callers of passes.

    A tiny model's step takes microseconds, so Python might run one caller after the other.
    """
    passes: list[int] = []
    arrived: set[int] = set()
    have_met = threading.Event()
    brief = Brief()

    def clock() -> float:
        """Called by each caller as it arrives, before anybody else may."""
        arrived.add(threading.get_ident())
        if len(arrived) > 2:
            have_met.set()
        return brief.clock()

    def alone(blocks: Any, call: Any) -> torch.Tensor:
        assert have_met.wait(LONG)
        return run(blocks, call)

    def counted(blocks: Any, calls: Any) -> torch.Tensor:
        passes.append(len(calls))
        return run_together(blocks, calls)

    steps.rules = steps.rules._replace(
        window=100.0, clock=clock, alone=brief.within(alone), together=brief.within(counted)
    )
    return passes


def in_threads(speaker: Speaker) -> list[list[torch.Tensor]]:
    barrier = threading.Barrier(CALLERS)

    def work(number: int) -> list[torch.Tensor]:
        torch.set_num_threads(1)
        barrier.wait(LONG)
        return speaker.speak(number)

    with ThreadPoolExecutor(CALLERS) as pool:
        return list(pool.map(work, range(CALLERS)))


def in_tasks(speaker: Speaker) -> list[list[torch.Tensor]]:
    async def all_of() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*(asyncio.to_thread(speaker.speak, number) for number in range(CALLERS)))

    return asyncio.run(all_of())


def in_coroutines(speaker: Speaker) -> list[list[torch.Tensor]]:
    async def all_of() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*(speaker.speak_async(number) for number in range(CALLERS)))

    return asyncio.run(all_of())


@pytest.mark.parametrize("call", [in_threads, in_tasks, in_coroutines])
def test_callers_in_upstreams_own_loop_share_passes(
    speaker: Speaker, call: Callable[[Speaker], list[list[torch.Tensor]]], seen: list[Event]
) -> None:
    steps = steps_of(speaker)
    assert steps.is_on, str(receipt_of(speaker))
    alone = [speaker.speak(number) for number in range(CALLERS)]
    assert len({tuple(tokens.flatten().tolist()) for tokens, *_ in alone}) == CALLERS
    passes = let_meet(steps)
    found = call(speaker)
    for one, other in zip(alone, found, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(passes) > 0, "of 73 steps, some are shared"
    assert not [event for event in seen if event.degraded]
    assert steps.is_on


def test_passes_are_told_once_a_call(speaker: Speaker, seen: list[Event]) -> None:
    steps = steps_of(speaker)

    def told_by(call: Callable[[Speaker], object]) -> list[DecodePasses]:
        seen.clear()
        call(speaker)
        return [event for event in seen if isinstance(event, DecodePasses)]

    in_turn = [told_by(methodcaller("speak", number)) for number in range(CALLERS)]
    assert [(event.steps, event.passes, event.rows) for (event,) in in_turn] == [
        (count - 1, count - 1, count - 1) for _, count in LENGTHS
    ], "the first token comes from the prompt"
    before = steps.counts
    for call in (in_threads, in_tasks, in_coroutines):
        let_meet(steps)
        told = told_by(call)
        assert 1 <= len(told) <= CALLERS
        assert sum(event.steps for event in told) == sum(event.rows for event in told) == 69
        assert sum(event.passes for event in told) < 69
        assert {event.what for event in told} == {in_turn[0][0].what}
    assert steps.counts.steps == before.steps + 3 * 69


def test_a_context_and_a_bare_call_tell_later(speaker: Speaker, seen: list[Event]) -> None:
    seen.clear()
    with torch.inference_mode():
        speaker.say(0)  # nothing of ours sees that it ends
    assert not [event for event in seen if isinstance(event, DecodePasses)]
    with fast_inference():
        speaker.say(1)
    (event,) = [event for event in seen if isinstance(event, DecodePasses)]
    assert event.steps == 19 + 11
