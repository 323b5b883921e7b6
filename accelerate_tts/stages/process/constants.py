"""Constants that upstream recomputes at each call: mel filter banks, windows, resampling kernels. Bit-exact.

librosa computes its mel filter bank at every call, as do torchaudio's Kaldi features, and `functional.resample`
computes a kernel. Each is a pure function of a few numbers. These functions are observed during the reference pass.
Results of a function are cached by its arguments if it is slow enough to gain from that, a second call gives the same
bits, and it emits no warnings. Callers get copies, since they may write into a result.

The functions are replaced in every loaded module that has them (also by `from librosa.filters import mel`), until the
last tuned object is undone. A wrapper that is still referenced then calls upstream's function.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from accelerate_tts.locks import rlock
from accelerate_tts.patching.change import BaseChange

PURE = (
    "librosa.filters:mel",
    "librosa.filters:get_window",
    "librosa.filters:window_sumsquare",
    "torchaudio.compliance.kaldi:get_mel_banks",
    "torchaudio.compliance.kaldi:_feature_window_function",
    "torchaudio.functional.functional:melscale_fbanks",
    "torchaudio.functional.functional:_get_sinc_resample_kernel",
    "transformers.audio_utils:mel_filter_bank",
    "transformers.audio_utils:window_function",
)
"""Functions whose results depend only on their arguments and torch's default dtype, as `module:name`.

This is an explicit list, since observation cannot show that a function reads a global.
"""

_WORTH = 50e-6
"""Minimum seconds of upstream's call: a look-up and a copy take a few microseconds."""
_MOST_RESULTS, _MOST_BYTES = 64, 16 << 20
_DEEPEST_KEY = 3
_ABSENT: Any = object()


class _UnkeepableError(Exception):
    """An argument that cannot be a key, or a result that cannot be copied."""


