"""Seeded scopes: equal random numbers for two runs, with the process's generators restored afterwards.

The generators of `random`, `numpy.random` and `torch` belong to the process. A thread that draws while another one has
seeded them draws from that seed, and only a check in every draw could distinguish the two. Tuning therefore does not
seed generators that the model does not use (`drawing`, `Window.moved`), and repeats a comparison during which another
thread drew random numbers (`accelerate_tts.tuning.draws`).
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["ALL", "Window", "drawing", "loading_again", "other_threads", "others_draw", "seeded", "warming"]

ALL = frozenset({"python", "numpy", "torch"})
"""Libraries with generators. `torch` includes the generators of the CPU and the device."""

warming: ContextVar[bool] = ContextVar("warming", default=False)
"""True during a warm-up pass. Caches of results must then compute calls, since they are timed."""

loading_again: ContextVar[bool] = ContextVar("loading_again", default=False)
"""True while a load function runs again to reload weights. Objects loaded inside it are discarded, and not tuned."""


class _Source(NamedTuple):
    get: Callable[[], Any]
    put: Callable[[Any], object]
    seed: Callable[[int], object]


class Window:
    """A period with seeded generators.

    Attributes:
        states: States from before the period, by generator.
        moved: Generators that were drawn from, if watched.
        end: Digests of their states at the end, if watched. Two runs with the same draws have equal ones.
    """

    def __init__(self, states: dict[tuple[str, str], Any]) -> None:
        self.states = states
        self.moved: frozenset[str] = frozenset()
        self.end: dict[str, str] = {}


_open: list[Window] = []
_lock = rlock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # they belong to threads that a child does not have


@contextmanager
def seeded(
    device_type: str, seed: int = 0, *, leaving: frozenset[str] = frozenset(), watched: bool = False
) -> Generator[Window, None, None]:
    """Seed torch (CPU and device), Python and, if loaded, NumPy; restore their states at the end.

    NumPy is included since models use it at inference, too: transformers' VITS draws its layer drop from it.

    Args:
        device_type: Device whose torch generators are seeded beside the CPU's.
        seed: The seed.
        leaving: Generators that are not seeded. They are restored only if no other thread could have drawn.
        watched: Record which generators were drawn from, and their final states.
    """
    sources = _sources(device_type)
    window, begun = Window({}), {}
    told = None
    try:
        told = warming.set(True)
        with _lock:
            window.states = {name: source.get() for name, source in sources.items()}
            _open.append(window)
        for name, source in sources.items():
            if name[0] not in leaving:
                source.seed(seed)
        if watched:
            begun = _digests(sources)
        yield window
    finally:  # also for an interruption between two of these lines
        if told is not None:
            warming.reset(told)
        if begun:
            ends = _digests(sources)
            window.moved = frozenset(name[0] for name, state in begun.items() if ends[name] != state)
            window.end = {"/".join(name): end for name, end in ends.items() if name[0] not in leaving}
        _close(window, sources, leaving if other_threads() else frozenset())


def _close(window: Window, sources: dict[tuple[str, str], _Source], leaving: frozenset[str]) -> None:
    """Restore the states from before a window. If another thread has opened a later window, that one restores them."""
    with _lock:
        place = next((number for number, each in enumerate(_open) if each is window), None)
        if place is not None:
            del _open[place]
        later = None if place is None or place == len(_open) else _open[place]
        for name, state in window.states.items():
            if name[0] in leaving:
                continue
            if later is None:
                sources[name].put(state)
            else:
                later.states[name] = state


def other_threads() -> bool:
    """Check for threads besides this one and this package's own, which may draw random numbers at any time."""
    current = threading.current_thread()
    return any(
        thread is not current and not thread.name.startswith("accelerate_tts") for thread in threading.enumerate()
    )


def others_draw(device_type: str, seconds: float = 0.02) -> bool:
    """Watch the generators for a moment in which this thread draws nothing: does another thread draw from them?

    Args:
        device_type: Device whose torch generators are watched beside the CPU's.
        seconds: Length of the moment. A thread that draws more rarely is not seen.
    """
    if not other_threads():
        return False
    sources = _sources(device_type)
    before = _digests(sources)
    time.sleep(seconds)
    return _digests(sources) != before


def _sources(device_type: str) -> dict[tuple[str, str], _Source]:
    """Return the generators by name and device. Those of a device are included only if it is in use."""
    import torch

    found = {
        ("python", ""): _Source(random.getstate, random.setstate, random.seed),
        ("torch", "cpu"): _Source(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy", ""] = _Source(numpy.random.get_state, numpy.random.set_state, numpy.random.seed)
    if device_type == "cuda":
        found["torch", "cuda"] = _Source(
            torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, torch.cuda.manual_seed_all
        )
    elif device_type == "mps":
        found["torch", "mps"] = _Source(torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed)
    elif device_type == "xpu":
        found["torch", "xpu"] = _Source(
            torch.xpu.get_rng_state_all, torch.xpu.set_rng_state_all, torch.xpu.manual_seed_all
        )
    return found


def _digests(sources: dict[tuple[str, str], _Source]) -> dict[tuple[str, str], str]:
    """Return a digest of each generator's state."""
    import hashlib

    def digest(state: Any) -> str:
        return hashlib.blake2b(_bytes_of(state), digest_size=16).hexdigest()

    return {name: digest(source.get()) for name, source in sources.items()}


def _bytes_of(state: Any) -> bytes:
    if hasattr(state, "tolist"):  # a tensor, or an array
        return repr(state.tolist()).encode()
    items: Any = state
    if isinstance(state, (tuple, list)) and not all(isinstance(item, int) for item in items):
        return b"".join(_bytes_of(item) for item in items)
    return repr(items).encode()


@contextmanager
def drawing() -> Generator[set[str], None, None]:
    """Collect the generators that *this thread* draws from in the yielded set while open. Slow, so not for timings.

    For `random` and `numpy.random`, only calls through the module are seen, not functions imported from it.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: set[str] = set()

    class Seeing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if torch.Tag.nondeterministic_seeded in func.tags and given.get("generator") is None:
                found.add("torch")
            return func(*args, **given)

    with ExitStack() as stack:
        stack.enter_context(_calls_noted(random, random._inst, "python", found))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            stack.enter_context(_calls_noted(numpy.random, numpy.random.mtrand._rand, "numpy", found))
        stack.enter_context(Seeing())  # type: ignore[no-untyped-call]  # likewise
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
        for key, function in plain.items():
            setattr(module, key, function)
