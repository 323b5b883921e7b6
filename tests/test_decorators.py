"""The two decorators on every kind of function, with real modules."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import threading
import typing
import weakref
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from threaded import until_later
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from accelerate_tts import (
    Event,
    WarmupError,
    cached_embedding,
    get_performance_optimizer,
    inference,
    optimized_model,
    receipt_of,
    set_active,
    testing,
)
from accelerate_tts.decorators import is_load_function
from accelerate_tts.errors import SettingsError
from accelerate_tts.events import NotApplied, Tuned, WarmupFailed
from doubles import begin_process

on = torch.is_inference_mode_enabled


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile has tests of its own; here only the folding stage is tried."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("ACCELERATE_TTS_THREADS", "1")  # on a busy machine two wait for each other


class Vocoder(nn.Module):
    """Some weight-normed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(weight_norm(nn.Conv1d(64, 64, 5, padding=2)) for _ in range(4))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            mel = torch.relu(conv(mel))
        return mel.mean(1)


def vocoder() -> Vocoder:
    torch.manual_seed(0)
    return Vocoder().eval()


MEL = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))


# --- @inference ----------------------------------------------------------------------------------------------


class Service:
    """Every kind of method."""

    @inference
    def plain(self, value: int, *, more: int = 1) -> tuple[bool, int]:
        """Docstring."""
        return on(), value + more

    @inference()
    async def coroutine(self) -> bool:
        await asyncio.sleep(0)
        return on()

    @inference
    def stream(self) -> Iterator[bool]:
        yield on()

    @inference(mode="no_grad")
    async def stream_async(self) -> AsyncIterator[tuple[bool, bool]]:
        yield on(), torch.is_grad_enabled()

    @inference
    @classmethod
    def above_class(cls) -> tuple[bool, str]:
        return on(), cls.__name__

    @classmethod
    @inference
    def below_class(cls) -> tuple[bool, str]:
        return on(), cls.__name__

    @inference
    @staticmethod
    def above_static(value: int) -> tuple[bool, int]:
        return on(), value

    @staticmethod
    @inference
    def below_static(value: int) -> tuple[bool, int]:
        return on(), value


async def test_inference_on_every_kind_of_method() -> None:
    service = Service()
    assert service.plain(1, more=2) == (True, 3)
    assert Service.plain(service, 1) == (True, 2)
    assert await service.coroutine()
    assert list(service.stream()) == [True]
    assert [item async for item in service.stream_async()] == [(False, False)]
    assert service.above_class() == Service.below_class() == (True, "Service")
    assert service.above_static(3) == Service.below_static(3) == (True, 3)
    assert not on()


def test_inference_keeps_what_a_function_is() -> None:
    assert Service.plain.__name__ == "plain"
    assert Service.plain.__doc__ == "Docstring."
    assert str(inspect.signature(Service.plain)) == "(self, value: 'int', *, more: 'int' = 1) -> 'tuple[bool, int]'"
    assert inspect.iscoroutinefunction(Service.coroutine)
    assert inspect.isgeneratorfunction(Service.stream)
    assert inspect.isasyncgenfunction(Service.stream_async)
    assert inspect.ismethod(Service().plain)


@pytest.mark.parametrize("decorator", [inference, optimized_model, cached_embedding])
def test_annotations_are_those_of_the_function(decorator: Any) -> None:
    def speak(self: Any, text: str, rate: int = 1) -> float:
        return float(len(text) * rate)

    class Holder:
        method = decorator(speak)

        @functools.singledispatchmethod
        def said(self, given: object) -> str:
            return "an object"

        @said.register
        @inference
        def of_text(self, given: str) -> str:
            return "a text"

    wrapper = functools.wraps(decorator(speak))(lambda *_: 0.0)
    for decorated in (decorator(speak), Holder.method, Holder().method, wrapper):
        assert decorated.__annotations__ == speak.__annotations__
        assert typing.get_type_hints(decorated) == {"self": Any, "text": str, "rate": int, "return": float}
    assert Holder().said("text") == "a text"


def test_inference_tensors_have_no_autograd() -> None:
    linear = nn.Linear(2, 2)
    out = inference(linear)(torch.ones(1, 2))
    assert out.is_inference()
    assert not inference(mode="no_grad")(linear)(torch.ones(1, 2)).is_inference()


def test_inference_refuses_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="got 'warm'"):
        inference("warm")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="decorates a function"):
        inference(Service)
    with pytest.raises(SettingsError, match="mode='fast'"):
        inference(mode="fast")  # type: ignore[call-overload]


