"""`@cached_embedding`: embed each reference voice once, for any number of requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from accelerate_tts.decorators import BoundShell, Shell, check_function, owner_of_call
from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.locks import lock
from accelerate_tts.settings import check_folder, is_active

if TYPE_CHECKING:
    from accelerate_tts.voices.cache import Embeddings
    from accelerate_tts.voices.memory import CacheInfo

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
R_co = TypeVar("R_co", covariant=True)

_MOST_MB = 2**40  # an exbibyte, beyond the size of any file


class CachedFunction(Protocol[P, R_co]):
    """A decorated function with methods of its cache."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function, or return a stored result."""
        ...

    @overload
    def __get__(self, instance: None, owner: type[Any], /) -> CachedFunction[P, R_co]: ...
    @overload
    def __get__(
        self: CachedFunction[Concatenate[S, Q], R_co], instance: S, owner: type[Any] | None = None, /
    ) -> CachedFunction[Q, R_co]: ...

    def cache_info(self) -> CacheInfo:
        """Return hits, misses, entries and bytes of the cache, for all instances together."""
        ...

    def cache_clear(self) -> None:
        """Clear the cache in memory. Files in `folder=` stay."""
        ...


class _Cached:
    # `_self_wrapper` is wrapt's own name: the `_AnswerFromCache` of the shell. See `_NoFunction` for its annotation.

    def cache_info(self: Any) -> CacheInfo:
        return self._self_wrapper.embeddings.info()  # type: ignore[no-any-return]

    def cache_clear(self: Any) -> None:
        self._self_wrapper.embeddings.clear()


class _CachedBound(_Cached, BoundShell):
    pass


class _CachedShell(_Cached, Shell):
    pass


setattr(_CachedShell, "__bound_function_wrapper__", _CachedBound)  # noqa: B010 - wrapt declares it on instances


class _AnswerFromCache:
    """Handles the calls of a @cached_embedding shell. It is a class so that it can be pickled, without the cache."""

    def __init__(self, what: str, *options: Any) -> None:
        self._what = what
        self._options = options
        self._lock = lock()
        self._made: Embeddings | None = None

    def __reduce__(self) -> Any:
        return type(self), (self._what, *self._options)

    @property
    def embeddings(self) -> Embeddings:
        from accelerate_tts.voices.cache import CacheOptions, Embeddings

        with self._lock:
            if self._made is None:
                self._made = Embeddings(self._what, CacheOptions(*self._options))
            return self._made

    def __call__(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not is_active():
            return wrapped(*args, **kwargs)
        if instance is None and (owner := owner_of_call(wrapped, args)) is not None:
            wrapped, instance, args = MethodType(wrapped, owner), owner, args[1:]
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
    """Cache the embeddings of reference voices by the audio's content and the encoder's state.

    Use it on a function or method, sync or async, whose result depends only on its arguments and an encoder. Examples
    are resemblyzer's `embed_utterance`, XTTS's `get_conditioning_latents` and, with `sets=("conds",)`, Chatterbox's
    `prepare_conditionals`. Simultaneous calls with one voice compute it once. Each caller gets a copy with normal
    tensors, without a graph. A call with an argument whose content cannot be hashed (a URL, an unknown object) runs
    undecorated, and emits an event. Exceptions are not cached.

    A path, or a text that names a file, is hashed by the file's bytes. The encoder is the set of modules on `self` and
    among the names that the function uses. Their weights, modes, hooks, plain attributes and options (`config`, `hp`)
    are part of the key, as are torch's precision settings. A write through `.data` is noticed if it changes one of some
    dozens of sampled elements of a weight on the CPU. A tensor that is no parameter counts unless a method other than
    `__init__` sets it; a write into it is not noticed. Other attributes that the method reads are not part of the key;
    name them in `encoder`.

    Args:
        function: The function, when used without parentheses.
        limit_mb: Maximum size in memory, and separately on disk, in MiB. The least recently used are evicted first.
        folder: Folder in which embeddings are stored for the next process. Results may consist of tensors, NumPy
            arrays, numbers, texts, lists, tuples, dicts, and dataclasses of the packages of the function or the encoder
            (Chatterbox's `Conditionals`). Objects of other classes are cached in memory only, and so are the results of
            a quantised encoder. Weights are then hashed once, at about half a second a gigabyte. With more than 256
            files, each writing process may temporarily exceed the limit by a sixteenth.
        sets: Attributes of `self` that the method sets; they are stored and set again. Calls of one object then run one
            at a time.
        encoder: Returns what the embedding depends on beside the arguments: a module, a path, a number, or a tuple of
            these. Called with `self`, or without arguments for a function.

    Raises:
        SettingsError: An option is invalid.
        TypeError: The decorated object is not a function.
    """
    options = _checked(limit_mb, folder, sets, encoder)

    def decorate(decorated: Any) -> Any:
        check_function("cached_embedding", decorated)
        named = getattr(decorated, "__func__", decorated)  # a class method or a bound method
        return _CachedShell(decorated, _AnswerFromCache(getattr(named, "__qualname__", repr(named)), *options))

    return decorate if function is None else decorate(function)


def _checked(limit_mb: Any, folder: Any, sets: Any, encoder: Any) -> tuple[Any, ...]:
    if isinstance(limit_mb, bool) or not isinstance(limit_mb, (int, float)) or not 0 < limit_mb <= _MOST_MB:
        raise SettingsError(f"limit_mb={shown(limit_mb)} must be a number of megabytes above 0, at most {_MOST_MB}")
    if folder is not None:
        check_folder("folder", folder)
    # A single text would be taken as a sequence of letters.
    try:
        names = None if isinstance(sets, str) else tuple(sets)
    except TypeError:  # not iterable
        names = None
    if names is None or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise SettingsError(f"sets={shown(sets)} must be a tuple of attribute names, such as ('conds',)")
    if encoder is not None and not callable(encoder):
        raise SettingsError(f"encoder={shown(encoder)} must be a callable, such as lambda self: self.encoder")
    return int(limit_mb * 2**20), None if folder is None else Path(folder), names, encoder
