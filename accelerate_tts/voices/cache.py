"""Cache of `@cached_embedding`: makes the key of a call, computes each key once, and stores results that are valid."""

from __future__ import annotations

import cmath
import inspect
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from accelerate_tts.errors import described, message_of
from accelerate_tts.events import Lasting, NotApplied, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.inspection.object_tree import attributes_of, reachable_modules
from accelerate_tts.locks import lock, rlock
from accelerate_tts.runtime.seeding import warming
from accelerate_tts.storage.file_digests import UnknownContentError
from accelerate_tts.tuning.compare import tensors_of
from accelerate_tts.voices.content_key import Digest
from accelerate_tts.voices.disk import EmbeddingFiles
from accelerate_tts.voices.encoder_state import constants, function_words, numerics, outside
from accelerate_tts.voices.memory import CacheInfo, EmbeddingStore, Flight, StoredEmbedding, parts_of

_LOOK = 1.0  # seconds after which a waiting task looks if the computation goes on


@dataclass(frozen=True)
class CacheOptions:
    """Options of `@cached_embedding(...)`."""

    limit_bytes: int
    folder: Path | None = None
    sets: tuple[str, ...] = ()
    encoder: Callable[..., Any] | None = None


@dataclass(frozen=True)
class _Question:
    """The key of one call: the function, the content of its arguments, and the state of the encoder."""

    key: str
    durable: bool
    arguments: Digest
    encoder: str
    packages: frozenset[str]  # packages of the function and the encoder, whose dataclasses a file may contain


