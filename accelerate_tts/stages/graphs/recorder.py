"""Recorders: what records a computation at fixed addresses, and replays it. Graphs of a device are one.

The protocols keep the stages free of devices: tests without one pass a recorder that runs the computation again.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from accelerate_tts.device.graphs import graphs_of
from accelerate_tts.locks import lock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    import torch


class Replayable(Protocol):
    """A recorded computation."""

    @property
    def outputs(self) -> Any:
        """Result of the computation. Each replay overwrites its tensors."""
        ...

    def replay(self) -> None:
        """Run the computation again on the present content of its inputs."""
        ...


class Recorder(Protocol):
    """Records computations that share memory, so that they are replayed one at a time."""

    def record(self, run: Callable[[], Any]) -> Replayable:
        """Run a computation a few times, and record it.

        Raises:
            Exception: The computation cannot be recorded. The device can be used as before.
        """
        ...

    def in_turn(self, *, stream: Any = None) -> AbstractContextManager[object]:
        """Order this thread's work on inputs and outputs behind all earlier work of other threads.

        Args:
            stream: Work on this stream (`stream_of`), for its thread; `None` for this thread's own.
        """
        ...

    def finish(self) -> None:
        """Wait until all that work is done; its tensors may be freed then."""
        ...


def stream_of(device: torch.device) -> Any:
    """Return the stream on which this thread works, for `Recorder.in_turn`; `None` where a device has no graphs."""
    graphs = graphs_of(device.type)
    return None if graphs is None else graphs.current_stream(device)


def unrecordable_on(device: torch.device) -> str | None:
    """Return the reason why nothing can be recorded on a device, or `None`."""
    graphs = graphs_of(device.type)
    return f"torch has no graphs for {device.type}" if graphs is None else graphs.missing()


# One capture at a time in a process, as torch wants it.
_capturing = lock()
_choosing = lock()
_recorders: weakref.WeakSet[GraphRecorder] = weakref.WeakSet()
_STREAMS = 32
"""Streams that torch has for a device; `new_stream` returns one after the other, again and again."""
_here = threading.local()


def is_recording() -> bool:
    """Check that this thread is recording. Recorded modules inside are then a part of the outer recording."""
    return getattr(_here, "recording", False)


@contextmanager
def recording() -> Generator[None, None, None]:
    """Mark this thread as recording while open."""
    before = is_recording()
    _here.recording = True
    try:
        yield
    finally:
        _here.recording = before


class _Graph(NamedTuple):
    graph: Any
    outputs: Any
    recorder: GraphRecorder
    """Kept, since its stream is this graph's own as long as there is one of the two."""

    def replay(self) -> None:
        self.graph.replay()


class GraphRecorder:
    """Records graphs of a device (`DeviceGraphs`) with one memory pool. Any thread may replay one, on its own stream.

    They are plain graphs, not inductor's CUDA graph trees. Graphs of one pool reuse each other's intermediate tensors,
    so their replays must not overlap: `in_turn` orders them. docs/decisions/0009-cuda.md says what ran on a device.

    Args:
        device: The device. It need not be the current one.

    Raises:
        RuntimeError: torch has no graphs for it.
    """

    def __init__(self, device: torch.device) -> None:
        reason = unrecordable_on(device)
        graphs = graphs_of(device.type)
        if reason is not None or graphs is None:
            raise RuntimeError(f"nothing can be recorded on {device}: {reason}")
        self._device, self._graphs = device, graphs
        with graphs.on_device(device):
            self._pool, self._done = graphs.new_pool(), graphs.new_event()
        with _choosing:
            self._side = self._free_stream()
            _recorders.add(self)

    def _free_stream(self) -> Any:
        """Return a stream for captures, on which no other recorder captures, as long as torch has one.

        cuBLAS has a workspace for each stream, which a capture allocates in the pool of its graphs. Replays of two
        recorders may overlap, and must not write to the same one; and if a graph goes, torch frees the workspaces of
        its stream, though other graphs still read them (PyTorch 193402). Within one pool and in turns neither matters.
        """
        used = [other._side for other in _recorders if other._device == self._device]
        with self._graphs.on_device(self._device):
            found = self._graphs.new_stream()
            for _ in range(_STREAMS):
                if found not in used:
                    break
                found = self._graphs.new_stream()
        return found

    def record(self, run: Callable[[], Any]) -> Replayable:
        """See `Recorder.record`. The computation runs three times, the last time for the capture."""
        graphs = self._graphs
        with _capturing, recording(), graphs.on_device(self._device):
            for _ in range(2):  # libraries set themselves up in their first calls, which a capture must not contain
                run()
            return _Graph(*graphs.capture(run, self._pool, self._side), self)

    @contextmanager
    def in_turn(self, *, stream: Any = None) -> Generator[None, None, None]:
        """See `Recorder.in_turn`. Streams of different threads are ordered by an event.

        Memory belongs to the stream that allocated it. If work on another stream used it, the allocator would reuse it
        after the free, before that work is done.
        """
        graphs = self._graphs
        with graphs.on_device(self._device):
            stream = stream or graphs.current_stream(self._device)
            with graphs.on_stream(stream):
                stream.wait_event(self._done)
                try:
                    yield
                finally:
                    # A new one: XPU's event frees what `finish` of another thread waits for, if it is recorded again.
                    done = graphs.new_event()
                    done.record(stream)
                    self._done = done

    def finish(self) -> None:
        """See `Recorder.finish`. The allocator returns freed memory to its own stream at once."""
        self._done.synchronize()
