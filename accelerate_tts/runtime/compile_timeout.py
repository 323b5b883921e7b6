"""Time limits on work that compiles: a hanging C++ compiler is killed, since Python cannot interrupt a wait for it.

inductor starts a compiler and waits for it in native code. A compiler that hangs (for a licence server, a dead network
drive or a broken wrapper script) would block a load forever.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from accelerate_tts.errors import TimeLimitError
from accelerate_tts.runtime.time_limit import within

T = TypeVar("T")

_DRAINED = 5.0  # maximum seconds in which compilations queued behind a hanging compiler are stopped
_MOMENT = 0.02


def compiling_within(seconds: float | None, what: str, work: Callable[[], T]) -> T:
    """Run `time_limit.within` for work that may compile, and stop the compilers that it waits for.

    Compilers that inductor has started since for this thread, or in its thread pool, are killed with their descendants.
    They are identified by the stack of the waiting thread; no other child process is touched.

    Raises:
        TimeLimitError: The work was interrupted. The message names the stopped compilers.
    """
    compilers = Compilers()
    try:
        return within(seconds, what, work, compilers.stop)
    except TimeLimitError:
        compilers.drain()
        raise


class Compilers:
    """Compilers that are started for this thread after the construction of this object."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._before = {process.pid for process in self.waited_for() if process is not None}

    def stop(self) -> str:
        """Stop the running compilers; return a clause that names them, or ""."""
        stopped: list[str] = []
        for process in self.waited_for():
            if process is not None and process.pid not in self._before:
                stopped.append(_name(process))
                _kill(process.pid)
        return f"its compiler ({', '.join(sorted(set(stopped)))}) did not return and was stopped" if stopped else ""

    def drain(self) -> None:
        """Stop the queued compilations of the thread pool, which would delay the next one."""
        end = time.monotonic() + _DRAINED
        while list(self.waited_for()) and time.monotonic() < end:
            self.stop()
            time.sleep(_MOMENT)

    def waited_for(self) -> Iterator[subprocess.Popen[bytes] | None]:
        """Yield, for each thread in which inductor compiles, the process that it waits for, or `None`."""
        if "torch._inductor" not in sys.modules:
            return
        for thread, frame in sys._current_frames().items():
            modules, process = on_stack(frame)
            # A user's torch.compile on another thread has dynamo on its stack; inductor's pool does not.
            is_pool = any(name == "torch._inductor.codecache" for name in modules) and not any(
                name.startswith("torch._dynamo") for name in modules
            )
            if (thread == self._thread and process is not None) or (thread != self._thread and is_pool):
                yield process


def on_stack(frame: FrameType | None) -> tuple[set[str], subprocess.Popen[bytes] | None]:
    """Return the modules on a thread's stack, and the process that inductor waits for there."""
    modules: set[str] = set()
    waiting: subprocess.Popen[bytes] | None = None
    process: subprocess.Popen[bytes] | None = None
    caller = True
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        modules.add(name)
        if caller and name == subprocess.__name__:
            found = frame.f_locals.get("self")
            # Without a pid it is not started yet.
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

    with suppress(psutil.Error):  # it may have ended
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                one.kill()
