"""The mode is on in every step of a body and off for every caller, whatever the order of steps."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import types
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threaded import until_later

from accelerate_tts import carry_mode, fast_inference, inference
from accelerate_tts.runtime import inference_mode
from accelerate_tts.runtime.guard import guard as guards

on = torch.is_inference_mode_enabled


class _Contented:
    """A watcher that finds no fault."""

    def judge(self, name: str, units: Any, stats: Any, *, whole: bool) -> None: ...


@pytest.fixture(autouse=True, params=["bare", "guarded"])
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this holds for guarded calls, too."""
    if request.param == "guarded":
        monkeypatch.setattr(guards, "watchers_of", lambda *_call: (_Contented(),))


def assert_off() -> None:
    assert not on()
    assert torch.is_grad_enabled()


def test_sync_body_is_on_and_caller_is_off() -> None:
    assert inference_mode.call(on, (), {}, "inference") is True
    assert_off()
    with pytest.raises(ZeroDivisionError):
        inference_mode.call(lambda: 1 / 0, (), {}, "inference")
    assert_off()


@pytest.mark.parametrize(
    ("mode", "expected"), [("inference", (True, False)), ("no_grad", (False, False)), ("none", (False, True))]
)
def test_each_mode(mode: Any, expected: tuple[bool, bool]) -> None:
    assert inference_mode.call(lambda: (on(), torch.is_grad_enabled()), (), {}, mode) == expected


async def test_coroutine_is_on_across_awaits_and_the_loop_is_off() -> None:
    seen: list[bool] = []

    @inference
    async def speak() -> str:
        for _ in range(3):
            seen.append(on())
            await asyncio.sleep(0)
        seen.append(on())
        return "done"

    task = asyncio.create_task(speak())
    while not task.done():
        assert_off()
        await asyncio.sleep(0)
    assert task.result() == "done"
    assert seen == [True] * 4
    assert_off()


async def test_interleaved_tasks_do_not_see_each_other() -> None:
    async def plain() -> list[bool]:
        found = []
        for _ in range(20):
            found.append(on())
            await asyncio.sleep(0)
        return found

    decorated = [inference(plain)() for _ in range(4)]
    results = await asyncio.gather(*decorated, plain(), *[inference(mode="no_grad")(plain)()])
    assert [set(r) for r in results] == [{True}] * 4 + [{False}] * 2
    assert_off()


async def test_cancellation_runs_the_bodys_cleanup_on_and_leaves_off() -> None:
    cleaned: list[bool] = []

    @inference
    async def speak() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(on())
            await asyncio.sleep(0)
            cleaned.append(on())

    task = asyncio.create_task(speak())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [True, True]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(speak(), 0.01)
    assert_off()


async def test_a_task_cancelled_before_its_first_step_warns_of_nothing() -> None:
    @inference
    async def speak() -> None:
        raise AssertionError("never begins")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = asyncio.create_task(speak())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gc.collect()


def test_a_coroutine_that_is_never_awaited_is_named_like_its_function() -> None:
    @inference
    async def forgotten() -> None: ...

    with pytest.warns(RuntimeWarning, match="forgotten.* was never awaited") as caught:
        forgotten()
        gc.collect()
    assert len(caught) == 1


def test_generator_is_on_inside_and_off_outside() -> None:
    @inference
    def stream(count: int) -> Iterator[bool]:
        got = []
        try:
            for _ in range(count):
                got.append((yield on()))
        finally:
            assert on()
        return got

    generator = stream(3)
    assert inspect.isgenerator(generator)
    values = []
    for value in generator:
        assert_off()
        values.append(value)
    assert values == [True] * 3

    sender = stream(2)
    next(sender)
    sender.send("a")
    with pytest.raises(StopIteration) as stop:
        sender.send("b")
    assert stop.value.value == ["a", "b"]

    for value in stream(5):
        assert value
        break
    assert_off()


def test_generator_throw_and_close_reach_the_body() -> None:
    log: list[str] = []

    @inference
    def stream() -> Iterator[int]:
        while True:
            try:
                yield 1
            except ValueError as error:
                assert on()
                log.append(str(error))
            except GeneratorExit:
                assert on()
                log.append("closed")
                raise

    generator = stream()
    next(generator)
    assert generator.throw(ValueError("v")) == 1
    generator.close()
    assert log == ["v", "closed"]
    with pytest.raises(StopIteration):
        next(generator)
    assert_off()


