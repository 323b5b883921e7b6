"""A warm-up that never returns: the load gives the untouched model, and an event says so."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.events import Event, WarmupFailed
from accelerate_tts.runtime.time_limit import WatchdogPolicy, remaining, watchdog_policy
from accelerate_tts.settings import Settings

X = torch.ones(1, 8)
WAIT = 60.0  # seconds after which a test gives up
LIMIT = 0.3  # seconds of a warm-up call


@pytest.fixture(autouse=True)
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_TTS_WARMUP_TIMEOUT", str(LIMIT))
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    with watchdog_policy(WatchdogPolicy(again=0.05)):
        yield


def never() -> None:
    while True:
        time.sleep(0.01)


class Backend:
    """Its upstream call never returns, until `hangs` is cleared."""

    def __init__(self) -> None:
        self.hangs = True

    @optimized_model(warmup="Hello.")
    def load(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 8).eval()

    @optimized_model(warmup="Hello.")
    async def load_async(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 8).eval()


class Plain(Backend):
    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        y: torch.Tensor = self.model(X)
        if self.hangs:
            never()
        return y


class Streaming(Backend):
    @inference
    def synthesize(self, text: str) -> Iterator[torch.Tensor]:
        yield self.model(X)
        while self.hangs:
            time.sleep(0.001)
            yield self.model(X)


class Awaiting(Backend):
    @inference
    async def synthesize(self, text: str) -> torch.Tensor:
        if self.hangs:
            await asyncio.Event().wait()  # on which nobody will ever call set()
        y: torch.Tensor = self.model(X)
        return y


class Polling(Backend):
    @inference
    async def synthesize(self, text: str) -> AsyncIterator[torch.Tensor]:
        yield self.model(X)
        while self.hangs:
            await asyncio.sleep(0.005)


def check(backend: Any, seen: list[Event]) -> None:
    failed = [event for event in seen if isinstance(event, WarmupFailed)]
    assert len(failed) == 1
    assert "TimeLimitError: " in failed[0].reason
    receipt = receipt_of(backend)
    assert receipt is not None
    assert not receipt.kept
    assert "the warm-up failed: TimeLimitError" in receipt.notes[0]
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    backend.hangs = False
    torch.manual_seed(0)
    expected = nn.Linear(8, 8)(X)
    found = backend.synthesize("Hello.")
    if hasattr(found, "__aiter__"):
        found = asyncio.run(found.__anext__())
    elif hasattr(found, "__await__"):
        found = asyncio.run(found)
    elif isinstance(found, Iterator):
        found = next(found)
    assert torch.equal(found, expected)
    assert "forward" not in vars(backend.model)
    assert not backend.model._forward_hooks
    assert backend.model._compiled_call_impl is None


KINDS = [Plain, Streaming, Awaiting, Polling]


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_main_thread(kind: Any, seen: list[Event]) -> None:
    assert threading.current_thread() is threading.main_thread()
    backend = kind()
    backend.load()
    check(backend, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_worker_thread(kind: Any, seen: list[Event]) -> None:
    backend = kind()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(backend.load).result(WAIT)
    check(backend, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_in_an_asynchronous_load(kind: Any, seen: list[Event]) -> None:
    backend = kind()
    asyncio.run(asyncio.wait_for(backend.load_async(), WAIT))
    check(backend, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_plain_load_inside_a_running_loop(kind: Any, seen: list[Event]) -> None:
    backend = kind()

    async def main() -> None:
        backend.load()

    asyncio.run(main())
    check(backend, seen)


def test_a_warm_up_in_time_is_tuned_as_ever(seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_WARMUP_TIMEOUT", "60")
    backend = Plain()
    backend.hangs = False
    backend.load()
    assert not [event for event in seen if isinstance(event, WarmupFailed)]
    receipt = receipt_of(backend)
    assert receipt is not None
    assert not any("failed" in note for note in receipt.notes)


def test_warmup_model_says_false(seen: list[Event]) -> None:
    model = nn.Linear(8, 8).eval()
    assert get_performance_optimizer().warmup_model(model, lambda _: never()) is False
    assert [type(event) for event in seen if event.degraded] == [WarmupFailed]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("turned", [lambda: None, lambda: torch.set_grad_enabled(False)])
def test_the_gradient_mode_is_as_before(turned: Callable[[], object]) -> None:
    def leaves_it_off(_: Any) -> None:
        torch.set_grad_enabled(not before)
        never()

    turned()
    before = torch.is_grad_enabled()
    try:
        get_performance_optimizer().warmup_model(nn.Linear(8, 8), leaves_it_off)
        assert torch.is_grad_enabled() is before
    finally:
        torch.set_grad_enabled(True)


def test_without_a_limit_nothing_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().warmup_timeout == 600.0
    monkeypatch.setenv("ACCELERATE_TTS_WARMUP_TIMEOUT", "none")
    left: list[Any] = []
    assert get_performance_optimizer().warmup_model(nn.Linear(8, 8), lambda _: left.append(remaining()))
    assert left == [None]
