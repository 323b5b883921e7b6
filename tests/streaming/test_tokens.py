"""Tokens of loops that only return at their end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import Event, inference
from accelerate_tts.errors import ConcurrencyError
from accelerate_tts.events import Guarded
from accelerate_tts.runtime.guard.gate import BusyError
from accelerate_tts.runtime.guard.guard import Guard, protect
from accelerate_tts.runtime.inference_mode import in_inference_mode
from accelerate_tts.streaming import Pulled, Reporting, Stream, Tapped, twin
from accelerate_tts.streaming.tokens import Left


class Loop:
    """A loop of upstream's kind, which counts what it computes."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.count, self.fails, self.made, self.ended = count, fails, 0, threading.Event()

    def __call__(self, emit: Callable[[int], None]) -> str:
        try:
            for number in range(self.count):
                self.made += 1
                with suppress(Exception):  # what upstream may do
                    emit(number)
            if self.fails:
                raise ValueError("of the loop")
            return "result"
        finally:
            self.ended.set()

    def generator(self) -> Iterator[int]:
        for number in range(self.count):
            self.made += 1
            yield number


def tapped(loop: Loop, **options: Any) -> Tapped[int]:
    return Tapped(loop, threading.Event(), **{"ahead": False, **options})


@given(count=st.integers(0, 20), asked=st.lists(st.integers(0, 7), max_size=8), ahead=st.booleans())
@settings(max_examples=40, deadline=None)
def test_tokens_come_in_order_and_none_is_made_unasked(count: int, asked: list[int], ahead: bool) -> None:
    loop = Loop(count)
    tokens = tapped(loop, ahead=ahead)
    found: list[int] = []
    for number in asked:
        new = tokens.take(number)
        found += new
        assert len(new) == min(number, count - len(found) + len(new))
        assert ahead or loop.made == len(found)
    assert found == list(range(len(found)))
    assert not tokens.ended or (len(found) == count and tokens.result == "result")
    rest = tokens.take(100)
    assert found + rest == list(range(count))
    assert tokens.ended
    tokens.close()


def test_a_generator_needs_no_thread() -> None:
    loop = Loop(5)
    tokens = Pulled(loop.generator(), threading.Event())
    assert tokens.take(2) == [0, 1]
    assert loop.made == 2
    assert not tokens.ended
    assert tokens.take(9) == [2, 3, 4]
    assert tokens.ended


@pytest.mark.parametrize("way", ["close", "flag", "collected"])
def test_a_loop_that_is_left_makes_no_more_token(way: str) -> None:
    loop, left = Loop(1000), threading.Event()
    tokens = Tapped(loop, left, ahead=False)
    assert tokens.take(3) == [0, 1, 2]
    if way == "close":
        tokens.close()
        assert loop.ended.is_set()
    elif way == "flag":
        left.set()
        with pytest.raises(Left):
            tokens.take(1)
    else:
        del tokens
        gc.collect()
    assert loop.ended.wait(10)
    assert loop.made == 3


def test_a_loop_that_runs_ahead_stops_within_a_token() -> None:
    going, made = threading.Event(), [0]

    def endless(emit: Callable[[int], None]) -> None:
        for number in range(10**9):
            made[0] = number
            emit(number)
            going.set()

    tokens = Tapped(endless, threading.Event(), ahead=True)
    tokens.start()
    assert going.wait(10)
    tokens.close()
    before = made[0]
    time.sleep(0.01)
    assert made[0] == before


