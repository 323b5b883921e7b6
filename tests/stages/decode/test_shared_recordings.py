"""Recorded steps of several threads in one replay: bit for bit what each has alone, as far as a CPU can show it.

What is recorded is run again, not replayed (`Reruns`), so nothing here says that a device computes the same. A CPU's
products differ in bits by the number of rows, as a device's may; linear layers and attention compute row by row here.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meetings import Brief, meeting
from threaded import LONG, at_once
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from accelerate_tts import Event
from accelerate_tts.events import DecodePasses, NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode import slot_pool
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.joined_slots import JoinedSlots
from accelerate_tts.stages.decode.kv_cache.layers import growing_class
from accelerate_tts.stages.decode.shared_steps import SharedSteps
from accelerate_tts.stages.decode.slot_pool import Bounds
from accelerate_tts.stages.decode.static_step import StaticStep
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("layered_caches", "one_thread")

WIDTH, LAYERS = 64, 2  # heads of 16 numbers: no vector of the CPU is in part of one row
NUMBERS = (1, 2, 4)


def each_row(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compute each row as if it were alone, as a kernel for few rows may."""

    def by_rows(x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        rows = x.shape[0]

        def row(value: Any, number: int) -> Any:
            is_batch = isinstance(value, torch.Tensor) and value.dim() == x.dim() == 4 and value.shape[0] == rows
            return value[number : number + 1] if is_batch else value

        return torch.cat([
            function(x[at : at + 1], *(row(value, at) for value in others), **{n: row(v, at) for n, v in named.items()})
            for at in range(rows)
        ])  # fmt: skip

    return by_rows


@pytest.fixture(autouse=True)
def attention_by_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plain" not in request.keywords:
        monkeypatch.setattr(
            nn.functional, "scaled_dot_product_attention", each_row(nn.functional.scaled_dot_product_attention)
        )


class ByRows(nn.Module):
    """Members of a linear layer that computes each row by itself."""

    base: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return each_row(partial(self.base.forward, self))(x)


def by_rows(model: Any) -> Any:
    for inner in model.modules():
        base: Any = type(inner)
        if base.__name__ in {"Linear", "Conv1D"}:
            inner.__class__ = type("ByRows", (ByRows, base), {"base": base})
    return model


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=50, n_positions=40, **options)
    return transformers.GPT2Model(config).eval()


def reruns(device: torch.device) -> Reruns:
    return Reruns(device, watched=False)


class Shared(NamedTuple):
    """A model whose steps are recorded, and the meeting point of its callers."""

    model: Any
    change: Any
    steps: SharedSteps
    passes: list[int]
    """Number of callers of each pass of several."""
    brief: Brief

    def share(self, numbers: tuple[int, ...] = NUMBERS, rows: int = 1, **rules: Any) -> None:
        def counted(blocks: Any, calls: Any) -> Any:
            self.passes.append(len(calls))
            return self.steps.usual.together(blocks, calls)

        self.steps.usual.arrange(numbers, rows)
        most = max(numbers) * rows
        asked = self.steps.usual._replace(
            **{"window": 100.0, "clock": self.brief.clock, "most_rows": most, "together": counted, **rules}
        )
        self.steps.rules = asked._replace(
            alone=self.brief.within(asked.alone), together=self.brief.within(asked.together)
        )
        self.steps.is_on = True


def captured(model: Any, bounds: Bounds | None = None, recorder: Callable[[torch.device], Any] = reruns) -> Shared:
    change: Any = CapturedStepStage(recorder, bounds=bounds).prepare(Part("model", "decoder", model))
    change.on()
    (steps,) = change.steps
    return Shared(model, change, steps, [], Brief())


class Caller(NamedTuple):
    """One caller: its inputs, and what it does on the way."""

    seed: int = 0
    rows: int = 1
    prompt: int = 3
    count: int = 6
    padded: bool = False
    crops: tuple[int, ...] = ()
    """Tokens before which it takes one back."""
    reorders: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    leaves: int = 99
    """Token at which it goes, without another word."""
    pauses: tuple[int, ...] = ()


def speak(model: Any, caller: Caller, before: Callable[[int], object] = bool) -> list[torch.Tensor]:
    """One caller's whole loop. Returns all states and the cache."""
    generator = torch.Generator().manual_seed(caller.seed)
    past, found, length = None, [], 0
    asked: dict[str, Any] = {}
    with torch.inference_mode():
        for number in range(min(caller.count + 1, caller.leaves)):
            x = torch.randn(caller.rows, 1 if number else caller.prompt, WIDTH, generator=generator)
            before(number)
            if number in caller.pauses:
                time.sleep(0.002)
            if number and number in caller.crops and length > 1:
                past.crop(-1)
                length -= 1
            if number and number in caller.reorders:
                past.reorder_cache(torch.arange(caller.rows).flip(0))
            if number and number in caller.copies:
                past = copy.deepcopy(past)
            length += x.shape[1]
            if caller.padded:
                asked["attention_mask"] = torch.ones(caller.rows, length, dtype=torch.long)
                asked["attention_mask"][:1, :1] = 0
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked)
            past = out.past_key_values
            found.append(out.last_hidden_state)
    found += [tensor for layer in getattr(past, "layers", ()) for tensor in (layer.keys, layer.values)]
    return [tensor.clone() for tensor in found]