class _Function:
    """One upstream function and its process-wide replacement."""

    def __init__(self, name: str, upstream: Callable[..., Any]) -> None:
        self.name = name
        self.upstream = upstream
        self.results: dict[Hashable, Any] = {}
        self.users: set[object] = set()
        self.watchers: list[dict[str, Watched]] = []
        self.stand_in = self._make()

    def _make(self) -> Callable[..., Any]:
        @functools.wraps(self.upstream)
        def constant(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not (self.users or self.watchers):
                return self.upstream(*args, **kwargs)
            return self._call(args, kwargs)

        # torch.jit.script compiles this function in place of the wrapper, which it cannot compile.
        vars(constant).update({"__script_if_tracing_wrapper": True, "__original_fn": self.upstream})
        return constant

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _modes() or getattr(_within, "upstream", False):
            return self.upstream(*args, **kwargs)
        try:
            key = _key(args), _key(tuple(sorted(kwargs.items()))), _settings()
        except _UnkeepableError:
            return self.upstream(*args, **kwargs)
        found = self.results.get(key, _ABSENT)
        if found is not _ABSENT:
            for seen in self.watchers:
                seen.setdefault(self.name, Watched()).calls += 1
            return _copied(found)
        _within.upstream = True  # nested calls are part of this call's time, and disappear once it is cached
        try:
            start = time.perf_counter()
            result = self.upstream(*args, **kwargs)
            self._learn(key, result, time.perf_counter() - start, args, kwargs)
        finally:
            _within.upstream = False
        return result

    def _learn(self, key: Hashable, result: Any, seconds: float, args: Any, kwargs: Any) -> None:
        try:
            kept = _copied(result)
        except _UnkeepableError:
            return
        if self.watchers:
            again, warned, took = self._again(args, kwargs)
            for seen in self.watchers:
                watched = seen.setdefault(self.name, Watched())
                watched.calls += 1
                watched.seconds.append(min(seconds, took))
                watched.pure = watched.pure and not warned and _same(kept, again)
        with _lock:
            sizes = [_size(value) for function in replaced_functions.values() for value in function.results.values()]
            if len(sizes) < _MOST_RESULTS and sum(sizes) + _size(kept) <= _MOST_BYTES:
                self.results[key] = kept

    def _again(self, args: Any, kwargs: Any) -> tuple[Any, bool, float]:
        """Call upstream again; return the result, True if it emitted a warning, and the seconds."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            start = time.perf_counter()
            result = self.upstream(*args, **kwargs)
            return result, bool(seen), time.perf_counter() - start


@dataclass
class Watched:
    """Observations of one function in a pass: cacheable calls, and the seconds of upstream's calls."""

    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    pure: bool = True

    @property
    def worth_it(self) -> bool:
        """True if the function is pure and slow enough for caching to gain time."""
        return self.pure and bool(self.seconds) and max(self.seconds) >= _WORTH

    @property
    def saved(self) -> float:
        """Seconds that caching saves in a pass."""
        return self.calls * sum(self.seconds) / len(self.seconds)


_lock = rlock()
_within = threading.local()
replaced_functions: dict[str, _Function] = {}
"""Functions that are replaced now."""
_known_ids: set[int] = set()
_modules_without: dict[str, tuple[int, int]] = {}  # by module: id of its dict, and number of names


class KeptConstants(BaseChange):
    """The change; see `Change`. It caches the functions that `watching` found worth it.

    Args:
        functions: The functions to observe; see `PURE`.
    """

    name = "constants of upstream"

    def __init__(self, functions: tuple[str, ...] = PURE) -> None:
        self.functions = functions
        self.found: dict[str, Watched] = {}
        self._user: object = None
        self._dropped: weakref.finalize[..., KeptConstants] | None = None

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Observe calls of the functions while open. Inside another object's `watching`, they are replaced already."""
        seen: dict[str, Watched] = {}
        try:
            with _lock:
                for function in _replace({name for name in self.functions if _upstream(name) is not None}):
                    function.results.clear()  # results cached for another object would hide calls of upstream
                    function.watchers.append(seen)
            yield
        finally:
            try:
                _watch_no_longer(seen)
            except BaseException:  # Ctrl-C in it
                _watch_no_longer(seen)
                raise
            self.found = {name: watched for name, watched in seen.items() if watched.worth_it}

    @property
    def saved(self) -> float:
        """Seconds saved in a pass, from the measured times of the functions."""
        return sum(watched.saved for watched in self.found.values())

    def __str__(self) -> str:
        """Return the functions with their calls and milliseconds, for people."""
        return ", ".join(
            f"{name.replace(':', '.')} ({watched.calls} calls, {1e3 * watched.saved:.2f} ms)"
            for name, watched in sorted(self.found.items())
        )

    def on(self) -> None:
        with _lock:
            if self._user is None:
                self._user = object()
                # A tuned object that is dropped is not undone first.
                self._dropped = weakref.finalize(self, _leave, self._user)
                self._dropped.atexit = False
                for function in _replace(set(self.found)):
                    function.users.add(self._user)

    def off(self) -> None:
        with _lock:
            if self._user is not None:
                _leave(self._user)
                if self._dropped is not None:
                    self._dropped.detach()
                self._user = None


def _leave(user: object) -> None:
    """Forget a user of functions, and restore those that have none left. Idempotent."""
    with _lock:
        for function in list(replaced_functions.values()):
            function.users.discard(user)
        _give_back()


def _watch_no_longer(seen: dict[str, Watched]) -> None:
    """Forget an observer of functions, and restore those that nobody needs replaced. Idempotent."""
    with _lock:
        for function in list(replaced_functions.values()):  # by identity: observations of two objects may be equal
            function.watchers = [other for other in function.watchers if other is not seen]
        _give_back()


def _upstream(name: str) -> Callable[..., Any] | None:
    """Return the function of that name if its module is loaded, else `None`."""
    module, _, attribute = name.partition(":")
    found = vars(sys.modules[module]).get(attribute) if sys.modules.get(module) is not None else None
    return found if callable(found) else None


def _replace(names: set[str]) -> list[_Function]:
    """Replace these functions in each loaded module."""
    with _lock:
        fresh = {}
        for name in names - replaced_functions.keys():
            upstream = _upstream(name)
            if upstream is not None:
                fresh[id(upstream)] = replaced_functions[name] = _Function(name, upstream)
        if not fresh.keys() <= _known_ids:
            _modules_without.clear()
            _known_ids.update(fresh)
        _exchange({key: function.stand_in for key, function in fresh.items()})
        return [replaced_functions[name] for name in names if name in replaced_functions]


def _give_back() -> None:
    """Restore upstream's functions that no tuned object or observer needs replaced."""
    # Of a list: the garbage collector may come in between, with an object that leaves.
    idle = [function for function in list(replaced_functions.values()) if not (function.users or function.watchers)]
    _exchange({id(function.stand_in): function.upstream for function in idle})
    for function in idle:  # last: an interruption above is followed by another attempt
        replaced_functions.pop(function.name, None)
        function.results.clear()


def _exchange(by_id: dict[int, Callable[..., Any]]) -> None:
    """Replace the functions with these ids in each loaded module.

    A large process has thousands of modules with a million names. Modules without any of the functions are skipped
    until their number of names changes. One that assigns a function to a name that it has had is missed; it calls
    upstream's, itself or by a replacement that nobody uses.
    """
    if not by_id:
        return
    ids = _known_ids | by_id.keys()
    for module_name, module in list(sys.modules.items()):
        try:
            names = object.__getattribute__(module, "__dict__")  # does not trigger lazily loaded modules
        except AttributeError:
            continue
        now = id(names), len(names)
        if _modules_without.get(module_name) == now:
            continue
        if ids.isdisjoint(map(id, names.values())):
            _modules_without[module_name] = now
            continue
        for name, value in list(names.items()):
            if id(value) in by_id:
                names[name] = by_id[id(value)]


def _modes() -> bool:
    """Check for an active torch mode that changes the tensors that calls make: a device context, fake tensors."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def _settings() -> Hashable:
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _key(value: Any, depth: int = 0) -> Hashable:
    """Return the cache key of an argument. It distinguishes 1, 1.0 and True, and 0.0 and -0.0."""
    if type(value) in {tuple, list} and depth < _DEEPEST_KEY:
        return type(value), *(_key(item, depth + 1) for item in value)
    if type(value) is float:
        return float, value.hex()
    if value is None or type(value) in {int, bool, str, bytes} or isinstance(value, (type, torch.dtype, torch.device)):
        return type(value), value
    raise _UnkeepableError


def _copied(value: Any) -> Any:
    """Return a copy of a result that the caller may write into."""
    numpy: Any = sys.modules.get("numpy")
    array: Any = value
    if type(value) is torch.Tensor and value.device.type == "cpu" and not value.requires_grad:
        return value.clone()
    if numpy is not None and type(value) is numpy.ndarray and not array.dtype.hasobject and array.flags.writeable:
        return array.copy(order="K")
    if type(value) is tuple:
        return tuple(_copied(item) for item in value)
    if value is None or type(value) in {int, float, bool, str}:
        return value
    raise _UnkeepableError


def _same(first: Any, second: Any) -> bool:
    """Check that two results are bit-identical, strides included."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        alike = (first.dtype, first.shape, first.stride()) == (second.dtype, second.shape, second.stride())
        return alike and first.numpy().tobytes() == second.numpy().tobytes()
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if hasattr(first, "tobytes"):
        alike = (first.dtype, first.shape, first.strides) == (second.dtype, second.shape, second.strides)
        return alike and first.tobytes() == second.tobytes()
    return bool(_key(first) == _key(second))


def _size(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_size, value))
    return int(getattr(value, "nbytes", 0))