def test_a_collection_does_not_wait_for_a_token() -> None:
    """It may run on the thread that computes the token, in a pass for several callers, and both would wait."""
    going, go_on, threads = threading.Event(), threading.Event(), list[threading.Thread]()

    def work(emit: Callable[[int], None]) -> None:
        threads.append(threading.current_thread())
        emit(0)
        going.set()
        go_on.wait(20)
        emit(1)

    def stream() -> Iterator[list[int]]:
        with closing(Tapped(work, threading.Event(), ahead=True)) as tokens:
            yield tokens.take(1)
            yield tokens.take(1)

    speaking = stream()
    assert next(speaking) == [0]
    assert going.wait(10)
    ring: list[Any] = [speaking]
    ring.append(ring)
    del speaking, ring
    gc.collect()
    (thread,) = threads
    assert thread.is_alive()
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_that_ends_lets_a_loop_end_before() -> None:
    """Python would end its thread by an exception in the middle of torch, which aborts the process."""
    code = """
import atexit, sys, threading, time
atexit.register(print, "the end")  # after what is registered later
from accelerate_tts.streaming import Tapped

def endless(emit):
    try:
        while True:
            emit(0)
            time.sleep(0.5)  # a long token
    finally:
        print("ended", flush=True)

tokens = Tapped(endless, threading.Event(), ahead=True)
tokens.take(1)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "ended\nthe end\n"), done.stderr


def test_an_error_of_the_loop_comes_after_its_tokens() -> None:
    tokens = tapped(Loop(2, fails=True))
    assert tokens.take(2) == [0, 1]
    with pytest.raises(ValueError, match="of the loop"):
        tokens.take(1)
    assert tapped(Loop(2, fails=True), ahead=True).take(1) == [0]


def test_nothing_runs_before_it_is_asked_for() -> None:
    loop = Loop(3)
    tokens = tapped(loop)
    time.sleep(0.01)
    assert loop.made == 0
    tokens.close()
    assert loop.made == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_the_thread_has_the_callers_mode(ahead: bool) -> None:
    def work(emit: Callable[[bool], None]) -> None:
        emit(in_inference_mode())

    with torch.inference_mode():
        tokens = Tapped(work, threading.Event(), ahead=ahead)
    assert tokens.take(1) == [True]
    assert Tapped(work, threading.Event(), ahead=ahead).take(1) == [False]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_thread_has_the_callers_autocast_and_default_device(ahead: bool) -> None:
    def work(emit: Callable[[Any], None]) -> None:
        emit((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.empty(1).device.type))

    product = torch.ones(2, 2)

    def multiplied(emit: Callable[[Any], None]) -> None:
        emit((product @ product).dtype)

    with torch.autocast("cpu", dtype=torch.float16), torch.device("meta"):
        tokens = Tapped(work, threading.Event(), ahead=ahead)
        assert Tapped(multiplied, threading.Event(), ahead=ahead).take(1) == [torch.float16]
    assert tokens.take(1) == [(True, torch.float16, "meta")]
    assert Tapped(multiplied, threading.Event(), ahead=ahead).take(1) == [torch.float32]
    assert torch.utils._device.CURRENT_DEVICE is None


@pytest.mark.parametrize("ahead", [False, True])
def test_a_thread_that_cannot_begin_ends_its_stream(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that allows no more threads. The stream would wait for its first token for ever."""
    start, before = threading.Thread.start, torch.get_num_threads()

    def limited(thread: threading.Thread) -> None:
        if thread.name == "accelerate_tts-threads":
            raise RuntimeError("can't start new thread")
        start(thread)

    try:
        torch.set_num_threads(4)
        tokens = Tapped(Loop(3), threading.Event(), ahead=ahead)
        torch.set_num_threads(3)  # with which the thread begins
        monkeypatch.setattr(threading.Thread, "start", limited)
        errors = list[str]()

        def take() -> None:
            try:
                tokens.take(1)
            except RuntimeError as error:
                errors.append(str(error))

        taking = threading.Thread(target=take, name="taking", daemon=True)
        taking.start()
        taking.join(10)
        assert errors == ["can't start new thread"]
        tokens.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stream_that_was_begun_before_a_fork_is_an_error_in_the_child(ahead: bool) -> None:
    go_on = threading.Event()

    def work(emit: Callable[[int], None]) -> None:
        emit(0)
        assert go_on.wait(20)
        emit(1)

    tokens, later = Tapped(work, threading.Event(), ahead=ahead), tapped(Loop(1))
    assert tokens.take(1) == [0]
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends a child that waits
        status = 1
        try:
            tokens.take(1)
        except ConcurrencyError as error:
            tokens.close()
            status = 0 if "begin a stream in the child" in str(error) and later.take(1) == [0] else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    assert tokens.take(1) == [1]
    tokens.close()


class Tuning:
    """A switch that only remembers."""

    is_on = True

    def on(self) -> None:
        self.is_on = True

    def off(self) -> None:
        self.is_on = False

    def at_hand(self) -> object: ...
    def keep_loaded(self) -> None: ...


class Voice:
    """Says a number of tokens in pieces. One of them is faulty while the tuning is in force."""

    def __init__(self, most: int, *, ahead: bool = False, each: int = 1) -> None:
        self.tuning, self.ahead, self.each, self.most, self.made = Tuning(), ahead, each, most, 0
        self.at: Callable[[int], object] = lambda _number: None
        self.guard = Guard("Voice", self.tuning, {}, 3)
        protect(self, self.guard)

    @inference
    def speak(self) -> Stream:
        def body(left: threading.Event) -> Iterator[torch.Tensor]:
            def work(emit: Callable[[torch.Tensor], None]) -> None:
                for number in range(self.most):
                    self.made += 1
                    self.at(number)
                    fault = number == 2 and self.tuning.is_on
                    emit(torch.full((1, 100), float("nan") if fault else number / 100))

            with closing(Tapped(work, left, ahead=self.ahead)) as tokens:
                while taken := tokens.take(self.each):
                    yield torch.cat(taken, dim=-1)

        return Stream("Voice", body)


