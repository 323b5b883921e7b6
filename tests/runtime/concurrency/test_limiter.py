"""`@inference(concurrency=N)`: at most N calls of one object at once, in any mixture of kinds, threads and loops."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import inspect
import os
import pickle
import random
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import pytest
import torch
import wrapt
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts import ConcurrencyError, Event, SettingsError, inference, optimized_model
from accelerate_tts.errors import shown
from accelerate_tts.events import NotApplied
from accelerate_tts.runtime.concurrency import queue

WAIT = 30.0  # seconds after which a test gives up on something that should have happened


class Meter:
    """Count concurrent calls and their maximum, in any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.total = 0

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.now -= 1


def backend(limit: int | None) -> Any:
    """A backend with a method of each kind; `pause` is called in the middle of each."""

    class Backend:
        def __init__(self) -> None:
            self.meter = Meter()
            self.order: list[Any] = []
            self.pause: Callable[[], object] = lambda: None

        @inference(concurrency=limit)
        def speak(self, word: Any) -> Any:
            with self.meter:
                self.order.append(word)
                self.pause()
                return word

        @inference(concurrency=limit)
        async def speak_async(self, word: Any, steps: int = 1) -> Any:
            with self.meter:
                self.order.append(word)
                for _ in range(steps):
                    await asyncio.sleep(0)
                return word

        @inference(concurrency=limit)
        def stream(self, word: Any, steps: int = 3) -> Iterator[Any]:
            with self.meter:
                for _ in range(steps):
                    self.order.append(word)
                    self.pause()
                    yield word

        @inference(concurrency=limit)
        async def stream_async(self, word: Any, steps: int = 3) -> AsyncIterator[Any]:
            with self.meter:
                for _ in range(steps):
                    self.order.append(word)
                    await asyncio.sleep(0)
                    yield word

        @inference(concurrency=limit)
        def both(self, word: Any) -> list[Any]:
            return [self.speak(word), *self.stream(word)]

        @inference(concurrency=limit)
        async def both_async(self, word: Any) -> list[Any]:
            pieces = [piece async for piece in self.stream_async(word)]
            parts = await asyncio.gather(self.speak_async(word), self.speak_async(word))
            return [*pieces, *parts, await asyncio.to_thread(self.speak, word), *self.stream(word)]

    return Backend()


def free(item: Any) -> bool:
    """Check that no permit is held and no call waits."""
    return queue.queue_of(item, item).is_idle


def until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(WAIT / 0.002)):
        if condition():
            return
        done.wait(0.002)
    raise AssertionError("it never happened")


def waiting(item: Any) -> int:
    return queue.queue_of(item, item).waiting


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_as_many_threads_as_allowed_and_no_more(limit: int) -> None:
    one = backend(limit)
    meeting = threading.Barrier(limit)
    one.pause = lambda: meeting.wait(WAIT)  # so many do run at once
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one.speak, range(60))) == list(range(60))
    assert (one.meter.most, one.meter.total) == (limit, 60)
    assert free(one)


def test_no_limit_is_the_default() -> None:
    one = backend(None)
    meeting = threading.Barrier(8)
    one.pause = lambda: meeting.wait(WAIT)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one.speak, range(8))) == list(range(8))
    assert one.meter.most == 8


def test_two_objects_do_not_wait_for_each_other() -> None:
    one, two = backend(1), backend(1)
    meeting = threading.Barrier(2)
    one.pause = two.pause = lambda: meeting.wait(WAIT)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda item: item.speak("x"), [one, two])) == ["x", "x"]


def test_the_smaller_limit_of_those_that_run_counts() -> None:
    class Two:
        entered = threading.Semaphore(0)
        go_on = threading.Event()

        @inference(concurrency=1)
        def alone(self) -> str:
            self.entered.release()
            assert self.go_on.wait(WAIT)
            return "alone"

        @inference(concurrency=4)
        def many(self) -> str:
            self.entered.release()
            assert self.go_on.wait(WAIT)
            return "many"

    two = Two()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(two.alone)
        assert two.entered.acquire(timeout=WAIT)
        others = [pool.submit(two.many) for _ in range(3)]
        until(lambda: waiting(two) == 3)
        two.go_on.set()
        assert [job.result(WAIT) for job in (first, *others)] == ["alone", "many", "many", "many"]


