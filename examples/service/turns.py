"""The bounded queue: a limit on the requests in the service, and turns at the worker, first come first served."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

from service.problems import Busy, Unavailable


class Turns:
    """The queue of one event loop.

    Attributes:
        most: Requests inside at the same time.
        inside: Requests inside now: waiting, spoken or sent.
        running: Requests that have a turn now.
    """

    def __init__(self, at_once: int, most: int) -> None:
        self.most = most
        self.inside = 0
        self.running = 0
        self._at_once = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._seconds = 1.0  # of a turn, as a moving average

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a turn."""
        return len(self._waiting)

    @property
    def expected_wait(self) -> float:
        """Estimate of the seconds until a further request would have its turn, from 1 to 60."""
        return min(60.0, max(1.0, self._seconds * (len(self._waiting) + 1) / self._at_once))

    @contextmanager
    def place(self) -> Generator[None, None, None]:
        """Hold a place in the service.

        Raises:
            Busy: All places are taken.
        """
        if self.inside >= self.most:
            wait = self.expected_wait
            message = f"{self.most} requests are being answered, and no more are accepted now"
            raise Busy(f"{message}; try again in {wait:.0f} s", code="queue_full", retry_after=wait)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def enter(self, seconds: float) -> Callable[[], None]:
        """Wait for a turn.

        Returns:
            A function that ends the turn. It is idempotent, and never waits.

        Raises:
            Unavailable: There was none in time.
        """
        if self.running < self._at_once and not self._waiting:
            self.running += 1
        else:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            try:
                await asyncio.wait({mine}, timeout=seconds)
            except asyncio.CancelledError:  # the caller has left
                self._give_up(mine)
                raise
            if not mine.done():
                self._give_up(mine)
                late = f"there was no turn within {seconds:g} s; try again later"
                raise Unavailable(late, code="queue_timeout", retry_after=self.expected_wait)
        begun, ended = time.monotonic(), False

        def leave() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._seconds += 0.2 * (time.monotonic() - begun - self._seconds)
                self._next()

        return leave

    def _give_up(self, mine: asyncio.Future[None]) -> None:
        if mine.done():  # its turn has come meanwhile
            self._next()
        else:
            self._waiting.remove(mine)

    def _next(self) -> None:
        """Pass a turn on to the first who waits."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.running -= 1
