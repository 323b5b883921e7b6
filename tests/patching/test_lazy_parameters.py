"""`guard_weights="reload"`: any access to a freed weight reloads it, or raises an error with the reason."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import (
    Event,
    PerformanceOptimizer,
    Settings,
    get_performance_optimizer,
    inference,
    optimized_model,
    receipt_of,
)
from accelerate_tts.errors import ReloadError
from accelerate_tts.events import FellBack, Guarded, NotApplied
from accelerate_tts.patching.lazy_parameters import LazyParameters
from doubles import begin_process

SIZE = 256
LOADED: list[weakref.ref[nn.Module]] = []
"""Every model that a load function made."""


@pytest.fixture(autouse=True)
def _reloading(bf16_is_faster: None) -> None:
    settings = Settings(device="cpu", compile=False, pack=False, precision="balanced", guard_weights="reload")
    begin_process(PerformanceOptimizer(settings))
    LOADED.clear()


def made() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / SIZE**0.5)
    LOADED.append(weakref.ref(model))
    return model


class Voice:
    """A voice whose faults a test can order."""

    def __init__(self) -> None:
        self.model: Any = None
        self.faulty = False
        self.seen: list[bool] = []

    @optimized_model(warmup=lambda self: self.speak("how do you do"))
    def load(self) -> None:
        if self.model is None:  # as many do: nothing to do where it is loaded
            self.model = made()

    @inference
    def speak(self, text: str) -> torch.Tensor:
        wave = self.model(torch.randn(len(text) + 20, SIZE)).flatten()
        # The fault of a reduced precision: it goes with the changes.
        return wave * float("nan") if self.faulty and not is_fp32(self.model) else wave

    @inference
    def voiced(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    @inference
    def stream(self, text: str) -> Any:
        for piece in range(4):
            wave = self.model(torch.randn(len(text) + 20, SIZE)).flatten()
            self.seen.append(is_fp32(self.model))
            yield wave * float("nan") if self.faulty and piece > 0 and not is_fp32(self.model) else wave


def is_fp32(model: Any) -> bool:
    return type(model[0]) is nn.Linear and "_accelerate_tts_half" not in vars(model[0])


def away(model: Any) -> bool:
    kinds = {type(layer._parameters) is LazyParameters for layer in (model[0], model[2])}
    assert len(kinds) == 1
    return kinds.pop()


def loaded() -> Voice:
    voice = Voice()
    voice.load()
    return voice


def alive() -> int:
    gc.collect()
    return sum(reference() is not None for reference in LOADED)


def reference(text: str, seed: int) -> torch.Tensor:
    model = made()
    torch.manual_seed(seed)
    with torch.inference_mode():
        return model(torch.randn(len(text) + 20, SIZE)).flatten()  # type: ignore[no-any-return]


def test_what_is_freed_is_gone_and_the_receipt_says_how_much() -> None:
    voice = loaded()
    assert away(voice.model)
    receipt = receipt_of(voice)
    assert receipt is not None
    assert any(note.startswith("0.5 MiB of original weights were freed") for note in receipt.notes)
    assert alive() == 1, "the model that was loaded to see that it can be is kept"
    with_memory = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.shape == (SIZE, SIZE)]
    assert not with_memory
    wave = voice.speak("hello")
    assert away(voice.model), "a call had them loaded again"
    assert torch.isfinite(wave).all()


def test_a_faulty_call_is_made_again_on_the_weights_as_they_were_loaded(seen: list[Event]) -> None:
    voice = loaded()
    voice.faulty = True
    torch.manual_seed(7)
    wave = voice.speak("hello")
    after = torch.rand(1)
    assert torch.equal(wave, reference("hello", 7))
    assert torch.equal(after, torch.rand(1, generator=_advanced(7))), "the random numbers went another way"
    assert [event.fault for event in seen if isinstance(event, Guarded)] == ["NaN or Inf"]
    assert away(voice.model), "they were not let go again"
    assert not is_fp32(voice.model)
    assert alive() == 1


def _advanced(seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.randn(len("hello") + 20, SIZE, generator=generator)
    return generator


def test_a_stream_has_them_loaded_once_and_until_it_ends() -> None:
    voice = loaded()
    loads = len(LOADED)
    voice.faulty = True
    stream = voice.stream("hello")
    pieces = [next(stream), next(stream)]
    assert not away(voice.model)
    assert is_fp32(voice.model), "the changes come back while the second attempt is under way"
    pieces += stream
    assert len(pieces) == 4
    assert all(torch.isfinite(piece).all() for piece in pieces)
    assert voice.seen == [False, False, True, True, True, True]
    assert len(LOADED) == loads + 1, "it was loaded at each step"
    del stream
    gc.collect()
    assert away(voice.model)


def test_a_stream_that_is_dropped_lets_them_go() -> None:
    voice = loaded()
    voice.faulty = True
    stream = voice.stream("hello")
    next(stream)
    next(stream)
    assert not away(voice.model)
    del stream
    gc.collect()
    assert away(voice.model)


def test_after_the_last_fault_they_are_back_for_good(seen: list[Event]) -> None:
    voice = loaded()
    voice.faulty = True
    for _ in range(3):
        voice.speak("hello")
    assert any(isinstance(event, FellBack) for event in seen)
    assert is_fp32(voice.model)
    assert not away(voice.model)
    torch.manual_seed(3)
    assert torch.equal(voice.speak("hello"), reference("hello", 3))
    assert not away(voice.model)


READERS: dict[str, Callable[[Any], torch.Tensor]] = {
    "weight": lambda m: m[0].weight,
    "parameters": lambda m: next(iter(m.parameters())),
    "named_parameters": lambda m: dict(m.named_parameters())["0.weight"],
    "state_dict": lambda m: m.state_dict()["0.weight"],
    "layer.state_dict": lambda m: m[0].state_dict()["weight"],
    "get_parameter": lambda m: m.get_parameter("0.weight"),
    "deepcopy": lambda m: copy.deepcopy(m)[0].weight,
    "copy": lambda m: copy.copy(m[0]).weight,
    "pickle": lambda m: pickle.loads(pickle.dumps(m))[0].weight,
    "save": lambda m: saved(m)[0].weight,
    "double": lambda m: m.double()[0].weight,
    "share_memory": lambda m: m.share_memory()[0].weight,
    "_parameters.get": lambda m: m[0]._parameters.get("weight"),
    "_parameters.items": lambda m: dict(m[0]._parameters.items())["weight"],
    "dict": lambda m: dict(m[0]._parameters)["weight"],
    "**": lambda m: {**m[0]._parameters}["weight"],
    "|": lambda m: ({} | m[0]._parameters)["weight"],
    "set": lambda m: (setattr(m[0], "extra", nn.Parameter(torch.zeros(1))), m[0].weight)[1],
    "apply": lambda m: m.apply(lambda layer: layer)[0].weight,
}


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("reader", list(READERS))
def test_whoever_reads_a_weight_finds_it(reader: str, seen: list[Event]) -> None:
    voice = loaded()
    expected = made()[0].weight
    found = READERS[reader](voice.model)
    assert torch.equal(found.float(), expected)
    assert any(isinstance(event, NotApplied) and "stay in memory" in event.reason for event in seen)
    assert not away(voice.model)
    voice.speak("hello")
    assert not away(voice.model), "what is read in service is not let go again"


def test_a_state_dict_that_is_loaded_is_what_the_calls_compute_from() -> None:
    voice = loaded()
    voice.model.load_state_dict({name: torch.zeros_like(t) for name, t in made().state_dict().items()})
    assert not voice.speak("hello").any()


def test_names_are_told_without_loading() -> None:
    voice = loaded()
    own = voice.model[0]._parameters
    assert list(own) == ["weight", "bias"]
    assert "weight" in own
    assert len(own) == 2
    assert repr(voice.model)
    assert not hasattr(voice.model[0], "no_such_thing")
    assert isinstance(voice.model[0].bias, nn.Parameter)
    assert away(voice.model)


def test_who_holds_a_weight_keeps_it() -> None:
    held: list[Any] = []

    @optimized_model(warmup=torch.randn(24, SIZE))
    def load() -> nn.Module:
        model = made()
        held.append(model[0].weight)
        return model

    model: Any = load()
    assert type(model[0]._parameters) is dict
    assert model[0].weight is held[0]
    assert type(model[2]._parameters) is LazyParameters


@pytest.mark.parametrize("how", ["undo", "untouched"])
def test_undo_and_untouched_have_them(how: str) -> None:
    voice = loaded()
    optimizer = get_performance_optimizer()
    if how == "undo":
        assert optimizer.undo(voice)
        torch.manual_seed(3)
        wave = voice.speak("hello")
    else:
        with optimizer.untouched(voice):
            torch.manual_seed(3)
            wave = voice.speak("hello")
    assert torch.equal(wave, reference("hello", 3))
    assert away(voice.model) == (how == "untouched")


def test_an_asynchronous_load_is_called_again_from_inside_a_running_loop() -> None:
    class Service(Voice):
        @optimized_model(warmup=lambda self: self.speak("how do you do"))
        async def load(self) -> None:  # type: ignore[override]
            await asyncio.sleep(0)
            self.model = made()

        @inference
        async def answer(self, text: str) -> torch.Tensor:
            await asyncio.sleep(0)
            return self.speak(text)

    async def main() -> None:
        voice = Service()
        await voice.load()
        assert away(voice.model)
        voice.faulty = True
        torch.manual_seed(5)
        assert torch.equal(await voice.answer("hello"), reference("hello", 5))

    asyncio.run(main())


def test_many_threads_with_faults_and_without_give_what_each_gives_alone() -> None:
    voice = loaded()
    x = torch.randn(30, SIZE)
    with torch.inference_mode():
        tuned, plain = voice.voiced(x), made()(x)
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(6):
            y = voice.voiced(x)
            # Another one's second attempt has the model untouched for a while. Nothing in between is right.
            if not (torch.equal(y, tuned) or torch.equal(y, plain)):
                wrong.append(f"{number}: {y.dtype}, {(y - plain).abs().max()}, {(y - tuned).abs().max()}")
            if number == 0 and turn % 3 == 0:
                with get_performance_optimizer().untouched(voice):
                    voice.voiced(x)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Weights in use by another thread's call were not freed; the next attempt frees all again.
    with get_performance_optimizer().untouched(voice):
        pass
    assert away(voice.model)
    with torch.inference_mode():
        assert torch.equal(voice.model(x), tuned)


class BrokenError(Exception):
    pass


def _other_weights(_voice: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE)).eval()


def _raises(_voice: Any) -> nn.Module:
    raise BrokenError("the checkpoint is gone")


def _another_shape(_voice: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, 8))


@pytest.mark.parametrize(
    ("second", "said"),
    [(_raises, "the checkpoint is gone"), (_other_weights, "other weights"), (_another_shape, "other weights")],
)
def test_what_cannot_be_loaded_again_is_not_let_go(second: Any, said: str, seen: list[Event]) -> None:
    class Once(Voice):
        @optimized_model(warmup=lambda self: self.speak("how do you do"))
        def load(self) -> None:
            self.model = second(self) if LOADED else made()

    voice = Once()
    voice.load()
    assert not away(voice.model)
    told = [event for event in seen if isinstance(event, NotApplied) and "guard_weights" in event.what]
    assert len(told) == 1
    assert said in told[0].reason
    assert alive() == 1


def test_one_that_gives_the_same_model_each_time_is_not_let_go(seen: list[Event]) -> None:
    model = made()
    assert optimized_model(warmup=torch.randn(24, SIZE))(lambda: model)() is model
    assert type(model[0]._parameters) is dict  # type: ignore[index]
    assert any(isinstance(event, NotApplied) and "loaded already" in event.reason for event in seen)


def test_a_load_that_fails_later_costs_the_second_attempt_and_nothing_else(seen: list[Event]) -> None:
    class Later(Voice):
        gone = False

        @optimized_model(warmup=lambda self: self.speak("how do you do"))
        def load(self) -> None:
            if Later.gone:
                raise BrokenError("the checkpoint is gone")
            self.model = made()

    voice = Later()
    voice.load()
    Later.gone = voice.faulty = True
    for _ in range(4):
        assert torch.isnan(voice.speak("hello")).all()
    guarded = [event for event in seen if isinstance(event, Guarded)]
    assert len(guarded) == 4
    assert all("the checkpoint is gone" in event.outcome for event in guarded)
    assert any(isinstance(event, NotApplied) and "putting" in event.what for event in seen)
    assert away(voice.model)
    with pytest.raises(ReloadError, match="the checkpoint is gone"):
        get_performance_optimizer().undo(voice)
    with pytest.raises(ReloadError, match="the checkpoint is gone"):
        voice.model.state_dict()
    Later.gone = voice.faulty = False
    assert torch.isfinite(voice.speak("hello")).all()
    assert get_performance_optimizer().undo(voice)


GLOBAL: Any = None


def test_what_the_load_function_puts_elsewhere_is_put_back() -> None:
    @optimized_model(warmup=torch.randn(24, SIZE))
    def load() -> nn.Module:
        global GLOBAL  # noqa: PLW0603 - as scripts do
        GLOBAL = made()
        return GLOBAL  # type: ignore[no-any-return]

    model = load()
    assert GLOBAL is model
    assert type(model[0]._parameters) is LazyParameters  # type: ignore[index]


def test_containers_of_the_owner_are_its_own() -> None:
    class Many(Voice):
        def __init__(self) -> None:
            super().__init__()
            self.models: dict[str, Any] = {}

        @optimized_model(warmup=lambda self: self.speak("how do you do"))
        def load(self) -> None:
            self.models["a"] = made()

        @inference
        def speak(self, text: str) -> torch.Tensor:
            return self.models["a"](torch.randn(len(text) + 20, SIZE)).flatten()  # type: ignore[no-any-return]

    voice = Many()
    voice.load()
    assert receipt_of(voice.models["a"]) is not None
    assert away(voice.models["a"])


MODELS: dict[str, Any] = {}


class InAnObject(Voice):
    """Its model is in an object that it holds, which a second load would write into."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = SimpleNamespace()

    def put(self, model: nn.Module) -> None:
        self.state.voice = model

    def get(self) -> Any:
        return self.state.voice

    @optimized_model(warmup=lambda self: self.speak("how do you do"))
    def load(self) -> None:
        self.put(made())
        if getattr(type(self), "fails", False):
            raise RuntimeError("the checkpoint is gone")

    @inference
    def speak(self, text: str) -> torch.Tensor:
        return self.get()(torch.randn(len(text) + 20, SIZE)).flatten()  # type: ignore[no-any-return]


