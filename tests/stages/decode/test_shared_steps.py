"""Decode steps of several threads in one pass over the weights: bit for bit what each computes alone.

`make shared-steps` lets 10,000 callers arrive; ARRIVALS says how many.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from linecache import getline
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meetings import Brief, meeting
from threaded import LONG, at_once

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.kernels.decoder_block import run, run_together
from accelerate_tts.kernels.weight_formats import WeightFormat
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode import shared_steps
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.decode.shared_steps import Rules, SharedSteps

pytestmark = pytest.mark.usefixtures("one_thread")

ARRIVALS = int(os.environ.get("ARRIVALS", "60"))
"""Callers of the random test."""
WIDTH, LAYERS = 32, 3


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval().to(dtype)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=WIDTH, n_inner=56, n_layer=LAYERS, n_head=4, vocab_size=50)
    return transformers.GPT2Model(config).eval()


class Shared(NamedTuple):
    """A model with fused blocks, and the meeting point of its callers."""

    model: Any
    steps: SharedSteps
    passes: list[int]
    """Number of callers of each pass of several."""
    brief: Brief

    def share(self, **rules: Any) -> None:
        def counted(blocks: Any, calls: Any) -> torch.Tensor:
            self.passes.append(len(calls))
            return run_together(blocks, calls)

        # A tiny model's pass takes microseconds. So long a window lets callers meet that Python keeps apart.
        asked = Rules(**{"window": 100.0, "clock": self.brief.clock, "together": counted, **rules})
        self.steps.rules = asked._replace(
            alone=self.brief.within(asked.alone), together=self.brief.within(asked.together)
        )
        self.steps.is_on = True


def fused(model: Any, weights: WeightFormat = "fp32") -> Shared:
    change = FusedBlocksStage(weights).prepare(Part("model", "decoder", model))
    change.on()
    (steps,) = change.steps
    speak(model, Caller())  # shows the forms of results
    return Shared(model, steps, [], Brief())


class Caller(NamedTuple):
    """One caller: its inputs, and what it does on the way."""

    seed: int = 0
    rows: int = 1
    prompt: int = 3
    count: int = 4
    padded: bool = False
    attentions: bool = False
    leaves: int = 99
    """Token at which it goes, without another word."""
    pauses: tuple[int, ...] = ()
    """Tokens before which it stalls."""


def speak(model: Any, caller: Caller, before: Callable[[int], object] = bool) -> list[torch.Tensor]:
    """One caller's whole loop. Returns all states, attention weights and the cache."""
    generator = torch.Generator().manual_seed(caller.seed)
    past, found = None, []
    asked: dict[str, Any] = {"output_attentions": True} if caller.attentions else {}
    mask = torch.ones(caller.rows, caller.prompt, dtype=torch.long)
    mask[:1, :1] = 0
    with torch.inference_mode():
        for number in range(min(caller.count + 1, caller.leaves)):
            x = torch.randn(caller.rows, 1 if number else caller.prompt, WIDTH, generator=generator)
            before(number)
            if caller.padded:
                asked["attention_mask"] = torch.cat([mask, torch.ones(caller.rows, number, dtype=torch.long)], 1)
            out = model(inputs_embeds=x.to(model.dtype), past_key_values=past, use_cache=True, **asked)
            past = out.past_key_values
            found += [out.last_hidden_state, *(out.attentions or ())]
    found += [tensor for layer in getattr(past, "layers", ()) for tensor in (layer.keys, layer.values)]
    return [tensor.clone() for tensor in found]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def together(shared: Shared, callers: list[Caller]) -> list[Any]:
    """Run callers that begin at the same time, and whose first tokens meet."""
    meet = threading.Barrier(len(callers))
    begin = lambda number: number or meet.wait(LONG)  # noqa: E731
    return meeting(shared.steps, [partial(speak, shared.model, caller, begin) for caller in callers])


MODELS: dict[str, Callable[[], Shared]] = {
    "fp32": lambda: fused(llama()),
    "bf16 weights": lambda: fused(llama(), "bf16"),
    "int8 weights": lambda: fused(llama(), "int8"),
    "bf16": lambda: fused(llama(torch.bfloat16)),
    "eager attention": lambda: fused(llama(attn_implementation="eager")),
    "GPT-2, transposed weights": lambda: fused(gpt2()),
}