def equal(one: Any, other: Any) -> bool:
    if isinstance(other, BaseException):
        raise other
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def together(shared: Shared, callers: list[Caller]) -> list[Any]:
    """Run callers that begin at the same time, and whose first tokens meet."""
    meet = threading.Barrier(len(callers))
    begin = lambda number: number or meet.wait(LONG)  # noqa: E731
    return meeting(shared.steps, [partial(speak, shared.model, caller, begin) for caller in callers])


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: by_rows(llama()),
    "GPT-2": lambda: by_rows(gpt2()),
}


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))


def degraded(seen: list[Event]) -> list[Event]:
    return [event for event in seen if event.degraded]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 2])
def test_callers_together(name: str, rows: int, seen: list[Event]) -> None:
    model = MODELS[name]()
    callers = [Caller(seed, rows, 2 + 5 * seed, 8, padded=seed == 2) for seed in range(4)]
    upstreams = [speak(model, caller) for caller in callers]
    shared = captured(model)
    shared.share(rows=rows)
    alone = [speak(model, caller) for caller in callers]
    assert all(close(one, other) for one, other in zip(upstreams, alone, strict=True))
    found = together(shared, callers)
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    assert shared.passes, "of 32 steps, some are shared"
    assert not degraded(seen)
    shared.steps.tell()
    told = [event for event in seen if isinstance(event, DecodePasses)]
    assert sum(event.steps for event in told) == 2 * 32 + 1, "and the step that opened the meeting"
    assert sum(event.rows for event in told) == 2 * 32 * rows + 1


def test_a_replay_reads_the_weights_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording for each number of neighbours, of which each serves all passes of theirs."""
    made: list[int] = []
    init = StaticStep.__init__

    def noted(step: StaticStep, *args: Any, **named: Any) -> None:
        init(step, *args, **named)
        made.append(step.rows)

    recorders: list[Reruns] = []

    def recorder(device: torch.device) -> Reruns:
        recorders.append(reruns(device))
        return recorders[-1]

    shared = captured(MODELS["Llama"](), recorder=recorder)
    shared.share()
    callers = [Caller(seed, 1, 3, 30) for seed in range(4)]
    monkeypatch.setattr(StaticStep, "__init__", noted)
    together(shared, callers)
    before = sum(each.replays for each in recorders)
    together(shared, callers)
    assert sum(each.replays for each in recorders) - before < 4 * 30
    # Who meets whom is the machine's to say: each of four, two pairs, and all of them.
    assert made.count(1) <= 4
    assert made.count(2) <= 2
    assert made.count(4) == 1, "what is recorded serves later calls"


def test_eight_threads_over_four_slots(seen: list[Event]) -> None:
    """Four are in a slot, and the others visit one; a pass has up to four of them."""
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 2 + seed, 10, crops=(4,) if seed % 3 == 0 else ()) for seed in range(8)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    for _ in range(2):
        assert all(equal(one, other) for one, other in zip(alone, together(shared, callers), strict=True))
    assert 1 < max(shared.passes) <= 4
    assert len(shared.change.slots) == 4
    (event,) = degraded(seen)
    assert "every slot holds a sequence in use" in str(event)


@pytest.mark.parametrize("how", ["crops", "reorders", "copies"])
def test_caches_that_their_callers_change(how: str) -> None:
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 2, 4 + seed, 9)._replace(**{how: (2, 3, 7)}) for seed in range(3)]
    shared.share(rows=2)
    alone = [speak(shared.model, caller) for caller in callers]
    assert all(equal(one, other) for one, other in zip(alone, together(shared, callers), strict=True))
    assert shared.passes


def test_growing_beyond_a_capacity_while_shared(monkeypatch: pytest.MonkeyPatch, seen: list[Event]) -> None:
    monkeypatch.setattr(slot_pool, "CAPACITIES", (8, 16, 32))
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 2 + 3 * seed, 24) for seed in range(4)]
    upstreams = [speak(shared.model, caller) for caller in callers]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    found = together(shared, callers)
    assert all(close(one, other) for one, other in zip(upstreams, found, strict=True))
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    assert any("positions" in event.reason for event in seen if isinstance(event, NotApplied)), "one outgrew them all"


@pytest.mark.parametrize("at", [1, 3, 5])
def test_leaving_at_any_token(at: int) -> None:
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 3 + seed, 8, leaves=at if seed == 1 else 99) for seed in range(3)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    assert all(equal(one, other) for one, other in zip(alone, together(shared, callers), strict=True))


def test_a_caller_that_stalls_or_raises_holds_nobody_up() -> None:
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 3, 12) for seed in range(3)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    go_on, is_stalled = threading.Event(), threading.Event()

    def stalls(number: int) -> None:
        if number == 5:
            is_stalled.set()
            assert go_on.wait(LONG)

    def raises(number: int) -> None:
        if number == 7:
            raise ValueError("the caller's own")

    def first() -> Any:
        assert is_stalled.wait(LONG)
        found = speak(shared.model, callers[0])
        go_on.set()  # only now: the other one's stall did not stop this one
        return found

    works = [first, partial(speak, shared.model, callers[1], stalls), partial(speak, shared.model, callers[2], raises)]
    found = at_once(works)
    assert equal(alone[0], found[0])
    assert equal(alone[1], found[1])
    assert isinstance(found[2], ValueError)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 9, 14])
def test_an_interrupt_anywhere_holds_nobody_up(at: int) -> None:
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 3 + seed, 12) for seed in range(3)]
    shared.share()
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
    assert isinstance(found[0], KeyboardInterrupt) or equal(alone[0], found[0])
    assert equal(alone[1], found[1])
    assert equal(alone[2], found[2])
    assert equal(alone[0], speak(shared.model, callers[0]))


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_an_interrupt_between_two_layers_leaves_the_caches_of_others_whole(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of all callers of a pass grow in the thread that computes it."""
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 3 + seed, 12) for seed in range(3)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    grow = growing_class().advance
    grown: list[int] = []

    def advance(layer: Any, positions: int) -> None:
        if shared.passes:
            grown.append(1)
            if len(grown) == at:
                raise KeyboardInterrupt
        grow(layer, positions)

    monkeypatch.setattr(growing_class(), "advance", advance)
    found = together(shared, callers)
    ended = [isinstance(each, KeyboardInterrupt) for each in found]
    assert sum(ended) == 1
    for one, other, was_ended in zip(alone, found, ended, strict=True):
        assert was_ended or equal(one, other)


