"""The recorder over stand-ins for torch.cuda and torch.xpu that note what they are told. None of it ran on a device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate_tts.device.graphs import graphs_of, is_capturing
from accelerate_tts.stages.graphs.recorder import GraphRecorder, is_recording, stream_of

KINDS = ("cuda", "xpu")


class Stream:
    """A stream of a device."""

    def __init__(self, module: Module, device: int, name: str) -> None:
        self._module, self.device_index, self.name = module, device, name
        self.cuda_stream = id(self)

    def wait_event(self, event: Any) -> None:
        assert not self._module.capturing, "SYCL refuses a dependency from outside"
        self._module.told.append(f"{self.name} waits for {event.number}")


class Module:
    """Stand-in for what the recorder uses of `torch.cuda` or `torch.xpu`, as torch 2.14 behaves.

    Args:
        kind: The module's name.
        fault: What the computation is told in a capture.
    """

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, fault: BaseException | None = None) -> None:
        self.told: list[str] = []
        self.fault = fault
        self.capturing = 0
        self.captured: list[tuple[int, Stream]] = []
        self.current = 0
        self.restored: list[object] = []
        self._kind = kind
        self._events = iter(range(999))
        self._pools = iter(range(7, 999))
        self._streams: dict[Any, Any] = {}  # by the device and the priority
        self.workspaces: dict[object, object] = {}  # memory pool of cuBLAS's workspace of each stream
        self.of_graphs: list[object] = []  # pool of the workspace that each graph has
        self.into: object = "the allocator's"
        self.interrupted: BaseException | None = None
        self.ended: list[object] = []
        self.left: Stream | None = None  # where an interrupted capture goes on
        self._here = threading.local()
        generator = SimpleNamespace(clone_state=lambda: "cloned", graphsafe_set_state=self.restored.append)
        module = getattr(torch, kind)
        for name, value in {
            "current_stream": lambda _device=None: self.stream, "Stream": self.next_stream,
            "stream": self.on, "set_stream": self.set_stream, "device": self.device, "Event": self.event,
            "graph": self.graph_of_cuda if kind == "cuda" else self.graph,
            "graph_pool_handle": lambda: next(self._pools), "default_generators": [generator] * 2,
            "is_current_stream_capturing": lambda: self.capturing > 0 or self.left is self.stream,
            {"cuda": "CUDAGraph", "xpu": "XPUGraph"}[kind]: lambda: SimpleNamespace(
                replay=lambda: self.told.append("replay"), capture_end=lambda: setattr(self, "left", None)
            ),
        }.items():  # fmt: skip
            patch.setattr(module, name, value, raising=False)  # an older torch has no graphs of XPU
        self._patch = patch
        self.has(**{
            "_cuda_clearCublasWorkspaces": self.workspaces.clear, f"_{kind}_endAllocateToPool": self.end_of_pool,
        })  # fmt: skip

    def has(self, **functions: Callable[..., object]) -> None:
        """Let torch have these functions without a public name, and no other ones."""
        self._patch.setattr(graphs_of(self._kind), "internals", SimpleNamespace(**functions))

    @property
    def stream(self) -> Stream:
        if not hasattr(self._here, "stream"):
            self._here.stream = Stream(self, self.current, threading.current_thread().name)
        found: Stream = self._here.stream
        return found

    def next_stream(self, priority: int = 0) -> Stream:
        key = (self.current, priority)
        if key not in self._streams:
            self._streams[key] = cycle([Stream(self, self.current, "side") for _ in range(32)])
        found: Stream = next(self._streams[key])
        return found

    def end_of_pool(self, _device: int, pool: object) -> None:
        if pool in self.ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.ended.append(pool)

    def product(self) -> None:
        """Give the current stream a workspace for products, unless it has one, out of the pool of the capture."""
        self.workspaces.setdefault(self.stream, self.into)

    def set_stream(self, stream: Stream) -> None:
        self._here.stream = stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.stream, stream
        yield
        self._here.stream = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device.type == self._kind
        before, self.current = self.current, device.index
        yield
        self.current = before

    def graph_of_cuda(self, graph: object, *, pool: int, stream: Stream, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local", "others may go on with their own work"
        return self.graph(graph, pool=pool, stream=stream)

    @contextmanager
    def graph(self, _graph: object, *, pool: int, stream: Stream) -> Iterator[None]:
        assert not gc.isenabled(), "an event that the collector finds would be waited for"
        self.told.append(f"capture into {pool}")
        self.captured.append((pool, stream))
        self.capturing += 1
        assert self.capturing == 1, "one capture at a time"
        assert stream.device_index == self.current, "the graph would be empty: it is another device's stream"
        before, self._here.stream = self.stream, stream
        if self.interrupted is not None:  # when the capture has begun
            self.left, self.capturing = stream, 0
            raise self.interrupted
        try:
            self.into = pool
            yield
            self.of_graphs.append(self.workspaces.get(stream))
        finally:
            self.into = "the allocator's"
            self.capturing -= 1
            if self.fault is not None:  # the end of the capture raises before the stream is put back
                raise RuntimeError("operation failed due to a previous error during capture")
            self._here.stream = before

    def event(self) -> Any:
        made = SimpleNamespace(number=next(self._events), recorded=False)

        def record(stream: Stream) -> None:
            assert not made.recorded, "XPU frees what another thread may wait for"
            made.recorded = True
            self.told.append(f"{stream.name} was used, {made.number}")

        made.record, made.synchronize = record, lambda: self.told.append(f"all is done, {made.number}")
        return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_computation_runs_twice_before_its_capture_and_replays_are_in_turn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Module(monkeypatch, kind)
    device = torch.device(kind, 0)
    recorder = GraphRecorder(device)
    marks: list[tuple[bool, int, bool]] = []

    def run() -> str:
        marks.append((is_recording(), module.capturing, is_capturing(device)))
        return "result"

    made = recorder.record(run)
    assert marks == [(True, 0, False), (True, 0, False), (True, 1, True)]
    assert not is_recording()
    assert made.outputs == "result"
    assert module.told == ["capture into 7"]
    module.told.clear()

    def replay() -> None:
        with recorder.in_turn():
            assert stream_of(device).name == threading.current_thread().name
            made.replay()

    for name in ("one", "other"):
        thread = threading.Thread(target=replay, name=name)
        thread.start()
        thread.join()
    recorder.finish()
    assert module.told == [
        "one waits for 0", "replay", "one was used, 1", "other waits for 1", "replay", "other was used, 2",
        "all is done, 2",
    ]  # fmt: skip


def test_each_recorder_captures_on_a_stream_of_its_own_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own stream for captures is made once in a process, on the device that captures first.

    cuBLAS has a workspace for each stream, so replays of two recorders would share one on the same stream, too.
    """
    module = Module(monkeypatch, kind)
    recorders = [GraphRecorder(torch.device(kind, index)) for index in (0, 1, 1)]
    for recorder in (*recorders, recorders[0]):
        recorder.record(lambda: "result")
    assert [stream.device_index for _, stream in module.captured] == [0, 1, 1, 0]
    streams = dict(module.captured)
    assert len({id(stream) for stream in streams.values()}) == len(streams) == 3
    assert module.captured[0] == module.captured[3], "a pool is for the captures of one stream"
    assert module.current == 0