def test_first_come_first_served_threads_and_tasks_alike() -> None:
    one = backend(1)
    stream = one.stream("stream", 1)
    next(stream)  # in this thread: whoever comes now waits
    with ThreadPoolExecutor(12) as pool:
        jobs = []
        for number in range(12):
            work = (lambda word: asyncio.run(one.speak_async(word))) if number % 2 else one.speak
            jobs.append(pool.submit(work, number))
            until(lambda number=number: waiting(one) == number + 1)  # type: ignore[misc]
        stream.close()
        assert [job.result(WAIT) for job in jobs] == list(range(12))
    assert one.order == ["stream", *range(12)]
    assert one.meter.most == 1


@pytest.mark.parametrize("bad", [0, -1, True, False, 1.0, "2", float("nan"), 2**31, 10**5000, [1]], ids=shown)
def test_a_limit_that_means_nothing_fails_at_decoration(bad: Any) -> None:
    with pytest.raises(SettingsError, match="whole number of at least 1") as caught:
        inference(concurrency=bad)
    assert str(caught.value).startswith(f"concurrency={shown(bad)} ")


def test_the_signature_and_the_kind_stay() -> None:
    one = backend(1)
    assert inspect.iscoroutinefunction(type(one).speak_async)
    assert str(inspect.signature(one.stream)) == "(word: 'Any', steps: 'int' = 3) -> 'Iterator[Any]'"
    assert inspect.isgenerator(stream := one.stream("x"))
    assert stream.__name__ == "stream"
    assert inspect.isasyncgen(one.stream_async("x"))


@inference(concurrency=1)
def pickled(word: str) -> str:
    return word


def test_copies_and_pickles_have_turns_of_their_own() -> None:
    assert pickle.loads(pickle.dumps(pickled))("x") == "x"
    module = torch.nn.Linear(2, 2)
    module.forward = inference(concurrency=1)(module.forward)  # type: ignore[method-assign]
    twin = copy.deepcopy(module)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(lambda item: item(torch.ones(2)), [module, twin]))) == 2
    assert queue.queue_of(module, None) is not queue.queue_of(twin, None)


def test_a_room_lives_as_long_as_its_object() -> None:
    one = backend(1)
    one.speak("x")
    count = len(queue.known_queues)
    del one
    gc.collect()
    assert len(queue.known_queues) < count


def test_objects_that_take_no_weak_reference_take_turns_together() -> None:
    meter = Meter()

    class Slotted:
        __slots__ = ()

        @inference(concurrency=1)
        def speak(self) -> None:
            with meter:
                threading.Event().wait(0.001)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Slotted().speak(), range(20)))
    assert (meter.most, meter.total) == (1, 20)


# --- a call's own calls -------------------------------------------------------------------------------------------


def test_what_a_call_calls_shares_its_turn() -> None:
    one = backend(1)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one.both, range(40))) == [[number] * 4 for number in range(40)]
    assert one.meter.most == 1
    assert one.order == [word for word in one.order[::4] for _ in range(4)]
    assert free(one)


async def test_what_a_coroutine_awaits_gathers_and_sends_to_threads_shares_its_turn() -> None:
    one = backend(1)
    found = await asyncio.wait_for(asyncio.gather(*(one.both_async(number) for number in range(20))), WAIT)
    assert found == [[number] * 9 for number in range(20)]
    assert one.order == [number for number in range(20) for _ in range(9)]
    assert free(one)


def test_a_stream_begun_in_a_call_and_returned_by_it_keeps_the_turn() -> None:
    class Outer:
        def __init__(self) -> None:
            self.inner = backend(None)

        @inference(concurrency=1)
        def begin(self) -> Iterator[str]:
            stream = self.stream()
            next(stream)
            return stream

        @inference(concurrency=1)
        def stream(self) -> Iterator[str]:
            yield from "abc"

        @inference(concurrency=1)
        def speak(self) -> str:
            return "spoken"

    outer = Outer()
    stream = outer.begin()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(outer.speak)
        until(lambda: waiting(outer) == 1)
        assert list(stream) == ["b", "c"]
        assert job.result(WAIT) == "spoken"
    assert free(outer)