class Embeddings:
    """The embeddings of one decorated function."""

    def __init__(self, what: str, options: CacheOptions) -> None:
        self._what = f"the embedding cache of {what}"
        self._options = options
        self._store = EmbeddingStore(options.limit_bytes)
        self._files = None if options.folder is None else EmbeddingFiles(options.folder, options.limit_bytes)
        self._turns = _Turns() if options.sets else None
        self._events = Lasting()

    def info(self) -> CacheInfo:
        """Return hits, misses, and the cache's content in memory."""
        return self._store.info()

    def clear(self) -> None:
        """Clear the cache in memory. Files stay."""
        self._store.clear()

    def call(self, wrapped: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a stored result, or run the call and store its result.

        A coroutine function gives a coroutine.
        """
        if warming.get():
            return wrapped(*args, **kwargs)
        if inspect.iscoroutinefunction(wrapped):
            return self._call_async(wrapped, owner, args, kwargs)
        turn: AbstractContextManager[Any] = nullcontext() if self._turns is None else self._turns.of(owner)
        with turn:
            return self._answer(wrapped, owner, args, kwargs)

    def _answer(self, wrapped: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asker = threading.get_ident()
        while (question := self._ask(wrapped, owner, args, kwargs)) is not None:
            kept, flight, leads = self._store.begin(question.key, asker)
            if leads:
                break
            if kept is None and flight.leader == asker:
                return self._run(wrapped, args, kwargs)  # a recursive call with the same arguments
            found: Any = kept or flight.future.result()
            if found is not None:
                if isinstance(found, StoredEmbedding):
                    return self._handed_out(found, owner)
                return self._run(wrapped, args, kwargs)
        else:
            return self._run(wrapped, args, kwargs)
        outcome: StoredEmbedding | str | None = None
        result: Any = None
        try:
            outcome = stored = self._stored(question)
            if outcome is None:
                result = self._run(wrapped, args, kwargs)
                outcome = self._kept(question, wrapped, owner, result)
        finally:  # also after an exception: waiting calls wake up and compute for themselves
            self._store.end(question.key, flight, outcome)
        return self._finished(question, owner, outcome, result, stored=stored is not None)

    async def _call_async(
        self, wrapped: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        import asyncio

        turn: AbstractAsyncContextManager[Any] = _nobody() if self._turns is None else self._turns.of_task(owner)
        async with turn:
            asker = asyncio.current_task()
            while True:
                if self._files is None:
                    question = self._ask(wrapped, owner, args, kwargs)
                else:  # in a thread, since gigabytes of weights may be read
                    settings = numerics()  # those of this thread
                    question = await asyncio.to_thread(self._ask, wrapped, owner, args, kwargs, settings)
                if question is None:
                    return await self._run(wrapped, args, kwargs)
                kept, flight, leads = self._store.begin(question.key, asker, asyncio.get_running_loop())
                if leads:
                    break
                if kept is None and flight.leader is asker:
                    return await self._run(wrapped, args, kwargs)
                found: Any = kept or await _ended(flight)
                if found is not None:
                    if isinstance(found, StoredEmbedding):
                        return self._handed_out(found, owner)
                    return await self._run(wrapped, args, kwargs)
            outcome: StoredEmbedding | str | None = None
            result: Any = None
            try:
                outcome = stored = self._stored(question)
                if outcome is None:
                    result = await self._run(wrapped, args, kwargs)
                    outcome = self._kept(question, wrapped, owner, result)
            finally:  # also when the task was cancelled
                self._store.end(question.key, flight, outcome)
            return self._finished(question, owner, outcome, result, stored=stored is not None)

    def _run(self, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._store.count(hit=False)
        return wrapped(*args, **kwargs)

    def _finished(
        self, question: _Question, owner: Any, outcome: StoredEmbedding | str | None, result: Any, *, stored: bool
    ) -> Any:
        if not isinstance(outcome, StoredEmbedding):
            return result
        if self._files is not None and not question.durable:
            reason = "it is kept in memory: another process cannot tell if it has the same encoder"
            reason += "; name it, as by encoder=lambda self: self.path"
            self._events.emit(NotApplied(f"{self._what}: folder=", reason))
        elif not stored and self._files is not None:
            try:
                self._files.write(question.key, outcome, question.packages)
            except Exception as error:  # a result may be of any class
                self._events.emit(NotApplied(f"{self._what}: folder=", f"{message_of(error)}; it is kept in memory"))
        # The first caller gets a copy, too, so that all callers get the same.
        return self._handed_out(outcome, owner, count=stored)

    def _handed_out(self, kept: StoredEmbedding, owner: Any, *, count: bool = True) -> Any:
        if count:
            self._store.count(hit=True)
        result, attributes = kept.copy()
        for name in self._options.sets:  # only these, whatever a file contains
            setattr(owner, name, attributes[name])
        return result

    def _stored(self, question: _Question) -> StoredEmbedding | None:
        if self._files is None or not question.durable:
            return None
        return self._files.read(question.key, question.packages, self._is_answer)

    def _is_answer(self, value: Any) -> bool:
        """Check that a file's value is a pair of a result and the attributes of `sets`."""
        if type(value) is not tuple or len(value) != 2:  # noqa: PLR2004 - a pair
            return False
        attributes = value[1]
        return type(attributes) is dict and attributes.keys() == set(self._options.sets)

    def _kept(self, question: _Question, wrapped: Callable[..., Any], owner: Any, result: Any) -> StoredEmbedding | str:
        """Copy a call's result for the store; return `ALONE`, with an event, if it must not or cannot be stored."""
        try:
            kept = StoredEmbedding((result, {name: getattr(owner, name) for name in self._options.sets}))
            if not _is_finite(kept.copy()):
                emit(NotApplied(self._what, "the result is not finite, and is not kept"))
                return Flight.ALONE
            if not question.arguments.same_files():  # it is unknown which content the function read
                emit(NotApplied(self._what, "a file was written while it was read, and the result is not kept"))
                return Flight.ALONE
            same = str(self._encoder(wrapped, owner, numerics())) == question.encoder
        except Exception as error:  # the user's classes decide how they are copied
            self._events.emit(NotApplied(self._what, f"the result cannot be kept: {described(error, 200)}"))
            return Flight.ALONE
        if not same:
            reason = "the encoder was loaded or changed by the call itself; name its encoder="
            self._events.emit(NotApplied(self._what, reason))
            return Flight.ALONE
        return kept

    def _ask(
        self, wrapped: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        settings: str | None = None,
    ) -> _Question | None:  # fmt: skip
        try:
            bound = inspect.signature(wrapped).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return None  # the call itself raises the right error
        try:
            return self._question(wrapped, owner, bound, settings or numerics())
        except UnknownContentError as error:
            reason = str(error)
        except Exception as error:  # arguments, and what `encoder=` reads, may be of any class
            reason = f"the arguments of the call cannot be hashed: {described(error, 200)}"
        self._events.emit(NotApplied(self._what, reason))
        return None

    def _question(
        self, wrapped: Callable[..., Any], owner: Any, bound: inspect.BoundArguments, settings: str
    ) -> _Question:
        bound.apply_defaults()
        arguments = Digest(durable=self._files is not None)
        arguments.add(dict(bound.arguments))
        encoder = self._encoder(wrapped, owner, settings)
        kind = owner if isinstance(owner, type) else type(owner)
        key = Digest()
        module = str(getattr(wrapped, "__module__", ""))
        words = [module, str(getattr(wrapped, "__qualname__", "")), repr(function_words(wrapped)), _release_of(module)]
        words += [*constants(wrapped), *self._options.sets, kind.__module__, kind.__qualname__]
        for word in (*words, str(arguments), str(encoder)):
            key.word(word)
        packages = _packages(wrapped, owner) if self._files is not None else frozenset[str]()
        return _Question(str(key), arguments.durable and encoder.durable, arguments, str(encoder), packages)

    def _encoder(self, wrapped: Callable[..., Any], owner: Any, settings: str) -> Digest:
        digest = Digest(durable=self._files is not None)
        digest.circumstances(settings)
        if self._options.encoder is not None:
            digest.add(self._options.encoder() if owner is None else self._options.encoder(owner))
            return digest
        modules = _modules(wrapped, owner)
        for module in modules:
            digest.add(module)
            digest.word(_release_of(type(module).__module__))
        if not modules:
            digest.durable = False  # the next process cannot check that it has the same encoder
        if not digest.durable and owner is not None and not isinstance(owner, type):
            # The owner may hold other state than modules, such as an ONNX session; only its identity covers that.
            digest.identity(owner)
        return digest


def _is_finite(value: Any) -> bool:
    """Check every tensor, array and number of a result."""
    numbers = (part for part in parts_of(value) if isinstance(part, (float, complex)))
    # torch has no isfinite() for float8.
    tensors = (one.float() if one.dtype.itemsize == 1 and one.is_floating_point() else one for one in tensors_of(value))
    return all(map(cmath.isfinite, numbers)) and all(bool(tensor.isfinite().all()) for tensor in tensors)


def _modules(wrapped: Callable[..., Any], owner: Any) -> list[Any]:
    """Return the modules that a function may use: on `self`, on its class, and those that it and its helpers name.

    A method of a module counts as the module.
    """
    named = outside(wrapped)
    if owner is None:
        return list(reachable_modules({**named, "": _bound(named.values())}).values())
    found = {id(module): module for module in reachable_modules(owner).values()}
    bases = [base for base in type(owner).__mro__ if not base.__module__.startswith("torch.")]
    beside = [*named.values(), *(value for base in bases for value in vars(base).values())]
    beside += _bound((*beside, *attributes_of(owner).values()))
    found.update((id(value), value) for value in beside if issubclass(type(value), nn.Module))
    return list(found.values())


def _bound(values: Iterable[Any]) -> list[Any]:
    return [value.__self__ for value in values if type(value) is MethodType]


def _packages(wrapped: Callable[..., Any], owner: Any) -> frozenset[str]:
    """Return the packages of the function and of its encoder's classes."""
    names = (getattr(wrapped, "__module__", None), *(type(module).__module__ for module in _modules(wrapped, owner)))
    return frozenset(str(name).partition(".")[0] for name in names if name) - {"torch", "builtins"}


@cache
def _release_of(module: str | None) -> str:
    """Return name and version of a module's package, since another version may compute something else."""
    package = (module or "").partition(".")[0]
    try:
        return f"{package} {metadata.version(package)}" if package else ""
    except (metadata.PackageNotFoundError, ValueError):  # the user's own code, or a distribution of another name
        return f"{package} {getattr(sys.modules.get(package), '__version__', '')}"


async def _ended(flight: Flight) -> Any:
    """Wait for a computation and return its outcome; `None` if its event loop has stopped in the middle of it."""
    import asyncio

    outcome = asyncio.wrap_future(flight.future)
    try:
        while not (outcome.done() or flight.is_abandoned):
            await asyncio.wait({outcome}, timeout=_LOOK)
        return outcome.result() if outcome.done() else None
    finally:
        outcome.cancel()  # it must not be told after this loop's end


@asynccontextmanager
async def _nobody() -> AsyncGenerator[None, None]:
    yield


class _Turns:
    """Locks that allow one call at a time for each object whose attributes are set, so that voices do not mix.

    Threads exclude each other, and so do the tasks of one event loop.
    """

    def __init__(self) -> None:
        self._lock = lock()
        self._locks = IdentityMap[dict[Any, Any]]()
        self._common: dict[Any, Any] = {}
        self._inside: ContextVar[tuple[int, ...]] = ContextVar("accelerate_tts_embedding", default=())

    def of(self, owner: Any) -> AbstractContextManager[Any]:
        """Return the lock of an object for threads."""
        turn: AbstractContextManager[Any] = self._get(owner, None, rlock)
        return turn

    @asynccontextmanager
    async def of_task(self, owner: Any) -> AsyncGenerator[None, None]:
        """Hold the lock of an object for a task while open."""
        import asyncio

        inside = self._inside.get()
        if id(owner) in inside:  # a recursive call, perhaps through a task that it waits for
            yield
            return
        async with self._get(owner, asyncio.get_running_loop(), asyncio.Lock):
            self._inside.set((*inside, id(owner)))
            try:
                yield
            finally:
                self._inside.set(inside)

    def _get(self, owner: Any, loop: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            try:
                locks = self._locks.setdefault(owner, dict)
            except TypeError:  # no support for weak references: all such objects share the locks
                locks = self._common
            if loop not in locks:
                for ended in [known for known in locks if known is not None and known.is_closed()]:
                    del locks[ended]
                locks[loop] = make()
            return locks[loop]