@inference
def module_level(value: int) -> tuple[bool, int]:
    return on(), value


def test_decorated_functions_can_be_pickled_and_sent_to_workers() -> None:
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    assert copy.deepcopy(module_level)(1) == (True, 1)
    service = pickle.loads(pickle.dumps(Service()))
    assert service.plain(1) == (True, 2)


def test_a_wrapper_on_an_instance_goes_with_deepcopy_and_torch_save() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.forward = inference(model.forward)  # type: ignore[method-assign]
    assert model(torch.ones(1, 2)).is_inference()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone[0].weight.zero_()
        clone[0].bias.zero_()
    assert clone(torch.ones(1, 2)).abs().sum() == 0  # the copy runs its own weights
    assert model(torch.ones(1, 2)).abs().sum() > 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_the_switch_is_asked_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module_level(1) == (True, 1)
    with testing():
        assert module_level(1) == (False, 1)
    set_active(False)
    assert module_level(1) == (False, 1)
    set_active(True)
    monkeypatch.setenv("ACCELERATE_TTS_DISABLE", "yes")
    assert module_level(1) == (False, 1)
    monkeypatch.delenv("ACCELERATE_TTS_DISABLE")
    assert module_level(1) == (True, 1)


# --- @optimized_model ----------------------------------------------------------------------------------------


@optimized_model(warmup=MEL)
def load_function() -> Vocoder:
    return vocoder()


def test_a_function_that_returns_a_module() -> None:
    model = load_function()
    receipt = receipt_of(model)
    assert receipt is not None
    assert [stage.stage for stage in receipt.stages if stage.part != "process"] == [
        "fold weight norm",
        "channels-last convolutions",
        "convolutions in fewer products",
    ]
    assert receipt.stages[0].error == 0.0
    assert receipt.cold is not None
    reference = vocoder()
    assert type(model) is Vocoder
    assert list(model.state_dict()) == list(reference.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(MEL), reference(MEL), rtol=1e-4, atol=1e-6)


class Pipeline:
    """An object that holds modules and is none."""

    def __init__(self) -> None:
        self.inner = {"vocoder": vocoder()}
        self.sampling_rate = 16000
        self.calls: list[str] = []

    def generate(self, text: str) -> torch.Tensor:
        self.calls.append(text)
        return self.inner["vocoder"](MEL[..., : len(text)])


def test_a_pipeline_object_and_a_text() -> None:
    pipeline = optimized_model(warmup="Hello there.")(lambda: Pipeline())()
    assert type(pipeline) is Pipeline
    assert set(pipeline.calls) == {"Hello there."}
    receipt = receipt_of(pipeline)
    assert receipt is not None
    assert receipt is receipt_of(pipeline.inner["vocoder"])
    assert receipt.stages[-1].part == "inner.vocoder"


def test_a_tuple_keeps_its_type() -> None:
    tokenizer = object()
    loaded = optimized_model(warmup=(MEL,))(lambda: (vocoder(), tokenizer))()
    assert type(loaded) is tuple
    assert loaded[1] is tokenizer
    assert receipt_of(loaded[0]) is not None


class Backend:
    """Sets attributes on itself; speaks by a decorated method."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    @optimized_model(warmup=["Hi.", "A somewhat longer sentence."])
    def load(self) -> None:
        assert not on(), "the load function must never run in inference mode"
        self.model = vocoder()

    def generate(self, text: str) -> None:
        raise AssertionError("the decorated method is the one to use")

    @inference
    def speak_it(self, text: str) -> torch.Tensor:
        self.seen.append((text, on()))
        return self.model(MEL)


def test_a_method_that_returns_nothing_warms_up_through_the_inference_method() -> None:
    backend = Backend()
    assert backend.load() is None  # type: ignore[func-returns-value]
    assert {text for text, _ in backend.seen} == {"Hi.", "A somewhat longer sentence."}
    assert all(mode for _, mode in backend.seen)
    assert receipt_of(backend) is receipt_of(backend.model) is not None


class AsyncBackend:
    """A backend of async methods, whose lock belongs to the event loop of the service."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    @optimized_model(warmup="Hello.")
    async def load(self) -> Vocoder:
        await asyncio.sleep(0)
        self.loop = asyncio.get_running_loop()
        self.model = vocoder()
        return self.model

    @inference
    async def synthesize(self, text: str) -> AsyncIterator[torch.Tensor]:
        assert asyncio.get_running_loop() is self.loop
        self.threads.add(threading.current_thread().name)
        for _ in range(2):
            await asyncio.sleep(0)
            assert on()
            yield self.model(MEL)


