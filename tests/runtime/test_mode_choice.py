"""A function that works undecorated works decorated: if a call fails in our mode, it runs in a milder one."""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event, inference, optimized_model, receipt_of
from accelerate_tts.events import NotApplied, WarmupFailed
from accelerate_tts.runtime import mode_choice


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "2")


KINDS = ["plain", "coroutine", "stream", "stream_later"]


class Threaded(nn.Module):
    """Prepares a state in the call, and generates in a thread of its own, as pocket-tts does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = {"cache": torch.zeros(3, 4) + x}
        answers: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                with torch.no_grad():
                    for step in range(3):
                        state["cache"][step] += self.linear(x[0])
                answers.put(state["cache"])
            except Exception as error:
                answers.put(error)

        threading.Thread(target=work).start()
        answer = answers.get(timeout=20)
        if isinstance(answer, Exception):
            raise RuntimeError("the generation thread failed") from answer  # noqa: TRY004 - it is no wrong type
        return answer + torch.randn(3, 4)  # type: ignore[no-any-return]


class MakesModules(nn.Module):
    """Makes a cell in the call, with the weights of a layer, as WaveRNN does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cell = nn.GRUCell(4, 4)
        cell.weight_hh.data, cell.weight_ih.data = self.rnn.weight_hh_l0.data, self.rnn.weight_ih_l0.data
        cell.bias_hh.data, cell.bias_ih.data = self.rnn.bias_hh_l0.data, self.rnn.bias_ih_l0.data
        return cell(x, torch.zeros_like(x)).detach() + torch.randn(1, 4)  # type: ignore[no-any-return]


class Keeps(nn.Module):
    """Keeps a tensor from its first call, and writes into it in a thread that no mode reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = "table" not in self.kept
        if first:
            self.kept["table"] = (torch.zeros(4), "a tuple")
        thread = Raising(lambda: None if first else self.kept["table"][0].add_(1.0))
        thread.start()
        thread.join(20)
        if thread.error is not None:
            raise thread.error
        return self.kept["table"][0] + x


class Raising(threading.Thread):
    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.work, self.error = work, None

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error  # type: ignore[assignment]


class Guided(nn.Module):
    """Takes a gradient in the call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(x.square().sum(), x)
        return gradient + torch.randn(1, 4)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "threads of its own": (Threaded, "no_grad"),
    "modules made in the call": (MakesModules, "no_grad"),
    "gradients": (Guided, "none"),
}
X = torch.ones(1, 4)


