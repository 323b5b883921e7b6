"""The service's side of the worker: starts it, watches it, replaces one that died or hangs."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from service.figures import Figures
from service.options import Options
from service.problems import Failed, TimedOut, Unavailable, bad_request
from service.wire import Message, pack, read

logger = logging.getLogger("service.supervisor")

_HERE = Path(__file__).parent.parent
_REASONS = ("died", "hung")  # of a metric, which has few
_LONGEST_PAUSE = 30.0  # seconds between two tries to load


class WorkerLostError(Exception):
    """The worker died or hung while it had a request."""


@dataclass
class _Request:
    """A request that the worker has, or that it was told to cancel and has not ended yet."""

    ended: Callable[[], None]
    answers: asyncio.Queue[tuple[Message, bytes]] = field(default_factory=asyncio.Queue)
    heard: float | None = None  # when its last sign of life came; `None` while it waits in the worker


class _Process:
    def __init__(self, options: Options, figures: Figures, on_lost: Callable[[], None]) -> None:
        self._options = options
        self._figures = figures
        self._on_lost = on_lost
        self._requests: dict[int, _Request] = {}
        self._pinged: float | None = None
        loop = asyncio.get_running_loop()
        self.models: asyncio.Future[Message] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        """The reason, once the process is of no more use."""

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            path = os.pathsep.join(filter(None, (str(_HERE), os.environ.get("PYTHONPATH"))))
            environment = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"}
            if self._options.plain:
                environment["ACCELERATE_TTS_DISABLE"] = "1"
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "service.worker", str(theirs.fileno()), self._options.for_worker(),
                pass_fds=[theirs.fileno()], env=environment, stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self._child.pid

    async def _read(self) -> None:
        try:
            while True:
                self._take(*await read(self._reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._child.wait()
            self._lose("died", f"by signal {-code}" if code < 0 else f"with exit code {code}")
        except Exception:  # otherwise nobody would notice that nobody reads any more
            logger.exception("the worker %d sent what cannot be read", self.pid)
            self._lose("was misread", "by the service")

    def _take(self, message: Message, samples: bytes) -> None:
        kind = message["kind"]
        if self.lost.done():  # the last words of one that is being replaced
            return
        if kind == "ready":
            self.models.set_result(message["models"])
        elif kind == "pong":
            self._pinged = None
        elif kind == "event":
            self._figures.measured(message["measured"])
        elif kind == "started":
            self._requests[message["id"]].heard = time.monotonic()
        elif kind == "sound":
            request = self._requests[message["id"]]
            request.heard = time.monotonic()
            request.answers.put_nowait((message, samples))
        else:  # done, refused, failed
            request = self._requests.pop(message["id"])
            request.ended()
            request.answers.put_nowait((message, b""))

    def _lose(self, what: str, how: str) -> None:
        if not self.lost.done():
            self._on_lost()
            self.lost.set_result(what)
            level = logging.INFO if what == "was stopped" else logging.ERROR
            logger.log(level, "the worker %d %s %s; it had %d requests", self.pid, what, how, len(self._requests))
        for request in self._requests.values():
            request.answers.put_nowait(({"kind": "lost", "message": f"the worker {what}"}, b""))
        self._requests.clear()

    async def watch(self) -> str:
        """Ping the worker until it is lost, and return the reason."""
        every = min(self._options.ping_seconds, self._options.hang_seconds / 4)
        while True:
            await asyncio.wait({self.lost}, timeout=every)
            if self.lost.done():
                return self.lost.result()
            owed = [r.heard for r in self._requests.values() if r.heard is not None]
            silent = time.monotonic() - min([*owed, self._pinged or time.monotonic()])
            if silent > self._options.hang_seconds:
                self._lose("hung", f"for {silent:.1f} s")
            elif self._pinged is None:
                self._pinged = time.monotonic()
                self._writer.write(pack({"kind": "ping"}))

    async def speak(
        self, key: int, wanted: Message, deadline: float, ended: Callable[[], None]
    ) -> AsyncIterator[np.ndarray]:
        """Yield the pieces, fp32. `ended` is called when the worker is free again, which may be later than the return.

        Raises:
            WorkerLostError: The process was lost.
            Problem: The request was refused, failed or was too slow.
        """
        if self.lost.done():
            raise WorkerLostError(self.lost.result())
        request = self._requests[key] = _Request(ended)
        self._writer.write(pack({"kind": "speak", "id": key, **wanted}))
        try:
            while True:
                try:
                    message, samples = await asyncio.wait_for(request.answers.get(), deadline - time.monotonic())
                except asyncio.TimeoutError:
                    limit = self._options.request_seconds
                    raise TimedOut(f"the speech was not complete within {limit:g} s", code="timeout") from None
                kind = message["kind"]
                if kind == "sound":
                    yield np.frombuffer(samples, dtype=np.float32)
                elif kind == "done":
                    return
                elif kind == "lost":
                    raise WorkerLostError(message["message"])
                elif kind == "refused":
                    raise bad_request(message["message"], message["param"], "unspeakable")
                else:
                    raise Failed(f"the model failed: {message['message']}", code="model_error")
        finally:
            if key in self._requests and not self.lost.done():
                # No awaiting here: the caller's task is being cancelled. The request stays known until the worker has
                # ended it, so that one that hangs is noticed.
                self._writer.write(pack({"kind": "cancel", "id": key}))

    async def end(self) -> None:
        """End the process at once. What it had is lost."""
        self._lose("was stopped", "by the service")
        with suppress(ProcessLookupError):
            self._child.kill()  # SIGKILL, since it may hang or be stopped
        await self._child.wait()
        self._reading.cancel()
        await asyncio.wait({self._reading})
        self._writer.close()


class Supervisor:
    """Keeps one worker process running.

    Attributes:
        models: What the worker serves, by the models' names: rate, voices, receipts. Empty until it was ready once.
        trouble: Reason for which it is not ready, for a person.
    """

    def __init__(self, options: Options, figures: Figures) -> None:
        self.models: Message = {}
        self.trouble = "loading"
        self._options = options
        self._figures = figures
        self._process: _Process | None = None
        self._ready = asyncio.Event()
        self._keys = itertools.count()
        self._running: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """True if a worker is loaded, warm and alive."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        """Id of the ready worker's process, or `None`."""
        return self._process.pid if self._process is not None else None

    @property
    def memory(self) -> float:
        """Resident bytes of the ready worker; 0 if there is none."""
        try:
            return 0.0 if self.pid is None else float(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:  # it has just died
            return 0.0

    def start(self) -> None:
        """Begin to load, without waiting for it."""
        self._running = asyncio.create_task(self._keep_running())

    async def close(self) -> None:
        """End the worker."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def _keep_running(self) -> None:
        failures = 0
        while True:
            process = _Process(self._options, self._figures, self._lost)
            try:
                reason = await self._run(process)
            except OSError as error:  # no memory for a process, for example
                reason = f"could not be started: {error}"
            self.trouble = f"the last worker {reason}; loading another one"
            self._figures.lost.labels(reason if reason in _REASONS else "other").inc()
            failures = 0 if process.models.done() else failures + 1
            if failures:
                pause = min(_LONGEST_PAUSE, 0.5 * 2**failures)
                logger.error("the worker could not be loaded (%s); next try in %.0f s", reason, pause)
                await asyncio.sleep(pause)

    def _lost(self) -> None:
        self._ready.clear()
        self._process = None

    async def _run(self, process: _Process) -> str:
        await process.start()
        try:
            await asyncio.wait(
                {process.models, process.lost}, timeout=self._options.load_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )  # fmt: skip
            if process.lost.done():
                return process.lost.result()
            if not process.models.done():
                return f"was not ready within {self._options.load_seconds:g} s"
            self.models = process.models.result()
            self._process = process
            self._ready.set()
            logger.info("the worker %d is ready", process.pid)
            return await process.watch()
        finally:
            await process.end()

    async def speak(self, wanted: Message, *, deadline: float, ended: Callable[[], None]) -> AsyncIterator[np.ndarray]:
        """Yield the pieces of speech, fp32. A request whose worker is lost is made once more on the next one.

        Args:
            wanted: The request's fields for the worker. What is not "streamed" is held until it is complete: it can be
                made again at any time, and a stream only before its first piece.
            deadline: Time, of `time.monotonic()`, at which it has to be complete.
            ended: Called when the worker is free again.

        Raises:
            Problem: The request was refused, failed, was too slow, or lost two workers.
        """
        for last in (False, True):
            process = await self._ready_process(deadline)
            held: list[np.ndarray] = []
            begun = False
            try:
                async with aclosing(process.speak(next(self._keys), wanted, deadline, ended)) as pieces:
                    async for piece in pieces:
                        if wanted["streamed"]:
                            begun = True
                            yield piece
                        else:
                            held.append(piece)
                for piece in held:
                    yield piece
            except WorkerLostError as error:
                if last or begun:
                    raise Failed(f"{error} while it spoke; please try again", code="worker_lost") from error
                self._figures.retried.inc()
            else:
                return

    async def _ready_process(self, deadline: float) -> _Process:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ready.wait(), deadline - time.monotonic())
        if self._process is None:
            raise Unavailable(f"the service is not ready: {self.trouble}", code="not_ready", retry_after=5)
        return self._process

    def check_ready(self) -> None:
        """Refuse a request before the first worker was ready; after that a request waits for the next one.

        Raises:
            Problem: Nothing was loaded yet.
        """
        if not self.models:
            raise Unavailable(f"the service is not ready: {self.trouble}", code="not_ready", retry_after=5)