def test_no_other_recorder_that_lives_captures_on_its_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 32 streams for a device. If a graph goes, torch frees workspaces of its stream that others may read."""
    module = Module(monkeypatch, kind)
    device = torch.device(kind, 0)
    graphs = []
    for number in range(60):
        made = GraphRecorder(device).record(lambda: "result")
        if number % 2 == 0:  # the others are dropped, as where tuning tries something
            graphs.append((made, module.captured[-1][1]))
    assert len({id(stream) for _, stream in graphs}) == len(graphs) == 30
    more = [GraphRecorder(device) for _ in range(9)]
    for recorder in more:  # more than there are: it is no reason not to record
        recorder.record(lambda: "result")


def test_a_failed_capture_leaves_the_stream_and_the_generator_as_they_were(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Module(monkeypatch, kind, fault=RuntimeError("operation not permitted when stream is capturing"))
    before = module.stream
    recorder = GraphRecorder(torch.device(kind, 0))

    def run() -> None:
        if module.capturing and module.fault is not None:
            raise module.fault

    with pytest.raises(RuntimeError, match="during capture"):
        recorder.record(run)
    assert module.stream is before
    assert module.restored == ["cloned"]
    assert not is_recording()
    module.fault = None
    recorder.record(run)  # another one may begin


def test_a_graphs_workspaces_are_in_its_own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps cuBLAS's by stream, and the end of any graph frees those of its stream (pytorch issue 193402)."""
    module = Module(monkeypatch, "cuda")
    recorders = [GraphRecorder(torch.device("cuda", 0)) for _ in range(40)]  # more than torch has streams
    for _ in range(2):
        for each in recorders:
            each.record(module.product)
    pools = [pool for pool, _ in module.captured]
    assert len(set(pools)) == len(recorders)
    assert module.of_graphs == pools