@pytest.mark.parametrize("name", MODELS)
def test_callers_together(name: str) -> None:
    shared = MODELS[name]()
    attentions = name == "eager attention"
    callers = [
        Caller(seed, rows, 2 + 130 * (seed % 2) + seed, 8, padded=seed == 2, attentions=attentions and seed != 1)
        for seed, rows in enumerate((1, 2, 2, 3))
    ]
    alone = [speak(shared.model, caller) for caller in callers]
    shared.share()
    found = together(shared, callers)
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    assert shared.passes, "of 32 steps, some are shared"


def test_eight_callers_fill_a_pass_and_more_take_the_next(seen: list[Event]) -> None:
    shared = fused(llama())
    callers = [Caller(seed, 1, 2 + seed, 10) for seed in range(11)]
    alone = [speak(shared.model, caller) for caller in callers]
    shared.share()
    assert all(equal(one, other) for one, other in zip(alone, together(shared, callers), strict=True))
    assert max(shared.passes) == 8
    assert not [event for event in seen if event.degraded]


def test_switched_off_nothing_is_shared() -> None:
    shared = fused(llama())
    shared.share()
    shared.steps.is_on = False
    together(shared, [Caller(1), Caller(2)])
    assert shared.passes == []


def test_a_caller_that_stalls_holds_nobody_up() -> None:
    shared = fused(llama())
    callers = [Caller(seed, 1, 3, 12) for seed in range(2)]
    alone = [speak(shared.model, caller) for caller in callers]
    shared.share()
    go_on, is_stalled = threading.Event(), threading.Event()

    def stalls(number: int) -> None:
        if number == 5:
            is_stalled.set()
            assert go_on.wait(LONG)

    def first() -> Any:
        assert is_stalled.wait(LONG)
        found = speak(shared.model, callers[0])
        go_on.set()  # only now: the other one's stall did not stop this one
        return found

    found = at_once([first, partial(speak, shared.model, callers[1], stalls)])
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))


def test_a_prompt_holds_the_tokens_of_others_up_for_one_wait_at_most() -> None:
    shared = fused(llama())
    callers = [Caller(1, 1, 3, 20), Caller(2, 1, 3, 40), Caller(3, 1, 40, 6)]
    alone = [speak(shared.model, caller) for caller in callers]
    meet, is_in_prompt, go_on = threading.Barrier(2), threading.Event(), threading.Event()
    looks: dict[int, int] = {}
    at_step: list[int] = []

    def clock() -> float:
        """Go on by a microsecond at each look, so that the machine's load decides nothing."""
        looks[threading.get_ident()] = looks.get(threading.get_ident(), 0) + 1
        return 1.0 + 1e-6 * sum(looks.values())

    def in_the_middle(_norm: Any, given: Any) -> None:
        if given[0].shape[1] == callers[2].prompt:
            is_in_prompt.set()
            assert go_on.wait(LONG)

    def first() -> Any:
        found = speak(shared.model, callers[0], lambda number: number or meet.wait(LONG))
        return found, speak(shared.model, callers[2])

    def second() -> Any:
        def before(number: int) -> None:
            if number == 0:
                meet.wait(LONG)
            elif number >= 15:
                assert is_in_prompt.wait(LONG)
                at_step.append(looks[threading.get_ident()])

        found = speak(shared.model, callers[1], before)
        go_on.set()  # only now: the prompt was under way all the time
        return found

    shared.share(clock=clock)
    shared.model.norm.register_forward_pre_hook(in_the_middle)
    (one, three), two = meeting(shared.steps, [first, second])
    assert all(equal(*pair) for pair in zip(alone, (one, two, three), strict=True))
    assert shared.passes, "they knew each other"
    # A step that waits looks at the clock once more than one that is computed at once.
    each = [after - before for before, after in pairwise(at_step)]
    assert len([looked for looked in each if looked > min(each)]) <= 1, each


def test_tokens_hold_no_prompt_up() -> None:
    shared = fused(llama())
    callers = [Caller(1, 1, 3, 6), Caller(2, 1, 40, 0)]
    alone = [speak(shared.model, caller) for caller in callers]
    is_computing, is_made = threading.Event(), threading.Event()

    def slowly(blocks: Any, call: Any) -> torch.Tensor:
        is_computing.set()
        assert is_made.wait(LONG)  # the pass ends behind the prompt
        return run(blocks, call)

    def prompt() -> Any:
        assert is_computing.wait(LONG)
        found = speak(shared.model, callers[1])
        is_made.set()
        return found

    shared.share(alone=slowly)
    found = at_once([partial(speak, shared.model, callers[0]), prompt])
    assert all(equal(*pair) for pair in zip(alone, found, strict=True))


