"""Batches that run out of memory: every item done once, in order, in few calls, and nothing of a failed one stays."""

from __future__ import annotations

import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts import Event, SettingsError, batched, inference
from accelerate_tts.device import memory
from accelerate_tts.events import BackedOff
from accelerate_tts.runtime.batching import is_out_of_memory

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
EXHAUSTED: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    lambda: RuntimeError(CPU_MESSAGE),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError,
]


@pytest.fixture
def cleaned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The device types that were cleaned up; without the collection, which would take the most time here."""
    found: list[str] = []
    monkeypatch.setattr(memory, "cleanup", lambda device: found.append(device.type))
    return found


class Limited:
    """A function of a list that has room for `capacity` items."""

    def __init__(self, capacity: int, exhausted: Callable[[], Exception] = MemoryError) -> None:
        self.capacity = capacity
        self.exhausted = exhausted
        self.calls: list[int] = []
        self.done: list[int] = []
        self.lock = threading.Lock()

    def __call__(self, items: list[int]) -> list[int]:
        with self.lock:
            self.calls.append(len(items))
        if len(items) > self.capacity:
            items.clear()  # the list is the function's own
            raise self.exhausted()
        with self.lock:
            self.done += items
        return [item * item for item in items]

    @property
    def failed(self) -> list[int]:
        return [size for size in self.calls if size > self.capacity]


@given(
    count=st.integers(0, 150), limit=st.integers(1, 40), capacity=st.integers(1, 50), recover_after=st.integers(1, 6),
    exhausted=st.sampled_from(EXHAUSTED), streamed=st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_each_item_is_done_once_in_order_in_few_calls(
    count: int, limit: int, capacity: int, recover_after: int, exhausted: Any, streamed: bool
) -> None:
    function = Limited(capacity, exhausted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cleanup", lambda _device: None)
        run = batched(function, limit=limit, recover_after=recover_after)
        found = list(run.stream(iter(range(count)))) if streamed else run(range(count))
    assert found == [item * item for item in range(count)]
    assert function.done == list(range(count))
    assert max(function.calls, default=0) <= limit
    worked = len(function.calls) - len(function.failed)
    least = limit if limit <= capacity else (capacity + 1) // 2  # half of what just failed
    assert worked <= -(-count // least)
    assert len(function.failed) <= limit.bit_length() + worked // recover_after
    if limit <= capacity:
        assert function.failed == []


@pytest.mark.parametrize("exhausted", EXHAUSTED)
def test_one_item_that_does_not_fit_raises_the_users_own_exception(exhausted: Any, cleaned: list[str]) -> None:
    made = exhausted()

    def function(_items: list[int]) -> list[int]:
        raise made

    with pytest.raises(type(made)) as caught:
        batched(function, limit=4)(range(10))
    assert caught.value is made
    assert len(cleaned) == 2, "after 4 and 2"


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shape mismatch"), KeyError("memory"), StopIteration()]
)
def test_every_other_exception_passes_untouched_and_is_not_tried_again(
    error: Exception, cleaned: list[str], seen: list[Event]
) -> None:
    calls: list[int] = []

    def function(items: list[int]) -> list[int]:
        calls.append(len(items))
        raise error

    with pytest.raises(type(error)) as caught:
        batched(function, limit=4)(range(10))
    assert caught.value is error
    assert error.__context__ is None
    assert (calls, cleaned, seen) == ([4], [], [])


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_batch_that_may_be_made_once_is_not_made_again(is_inside: bool, seen: list[Event]) -> None:
    """`retry=False` is for a function that charges: its batch is not halved, but the next call's is smaller."""
    charged: list[list[int]] = []

    @inference(retry=False)
    def charge(items: list[int]) -> list[int]:
        charged.append(list(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items

    def speak(items: list[int]) -> list[int]:
        return list(charge(items))

    speak_all = batched(speak if is_inside else charge, limit=4)
    with pytest.raises(torch.OutOfMemoryError):
        speak_all(range(6))
    assert charged == [[0, 1, 2, 3]]
    assert speak_all.size == 2
    assert [type(event) for event in seen] == [BackedOff]
    assert speak_all(range(4, 6)) == [4, 5]
    assert charged == [[0, 1, 2, 3], [4, 5]]


def test_no_tensor_of_the_failed_batch_is_alive_at_the_next_attempt() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def function(items: list[int]) -> list[int]:
        left.append(sum(reference() is not None for reference in alive))
        big = torch.zeros(len(items), 1000)
        alive.append(weakref.ref(big))
        if len(items) > 2:
            try:
                raise RuntimeError(CPU_MESSAGE)
            except RuntimeError as error:
                kept = error  # a cycle of the exception, its traceback and this frame
                raise torch.OutOfMemoryError("CUDA out of memory") from kept
        return items

    assert batched(function, limit=16)(range(7)) == list(range(7))
    assert len(left) > 4
    assert not any(left)
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_the_clean_up_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *_: collected.append(1) or 0)
    batched(Limited(1), limit=4)(range(4))
    assert collected == [1, 1]


def test_a_clean_up_that_fails_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch, seen: list[Event]) -> None:
    def broken(_device: Any) -> None:
        raise OSError("driver")

    monkeypatch.setattr(memory, "cleanup", broken)
    assert batched(Limited(1), limit=2)(range(3)) == [0, 1, 4]
    assert any("OSError: driver" in str(event) for event in seen)