def test_generator_from_another_thread_and_collected_elsewhere() -> None:
    closed_in: list[tuple[bool, str]] = []

    @inference
    def stream() -> Iterator[bool]:
        try:
            for _ in range(100):
                yield on()
        finally:
            closed_in.append((on(), threading.current_thread().name))

    generator = stream()
    assert next(generator)
    holder = [generator]
    del generator

    def drop() -> None:
        assert next(holder[0])
        assert not on()
        holder.clear()
        gc.collect()
        assert not on()

    thread = threading.Thread(target=drop, name="other")
    thread.start()
    thread.join()
    assert closed_in == [(True, "other")]
    assert_off()


async def test_async_generator_kinds_of_ending() -> None:
    log: list[str] = []

    @inference
    async def stream() -> AsyncIterator[int]:
        try:
            for number in range(3):
                assert on()
                await asyncio.sleep(0)
                assert on()
                yield number
        finally:
            assert on()
            await asyncio.sleep(0)
            assert on()
            log.append("cleaned")

    assert inspect.isasyncgen(stream())
    found = []
    async for number in stream():
        assert_off()
        found.append(number)
    assert found == [0, 1, 2]

    generator = stream()
    await generator.__anext__()
    await generator.aclose()
    assert log == ["cleaned"] * 2

    async for _ in stream():
        break
    gc.collect()
    await until_later(lambda: len(log) > 2)  # the loop's hook closes the abandoned one, in some steps
    assert log == ["cleaned"] * 3

    generator = stream()
    await generator.__anext__()
    with pytest.raises(ValueError, match="thrown"):
        await generator.athrow(ValueError("thrown"))
    assert log == ["cleaned"] * 4
    assert_off()


def test_an_abandoned_async_generator_is_closed_in_the_mode_at_the_loops_end() -> None:
    log: list[bool] = []
    kept: list[object] = []
    problems: list[object] = []

    @inference
    async def stream() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            log.append(on())

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
        generator = stream()
        kept.append(generator)
        async for _ in generator:
            break

    asyncio.run(main())
    assert log == [True]
    assert not problems


async def test_async_generator_asend_and_cancelled_consumer() -> None:
    got: list[Any] = []

    @inference
    async def echo() -> AsyncIterator[bool]:
        while True:
            got.append((yield on()))
            await asyncio.sleep(0)

    generator = echo()
    assert await generator.asend(None)
    assert await generator.asend("x")
    assert got == ["x"]
    await generator.aclose()

    async def consume() -> None:
        async for _ in echo():
            await asyncio.sleep(60)

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_off()


def test_what_decides_is_the_returned_object() -> None:
    async def body() -> bool:
        await asyncio.sleep(0)
        return on()

    def disguised() -> Any:  # as torch.no_grad() leaves an `async def`
        return body()

    assert not inspect.iscoroutinefunction(disguised)
    assert asyncio.run(inference(disguised)()) is True

    @types.coroutine
    def old_style() -> Any:
        yield
        return on()

    async def use() -> bool:
        return bool(await inference(old_style)())

    assert asyncio.run(use()) is True

    class Custom:
        """A coroutine by protocol, as compiled extensions have them."""

        __slots__ = ("_inner",)

        def __init__(self) -> None:
            self._inner = body()

        def send(self, value: Any) -> Any:
            return self._inner.send(value)

        def throw(self, *error: Any) -> Any:
            return self._inner.throw(*error)

        def close(self) -> None:
            self._inner.close()

        def __await__(self) -> Any:
            return self._inner.__await__()

    assert asyncio.run(inference(lambda: Custom())()) is True


