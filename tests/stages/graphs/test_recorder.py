"""The recorder for CUDA over a stand-in for torch.cuda that notes what it is told. Nothing here ran on a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate_tts.stages.graphs.recorder import CudaRecorder, capture, is_recording


class Stream:
    device_index = 0

    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name

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
        self.capturing = 0
        self.restored: list[object] = []
        self._here = threading.local()
        self.generator: Any = SimpleNamespace(clone_state=lambda: "cloned", graphsafe_set_state=self.restored.append)
        for name, value in {
            "current_stream": lambda: self.stream, "Stream": lambda: Stream(self, "side"), "stream": self.on,
            "set_stream": self.set_stream, "graph": self.graph, "device": self.device, "graph_pool_handle": lambda: 7,
            "default_generators": [self.generator], "Event": self.event,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.told.append("replay")),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

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
    def graph(self, _graph: object, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "others may go on with their own work"
        self.told.append(f"capture into {pool}")
        self.capturing += 1
        assert self.capturing == 1, "torch captures on one stream of its own"
        before, self._here.stream = self.stream, Stream(self, "torch's own")
        try:
            yield
        finally:
            self.capturing -= 1
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
    recorder = CudaRecorder(DEVICE)
    marks: list[tuple[bool, int]] = []
    made = recorder.record(lambda: marks.append((is_recording(), cuda.capturing)) or "result")  # type: ignore[func-returns-value]
    assert marks == [(True, 0), (True, 0), (True, 1)]
    assert not is_recording()
    assert made.outputs == "result"
    assert "capture into 7" in cuda.told
    cuda.told.clear()

    def replay() -> None:
        with recorder.in_turn():
            made.replay()

    for name in ("one", "other"):
        thread = threading.Thread(target=replay, name=name)
        thread.start()
        thread.join()
    recorder.finish()
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
