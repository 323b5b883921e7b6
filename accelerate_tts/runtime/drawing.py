"""Detection of the random number generators that a thread draws from."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _TorchDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__
    """Records in `found` that an operator of this thread draws from torch's generators."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and given.get("generator") is None:
            self._found.add("torch")
        return func(*args, **given)


@contextmanager
def drawing() -> Generator[set[str], None, None]:
    """Collect the generators that *this thread* draws from in the yielded set while open. Slow, so not for timings.

    For `random` and `numpy.random`, only calls through the module are seen, not functions imported from it.
    """
    found: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(_calls_noted(random, random._inst, "python", found))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            stack.enter_context(_calls_noted(numpy.random, numpy.random.mtrand._rand, "numpy", found))
        stack.enter_context(_TorchDraws(found))
        yield found


_NO_DRAWS = frozenset({"getstate", "setstate", "seed", "get_state", "set_state"})


@contextmanager
def _calls_noted(module: Any, generator: object, name: str, found: set[str]) -> Generator[None, None, None]:
    """Record calls by this thread of a module's functions that draw from its generator, while open."""
    mine = threading.get_ident()
    plain = {
        key: value
        for key, value in vars(module).items()
        if getattr(value, "__self__", None) is generator and key not in _NO_DRAWS
    }

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == mine:
                found.add(name)
            return function(*args, **kwargs)

        return call

    try:
        for key, function in plain.items():
            setattr(module, key, noting(function))
        yield
    finally:
        try:
            vars(module).update(plain)
        except BaseException:  # Ctrl-C in it
            vars(module).update(plain)
            raise