def test_a_stream_with_its_tokens_ahead_is_not_made_again(seen: list[Event]) -> None:
    """Nor is its consumer held up until the loop has ended."""
    voice, go_on = Voice(5, ahead=True), threading.Event()
    voice.at = lambda number: number < 3 or go_on.wait(20)
    speaking = voice.speak()
    pieces = [next(speaking) for _ in range(3)]
    assert pieces[2].isnan().all()
    go_on.set()
    assert len([*pieces, *speaking]) == voice.made == 5
    (event,) = [event for event in seen if isinstance(event, Guarded)]
    assert "returned as it is" in event.outcome
    assert "overlap=True" in event.outcome


@pytest.mark.parametrize("way", ["another thread", "cancelled"])
async def test_a_second_attempt_is_left_as_the_first(way: str, seen: list[Event]) -> None:
    voice = Voice(1000, each=10)
    speaking = voice.speak()
    if way == "another thread":
        voice.at = lambda number: speaking.close() if not voice.tuning.is_on and number == 4 else None
        pieces = await asyncio.to_thread(list, speaking)
    else:
        pieces, loop = list[torch.Tensor](), asyncio.get_running_loop()

        async def consume() -> None:
            async for piece in speaking:
                pieces.append(piece)

        task = asyncio.ensure_future(consume())

        def cancel(number: int) -> None:
            if not voice.tuning.is_on and number == 4:
                loop.call_soon_threadsafe(task.cancel)
                assert speaking.left.wait(10)

        voice.at = cancel
        with suppress(asyncio.CancelledError):
            await task
    assert pieces == []
    assert voice.made == 10 + 5
    assert [type(event) for event in seen if isinstance(event, Guarded)] == [Guarded]
    voice.guard.hold().release()  # nothing is inside


def test_a_twin_shares_weights_and_not_attributes() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    heard: list[torch.Tensor] = []
    other = twin(module, **{"1": Reporting(module[1], heard.append)})
    sample = torch.randn(1, 2)
    assert torch.equal(other(sample), module(sample))
    assert len(heard) == 1
    assert other[1].weight is module[1].weight
    other.note = 1
    other.more = nn.Linear(1, 1)
    assert not hasattr(module, "note")
    assert not hasattr(module, "more")
    other[1].train(mode=False)
    assert module[1].training


def test_a_twin_of_a_compiled_module_runs_its_own_parts() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    vars(module)["_compiled_call_impl"] = lambda *_: pytest.fail("the original's")
    heard: list[torch.Tensor] = []
    twin(module, **{"0": Reporting(module[0], heard.append)})(torch.randn(1, 2))
    assert len(heard) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_loop_that_runs_ahead_is_inside_the_model(ahead: bool) -> None:
    """The guard does not switch a model while a token is made beside the call that asks for it."""
    tuning, subject, go_on = Tuning(), Loop(0), threading.Event()
    guard = Guard("Voice", tuning, {}, 3, patience=0.05)
    protect(subject, guard)

    def work(emit: Callable[[int], None]) -> None:
        emit(1)
        assert go_on.wait(10)

    tokens = Tapped(work, threading.Event(), ahead=ahead)
    assert tokens.take(1) == [1]
    if ahead:
        with pytest.raises(BusyError):
            guard.hold()
        go_on.set()
        assert tokens.take(1) == []
    guard.hold().release()
    go_on.set()
    tokens.close()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_loops_thread_works_on_its_callers_device_and_stream(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a second device of its kind that is the current one."""
    told: list[tuple[str, object]] = []

    @contextmanager
    def entered(given: object) -> Iterator[None]:
        told.append((threading.current_thread().name, given))
        yield

    module = getattr(torch, device)
    monkeypatch.setattr(module, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "current_device", lambda: 1)
    monkeypatch.setattr(module, "current_stream", lambda given: f"stream of {given}")
    monkeypatch.setattr(module, "device", entered)
    monkeypatch.setattr(module, "stream", entered)
    assert tapped(Loop(3)).take(9) == [0, 1, 2]
    thread = "accelerate_tts-tokens"
    assert told == [(thread, torch.device(device, 1)), (thread, f"stream of {device}:1")]
