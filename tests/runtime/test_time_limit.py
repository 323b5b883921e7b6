"""Time limits: endless work in Python is interrupted in any thread, and nothing ever arrives after the work is done."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from accelerate_tts.errors import AccelerateTTSError, TimeLimitError
from accelerate_tts.events import Event, NotApplied, add_hook
from accelerate_tts.runtime import time_limit as watchdog
from accelerate_tts.runtime.time_limit import (
    WatchdogPolicy,
    known_limits,
    remaining,
    shield,
    time_limit,
    watchdog_policy,
    within,
)

WAIT = 30.0  # seconds after which a test gives up
SHORT = 0.02  # seconds of a limit that is to pass


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    with watchdog_policy(WatchdogPolicy(again=0.02)):
        yield


def endless() -> None:
    while True:
        time.sleep(0.01)


def spinning() -> None:
    while True:
        pass


def swallowing() -> None:
    while True:
        with suppress(Exception):
            time.sleep(0.001)
            raise ValueError


def deaf_at_first() -> None:
    left = 3
    while True:
        try:
            time.sleep(0.001)
        except BaseException:
            left -= 1
            if not left:
                raise


def in_a_generator() -> None:
    def pieces() -> Iterator[int]:
        while True:
            time.sleep(0.001)
            yield 1

    for _ in pieces():
        pass


WORKS: list[Callable[[], None]] = [endless, spinning, swallowing, deaf_at_first, in_a_generator]


def in_main(work: Callable[[], Any]) -> Any:
    assert threading.current_thread() is threading.main_thread()
    return work()


def in_worker(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(WAIT)


@pytest.mark.parametrize("place", [in_main, in_worker])
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_endless_work_is_interrupted(place: Any, work: Callable[[], None]) -> None:
    with pytest.raises(TimeLimitError, match=r"^the work did not return within 0.02 s and was interrupted$"):
        place(lambda: within(SHORT, "the work", work))

    def scoped() -> None:
        with time_limit(SHORT, "the work"):
            work()

    with pytest.raises(TimeLimitError, match="the work"):
        place(scoped)


def test_what_returns_or_raises_in_time_is_passed_on() -> None:
    assert within(WAIT, "x", lambda: 5) == 5
    assert within(None, "x", lambda: 6) == 6
    for error in (ValueError("own"), KeyboardInterrupt(), TimeLimitError("of the user")):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            within(WAIT, "x", fail)
        assert caught.value is error


def test_a_limit_that_has_passed_already() -> None:
    for seconds in (0, -1.0):
        with pytest.raises(TimeLimitError):
            within(seconds, "x", endless)


def test_the_clean_up_of_the_work_runs_and_is_not_interrupted_again() -> None:
    steps: list[str] = []

    def work() -> None:
        try:
            endless()
        finally:
            for _ in range(10):  # longer than it takes until the next one would come
                time.sleep(0.01)
            steps.append("cleaned up")

    with pytest.raises(TimeLimitError):
        within(SHORT, "x", work)
    assert steps == ["cleaned up"]


def test_limits_nest_and_each_speaks_for_itself() -> None:
    def inner_first() -> str:
        with pytest.raises(TimeLimitError, match="inner"):
            within(SHORT, "inner", endless)
        return "outer goes on"

    assert within(WAIT, "outer", inner_first) == "outer goes on"
    with pytest.raises(TimeLimitError, match="outer"):
        within(SHORT, "outer", lambda: within(WAIT, "inner", endless))
    assert remaining() is None


def test_what_remains() -> None:
    assert remaining() is None
    with time_limit(1000.0, "outer"):
        assert 900 < (remaining() or 0) <= 1000
        with time_limit(2000.0, "inner"):
            assert 900 < (remaining() or 0) <= 1000
        with time_limit(100.0, "inner"):
            assert 90 < (remaining() or 0) <= 100
        assert in_worker(remaining) is None
        assert 900 < (remaining() or 0) <= 1000
    assert remaining() is None


def checked(rounds: int, seconds: Callable[[int], float]) -> tuple[int, int]:
    """Limits that pass about when the work ends; anything that arrives late would leave this function."""
    done = interrupted = 0
    for number in range(rounds):
        end = time.perf_counter() + 0.0005

        def work(end: float = end) -> int:
            while time.perf_counter() < end:
                pass
            return 1

        try:
            done += within(seconds(number), "x", work)
        except TimeLimitError:
            interrupted += 1
        for _ in range(20):  # where a late one would be delivered
            abs(-1)
    return done, interrupted


def test_nothing_arrives_after_the_work_has_returned() -> None:
    found = [checked(400, lambda number: 0.0003 + (number % 40) * 1e-5)]
    with ThreadPoolExecutor(3) as pool:
        found += pool.map(lambda _: checked(200, lambda number: 0.0003 + (number % 40) * 2e-5), range(3))
    assert sum(done + interrupted for done, interrupted in found) == 1000
    assert all(sum(counts) > 0 for counts in zip(*found, strict=True)), "both ends of the race are run"
    end = time.monotonic() + 0.1
    while time.monotonic() < end:  # nor later
        time.sleep(0.001)


def test_one_that_comes_while_the_limit_ends_leaves_nothing_behind() -> None:
    limit, ready, go = time_limit(WAIT, "x"), threading.Event(), threading.Event()

    def work() -> tuple[str, float | None, int]:
        said = "in time"
        try:
            with limit:
                ready.set()
                go.wait()
        except watchdog.Interruption:
            said = "interrupted"
            limit.close()  # as `within` does
        return said, remaining(), sum(range(10_000))

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work)
        assert ready.wait(WAIT)
        limit.raising = True  # the watchdog has found it open, and is about to raise
        go.set()
        while not limit.over:
            time.sleep(0.001)
        limit.fired = limit.due = True
        watchdog.raise_in(limit.thread, limit.kind)
        limit.raising = False
        said, left, total = job.result(WAIT)
    assert said in {"in time", "interrupted"}, "dropped, or told; it comes no later"
    assert (left, total, limit.due) == (None, 49_995_000, False)
    with pytest.raises(TimeLimitError):  # later limits need the same lock
        within(SHORT, "x", endless)


def test_shielded_work_is_left_alone_until_it_ends() -> None:
    ended: list[float] = []

    @shield
    def critical() -> None:
        for _ in range(10):
            time.sleep(0.01)
        ended.append(1)

    def work() -> None:
        critical()
        endless()

    with pytest.raises(TimeLimitError):
        within(SHORT, "x", work)
    assert ended == [1]


def test_work_in_native_code_is_told_of_and_interrupted_when_it_returns(seen: list[Event]) -> None:
    is_told = threading.Lock()
    is_told.acquire()
    remove = add_hook(lambda _event: is_told.release())
    try:  # a lock is waited for in native code
        with watchdog_policy(WatchdogPolicy(again=0.02, unresponsive=0.05)), pytest.raises(TimeLimitError):
            within(SHORT, "the warm-up", lambda: is_told.acquire(timeout=WAIT))
    finally:
        remove()
    told = [event for event in seen if isinstance(event, NotApplied)]
    assert [event.what for event in told] == ["the time limit of the warm-up"]
    assert "native code" in told[0].reason


def test_a_limit_keeps_nothing_alive_and_many_are_not_remembered() -> None:
    class Big:
        pass

    big = Big()
    seen = weakref.ref(big)
    within(WAIT, "x", lambda kept=big: None)  # type: ignore[misc]
    del big
    assert seen() is None
    for _ in range(2000):
        within(WAIT, "x", int)
    assert known_limits() <= 512


def test_limits_pass_by_the_clock_of_the_policy() -> None:
    """One that stands still lets none pass, and one that goes ahead all at once."""
    with watchdog_policy(WatchdogPolicy(clock=lambda: 5.0)):
        assert within(SHORT, "x", lambda: time.sleep(4 * SHORT) or 7) == 7  # type: ignore[func-returns-value]
        with time_limit(100.0, "x"):
            assert remaining() == 100.0

    def work() -> None:
        with watchdog_policy(WatchdogPolicy(clock=lambda: time.monotonic() + 2 * WAIT)):
            endless()

    with pytest.raises(TimeLimitError):
        within(WAIT, "x", work)


def test_the_error_is_of_this_library_and_no_os_error() -> None:
    assert issubclass(TimeLimitError, AccelerateTTSError)
    assert not issubclass(TimeLimitError, OSError)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_has_a_watchdog_of_its_own() -> None:
    within(WAIT, "x", int)
    child = os.fork()
    if child == 0:
        try:
            within(SHORT, "x", endless)
        except TimeLimitError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


TRACED = """
import sys, time
from accelerate_tts.runtime.time_limit import within
from accelerate_tts.errors import TimeLimitError

def endless():
    while True:
        time.sleep(0.001)

try:
    within(0.05, "the work", endless)
except TimeLimitError:
    print("interrupted")

def traced():
    return sum(range(10))

sys.settrace(lambda *_: None)
print(traced(), [traced() for _ in range(3)])
"""


def test_a_debugger_can_be_used_after_an_interruption() -> None:
    """CPython 3.11 does not begin a traced function while it looks for an exception that was taken back."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["interrupted", "45 [45, 45, 45]"]