async def test_an_async_load_tunes_while_the_loop_goes_on() -> None:
    backend = AsyncBackend()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticker = asyncio.create_task(tick())
    model = await backend.load()
    ticker.cancel()
    assert ticks > 5
    assert type(model) is Vocoder
    assert receipt_of(model) is receipt_of(backend) is not None
    assert backend.threads == {threading.current_thread().name}
    assert inspect.iscoroutinefunction(backend.load)


async def test_a_sync_load_inside_a_running_loop_with_an_async_method() -> None:
    class Mixed:
        @optimized_model(warmup="Hello.")
        def load(self) -> None:
            self.model = vocoder()

        @inference
        async def synthesize(self, text: str) -> torch.Tensor:
            await asyncio.sleep(0)
            return self.model(MEL)

    mixed = Mixed()
    mixed.load()
    assert receipt_of(mixed) is not None


def test_a_task_that_a_warm_up_leaves_on_a_loop_of_its_own_is_told(seen: list[Event]) -> None:
    class Batching:
        @optimized_model(warmup="Hello.")
        def load(self) -> None:
            self.model = vocoder()

        @inference
        async def synthesize(self, text: str) -> torch.Tensor:
            self.worker = asyncio.create_task(asyncio.sleep(60))
            return self.model(MEL)

    Batching().load()
    (event,) = [event for event in seen if isinstance(event, NotApplied)]  # however many calls tuning makes
    assert event.what == "waiting for sleep"
    assert "let the load function be async" in event.reason


@pytest.mark.parametrize(
    "warmup",
    [
        MEL,
        (MEL,),
        {"mel": MEL},
        lambda model: model(MEL),
        lambda: None,
        [MEL, (MEL,)],
        [lambda m: m(MEL), {"mel": MEL}],
    ],
    ids=["tensor", "tuple", "mapping", "callable", "callable of nothing", "list", "mixed list"],
)
def test_every_form_of_warmup(warmup: Any, seen: list[Event]) -> None:
    model = optimized_model(warmup=warmup)(vocoder)()
    assert receipt_of(model) is not None
    assert not [event for event in seen if isinstance(event, WarmupFailed)]


@pytest.mark.parametrize("warmup", ["", "  ", [], 3.5, [[MEL]], {1, 2}])
def test_a_hopeless_warmup_fails_at_decoration(warmup: Any) -> None:
    with pytest.raises(WarmupError, match="warmup="):
        optimized_model(warmup=warmup)


def test_a_warmup_that_does_not_fit_fails_at_load_with_the_mend() -> None:
    with pytest.raises(WarmupError, match="no @inference method that takes one.*warmup=lambda loaded"):
        optimized_model(warmup="Hello")(vocoder)()

    class Two:
        def __init__(self) -> None:
            self.first, self.second = vocoder(), vocoder()

    with pytest.raises(WarmupError, match="first, second"):
        optimized_model(warmup=MEL)(lambda: Two())()


# --- options of one object ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "quick"}, "precision='quick' is not one of exact, balanced, fast"),
        ({"precision": ""}, "precision='' is not one of"),
        ({"precision": 16}, "precision=16 is not one of"),
        ({"tune_seconds": -1}, r"tune_seconds=-1 must be a number of seconds, 0 or more"),
        ({"tune_seconds": "5"}, "tune_seconds='5' must be"),
        ({"tune_seconds": True}, "tune_seconds=True must be"),
        ({"tune_seconds": float("nan")}, "tune_seconds=nan must be"),
        ({"tune_seconds": float("inf")}, "tune_seconds=inf must be"),
        ({"lengths": (300, 10)}, r"lengths=\(300, 10\) must be two whole numbers, .* such as \(10, 300\)"),
        ({"lengths": (0, 10)}, r"lengths=\(0, 10\) must be"),
        ({"lengths": (10,)}, r"lengths=\(10,\) must be"),
        ({"lengths": (1, 2, 3)}, r"lengths=\(1, 2, 3\) must be"),
        ({"lengths": [10, 300]}, r"lengths=\[10, 300\] must be"),
        ({"lengths": (1.0, 2.0)}, r"lengths=\(1.0, 2.0\) must be"),
        ({"lengths": (True, 2)}, r"lengths=\(True, 2\) must be"),
        ({"lengths": 300}, "lengths=300 must be"),
        ({"mode": "fast"}, "mode='fast' is not one of"),
    ],
    ids=str,
)
def test_an_option_that_means_nothing_fails_at_decoration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        optimized_model(warmup=MEL, **options)


