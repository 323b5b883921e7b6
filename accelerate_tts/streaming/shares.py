"""Shares of torch's threads: tokens and sound that are made side by side divide them as they need them.

A stream measures the thread-seconds that its tokens and its sound take for a second of speech. While both have work,
each gets threads in that ratio, at least one; while one of them has work, it gets all. What is measured is remembered
with the model, so a later stream begins with it. The division is chosen once, since each further number of threads
costs kernels their preparations, and decode steps of different numbers do not share a pass. If side by side is no
faster than in turn, tokens and sound take turns from then on.

torch keeps the number for each thread (OpenMP), and gives the number that was set last, in any thread, to threads that
start later. dynamo guards each graph on the number (torch 2.6 and 2.14), and inductor writes it into the code. So
models with compiled graphs keep the number with which these were compiled.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from accelerate_tts.events import Lasting, NotApplied, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.locks import lock, rlock

if TYPE_CHECKING:
    from torch import Tensor, nn

Side = Literal["tokens", "sound"]

_MOSTLY = 0.9
"""Share of a piece's time in which the other side had work, from which on they were made side by side."""
_KEPT = 64
"""MeasuredCosts costs that are kept of each kind: the last ones."""
_ENOUGH: dict[Side, int] = {"tokens": 20, "sound": 3}
"""Tokens, and pieces of sound, of which the median is believed. The first may be long: kernels are prepared."""


class _Figures:
    """Costs of one side, in seconds for a second of computed speech."""

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self.costs: deque[float] = deque(maxlen=_KEPT)  # thread-seconds
        self.alone: deque[float] = deque(maxlen=_KEPT)  # seconds on all threads
        self.beside: deque[float] = deque(maxlen=_KEPT)  # seconds on its share
        self._speech = self._computed = 0.0

    def add(self, seconds: float, threads: int, speech: float, computed: float) -> float:
        """Add what was made, and return its cost."""
        cost = seconds / computed
        self.costs.append(cost * threads)
        self._speech += speech
        self._computed += computed
        return cost

    @property
    def repeated(self) -> float:
        """Computed speech for a second of what is heard."""
        return self._computed / self._speech if self._speech else 1.0

    @property
    def are_enough(self) -> bool:
        """True if the median cost is known."""
        return len(self.costs) >= self._enough and self._speech > 0.0

    @property
    def are_compared(self) -> bool:
        """True if the median costs alone and side by side are known."""
        return min(len(self.alone), len(self.beside)) >= self._enough and self._speech > 0.0


class ThreadDivision(NamedTuple):
    """Threads of each side while both have work."""

    tokens: int
    sound: int

    @classmethod
    def by(cls, threads: int, tokens: float, sound: float) -> ThreadDivision:
        """Divide threads in the ratio of two costs: at least one each, which on one thread both get.

        Args:
            threads: All of them.
            tokens: Cost of the tokens.
            sound: Cost of the sound.
        """
        share = min(max(1, round(threads * tokens / (tokens + sound))), max(1, threads - 1))
        return cls(share, max(1, threads - share))


