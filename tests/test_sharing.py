"""State shared by threads, loads, owners and forked children: each finds its own, and none waits for ever."""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from accelerate_tts import (
    Event,
    fast_inference,
    get_performance_optimizer,
    inference,
    optimized_model,
    receipt_of,
)
from accelerate_tts import locks as lock_module
from accelerate_tts.events import NotApplied
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.runtime.guard.checks import AudioStats, Units
from accelerate_tts.stages.layers.weight_norm import has_folds
from accelerate_tts.tuning.tuning_lock import TuningLock
from doubles import is_faster

WAIT = 20.0
MEL = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _folds_are_faster(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(compare=is_faster)


class Conv(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = weight_norm(nn.Conv1d(16, 16, 5, padding=2))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(mel))


def is_folded(model: Any) -> bool:
    return has_folds(model.conv)


# --- two tunings of one owner -----------------------------------------------------------------------------------


class Backend:
    """A model and a vocoder, loaded one after the other."""

    @optimized_model(warmup=(MEL,))
    def load_model(self) -> nn.Module:
        self.model = Conv(0).eval()
        return self.model

    @optimized_model(warmup=(MEL,))
    def load_vocoder(self) -> nn.Module:
        self.vocoder = Conv(1).eval()
        return self.vocoder

    @inference
    def speak(self) -> torch.Tensor:
        return self.vocoder(self.model(MEL))  # type: ignore[no-any-return]


def both() -> tuple[Backend, Callable[[], list[bool]]]:
    backend = Backend()
    backend.load_model()
    backend.load_vocoder()
    return backend, lambda: [is_folded(backend.model), is_folded(backend.vocoder)]


def test_an_owner_of_two_tunings_is_undone_as_a_whole() -> None:
    backend, folded = both()
    assert folded() == [True, True]
    optimizer = get_performance_optimizer()
    with optimizer.untouched(backend) as in_force:
        assert in_force
        assert folded() == [False, False]
    assert folded() == [True, True]
    assert optimizer.undo(backend)
    assert folded() == [False, False]
    assert receipt_of(backend) is None
    assert not optimizer.undo(backend)


def test_one_of_two_tunings_is_undone_by_its_module_and_the_other_stays_known() -> None:
    backend, folded = both()
    optimizer = get_performance_optimizer()
    assert receipt_of(backend) is receipt_of(backend.vocoder)
    assert optimizer.undo(backend.vocoder)
    assert folded() == [True, False]
    assert receipt_of(backend) is receipt_of(backend.model) is not None
    assert optimizer.undo((backend.model, backend.vocoder))
    assert folded() == [False, False]


@pytest.mark.parametrize("part", [False, True])
def test_a_model_that_another_load_has_tuned_in_another_precision_is_told_of(part: bool, seen: list[Event]) -> None:
    model = Conv(0).eval()
    first = optimized_model(warmup=MEL, precision="balanced")(lambda: model)()
    whole = nn.Sequential(first).eval() if part else first
    for _ in range(2):
        seen.clear()
        optimized_model(warmup=MEL, precision="exact")(lambda: whole)()
        told = [event for event in seen if isinstance(event, NotApplied)]
        assert [event.what for event in told] == [f"precision='exact' of {type(whole).__name__}"]
        assert "tuned Conv in precision='balanced'" in told[0].reason
    get_performance_optimizer().undo(whole)
    get_performance_optimizer().undo(model)
    seen.clear()
    optimized_model(warmup=MEL, precision="exact")(lambda: whole)()
    assert not [event for event in seen if isinstance(event, NotApplied)]


def test_an_owner_may_load_its_model_and_its_vocoder_in_two_precisions(seen: list[Event]) -> None:
    class Two:
        @optimized_model(warmup=lambda self: self.model(MEL), precision="balanced")
        def load_model(self) -> None:
            self.model = Conv(0).eval()

        @optimized_model(warmup=lambda self: self.vocoder(MEL), precision="exact")
        def load_vocoder(self) -> None:
            self.vocoder = Conv(1).eval()

    backend = Two()
    backend.load_model()
    backend.load_vocoder()
    assert is_folded(backend.model)
    assert is_folded(backend.vocoder)
    assert not [event for event in seen if isinstance(event, NotApplied)]


def test_a_model_that_was_replaced_is_forgotten() -> None:
    backend = Backend()
    backend.load_model()
    first = weakref.ref(backend.model)
    backend.load_model()
    assert first() is None, "the owner's list of tunings keeps the old model"
    assert receipt_of(backend) is receipt_of(backend.model)


# --- one tuning at a time ---------------------------------------------------------------------------------------------


def test_a_nested_load_leaves_the_outer_one_as_it_was() -> None:
    tuning_lock, loop = TuningLock(), asyncio.new_event_loop()

    async def loads() -> bool:
        with tuning_lock.held(None) as mine:
            return mine

    with ThreadPoolExecutor(1) as pool:
        with tuning_lock.held(loop) as mine:
            assert mine
            with tuning_lock.held(None) as inner:  # the same thread: a warm-up loads something itself
                assert inner
            here = contextvars.copy_context()
            assert not pool.submit(loop.run_until_complete, loads()).result(WAIT), "a coroutine of the loop waits"
            assert not pool.submit(here.run, asyncio.run, loads()).result(WAIT), "a thread of the warm-up waits"
        after = contextvars.copy_context()
        assert pool.submit(after.run, loop.run_until_complete, loads()).result(WAIT)
    loop.close()


# --- one scope for several threads -------------------------------------------------------------------------------


def test_one_scope_object_in_many_threads() -> None:
    scope, barrier = fast_inference(), threading.Barrier(8)
    wrong: list[str] = []

    def work(number: int) -> None:
        barrier.wait(WAIT)
        for _ in range(50):
            with scope:
                if not torch.is_inference_mode_enabled():
                    wrong.append(f"{number}: off inside")
                if number % 2:
                    with scope:
                        pass
            if torch.is_inference_mode_enabled():
                wrong.append(f"{number}: on outside")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not wrong, wrong[:3]
    assert {} in vars(scope).values(), "it remembers threads that have left"


def test_scopes_of_one_object_that_overlap_in_two_threads() -> None:
    scope = fast_inference()
    entered, left = threading.Event(), threading.Event()
    seen: list[bool] = []

    def other() -> None:
        with torch.inference_mode():  # what its own scope goes back to
            with scope:
                entered.set()
                assert left.wait(WAIT)
                seen.append(torch.is_inference_mode_enabled())
            seen.append(torch.is_inference_mode_enabled())

    thread = threading.Thread(target=other)
    with scope:
        thread.start()
        assert entered.wait(WAIT)
    assert not torch.is_inference_mode_enabled(), "it left the other thread's scope, not its own"
    left.set()
    thread.join(WAIT)
    assert seen == [True, True]


# --- what a warm-up learns from ----------------------------------------------------------------------------------


def test_calls_of_another_instance_are_no_part_of_the_warm_up() -> None:
    seen: list[Any] = []

    def other() -> None:
        seen.append(guards.watchers_of(object(), (), {}))

    with guards.listening() as listener:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(WAIT)
        own = guards.watchers_of(object(), (), {})
        assert own == (listener,)
        listener.judge("speak", Units(), AudioStats(audio=True, samples=9, swing=1.0, peak=1.0), whole=True)
    assert seen == [()]
    assert list(listener.expected) == ["speak"]
    assert guards.watchers_of(object(), (), {}) == ()


# --- forked children ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_finds_every_lock_open(capfd: pytest.CaptureFixture[str]) -> None:
    """Forked while another thread holds all of them, as a server forks workers while a request is answered."""
    backend, _ = both()
    held, done = threading.Event(), threading.Event()
    every = lock_module.all_locks()
    assert len(every) > 10

    def hold() -> None:
        for each in every:
            each.acquire()
        held.set()
        done.wait(WAIT)
        for each in every:
            each.release()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(WAIT)
    child = os.fork()
    if child == 0:
        try:
            threading.Timer(WAIT, os._exit, (3,)).start()
            free = [each.acquire(timeout=1) for each in every]
            for each in every:
                each.release()
            with fast_inference():
                pass
            get_performance_optimizer().undo(backend)
            os._exit(0 if all(free) else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set()
    thread.join(WAIT)
    assert status == 0, capfd.readouterr().err
