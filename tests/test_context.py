"""`with fast_inference():` holds mode and flags, restores both, and refuses where it would leak."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from accelerate_tts import (
    InferenceContextError,
    SettingsError,
    create_inference_context,
    fast_inference,
    get_performance_optimizer,
    set_active,
    testing,
)
from accelerate_tts.device import flags

on = torch.is_inference_mode_enabled


def test_on_inside_off_outside_also_after_an_error() -> None:
    with fast_inference():
        assert on()
        with fast_inference(mode="no_grad"):
            assert on()
    assert not on()
    with pytest.raises(KeyError), fast_inference():
        raise KeyError
    assert not on()
    with fast_inference(mode="no_grad"):
        assert not on()
        assert not torch.is_grad_enabled()


def test_one_scope_object_may_be_entered_again() -> None:
    scope = fast_inference()
    with scope, scope:
        assert on()
    with scope:
        assert on()
    assert not on()


async def test_refused_in_a_coroutines_own_body() -> None:
    with pytest.raises(InferenceContextError, match="@inference"), fast_inference():
        await asyncio.sleep(0)
    with pytest.raises(InferenceContextError), ExitStack() as stack:
        stack.enter_context(fast_inference())
    with pytest.raises(InferenceContextError, match="async with"):
        async with fast_inference():
            pass
    assert not on()


async def test_refused_in_an_async_generators_body() -> None:
    async def stream() -> AsyncIterator[int]:
        with fast_inference():
            yield 1

    with pytest.raises(InferenceContextError, match="stream"):
        await stream().__anext__()
    assert not on()


async def test_allowed_in_a_plain_function_under_a_running_loop() -> None:
    def work() -> bool:
        with fast_inference():
            return on()

    assert work()
    assert await asyncio.to_thread(work)
    assert not on()


def test_refused_in_a_generator_but_not_in_a_context_manager() -> None:
    def stream() -> Iterator[int]:
        with fast_inference():
            yield 1

    with pytest.raises(InferenceContextError, match="stream"):
        next(stream())

    @contextmanager
    def helper() -> Iterator[None]:
        with fast_inference():
            yield

    with helper():
        assert on()
    assert not on()

    async def use() -> None:
        with helper():
            await asyncio.sleep(0)

    with pytest.raises(InferenceContextError, match="use"):
        asyncio.run(use())
    assert not on()


def test_nothing_process_wide_is_left_behind() -> None:
    before = dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()
    with fast_inference():
        pass
    assert (dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_overlapping_scopes_of_two_threads_restore_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of a CUDA device are given (stand-in: there is none here); the flags themselves are real."""
    wanted = [(flags.MATMUL_PRECISION, "high"), (flags.CUDNN_BENCHMARK, True)]
    monkeypatch.setattr(get_performance_optimizer(), "call_flags", lambda: wanted)

    def state() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    before = state()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fast_inference():
            entered.set()
            leave.wait(30)

    with fast_inference():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(30)
        assert state() == ("high", True)
    assert state() == ("high", True)  # the other thread still holds them
    leave.set()
    thread.join()
    assert state() == before


def test_switched_off_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with testing(), fast_inference():
        assert not on()
    set_active(False)
    with fast_inference(), create_inference_context():
        assert not on()
    set_active(True)
    monkeypatch.setenv("ACCELERATE_TTS_DISABLE", "1")
    with fast_inference():
        assert not on()


def test_a_wrong_mode_is_named() -> None:
    with pytest.raises(SettingsError, match="'fast' is not one of inference, no_grad, none"):
        fast_inference(mode="fast")  # type: ignore[arg-type]
