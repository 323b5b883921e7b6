"""Locks that are released in a forked child.

A fork copies the state of a lock, but not the thread that holds it, so a child would wait for it forever. Servers fork
workers while other threads of the parent load, tune or answer. The state behind these locks is changed in few steps,
each of which leaves it usable, so that a child can continue with it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.Lock:
    """Make a `threading.Lock` that is released in a forked child."""
    made = threading.Lock()
    _locks.add(made)
    return made


def rlock() -> threading.RLock:
    """Make a `threading.RLock` that is released in a forked child."""
    made = threading.RLock()
    _locks.add(made)
    return made


def all_locks() -> list[Any]:
    """Return the living locks that were made here."""
    return list(_locks)


def _after_fork() -> None:
    for each in all_locks():
        each._at_fork_reinit()  # as the standard library does with its own locks


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