async def test_a_task_that_outlives_the_call_that_began_it_takes_turns_again() -> None:
    one, tasks = backend(1), []

    class Leaving:
        @inference(concurrency=1)
        async def leave(self) -> None:
            async def later() -> None:
                await go_on.wait()
                await self.work()

            tasks.append(asyncio.create_task(later()))

        @inference(concurrency=1)
        async def work(self) -> None:
            with one.meter:
                await asyncio.sleep(0)

    go_on, leaving = asyncio.Event(), Leaving()
    for _ in range(5):
        await leaving.leave()
    go_on.set()
    await asyncio.wait_for(asyncio.gather(*tasks), WAIT)
    assert (one.meter.most, one.meter.total) == (1, 5)


async def test_a_load_inside_a_call_warms_up_through_the_same_method() -> None:
    """A lazy load: its warm-up calls the method that called it, on a loop and a thread of its own."""

    class Lazy:
        model: Any = None

        @optimized_model(warmup="Hello.", tune_seconds=0.0)
        def load(self) -> None:
            self.model = torch.nn.Linear(4, 4).eval()

        @inference(concurrency=1)
        async def synthesize(self, text: str) -> torch.Tensor:
            if self.model is None:
                self.load()
            await asyncio.sleep(0)
            found: torch.Tensor = self.model(torch.ones(1, 4))
            return found

    lazy = Lazy()
    assert (await asyncio.wait_for(lazy.synthesize("Hello."), WAIT)).shape == (1, 4)
    assert free(lazy)


# --- streams ------------------------------------------------------------------------------------------------------


def test_chunks_of_two_streams_never_mix() -> None:
    one = backend(1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda word: list(one.stream(word, 5)), range(50)))
    assert found == [[word] * 5 for word in range(50)]
    assert one.order == [word for word in one.order[::5] for _ in range(5)]


async def test_chunks_of_two_async_streams_never_mix() -> None:
    one = backend(1)

    async def consume(word: int) -> list[int]:
        found = []
        async for piece in one.stream_async(word, 5):
            found.append(piece)
            await asyncio.sleep(0)
        return found

    found = await asyncio.wait_for(asyncio.gather(*(consume(word) for word in range(50))), WAIT)
    assert found == [[word] * 5 for word in range(50)]
    assert one.order == [word for word in range(50) for _ in range(5)]


@pytest.mark.parametrize("how", ["end", "close", "collect", "raise", "throw", "never begun"])
def test_a_stream_gives_its_turn_back_however_it_ends(how: str) -> None:
    one = backend(1)
    stream: Any = one.stream("x", 2)
    if how != "never begun":
        assert next(stream) == "x"
        assert not free(one)
    if how == "end":
        list(stream)
    elif how == "close":
        stream.close()
    elif how == "raise":
        one.pause = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            next(stream)
        one.pause = lambda: None
    elif how == "throw":
        with pytest.raises(KeyError):
            stream.throw(KeyError("x"))
    elif how == "collect":
        cycle = [stream]
        cycle.append(cycle)
        del cycle
    del stream
    gc.collect()
    assert free(one)
    assert one.speak("next") == "next"


@pytest.mark.parametrize("how", ["end", "close", "collect", "break", "loop ends"])
def test_an_async_stream_gives_its_turn_back_however_it_ends(how: str) -> None:
    one = backend(1)

    async def main() -> None:
        stream: Any = one.stream_async("x", 2)
        async for _ in stream:
            if how != "end":
                break
        if how == "close":
            await stream.aclose()
        if how == "loop ends":
            kept.append(stream)
            return
        del stream
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await asyncio.wait_for(one.speak_async("next"), WAIT) == "next"

    kept: list[Any] = []
    asyncio.run(main())
    assert free(one)


def test_streams_go_from_thread_to_thread_and_are_collected_in_others() -> None:
    one = backend(2)
    for round_ in range(40):
        stream = one.stream(round_, 4)
        with ThreadPoolExecutor(1) as first:
            assert first.submit(next, stream).result(WAIT) == round_
        with ThreadPoolExecutor(1) as second:
            assert second.submit(next, stream).result(WAIT) == round_
            holder = [stream]
            del stream
            if round_ % 2:
                second.submit(holder.clear).result(WAIT)
            else:
                holder[0].close()
    holder.clear()
    gc.collect()
    assert free(one)


