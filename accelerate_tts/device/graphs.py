"""Graphs of a device: launches that torch records, and starts again all at once. CUDA's, ROCm's and XPU's.

The stages that record ask this seam and no module of torch, so that a device type is added by its `DeviceSpec`, and a
test may put a stand-in in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.device.detect import SPECS

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch


class DeviceGraphs:
    """Graphs of one type of device. torch has one interface for all of them, but for names and options.

    `torch.accelerator.Graph`, which hides the rest, is too new: CUDA's graphs serve from torch 2.6 on.

    Args:
        type: torch's name of the device type.
        graph: Name of the class of graphs in `torch.<type>`.
        since: The first release of torch with that class.
        options: Options of a capture, beside its pool and stream.
    """

    def __init__(self, type: str, graph: str, since: str, **options: Any) -> None:  # noqa: A002 - torch's name
        self.type = type
        self._graph, self._since, self._options = graph, since, options

    @property
    def _torch(self) -> Any:
        import torch

        return getattr(torch, self.type)

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
        """Return a stream of the current device."""
        return self._torch.Stream()

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
        try:
            with self._torch.graph(graph, pool=pool, stream=stream, **self._options):
                outputs = run()
        except BaseException:
            self._put_back(before)
            raise
        return graph, outputs

    def _put_back(self, stream: Any) -> None:
        """Make the device usable after a failed capture, whose end raises before torch has tidied up (2.6 to 2.14).

        The capture's stream stays the current one, and the default generator goes on counting for the graph: the next
        random number would fail.
        """
        self._torch.set_stream(stream)
        generator = self._torch.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())


def graphs_of(device_type: str) -> DeviceGraphs | None:
    """Return the graphs of a device type; `None` if it has none in any torch."""
    spec = SPECS.entries().get(device_type)
    return None if spec is None else spec.graphs


def is_capturing(device: torch.device) -> bool:
    """Check that launches of this thread on a device are being captured rather than run."""
    graphs = None if device.type == "cpu" else graphs_of(device.type)
    return graphs is not None and graphs.is_capturing()
