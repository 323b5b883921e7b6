"""Batched calls of a function, with smaller batches where memory runs out.

The batch size is found by trial, not configured. A batch that runs out of memory is halved and tried again, the size
that worked is stored for the function, and after some full batches twice as many items are tried. The failed call's
exception is dropped before the next call, since its traceback would keep every tensor of its frames alive.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from accelerate_tts.device import detect, memory
from accelerate_tts.errors import SettingsError, described, shown
from accelerate_tts.events import BackedOff, NotApplied, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.locks import rlock
from accelerate_tts.runtime.guard.gate import Step

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_DEFAULT_LIMIT = 8
_DEFAULT_RECOVERY = 8
_PATIENCE = 16
"""A larger batch that keeps failing is tried less and less often, but at least once in this many recoveries."""
_EXHAUSTED = re.compile(
    "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class Results(Protocol[R_co]):
    """A sequence with one result for each item, in order: a list, a tuple, an array, a tensor's rows."""

    def __len__(self) -> int:
        """Return the number of results."""
        ...

    def __iter__(self) -> Iterator[R_co]:
        """Iterate over the results."""
        ...


class Batched(Generic[T, R]):
    """A function of a list, callable on any number of items. Made by `batched()`.

    Thread-safe. All threads share the batch size that fits.
    """

    __slots__ = ("_fits", "_function", "_limit", "_recover_after")

    def __init__(self, function: Callable[[list[T]], Results[R]], limit: int, recover_after: int) -> None:
        self._function = function
        self._limit = limit
        self._recover_after = recover_after
        self._fits = _fits_of(function)

    def __call__(self, items: Iterable[T]) -> list[R]:
        """Return the results of all items, in order.

        Raises:
            TypeError: `items` is not iterable or is a text, or the function did not return a sequence.
            ValueError: The function returned more or fewer results than it got items.
        """
        results: list[R] = []
        waiting: list[T] = []
        source = _iterator(items)
        while (found := self._next(source, waiting)) is not None:
            results.extend(found)
        return results

    def stream(self, items: Iterable[T]) -> Iterator[R]:
        """Yield the results as they come. Items are taken a batch at a time, so `items` may be infinite.

        Raises:
            TypeError, ValueError: As when called.
        """
        return self._stream(_iterator(items))

    @property
    def size(self) -> int:
        """Number of items of the next batch."""
        return self._fits.size(self._limit)

    def __reduce__(self) -> Any:
        return type(self), (self._function, self._limit, self._recover_after)

    def __repr__(self) -> str:
        return f"<batched {_name(self._function)}, {self.size} of at most {self._limit} at a time>"

    def _stream(self, source: Iterator[T]) -> Iterator[R]:
        waiting: list[T] = []
        while (found := self._next(source, waiting)) is not None:
            yield from found
            del found  # frees this batch before the next one is computed

    def _next(self, source: Iterator[T], waiting: list[T]) -> Results[R] | None:
        """Return the results of the next batch; `None` at the end. `waiting` holds items without a result."""
        while True:
            size = self.size
            waiting.extend(islice(source, max(0, size - len(waiting))))
            count = min(size, len(waiting))
            if count == 0:
                return None
            found = self._try(waiting[:count])
            if found is not None:
                del waiting[:count]
                self._fits.worked(count, self._limit, self._recover_after)
                return found
            smaller = self._fits.failed(count)
            # The exception is gone here, so the tensors of its frames are garbage.
            _clean_up()
            emit(BackedOff(_name(self._function), count, smaller))

    def _try(self, batch: list[T]) -> Results[R] | None:
        count = len(batch)  # read first, since the function may change the list
        step = Step()
        try:
            with step.entered():
                found = self._function(batch)
        except Exception as error:  # other errors are raised unchanged
            if count == 1 or not is_out_of_memory(error):
                raise
            if step.obstacle:  # it may have charged for this batch already
                emit(BackedOff(_name(self._function), count, self._fits.failed(count)))
                raise
            return None
        return _checked(found, count, self._function)


