"""Shared steps: decode steps of several threads are computed in one pass over the weights. Bit-exact.

How a step is computed is the matter of `Rules`: fused_decoder.py has fused blocks on a CPU, and cuda_graph.py recorded
steps on a GPU.

A decode step reads every weight for one or two rows, and reading is most of its cost. Calls of one model in several
threads, each in upstream's own loop with its own cache, therefore meet here. A thread that finds no pass under way
computes its step at once. Steps that arrive during a pass are computed together in the next one, up to `most_rows`
rows. The thread of the first step computes for all.

Before a pass, its thread waits for callers that left the last pass a moment ago and usually come back within the
window, a share of a pass's duration. Without this wait, four callers would form two groups that take turns. A caller
that stalls, ends or is cancelled is waited for once, for at most one window.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from accelerate_tts.errors import message_of
from accelerate_tts.events import DecodePasses, NotApplied, emit
from accelerate_tts.kernels.decoder_block import run, run_together
from accelerate_tts.kernels.weight_formats import MOST_ROWS
from accelerate_tts.locks import rlock
from accelerate_tts.runtime.call_end import tell_at_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Joinable(Protocol):
    """One caller's step."""

    @property
    def rows(self) -> int:
        """Batch size."""
        ...

    def layout(self) -> tuple[object, ...] | None:
        """Return what must be equal in steps that are computed together; `None` if this one is computed alone."""
        ...

    def size(self) -> int:
        """Return the bytes of its cache."""
        ...

    def copied(self) -> Any:
        """Return the same step over a copy of its cache."""
        ...

    def undo(self) -> None:
        """Have its cache as it was before it was computed."""
        ...

    def following(self, number: int) -> Any:
        """Return a step like this one for a later token, where so many were computed since; `None` if there is none."""
        ...

    def tensors(self, result: Any) -> list[torch.Tensor]:
        """Return the tensors of a result, by which it is compared."""
        ...


def rows_of(made: Any, first: int, rows: int) -> Any:
    """Return some rows of a pass, (blocks, rows, 1, hidden).

    Those of its own thread are a view. Others are in memory of their own, made in the thread that uses it, since
    tensors of inference mode differ from others.
    """
    part = made[:, first : first + rows]
    return part.clone() if first else part


def _nothing(_numbers: tuple[int, ...], _rows: int) -> None:
    """Arrange nothing."""


class Rules(NamedTuple):
    """Rules of passes."""

    most_rows: int = MOST_ROWS
    """Maximum rows of a pass."""
    window: float = 0.75
    """Longest wait for callers, as a share of the last pass's duration. A step in a pass of its own makes all others
    wait for about as long, and with less than that callers in 8 bits missed passes (decision 0007)."""
    clock: Callable[[], float] = time.perf_counter
    """Returns the time in seconds."""
    alone: Callable[[Sequence[Any], Any], Any] = run
    """Computes one call."""
    together: Callable[[Sequence[Any], Sequence[Any]], Any] = run_together
    """Computes several calls in one pass."""
    taken: Callable[[Any, int, int], Any] = rows_of
    """Returns the result of one call in that of a pass, by its first row and its number of rows."""
    finish: Callable[[], object] | None = None
    """Waits for a pass that a device computes; callers who come meanwhile meet. Not called for the only caller."""
    arrange: Callable[[tuple[int, ...], int], object] = _nothing
    """Has passes made for so many callers each, in ascending order, by calls of so many rows; (1,) for one caller."""
    bits_vary: bool = False
    """True if a pass for some numbers of callers may differ in bits from a step alone. Those are not used."""
    look: float = 1.0
    """Seconds after which a waiting step looks at its state, and checks that its process was not forked."""


class Counts(NamedTuple):
    """Passes of a decoder, the steps in them, and their rows."""

    passes: int = 0
    steps: int = 0
    rows: int = 0


class _Caller:
    """One thread, as the meeting knows it."""

    def __init__(self) -> None:
        self.rows = 0
        self.left = 0.0  # time of its last step's end
        self.is_away = True
        self.returns = False  # its last step came within a window of the one before
        self.is_inside = False


_WAITS, _LEADS, _TAKEN, _DONE = "waits", "leads", "taken", "done"