class Slots:
    __slots__ = ("voice",)


class InASlot(InAnObject):
    def __init__(self) -> None:
        super().__init__()
        self.state = Slots()


class InADictionary(InAnObject):
    def put(self, model: nn.Module) -> None:
        vars(self.state).setdefault("inner", {})["voice"] = model
        self.model = model

    def get(self) -> Any:
        return self.state.inner["voice"]


class InAList(InAnObject):
    def __init__(self) -> None:
        super().__init__()
        self.state = ([],)

    def put(self, model: nn.Module) -> None:
        self.state[0][:] = [model]

    def get(self) -> Any:
        return self.state[0][0]


class InARegistry(InAnObject):
    def put(self, model: nn.Module) -> None:
        MODELS["voice"] = self.model = model

    def get(self) -> Any:
        return MODELS["voice"]


class OnTheClass(InAnObject):
    voice: Any = None

    def put(self, model: nn.Module) -> None:
        OnTheClass.voice = self.model = model

    def get(self) -> Any:
        return self.voice


@pytest.mark.parametrize("kind", [InAnObject, InASlot, InADictionary, InAList, InARegistry, OnTheClass])
def test_a_second_load_leaves_the_serving_object_its_model(kind: type[InAnObject]) -> None:
    MODELS.clear()
    voice = kind()
    voice.load()
    model = voice.get()
    assert model is LOADED[0]()
    assert away(model)
    MODELS["other"] = 1
    kind.fails = True  # type: ignore[attr-defined]
    with pytest.raises(ReloadError, match="the checkpoint is gone"):
        model.state_dict()
    assert voice.get() is model
    del kind.fails  # type: ignore[attr-defined]
    assert get_performance_optimizer().undo(voice)
    assert voice.get() is model
    assert MODELS.pop("other") == 1
    assert alive() == 1


def test_a_model_that_another_thread_stores_during_a_second_load_stays() -> None:
    MODELS.clear()

    class Busy(InARegistry):
        @optimized_model(warmup=lambda self: self.speak("how do you do"))
        def load(self) -> None:
            self.put(made())
            MODELS[f"other {len(LOADED)}"] = nn.Linear(2, 2)  # as another thread would

    voice = Busy()
    voice.load()
    assert voice.get() is LOADED[0]()
    assert {"voice", "other 1", "other 2"} == set(MODELS)


def test_without_a_load_function_they_stay(seen: list[Event]) -> None:
    from accelerate_tts.tuning.load_request import LoadRequest
    from accelerate_tts.tuning.warmup import Loaded

    model: Any = made()
    get_performance_optimizer().optimize(LoadRequest(torch.randn(24, SIZE), loaded=Loaded(model)))
    assert type(model[0]._parameters) is dict
    assert any(isinstance(event, NotApplied) and "no load function" in event.reason for event in seen)
