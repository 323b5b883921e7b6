"""Graphs of a device: launches that torch records, and starts again all at once. CUDA's, ROCm's and XPU's.

The stages that record ask this seam and no module of torch, so that a device type is added by its `DeviceSpec`, and a
test may put a stand-in in its place.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from accelerate_tts.device.detect import SPECS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    import torch


class DeviceGraphs:
    """Graphs of one type of device. torch has one interface for all of them, but for names and options.

    `torch.accelerator.Graph`, which hides the rest, is too new: CUDA's graphs serve from torch 2.6 on.

    Args:
        type: torch's name of the device type.
        graph: Name of the class of graphs in `torch.<type>`.
        since: The first release of torch with that class.
        priority: Priority of the streams that capture; 0 is everybody's.
        options: Options of a capture, beside its pool and stream.

    Attributes:
        internals: Module with the functions of torch that have no public name; `None` for `torch._C`. Tests give
            another object.
    """

    internals: Any = None

    def __init__(self, type: str, graph: str, since: str, priority: int = 0, **options: Any) -> None:  # noqa: A002 - torch's name
        self.type = type
        self._graph, self._since, self._priority, self._options = graph, since, priority, options
        self._last: dict[Any, Any] = {}  # pool of the last capture, by the handle of its stream

    @property
    def _torch(self) -> Any:
        import torch

        return getattr(torch, self.type)

    def _internal(self, *names: str) -> Callable[..., Any] | None:
        """Return torch's function of the first of these names that it has, or `None`."""
        import torch

        source = torch._C if self.internals is None else self.internals
        return next(filter(None, (getattr(source, name, None) for name in names)), None)

    def missing(self) -> str | None:
        """Return the reason why this torch has no such graphs, or `None`."""
        import torch

        if hasattr(getattr(torch, self.type, None), self._graph):
            return None
        return f"torch {torch.__version__} has no torch.{self.type}.{self._graph}; torch {self._since} has"

    def is_capturing(self) -> bool:
        """Check that launches of this thread are being captured rather than run."""
        return self.missing() is None and bool(self._torch.is_current_stream_capturing())

    def on_device(self, device: torch.device) -> AbstractContextManager[object]:
        """Make `device` the current one while open."""
        return self._torch.device(device)  # type: ignore[no-any-return]

    def current_stream(self, device: torch.device) -> Any:
        """Return the stream on which this thread works on `device`."""
        return self._torch.current_stream(device)

    def on_stream(self, stream: Any) -> AbstractContextManager[object]:
        """Let this thread work on `stream` while open."""
        return self._torch.stream(stream)  # type: ignore[no-any-return]

    def new_stream(self) -> Any:
        """Return a stream of the current device, for captures.

        What a thread starts on it meanwhile becomes a part of the graph, whoever it is. torch has 32 streams of each
        priority and gives them to everybody in turn, so it is of one that few ask for.
        """
        return self._torch.Stream(priority=self._priority) if self._priority else self._torch.Stream()

    def new_event(self) -> Any:
        """Return an event, which counts as past until it is recorded."""
        return self._torch.Event()

    def new_pool(self) -> Any:
        """Return a memory pool for captures."""
        return self._torch.graph_pool_handle()

    def capture(self, run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Any, Any]:
        """Capture a computation on the current device. Other threads may continue their own work on it meanwhile.

        Args:
            run: The computation. It runs once.
            pool: Memory pool of the captures with which its tensors share memory.
            stream: Stream of those captures, which nothing else uses. torch's own one belongs to the device that
                captured first; for any other device the graph would be empty.

        Returns:
            The graph, which has `replay()`, and the result, which each replay overwrites.

        Raises:
            Exception: The computation failed, or an operation in it is not allowed in a capture. The current stream
                and the random number generator are put back.
        """
        before = self._torch.current_stream()
        graph = getattr(self._torch, self._graph)()
        self._own_workspaces(stream, pool)
        try:
            with _no_collection(), self._torch.graph(graph, pool=pool, stream=stream, **self._options):
                outputs = run()
        except BaseException:
            self._put_back(before, graph, pool, stream)
            raise
        return graph, outputs

    def _own_workspaces(self, stream: Any, pool: Any) -> None:
        """See that cuBLAS's workspaces in the next capture are in its own memory pool.

        torch keeps one for each stream and thread, wherever it was allocated. A graph that took one out of the pool of
        other graphs would be replayed beside them, and read freed memory once they are gone.
        """
        handle = getattr(stream, "cuda_stream", None)
        if handle is not None and self._last.get(handle, pool) != pool:
            clear = self._internal("_cuda_clearCublasWorkspaces")
            if clear is None:
                raise RuntimeError("this torch has no function that clears cuBLAS's workspaces")
            clear()  # those in pools are free for their graphs, as all else there
        self._last[handle] = pool

    def _put_back(self, before: Any, graph: Any, pool: Any, stream: Any) -> None:
        """Make the device usable after a failed capture, whose end raises before torch has tidied up (2.6 to 2.14).

        The capture's stream stays the current one, and the default generator goes on counting for the graph: the next
        random number would fail. A capture that was interrupted between its beginning and its first operation goes on,
        and the device cannot be waited for. Up to torch 2.11 the allocator takes the capture for unfinished, and gives
        nothing back.
        """
        self._torch.set_stream(stream)
        with suppress(RuntimeError):
            if self._torch.is_current_stream_capturing():
                graph.capture_end()
        self._torch.set_stream(before)
        # The second name is torch 2.6's.
        end = self._internal(f"_{self.type}_endAllocateToPool", f"_{self.type}_endAllocateCurrentStreamToPool")
        if end is not None:
            with suppress(RuntimeError):  # it has ended
                end(before.device_index, pool)
        generator = self._torch.default_generators[before.device_index]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _no_collection() -> Generator[None, None, None]:
    """Keep the garbage collector from what it may find, such as an event: a capture must not wait for one."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_forbidden(error: BaseException) -> bool:
    """Check for the error of an operation that a capture does not allow, as CUDA and torch word it."""
    said = ("stream is captur", "during capture", "graph capture")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def graphs_of(device_type: str) -> DeviceGraphs | None:
    """Return the graphs of a device type; `None` if it has none in any torch."""
    spec = SPECS.get(device_type)
    return None if spec is None else spec.graphs


def is_capturing(device: torch.device) -> bool:
    """Check that launches of this thread on a device are being captured rather than run."""
    graphs = None if device.type == "cpu" else graphs_of(device.type)
    return graphs is not None and graphs.is_capturing()
