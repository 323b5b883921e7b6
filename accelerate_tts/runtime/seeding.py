"""Seeded scopes: equal random numbers for two runs, with the process's generators restored afterwards.

The generators of `random`, `numpy.random` and `torch` belong to the process. A thread that draws while another one has
seeded them draws from that seed, and only a check in every draw could distinguish the two. Tuning therefore does not
seed generators that the model does not use (`drawing`, `SeededScope.moved`), and repeats a comparison during which
another thread drew random numbers (`accelerate_tts.tuning.draws`).
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from accelerate_tts.locks import rlock

ALL = frozenset({"python", "numpy", "torch"})
"""Libraries with generators. `torch` includes the generators of the CPU and the device."""

warming: ContextVar[bool] = ContextVar("warming", default=False)
"""True during a warm-up pass. Caches of results must then compute calls, since they are timed."""

loading_again: ContextVar[bool] = ContextVar("loading_again", default=False)
"""True while a load function runs again to reload weights. Objects loaded inside it are discarded, and not tuned."""

_MOMENT = 0.02  # seconds


class Source(NamedTuple):
    """Functions that read, write and seed the state of generators of the process."""

    get: Callable[[], Any]
    put: Callable[[Any], object]
    seed: Callable[[int], object]


class SeededScope:
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


_open: list[SeededScope] = []
_lock = rlock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # they belong to threads that a child does not have


@contextmanager
def seeded(
    device_type: str, seed: int = 0, *, leaving: frozenset[str] = frozenset(), watched: bool = False
) -> Generator[SeededScope, None, None]:
    """Seed torch (CPU and device), Python and, if loaded, NumPy; restore their states at the end.

    NumPy is included since models use it at inference, too: transformers' VITS draws its layer drop from it.

    Args:
        device_type: Device whose torch generators are seeded beside the CPU's.
        seed: The seed.
        leaving: Generators that are not seeded. They are restored only if no other thread could have drawn.
        watched: Record which generators were drawn from, and their final states.
    """
    with _outside_own_random():  # whose draws would not be seeded
        yield from _seeded(device_type, seed, leaving, watched)


def _seeded(device_type: str, seed: int, leaving: frozenset[str], watched: bool) -> Generator[SeededScope, None, None]:
    sources = sources_of({device_type})
    window, begun = SeededScope({}), {}
    told = warming.get()
    try:
        warming.set(True)
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
        try:
            if begun:
                ends = _digests(sources)
                window.moved = frozenset(name[0] for name, state in begun.items() if ends[name] != state)
                window.end = {"/".join(name): end for name, end in ends.items() if name[0] not in leaving}
            _close(window, sources, leaving if other_threads() else frozenset())
        except BaseException:  # Ctrl-C in it
            _close(window, sources, leaving if other_threads() else frozenset())
            raise
        finally:
            warming.set(told)  # no token: a generator may be closed in another context


def _close(window: SeededScope, sources: dict[tuple[str, str], Source], leaving: frozenset[str]) -> None:
    """Restore the states from before a window. If another thread has opened a later window, that one restores them.

    Idempotent.
    """
    with _lock:
        place = next((number for number, each in enumerate(_open) if each is window), None)
        if place is None:
            return
        later = None if place + 1 == len(_open) else _open[place + 1]
        for name, state in window.states.items():
            if name[0] in leaving:
                continue
            if later is None:
                sources[name].put(state)
            else:
                later.states[name] = state
        del _open[place]


def other_threads() -> bool:
    """Check for threads besides this one and this package's own, which may draw random numbers at any time."""
    current = threading.current_thread()
    return any(
        thread is not current and not thread.name.startswith("accelerate_tts") for thread in threading.enumerate()
    )


def others_draw(device_type: str) -> bool:
    """Check for draws of another thread, during a moment in which this thread draws nothing.

    A thread that draws more rarely is not seen.

    Args:
        device_type: Device whose torch generators are watched beside the CPU's.
    """
    if not other_threads():
        return False
    sources = sources_of({device_type})
    before = _digests(sources)
    time.sleep(_MOMENT)
    return _digests(sources) != before


_reading = rlock()
_paused = threading.Event()  # while `without_collection` has paused the collector


def _collect_in_child() -> None:
    # The thread that would go on with collections is not in a forked child.
    if _paused.is_set():
        _paused.clear()
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collect_in_child)


def without_collection(get: Callable[[], Any]) -> Any:
    """Return the state of a torch generator, without a garbage collection meanwhile.

    torch (seen with 2.14.1) holds the generator's mutex while it makes the tensor for the state. A collection at that
    moment frees tensors, and each of these lets go of the interpreter's lock. Another thread that asks for the state
    takes that lock and waits for the mutex, and both wait for ever.

    Args:
        get: The generator's method, or torch's function for the default one.
    """
    with _reading:
        if not gc.isenabled():
            return get()
        try:
            _paused.set()
            gc.disable()
            return get()
        finally:
            gc.enable()
            _paused.clear()


def sources_of(devices: Collection[str]) -> dict[tuple[str, str], Source]:
    """Return the generators of the loaded libraries, by library and device.

    Those of this thread's `own_random` are among them.

    Args:
        devices: Device types whose torch generators are included beside the CPU's.
    """
    found = {("python", ""): Source(random.getstate, random.setstate, random.seed)}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        found["numpy", ""] = Source(numpy.random.get_state, numpy.random.set_state, numpy.random.seed)
    if torch is not None:
        get = partial(without_collection, torch.get_rng_state)
        found["torch", "cpu"] = Source(get, torch.set_rng_state, torch.default_generator.manual_seed)
        for device in ("cuda", "xpu"):
            if device in devices:
                of = getattr(torch, device)
                get = partial(without_collection, of.get_rng_state_all)
                found["torch", device] = Source(get, of.set_rng_state_all, of.manual_seed_all)
        if "mps" in devices:
            get = partial(without_collection, torch.mps.get_rng_state)
            found["torch", "mps"] = Source(get, torch.mps.set_rng_state, torch.mps.manual_seed)
    own = _own_random().opened() if torch is not None else None
    if own is not None:
        found["torch", "own"] = Source(own.states, own.put_back, own.seed)
    return found


def _own_random() -> Any:
    from accelerate_tts.runtime import own_random  # imports torch, which may not be loaded

    return own_random


def _outside_own_random() -> AbstractContextManager[None]:
    return nullcontext() if "torch" not in sys.modules else _own_random().outside()


def _digests(sources: dict[tuple[str, str], Source]) -> dict[tuple[str, str], str]:
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
