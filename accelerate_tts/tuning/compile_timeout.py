"""C++ compilers that do not return: an interruption ends them, since Python cannot leave the call that waits for one.

`torch.compile` has inductor start a compiler, and waits for it in native code.
One that hangs (a licence server, a dead network drive, a sick wrapper script) would hold a load for ever.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.errors import TimeLimitError
from accelerate_tts.runtime.time_limit import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = ["compiling_within"]

T = TypeVar("T")

_DRAINED = 5.0  # seconds that what is queued behind a hanging compiler may take to come to its own, and to its end
_MOMENT = 0.02


def compiling_within(seconds: float | None, what: str, work: Callable[[], T]) -> T:
    """`watchdog.within` for work that may compile: what it then waits for is stopped.

    Stopped is what inductor's own code has started since, for this thread or in its pool of threads, and waits for;
    with its descendants. No other child of this process is: how inductor's are known is by the stack of the thread that
    waits.

    Raises:
        TimeLimitError: The work was interrupted; the message names the compilers that were stopped.
    """
    compilers = _Compilers()
    try:
        return within(seconds, what, work, compilers.stop)
    except TimeLimitError:
        compilers.drain()
        raise


class _Compilers:
    """The compilers that are started from now on for this thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._before = {process.pid for process in self._waited_for() if process is not None}

    def stop(self) -> str:
        """Stop what is there now; says what that was, or ""."""
        stopped: list[str] = []
        for process in self._waited_for():
            if process is not None and process.pid not in self._before:
                stopped.append(_name(process))
                _kill(process.pid)
        return f"its compiler ({', '.join(sorted(set(stopped)))}) did not return and was stopped" if stopped else ""

    def drain(self) -> None:
        """Stop what its pool of threads had still to do; the next compilation would have to wait for it."""
        end = time.monotonic() + _DRAINED
        while list(self._waited_for()) and time.monotonic() < end:
            self.stop()
            time.sleep(_MOMENT)

    def _waited_for(self) -> Iterator[subprocess.Popen[bytes] | None]:
        """For each thread in which inductor compiles: the process that it waits for, or `None` just now."""
        if "torch._inductor" not in sys.modules:
            return
        for thread, frame in sys._current_frames().items():
            modules, process = _stack(frame)
            # A user's own torch.compile in a thread of his comes to inductor by way of dynamo; its pool does not.
            is_pool = any(name == "torch._inductor.codecache" for name in modules) and not any(
                name.startswith("torch._dynamo") for name in modules
            )
            if (thread == self._thread and process is not None) or (thread != self._thread and is_pool):
                yield process


def _stack(frame: FrameType | None) -> tuple[set[str], subprocess.Popen[bytes] | None]:
    """The modules on a thread's stack, and the process that inductor waits for there."""
    modules: set[str] = set()
    waiting: subprocess.Popen[bytes] | None = None
    process: subprocess.Popen[bytes] | None = None
    caller = True
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        modules.add(name)
        if caller and name == subprocess.__name__:
            found = frame.f_locals.get("self")
            # Without a number it is only about to be started.
            if isinstance(found, subprocess.Popen) and getattr(found, "pid", None):
                waiting = found
        elif caller and waiting is not None:
            caller = False
            process = waiting if name.startswith("torch._inductor.") else None
        frame = frame.f_back
    return modules, process


def _name(process: subprocess.Popen[bytes]) -> str:
    given: Any = process.args
    return str(given if isinstance(given, str) else next(iter(given), "")).split()[0]


def _kill(pid: int) -> None:
    import psutil

    with suppress(psutil.Error):  # it has come to its end meanwhile
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                one.kill()
