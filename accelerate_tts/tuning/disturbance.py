"""Disturbance of the machine: the share of the processors that other programs took from a piece of work.

Timings of a disturbed machine are not just noisy. Threads that wait for each other at each layer take five to fifty
times as long once one of them has no processor, whatever they compute, and every ratio becomes one
(docs/decisions/0014-tuning-budget-and-noise.md). So tuning checks the machine before it uses a figure.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate_tts.device.usage import TICK, Usage, usage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from accelerate_tts.tuning.timing import Timing

_LIMIT = 0.1
# A timing counts as undisturbed if its threads waited for less than this share of it.
_CLEAN = 0.05
# The system's counters show whether another program ran during a timing of this many seconds.
_COUNTABLE = 5 * TICK
# A probe that takes this many times as long as the fastest one shows that other programs use the memory.
_SLOWER = 1.5
_LOOK = 0.25
# Idle threads of a library spin before they sleep: 25 ms those of OpenBLAS (device/openblas.py), less those of OpenMP.
_SPINNING = 0.05
# Runnable threads of this process that can wait behind one other program on a processor, as a rule at most.
_QUEUED = 2
_PROBES, _FLOATS, _WIDTH = 3, 4 << 20, 256


@dataclass(frozen=True)
class Disturbance:
    """Disturbance during a period.

    Attributes:
        share: Share of the available processor time that the work did not get; 0.0 on a quiet machine.
        why: The cause in words; "" without one.
        waits: True if it shows in the time that threads wait for a processor. Time taken by a hypervisor does not.
        memory: True if no processor was taken, and the memory or the arithmetic was slower than before.
    """

    share: float = 0.0
    why: str = ""
    waits: bool = False
    memory: bool = False

    @property
    def quiet(self) -> bool:
        """True if timings of that period are reliable."""
        return self.share <= _LIMIT


QUIET = Disturbance()


class Machine:
    """Measurements of this machine that a `Watcher` needs. Tests give another one, with fixed values."""

    def __init__(self) -> None:
        self._work: Callable[[], object] | None = None

    def usage(self) -> Usage:
        """Read the counters."""
        return usage()

    def probe(self) -> float:
        """Return the best seconds of three runs that read 16 MB and multiply two matrices: about 10 ms."""
        import torch

        with torch.inference_mode():
            if self._work is None:
                plain: Any = {"dtype": torch.float32, "device": "cpu"}  # independent of the user's defaults
                memory, matrix = torch.ones(_FLOATS, **plain), torch.ones(_WIDTH, _WIDTH, **plain)
                self._work = lambda: (memory.sum(), matrix @ matrix)
                self._work()
            best = float("inf")
            for _ in range(_PROBES):
                start = time.perf_counter()
                self._work()
                best = min(best, time.perf_counter() - start)
        return best

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Let torch compute on one thread while open. Its processor time hardly depends on other programs."""
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        try:
            torch.set_num_threads(threads)
        except BaseException:  # Ctrl-C in it
            torch.set_num_threads(threads)
            raise


def between(first: Usage, second: Usage, team: int) -> Disturbance:
    """Compute the disturbance of a team of threads between two readings.

    Args:
        first: The earlier reading.
        second: The later reading.
        team: Number of processors that the work uses at a time.
    """
    wall = max(second.at - first.at, 1e-9)
    could = wall * min(team, first.processors)
    parts: list[tuple[float, str, bool]] = []
    if first.busy is not None and second.busy is not None:
        others = max(0.0, second.busy - first.busy - (second.own - first.own))
        spare = wall * (first.processors - min(team, first.processors))
        blur = TICK * min(team, first.processors)  # resolution of the counters
        taken = max(0.0, others - spare - blur)
        if first.waited is not None and second.waited is not None:
            # The kernel counts in nanoseconds, and includes threads of this process that block each other: others
            # cannot have caused more than they had time for.
            held = min(max(0.0, second.waited - first.waited), _QUEUED * others)
            taken = max(taken, held) if others > blur and second.own > first.own else taken
        parts.append((taken, f"other processes used {others / wall:.1f} of {first.processors} processors", True))
    if first.stolen is not None and second.stolen is not None:
        stolen = max(0.0, second.stolen - first.stolen - TICK)
        parts.append((stolen, f"the hypervisor took {stolen / wall:.1f} of {first.processors} processors", False))
    if first.throttled is not None and second.throttled is not None:
        held = max(0.0, second.throttled - first.throttled)
        parts.append(
            (held * min(team, first.processors), f"a quota held it back for {held / wall:.0%} of the time", True)
        )
    worst, why, waits = max(parts, default=(0.0, "", False))
    share = min(1.0, worst / could)
    return Disturbance(share, why, waits) if share > _LIMIT else Disturbance(share)


