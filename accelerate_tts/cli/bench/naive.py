"""What everyone tries first: `torch.compile` around the module in which the time goes, with nothing else done."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench.measure import Ratio, difference, spoken
from accelerate_tts.errors import AccelerateTTSError

if TYPE_CHECKING:
    from collections.abc import Generator

    from accelerate_tts.cli.bench.systems import Built

__all__ = ["Naive", "naive"]


@dataclass(frozen=True)
class Naive:
    """What `torch.compile` alone gave.

    Attributes:
        whole: A whole call, untouched and compiled in turn.
        compiling: Seconds of the first compiled call.
        graphs: How many graphs were compiled in all.
        error: As `Measured.error`; large where the system draws random numbers, which compiled code draws otherwise.
        same_tokens: As `Measured.same_tokens`.
        peak: The most bytes that were ever resident of its process.
    """

    whole: Ratio
    compiling: float
    graphs: int
    error: float | None = None
    same_tokens: bool | None = None
    peak: int | None = None


def naive(built: Built, seconds: float, pairs: int, backend: Any = "inductor") -> Naive:
    """Compile the hot module's `forward`, which is what runs whoever calls it, then time whole calls in turn.

    Args:
        built: The system, untouched.
        seconds: Seconds of speech of one call.
        pairs: Pairs of calls.
        backend: Of `torch.compile`.

    Raises:
        AccelerateTTSError: No graph was compiled: what was timed would be the untouched system.
        Exception: Whatever torch raises while it compiles; it is what its user would see.
    """
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(built.hot.forward, backend=backend)
    expected = spoken(built, seconds)[1]
    with _in_place(built.hot, compiled):
        compiling, found = spoken(built, seconds)
        spoken(built, seconds)  # lengths that were static in the first call may be dynamic from the second on
    graphs = int(counters["stats"]["unique_graphs"])
    if not graphs:
        raise AccelerateTTSError("no graph was compiled: dynamo left all of it out")
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