def test_a_pass_that_fails_leaves_each_caller_its_own_step(seen: list[Event]) -> None:
    shared = fused(llama())
    callers = [Caller(seed, 2, 3 + seed, 10) for seed in range(4)]
    alone = [speak(shared.model, caller) for caller in callers]

    def fails(_blocks: Any, _calls: Any) -> Any:
        raise MemoryError("there is no memory for what a kernel works in")

    shared.share(together=fails)
    found = together(shared, callers)
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    (event,) = [event for event in seen if isinstance(event, NotApplied)]
    assert event.what == "shared steps of the fused blocks of model"
    assert event.reason.startswith("a pass failed (MemoryError: there is no memory")
    assert not shared.steps.is_on


def test_a_callers_own_error_is_its_own() -> None:
    shared = fused(llama())
    caller = Caller(1, 1, 4, 20)
    alone = speak(shared.model, caller)
    shared.share()

    def raises(number: int) -> None:
        if number == 7:
            raise ValueError("the caller's own")

    works = [partial(speak, shared.model, caller), partial(speak, shared.model, Caller(2, count=20), raises)]
    found = at_once(works)
    assert equal(found[0], alone)
    assert isinstance(found[1], ValueError)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 9, 14])
def test_an_interrupt_anywhere_holds_nobody_up(at: int) -> None:
    shared = fused(llama())
    callers = [Caller(seed, 1, 3 + seed, 12) for seed in range(3)]
    alone = [speak(shared.model, caller) for caller in callers]
    looks: dict[int, int] = {}
    victim: list[int] = []

    def clock() -> float:
        me = threading.get_ident()
        looks[me] = looks.get(me, 0) + 1
        if me in victim and looks[me] == at:
            raise KeyboardInterrupt
        return shared.brief.clock()

    def interrupted() -> Any:
        victim.append(threading.get_ident())
        return speak(shared.model, callers[0])

    shared.share(clock=clock)
    found = at_once([interrupted, *(partial(speak, shared.model, caller) for caller in callers[1:])])
    assert isinstance(found[0], KeyboardInterrupt) or equal(found[0], alone[0])
    assert equal(found[1], alone[1])
    assert equal(found[2], alone[2])


def test_an_interrupt_at_any_line_holds_nobody_up() -> None:
    class Row(NamedTuple):
        value: float
        rows: int = 1

        def layout(self) -> tuple[object, ...]:
            return ()

    def alone(_blocks: Any, call: Any) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), call.value)

    def together(_blocks: Any, calls: Any) -> torch.Tensor:
        return torch.cat([alone((), call) for call in calls], 1)

    def speak(steps: SharedSteps, seed: float, count: int = 4) -> list[float]:
        found = []
        for number in range(count):
            try:
                found.append(float(steps.run((), Row(seed + number))))  # type: ignore[arg-type]  # the rules' own
            except KeyboardInterrupt:
                found.append(seed + number)
        return found

    def interrupted(steps: SharedSteps, at: int) -> list[float]:
        lines = 0

        def look(frame: Any, event: str, _value: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != shared_steps.__file__:
                return None
            # At the end of a `with` Python calls the lock first, and then looks for signals.
            if event == "line" and not getline(shared_steps.__file__, frame.f_lineno).lstrip().startswith("with "):
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return look

        sys.settrace(look)
        try:
            return speak(steps, 0.5)
        finally:
            sys.settrace(None)

    for at in range(1, 130):
        steps, brief = SharedSteps("a decoder"), Brief()
        computes = {"alone": brief.within(alone), "together": brief.within(together)}
        steps.rules, steps.is_on = Rules(window=100.0, clock=brief.clock, **computes, look=0.01), True
        found = at_once([partial(interrupted, steps, at), *(partial(speak, steps, seed) for seed in (10.0, 20.0))])
        assert found == [[seed + number for number in range(4)] for seed in (0.5, 10.0, 20.0)], at


def test_an_interrupt_while_it_waits_for_a_pass_of_others() -> None:
    shared = fused(llama())
    callers = [Caller(seed, 1, 3 + seed, 6) for seed in range(3)]
    alone = [speak(shared.model, caller) for caller in callers]
    is_computing, go_on = threading.Event(), threading.Event()

    def slowly(blocks: Any, call: Any) -> torch.Tensor:
        if not is_computing.is_set():
            is_computing.set()
            assert go_on.wait(LONG)
        return run(blocks, call)

    waits: list[int] = []

    def victim() -> Any:
        assert is_computing.wait(LONG)
        waits.append(threading.get_ident())
        return speak(shared.model, callers[1])

    def interrupt() -> None:
        while not waits:
            time.sleep(0.01)
        time.sleep(0.3)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(waits[0]), ctypes.py_object(KeyboardInterrupt))
        time.sleep(0.3)
        go_on.set()

    shared.share(alone=slowly)
    found = at_once([partial(speak, shared.model, callers[0]), victim, interrupt])
    assert equal(found[0], alone[0])
    assert isinstance(found[1], KeyboardInterrupt) or equal(found[1], alone[1])
    assert equal(speak(shared.model, callers[2]), alone[2])