def test_lengths_that_do_not_go_with_the_warm_up_fail_at_decoration() -> None:
    with pytest.raises(WarmupError, match="no warmup= says what an input is"):
        optimized_model(lengths=(10, 300))
    with pytest.raises(WarmupError, match="warmup=lambda loaded, length"):
        optimized_model(warmup=lambda loaded: loaded(MEL), lengths=(10, 300))


def precision_of(load: Any) -> str:
    receipt = receipt_of(load())
    assert receipt is not None
    return receipt.precision


def test_the_precision_reaches_the_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decorator's own comes before the environment's, and that before "exact"."""
    quick: dict[str, Any] = {"warmup": MEL, "tune_seconds": 0.0}
    assert precision_of(optimized_model(**quick)(vocoder)) == "exact"
    assert precision_of(optimized_model(precision="fast", **quick)(vocoder)) == "fast"
    begin_process()
    monkeypatch.setenv("ACCELERATE_TTS_PRECISION", "balanced")
    assert precision_of(optimized_model(**quick)(vocoder)) == "balanced"
    assert precision_of(optimized_model(precision="exact", **quick)(vocoder)) == "exact"
    assert precision_of(optimized_model(precision="fast")(vocoder)) == "fast"  # without a warm-up, too


@pytest.mark.parametrize("value", ["quick", "Exact", "0"])
def test_a_precision_in_the_environment_that_means_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PRECISION", value)
    with pytest.raises(SettingsError, match=f"ACCELERATE_TTS_PRECISION='{value}': precision='{value}' is not one of"):
        load_function()


def test_the_budget_is_the_objects_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "0")
    spent = receipt_of(load_function())
    assert spent is not None
    assert {stage.reason for stage in spent.stages} == {"not tried: the tuning budget is spent"}
    own = receipt_of(optimized_model(warmup=MEL, tune_seconds=60)(vocoder)())
    assert own is not None
    assert not any("budget" in stage.reason for stage in own.stages)


def test_every_length_is_warmed_up() -> None:
    seen: list[int] = []

    def warm(model: Vocoder, length: int) -> torch.Tensor:
        seen.append(length)
        return model(MEL[..., :1].expand(1, 64, length))

    optimized_model(warmup=warm, lengths=(4, 40), tune_seconds=0.0)(vocoder)()
    assert {4, 40} < set(seen)
    rungs = sorted(set(seen))
    assert all(rungs[number + 1] < 2 * rungs[number] for number in range(len(rungs) - 1))
    seen_by_tensor: list[int] = []
    model = vocoder()
    model.register_forward_pre_hook(lambda _module, args: seen_by_tensor.append(args[0].shape[-1]))
    optimized_model(warmup=MEL, lengths=(4, 40), tune_seconds=0.0)(lambda: model)()
    assert set(seen_by_tensor) == {*rungs, MEL.shape[-1]}


@optimized_model(warmup=MEL, precision="balanced", tune_seconds=0.0, lengths=(8, 16))
def load_with_options() -> Vocoder:
    return vocoder()


def test_a_function_with_options_can_be_pickled_and_copied() -> None:
    assert pickle.loads(pickle.dumps(load_with_options)) is load_with_options
    clone = copy.deepcopy(load_with_options)
    assert clone is not load_with_options
    assert precision_of(clone) == "balanced"
    assert str(inspect.signature(load_with_options)) == "() -> 'Vocoder'"


def test_applied_twice_is_applied_once(seen: list[Event]) -> None:
    twice = optimized_model(warmup=MEL)(optimized_model(warmup=MEL)(vocoder))
    model = twice()
    assert len([event for event in seen if isinstance(event, Tuned)]) == 1
    cached = optimized_model(warmup=MEL)(lambda: model)
    assert cached() is cached() is model
    assert len([event for event in seen if isinstance(event, Tuned)]) == 1
    assert receipt_of(twice()) is not receipt_of(model)  # a new model is tuned anew


def test_the_users_own_exceptions_pass_untouched(seen: list[Event]) -> None:
    error = ValueError("my weights are missing")

    @optimized_model(warmup=MEL)
    def load() -> Vocoder:
        raise error

    with pytest.raises(ValueError, match="my weights are missing") as caught:
        load()
    assert caught.value is error

    @optimized_model(warmup=torch.zeros(1, 3, 3))  # the wrong number of channels
    def load_it() -> Vocoder:
        return vocoder()

    model = load_it()
    assert [type(event) for event in seen if event.degraded] == [WarmupFailed]
    receipt = receipt_of(model)
    assert receipt is not None
    assert "channels" in receipt.notes[0]
    with torch.no_grad():
        assert torch.equal(model(MEL), vocoder()(MEL))


def test_bare_and_without_a_module(seen: list[Event]) -> None:
    model = optimized_model(vocoder)()
    receipt = receipt_of(model)
    assert receipt is not None
    assert "no warmup" in receipt.notes[0]
    assert optimized_model(warmup=lambda loaded: None)(lambda: 5)() == 5
    assert any("no torch.nn.Module" in str(event) for event in seen)


def test_switched_off_nothing_is_tuned() -> None:
    with testing():
        model = load_function()
    assert receipt_of(model) is None


DRAWS = """
import random
import numpy as np
import torch
from torch import nn
from accelerate_tts import optimized_model, receipt_of

