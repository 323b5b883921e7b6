"""One thread that owns what belongs to a thread: inductor's CUDA graphs.

torch (to 2.12 by its source, and not promised later) keeps the trees of recorded graphs by thread: a part that is
served from a pool of threads would be recorded once in each, with the memory of each. So whatever is recorded runs on
one thread, and the callers wait for it. It is given the caller's context variables (dynamo's configuration is one), its
autograd mode and its stream.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar, cast

from accelerate_tts.locks import lock

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OwnerThread", "graph_owner"]

T = TypeVar("T")


class OwnerThread:
    """Runs calls one after the other on a thread of its own, which starts with the first and ends with the process.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = lock()
        self._forget()

    def _forget(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the thread and wait for it; directly, if this is the thread.

        Raises:
            BaseException: What the function raises, as it raised it.
        """
        thread = self._started()
        if threading.current_thread() is thread:
            return function()
        outcome: list[tuple[T | None, BaseException | None]] = []
        done = threading.Event()
        context, modes = contextvars.copy_context(), _modes_of_this_thread()

        def run() -> None:
            try:
                outcome.append((context.run(_under, modes, function), None))
            except BaseException as error:  # it is the caller's, and this thread goes on
                outcome.append((None, error))
            done.set()

        self._calls.put(run)
        done.wait()
        value, error = outcome.pop()
        if error is None:
            return cast("T", value)
        try:
            raise error
        finally:
            del error  # it refers to this frame: no circle that keeps its tensors

    def _started(self) -> threading.Thread:
        with self._lock:
            if self._process != os.getpid():  # threads do not survive a fork
                self._forget()
            if self._thread is None:
                # Not this object's method: a thread that refers to its own queue only can be dropped with it.
                self._thread = threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True)
                self._thread.start()
            return self._thread


def _serve(calls: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        run = calls.get()
        run()
        del run  # what it returned is the caller's alone, while this thread waits


def _modes_of_this_thread() -> Callable[[], ExitStack]:
    """What enters the caller's autograd mode and CUDA stream, wherever it is called."""
    import torch

    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def enter() -> ExitStack:
        modes = ExitStack()
        modes.enter_context(torch.inference_mode(mode=inference))
        modes.enter_context(torch.set_grad_enabled(gradients))
        if stream is not None:
            modes.enter_context(torch.cuda.stream(stream))
        return modes

    return enter


def _under(modes: Callable[[], ExitStack], function: Callable[[], T]) -> T:
    with modes():
        return function()


_owner = OwnerThread("accelerate_tts CUDA graphs")


def graph_owner() -> OwnerThread:
    """The thread that all of this process's CUDA graphs belong to."""
    return _owner
