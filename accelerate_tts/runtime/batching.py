"""Call a function on a list of items at a time, with fewer items where memory runs out.

How much fits is found out and not configured: a batch that runs out of memory is halved and tried again, what worked is
remembered with the function, and after some full batches twice as many are tried. The failed call is forgotten before
the next one begins: its exception's traceback would keep every tensor of its frames, just when memory is short.
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
from weakref import WeakKeyDictionary

from accelerate_tts.device import detect, memory
from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.events import BackedOff, NotApplied, emit
from accelerate_tts.locks import rlock

__all__ = ["Batched", "Results", "batched", "is_out_of_memory"]

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_DEFAULT_LIMIT = 8
_DEFAULT_RECOVERY = 8
_PATIENCE = 16
"""A larger batch that fails again and again is tried ever less often, at least once in this many recoveries."""
_EXHAUSTED = re.compile(
    "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class Results(Protocol[R_co]):
    """As many results as there were items, in their order: a list, a tuple, an array, a tensor's rows."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __iter__(self) -> Iterator[R_co]:
        """One after the other."""
        ...


class Batched(Generic[T, R]):
    """A function of a list, called on any number of items; made by `batched()`.

    Safe from every thread. All of them share what is known about the size that fits.
    """

    __slots__ = ("_fits", "_function", "_limit", "_recover_after")

    def __init__(self, function: Callable[[list[T]], Results[R]], limit: int, recover_after: int) -> None:
        self._function = function
        self._limit = limit
        self._recover_after = recover_after
        self._fits = _fits_of(function)

    def __call__(self, items: Iterable[T]) -> list[R]:
        """The results of all items, in their order.

        Raises:
            TypeError: `items` is no iterable, or a text; or the function gave no sequence.
            ValueError: The function gave more or fewer results than it got items.
        """
        results: list[R] = []
        waiting: list[T] = []
        source = _iterator(items)
        while (found := self._next(source, waiting)) is not None:
            results.extend(found)
        return results

    def stream(self, items: Iterable[T]) -> Iterator[R]:
        """The results as they come. Items are taken from `items` a batch at a time, so there may be no end of them.

        Raises:
            TypeError, ValueError: As when called.
        """
        return self._stream(_iterator(items))

    @property
    def size(self) -> int:
        """How many items the next batch will have."""
        return self._fits.size(self._limit)

    def __reduce__(self) -> Any:
        return type(self), (self._function, self._limit, self._recover_after)

    def __repr__(self) -> str:
        return f"<batched {_name(self._function)}, {self.size} of at most {self._limit} at a time>"

    def _stream(self, source: Iterator[T]) -> Iterator[R]:
        waiting: list[T] = []
        while (found := self._next(source, waiting)) is not None:
            yield from found
            del found  # while the next batch is computed, nobody needs this one

    def _next(self, source: Iterator[T], waiting: list[T]) -> Results[R] | None:
        """The results of the next batch; `None` at the end. `waiting` holds what was taken and has no result yet."""
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
            # Here the exception is gone, so what its frames held is garbage.
            _clean_up()
            emit(BackedOff(_name(self._function), count, smaller))

    def _try(self, batch: list[T]) -> Results[R] | None:
        count = len(batch)  # before the function gets the list, and does with it what it likes
        try:
            found = self._function(batch)
        except Exception as error:  # whatever it is: the user's own goes on as it came
            if count == 1 or not is_out_of_memory(error):
                raise
            return None
        return _checked(found, count, self._function)


class _Fits:
    """How many items fit, as far as is known."""

    def __init__(self) -> None:
        self.lock = rlock()  # a finaliser may call a function of its own while this is held
        self.known: int | None = None  # what is tried next; None: nothing has failed yet
        self.good = 0  # what worked last
        self.streak = 0
        self.wait = 1
        self.probing = False

    def size(self, limit: int) -> int:
        with self.lock:
            return limit if self.known is None else min(limit, self.known)

    def failed(self, count: int) -> int:
        """Half of it, or what worked last if that is more."""
        with self.lock:
            if self.good >= count:
                self.good = 0  # there is less memory than there was
            smaller = max(1, count // 2, self.good)
            self.known = smaller if self.known is None else min(smaller, self.known)  # other threads fail, too
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


_lock = rlock()
# By the object that a method is of, or the function itself; and in it by function. Neither is kept alive.
_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, _Fits]] = WeakKeyDictionary()


def _fits_of(function: Any) -> _Fits:
    # A bound method is a new object each time it is looked up.
    bound = getattr(function, "__func__", None)
    owner, inner = (function, function) if bound is None else (getattr(function, "__self__", None), bound)
    try:
        with _lock:
            return _known.setdefault(owner, WeakKeyDictionary()).setdefault(inner, _Fits())
    except TypeError:  # no hash, or no room for weak references
        return _Fits()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the device's, or the machine's."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    kind: Any = getattr(torch, "OutOfMemoryError", ())
    # The CPU's allocator, MPS and cuBLAS say it in a plain RuntimeError.
    return isinstance(error, kind) or (isinstance(error, RuntimeError) and bool(_EXHAUSTED.search(str(error))))


def batched(
    function: Callable[[list[T]], Results[R]], *, limit: int | None = None, recover_after: int = _DEFAULT_RECOVERY
) -> Batched[T, R]:
    """Call a function of a list on any number of items, in batches that fit into memory.

    A batch that runs out of memory, of a GPU or of the machine, is halved and tried again after a clean-up, with a
    `BackedOff` event. The size that worked is remembered for the function (for a method: of this object); after some
    full batches twice as many are tried, up to `limit`. If one item alone runs out of memory, its exception is raised.
    Every other exception is raised at once.

    The function may be called more than once with the same items, so it should have no effect before it returns.

    Args:
        function: Called with a list of items; it returns as many results, in their order. Not `async`.
        limit: The most items of a batch; `None` takes 8. `get_performance_optimizer().get_optimal_batch_size(
            item_bytes=...)` gives one that fits into free memory.
        recover_after: Full batches that must have worked before a larger one is tried.

    Returns:
        A callable of an iterable of items that returns the list of results. Its `stream(items)` yields them as they
        come, and its `size` is how many items the next batch will have.

    Raises:
        SettingsError: `limit` or `recover_after` is not a whole number, at least 1.
        TypeError: `function` cannot be called, or is `async`.

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
    given: Any = None if isinstance(items, (str, bytes)) else items  # a text would be taken for its letters
    try:
        return iter(given)
    except TypeError as error:
        said = f"a batched function needs an iterable of items, such as a list, got {shown(items)}"
        raise TypeError(said) from error


def _checked(results: Results[R], count: int, function: Any) -> Results[R]:
    found: Any = results
    # A mapping gives its keys and a set no order; a generator has no length, and its work would not be done yet.
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
    except Exception as error:  # a driver that cannot be asked; the smaller batch may fit all the same
        with suppress(Exception):
            emit(NotApplied("the clean-up after a batch that ran out of memory", f"{type(error).__name__}: {error}"))