@dataclass
class Window:
    """A watched period. `disturbance` is set at its end."""

    disturbance: Disturbance = QUIET


@dataclass
class Watcher:
    """Watches for disturbances during one tuning, or one run of the bench.

    Attributes:
        machine: Source of the measurements.
        team: Number of processors that the work uses at a time.
        patience: Seconds left for waiting for a quiet machine.
        worst: The largest disturbance so far.
        waited: Seconds waited so far.
    """

    machine: Machine
    team: int
    patience: float = 0.0
    worst: Disturbance = QUIET
    waited: float = 0.0
    _best: float = field(default=float("inf"), repr=False)

    @contextmanager
    def window(self) -> Generator[Window, None, None]:
        """Watch the work while open."""
        window = Window()
        before, first = self.probe(), self.machine.usage()
        try:
            yield window
        finally:
            found = between(first, self.machine.usage(), self.team)
            slowest = min(before, self.probe()) / self._best
            if found.quiet and slowest > _SLOWER:
                why = f"a probe of memory and arithmetic took {slowest:.1f}x its time"
                found = Disturbance(1 - 1 / slowest, why, memory=True)
            window.disturbance = found
            if found.share > self.worst.share:
                self.worst = found

    def probe(self) -> float:
        """Run a probe and return its seconds. Later probes are compared with the best one.

        A slow one is repeated after a pause, since this process's own threads may have been spinning after their work.
        """
        seconds = self.machine.probe()
        if seconds > _SLOWER * self._best:
            self.machine.sleep(_SPINNING)
            seconds = min(seconds, self.machine.probe())
        self._best = min(self._best, seconds)
        return seconds

    def clean(self) -> Callable[[], bool]:
        """Begin a short timing; return a function that checks at its end that others did not disturb it."""
        first = self.machine.usage()

        def ended() -> bool:
            now = self.machine.usage()
            if first.waited is None or now.waited is None:
                return True
            seconds = now.at - first.at
            if now.waited - first.waited <= _CLEAN * seconds * self.team:
                return True
            if first.busy is None or now.busy is None or seconds < _COUNTABLE:
                return False
            # Its own threads kept each other waiting, if no other program ran meanwhile.
            return now.busy - first.busy - (now.own - first.own) <= TICK * now.processors

        return ended

    def believes(self, timing: Timing, found: Disturbance) -> bool:
        """Check that a comparison is reliable: the machine was quiet, or no pair of it was disturbed."""
        return found.quiet or (found.waits and timing.clean and self.machine.usage().waited is not None)

    def look(self) -> Disturbance:
        """Measure the disturbance for a quarter of a second, while this process sleeps."""
        first = self.machine.usage()
        self.machine.sleep(_LOOK)
        return between(first, self.machine.usage(), self.team)

    def wait(self) -> bool:
        """Wait until the machine is quiet, while there is patience; return True if it is.

        The patience is for the whole tuning, so an always busy machine is waited for once.
        """
        while True:
            found = self.look()
            self.waited += _LOOK
            self.patience -= _LOOK
            if found.quiet:
                return True
            if self.patience <= 0:
                return False
