"""`@cached_embedding`: a reference voice is embedded once, however many requests speak with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from accelerate_tts.decorators import _BoundShell, _check_function, _Shell
from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.locks import lock
from accelerate_tts.settings import check_folder, is_active

if TYPE_CHECKING:
    from accelerate_tts.voices.cache import Embeddings
    from accelerate_tts.voices.memory import CacheInfo

__all__ = ["CachedFunction", "cached_embedding"]

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
R_co = TypeVar("R_co", covariant=True)

_MOST_MB = 2**40  # an exbibyte: what a file's size can be, with room


class CachedFunction(Protocol[P, R_co]):
    """A function with a cache: called like the function, and asked about the cache."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call it."""
        ...

    @overload
    def __get__(self, instance: None, owner: type[Any], /) -> CachedFunction[P, R_co]: ...
    @overload
    def __get__(
        self: CachedFunction[Concatenate[S, Q], R_co], instance: S, owner: type[Any] | None = None, /
    ) -> CachedFunction[Q, R_co]: ...

    def cache_info(self) -> CacheInfo:
        """Hits, misses, entries and bytes of the cache, of all instances together."""
        ...

    def cache_clear(self) -> None:
        """Forget what is in memory; files in `folder=` stay."""
        ...


class _CachedBound(_BoundShell):
    def cache_info(self) -> CacheInfo:
        return _cache_of(self).info()

    def cache_clear(self) -> None:
        _cache_of(self).clear()


class _CachedShell(_Shell):
    def cache_info(self) -> CacheInfo:
        return _cache_of(self).info()

    def cache_clear(self) -> None:
        _cache_of(self).clear()


def _cache_of(shell: Any) -> Embeddings:
    answer: _AnswerFromCache = shell._self_wrapper
    return answer.embeddings


setattr(_CachedShell, "__bound_function_wrapper__", _CachedBound)  # noqa: B010 - wrapt declares it on instances


class _AnswerFromCache:
    """Calls of a @cached_embedding shell. A class, so that it can be pickled: without what it holds."""

    def __init__(self, what: str, *options: Any) -> None:
        self._what = what
        self._options = options
        self._lock = lock()
        self._made: Embeddings | None = None

    def __reduce__(self) -> Any:
        return type(self), (self._what, *self._options)

    @property
    def embeddings(self) -> Embeddings:
        from accelerate_tts.voices.cache import Embeddings, Options

        with self._lock:
            if self._made is None:
                self._made = Embeddings(self._what, Options(*self._options))
            return self._made

    def __call__(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not is_active():
            return wrapped(*args, **kwargs)
        return self.embeddings.call(wrapped, instance, args, kwargs)


@overload
def cached_embedding(function: Callable[P, R_co], /) -> CachedFunction[P, R_co]: ...
@overload
def cached_embedding(
    *,
    limit_mb: float = 256,
    folder: str | os.PathLike[str] | None = None,
    sets: Iterable[str] = (),
    encoder: Callable[[Any], Any] | Callable[[], Any] | None = None,
) -> Callable[[Callable[P, R_co]], CachedFunction[P, R_co]]: ...
def cached_embedding(
    function: Any = None,
    /,
    *,
    limit_mb: float = 256,
    folder: str | os.PathLike[str] | None = None,
    sets: Iterable[str] = (),
    encoder: Callable[[Any], Any] | Callable[[], Any] | None = None,
) -> Any:
    """Remember the embeddings of reference voices, by the audio's content and the encoder's weights.

    For a function or method, sync or async, whose result depends on its arguments and an encoder alone, such as
    resemblyzer's `embed_utterance`, XTTS's `get_conditioning_latents`, or, with `sets=("conds",)`, Chatterbox's
    `prepare_conditionals`. Of simultaneous calls with one voice one computes. Everybody gets a copy of his own: normal
    tensors without a graph. A call with an argument whose content cannot be told (a URL, an unknown object) runs as if
    it was not decorated, and an event says so. An exception is not remembered.

    A path, or a text that is one, counts with the file's bytes. The encoder counts with the modules that are found on
    `self` and among the names that the function uses: with their weights, modes, hooks and plain attributes, and with
    torch's switches for precision. Whatever of it changes, the embedding is computed anew. A write through `.data` is
    seen where it changes one of some dozens of elements that are sampled of each weight in the CPU's memory. Other
    attributes that the method reads are no part of the key; name them in `encoder`.

    Args:
        function: The function, when used bare.
        limit_mb: What the cache may take in memory, and again on disk, in MiB; what was not used for longest goes.
        folder: Where embeddings are kept for the next process: results of tensors, NumPy arrays, numbers, texts, lists,
            tuples, dicts, and dataclasses of the packages that the function or the encoder is from (Chatterbox's
            `Conditionals`). Objects of other classes are kept in memory only. Weights are then read once to be told
            by content, about half a second per gigabyte. With more than 256 files in it, each process that writes may
            exceed the limit by a sixteenth for a while.
        sets: Attributes of `self` that the method sets; they are remembered and set again. Calls for one object then
            take turns.
        encoder: What the embedding depends on beside the arguments, called with `self` (a function's with nothing): a
            module, a path, a number, or a tuple of these.

    Raises:
        SettingsError: A limit, a folder, a name or an encoder that means nothing.
        TypeError: What is decorated is no function.
    """
    options = _checked(limit_mb, folder, sets, encoder)

    def decorate(decorated: Any) -> Any:
        _check_function("cached_embedding", decorated)
        named = getattr(decorated, "__func__", decorated)  # of a class method or a bound one
        return _CachedShell(decorated, _AnswerFromCache(getattr(named, "__qualname__", repr(named)), *options))

    return decorate if function is None else decorate(function)


def _checked(limit_mb: Any, folder: Any, sets: Any, encoder: Any) -> tuple[Any, ...]:
    if isinstance(limit_mb, bool) or not isinstance(limit_mb, (int, float)) or not 0 < limit_mb <= _MOST_MB:
        raise SettingsError(f"limit_mb={shown(limit_mb)} must be a number of megabytes above 0, at most {_MOST_MB}")
    if folder is not None:
        check_folder("folder", folder)
    # A text alone would be taken as a name for each of its letters.
    try:
        names = None if isinstance(sets, str) else tuple(sets)
    except TypeError:  # it has no items
        names = None
    if names is None or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise SettingsError(f"sets={shown(sets)} must be a tuple of attribute names, such as ('conds',)")
    if encoder is not None and not callable(encoder):
        raise SettingsError(f"encoder={shown(encoder)} must be a callable, such as lambda self: self.encoder")
    return int(limit_mb * 2**20), None if folder is None else Path(folder), names, encoder
