"""Faults in a load, its warm-up or a call: a working model or the user's own exception, and no leak."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import linecache
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from accelerate_tts import (
    Event,
    PerformanceOptimizer,
    get_performance_optimizer,
    inference,
    optimized_model,
    receipt_of,
)
from accelerate_tts.events import FellBack, WarmupFailed, emit
from accelerate_tts.runtime.guard.guard import guard_of
from accelerate_tts.stages.layers.weight_norm import FoldStage, has_folds
from accelerate_tts.tuning.fallbacks import fallbacks
from accelerate_tts.tuning.load_request import LoadRequest
from accelerate_tts.tuning.warmup import Loaded
from doubles import ALONE, is_faster, run_alone

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
    assert not has_folds(backend.model)
    assert backend.model.state_dict().keys() == untouched.state_dict().keys()
    assert not backend.model.conv._buffers
    assert torch.equal(backend.speak(X), untouched(X))
    receipt = receipt_of(backend)
    assert receipt is not None
    assert not receipt.kept
    # It may be tried again, and then it is tuned like any other.
    request = LoadRequest(lambda: backend.speak(X), loaded=Loaded(None, backend))
    get_performance_optimizer().optimize(request)
    assert len([event for event in seen if isinstance(event, WarmupFailed)]) == 1
    again = receipt_of(backend)
    assert again is not None
    assert again.before is not None


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


# --- Ctrl-C at every line of the end of a load ---------------------------------------------------------------------


WALKED = {"lifecycle.py", "tuning_lock.py", "registry.py", "guard.py", "findings.py"}


class Interrupting:
    """Raises KeyboardInterrupt at the n-th line of the files that end a load, once there is something to lose."""

    def __init__(self, when: int) -> None:
        self.when, self.lines = when, 0
        self.where = ""
        self._last: dict[int, int] = {}

    def __call__(self, frame: Any, event: str, _argument: object) -> Any:
        path = frame.f_code.co_filename
        if "accelerate_tts" not in path or path.rsplit("/", 1)[-1] not in WALKED:
            return None
        if event == "line" and not self._leaves_a_with(frame):
            self.lines += 1
            if self.lines == self.when:
                self.where = f"{path}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def _leaves_a_with(self, frame: Any) -> bool:
        """Check for the end of a `with` block: `__exit__` comes next, and no signal is taken in between.

        A tracer is called there all the same. What it raises is outside of the block, and nothing is ever released.
        """
        before = self._last.get(id(frame), 0)
        self._last[id(frame)] = frame.f_lineno
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        return before > frame.f_lineno and line.startswith("with ")


def interrupted(when: int) -> tuple[Backend, Interrupting]:
    backend, tracer = Backend(None, 0), Interrupting(when)
    sys.settrace(tracer)
    try:
        backend.load()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return backend, tracer


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """One stage that is always kept, and no collection of garbage."""
    from accelerate_tts.device import memory
    from accelerate_tts.stages import catalogue

    monkeypatch.setattr(catalogue, "default_stages", lambda *_args: [FoldStage()])
    monkeypatch.setattr(memory, "cleanup", lambda *_args, **_kwargs: None, raising=False)
    decide(compare=is_faster)


@pytest.mark.slow
def test_ctrl_c_at_the_end_of_a_load() -> None:
    """Run in a process of its own: after other tests a lock was once held at the end, for no known reason."""
    run_alone(__file__, "test_ctrl_c_at_any_line_of_the_end_of_a_load_leaves_all_of_it_or_nothing")


@pytest.mark.skipif(ALONE not in os.environ, reason="it is run in a process of its own, by the test before it")
@pytest.mark.usefixtures("quick")
def test_ctrl_c_at_any_line_of_the_end_of_a_load_leaves_all_of_it_or_nothing() -> None:
    whole, tracer = interrupted(0)
    receipt = receipt_of(whole)
    assert receipt is not None
    assert receipt.kept, "nothing is tuned, so nothing can be lost"
    expected = Scarce(None, 0)(X)
    optimizer = get_performance_optimizer()
    assert tracer.lines > 100, "the files that end a load have other names"
    for when in range(1, tracer.lines + 1):  # each is a load of its own
        backend, at = interrupted(when)
        if not hasattr(backend, "model"):
            continue  # before it was loaded at all
        tuned = has_folds(backend.model)
        receipt = receipt_of(backend)
        assert (receipt is not None and bool(receipt.kept)) == tuned, at.where
        guard = guard_of(backend)
        assert (guard is not None and guard.in_force) == tuned, at.where
        torch.testing.assert_close(backend.speak(X), expected)
        assert optimizer.undo(backend) == tuned, at.where
        assert not has_folds(backend.model), at.where
        assert torch.equal(backend.speak(X), expected), at.where
    done: list[Any] = []  # nobody has kept the turn
    thread = threading.Thread(target=lambda: done.append(optimized_model(warmup=X)(lambda: Scarce(None, 0))()))
    thread.start()
    thread.join(60)
    assert done


@pytest.mark.usefixtures("quick")
def test_ctrl_c_in_the_tidying_that_ends_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def tidy(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PerformanceOptimizer, "cleanup_memory", tidy)
    backend = Backend(None, 0)
    with pytest.raises(KeyboardInterrupt):
        backend.load()
    receipt = receipt_of(backend)
    assert receipt is not None
    assert receipt.kept
    assert guard_of(backend) is not None
    assert get_performance_optimizer().undo(backend)
    assert torch.equal(backend.speak(X), Scarce(None, 0)(X))


@pytest.mark.usefixtures("quick")
def test_a_hook_may_undo_what_an_undo_reloads() -> None:
    """The hook's undo used to wait for the lock of the undo around it."""
    backend = Backend(None, 0)
    backend.load()
    optimizer, undone = get_performance_optimizer(), []
    tuning = optimizer.tuning_of(backend)
    assert tuning is not None

    class Reloading:
        def keep(self) -> None:
            if not undone:
                undone.append(1)
                undone.append(optimizer.undo(backend))

        def at_hand(self) -> None:
            return None

    object.__setattr__(tuning, "offloader", Reloading())
    thread = threading.Thread(target=lambda: undone.append(optimizer.undo(backend)), daemon=True)
    thread.start()
    thread.join(20)
    assert undone == [1, True, True]
    assert receipt_of(backend) is None
    assert torch.equal(backend.speak(X), Scarce(None, 0)(X))


def test_fallbacks_of_another_thread_are_not_this_tunings() -> None:
    with fallbacks() as noted, fallbacks() as inner:
        thread = threading.Thread(target=lambda: emit(FellBack("another object", "everything", "elsewhere")))
        thread.start()
        thread.join(20)
        assert noted == inner == []
        emit(FellBack("this one", "a stage", "here"))
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(emit, FellBack("this one", "a stage", "in its thread")))
        thread.start()
        thread.join(20)
    assert [event.reason for event in noted] == [event.reason for event in inner] == ["here", "in its thread"]
    emit(FellBack("this one", "a stage", "later"))
    assert len(noted) == 2
