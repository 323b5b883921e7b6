"""What goes wrong in a load, in its warm-up or in a call: a working model or the user's own exception, and no leak."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from accelerate_tts import Event, get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.events import WarmupFailed

ERRORS: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError,
    "another": lambda: ValueError("the user's own"),
}
PASSES = {"the first pass": 1, "the pass that is watched": 2}
X = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")


class Scarce(nn.Module):
    """Raises in one of its calls, with a large tensor in its frame; `made` knows whether those are still alive."""

    def __init__(self, error: Callable[[], Exception] | None, when: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = weight_norm(nn.Conv1d(8, 8, 3))
        self.error, self.when, self.calls = error, when, 0
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(1 << 16)
        self.made.append(weakref.ref(large))
        self.calls += 1
        if self.calls == self.when and self.error is not None:
            raise self.error()
        return self.conv(x) + large[0]  # type: ignore[no-any-return]

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.made)


class Backend:
    def __init__(self, error: Callable[[], Exception] | None, when: int) -> None:
        self.fault = error, when

    @optimized_model(warmup=lambda self: self.speak(X))
    def load(self) -> None:
        self.model = Scarce(*self.fault)

    @inference
    def speak(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("when", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_fault_in_a_first_pass_leaves_what_was_loaded(error: Any, when: int, seen: list[Event]) -> None:
    backend = Backend(error, when)
    backend.load()
    assert [type(event) for event in seen if isinstance(event, WarmupFailed)] == [WarmupFailed]
    assert not backend.model.alive(), "a traceback keeps what the failed pass had made"
    untouched = Scarce(None, 0)
    assert type(backend.model.conv) is not type(untouched.conv) or not backend.model._forward_pre_hooks
    assert backend.model.state_dict().keys() == untouched.state_dict().keys()
    assert not backend.model.conv._buffers
    assert torch.equal(backend.speak(X), untouched(X))
    receipt = receipt_of(backend)
    assert receipt is not None
    assert not receipt.kept
    # It may be tried again, and then it is tuned like any other.
    get_performance_optimizer().optimize(_loaded(backend), lambda: backend.speak(X))
    assert len([event for event in seen if isinstance(event, WarmupFailed)]) == 1
    again = receipt_of(backend)
    assert again is not None
    assert again.before is not None


def _loaded(backend: Backend) -> Any:
    from accelerate_tts.engine.warmup import Loaded

    return Loaded(None, backend)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_fault_in_a_call_is_the_users_own_and_leaks_nothing(error: Any) -> None:
    backend = Backend(None, 0)
    backend.load()
    backend.model.error, backend.model.when = error, backend.model.calls + 1
    try:
        backend.speak(X)
    except Exception as raised:  # what pytest.raises has caught it keeps
        assert (type(raised), str(raised)) == (type(error()), str(error()))  # noqa: PT017 - see above
        assert backend.model.alive() == 1
    else:
        pytest.fail("nothing was raised")
    assert not torch.is_inference_mode_enabled()
    assert not backend.model.alive()
    assert torch.equal(backend.speak(X), Scarce(None, 0)(X))


class Gone(Exception):  # noqa: N818 - a user's name
    pass


def test_an_exception_of_the_load_function_is_the_users_own_and_the_next_load_works(seen: list[Event]) -> None:
    class Service(Backend):
        tries = 0

        @optimized_model(warmup=lambda self: self.speak(X))
        def load(self) -> None:
            self.tries += 1
            self.half = Scarce(None, 0)
            if self.tries == 1:
                raise error
            self.model = self.half

    error, service = Gone("the checkpoint"), Service(None, 0)
    with pytest.raises(Gone) as caught:
        service.load()
    assert caught.value is error
    assert not [event for event in seen if type(event).__name__ in {"Trying", "Tuned", "WarmupFailed"}]
    assert receipt_of(service) is None
    service.load()
    assert receipt_of(service) is not None


def test_an_exception_of_an_asynchronous_load_too() -> None:
    class Service(Backend):
        @optimized_model(warmup=lambda self: self.speak(X))
        async def load(self) -> None:  # type: ignore[override]
            await asyncio.sleep(0)
            raise error

    error = Gone("the checkpoint")
    with pytest.raises(Gone) as caught:
        asyncio.run(Service(None, 0).load())
    assert caught.value is error


def test_after_a_load_that_raised_no_other_thread_waits_for_its_turn() -> None:
    def load() -> nn.Module:
        raise Gone

    with pytest.raises(Gone):
        optimized_model(warmup=X)(load)()
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(optimized_model(warmup=X)(lambda: Scarce(None, 0))()))
    thread.start()
    thread.join(60)
    assert done
    assert receipt_of(done[0]) is not None
