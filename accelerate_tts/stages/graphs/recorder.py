"""Recorders: what records a computation at fixed addresses, and replays it. CUDA graphs are one.

The protocols keep the stages free of CUDA: tests without a device pass a recorder that runs the computation again.
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager, suppress
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


_capturing = lock()  # one capture at a time in a process
_PRIORITY = -3
"""Priority of the streams that capture. torch makes 32 streams of each priority, and gives them to everybody in turn.
What a thread starts on a stream that captures becomes a part of the graph, whoever it is, and few ask for this one."""
_warm_ups: dict[int, Any] = {}  # stream for the runs before a capture, by the device's number
_pools: dict[int, Any] = {}  # memory pool of the last capture, by the handle of its stream
_here = threading.local()


def is_capturing(device: torch.device) -> bool:
    """Check that the caller captures this thread's work by himself. Ours waits for events, which a capture must not."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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


def capture(run: Callable[[], Any], pool: Any = None, stream: Any = None) -> tuple[Any, Any]:
    """Capture a computation on the current CUDA device.

    Args:
        run: The computation. It runs three times, the last time for the capture.
        pool: Memory pool of earlier captures; `None` for a new one.
        stream: Stream of the device that captures, and runs nothing else (`stream_to_capture`); `None` for a new one.

    Returns:
        The `torch.cuda.CUDAGraph`, and the result, which each replay overwrites.

    Raises:
        Exception: The computation failed, or an operation in it is not allowed in a capture. The current stream and
            the random number generator are put back.
    """
    with _capturing, recording():
        before = torch.cuda.current_stream()
        pool = pool or torch.cuda.graph_pool_handle()
        stream = stream or stream_to_capture()
        # Not on the stream that captures: cuBLAS keeps a workspace for each stream, and a graph needs one in its pool.
        warm_up = _warm_ups.get(before.device_index) or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        _warm_ups[before.device_index] = warm_up
        warm_up.wait_stream(before)
        with torch.cuda.stream(warm_up):
            for _ in range(2):  # libraries allocate in their first calls, and look for kernels
                run()
        before.wait_stream(warm_up)
        _own_workspaces(stream, pool)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may continue their own work on the device during the capture.
            mode = "thread_local"
            with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                outputs = run()
        except BaseException:
            _put_back(before, graph, pool, stream)
            raise
        return graph, outputs


def stream_to_capture() -> Any:
    """Return a stream of the current CUDA device on which nothing but captures should run."""
    # torch's own one for captures is on the device that was the current one when it was made.
    return torch.cuda.Stream(priority=_PRIORITY)  # type: ignore[no-untyped-call]


def _own_workspaces(stream: Any, pool: Any) -> None:
    """See that cuBLAS's workspaces in the next capture are in its own memory pool.

    torch keeps one for each stream and thread's handle, wherever it was allocated. A graph that took one out of the
    pool of other graphs would be replayed beside them, and read freed memory once they are gone: since torch 2.12 the
    end of any graph frees those of its stream (github.com/pytorch/pytorch/issues/193402).
    """
    if _pools.get(stream.cuda_stream, pool) != pool:
        torch._C._cuda_clearCublasWorkspaces()  # those in pools are free for the next graph of the pool, as all else
    _pools[stream.cuda_stream] = pool


@contextmanager
def _no_collection() -> Generator[None, None, None]:
    """Keep the garbage collector from what it may find, such as an event: a capture must not wait for one."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_forbidden(error: BaseException) -> bool:
    """Check for the error of an operation that a capture does not allow, as CUDA and torch word it."""
    said = str(error)
    return isinstance(error, RuntimeError) and ("stream is captur" in said or "during capture" in said)


def _put_back(before: Any, graph: Any, pool: Any, stream: Any) -> None:
    """Make the device usable after a failed capture, whose end raises before torch has tidied up (2.6 to 2.14).

    The capture's stream stays the current one, and the default generator goes on counting for the graph: the next
    random number would fail. A capture that was interrupted between its beginning and its first operation goes on, and
    the device cannot be waited for. Up to torch 2.11 the allocator takes the capture for unfinished, and keeps memory.
    """
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    torch.cuda.set_stream(before)
    if (end := getattr(torch._C, "_cuda_endAllocateToPool", None)) is not None:
        with suppress(RuntimeError):  # it has ended
            end(before.device_index, pool)
    generator = torch.cuda.default_generators[before.device_index]
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
            self._stream = stream_to_capture()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], Any]) -> Replayable:
        """See `Recorder.record`."""
        with torch.cuda.device(self._device):
            return _CudaGraph(*capture(run, self._pool, self._stream))

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
