"""Locks that a forked child finds open.

A fork copies a lock as it is, and not the thread that holds it: whoever takes it in the child waits for ever. Servers
fork workers while other threads of the parent load, tune or answer. What a lock guards is changed in few steps, each of
which leaves it usable, so that a child which opens it goes on with what there is.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["lock", "rlock"]

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.Lock:
    """A `threading.Lock` that is open in a forked child."""
    made = threading.Lock()
    _locks.add(made)
    return made


def rlock() -> threading.RLock:
    """A `threading.RLock` that is open in a forked child."""
    made = threading.RLock()
    _locks.add(made)
    return made


def _after_fork() -> None:
    for each in list(_locks):
        each._at_fork_reinit()  # as the standard library does with its own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
