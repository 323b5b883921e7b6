"""The thread that runs inductor's CUDA graphs, which belong to a thread.

torch (to 2.12 by its source; later releases do not promise otherwise) keeps recorded CUDA graph trees by thread. A pool
of threads would record a part once a thread, with as much memory each. Recorded parts therefore run on one thread,
while the callers wait. It gets the caller's context variables (dynamo's configuration is one), modes, random
numbers and stream.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar, cast

from accelerate_tts.locks import lock

T = TypeVar("T")


class OwnerThread:
    """Runs calls in sequence on a thread of its own, which starts with the first call and ends with the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = lock()
        self._forget()

    def _forget(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the thread and wait for it. On the thread itself it runs directly.

        Raises:
            BaseException: The function's own exception.
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
            except BaseException as error:  # raised in the caller; this thread continues
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
            del error  # it refers to this frame, and a cycle would keep its tensors alive

    def _started(self) -> threading.Thread:
        with self._lock:
            if self._process != os.getpid():  # threads do not survive a fork
                self._forget()
            if self._thread is None:
                # Not a method: the thread refers to its queue only, not to this object.
                self._thread = threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True)
                self._thread.start()
            return self._thread


def _serve(calls: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        run = calls.get()
        run()
        del run  # frees the result on this thread while it waits


def _modes_of_this_thread() -> Callable[[], ExitStack]:
    """Return a function that enters the caller's modes, random numbers and stream on another thread."""
    import torch

    from accelerate_tts.runtime.caller_settings import CallerSettings
    from accelerate_tts.runtime.own_random import Entry, opened

    own = opened()
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    caller = CallerSettings()

    def enter() -> ExitStack:
        modes = ExitStack()
        modes.enter_context(torch.inference_mode(mode=inference))
        modes.enter_context(torch.set_grad_enabled(gradients))
        modes.enter_context(caller.entered())
        if own is not None:
            modes.enter_context(Entry(own))
        return modes

    return enter


def _under(modes: Callable[[], ExitStack], function: Callable[[], T]) -> T:
    with modes():
        return function()


_owner = OwnerThread("accelerate_tts CUDA graphs")


def graph_owner() -> OwnerThread:
    """Return the thread that runs all CUDA graphs of this process."""
    return _owner