# --- waits that would never end -----------------------------------------------------------------------------------


def hasty(item: Any) -> Any:
    """The object, for whose permits a thread waits a moment only, if it would wait for ever."""
    queue.queue_of(item, item).wait_limit = 0.02
    return item


def test_a_call_in_the_loop_over_a_stream_is_refused_and_not_hung() -> None:
    one = hasty(backend(1))
    for _ in one.stream("x", 1):
        for again in (lambda: one.speak("y"), lambda: next(one.stream("y"))):
            with pytest.raises(ConcurrencyError, match=r"^.*speak|stream would wait for ever: concurrency=1,.* Close"):
                again()
    assert one.speak("after") == "after"
    assert free(one)


def test_two_streams_of_two_are_fine_and_a_third_is_refused() -> None:
    one = hasty(backend(2))
    assert list(zip(one.stream("a"), one.stream("b"), strict=True)) == [("a", "b")] * 3
    first, second = one.stream("a"), one.stream("b")
    next(first)
    next(second)
    with pytest.raises(ConcurrencyError):
        next(one.stream("c"))
    first.close()
    assert one.speak("d") == "d"
    second.close()


async def test_a_task_that_calls_within_its_own_async_stream_is_refused() -> None:
    one = backend(1)
    async for _ in one.stream_async("x", 1):
        with pytest.raises(ConcurrencyError, match="wait for ever"):
            await one.speak_async("y")
    assert await one.speak_async("after") == "after"


async def test_a_plain_call_that_would_block_the_loop_of_the_turn_is_refused() -> None:
    one = backend(1)
    stream = one.stream_async("x", 1)

    async def consume() -> None:
        await stream.__anext__()

    await asyncio.create_task(consume())
    with pytest.raises(ConcurrencyError, match="to_thread"):
        one.speak("y")
    job = asyncio.create_task(asyncio.to_thread(one.speak, "y"))
    queued = asyncio.create_task(one.speak_async("z"))
    while waiting(one) < 2:
        await asyncio.sleep(0)
    with pytest.raises(ConcurrencyError, match="to_thread"):
        one.speak("w")
    await stream.aclose()
    assert [await job, await queued] == ["y", "z"]


def test_a_thread_that_gave_its_stream_away_in_a_context_of_its_own_may_wait() -> None:
    """Take each item in a thread of a pool, in a copy of the context, as web frameworks do."""
    one = hasty(backend(1))
    stream = one.stream("x", 2)
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:
        pool.submit(contextvars.copy_context().run, next, stream).result(WAIT)
        job = pool.submit(contextvars.copy_context().run, one.speak, "y")
        until(lambda: waiting(one) == 1)
        assert other.submit(list, stream).result(WAIT) == ["x"]
        assert job.result(WAIT) == "y"


def test_a_thread_waits_on_while_others_take_the_stream_and_only_then() -> None:
    """Its own last item is no reason to give up, as long as the next one is being computed elsewhere."""
    one = backend(1)
    stream, computing, go_on = one.stream("x", 2), threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:
        pool.submit(next, stream).result(WAIT)
        one.pause = lambda: (computing.set(), go_on.wait(WAIT))
        rest = other.submit(list, stream)
        assert computing.wait(WAIT)
        hasty(one)
        job = pool.submit(one.speak, "y")
        until(lambda: waiting(one) == 1)
        threading.Event().wait(0.1)  # several times the wait limit
        go_on.set()
        assert rest.result(WAIT) == ["x"]
        assert job.result(WAIT) == "y"
        stream = one.stream("z", 2)
        pool.submit(next, stream).result(WAIT)
        with pytest.raises(ConcurrencyError, match="wait for ever"):
            pool.submit(one.speak, "w").result(WAIT)
        stream.close()
    assert free(one)


