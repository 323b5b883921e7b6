"""Thread-safe store of embeddings by key, bounded in bytes. Each key is computed once while other callers wait."""

from __future__ import annotations

import copy
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.inspection.object_tree import members_of
from accelerate_tts.locks import lock

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

# Estimated bytes of a small Python object, so that a million of them do not count as nothing.
_OBJECT_BYTES = 64


@dataclass(frozen=True)
class CacheInfo:
    """Statistics of an embedding cache.

    Attributes:
        hits: Calls that returned a stored result.
        misses: Calls that ran the function.
        entries: Embeddings in memory.
        bytes: Their size in memory.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


class StoredEmbedding:
    """A private copy of an embedding. Callers get copies of it.

    Raises:
        TypeError: The embedding holds a module, or an object that cannot be copied.
    """

    __slots__ = ("_value", "bytes")

    def __init__(self, value: Any) -> None:
        self._value, self.bytes = _copied(value)

    def copy(self) -> Any:
        """Return a copy of the embedding with normal tensors, without a graph, in every mode of the caller."""
        return _copied(self._value)[0]


def _copied(value: Any) -> tuple[Any, int]:
    memo: dict[int, Any] = {}
    size = 0
    with torch.inference_mode(mode=False), torch.no_grad():
        for part in parts_of(value):
            if isinstance(part, torch.nn.Module):
                raise TypeError(f"it holds a module ({type(part).__name__})")
            if isinstance(part, torch.Tensor):
                # deepcopy refuses tensors with a graph, keeps inference tensors, and copies whole storages.
                memo[id(part)] = part.detach().clone()
                size += part.numel() * part.element_size()
            else:
                size += _OBJECT_BYTES + _bytes(part)
        return copy.deepcopy(value, memo), size


def parts_of(value: Any) -> Iterator[Any]:
    """Yield a value and all that it holds, each object once."""
    stack, seen = [value], {id(value)}
    while stack:
        part = stack.pop()
        yield part
        for _, item in members_of(part):
            if id(item) not in seen and not isinstance(item, type):
                seen.add(id(item))
                stack.append(item)


def _bytes(part: Any) -> int:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(part, numpy.ndarray):
        return int(part.nbytes)
    return len(part) if isinstance(part, (str, bytes, bytearray)) else 0


class Flight:
    """One running computation of an embedding, for which other callers wait.

    Its `future` gives the embedding. It gives `None` if the computation failed, so that the next waiting caller tries,
    and `ALONE` if the result cannot be stored, so that each caller computes its own.

    Args:
        leader: The thread or task that computes it.
        loop: The task's event loop.
    """

    ALONE = "alone"

    def __init__(self, leader: object, loop: AbstractEventLoop | None = None) -> None:
        self.leader = leader
        self._loop = loop
        self._process = os.getpid()
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # a cancelled waiting task must not cancel the future

    @property
    def is_abandoned(self) -> bool:
        """True if nobody computes it: its event loop does not run, or this is a forked child without its thread."""
        return self._process != os.getpid() or (self._loop is not None and not self._loop.is_running())


class EmbeddingStore:
    """Embeddings by key. The least recently used are evicted first.

    Args:
        limit_bytes: Maximum bytes of all embeddings. A larger one is not stored.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._lock = lock()
        self._entries: OrderedDict[str, StoredEmbedding] = OrderedDict()
        self._flights: dict[str, Flight] = {}
        self._bytes = self._hits = self._misses = 0

    def begin(
        self, key: str, asker: object, loop: AbstractEventLoop | None = None
    ) -> tuple[StoredEmbedding | None, Flight, bool]:
        """Look up a key.

        Args:
            key: The key.
            asker: The thread or task that asks.
            loop: The task's event loop.

        Returns:
            The embedding, or `None`; the computation that will give it; and True if the caller must compute it.
        """
        with self._lock:
            kept = self._entries.get(key)
            if kept is not None:
                self._entries.move_to_end(key)
                return kept, Flight(asker), False
            flight = self._flights.get(key)
            if flight is not None and not flight.is_abandoned:
                return None, flight, False
            self._flights[key] = flight = Flight(asker, loop)
            return None, flight, True

    def end(self, key: str, flight: Flight, outcome: StoredEmbedding | str | None) -> None:
        """End a computation: store its result, and wake waiting callers."""
        with self._lock:
            if self._flights.get(key) is flight:  # else it was cleared, or taken for abandoned
                del self._flights[key]
                # Evicting all others for a larger one would not help.
                if isinstance(outcome, StoredEmbedding) and outcome.bytes <= self._limit:
                    self._entries[key] = outcome
                    self._bytes += outcome.bytes
                    while self._bytes > self._limit:
                        _, oldest = self._entries.popitem(last=False)
                        self._bytes -= oldest.bytes
        flight.future.set_result(outcome)

    def count(self, *, hit: bool) -> None:
        """Count a call."""
        with self._lock:
            self._hits += hit
            self._misses += not hit

    def info(self) -> CacheInfo:
        """Return the statistics."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._entries), self._bytes)

    def clear(self) -> None:
        """Remove all embeddings, running computations included, and reset the counts."""
        with self._lock:
            self._entries.clear()
            self._flights.clear()
            self._bytes = self._hits = self._misses = 0