class _Fits:
    """Batch size that fits, as far as known."""

    def __init__(self) -> None:
        self.lock = rlock()  # reentrant: a finaliser may call a batched function while it is held
        self.known: int | None = None  # the next size; None while nothing has failed
        self.good = 0  # the size that worked last
        self.streak = 0
        self.wait = 1
        self.probing = False

    def size(self, limit: int) -> int:
        with self.lock:
            return limit if self.known is None else min(limit, self.known)

    def failed(self, count: int) -> int:
        """Return the next size: half of the failed one, or the size that worked last if that is larger."""
        with self.lock:
            if self.good >= count:
                self.good = 0  # less memory is free than before
            smaller = max(1, count // 2, self.good)
            self.known = smaller if self.known is None else min(smaller, self.known)  # other threads may fail, too
            if self.probing:
                self.wait = min(2 * self.wait, _PATIENCE)
            self.streak, self.probing = 0, False
            return self.known

    def worked(self, count: int, limit: int, recover_after: int) -> None:
        with self.lock:
            if self.known is None or count < min(limit, self.known):
                return
            self.good = count
            if self.probing:
                self.wait, self.probing = 1, False
            self.streak += 1
            if self.streak >= recover_after * self.wait and self.known < limit:
                self.streak, self.probing = 0, True
                self.known *= 2


# By the object of a bound method or the function itself, then by function.
_known = IdentityMap[IdentityMap[_Fits]]()


def _fits_of(function: Any) -> _Fits:
    # A bound method is a new object each time it is looked up.
    bound = getattr(function, "__func__", None)
    owner, inner = (function, function) if bound is None else (getattr(function, "__self__", None), bound)
    try:
        return _known.setdefault(owner, IdentityMap).setdefault(inner, _Fits)
    except TypeError:  # no support for weak references
        return _Fits()


def is_out_of_memory(error: BaseException) -> bool:
    """Check that an exception reports exhausted memory, of the device or the machine."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    kind: Any = getattr(torch, "OutOfMemoryError", ())
    # The CPU's allocator, MPS and cuBLAS raise a plain RuntimeError.
    return isinstance(error, kind) or (isinstance(error, RuntimeError) and bool(_EXHAUSTED.search(str(error))))


def batched(
    function: Callable[[list[T]], Results[R]], *, limit: int | None = None, recover_after: int = _DEFAULT_RECOVERY
) -> Batched[T, R]:
    """Call a function of a list on any number of items, in batches that fit into memory.

    A batch that runs out of GPU or main memory is halved and tried again after a clean-up, with a `BackedOff` event.
    The size that worked is stored for the function, or for a method for its object. After some full batches twice as
    many items are tried, up to `limit`. If a single item runs out of memory, its exception is raised. All other
    exceptions are raised at once.

    The function may be called several times with the same items, so it should have no side effects before it returns.
    If it is, or has called, one with `@inference(retry=False)`, it is not called again: the exception is raised, and
    the next call begins with the smaller batch. The results of earlier batches are lost with it; `stream` has yielded
    them.

    Args:
        function: Called with a list of items; returns as many results, in order. Not `async`.
        limit: Maximum items of a batch; `None` means 8. `get_performance_optimizer().get_optimal_batch_size(
            item_bytes=...)` returns a number that fits into free memory.
        recover_after: Number of full batches that must succeed before a larger one is tried.

    Returns:
        A callable that takes an iterable of items and returns the list of results. Its `stream(items)` yields results
        as they come, and its `size` is the number of items of the next batch.

    Raises:
        SettingsError: `limit` or `recover_after` is not a whole number of at least 1.
        TypeError: `function` is not callable, or is `async`.

    Example:
        >>> speak_all = batched(model.generate, limit=16)
        >>> wavs = speak_all(texts)
    """
    if not callable(function):
        raise TypeError(f"batched() needs a function of a list of items, got {shown(function)}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"batched() needs a function that is not async, got {shown(function)}")
    if limit is None:
        limit = _DEFAULT_LIMIT
    for name, value in (("limit", limit), ("recover_after", recover_after)):
        if type(value) is not int or not 1 <= value <= sys.maxsize:
            raise SettingsError(f"{name}={shown(value)} must be a whole number from 1 to {sys.maxsize}")
    return Batched(function, limit, recover_after)


def _iterator(items: Any) -> Iterator[Any]:
    given: Any = None if isinstance(items, (str, bytes)) else items  # a text would be taken as a sequence of letters
    try:
        return iter(given)
    except TypeError as error:
        said = f"a batched function needs an iterable of items, such as a list, got {shown(items)}"
        raise TypeError(said) from error


def _checked(results: Results[R], count: int, function: Any) -> Results[R]:
    found: Any = results
    # A mapping iterates over keys, a set has no order, and a generator has no length and has not run yet.
    try:
        length = None if isinstance(found, (str, bytes, Mapping, AbstractSet)) else len(found)
    except TypeError:
        length = None
    if length is None or not hasattr(type(found), "__iter__"):
        kind = type(found).__name__
        raise TypeError(f"{_name(function)} must return a sequence of {count} results, and returned a {kind}")
    if length != count:
        raise ValueError(f"{_name(function)} was given {count} items and returned {length} results")
    return results


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _clean_up() -> None:
    if "torch" not in sys.modules:
        gc.collect()
        return
    try:
        memory.cleanup(detect.detect())
    except Exception as error:  # the driver failed; the smaller batch may still fit
        with suppress(Exception):
            emit(NotApplied("the clean-up after a batch that ran out of memory", described(error)))