def test_nobody_else_is_given_the_stream_that_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of another thread on it would become a part of the graph. torch makes few, and gives each to many."""
    module = Module(monkeypatch, "cuda")
    users = [module.next_stream() for _ in range(100)]
    GraphRecorder(torch.device("cuda", 0)).record(lambda: None)
    assert not any(stream is module.captured[0][1] for stream in users)


def test_a_capture_that_is_interrupted_at_its_beginning_is_ended(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the device could not be waited for any more."""
    module = Module(monkeypatch, kind)
    before, module.interrupted = module.stream, KeyboardInterrupt()
    recorder = GraphRecorder(torch.device(kind, 0))
    with pytest.raises(KeyboardInterrupt):
        recorder.record(lambda: None)
    assert module.left is None
    assert module.stream is before
    assert len(module.ended) == 1, "the allocator takes the capture for unfinished else"
    assert gc.isenabled()
    module.interrupted = None
    recorder.record(lambda: None)


def test_torch_2_6_has_another_name_for_the_end_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its allocator, too, would give nothing back."""
    module = Module(monkeypatch, "cuda", fault=RuntimeError("operation not permitted when stream is capturing"))
    module.has(
        _cuda_clearCublasWorkspaces=module.workspaces.clear, _cuda_endAllocateCurrentStreamToPool=module.end_of_pool
    )
    with pytest.raises(RuntimeError, match="during capture"):
        GraphRecorder(torch.device("cuda", 0)).record(lambda: None)
    assert module.ended == [7]


def test_one_capture_at_a_time_in_a_process(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(monkeypatch, kind)
    one, other = (GraphRecorder(torch.device(kind, 0)) for _ in range(2))
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        threading.Event().wait(0.05)

    first = threading.Thread(target=one.record, args=(slow,))
    first.start()
    begun.wait()
    other.record(lambda: None)
    first.join()
    assert sum("capture into" in line for line in module.told) == 2


def test_a_torch_without_graphs_for_a_device_says_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a torch of before the class came."""
    name, since = {"cuda": ("CUDAGraph", "1.10"), "xpu": ("XPUGraph", "2.11")}[kind]
    graphs = graphs_of(kind)
    assert graphs is not None
    monkeypatch.setattr(getattr(torch, kind), name, object, raising=False)
    assert graphs.missing() is None
    monkeypatch.delattr(getattr(torch, kind), name)
    reason = f"torch {torch.__version__} has no torch.{kind}.{name}; torch {since} has"
    assert graphs.missing() == reason
    assert not is_capturing(torch.device(kind, 0))
    with pytest.raises(RuntimeError, match="nothing can be recorded") as caught:
        GraphRecorder(torch.device(kind, 0))
    assert reason in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices_have_no_graphs(device: str) -> None:
    assert graphs_of(device) is None
    assert stream_of(torch.device(device)) is None
    with pytest.raises(RuntimeError, match=f"nothing can be recorded on {device}: torch has no graphs for {device}"):
        GraphRecorder(torch.device(device))