class MeasuredCosts:
    """Costs of a model's tokens and sound, as its streams measured them. Usable from any thread.

    Args:
        what: The model's name in events.
        threads: All threads.
        divided: False to leave all threads to both.

    Attributes:
        division: The threads of each side while both have work: half for each, until both costs are known. It is then
            chosen once.
        overlaps: True until side by side was measured to be no faster than in turn. Judged once.
        clock: Returns the time in seconds.
    """

    clock: Callable[[], float]

    def __init__(self, what: str, threads: int, *, divided: bool = True) -> None:
        self.what, self.threads = what, threads
        self.clock = time.perf_counter
        self.division = ThreadDivision.by(threads, 1.0, 1.0) if divided else ThreadDivision(threads, threads)
        self.overlaps = True
        self._is_chosen, self._is_judged = not divided, False
        self._figures: dict[Side, _Figures] = {side: _Figures(enough) for side, enough in _ENOUGH.items()}
        self._lock = rlock()

    def add(  # noqa: PLR0913 - what is known of a piece
        self, side: Side, seconds: float, threads: int, *, speech: float, computed: float, beside: float
    ) -> None:
        """Add a token, or a piece of sound.

        Args:
            side: The side that made it.
            seconds: Seconds that it took.
            threads: Threads that it was made on.
            speech: Seconds of speech that are heard of it.
            computed: Seconds of speech that were computed, what is repeated for its context included.
            beside: Seconds in which the other side had work, too.
        """
        if self._is_judged or not (seconds > 0.0 and computed > 0.0):
            return
        with self._lock:
            figures = self._figures[side]
            cost = figures.add(seconds, threads, speech, computed)
            if beside >= _MOSTLY * seconds and threads == getattr(self.division, side):
                figures.beside.append(cost)
            elif beside <= (1.0 - _MOSTLY) * seconds and threads == self.threads:
                figures.alone.append(cost)
            self._choose()
            event = self._judge()
        if event is not None:
            emit(event)

    def __str__(self) -> str:
        """Return the division, and the costs so far."""
        told = [f"{self.division.tokens} + {self.division.sound} of {self.threads} threads"]
        for side, figures in self._figures.items():
            for way, costs in (("alone", figures.alone), ("side by side", figures.beside)):
                seconds = f"{statistics.median(costs) * figures.repeated:.3g} s" if costs else "unknown"
                told.append(f"{side} {way} {seconds} ({len(costs)})")
        return f"{self.what}: {', '.join(told)}; {'side by side' if self.overlaps else 'in turn'}"

    def _choose(self) -> None:
        """Choose the division, once both costs are known."""
        if self._is_chosen or not all(figures.are_enough for figures in self._figures.values()):
            return
        self._is_chosen = True
        tokens, sound = (statistics.median(each.costs) * each.repeated for each in self._figures.values())
        chosen = ThreadDivision.by(self.threads, tokens, sound)
        if chosen != self.division:
            self.division = chosen
            for figures in self._figures.values():
                figures.beside.clear()  # of the division before

    def _judge(self) -> NotApplied | None:
        """Judge if side by side is faster, once both ways are known; return the event if it is not."""
        if self._is_judged or not all(figures.are_compared for figures in self._figures.values()):
            return None
        self._is_judged = True
        # In each second side by side, a side makes what takes it this many seconds alone.
        gain = in_turn = 0.0
        for figures in self._figures.values():
            alone = statistics.median(figures.alone)
            gain += alone / statistics.median(figures.beside)
            in_turn += alone * figures.repeated
        self.overlaps = gain > 1.0
        if self.overlaps:
            return None
        reason = (
            f"for a second of speech, tokens and sound take {in_turn / gain:.3g} s side by side and {in_turn:.3g} s in"
            " turn; its streams take turns now"
        )
        return NotApplied(f"overlap of {self.what}", reason)


_measured = IdentityMap["dict[tuple[int, bool, str], MeasuredCosts]"]()
_lasting = IdentityMap[Lasting]()


def measured_of(model: nn.Module, threads: int, way: str = "", *, divided: bool = True) -> MeasuredCosts:
    """Return what the streams of a model measured, which is remembered as long as the model lives.

    Args:
        model: The model.
        threads: All threads.
        way: The way in which the sound is made, if there are several.
        divided: See `MeasuredCosts`.
    """
    known = _measured.setdefault(model, dict[tuple[int, bool, str], MeasuredCosts])
    made = MeasuredCosts(type(model).__name__, threads, divided=divided)
    return known.setdefault((threads, divided, way), made)


def measurements(model: nn.Module) -> list[MeasuredCosts]:
    """Return all that the streams of a model measured."""
    return list((_measured.get(model) or {}).values())