def test_a_call_from_inside_a_step_is_computed_at_once() -> None:
    shared = fused(llama())
    inner, outer = Caller(1, 1, 4, 3), Caller(2, 1, 5, 3)
    alone = [speak(shared.model, caller) for caller in (inner, outer)]
    nested: list[Any] = []

    def as_a_signal_handler(blocks: Any, call: Any) -> torch.Tensor:
        if not nested:
            nested.append(None)
            nested[0] = speak(shared.model, inner)
        return run(blocks, call)

    shared.share(alone=as_a_signal_handler)
    (found,) = at_once([partial(speak, shared.model, outer)])
    assert equal(nested[0], alone[0])
    assert equal(found, alone[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_waits_for_nobody() -> None:
    shared = fused(llama())
    caller = Caller(1, 1, 4, 3)
    alone = speak(shared.model, caller)
    is_computing, go_on = threading.Event(), threading.Event()

    def slowly(blocks: Any, call: Any) -> torch.Tensor:
        is_computing.set()
        assert go_on.wait(LONG)
        return run(blocks, call)

    shared.share(alone=slowly)
    thread = threading.Thread(target=speak, args=(shared.model, caller))
    thread.start()
    assert is_computing.wait(LONG)
    child = os.fork()
    if not child:
        shared.steps.rules = Rules()
        os._exit(0 if equal(speak(shared.model, caller), alone) else 1)
    end = time.monotonic() + LONG
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    go_on.set()
    thread.join(LONG)
    if done[0] == 0:
        os.kill(child, 9)
    assert done == (child, 0)


@pytest.fixture(scope="module")
def models() -> list[Shared]:
    return [make() for make in MODELS.values()]


callers = st.builds(
    Caller,
    seed=st.integers(0, 1000), rows=st.sampled_from([1, 1, 1, 2, 2, 3, 8, 9]), prompt=st.integers(1, 40),
    count=st.integers(0, 12), padded=st.booleans(), leaves=st.sampled_from([99, 99, 99, 1, 3, 6]),
    pauses=st.lists(st.integers(0, 12), max_size=2).map(tuple),
)  # fmt: skip


@settings(
    max_examples=max(1, ARRIVALS // 6), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(which=st.integers(0, len(MODELS) - 1), arrived=st.lists(callers, min_size=4, max_size=8), data=st.data())
def test_random_callers(models: list[Shared], which: int, arrived: list[Caller], data: st.DataObject) -> None:
    shared = models[which]
    shared.steps.is_on = False
    alone = [speak(shared.model, caller) for caller in arrived]
    delays = [data.draw(st.sampled_from([0.0, 0.0, 0.001, 0.004])) for _ in arrived]
    shared.share(window=data.draw(st.sampled_from([0.5, 100.0])))

    def work(caller: Caller, delay: float) -> Any:
        time.sleep(delay)
        return speak(shared.model, caller, lambda number: number in caller.pauses and time.sleep(0.002))

    found = at_once([partial(work, *one) for one in zip(arrived, delays, strict=True)])
    for caller, one, other in zip(arrived, alone, found, strict=True):
        assert equal(one, other), caller
