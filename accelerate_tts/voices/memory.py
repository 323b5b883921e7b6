"""Embeddings by key, bounded in bytes, safe from every thread; each is computed once, whoever asks meanwhile waits."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from accelerate_tts.inspection.object_tree import members_of
from accelerate_tts.locks import lock

__all__ = ["CacheInfo", "EmbeddingStore", "Flight", "Kept"]

# A rough figure for a small Python object: it keeps a million of them from counting as nothing.
_OBJECT_BYTES = 64


@dataclass(frozen=True)
class CacheInfo:
    """What a cache of embeddings did and holds.

    Attributes:
        hits: Calls that were answered without running the function.
        misses: Calls that ran it.
        entries: Embeddings in memory.
        bytes: What they take there.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


class Kept:
    """An embedding that nobody else can write to: copied when it comes and each time it is handed out.

    Raises:
        TypeError: It holds a module, or something that cannot be copied.
    """

    __slots__ = ("_value", "bytes")

    def __init__(self, value: Any) -> None:
        self._value, self.bytes = _copied(value)

    def copy(self) -> Any:
        """A copy of the embedding; its tensors are normal ones, without a graph, whatever mode the caller is in."""
        return _copied(self._value)[0]


def _copied(value: Any) -> tuple[Any, int]:
    import torch

    memo: dict[int, Any] = {}
    size = 0
    with torch.inference_mode(mode=False), torch.no_grad():
        for part in _parts(value):
            if isinstance(part, torch.nn.Module):
                raise TypeError(f"it holds a module ({type(part).__name__})")
            if isinstance(part, torch.Tensor):
                # By hand: deepcopy refuses tensors with a graph, keeps inference tensors, and copies whole storages.
                memo[id(part)] = part.detach().clone()
                size += part.numel() * part.element_size()
            else:
                size += _OBJECT_BYTES + _bytes(part)
        return copy.deepcopy(value, memo), size


def _parts(value: Any) -> Iterator[Any]:
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
    """One computation of an embedding, and those who wait for it.

    Its `future` brings the embedding; `None` if the computation failed, so that whoever waits tries himself; `ALONE` if
    its result cannot be kept, so that each computes his own.
    """

    ALONE = "alone"

    def __init__(self, leader: object) -> None:
        self.leader = leader
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # a task that waits and is cancelled must not cancel it


class EmbeddingStore:
    """Embeddings by key. What was not used for longest goes first.

    Args:
        limit_bytes: What all of them together may take; a larger one is not kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._lock = lock()
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._flights: dict[str, Flight] = {}
        self._bytes = self._hits = self._misses = 0

    def begin(self, key: str, asker: object) -> tuple[Kept | None, Flight, bool]:
        """What is kept under the key; else the flight that will bring it, and whether the asker has to fly it."""
        with self._lock:
            kept = self._entries.get(key)
            if kept is not None:
                self._entries.move_to_end(key)
                return kept, Flight(asker), False
            flight = self._flights.get(key)
            if flight is not None:
                return None, flight, False
            self._flights[key] = flight = Flight(asker)
            return None, flight, True

    def end(self, key: str, flight: Flight, outcome: Kept | str | None) -> None:
        """End a flight: keep what it brought, and wake those who wait for it."""
        with self._lock:
            if self._flights.get(key) is flight:  # else `clear` was called meanwhile
                del self._flights[key]
                if isinstance(outcome, Kept):
                    self._put(key, outcome)
        flight.future.set_result(outcome)

    def put(self, key: str, kept: Kept) -> None:
        """Keep an embedding."""
        with self._lock:
            self._put(key, kept)

    def _put(self, key: str, kept: Kept) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self._bytes -= old.bytes
        if kept.bytes > self._limit:
            return  # to evict all others for it would help nobody
        self._entries[key] = kept
        self._bytes += kept.bytes
        while self._bytes > self._limit:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.bytes

    def count(self, *, hit: bool) -> None:
        """Count a call."""
        with self._lock:
            self._hits += hit
            self._misses += not hit

    def info(self) -> CacheInfo:
        """What it did and holds."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._entries), self._bytes)

    def clear(self) -> None:
        """Forget all embeddings, those that are being computed too, and the counts."""
        with self._lock:
            self._entries.clear()
            self._flights.clear()
            self._bytes = self._hits = self._misses = 0