def seed():
    torch.manual_seed(7), np.random.seed(7), random.seed(7)

def drawn():
    return float(torch.rand(1)), np.random.rand(), random.random()

seed()
expected = drawn()
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).eval()

def warm(model):
    np.random.rand(), random.random(), torch.rand(1)
    return model(torch.ones(1, 64))

seed()
optimized_model(warmup=warm, tune_seconds=5.0)(lambda: model)()
assert receipt_of(model) is not None
assert drawn() == expected
"""


def test_the_users_random_state_is_left_alone() -> None:
    """Run in a process with one thread: beside other threads, a warm-up draws like any other call."""
    done = subprocess.run([sys.executable, "-c", DRAWS], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


def test_simultaneous_loads_tune_one_at_a_time(seen: list[Event]) -> None:
    models: list[Vocoder] = []
    threads = [threading.Thread(target=lambda: models.append(load_function())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    assert all(receipt_of(model) is not None for model in models)
    assert len([event for event in seen if isinstance(event, Tuned)]) == 4


def test_state_dict_pickle_and_copy_after_tuning() -> None:
    model = load_function()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(clone(MEL), model(MEL))
    other = vocoder()
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


# --- plausible backends that a naive version gets wrong --------------------------------------------------------


class Shared:
    """A backend around a model that somebody else may have loaded already."""

    def __init__(self, model: Vocoder) -> None:
        self.given = model
        self.spoken = 0

    @optimized_model(warmup="Hello.")
    def load(self) -> bool:
        self.model = self.given
        return True

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        self.spoken += 1
        return self.model(MEL)


def test_a_load_that_returns_no_module_is_about_self_and_a_shared_model_is_warmed_for_each() -> None:
    model = vocoder()
    first, second = Shared(model), Shared(model)
    assert first.load() is True
    receipt = receipt_of(first)
    assert receipt is not None
    second.load()
    assert second.spoken == 1  # warmed up, not tuned again
    assert receipt_of(second) is receipt_of(first) is receipt_of(model) is receipt
    second.load()
    assert second.spoken == 1


def test_models_that_are_shared_in_part_keep_their_receipts() -> None:
    shared, own = vocoder(), vocoder()

    class Both:
        @optimized_model(warmup=lambda loaded: loaded.two(loaded.one(MEL).unsqueeze(1).expand(1, 64, -1)))
        def load(self) -> None:
            self.one, self.two = shared, own

    first = Shared(shared)
    first.load()
    receipt = receipt_of(first)
    Both().load()
    assert receipt_of(first) is receipt is not None
    assert receipt_of(own) is not None
    assert receipt_of(own) is not receipt


def test_a_failed_warm_up_may_be_tried_again() -> None:
    ready: list[bool] = []

    def warm(model: Vocoder) -> torch.Tensor:
        if not ready:
            raise RuntimeError("no reference voice yet")
        return model(MEL)

    model = vocoder()
    load = optimized_model(warmup=warm)(lambda: model)
    load()
    failed = receipt_of(model)
    assert failed is not None
    assert "no reference voice" in failed.notes[0]
    ready.append(True)
    load()
    again = receipt_of(model)
    assert again is not None
    assert again.stages

    class Base:
        @optimized_model
        def load(self) -> None:
            self.model = vocoder()

    class Derived(Base):
        @optimized_model(warmup=lambda loaded: loaded.model(MEL))
        def load(self) -> None:
            super().load()

    derived = Derived()
    derived.load()
    tuned = receipt_of(derived)
    assert tuned is not None
    assert tuned.stages


def test_a_lazy_load_inside_a_request_makes_ordinary_weights() -> None:
    class Lazy:
        model: Vocoder | None = None

        @optimized_model(warmup=lambda loaded: loaded.model(MEL))
        def load(self) -> None:
            self.model = vocoder()

        @inference
        def synthesize(self) -> torch.Tensor:
            if self.model is None:
                self.load()
            assert self.model is not None
            return self.model(MEL)

    lazy = Lazy()
    lazy.synthesize()
    assert lazy.model is not None
    assert not any(parameter.is_inference() for parameter in lazy.model.parameters())


def test_slots_classmethods_containers_and_plain_iterators() -> None:
    class Slotted:
        __slots__ = ("model",)

        @optimized_model(warmup=lambda loaded: loaded.model(MEL))
        def load(self) -> None:
            self.model = vocoder()

    slotted = Slotted()
    slotted.load()
    receipt = receipt_of(slotted)
    assert receipt is not None
    assert receipt is receipt_of(slotted.model)
    with get_performance_optimizer().untouched(slotted) as in_force:
        assert in_force == bool(receipt.kept)
    assert get_performance_optimizer().undo(slotted)
    assert receipt_of(slotted.model) is receipt_of(slotted) is None
    assert not get_performance_optimizer().undo(slotted)

    class OnClass:
        model: Vocoder

        @optimized_model(warmup=lambda loaded: loaded.model(MEL))
        @classmethod
        def load(cls) -> None:
            cls.model = vocoder()

    OnClass.load()
    assert receipt_of(OnClass.model) is not None

    loaded = optimized_model(warmup=(MEL,))(lambda: (vocoder(), 16000))()
    assert receipt_of(loaded) is not None

    chunks: list[int] = []
    model = optimized_model(warmup=lambda m: map(lambda i: chunks.append(i) or m(MEL), range(3)))(vocoder)()
    assert receipt_of(model) is not None
    assert chunks[:3] == [0, 1, 2]


def test_the_users_warmup_tensor_is_not_written_to() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.mul_(2.0))

    given = torch.ones(3, 4)
    optimized_model(warmup=given)(lambda: InPlace().eval())()
    assert torch.equal(given, torch.ones(3, 4))


def test_a_text_that_several_methods_could_speak_is_a_question() -> None:
    class Unclear:
        @optimized_model(warmup="Hello.")
        def load(self) -> None:
            self.model = vocoder()

        @inference
        def embed(self, wave: torch.Tensor) -> torch.Tensor:
            return wave

        @inference
        def narrate(self, text: str) -> torch.Tensor:
            return self.model(MEL)

    with pytest.raises(WarmupError, match="embed, narrate could speak it"):
        Unclear().load()


def test_bound_methods_can_be_pickled_and_copied() -> None:
    service = Service()
    service.callback = service.plain  # type: ignore[attr-defined]
    clone = copy.deepcopy(service)
    assert clone.callback(1) == (True, 2)
    assert clone.callback.__self__ is clone
    assert pickle.loads(pickle.dumps(service.plain))(1) == (True, 2)


async def test_a_sync_load_while_an_async_one_tunes_does_not_hang(seen: list[Event]) -> None:
    backend = AsyncBackend()
    task = asyncio.create_task(backend.load())
    while not backend.threads:  # its warm-up runs on this loop now
        await asyncio.sleep(0)
    model = load_function()
    assert type(model) is Vocoder
    await task
    assert receipt_of(backend) is not None
    assert any("inside another load" in str(event) for event in seen)


async def test_a_cancelled_async_load_leaves_an_untouched_model() -> None:
    backend = AsyncBackend()
    task = asyncio.create_task(backend.load())
    while not backend.threads:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_later(lambda: receipt_of(backend), "it has no receipt")
    receipt = receipt_of(backend)
    assert receipt is not None
    assert not receipt.kept


# --- what Python's own methods and generators do ----------------------------------------------------------------


class Callbacks:
    """Methods of each kind."""

    def __init__(self) -> None:
        self.depth = 0

    @inference
    def decorated(self, value: int = 1) -> int:
        return value + 1

    @inference
    @classmethod
    def above_class(cls, value: int = 1) -> tuple[str, int]:
        return cls.__name__, value

    @classmethod
    @inference
    def below_class(cls, value: int = 1) -> tuple[str, int]:
        return cls.__name__, value

    @inference
    @staticmethod
    def above_static(value: int = 1) -> int:
        return value

    @staticmethod
    @inference
    def below_static(value: int = 1) -> int:
        return value

    @inference
    def recursive(self, depth: int) -> int:
        self.depth = max(self.depth, depth)
        return 0 if depth == 0 else 1 + self.recursive(depth - 1)

    @inference
    def walked(self, depth: int) -> Iterator[int]:
        yield depth
        if depth:
            yield from self.walked(depth - 1)

    @inference
    async def awaited(self, depth: int) -> int:
        return 0 if depth == 0 else 1 + await self.awaited(depth - 1)


class Louder(Callbacks):
    @inference
    def decorated(self, value: int = 1) -> int:
        return 10 * super().decorated(value)


METHODS = ["decorated", "above_class", "below_class", "above_static", "below_static"]


@pytest.mark.parametrize("kind", [Callbacks, Louder])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("from_class", [False, True])
def test_methods_are_copied_and_pickled_as_python_does_it(kind: Any, name: str, from_class: bool) -> None:
    owner = kind if from_class else kind()
    method = getattr(owner, name)
    args = (kind(),) if from_class and name == "decorated" else ()
    expected = method(*args)
    for again in (
        copy.copy(method),
        copy.deepcopy(method),
        *(pickle.loads(pickle.dumps(method, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
    ):
        assert again(*args) == expected
        assert type(again) is type(method)
    if not from_class and name == "decorated":
        assert copy.copy(method).__self__ is owner
        assert copy.deepcopy(method).__self__ is not owner


def test_what_cloudpickle_takes_by_value_stays_decorated() -> None:
    """Ray and Spark send classes of scripts so, and in one process cloudpickle writes to the class that is there."""
    cloudpickle = pytest.importorskip("cloudpickle")
    assert cloudpickle.loads(cloudpickle.dumps(module_level)) is module_level

    class Local:
        @inference
        def speak(self) -> bool:
            return on()

        @inference
        def stream(self) -> Iterator[bool]:
            yield on()

        @cached_embedding
        def embed(self, voice: str) -> list[str]:
            return [voice]

        @optimized_model(warmup=lambda module: module(torch.ones(1)))
        def load(self) -> nn.Module:
            return nn.Identity()

        @inference
        @classmethod
        def made(cls) -> bool:
            return on()

        @inference
        @staticmethod
        def alone() -> bool:
            return on()

    service = Local()
    for backend in (cloudpickle.loads(cloudpickle.dumps(service)), service):
        assert [backend.speak(), *backend.stream(), backend.made()] == [True] * 3
        assert backend.embed("a") == backend.embed("a") == ["a"]
        assert type(backend).embed.cache_info().hits
        assert is_load_function(type(backend).load)
        assert inspect.isfunction(vars(type(backend))["speak"])
        assert receipt_of(backend.load()) is not None
    read = (service.speak, partial(Local.speak, service), service.alone, Local.alone, Local.made)
    assert all(cloudpickle.loads(cloudpickle.dumps(each))() for each in read)


def above(function: Any) -> Any:
    """A decorator of the user's on top of ours, which calls ours as a function."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return called


