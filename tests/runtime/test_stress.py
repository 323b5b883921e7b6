"""Thousands of calls at once, cut short in every way: no mode leaks, no flag stays, no answer changes.

Each test ends as it began: the modes of this thread, the flags of the process and the number of its threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from threaded import until_later

from accelerate_tts import carry_mode, fast_inference, get_performance_optimizer, inference
from accelerate_tts.device import flags
from accelerate_tts.runtime.guard import guard as guards

pytestmark = pytest.mark.slow

on = torch.is_inference_mode_enabled
MODES = {"inference": (True, False), "no_grad": (False, False), "plain": (False, True)}
"""Inference mode and gradient mode that a body must see, by kind."""


def now() -> tuple[bool, bool]:
    return on(), torch.is_grad_enabled()


def process_wide() -> tuple[Any, ...]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return (
        torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled(), environment,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    get_performance_optimizer().initialize()  # what it sets, it sets for good
    before, threads = process_wide(), threading.active_count()
    assert now() == MODES["plain"]
    yield
    assert now() == MODES["plain"]
    assert process_wide() == before
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # a pool's threads end a moment after it was left
    assert threading.active_count() <= threads


def answer(number: int) -> float:
    """The serial answer."""
    return float((torch.full((4,), float(number)) * 2 + 1).sum())


class Log:
    """Faults and counts of outcomes, from any thread."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()

    def see(self, kind: str, where: str) -> None:
        if now() != MODES[kind]:
            self.wrong.append(f"{where}: {now()} in a body of {kind}")
        self.counts[where] += 1


def decorated(kind: str, function: Any) -> Any:
    return function if kind == "plain" else inference(mode=kind)(function)  # type: ignore[call-overload]


# --- tasks ------------------------------------------------------------------------------------------------------


def speaking(kind: str, log: Log) -> Any:
    async def speak(number: int, steps: int) -> float:
        try:
            for _ in range(steps):
                log.see(kind, "step")
                await asyncio.sleep(0)
            log.see(kind, "last step")
            return answer(number)
        finally:
            log.see(kind, "clean-up")

    return decorated(kind, speak)


def streaming(kind: str, log: Log) -> Any:
    async def pieces(number: int, steps: int) -> AsyncIterator[float]:
        try:
            for step in range(steps):
                log.see(kind, "piece")
                await asyncio.sleep(0)
                log.see(kind, "piece after a wait")
                yield answer(number + step)
        finally:
            log.see(kind, "stream's clean-up")
            await asyncio.sleep(0)
            log.see(kind, "stream's late clean-up")

    return decorated(kind, pieces)


def test_ten_thousand_interleaved_tasks_cut_short_in_every_way() -> None:
    log, choose = Log(), random.Random(7)
    tasks, unhandled = 10_000, []
    speakers = {kind: speaking(kind, log) for kind in MODES}
    streams = {kind: streaming(kind, log) for kind in MODES}

    async def consume(kind: str, number: int, steps: int, ending: str) -> str:
        found = []
        pieces = streams[kind](number, steps)
        async for piece in pieces:
            log.see("plain", "consumer")
            found.append(piece)
            if ending != "all" and len(found) == steps // 2:
                break
        if ending == "close":
            await pieces.aclose()
        log.see("plain", "consumer's end")
        assert found == [answer(number + step) for step in range(len(found))]
        assert ending != "all" or len(found) == steps
        return f"stream: {ending}"

    async def one(number: int) -> str:
        kind, steps = choose.choice(list(MODES)), choose.randint(1, 6)
        fate = choose.choice(["result", "cancelled", "early", "timeout", "all", "close", "abandon", "consumer"])
        if fate in {"all", "close", "abandon"}:
            return await consume(kind, number, max(2, steps), fate)
        if fate == "consumer":
            body: Any = consume(kind, number, 6, "all")
        else:
            body = speakers[kind](number, steps if fate != "timeout" else 10**9)
        if fate == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(body, choose.choice([0.0, 0.001, 0.01]))
            log.see("plain", "after a timeout")
            return fate
        task = asyncio.create_task(body)
        if fate == "result":
            assert await task == answer(number)
            return fate
        for _ in range(0 if fate == "early" else choose.randint(1, 3)):
            await asyncio.sleep(0)
            log.see("plain", "beside a task")
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        log.see("plain", "after a cancellation")
        return fate if task.cancelled() else f"{fate}, but it had ended"

    async def main() -> Counter[str]:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
        outcomes = Counter(await asyncio.gather(*(one(number) for number in range(tasks))))
        gc.collect()  # the abandoned streams are closed by the loop's hook
        await asyncio.sleep(0.05)
        await until_later(lambda: log.counts["stream's late clean-up"] == log.counts["stream's clean-up"])
        return outcomes

    outcomes = asyncio.run(main())
    assert not log.wrong, log.wrong[:5]
    assert not unhandled, unhandled[:2]
    assert outcomes.total() == tasks
    wanted = ["result", "cancelled", "early", "timeout", "consumer", "stream: all", "stream: close", "stream: abandon"]
    assert all(outcomes[fate] > 100 for fate in wanted), outcomes
    assert log.counts["stream's late clean-up"] == log.counts["stream's clean-up"] > 1000