def test_an_object_that_is_more_than_a_generator_is_returned_as_it_is() -> None:
    class Speech(Generator[int, None, None]):
        def __init__(self) -> None:
            self.rate, self.left = 24_000, [1, 2]

        def send(self, value: None) -> int:
            if not self.left:
                raise StopIteration
            return self.left.pop()

        def throw(self, error: Any, *_: Any) -> Any:
            raise error

        def cancel(self) -> None:
            self.left.clear()

        async def __aiter__(self) -> AsyncIterator[int]:
            for piece in self:
                yield piece

    made = Speech()

    async def use() -> list[int]:
        return [piece async for piece in inference(lambda: made)()]

    found = inference(lambda: made)()
    assert found is made
    assert asyncio.run(use()) == [2, 1]


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
@pytest.mark.parametrize("kind", ["coroutine", "generator", "async generator"])
def test_a_body_that_is_suspended_in_a_mode_of_its_own_finds_it_again(kind: str, mode: Any) -> None:
    modes: list[tuple[bool, bool]] = []

    def note() -> None:
        modes.append((on(), torch.is_grad_enabled()))

    def gradient() -> torch.Tensor:
        weight = torch.ones(2, requires_grad=True)
        (weight * weight).sum().backward()
        return weight.grad  # type: ignore[return-value]

    @inference(mode=mode)
    async def coroutine() -> list[torch.Tensor]:
        with torch.inference_mode(mode=False), torch.enable_grad():
            await asyncio.sleep(0)
            found = [gradient()]
            await asyncio.sleep(0)
            found.append(gradient())
        note()
        await asyncio.sleep(0)
        note()
        return found

    @inference(mode=mode)
    def generator() -> Iterator[torch.Tensor]:
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield gradient()
            yield gradient()
        note()
        yield torch.ones(1)
        note()

    @inference(mode=mode)
    async def async_generator() -> AsyncIterator[torch.Tensor]:
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield gradient()
            await asyncio.sleep(0)
            yield gradient()
        note()
        yield torch.ones(1)
        note()

    async def use() -> list[torch.Tensor]:
        found = []
        async for piece in async_generator():
            assert_off()
            found.append(piece)
        return found

    if kind == "coroutine":
        found = asyncio.run(coroutine())
    elif kind == "generator":
        found = []
        for piece in generator():
            assert_off()
            found.append(piece)
    else:
        found = asyncio.run(use())
    assert [piece.tolist() for piece in found[:2]] == [[2.0, 2.0]] * 2
    assert modes == [(mode == "inference", False)] * 2
    assert_off()


def test_threads_inherit_nothing_unless_the_mode_is_carried() -> None:
    with ThreadPoolExecutor(1) as pool:
        with fast_inference():
            assert pool.submit(on).result() is False
            assert pool.submit(carry_mode(on)).result() is True
        with torch.no_grad():
            assert pool.submit(carry_mode(torch.is_grad_enabled)).result() is False
        assert carry_mode(on) is on
        assert pool.submit(on).result() is False


def test_an_exception_keeps_no_tensor_alive() -> None:
    """A stored error's traceback would hold every local of the frames it passed."""
    import weakref

    @inference
    def stream() -> Iterator[None]:
        while True:
            try:
                yield
            except ValueError:
                continue

    generator = stream()
    next(generator)

    def throw() -> weakref.ref[torch.Tensor]:
        big = torch.zeros(10)
        try:
            raise ValueError
        except ValueError as error:
            generator.throw(error)
        return weakref.ref(big)

    reference = throw()
    gc.collect()
    assert reference() is None


STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["next", "send", "throw", "close"])), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_any_interleaving_of_generators_behaves_as_undecorated(steps: list[tuple[int, str]]) -> None:
    """Four generators, stepped in any order: same answers as plain ones, on inside, off outside."""

    def make(wrap: Callable[[Any], Any], inside: list[bool]) -> list[Any]:
        def body(number: int) -> Iterator[Any]:
            got: Any = number
            try:
                for _ in range(4):
                    inside.append(on())
                    try:
                        got = yield (number, got)
                    except KeyError as error:
                        got = error.args[0]
            finally:
                inside.append(on())
            return got

        return [wrap(body)(number) for number in range(4)]

    def step(generator: Any, action: str) -> Any:
        try:
            if action == "next":
                return next(generator)
            if action == "send":
                return generator.send("sent") if inspect.getgeneratorstate(generator) != inspect.GEN_CREATED else None
            if action == "throw":
                return generator.throw(KeyError("thrown"))
            return generator.close()
        except (StopIteration, KeyError) as error:
            return type(error), error.args

    plain, decorated = [], []
    inside: list[bool] = []
    reference = make(lambda f: f, [])
    wrapped = make(inference, inside)
    for number, action in steps:
        plain.append(step(reference[number], action))
        decorated.append(step(wrapped[number], action))
        assert not on()
    for generator in wrapped:
        generator.close()
    assert decorated == plain
    assert all(inside)
    assert not on()
