"""Stand-ins for the graphs of CUDA and XPU over tensors on the CPU, for the recorder that devices have.

A recording replays by running again (`reruns.py`). Streams and events only keep the rules of their kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from accelerate_tts.device.detect import SPECS, spec_of
from accelerate_tts.device.graphs import DeviceGraphs
from reruns import Rerun

KINDS = ("cuda", "xpu")


class Stream:
    """A stream, which waits for events outside of captures alone."""

    def __init__(self, graphs: Reran) -> None:
        self._graphs = graphs

    def wait_event(self, event: Event) -> None:
        self._graphs.outside("an event is waited for")
        assert event.graphs is self._graphs


class Event:
    """An event. One of XPU is not recorded twice, since that frees what another thread may wait for."""

    def __init__(self, graphs: Reran) -> None:
        self.graphs = graphs
        self._count = 0

    def record(self, stream: Stream) -> None:
        self.graphs.outside("an event is recorded")
        assert stream is self.graphs.current_stream(torch.device("cpu"))
        self._count += 1
        assert self._count == 1 or self.graphs.type == "cuda"

    def synchronize(self) -> None:
        self.graphs.outside("an event is waited for")


class Reran(DeviceGraphs):
    """Graphs of a kind that run again.

    Args:
        kind: "cuda" or "xpu".
        watched: False where stages of ours are inside, which run upstream's forward where operators are watched.
    """

    def __init__(self, kind: str, *, watched: bool = True) -> None:
        super().__init__(kind, {"cuda": "CUDAGraph", "xpu": "XPUGraph"}[kind], "2.11")
        self.replays = 0
        self._captures: list[tuple[object, Stream]] = []
        self._here = threading.local()
        self._watched = watched

    def is_capturing(self) -> bool:
        return getattr(self._here, "capturing", False)

    def outside(self, what: str) -> None:
        assert not self.is_capturing(), f"{what} in a capture"

    def on_device(self, device: torch.device) -> Any:
        assert device.type == "cpu"
        return nullcontext()

    def current_stream(self, device: torch.device) -> Any:
        here = self._here
        if not hasattr(here, "stream"):
            here.stream = Stream(self)
        return here.stream

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        here, before = self._here, self.current_stream(torch.device("cpu"))
        here.stream = stream
        try:
            yield
        finally:
            here.stream = before

    def new_stream(self) -> Stream:
        return Stream(self)

    def new_event(self) -> Event:
        self.outside("an event is made")
        return Event(self)

    def new_pool(self) -> object:
        return object()

    def capture(self, run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Any, Any]:
        here = self._here
        assert all((pool is old) == (stream is its) for old, its in self._captures), "one stream for each pool"
        self._captures.append((pool, stream))
        with self.on_stream(stream):
            here.capturing = True
            try:
                made = Rerun(run, self._count, watched=self._watched)
            finally:
                here.capturing = False
        return made, made.outputs

    def _count(self) -> None:
        self.replays += 1


@contextmanager
def cpu_as(kind: str, *, watched: bool = True) -> Iterator[Any]:
    """Give the CPU the graphs of a kind of device while open."""
    graphs = Reran(kind, watched=watched)
    with SPECS.scope(cpu=replace(spec_of("cpu"), graphs=graphs)):
        yield graphs
