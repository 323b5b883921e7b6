"""The naive baseline: `torch.compile` of the hot module, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench.measure import Ratio, difference, spoken
from accelerate_tts.errors import AccelerateTTSError

if TYPE_CHECKING:
    from collections.abc import Generator

    from accelerate_tts.cli.bench.systems import Built


@dataclass(frozen=True)
class Naive:
    """Measurements of `torch.compile` alone.

    Attributes:
        whole: Ratio of a whole call, untouched and compiled alternately.
        compiling: Seconds of the first compiled call.
        graphs: Number of compiled graphs.
        error: As `Measured.error`. It is large if the system draws random numbers, which compiled code draws
            differently.
        same_tokens: As `Measured.same_tokens`.
        peak: Maximum resident bytes of its process.
    """

    whole: Ratio
    compiling: float
    graphs: int
    error: float | None = None
    same_tokens: bool | None = None
    peak: int | None = None


def naive(built: Built, seconds: float, pairs: int, backend: Any = "inductor") -> Naive:
    """Compile the hot module's `forward`, then time whole calls, untouched and compiled alternately.

    Args:
        built: The untouched system.
        seconds: Seconds of speech of one call.
        pairs: Number of pairs of calls.
        backend: Backend of `torch.compile`.

    Raises:
        AccelerateTTSError: No graph was compiled, so the untouched system would be timed.
        Exception: Any exception of torch's compiler, as its user would see it.
    """
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(built.hot.forward, backend=backend)
    expected = spoken(built, seconds)[1]
    with _in_place(built.hot, compiled):
        compiling, found = spoken(built, seconds)
        spoken(built, seconds)  # lengths that are static in the first call may become dynamic in the second
    graphs = int(counters["stats"]["unique_graphs"])
    if not graphs:
        raise AccelerateTTSError("no graph was compiled: dynamo skipped all of it")
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        before = spoken(built, seconds)[0]
        with _in_place(built.hot, compiled):
            times.append((before, spoken(built, seconds)[0]))
    return Naive(Ratio.of(times), compiling, graphs, *difference(expected, found))


@contextmanager
def _in_place(module: Any, forward: Any) -> Generator[None, None, None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
