"""Recorders: what records a computation at fixed addresses, and replays it. CUDA graphs are one.

The protocols keep the stages free of CUDA: tests without a device pass a recorder that runs the computation again.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from accelerate_tts.locks import lock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager


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
    """Return the stream on which this thread works, for `Recorder.in_turn`; `None` where a device has none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


# One capture at a time in a process: torch captures on one stream of its own.
_capturing = lock()
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


def capture(run: Callable[[], Any], pool: Any = None) -> tuple[Any, Any]:
    """Capture a computation on the current CUDA device.

    Args:
        run: The computation. It runs three times, the last time for the capture.
        pool: Memory pool of earlier captures; `None` for a new one.

    Returns:
        The `torch.cuda.CUDAGraph`, and the result, which each replay overwrites.

    Raises:
        Exception: The computation failed, or an operation in it is not allowed in a capture. The current stream and
            the random number generator are put back.
    """
    with _capturing, recording():
        stream = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries allocate workspaces in their first calls, which a capture must not contain
                run()
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may continue their own work on the device during the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = run()
        except BaseException:
            _put_back(stream)
            raise
        return graph, outputs


def _put_back(stream: Any) -> None:
    """Make the device usable after a failed capture, whose end raises before torch has tidied up (2.6 to 2.14).

    The capture's stream stays the current one, and the default generator goes on counting for the graph: the next
    random number would fail.
    """
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())


class _CudaGraph(NamedTuple):
    graph: Any
    outputs: Any

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records CUDA graphs with one memory pool. Any thread may replay one, on its own stream.

    They are plain graphs, not inductor's CUDA graph trees. Graphs of one pool reuse each other's intermediate tensors,
    so their replays must not overlap: `in_turn` orders them. docs/decisions/0009-cuda.md says what ran on a device.

    Args:
        device: The CUDA device. It need not be the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], Any]) -> Replayable:
        """See `Recorder.record`."""
        with torch.cuda.device(self._device):
            return _CudaGraph(*capture(run, self._pool))

    @contextmanager
    def in_turn(self, *, stream: Any = None) -> Generator[None, None, None]:
        """See `Recorder.in_turn`. Streams of different threads are ordered by an event.

        Memory belongs to the stream that allocated it. If work on another stream used it, the allocator would reuse it
        after the free, before that work is done.
        """
        with torch.cuda.device(self._device):
            stream = stream or torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                stream.wait_event(self._done)
                try:
                    yield
                finally:
                    self._done.record(stream)

    def finish(self) -> None:
        """See `Recorder.finish`. The allocator returns freed memory to its own stream at once."""
        self._done.synchronize()