class Service:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls = 0

    @inference
    def plain(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.model(x)  # type: ignore[no-any-return]

    @inference
    async def coroutine(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        await asyncio.sleep(0)
        return self.model(x)  # type: ignore[no-any-return]

    @inference
    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        self.calls += 1
        for _ in range(2):
            yield self.model(x)

    @inference
    async def stream_later(self, x: torch.Tensor) -> AsyncIterator[torch.Tensor]:
        self.calls += 1
        for _ in range(2):
            await asyncio.sleep(0)
            yield self.model(x)

    @inference(retry=False)
    def once(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.model(x)  # type: ignore[no-any-return]


def call(service: Any, kind: str, x: torch.Tensor = X) -> list[torch.Tensor]:
    made = getattr(service, kind)(x)
    if kind == "coroutine":
        return [asyncio.run(made)]
    if kind == "stream_later":

        async def collect() -> list[torch.Tensor]:
            return [piece async for piece in made]

        return asyncio.run(collect())
    return list(made) if kind == "stream" else [made]


def told(seen: list[Event]) -> list[str]:
    return [str(event) for event in seen if isinstance(event, NotApplied)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_call_that_was_not_warmed_up_is_mended_once(name: str, kind: str, seen: list[Event]) -> None:
    make, mode = MODELS[name]
    undecorated, service = Undecorated(make()), Service(make())
    torch.manual_seed(7)
    expected = call(undecorated, kind)
    torch.manual_seed(7)
    assert all(map(torch.equal, call(service, kind), expected)), "not what it gives undecorated under the same seed"
    assert service.calls == 2
    for other in KINDS:  # the object's other methods, too
        call(service, other)
    assert service.calls == 6
    (event,) = told(seen)
    assert f'write @inference(mode="{mode}")' in event
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    another = Service(nn.Linear(4, 4))
    assert another.plain(X).is_inference(), "it is about one object"


class Undecorated(Service):
    plain = Service.plain.__wrapped__
    coroutine = Service.coroutine.__wrapped__
    stream = Service.stream.__wrapped__
    stream_later = Service.stream_later.__wrapped__


def test_objects_around_one_model_learn_from_each_other(seen: list[Event]) -> None:
    model = Threaded()

    class Holder:
        def __init__(self) -> None:
            self.held = model

    class Deep(Service):
        def __init__(self) -> None:
            self.holder, self.calls = Holder(), 0
            self.model = lambda x: self.holder.held(x)  # type: ignore[assignment]

    sessions = [Service(model), Service(model), Service(model), Deep(), Deep()]
    for session in sessions:
        call(session, "plain")
    assert [session.calls for session in sessions] == [2, 1, 1, 2, 1]
    assert len(told(seen)) == 2


def test_what_an_earlier_call_kept_is_made_normal(seen: list[Event]) -> None:
    service = Service(Keeps())
    service.plain(X)
    with pytest.raises(RuntimeError, match="inference tensor"):  # torch wrote into the table before it raised
        service.plain(X)
    assert not service.model.kept["table"][0].is_inference()
    assert torch.equal(service.plain(X), torch.full((1, 4), 3.0))
    assert service.calls == 3
    assert len(told(seen)) == 1


def test_arguments_that_were_made_in_inference_mode_are_given_as_normal_tensors() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = Raising(lambda: x.add_(1.0))
            thread.start()
            thread.join(20)
            if thread.error is not None:
                raise thread.error
            return x

    with torch.inference_mode():
        given = torch.ones(1, 4)
    for _ in range(2):
        assert torch.equal(Service(Writes()).plain(given), torch.full((1, 4), 2.0)), "it was written into twice"
    assert torch.equal(given, torch.ones(1, 4))


@pytest.mark.parametrize("name", MODELS)
def test_both_decorators_as_readme_shows_them(name: str, seen: list[Event]) -> None:
    make, mode = MODELS[name]

    class Backend(Service):
        def __init__(self) -> None:
            pass

        @optimized_model(warmup=lambda self: self.plain(X))
        def load(self) -> None:
            Service.__init__(self, make().eval())

    backend = Backend()
    backend.load()
    assert not [event for event in seen if isinstance(event, WarmupFailed)]
    assert len([event for event in told(seen) if f'mode="{mode}"' in event]) == 1
    receipt = receipt_of(backend)
    assert receipt is not None
    assert receipt.before is not None, "it was not timed"
    calls = backend.calls
    for kind in KINDS:
        call(backend, kind)
    assert backend.calls == calls + 4


@pytest.mark.parametrize("name", [name for name, (_, mode) in MODELS.items() if mode == "no_grad"])
def test_a_warm_up_that_is_not_decorated(name: str, seen: list[Event]) -> None:
    make, _ = MODELS[name]
    model = optimized_model(warmup=X)(lambda: make().eval())()
    receipt = receipt_of(model)
    assert receipt is not None
    assert receipt.before is not None
    assert not [event for event in seen if isinstance(event, WarmupFailed)]
    assert len([event for event in told(seen) if 'mode="no_grad"' in event]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_users_own_is_raised_as_it_is(kind: str, seen: list[Event]) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    error = RuntimeError("no such voice")
    service = Service(Fails())
    with pytest.raises(RuntimeError) as caught:
        call(service, kind)
    assert caught.value is error
    assert service.calls == 1
    assert not told(seen)


def test_an_error_that_cannot_be_printed_is_raised_as_it_is() -> None:
    class OwnError(RuntimeError):
        def __str__(self) -> str:
            raise LookupError

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise OwnError

    with pytest.raises(OwnError):
        Service(Fails()).plain(X)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_no_mode_mends_is_raised_and_not_tried_again(kind: str, seen: list[Event]) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("Inplace update to inference tensor, and number", next(numbers))

    numbers = iter(range(100))
    service = Service(Fails())
    for made, first in ((2, 0), (3, 2), (4, 3)):
        with pytest.raises(RuntimeError) as caught:
            call(service, kind)
        assert caught.value.args[1] == first
        assert service.calls == made
    assert not told(seen)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="task groups came with Python 3.11")
def test_an_error_in_a_task_group_is_mended(seen: list[Event]) -> None:
    class Backend:
        calls = 0

        @inference
        async def speak(self) -> torch.Tensor:
            self.calls += 1
            wave = torch.zeros(4)

            async def write(at: int) -> None:
                wave[at] += at

            async with asyncio.TaskGroup() as group:
                for at in range(4):
                    group.create_task(write(at))
            return wave

    backend = Backend()
    for calls in (2, 3):
        assert asyncio.run(backend.speak()).tolist() == [0.0, 1.0, 2.0, 3.0]
        assert backend.calls == calls
    (event,) = told(seen)
    assert "Inplace update to inference tensor outside InferenceMode" in event


@pytest.mark.parametrize(
    "error",
    [
        ValueError("unknown inference mode 'sft'"),
        RuntimeError("the inference model is not loaded"),
        RuntimeError("progress is saved for backward compatibility only"),
        LookupError("inference tensor"),
    ],
    ids=str,
)
def test_an_error_that_only_sounds_like_the_modes_is_not_tried_again(error: Exception, seen: list[Event]) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    service = Service(Fails())
    for kind in KINDS:
        with pytest.raises(type(error)):
            call(service, kind)
    assert service.calls == len(KINDS)
    assert not told(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cause_and_the_context_of_an_error_stay(kind: str) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cause = RuntimeError("Inference tensors do not track version counter.")
            try:
                raise KeyError("context")
            except KeyError:
                raise ValueError("the voice cannot be made") from cause

    service = Service(Fails())
    with pytest.raises(ValueError, match="the voice") as caught:
        call(service, kind)
    assert service.calls == 2
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert isinstance(caught.value.__context__, KeyError)


def test_an_error_of_the_users_about_the_mode_repeats_once_for_an_object_and_never_without_retry() -> None:
    """A repeated call does twice what it did before the error."""

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("the voice cannot be made") from RuntimeError("Inplace update outside InferenceMode")

    service = Service(Fails())
    for calls in (1, 2, 3):
        with pytest.raises(ValueError, match="the voice"):
            service.once(X)
        assert service.calls == calls
    service = Service(Fails())
    for calls in (2, 3, 4):
        with pytest.raises(ValueError, match="the voice"):
            service.plain(X)
        assert service.calls == calls


def test_a_function_that_is_not_to_be_made_again_changes_its_mode_only(seen: list[Event]) -> None:
    service = Service(Threaded())
    with pytest.raises(RuntimeError, match="the generation thread failed"):
        service.once(X)
    assert service.calls == 1
    service.once(X)
    assert service.calls == 2
    assert len(told(seen)) == 1


def test_what_calls_a_function_that_is_not_to_be_made_again_changes_its_mode_only(seen: list[Event]) -> None:
    class Shop(Service):
        charged = 0

        @inference(retry=False)
        def charge(self) -> None:
            self.charged += 1

        @inference
        def sell(self, x: torch.Tensor) -> torch.Tensor:
            self.charge()
            return self.model(x)  # type: ignore[no-any-return]

    shop = Shop(Threaded())
    with pytest.raises(RuntimeError, match="the generation thread failed"):
        shop.sell(X)
    assert shop.charged == 1
    shop.sell(X)
    assert shop.charged == 2
    assert len(told(seen)) == 1


def test_a_stream_that_has_delivered_something_changes_its_mode_only(seen: list[Event]) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.count = Threaded(), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.inner(x) if self.count % 2 == 0 else x

    for kind in ("stream", "stream_later"):
        service = Service(Late())
        with pytest.raises(RuntimeError, match="the generation thread failed"):
            call(service, kind)
        assert service.calls == 1
        service.model.count = 0
        assert len(call(service, kind)) == 2


def test_a_plain_function_and_an_object_with_slots() -> None:
    model = Threaded()

    @inference
    def speak(x: torch.Tensor) -> torch.Tensor:
        return model(x)  # type: ignore[no-any-return]

    class Slotted:
        __slots__ = ("model",)

        def __init__(self) -> None:
            self.model = Threaded()

        @inference
        def speak(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)  # type: ignore[no-any-return]

    for _ in range(2):
        assert not speak(X).is_inference()
        assert not Slotted().speak(X).is_inference()


def test_inside_the_callers_own_inference_mode_it_is_the_callers(seen: list[Event]) -> None:
    service = Service(Threaded())
    with torch.inference_mode(), pytest.raises(RuntimeError):
        service.plain(X)
    assert service.calls == 1
    assert not told(seen)


def test_nothing_is_kept_of_an_object() -> None:
    gc.collect()
    before = len(mode_choice.known_owners)
    service = Service(Threaded())
    service.plain(X)
    assert mode_choice.known_owners.get(service) is not None
    del service
    gc.collect()
    assert len(mode_choice.known_owners) <= before


def test_a_lazy_module_that_had_no_call_yet(seen: list[Event]) -> None:
    class Backend:
        @optimized_model(warmup=torch.ones(1, 9))
        def load(self) -> nn.Module:
            self.model = nn.LazyLinear(4)
            return self.model

        @inference
        def speak(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)  # type: ignore[no-any-return]

    backend = Backend()
    backend.load()
    assert receipt_of(backend) is None
    assert "LazyLinear has no weights before its first call" in str(seen[-1])
    assert backend.speak(torch.ones(1, 9)).shape == (1, 4)


def test_a_users_tensors_are_not_asked() -> None:
    class Refuses(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> Any:
            raise TypeError("not for others")

    class Backend:
        def __init__(self) -> None:
            self.kept = [torch.ones(2).as_subclass(Refuses)]

        @inference
        def speak(self, given: Any) -> Any:
            return given

    given = torch.ones(2).as_subclass(Refuses)
    assert Backend().speak(given) is given


def test_objects_that_refuse_to_be_looked_at() -> None:
    """The search for tensors and generators is ours; nothing that it meets may raise into the call."""

    class Device(random.Random):
        def getstate(self) -> Any:
            raise NotImplementedError("it has none")

    class Refuses:
        generator = Device()

        @property
        def __dict__(self) -> Any:
            raise RuntimeError("not for others")

    class Holds:
        def __init__(self) -> None:
            self.generator = Device()

        @inference
        def speak(self, given: Any) -> Any:
            return given

    class LazyDict(dict[str, Any]):
        def __len__(self) -> int:
            raise RuntimeError("not for others")

        values = items = __iter__ = __len__  # type: ignore[assignment]

    class LazyList(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            return f"voice {int(index)}"

        def __len__(self) -> int:
            raise RuntimeError("not for others")

        __iter__ = __len__  # type: ignore[assignment]

    given = [Refuses(), Device(), LazyDict(a=1), LazyList([1, 2])]
    assert Holds().speak(given) is given