class _Step:
    """A decode step of one caller."""

    def __init__(self, caller: _Caller, blocks: Sequence[Any], call: Joinable) -> None:
        self.caller, self.blocks, self.call = caller, blocks, call
        self.threads = torch.get_num_threads()  # sums of transposed weights depend on it
        self.state = _WAITS
        self.wake = threading.Lock()  # released when the step is done, or when its thread leads the next pass
        self.wake.acquire()
        self.made: Any = None  # the result of its pass
        self.first = 0  # its first row in them

    @cached_property
    def layout(self) -> tuple[object, ...] | None:
        return self.call.layout()

    def joins(self, other: _Step) -> bool:
        """Check that this step can be computed in one pass with another."""
        return (
            self.threads == other.threads and self.layout is not None and self.layout == other.layout
            and len(self.blocks) == len(other.blocks)
            and all(one is its for one, its in zip(self.blocks, other.blocks, strict=True))
        )  # fmt: skip


class _Meeting:
    """State of one decoder's meeting, behind one lock.

    The lock is taken by itself: an interrupt may arrive in the methods of a condition, which are Python's, and leave it
    locked.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.leader: _Step | None = None  # its thread prepares or computes a pass
        self.waiting: list[_Step] = []
        self.taken: list[_Step] = []  # steps of the present pass
        self.callers: set[_Caller] = set()  # inside, or left a moment ago
        self.window = 0.0  # seconds


_all: weakref.WeakSet[SharedSteps] = weakref.WeakSet()


class SharedSteps:
    """Meeting point of the decode steps of one decoder.

    Attributes:
        what: Name for events.
        is_on: True if steps are shared. Otherwise each is computed alone, as it comes.
        rules: The rules of passes.
        usual: Those that it was made with.
        counts: Passes so far, while steps are shared. A `DecodePasses` event has those since the last one; it is sent
            when a call ends.

    Args:
        what: See above.
        rules: The rules until others are assigned; those of fused blocks if not given.
    """

    def __init__(self, what: str, rules: Rules | None = None) -> None:
        self.is_on = False
        self.what = what
        self.usual = Rules() if rules is None else rules
        self.rules = self.usual
        self.counts = self._told = Counts()
        self._is_due = False
        self._telling = rlock()
        self._mine = threading.local()
        self._meeting = _Meeting()
        _all.add(self)

    def run(self, blocks: Sequence[Any], call: Joinable) -> Any:
        """Compute a step, alone or with those of other threads.

        Args:
            blocks: Consecutive blocks, as the rules take them.
            call: Inputs of this thread's caller, likewise.

        Returns:
            What the rules return for it. For fused blocks these are the hidden states behind each block, (blocks, rows,
            1, hidden), fp32.
        """
        if not self.is_on:
            return self.rules.alone(blocks, call)
        caller: _Caller | None = getattr(self._mine, "caller", None)
        if caller is None:
            caller = self._mine.caller = _Caller()
        if caller.is_inside:  # a signal handler's call, while the step of its thread waits
            return self.rules.alone(blocks, call)
        caller.is_inside = True
        try:
            return self._met(self._meeting, _Step(caller, blocks, call))
        finally:
            caller.is_inside = False

    def forget(self) -> None:
        """Start anew, without the callers so far. For a forked child, which has none of the other threads."""
        self._meeting = _Meeting()
        self._told, self._is_due = self.counts, False  # the parent tells its own

    def tell(self) -> None:
        """Send a `DecodePasses` event of the passes since the last one, if there are some."""
        with self._telling:
            self._is_due = False  # first: passes that are counted from here on have the next event
            counts, told = self.counts, self._told
            self._told = counts
        if counts != told:
            passes, steps, rows = (now - before for now, before in zip(counts, told, strict=True))
            emit(DecodePasses(self.what, passes, steps, rows))

    def _met(self, meeting: _Meeting, step: _Step) -> Any:
        try:
            self._arrive(meeting, step)
            while step.state in {_WAITS, _TAKEN} and not step.wake.acquire(timeout=self.rules.look):
                if meeting is not self._meeting:
                    return self.rules.alone(step.blocks, step.call)
            if step.state == _LEADS:
                return self._lead(meeting, step)
        except BaseException:  # Ctrl-C
            self._withdraw(meeting, step)
            raise
        if step.made is None:
            return self.rules.alone(step.blocks, step.call)
        return self.rules.taken(step.made, step.first, step.call.rows)

    def _arrive(self, meeting: _Meeting, step: _Step) -> None:
        caller = step.caller
        with meeting.lock:
            caller.returns = self.rules.clock() - caller.left <= meeting.window
            caller.is_away = False
            caller.rows = step.call.rows
            meeting.callers.add(caller)
            if meeting.leader is not None:
                meeting.waiting.append(step)
                meeting.changed.notify()
            else:
                meeting.leader, step.state = step, _LEADS

    def _lead(self, meeting: _Meeting, step: _Step) -> Any:
        """Compute the next pass, and hand over to the first of those who wait."""
        steps = self._gathered(meeting, step)
        is_alone, made, failed = len(steps) == 1, None, False
        try:
            start = self.rules.clock()
            made, failed = self._computed(steps)
            if self.rules.finish is not None and len(meeting.callers) > 1:
                self.rules.finish()
            meeting.window = self.rules.window * (self.rules.clock() - start)
        finally:
            with meeting.lock:
                self._end(meeting)
        if failed:
            return self.rules.alone(step.blocks, step.call)
        return made if is_alone else self.rules.taken(made, 0, step.call.rows)

    def _computed(self, steps: list[_Step]) -> tuple[Any, bool]:
        """Compute a pass. Returns its result, and True if that of several failed, so that each is computed alone."""
        first = steps[0]
        if len(steps) == 1:
            return self.rules.alone(first.blocks, first.call), False
        try:
            made = self.rules.together(first.blocks, [step.call for step in steps])
        except Exception as error:  # must not reach callers whose own step may be sound
            self.is_on = False
            reason = f"a pass failed ({type(error).__name__}: {message_of(error)}); each step is computed alone now"
            emit(NotApplied(f"shared steps of {self.what}", reason))
            return None, True
        row = 0
        for step in steps:
            step.first, step.made = row, made
            row += step.call.rows
        return made, False

    def _gathered(self, meeting: _Meeting, step: _Step) -> list[_Step]:
        """Wait for callers that come within the window; return the steps of the pass, this one first."""
        with meeting.lock:
            while True:
                steps, rows = [step], step.call.rows
                for other in meeting.waiting if self.is_on else ():
                    if rows + other.call.rows <= self.rules.most_rows and other.joins(step):
                        steps.append(other)
                        rows += other.call.rows
                wait = self._to_wait(meeting, self.rules.most_rows - rows)
                if wait <= 0:
                    break
                meeting.changed.wait(wait)
            meeting.taken = steps
            for other in steps[1:]:
                other.state = _TAKEN
            meeting.waiting = [other for other in meeting.waiting if other.state == _WAITS]
            passes, all_steps, all_rows = self.counts
            self.counts = Counts(passes + 1, all_steps + len(steps), all_rows + rows)
            if not self._is_due:
                self._is_due = True
                tell_at_end(self.tell)
            return steps

    def _to_wait(self, meeting: _Meeting, room: int) -> float:
        """Return the seconds to wait for the next caller with at most `room` rows; forget those that are late."""
        now, longest = self.rules.clock(), 0.0
        for caller in [caller for caller in meeting.callers if caller.is_away]:
            left = caller.left + meeting.window - now
            if left <= 0 or not caller.returns:
                meeting.callers.discard(caller)
            elif caller.rows <= room:
                longest = max(longest, left)
        return longest

    def _end(self, meeting: _Meeting) -> None:
        """Let the callers of a pass go, and let the first of the others lead the next.

        An interrupted run is repeated, since its step still is the leader. A step whose lock was not released looks at
        its state after a while.
        """
        now = self.rules.clock()
        for step in meeting.taken:
            step.caller.left, step.caller.is_away = now, True
            is_waiting = step.state in {_WAITS, _TAKEN}
            step.state = _DONE
            if is_waiting:
                step.wake.release()
        meeting.taken = []
        meeting.waiting = [step for step in meeting.waiting if step.state != _DONE]
        if not meeting.waiting:
            meeting.leader = None
            return
        following = meeting.waiting[0]
        following.state = _LEADS
        meeting.leader = following
        del meeting.waiting[0]
        following.wake.release()

    def _withdraw(self, meeting: _Meeting, step: _Step) -> None:
        """Take back the step of a caller that was interrupted."""
        self._is_due = False  # the interrupt may have come before the report was registered
        with meeting.lock:
            step.caller.is_away, step.caller.returns = True, False
            if step in meeting.waiting:
                meeting.waiting.remove(step)
            if meeting.leader is step:
                step.state = _DONE
                self._end(meeting)
        while step.state == _TAKEN:  # its cache is written to
            step.wake.acquire(timeout=self.rules.look)


def _after_fork() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
