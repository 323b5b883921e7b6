"""Callers in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

LONG = 60.0
"""Seconds after which a caller counts as stuck."""


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own; return the results, or the exceptions."""
    found: list[Any] = [None] * len(works)

    def work(number: int) -> None:
        torch.set_num_threads(1)
        try:
            found[number] = works[number]()
        except BaseException as error:  # given to the test
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads), "a caller is stuck"
    return found