def above_without_a_word(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


@pytest.mark.parametrize("others", [above, above_without_a_word, functools.lru_cache(maxsize=None)])
async def test_decorators_of_others_on_top_of_ours(others: Any) -> None:
    """They call what they decorate as a function, with the object in front: it is that object's all the same."""

    class Service:
        @others
        @optimized_model(warmup=MEL)
        def load(self) -> None:
            self.model = vocoder()

        @others
        @optimized_model(warmup=MEL)
        async def load_async(self) -> None:
            self.model = vocoder()

        @classmethod
        @others
        @optimized_model(warmup=lambda cls: cls.shared(MEL))
        def load_class(cls) -> None:
            cls.shared = vocoder()

        @others
        @cached_embedding
        def embed(self, seed: int) -> int:
            embedded.append(seed)
            return seed

        @staticmethod
        @others
        @inference
        def same(one: Service, other: Service) -> bool:
            return one is other

        @others
        @inference(concurrency=1)
        def meet(self) -> bool:
            together.wait()  # passes only if both objects are called at once
            return on()

    embedded: list[int] = []
    together = threading.Barrier(2, timeout=30)
    first, second = Service(), Service()
    first.load()
    await second.load_async()
    Service.load_class()
    for loaded in (first, second, Service):
        assert receipt_of(loaded) is not None
    assert (first.embed(3), first.embed(3), embedded) == (3, 3, [3])
    assert Service.same(first, first)
    assert not Service.same(first, second)
    assert await asyncio.gather(*(asyncio.to_thread(one.meet) for one in (first, second))) == [True, True]


def test_a_text_is_spoken_by_a_method_with_a_decorator_on_top() -> None:
    class Service:
        @above
        @optimized_model(warmup="a text")
        def load(self) -> None:
            self.model = vocoder()

        @above
        @inference
        def read_aloud(self, text: str) -> torch.Tensor:
            return self.model(MEL[..., : len(text)])

    service = Service()
    service.load()
    assert receipt_of(service) is not None
    assert is_load_function(vars(Service)["load"])
    assert not is_load_function(vars(Service)["read_aloud"])


def test_a_weak_method_is_one() -> None:
    backend = Louder()
    reference = weakref.WeakMethod(backend.decorated)
    assert reference()(3) == 40  # type: ignore[misc]
    assert reference() == backend.decorated
    assert reference == weakref.WeakMethod(backend.decorated)
    assert hash(backend.decorated) == hash(backend.decorated)
    assert [backend.decorated].index(backend.decorated) == 0
    assert backend.decorated.__func__(backend, 3) == 40
    del backend
    assert reference() is None
    assert weakref.WeakMethod(Callbacks.above_class)()() == ("Callbacks", 1)  # type: ignore[misc]


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer (make coverage) takes a part of the stack")
@pytest.mark.parametrize("name", ["recursive", "walked", "awaited"])
def test_recursion(name: str) -> None:
    """Python's limit is a thousand frames in all, of which a wrapper takes some: two of three, or three of four."""
    backend, depth = Callbacks(), 220 if name == "awaited" else 300
    result = getattr(backend, name)(depth)
    if name == "walked":
        assert sum(1 for _ in result) == depth + 1
    else:
        assert (asyncio.run(result) if name == "awaited" else result) == depth


def kinds_of_end() -> Iterator[Any]:
    def returns() -> Any:
        try:
            yield 1
            yield 2
        except GeneratorExit:
            return "closed"
        return "ended"

    def ignores() -> Any:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    def cleans() -> Any:
        try:
            yield 1
        finally:
            raise LookupError

    def catches() -> Any:
        for _ in range(3):
            try:
                yield 1
            except ValueError as error:
                yield str(error)

    yield from (returns, ignores, cleans, catches)


def outcome(work: Any) -> Any:
    try:
        return work()
    except BaseException as error:
        return type(error), str(error), getattr(error, "value", None)


ENDS: dict[str, Any] = {
    "close": lambda body: body.close(),
    "thrown exit": lambda body: body.throw(GeneratorExit()),
    "thrown": lambda body: body.throw(ValueError("x")),
    "sent": lambda body: body.send(3),
    "exhausted": lambda body: list(body),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("body", list(kinds_of_end()), ids=lambda body: body.__name__)
def test_a_generator_ends_as_it_does_undecorated(body: Any, end: Any) -> None:
    """Closing one gives what it returns, from Python 3.13 on."""
    plain, driven = body(), inference(body)()
    assert next(plain) == next(driven)
    assert outcome(lambda: end(driven)) == outcome(lambda: end(plain))
    assert outcome(lambda: end(driven)) == outcome(lambda: end(plain))


async def test_an_async_generator_ends_as_it_does_undecorated() -> None:
    async def returns() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        except GeneratorExit:
            return

    async def ignores() -> AsyncIterator[int]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    async def ended(body: Any, end: str) -> Any:
        await body.__anext__()
        try:
            return await (body.aclose() if end == "close" else body.athrow(GeneratorExit()))
        except BaseException as error:
            return type(error), str(error)

    for body in (returns, ignores):
        for end in ("close", "throw"):
            assert await ended(inference(body)(), end) == await ended(body(), end)


class Diary(nn.Module):
    """Keeps state between calls: a number of calls, a history, and a length that changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.calls, self.history, self.sequence = 0, [], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history.append(tuple(x.shape))
        self.sequence += x.shape[0]
        return self.computed(x)

    def computed(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_state_that_warmup_calls_leave_stays() -> None:
    """A limit that docs/HOW_IT_WORKS.md states: the state is the user's, and nobody else can tell what it is for."""

    def loaded(warmup: Any) -> Diary:
        return optimized_model(warmup=warmup, tune_seconds=0.5)(lambda: Diary().eval())()

    diary = loaded(torch.ones(2, 8))
    assert diary.calls == len(diary.history) > 0
    assert diary.sequence == 2 * diary.calls
    untouched = loaded(lambda model: model.computed(torch.ones(2, 8)))
    assert (untouched.calls, untouched.history, untouched.sequence) == (0, [], 0)