def test_each_back_off_is_an_event(cleaned: list[str], seen: list[Event]) -> None:
    def speak(items: list[int]) -> list[int]:
        return Limited(2)(items)

    batched(speak, limit=9)(range(9))
    name = f"{test_each_back_off_is_an_event.__name__}.<locals>.speak"
    assert seen == [BackedOff(name, 9, 4), BackedOff(name, 4, 2)]
    assert len(cleaned) == 2


# --- memory of the size -----------------------------------------------------------------------------------------


def test_the_size_is_remembered_for_the_function_and_recovers(cleaned: list[str]) -> None:
    function = Limited(4)
    run = batched(function, limit=16, recover_after=3)
    run(range(4))
    assert run.size == 16, "a batch that is not full says nothing"
    run(range(16))
    assert function.calls == [4, 16, 8, 4, 4, 4, 4]
    function.calls.clear()
    assert batched(function, limit=16).size == run.size == 8, "three full batches of 4 worked"
    assert batched(function, limit=2).size == 2
    function.capacity = 100
    run(range(16 * 10))
    assert run.size == 16
    assert function.calls[:4] == [8, 8, 8, 16]
    assert function.failed == []


def test_a_larger_batch_that_keeps_failing_is_tried_ever_less_often(cleaned: list[str]) -> None:
    function = Limited(4)
    batched(function, limit=8, recover_after=1)(range(4 * 400))
    places = [number for number, size in enumerate(function.calls) if size == 8]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert gaps[:4] == [2, 3, 5, 9]
    assert set(gaps[5:-1]) == {17}


def test_what_worked_last_is_what_a_failed_larger_one_goes_back_to(cleaned: list[str]) -> None:
    function = Limited(2)
    run = batched(function, limit=10, recover_after=1)
    run(range(10))
    function.calls.clear()
    function.capacity = 8
    run(range(400))
    after = [later for size, later in itertools.pairwise(function.calls) if size == 10]
    assert set(after) == {8}, "half of 10 would be less than what is known to fit"


def test_a_method_has_its_memory_for_each_object_and_keeps_none_alive(cleaned: list[str]) -> None:
    class Voice:
        def __init__(self, capacity: int) -> None:
            self.room = Limited(capacity)

        def speak(self, items: list[int]) -> list[int]:
            return self.room(items)

        @inference
        def decorated(self, items: list[int]) -> list[int]:
            assert torch.is_inference_mode_enabled()
            return self.room(items)

    for name in ("speak", "decorated"):
        small, large = Voice(2), Voice(100)
        batched(getattr(small, name), limit=8)(range(8))
        assert batched(getattr(small, name), limit=8).size == 2
        assert batched(getattr(large, name), limit=8).size == 8
        gone = weakref.ref(small)
        del small
        gc.collect()
        assert gone() is None