@pytest.mark.parametrize("loops", [1, 2])
async def test_a_thread_of_a_pool_that_took_an_item_may_wait_for_the_rest(loops: int) -> None:
    """`run_in_executor(pool, next, stream)`: the thread, in its one context, does other work before the next item."""
    one = backend(1)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:
        stream = one.stream("x", 2)
        for _ in range(loops):
            assert await loop.run_in_executor(pool, next, stream) == "x"
        job = loop.run_in_executor(pool, one.speak, "y")
        while not waiting(one):
            await asyncio.sleep(0.001)
        assert len(await loop.run_in_executor(other, list, stream)) == 2 - loops
        assert await asyncio.wait_for(job, WAIT) == "y"
    assert free(one)


def test_a_stream_that_a_generator_hands_on_is_known_as_well() -> None:
    one = hasty(backend(1))

    def handed_on() -> Iterator[str]:
        yield from one.stream("x", 1)

    for _ in handed_on():
        with pytest.raises(ConcurrencyError):
            one.speak("y")
    assert free(one)


def test_a_coroutine_driven_by_hand_is_refused_where_it_had_to_wait() -> None:
    one = backend(1)
    stream = one.stream("x")
    next(stream)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConcurrencyError, match="asyncio event loop only"):
        pool.submit(one.speak_async("y").send, None).result(WAIT)
    stream.close()
    coroutine = one.speak_async("z", 0)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert free(one)


async def test_a_hidden_coroutine_function_waits_without_blocking() -> None:
    def hidden(function: Any) -> Any:
        @wraps(function)
        def plain(*args: Any) -> Any:
            return function(*args)

        return plain

    meter = Meter()

    @inference(concurrency=1)
    @hidden
    async def speak(word: int) -> int:
        with meter:
            await asyncio.sleep(0)
            return word

    assert await asyncio.wait_for(asyncio.gather(*map(speak, range(10))), WAIT) == list(range(10))
    assert meter.most == 1


def collected(function: Any) -> Any:
    @wraps(function)
    def plain(*args: Any) -> Any:
        return list(function(*args))

    return plain


@wrapt.decorator
def collected_by_wrapt(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    return list(wrapped(*args, **kwargs))


def run_on_a_loop(function: Any) -> Any:
    @wraps(function)
    def plain(*args: Any) -> Any:
        return asyncio.run(function(*args))

    return plain


def test_a_call_that_blocks_the_loop_of_a_stream_in_threads_is_refused_and_not_hung() -> None:
    def pieces(word: int) -> Iterator[int]:
        yield word
        yield word

    @inference(concurrency=1)
    def speak(word: int) -> Iterator[int]:
        return pieces(word)

    async def serve() -> None:
        stream = speak(1)
        assert await asyncio.to_thread(next, stream) == 1
        with pytest.raises(ConcurrencyError, match="on an event loop"):
            speak(2)
        assert await asyncio.to_thread(next, stream) == 1
        await asyncio.to_thread(stream.close)
        assert await asyncio.to_thread(list, speak(2)) == [2, 2]
        ended.set()

    ended = threading.Event()
    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert ended.wait(WAIT)


@pytest.mark.parametrize("wrapper", [collected, collected_by_wrapt, run_on_a_loop])
def test_a_wrapper_that_runs_a_generator_or_a_coroutine_is_limited(wrapper: Any) -> None:
    class Backend:
        def __init__(self) -> None:
            self.meter = Meter()

        def pieces(self, word: int) -> Iterator[int]:
            with self.meter:
                for _ in range(3):
                    threading.Event().wait(0.002)
                    yield word

        async def later(self, word: int) -> list[int]:
            return list(self.pieces(word))

        speak = inference(concurrency=1)(wrapper(later if wrapper is run_on_a_loop else pieces))

    one = Backend()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one.speak, range(8))) == [[word] * 3 for word in range(8)]
    assert one.meter.most == 1
    assert free(one)


def test_a_generator_around_a_plain_function_does_not_wait_when_it_is_made() -> None:
    def in_pieces(function: Any) -> Any:
        @wraps(function)
        def stream(*args: Any) -> Iterator[Any]:
            yield from function(*args)

        return stream

    @inference(concurrency=1)
    @in_pieces
    def speak(word: int) -> list[int]:
        return [word] * 2

    first = speak(1)
    assert next(first) == 1
    second = speak(2)
    first.close()
    assert list(second) == [2, 2]


