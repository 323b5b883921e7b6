"""Ctrl-C at a chosen place of this package, where CPython would take the signal."""

from __future__ import annotations

import dis
import itertools
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import accelerate_tts

PACKAGE = str(Path(accelerate_tts.__file__).parent)

Place = tuple[str, str, int, int, bool]


@cache
def calls_before(code: CodeType) -> dict[int, int]:
    """Return the instructions that follow a call, each with that call's.

    A signal that is taken after a call counts as raised by the call, and a tracer raises at the instruction behind it.
    Where a block ends between the two, as in `with lock: return call()`, the tracer would raise outside of the block
    and the lock would stay taken, which no signal does. Such places are left out.
    """
    blocks = [(each.start, each.end, each.target) for each in getattr(dis.Bytecode(code), "exception_entries", ())]

    def handlers(offset: int) -> list[int]:
        return [target for start, end, target in blocks if start <= offset < end]

    found = list(dis.get_instructions(code))
    return {
        b.offset: a.offset
        for a, b in itertools.pairwise(found)
        if a.opname.startswith("CALL") and handlers(a.offset) == handlers(b.offset)
    }


class Interrupting:
    """Raises KeyboardInterrupt where CPython takes a signal.

    That is where a function begins, where a generator goes on, and after a call of something that is not Python.

    Args:
        place: One of `places`, and how often it is passed until then.

    Attributes:
        places: How often each place was passed.
        where: The line that was interrupted, or "".
    """

    def __init__(self, place: tuple[Place, int] | None = None) -> None:
        self.place = place
        self.places: Counter[Place] = Counter()
        self.where = ""
        self._begun = 0
        self._last: dict[int, tuple[int, int]] = {}

    def __call__(self, frame: Any, event: str, _argument: object) -> Any:
        code = frame.f_code
        if event == "call":
            self._begun += 1
            if not code.co_filename.startswith(PACKAGE):
                return None
            if self.place is not None and self.place[0][:3] != _named(code):
                return None
            frame.f_trace_opcodes = True
            if dis.opname[code.co_code[max(frame.f_lasti, 0)]] != "YIELD_VALUE":  # no signal is taken as it is closed
                self._pass(frame, begins=True)
        elif event == "opcode":
            before = calls_before(code).get(frame.f_lasti)
            if before is not None and self._last.get(id(frame)) == (before, self._begun):
                self._pass(frame, begins=False)
            self._last[id(frame)] = (frame.f_lasti, self._begun)
        return self

    def _pass(self, frame: Any, *, begins: bool) -> None:
        place = (*_named(frame.f_code), frame.f_lasti, begins)
        self.places[place] += 1
        if self.place == (place, self.places[place]):
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            sys.settrace(None)
            raise KeyboardInterrupt


def _named(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno
