"""Callers in threads of their own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

LONG = 60.0
"""Seconds after which a caller counts as stuck."""


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