async def test_what_is_carried_into_threads_has_the_mode_and_what_is_not_has_none() -> None:
    log = Log()

    def work(kind: str, number: int) -> float:
        log.see(kind, "thread")
        return answer(number)

    def pieces(kind: str, count: int) -> Iterator[float]:
        for number in range(count):
            log.see(kind, "piece in a thread")
            yield answer(number)

    def request(kind: str) -> Any:
        async def speak(number: int) -> float:
            loop = asyncio.get_running_loop()
            carried = await asyncio.to_thread(carry_mode(work), kind, number)
            bare = await asyncio.to_thread(work, "plain", number)
            log.see(kind, "between threads")
            executed = await loop.run_in_executor(None, carry_mode(work), kind, number)
            stream = carry_mode(pieces)(kind, 3)
            listed = await asyncio.to_thread(list, stream)
            log.see(kind, "after threads")
            assert carried == bare == executed == answer(number)
            assert listed == [answer(step) for step in range(3)]
            return carried

        return decorated(kind, speak)

    requests = {kind: request(kind) for kind in MODES}
    kinds = [list(MODES)[number % 3] for number in range(300)]
    found = await asyncio.gather(*(requests[kind](number) for number, kind in enumerate(kinds)))
    assert found == [answer(number) for number in range(300)]
    assert not log.wrong, log.wrong[:5]
    assert log.counts == {
        "thread": 900, "between threads": 300, "piece in a thread": 900, "after threads": 300
    }  # fmt: skip
    await asyncio.get_running_loop().shutdown_default_executor()


# --- threads ----------------------------------------------------------------------------------------------------


def test_thirty_two_threads_answer_like_one() -> None:
    log = Log()

    def speak(number: int) -> tuple[float, tuple[bool, bool]]:
        return answer(number), now()

    def pieces(number: int) -> Iterator[tuple[float, tuple[bool, bool]]]:
        for step in range(3):
            yield answer(number + step), now()

    speakers = {kind: decorated(kind, speak) for kind in MODES}
    streams = {kind: decorated(kind, pieces) for kind in MODES}

    def request(number: int) -> list[float]:
        kind = list(MODES)[number % 3]
        log.see("plain", "worker")
        found = [speakers[kind](number)]
        for piece in streams[kind](number):
            log.see("plain", "worker between pieces")
            found.append(piece)
            if number % 5 == 0:
                break
        log.see("plain", "worker's end")
        assert {mode for _, mode in found} == {MODES[kind]}
        return [value for value, _ in found]

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(request, range(6000)))
    assert found == [request(number) for number in range(6000)]
    assert not log.wrong, log.wrong[:5]


def test_generators_go_from_thread_to_thread() -> None:
    log, count, steps = Log(), 400, 9
    waiting: queue.Queue[tuple[int, Iterator[float], list[float]]] = queue.Queue()
    ended: dict[int, list[float]] = {}

    def make(kind: str) -> Any:
        def pieces(number: int) -> Iterator[float]:
            try:
                for step in range(steps):
                    log.see(kind, "piece")
                    yield answer(number + step)
            finally:
                log.see(kind, "clean-up")

        return decorated(kind, pieces)

    streams = {kind: make(kind) for kind in MODES}
    for number in range(count):
        waiting.put((number, streams[list(MODES)[number % 3]](number), []))

    def work() -> None:
        while len(ended) < count:
            try:
                number, stream, found = waiting.get(timeout=0.05)
            except queue.Empty:
                continue
            piece = next(stream, None)
            log.see("plain", "thread")
            if piece is not None and not (number % 7 == 0 and len(found) == 4):
                waiting.put((number, stream, [*found, piece]))
                continue
            stream.close()  # type: ignore[attr-defined]
            log.see("plain", "thread after a close")
            ended[number] = found

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result(120)
    for number, found in ended.items():
        assert found == [answer(number + step) for step in range(4 if number % 7 == 0 else steps)]
    assert not log.wrong, log.wrong[:5]
    assert log.counts["clean-up"] == count


