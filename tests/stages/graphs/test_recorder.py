"""The recorder for CUDA over a stand-in for torch.cuda that notes what it is told. Nothing here ran on a device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate_tts.stages.graphs import recorder
from accelerate_tts.stages.graphs.recorder import CudaRecorder, capture, is_recording


class Stream:
    device_index = 0

    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name
        self.cuda_stream = hash(name)

    def wait_stream(self, other: Stream) -> None:
        self._cuda.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, _event: object) -> None:
        self._cuda.told.append(f"{self.name} waits")


class Cuda:
    """Stand-in for what the recorder uses of `torch.cuda`, as torch 2.14 behaves.

    Args:
        fault: What the computation is told in a capture.
    """

    def __init__(self, patch: pytest.MonkeyPatch, fault: BaseException | None = None) -> None:
        self.told: list[str] = []
        self.fault = fault
        self.interrupted: BaseException | None = None
        self.capturing = 0
        self.restored: list[object] = []
        self.workspaces: dict[str, object] = {}  # cuBLAS's memory pool, by the name of a stream
        self.graphs: list[object] = []  # the pool of the workspace of each graph's products
        self.freed: list[object] = []
        self.into: object = "the allocator's"
        self._made = 0
        self._here = threading.local()
        self.generator: Any = SimpleNamespace(clone_state=lambda: "cloned", graphsafe_set_state=self.restored.append)
        for name, value in {
            "current_stream": lambda: self.stream, "Stream": self.new_stream, "stream": self.on,
            "set_stream": self.set_stream, "graph": self.graph, "device": self.device, "graph_pool_handle": self.pool,
            "default_generators": [self.generator], "Event": self.event,
            "is_current_stream_capturing": lambda: self.stream.name == self.left,
            "CUDAGraph": lambda: SimpleNamespace(
                replay=lambda: self.told.append("replay"), capture_end=lambda: setattr(self, "left", None)
            ),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.workspaces.clear, raising=False)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_of_pool, raising=False)
        patch.setattr(recorder, "_warm_ups", {})
        patch.setattr(recorder, "_pools", {})
        self.left: str | None = None  # the stream that an interrupted capture goes on with

    def pool(self) -> int:
        self._made += 1
        return 6 + self._made

    def new_stream(self, *, priority: int = 0) -> Stream:
        self._made += 1
        number = self._made % 32  # as many as torch has of each priority
        return Stream(self, f"stream {number} of {priority}")

    def end_of_pool(self, _device: int, pool: object) -> None:
        if pool in self.freed:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.freed.append(pool)

    def product(self) -> None:
        """Give the current stream a workspace for products, unless it has one, out of the pool of the capture."""
        self.workspaces.setdefault(self.stream.name, self.into)

    @property
    def stream(self) -> Stream:
        if not hasattr(self._here, "stream"):
            self._here.stream = Stream(self, threading.current_thread().name)
        found: Stream = self._here.stream
        return found

    def set_stream(self, stream: Stream) -> None:
        self._here.stream = stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.stream, stream
        yield
        self._here.stream = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device.type == "cuda"
        yield

    @contextmanager
    def graph(self, _graph: object, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "others may go on with their own work"
        assert not gc.isenabled(), "an event that the collector finds would be waited for"
        self.told.append(f"capture into {pool}")
        self.capturing += 1
        assert self.capturing == 1, "one at a time"
        before, self._here.stream = self.stream, stream
        if self.interrupted is not None:  # after the capture has begun
            self.left, self.capturing = stream.name, 0
            raise self.interrupted
        try:
            self.into = pool
            yield
            self.graphs.append(self.workspaces.get(stream.name))
        finally:
            self.capturing -= 1
            self.into = "the allocator's"
            if self.fault is not None:  # the end of the capture raises before the stream is put back
                raise RuntimeError("operation failed due to a previous error during capture")
            self._here.stream = before

    def event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self.told.append(f"{stream.name} was used"),
            synchronize=lambda: self.told.append("all is done"),
        )


DEVICE = torch.device("cuda", 0)


def test_a_computation_runs_twice_before_its_capture_and_replays_are_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    made_by = CudaRecorder(DEVICE)
    marks: list[tuple[bool, int]] = []
    made = made_by.record(lambda: marks.append((is_recording(), cuda.capturing)) or "result")  # type: ignore[func-returns-value]
    assert marks == [(True, 0), (True, 0), (True, 1)]
    assert not is_recording()
    assert made.outputs == "result"
    assert "capture into 7" in cuda.told
    cuda.told.clear()

    def replay() -> None:
        with made_by.in_turn():
            made.replay()

    for name in ("one", "other"):
        thread = threading.Thread(target=replay, name=name)
        thread.start()
        thread.join()
    made_by.finish()
    assert cuda.told == [
        "one waits", "replay", "one was used", "other waits", "replay", "other was used", "all is done",
    ]  # fmt: skip


def test_a_failed_capture_leaves_the_stream_and_the_generator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, fault=RuntimeError("operation not permitted when stream is capturing"))
    before = cuda.stream

    def run() -> None:
        if cuda.capturing and cuda.fault is not None:
            raise cuda.fault

    with pytest.raises(RuntimeError, match="during capture"):
        capture(run)
    assert cuda.stream is before
    assert cuda.restored == ["cloned"]
    assert not is_recording()
    cuda.fault = None
    capture(run)  # another one may begin


def test_one_capture_at_a_time_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        threading.Event().wait(0.05)

    first = threading.Thread(target=capture, args=(slow,))
    first.start()
    begun.wait()
    capture(lambda: None)
    first.join()
    assert sum("capture into" in line for line in cuda.told) == 2


def test_a_graphs_workspaces_are_in_its_own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps cuBLAS's by stream, and the end of any graph frees those of its stream (pytorch issue 193402)."""
    cuda = Cuda(monkeypatch)
    recorders = [CudaRecorder(DEVICE) for _ in range(40)]  # more than torch has streams
    for _ in range(2):
        for each in recorders:
            each.record(cuda.product)
    pools = [line.removeprefix("capture into ") for line in cuda.told if line.startswith("capture into")]
    assert len(set(pools)) == len(recorders)
    assert [str(pool) for pool in cuda.graphs] == pools


def test_nobody_else_is_given_the_stream_that_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread starts on it would become a part of the graph. torch makes few, and gives each to many."""
    cuda = Cuda(monkeypatch)
    users = {cuda.new_stream().name for _ in range(100)}
    captured: list[str] = []
    CudaRecorder(DEVICE).record(lambda: captured.append(cuda.stream.name))
    assert captured[2] not in users
    assert captured[0] == captured[1] != captured[2]


def test_a_capture_that_is_interrupted_at_its_beginning_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the device could not be waited for any more."""
    cuda = Cuda(monkeypatch)
    before, cuda.interrupted = cuda.stream, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        capture(lambda: None)
    assert cuda.left is None
    assert cuda.stream is before
    assert len(cuda.freed) == 1, "the allocator takes the capture for unfinished else"
    assert gc.isenabled()
    cuda.interrupted = None
    capture(lambda: None)
