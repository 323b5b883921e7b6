"""Tokens of loops that only return at their end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts.runtime.guard.gate import BusyError
from accelerate_tts.runtime.guard.guard import Guard, protect
from accelerate_tts.runtime.inference_mode import in_inference_mode
from accelerate_tts.streaming import Pulled, Reporting, Tapped, twin
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

    class Tuning:
        def on(self) -> None: ...
        def off(self) -> None: ...
        def at_hand(self) -> object: ...
        def keep_loaded(self) -> None: ...

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
def test_a_loops_thread_works_on_its_callers_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a second device of its kind that is the current one."""
    told: list[tuple[str, torch.device]] = []
    module = getattr(torch, device)
    monkeypatch.setattr(module, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "current_device", lambda: 1)
    monkeypatch.setattr(module, "set_device", lambda given: told.append((threading.current_thread().name, given)))
    assert tapped(Loop(3)).take(9) == [0, 1, 2]
    assert told == [("accelerate_tts-tokens", torch.device(device, 1))]
