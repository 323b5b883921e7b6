"""The states of all random numbers that a call may draw, kept and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["random_states"]


def random_states(given: tuple[Any, ...]) -> Callable[[], None]:
    """A function that puts every random state back to what it is now."""
    python = random.getstate()
    restore: list[Callable[[], object]] = [lambda: random.setstate(python)]
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        state = numpy.random.get_state()
        restore.append(lambda: numpy.random.set_state(state))
    if torch is not None:
        restore += [_kept(torch.get_rng_state, torch.set_rng_state)]
        if torch.cuda.is_initialized():
            restore.append(_kept(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        if torch.backends.mps.is_available():  # a Mac only
            restore.append(_kept(torch.mps.get_rng_state, torch.mps.set_rng_state))
        if hasattr(torch, "xpu") and torch.xpu.is_initialized():  # an Intel GPU only
            restore.append(_kept(torch.xpu.get_rng_state_all, torch.xpu.set_rng_state_all))
        restore += [_kept(item.get_state, item.set_state) for item in given if type(item) is torch.Generator]

    def put_back() -> None:
        for one in restore:
            one()

    return put_back


def _kept(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], object]:
    state = get()
    return lambda: put(state)