@pytest.mark.parametrize("cyclic", [False, True])
def test_abandoned_generators_are_finalised_in_another_thread(cyclic: bool) -> None:
    """The collector closes a body in a cycle, in the collector's own mode, which stays unchanged."""
    log, places = Log(), Counter[str]()

    def make(kind: str) -> Any:
        def pieces() -> Iterator[int]:
            try:
                while True:
                    log.see(kind, "piece")
                    yield 1
            finally:
                places[threading.current_thread().name] += 1
                if not cyclic:
                    log.see("no_grad" if kind == "plain" else kind, "clean-up")

        return decorated(kind, pieces)

    streams = {kind: make(kind) for kind in MODES}
    holder: list[Any] = []

    def abandon() -> None:
        for number in range(600):
            stream = streams[list(MODES)[number % 3]]()
            next(stream)
            log.see("plain", "owner")
            cell: list[Any] = [stream]
            if cyclic:
                cell.append(cell)
            else:
                holder.append(cell)

    def collect() -> None:
        log.see("plain", "collector")
        with torch.no_grad():  # its own mode is none of the generators' business
            holder.clear()
            gc.collect()
            log.see("no_grad", "collector's own mode")
        log.see("plain", "collector's end")

    gc.collect()
    gc.disable()
    try:
        abandon()
        assert not places
        thread = threading.Thread(target=collect, name="collector")
        thread.start()
        thread.join()
    finally:
        gc.enable()
    assert not log.wrong, log.wrong[:5]
    assert places == {"collector": 600}


class Contented:
    """A watcher that finds no fault."""

    def judge(self, name: str, units: Any, stats: Any, *, whole: bool) -> None: ...


@pytest.mark.parametrize("guarded", [False, True])
def test_abandoned_async_generators_in_cycles_are_closed_by_their_loop_in_the_mode(
    guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if guarded:
        monkeypatch.setattr(guards, "watchers_of", lambda *_call: (Contented(),))
    log = Log()
    streams = {kind: streaming(kind, log) for kind in MODES}

    async def abandon() -> None:
        for number in range(300):
            stream = streams[list(MODES)[number % 3]](number, 5)
            assert await stream.__anext__() == answer(number)
            cycle: list[Any] = [stream]
            cycle.append(cycle)

    async def main() -> None:
        gc.disable()
        try:
            await abandon()
            gc.collect()
            log.see("plain", "collector")
        finally:
            gc.enable()
        await until_later(lambda: log.counts["stream's late clean-up"] == 300)

    asyncio.run(main())
    assert not log.wrong, log.wrong[:5]
    assert log.counts["stream's clean-up"] == log.counts["stream's late clean-up"] == 300


def test_scopes_nest_and_overlap_in_sixteen_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of a CUDA device are given (stand-in: there is none here); the flags themselves are real."""
    wanted = [(flags.MATMUL_PRECISION, "high"), (flags.CUDNN_BENCHMARK, True)]
    monkeypatch.setattr(get_performance_optimizer(), "call_flags", lambda: wanted)
    log = Log()

    def state() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    before = state()
    assert before != ("high", True), "a default would prove nothing"

    def nest(choose: random.Random, depth: int, outer: str) -> None:
        mode: Any = choose.choice(["inference", "no_grad"])
        # no_grad inside inference mode leaves that on.
        kind = "inference" if outer == "inference" else mode
        with contextlib.suppress(KeyError), fast_inference(mode=mode):
            log.see(kind, "scope")
            if state() != ("high", True):
                log.wrong.append(f"flags {state()} in a scope")
            if depth:
                nest(choose, depth - 1, kind)
                log.see(kind, "scope after a nested one")
            if choose.random() < 0.2:
                raise KeyError
        log.see(outer, "outside of a scope")

    def work(number: int) -> None:
        choose = random.Random(number)
        for _ in range(60):
            nest(choose, choose.randint(0, 4), "plain")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not log.wrong, log.wrong[:5]
    assert log.counts["scope"] > 16 * 60
    assert state() == before


# --- processes --------------------------------------------------------------------------------------------------

WORKER = """
import torch
from threaded import until_later
from accelerate_tts import fast_inference, inference

@inference
def speak(number):
    return float((torch.full((4,), float(number)) * 2 + 1).sum()), torch.is_inference_mode_enabled()

@inference
def pieces(number):
    for step in range(3):
        yield speak(number + step)

def collected(number):
    with fast_inference():
        inside = torch.is_inference_mode_enabled()
    return list(pieces(number)), inside, torch.is_inference_mode_enabled()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes_answer_like_this_one(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no {method}")
    # The workers import it by its name, as they would a service's own module.
    (tmp_path / "stress_worker.py").write_text(WORKER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import stress_worker  # type: ignore[import-not-found]

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        found = list(pool.map(stress_worker.speak, range(100), chunksize=5))
        streams = list(pool.map(stress_worker.collected, range(20)))
    assert found == [(answer(number), True) for number in range(100)]
    for number, (pieces, inside, outside) in enumerate(streams):
        assert pieces == [(answer(number + step), True) for step in range(3)]
        assert (inside, outside) == (True, False)
    assert (stress_worker.speak(5), stress_worker.collected(5)) == (found[5], streams[5])