class Shares:
    """Threads of one stream. Tokens are made on one thread, and sound on another or several, one after the other.

    Args:
        measured: What is known of the model.
        token: Seconds of speech of a token.
    """

    def __init__(self, measured: MeasuredCosts, token: float) -> None:
        self._measured, self._token = measured, token
        self._lock = rlock()  # reentrant: the collector may close a stream anywhere
        self._sides: dict[Side, _State] = {side: _State(measured.threads) for side in _ENOUGH}
        self._lent = False

    @property
    def overlaps(self) -> bool:
        """True if the next loop of tokens runs ahead."""
        return self._measured.overlaps

    def expect_tokens(self) -> None:
        """Say that tokens will be made at once, on a thread that begins. The sound's thread gets its share."""
        with self._lock:
            self._sides["tokens"].begin(self._measured.clock(), self._sides["sound"])
            is_sounding = self._sides["sound"].is_busy
        if is_sounding:
            self.begin("sound")

    def begin(self, side: Side) -> None:
        """Say that a token, or a piece of sound, is made from now on, on this thread; set the thread's number."""
        with self._lock:
            state, other = self._sides[side], self._sides["sound" if side == "tokens" else "tokens"]
            state.begin(self._measured.clock(), other)
            measured = self._measured
            threads = state.threads = getattr(measured.division, side) if other.is_busy else measured.threads
            self._lent = self._lent or side == "sound"
        set_threads(threads)

    def end_token(self, *, counts: bool) -> None:
        """Say that a token was made.

        Args:
            counts: False for what precedes the first token, and follows the last one.
        """
        speech = self._token if counts else 0.0
        self._end("tokens", speech, speech)

    def end_sound(self, speech: float = 0.0, computed: float = 0.0) -> None:
        """Say that a piece of sound was made, or that the sound waits.

        Args:
            speech: Seconds of speech in the piece.
            computed: Seconds of speech that were computed for it.
        """
        self._end("sound", speech, computed)

    def _end(self, side: Side, speech: float, computed: float) -> None:
        with self._lock:
            state, other = self._sides[side], self._sides["sound" if side == "tokens" else "tokens"]
            if not state.is_busy:
                return
            seconds, beside = state.end(self._measured.clock(), other)
        self._measured.add(side, seconds, state.threads, speech=speech, computed=computed, beside=beside)

    def lend(self, pieces: Generator[Tensor, None, None]) -> Generator[Tensor, None, None]:
        """Yield pieces of sound. A thread that asks for one has its own number of threads again when it gets it.

        So it has at an exception, and pieces may be asked for by different threads.
        """
        own = torch.get_num_threads()
        try:
            for piece in pieces:
                self._give_back(own)
                yield piece
                own = torch.get_num_threads()
        finally:
            try:
                pieces.close()  # an exception that was thrown in may keep it alive
            finally:
                self._give_back(own)

    def _give_back(self, own: int) -> None:
        self.end_sound()
        if self._lent:  # not when the stream is closed between two pieces, perhaps by another thread
            self._lent = False
            try:
                set_threads(own)
            except BaseException:  # Ctrl-C in it
                torch.set_num_threads(own)
                raise


class _State:
    """Work of one side of a stream."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.is_busy = False
        self._since = self._worked = 0.0
        self._others = 0.0  # seconds that the other side had worked at the beginning

    def worked(self, now: float) -> float:
        """Return the seconds of work so far."""
        return self._worked + (now - self._since if self.is_busy else 0.0)

    def begin(self, now: float, other: _State) -> None:
        self._worked = self.worked(now)  # what was not ended is not counted as a piece
        self.is_busy, self._since, self._others = True, now, other.worked(now)

    def end(self, now: float, other: _State) -> tuple[float, float]:
        """Return the seconds since the beginning, and those of them in which the other side worked, too."""
        seconds, self._worked = now - self._since, self.worked(now)
        self.is_busy = False
        return seconds, other.worked(now) - self._others


def shares_of(model: nn.Module, *others: nn.Module, token: float, way: str = "") -> Shares:
    """Return the shares of a new stream, of the threads that this thread has.

    Where they cannot be divided, an event says why, and both sides have all of them.

    Args:
        model: The model, with which costs are remembered.
        *others: Models that the stream computes with besides.
        token: Seconds of speech of a token.
        way: See `measured_of`.
    """
    threads = torch.get_num_threads()
    reason = _obstacle(model, *others) if threads > 1 else None
    if reason is not None:
        event = NotApplied(f"shares of threads of {type(model).__name__}", f"{reason}; tokens and sound have all each")
        _lasting.setdefault(model, Lasting).emit(event)
    return Shares(measured_of(model, threads, way, divided=reason is None), token)


def _obstacle(*models: nn.Module) -> str | None:
    """Return the reason why the threads of models must not be divided."""
    from accelerate_tts.stages.compile.graphs import has_graphs

    if not _is_of_the_thread():
        return "torch was built without OpenMP, and its number of threads is that of the process"
    if any(map(has_graphs, models)):
        return "its compiled graphs hold for one number of threads"
    return None


@cache
def _is_of_the_thread() -> bool:
    return "backend: OpenMP" in torch.__config__.parallel_info()


_setting = lock()


def set_threads(number: int) -> None:
    """Set torch's number of threads for this thread alone.

    `torch.set_num_threads` also sets the number with which threads begin that start later. A thread that starts now
    knows that number, and sets it again, for itself. In the moment between the two, a thread that computes for the
    first time begins with this one's.
    """
    if torch.get_num_threads() == number:
        return
    with _setting:
        known, done = threading.Event(), threading.Event()

        def keep() -> None:
            before = torch.get_num_threads()
            known.set()
            done.wait()
            torch.set_num_threads(before)

        keeper = threading.Thread(target=keep, name="accelerate_tts-threads", daemon=True)
        try:
            keeper.start()
            known.wait()
            torch.set_num_threads(number)
        finally:
            done.set()
            if keeper.is_alive():
                keeper.join()
