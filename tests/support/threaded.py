"""Callers in threads of their own, and waits for what they do."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

LONG = 60.0
"""Seconds after which a caller counts as stuck."""


def until(condition: Callable[[], object], what: str = "it never happened") -> None:
    """Wait for something that another thread does. A busy machine may take its time."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.0005)


async def until_later(condition: Callable[[], object], what: str = "it never happened") -> None:
    """Like `until`, for something that the running loop does meanwhile."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.0005)


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own; return the results, or the exceptions.

    Python changes threads often meanwhile: by its default a small model's whole loop may run in one go.
    """
    found: list[Any] = [None] * len(works)

    def work(number: int) -> None:
        torch.set_num_threads(1)
        try:
            found[number] = works[number]()
        except BaseException as error:  # given to the test
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(works))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a caller is stuck"
    return found