def test_a_returned_object_with_methods_of_its_own_is_told(seen: list[Event]) -> None:
    class Speech(Generator[int, None, None]):
        def send(self, value: None) -> int:
            raise StopIteration

        def throw(self, error: Any, *_: Any) -> Any:
            raise error

        def cancel(self) -> None: ...

    @inference(concurrency=1)
    def speak() -> Speech:
        return Speech()

    class Unbound:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("outside of a request")

    @inference(concurrency=1)
    def unbound() -> Unbound:
        return Unbound()

    assert type(unbound()) is Unbound
    for _ in range(3):
        assert isinstance(speak(), Speech)
    (event,) = [event for event in seen if isinstance(event, NotApplied)]
    assert "concurrency=1 of" in event.what
    assert "write `yield from`" in event.reason


async def test_tasks_that_outlive_the_calls_that_began_them_keep_no_record_of_them() -> None:
    ended = asyncio.Event()
    known: list[int] = []

    @inference(concurrency=1)
    async def speak(number: int) -> None:
        known.append(len(queue.INSIDE.get()))
        if number:
            tasks.append(asyncio.create_task(after(number - 1)))
        else:
            ended.set()

    async def after(number: int) -> None:
        await tasks[-2]
        await speak(number)

    tasks: list[Any] = [asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(speak(10))]
    await asyncio.wait_for(ended.wait(), WAIT)
    await asyncio.gather(*tasks)
    assert max(known) <= 2


# --- cancellation, loops, stress ----------------------------------------------------------------------------------


async def test_cancelled_in_the_queue_and_with_the_turn() -> None:
    one = backend(1)
    holder = asyncio.create_task(one.speak_async("first", 10**9))
    await asyncio.sleep(0)
    queued = [asyncio.create_task(one.speak_async(number)) for number in range(30)]
    await asyncio.sleep(0)
    for number in range(0, 30, 2):
        queued[number].cancel()
    await asyncio.sleep(0)
    holder.cancel()
    found = await asyncio.wait_for(asyncio.gather(holder, *queued, return_exceptions=True), WAIT)
    assert [item for item in found if not isinstance(item, asyncio.CancelledError)] == list(range(1, 30, 2))
    assert one.order == ["first", *range(1, 30, 2)]
    assert free(one)


async def test_cancelled_at_the_very_moment_when_its_turn_has_come() -> None:
    one = backend(1)
    for _ in range(50):
        stream = one.stream("x")
        next(stream)
        task, after = asyncio.create_task(one.speak_async("y")), asyncio.create_task(one.speak_async("z"))
        await asyncio.sleep(0)
        stream.close()  # the turn is the task's now, and it has not woken yet
        task.cancel()
        assert await asyncio.wait_for(after, WAIT) == "z"
        assert task.cancelled() or task.done()
        assert free(one)


async def test_a_call_that_is_cancelled_in_the_queue_is_not_said_to_be_never_awaited() -> None:
    """Also if it is collected with its exception, in a cycle."""
    one, rings = Holding(), list[Any]()
    first = asyncio.create_task(one.hold())
    await asyncio.sleep(0)

    async def wait() -> None:
        try:
            await one.speak_async()
        except asyncio.CancelledError as error:
            rings.append([error])
            rings[0].append(rings[0])

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert waiting(one) == 1
    task.cancel()
    await task
    del task
    rings.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert caught == []
    first.cancel()
    await asyncio.wait({first})


def test_a_loop_that_was_closed_with_calls_in_the_queue_is_passed_over() -> None:
    one = backend(1)
    stream = one.stream("x")
    next(stream)
    loop = asyncio.new_event_loop()
    tasks: list[Any] = []

    def abandon() -> None:
        tasks.append(loop.create_task(one.speak_async("lost")))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(abandon).result(WAIT)
        assert waiting(one) == 1
        job = pool.submit(one.speak, "y")
        until(lambda: waiting(one) == 2)
        stream.close()
        assert job.result(WAIT) == "y"
    tasks[0].get_coro().close()
    tasks[0]._log_destroy_pending = False
    tasks.clear()
    gc.collect()
    assert free(one)


class Holding:
    """A backend whose calls may hold their permit for an hour."""

    @inference(concurrency=1)
    async def hold(self) -> None:
        await asyncio.sleep(3600)

    @inference(concurrency=1)
    def speak(self) -> str:
        return "y"

    @inference(concurrency=1)
    async def speak_async(self) -> str:
        return "y"


@pytest.mark.parametrize("way", ["waiting thread", "waiting task", "later"])
def test_a_permit_whose_holder_s_loop_was_closed_is_granted_again(way: str) -> None:
    """Its task never goes on, and the others waited for ever."""
    one, loop = Holding(), asyncio.new_event_loop()
    queue.queue_of(one, None).wait_limit = 0.01
    task: Any = loop.create_task(one.hold())
    loop.run_until_complete(asyncio.sleep(0.01))
    assert not free(one)
    speak = one.speak if way == "waiting thread" else lambda: asyncio.run(asyncio.wait_for(one.speak_async(), WAIT))
    with ThreadPoolExecutor(1) as pool:
        if way == "later":
            loop.close()
        job = pool.submit(speak)
        if way != "later":
            until(lambda: waiting(one) == 1)
            loop.close()
        try:
            assert job.result(WAIT) == "y"
        finally:
            task.get_coro().close()  # ends a thread that waits
    task._log_destroy_pending = False
    assert free(one)


def test_a_pending_task_that_is_collected_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coroutines are closed in any order, and nothing can be thrown into one that was closed already."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    loop = asyncio.new_event_loop()
    task: Any = loop.create_task(Holding().hold())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    task._log_destroy_pending = False
    del task, loop
    gc.collect()
    assert said == []


@settings(max_examples=20, deadline=None)
@given(
    limit=st.integers(1, 3),
    calls=st.lists(
        st.tuples(st.sampled_from(["speak", "stream", "both"]), st.integers(0, 4), st.integers(0, 12)),
        min_size=1,
        max_size=12,
    ),
)
def test_any_tasks_cancelled_at_any_step(limit: int, calls: list[tuple[str, int, int]]) -> None:
    one = backend(limit)

    async def consume(word: int, steps: int) -> None:
        async for _ in one.stream_async(word, steps):
            await asyncio.sleep(0)

    async def main() -> None:
        tasks = []
        for number, (kind, steps, _) in enumerate(calls):
            work = {"speak": one.speak_async, "stream": consume}.get(kind)
            tasks.append(asyncio.create_task(one.both_async(number) if work is None else work(number, steps)))
        for tick in range(12):
            for task, (_, _, fate) in zip(tasks, calls, strict=True):
                if fate == tick:
                    task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT)
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.wait_for(one.speak_async("after"), WAIT)

    asyncio.run(main())
    # `both` gathers two of its own at once, in one turn.
    assert one.meter.most <= limit * 2 if any(kind == "both" for kind, *_ in calls) else one.meter.most <= limit
    until(lambda: free(one))


def test_threads_and_several_loops_at_once_with_cancellations() -> None:
    one, errors = backend(1), []

    async def some(seed: int) -> None:
        choose = random.Random(seed)
        for number in range(40):
            word = (seed, number)
            kind = choose.choice(["speak", "stream", "timeout", "break"])
            if kind == "speak":
                assert await one.speak_async(word, choose.randint(0, 3)) == word
            elif kind == "timeout":
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(one.speak_async(word, 10**6), choose.choice([0.0, 0.0005, 0.002]))
            else:
                stream = one.stream_async(word, 3)
                async for _ in stream:
                    if kind == "break":
                        break
                await stream.aclose()

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            if seed % 2:
                asyncio.run(some(seed))
                return
            for number in range(60):
                if choose.random() < 0.5:
                    assert one.speak((seed, number)) == (seed, number)
                else:
                    stream = one.stream((seed, number), 3)
                    next(stream)
                    if choose.random() < 0.5:
                        assert len(list(stream)) == 2
                    del stream  # collected in the middle
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors[:2]
    assert one.meter.most == 1
    assert one.meter.total > 300
    gc.collect()
    assert free(one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_while_another_thread_has_the_turn() -> None:
    one = backend(1)
    stream = one.stream("x")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, stream).result(WAIT)
        child = os.fork()
        if child == 0:
            os._exit(0 if one.speak("y") == "y" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stream.close()