def test_a_function_that_cannot_be_remembered_still_runs(cleaned: list[str]) -> None:
    class Unreferable:
        __slots__ = ("inner",)

        def __init__(self) -> None:
            self.inner = Limited(2)

        def __call__(self, items: list[int]) -> list[int]:
            return self.inner(items)

    function = Unreferable()
    run = batched(function, limit=8)
    assert run(range(8)) == [item * item for item in range(8)]
    assert (run.size, batched(function, limit=8).size) == (2, 8)


def test_threads_share_one_memory(cleaned: list[str]) -> None:
    function = Limited(5)
    run = batched(function, limit=32, recover_after=50)
    barrier = threading.Barrier(8)

    def work(number: int) -> list[int]:
        barrier.wait(30)
        return run(range(number * 100, number * 100 + 100))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert found == [[item * item for item in range(number * 100, number * 100 + 100)] for number in range(8)]
    assert sorted(function.done) == list(range(800))
    assert len(function.failed) <= 8 * (3 + 800 // 4 // 50), "what one thread has found out spares the others"


# --- what goes in and out ---------------------------------------------------------------------------------------


def test_an_endless_source_is_taken_a_batch_at_a_time() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    stream = batched(Limited(10), limit=4).stream(source())
    assert [next(stream) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(taken) == 8


def test_an_exception_of_the_source_passes() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise KeyError("source")

    stream = batched(Limited(10), limit=2).stream(source())
    assert [next(stream) for _ in range(4)] == [0, 1, 4, 9]
    with pytest.raises(KeyError, match="source"):
        next(stream)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_any_sequence_of_results_will_do(make: Callable[[Any], Any]) -> None:
    assert [int(item) for item in batched(lambda items: make(items), limit=3)(range(8))] == list(range(8))


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        ([1], ValueError, "given 3 items and returned 1 results"),
        ([1, 2, 3, 4], ValueError, "given 3 items and returned 4 results"),
        (None, TypeError, "returned a NoneType"),
        ("abc", TypeError, "returned a str"),
        ({1: 1, 2: 2, 3: 3}, TypeError, "returned a dict"),
        ({1, 2, 3}, TypeError, "returned a set"),
        (iter([1, 2, 3]), TypeError, "returned a list_iterator"),
        (torch.tensor(1.0), TypeError, "returned a Tensor"),
    ],
)
def test_a_wrong_result_is_told(result: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        batched(lambda _items: result, limit=4)([1, 2, 3])


@pytest.mark.parametrize("items", ["a text", b"bytes", 5, None])
def test_what_is_no_list_of_items_is_told_before_anything_runs(items: Any) -> None:
    function = Limited(5)
    for run in (batched(function), batched(function).stream):
        with pytest.raises(TypeError) as caught:
            run(items)
        assert repr(items) in str(caught.value)
    assert function.calls == []


def test_options_that_mean_nothing() -> None:
    bad: Any
    for bad in (0, -1, 1.0, True, "4", float("nan"), 10**30):
        for name in ("limit", "recover_after"):
            with pytest.raises(SettingsError) as caught:
                batched(Limited(1), **{name: bad})
            assert f"{name}={bad!r}" in str(caught.value)

    async def speak(items: list[int]) -> list[int]:
        return items

    for bad in (5, None, speak):
        with pytest.raises(TypeError) as wrong:
            batched(bad)
        assert repr(bad) in str(wrong.value)


def test_the_default_limit_is_eight() -> None:
    function = Limited(100)
    batched(function)(range(20))
    assert function.calls == [8, 8, 4]


def test_it_can_be_pickled_and_shown() -> None:
    run = pickle.loads(pickle.dumps(batched(abs_all, limit=5)))
    assert run([-1, -2]) == [1, 2]
    assert repr(run) == "<batched abs_all, 5 of at most 5 at a time>"


def abs_all(items: list[int]) -> list[int]:
    return [abs(item) for item in items]


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(make()) for make in EXHAUSTED)
    assert not is_out_of_memory(ValueError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value), "what torch really says on this machine"