def test_a_step_that_fails_leaves_each_its_own_and_ends_sharing(
    seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 3 + seed, 10) for seed in range(4)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    run = JoinedSlots.run

    def fails(joined: JoinedSlots, works: Any) -> Any:
        run(joined, works)
        for work in works:  # as where the replay itself fails
            for layer in work.past.layers:
                layer.advance(-1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(JoinedSlots, "run", fails)
    found = together(shared, callers)
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    (event,) = degraded(seen)
    assert isinstance(event, NotApplied)
    assert event.what == "shared steps of the captured step of model"
    assert event.reason.startswith("a pass failed (RuntimeError: CUDA error")
    assert not shared.steps.is_on


def test_a_recording_of_several_that_fails_ends_sharing_alone(seen: list[Event]) -> None:
    model = MODELS["Llama"]()
    plain = type(model.norm)
    refused: list[int] = []

    class Refuses(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> Any:
            if x.shape[0] > 1 and refused:
                raise RuntimeError("operation not permitted when stream is capturing")
            return plain.forward(self, x)

    model.norm.__class__ = Refuses
    shared = captured(model)
    callers = [Caller(seed, 1, 3 + seed, 10) for seed in range(3)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    refused.append(1)
    found = together(shared, callers)
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    assert [type(event) for event in degraded(seen)] == [NotApplied]
    assert not shared.steps.is_on


def test_weights_that_are_written_are_served_to_all() -> None:
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1, 3 + seed, 6) for seed in range(4)]
    shared.share()
    together(shared, callers)
    with torch.no_grad():
        for parameter in shared.model.parameters():
            parameter.mul_(1.5)
    for inner in shared.model.modules():
        if isinstance(inner, ByRows):
            inner.weight = nn.Parameter(inner.weight * 1.1)
    found = together(shared, callers)
    shared.change.off()
    assert all(close(speak(shared.model, caller), one) for caller, one in zip(callers, found, strict=True))


def test_another_kind_of_call_takes_a_pass_of_its_own() -> None:
    """One and two rows, and hidden states of all layers, which another recording has."""
    shared = captured(MODELS["Llama"]())
    callers = [Caller(seed, 1 + seed % 2, 3 + seed, 8) for seed in range(4)]
    shared.share(rows=2)
    alone = [speak(shared.model, caller) for caller in callers]
    assert all(equal(one, other) for one, other in zip(alone, together(shared, callers), strict=True))


def test_too_little_memory_for_slots_side_by_side() -> None:
    shared = captured(MODELS["Llama"](), Bounds(joined=1))
    callers = [Caller(seed, 1, 3 + seed, 8) for seed in range(4)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    assert all(equal(one, other) for one, other in zip(alone, together(shared, callers), strict=True))
    assert not shared.passes


def test_numbers_of_rows_that_differ_in_bits_are_not_used(seen: list[Event]) -> None:
    """As where a device has another kernel for four rows."""
    model = MODELS["Llama"]()
    plain = type(model.norm)

    class Differs(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> Any:
            return plain.forward(self, x) * (1 + 1e-6 * (x.shape[0] == 4))

    model.norm.__class__ = Differs
    shared = captured(model)
    callers = [Caller(seed, 1, 3 + seed, 10) for seed in range(4)]
    shared.share()
    alone = [speak(shared.model, caller) for caller in callers]
    found = together(shared, callers)
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    assert any("for 4 callers of up to 256 positions it differs in bits" in str(event) for event in seen)


@pytest.fixture(scope="module")
def models() -> list[Shared]:
    return [captured(make()) for make in MODELS.values()]


callers_drawn = st.builds(
    Caller,
    seed=st.integers(0, 1000), rows=st.sampled_from([1, 1, 2]), prompt=st.integers(1, 12), count=st.integers(0, 10),
    padded=st.booleans(), crops=st.lists(st.integers(1, 10), max_size=2).map(tuple),
    reorders=st.lists(st.integers(1, 10), max_size=1).map(tuple),
    copies=st.lists(st.integers(1, 10), max_size=1).map(tuple), leaves=st.sampled_from([99, 99, 99, 1, 3, 6]),
    pauses=st.lists(st.integers(0, 10), max_size=2).map(tuple),
)  # fmt: skip


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(which=st.integers(0, len(MODELS) - 1), arrived=st.lists(callers_drawn, min_size=2, max_size=6), data=st.data())
def test_random_callers(models: list[Shared], which: int, arrived: list[Caller], data: st.DataObject) -> None:
    shared = models[which]
    shared.share(window=data.draw(st.sampled_from([0.5, 20.0])), rows=data.draw(st.sampled_from([1, 2])))
    alone = [speak(shared.model, caller) for caller in arrived]
    delays = [data.draw(st.sampled_from([0.0, 0.0, 0.001, 0.004])) for _ in arrived]

    def work(caller: Caller, delay: float) -> Any:
        time.sleep(delay)
        return speak(shared.model, caller)

    found = at_once([partial(work, *one) for one in zip(arrived, delays, strict=True)])
    for caller, one, other in zip(arrived, alone, found, strict=True):
        assert equal(one, other), caller


# --- is a step of several safe to record? --------------------------------------------------------------------------


@pytest.fixture
def step_of_four(name: str, monkeypatch: pytest.MonkeyPatch) -> StaticStep:
    steps: list[StaticStep] = []
    init = StaticStep.__init__

    def noted(step: StaticStep, *args: Any, **named: Any) -> None:
        init(step, *args, **named)
        steps.append(step)

    monkeypatch.setattr(StaticStep, "__init__", noted)
    shared = captured(MODELS[name]())
    shared.share()
    together(shared, [Caller(seed, 1, 3 + seed, 6) for seed in range(4)])
    return next(step for step in steps if step.rows == 4)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_several_can_be_traced_where_asking_for_a_value_is_an_error(step_of_four: StaticStep) -> None:
    step = step_of_four

    def run(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        step.inputs["inputs_embeds"], step.position = x, position
        result: torch.Tensor = step.step().last_hidden_state
        return result

    with torch.no_grad():
        x, position = torch.randn(4, 1, WIDTH), torch.tensor([7, -1, 0, 30])
        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(x, position)
        expected = run(x, position)
        assert torch.allclose(graph(x, position), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama"])
def test_an_absent_row_leaves_its_sequence_alone(step_of_four: StaticStep) -> None:
    step = step_of_four
    for tensor in (tensor for pair in step.buffers for tensor in pair):
        tensor[..., -1, :] = 7.0  # the same row may have been absent before, with the same inputs
    before = [tensor.clone() for pair in step.buffers for tensor in pair]
    with torch.no_grad():
        step.position.copy_(torch.tensor([5, -1, 9, -1]))
        step.step()
    for old, new in zip(before, [tensor for pair in step.buffers for tensor in pair], strict=True):
        for row in (1, 3):
            assert torch.equal(old[row, :, :-1], new[row, :, :-1])
            assert not torch.equal(old[row, :, -1], new[row, :, -1])
