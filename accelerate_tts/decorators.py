"""`@optimized_model` and `@inference`: thin wrappers around the shared engine that keep the decorated signature."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, overload

import wrapt

from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.runtime import inference_mode
from accelerate_tts.runtime.concurrency import limiter, queue
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.runtime.guard import guarded_call
from accelerate_tts.runtime.mode_choice import ModeChoice, made_once
from accelerate_tts.runtime.seeding import loading_again
from accelerate_tts.settings import Mode, Precision, check_mode, is_active

if TYPE_CHECKING:
    from accelerate_tts.tuning.load_request import LoadRequest
    from accelerate_tts.tuning.reload import Reloader

F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, ..., Any] | staticmethod[..., Any]")


class _NoFunction:
    """A wrapt proxy that only cloudpickle does not take for the function that it wraps.

    No class of a proxy may annotate an attribute: the function's `__annotations__` would be those of the class.
    """

    @property
    def __class__(self: Any) -> Any:
        # Taken for a function, cloudpickle would rebuild it from its code: undecorated, without a word.
        return self.__wrapped__.__class__ if _cloudpickle() is None else type(self)

    @__class__.setter
    def __class__(self: Any, kind: Any) -> None:
        self.__wrapped__.__class__ = kind


class Shell(_NoFunction, wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]  # wrapt < 2 ships no types
    """A wrapt function wrapper that supports copying and pickling, unlike wrapt's own.

    A function is pickled by its name, so decorated functions can be sent to worker processes. A wrapper on an instance
    (`module.forward = inference(module.forward)`) works with `copy.deepcopy` and `torch.save`. cloudpickle, which Ray
    and Spark use, also pickles functions by value, and then with their decorator.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Shell:
        return type(self)(copy.deepcopy(self.__wrapped__, memo), self._self_wrapper)

    def __copy__(self) -> Shell:
        return type(self)(self.__wrapped__, self._self_wrapper)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        cloudpickle = _cloudpickle()
        by_value = cloudpickle is not None and not self._is_importable(cloudpickle)
        if by_value or inspect.ismethod(self.__wrapped__):
            return _rewrap, (type(self), self.__wrapped__, self._self_wrapper)
        return self.__wrapped__.__qualname__  # pickle then takes it from its module by this name

    def _is_importable(self, cloudpickle: dict[str, Any]) -> bool:
        """Check that another process finds this function by its name."""
        module = self.__wrapped__.__module__
        by_value = {"__main__", *cloudpickle.get("list_registry_pickle_by_value", set)()}
        if any(f"{module}.".startswith(f"{name}.") for name in by_value):
            return False
        try:
            return operator.attrgetter(self.__wrapped__.__qualname__)(sys.modules[module]) is self
        except (AttributeError, KeyError):
            return False


class _InferenceShell(Shell):
    pass


class BoundShell(_NoFunction, wrapt.BoundFunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]  # wrapt < 2 ships no types
    """A decorated function that was read from an instance or a class.

    It is pickled and copied like a method, by its object and its name. `weakref.WeakMethod` calls the class of a method
    with its function and its object, so this class supports that call.
    """

    def __new__(cls, wrapped: Any, instance: Any = None, *rest: Any, **named: Any) -> Any:
        """Make a shell as wrapt does or, given a function and its object only, read it from the object."""
        if rest or named:
            return super().__new__(cls, wrapped, instance, *rest, **named)
        of_class = isinstance(wrapped.__wrapped__, classmethod)
        return wrapped.__get__(None, instance) if of_class else wrapped.__get__(instance, type(instance))

    def __init__(self, wrapped: Any, instance: Any = None, *rest: Any, **named: Any) -> None:
        if rest or named:  # otherwise `__new__` has made it ready
            super().__init__(wrapped, instance, *rest, **named)  # type: ignore[call-arg]  # wrapt's stub names one

    @property
    def __func__(self) -> Any:
        return self._self_parent

    def __copy__(self) -> Any:
        return self.__reduce_ex__(2)[0](*self.__reduce_ex__(2)[1])

    def __reduce_ex__(self, _protocol: Any) -> Any:
        wrapped = self.__wrapped__
        owner = wrapped.__self__ if inspect.ismethod(wrapped) else self._self_instance
        if owner is None:  # a static method, or a function that was read from its class
            if _cloudpickle() is not None:
                return _read, (self._self_parent,)
            return _found, (wrapped.__module__, wrapped.__qualname__)
        return getattr, (owner, wrapped.__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        found, (owner, name) = self.__reduce_ex__(2)
        return found(copy.deepcopy(owner, memo), name)


setattr(Shell, "__bound_function_wrapper__", BoundShell)  # noqa: B010 - wrapt declares it an instance variable


setattr(_InferenceShell, inference_mode.INFERENCE_MARK, True)


def _cloudpickle() -> dict[str, Any] | None:
    """Return the names of the module that called the caller if it is cloudpickle, or Ray's or joblib's copy of it."""
    names = sys._getframe(2).f_globals
    return names if "cloudpickle" in str(names.get("__name__", "")).split(".") else None


def _rewrap(shell: type[Shell], wrapped: Any, wrapper: Any) -> Shell:
    return shell(wrapped, wrapper)


def _read(shell: Shell) -> Any:
    """Read a function as from a class."""
    return shell.__get__(None, object)


def _found(module: str, name: str) -> Any:
    """Find a function by its name. One of a class is pickled by that, since it is another object at each look."""
    return operator.attrgetter(name)(importlib.import_module(module))


def owner_of_call(wrapped: Any, args: tuple[Any, ...]) -> Any:
    """Return the object or class whose method is called as a function, with it as the first argument, or `None`.

    A decorator above ours calls what it decorates so, and `classmethod` from Python 3.13 on. A function is a method of
    the class that its qualified name tells, whatever other decorators have made of it there.
    """
    owner: Any = args[0] if args else None
    holder, _, name = getattr(wrapped, "__qualname__", "").rpartition(".")
    if owner is None or not holder or holder.endswith("<locals>"):
        return None
    kinds = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
    for base in kinds:
        if base.__qualname__ == holder and base.__module__ == wrapped.__module__:
            found = vars(base).get(name)
            of_class = isinstance(found, classmethod)
            return owner if not isinstance(found, staticmethod) and of_class == isinstance(owner, type) else None
    return None


class _RunInMode:
    """Calls of an @inference shell. A class, so that it can be pickled."""

    def __init__(self, mode: Mode, concurrency: int | None, *, retry: bool) -> None:
        self.mode: Mode = mode
        self.concurrency = concurrency
        self.retry = retry
        self._beginning = limiter.Beginning()

    def call(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Make a call. It is a method rather than `__call__`, which would need one more frame of the stack."""
        if not is_active():
            return wrapped(*args, **kwargs)
        if type(wrapped) is wrapt.PartialCallableObjectProxy:  # `Class.method(instance, ...)` becomes a method, too
            wrapped = MethodType(wrapped.__wrapped__, instance)
        elif instance is None and (owner := owner_of_call(wrapped, args)) is not None:
            wrapped, instance, args = MethodType(wrapped, owner), owner, args[1:]
        if not self.retry:
            guards.not_again(str(getattr(wrapped, "__qualname__", wrapped)))
            made_once()
        if self.concurrency is None:
            if inference_mode.is_on(self.mode) and not guards.is_watched():
                # Inside another call in this mode: saves frames, since recursion is limited.
                result = wrapped(*args, **kwargs)
                return inference_mode.adopt(result, self.mode) if inference_mode.is_suspended(result) else result
            return self._run(wrapped, instance, args, kwargs)
        # A bound method is a new object at each read, so its function is used.
        function = getattr(wrapped, "__func__", wrapped)
        make = partial(self._run, wrapped, instance, args, kwargs)
        return limiter.call(queue.queue_of(instance, function), self.concurrency, wrapped, make, self._beginning)

    def _run(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        choice = None
        if self.mode != "none":
            choice = ModeChoice(
                self if instance is None else instance, wrapped, args, kwargs, self.mode, again=self.retry
            )
        watchers = guards.watchers_of(instance, args, kwargs)
        if not watchers:
            return inference_mode.call(wrapped, args, kwargs, self.mode, choice)
        return guarded_call.call(
            watchers, wrapped, args, kwargs, self.mode, instance=instance, retry=self.retry, choice=choice
        )


@overload
def inference(function: F, /) -> F: ...
@overload
def inference(*, mode: Mode = "inference", concurrency: int | None = None, retry: bool = True) -> Callable[[F], F]: ...
def inference(
    function: Any = None, /, *, mode: Mode = "inference", concurrency: int | None = None, retry: bool = True
) -> Any:
    """Run a synthesis function without autograd.

    A call of a tuned object with a faulty output (NaN or Inf, silence, flat clipping, runaway length) is **repeated**
    on the untouched model, and the caller gets the second output. A call of any object that raises an error of
    inference mode itself is repeated, too, in a milder mode, once for each object. Side effects of the function, such
    as charging or writing to a database, then happen twice. Give such a function `retry=False`, or move the computation
    into a decorated function of its own.

    Supported are plain, `async`, generator and async generator functions, methods, class and static methods. The mode
    is on while the body runs and off at every suspension, so other tasks and callers never see it. Threads and tasks
    that the body starts do not inherit it: give them `carry_mode(work)`.

    Args:
        function: The function, when used without parentheses.
        mode: "inference" (`torch.inference_mode()`), "no_grad" for a model whose outputs are modified in place or used
            for training later, or "none".
        concurrency: Maximum simultaneous calls of one object (or of one plain function); `None` is no limit. Further
            calls wait, first come first served, coroutines without blocking their event loop. A stream holds its permit
            from its first item until it ends, is closed or collected, so 1 keeps the chunks of two requests apart.
            Methods with `concurrency=` of one object share its permits. Nested calls share the permit of the outer
            call, also through `asyncio.to_thread`, but not on threads that are started otherwise.
        retry: Repeat a call with a faulty output, or with an error of inference mode itself. If False, the output is
            returned as it is, with a `Guarded` event, or the error is raised, and decorated functions that called this
            one are not repeated either. Other exceptions never cause a repetition, nor do faults of other calls.
            `batched` does not repeat a batch for which memory ran out if this function was called for it.

    Raises:
        SettingsError: The mode is unknown, `concurrency` is not a whole number of at least 1, or `retry` is not True or
            False.
        ConcurrencyError: At a call that would wait forever for a call that waits for it. On a thread it comes after 30
            seconds in which no other thread or task took an item of the stream that the call waits for.
        TypeError: The decorated object is not a function.
    """
    check_mode(mode)
    limiter.check_concurrency(concurrency)
    if not isinstance(retry, bool):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise SettingsError(f"retry={shown(retry)} must be True or False: whether a faulty call may be made again")
    if function is None:
        return partial(_decorate_inference, mode=mode, concurrency=concurrency, retry=retry)
    return _decorate_inference(function, mode=mode, concurrency=concurrency, retry=retry)


def _decorate_inference(function: Any, *, mode: Mode, concurrency: int | None, retry: bool) -> Any:
    check_function("inference", function)
    return _InferenceShell(function, _RunInMode(mode, concurrency, retry=retry).call)


@overload
def optimized_model(function: F, /) -> F: ...
@overload
def optimized_model(
    *,
    warmup: Any = None,
    mode: Mode = "inference",
    precision: Precision | None = None,
    tune_seconds: float | None = None,
    lengths: tuple[int, int] | None = None,
) -> Callable[[F], F]: ...
def optimized_model(  # noqa: PLR0913 - all but the function are keywords with a default
    function: Any = None,
    /,
    *,
    warmup: Any = None,
    mode: Mode = "inference",
    precision: Precision | None = None,
    tune_seconds: float | None = None,
    lengths: tuple[int, int] | None = None,
) -> Any:
    """Tune, verify and warm up the object that a load function loads, in place, before it is returned.

    The function may be sync or async, a method or a plain function. It returns a module, or an object or tuple that
    holds modules, or sets attributes on `self` and returns nothing. Its return value is unchanged. Each optimisation is
    tried on the warm-up's inputs and kept only if it is faster and correct; `receipt_of(...)` returns the receipt. An
    async load tunes on a worker thread without blocking its event loop.

    Args:
        function: The function, when used without parentheses. Nothing can be verified then, so only the device is set
            up.
        warmup: Example of a real call. A text for an object that speaks text (by its `@inference` method, otherwise by
            `synthesize`, `generate`, `tts`, ...); a tensor, a tuple of arguments or a mapping of keyword arguments for
            the loaded module; a callable that takes the loaded object (the return value, or `self`); or a list of
            these, such as a short and a long text.
        mode: Mode of service calls that do not go through `@inference`.
        precision: Precision level: "exact" (rounding only, relative error 1e-4), "balanced" (half precision where it is
            faster, 2e-2) or "fast" (8-bit weights, too, 4e-2); `None` selects `Settings.precision`.
        tune_seconds: Time budget of tuning in seconds; `None` selects `Settings.tune_seconds`.
        lengths: The shortest and the longest input in service. Lengths between them are warmed up beside `warmup`, so
            that none compiles later: characters of a text, positions of a tensor's last dimension, or the second
            argument of a callable, `warmup=lambda loaded, length: ...`.

    Raises:
        WarmupError: At decoration for an invalid warm-up; at loading for one that does not fit the loaded object.
        SettingsError: The mode, precision, budget or range of lengths is invalid.
        TypeError: The decorated object is not a function.
    """
    from accelerate_tts.tuning.load_request import LoadRequest

    request = LoadRequest(warmup, mode, precision, tune_seconds, lengths)

    def decorate(decorated: Any) -> Any:
        check_function("optimized_model", decorated)
        return Shell(decorated, _Optimize(request))

    return decorate if function is None else decorate(function)


class _Optimize:
    """Calls of an @optimized_model shell."""

    def __init__(self, request: LoadRequest) -> None:
        self.request = request

    def __call__(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not is_active() or loading_again.get():
            return wrapped(*args, **kwargs)
        from accelerate_tts.optimizer import get_performance_optimizer
        from accelerate_tts.tuning.warmup import Loaded

        if instance is None and (owner := owner_of_call(wrapped, args)) is not None:
            wrapped, instance, args = MethodType(wrapped, owner), owner, args[1:]
        optimizer = get_performance_optimizer()
        # In the caller's thread, since threads keep their own number of threads, and before the model meets the device.
        optimizer.initialize()
        # A lazy load inside a request: weights that are made in inference mode could never be changed.
        outside = inference_mode.in_inference_mode()
        again = optimizer.remembered(wrapped, instance, args, kwargs)
        result = inference_mode.call(wrapped, args, kwargs, "outside") if outside else wrapped(*args, **kwargs)
        if isinstance(result, Awaitable):
            return self._optimize_async(result, instance, again)
        optimizer.optimize(replace(self.request, loaded=Loaded(result, instance, again=again)))
        return result

    async def _optimize_async(self, pending: Awaitable[Any], owner: Any, again: Reloader | None) -> Any:
        import asyncio  # takes 40 ms, which importing a decorated synchronous class should not cost

        from accelerate_tts.optimizer import get_performance_optimizer
        from accelerate_tts.tuning.warmup import Loaded

        result = await pending
        cancelled = threading.Event()
        loaded = Loaded(result, owner, asyncio.get_running_loop(), again=again)
        request = replace(self.request, loaded=loaded, stopped=cancelled.is_set)
        try:
            await asyncio.to_thread(get_performance_optimizer().optimize, request)
        except asyncio.CancelledError:
            cancelled.set()  # the thread cannot be interrupted; it undoes its changes before the next stage
            raise
        return result


def is_load_function(function: Any) -> bool:
    """Check that `@optimized_model` decorates a function or a member of a class."""
    every = (function, *inference_mode.decorated(function))
    # wrapt (1.x and 2.x) gives the wrapper of a function, bound or not, under this name alone.
    return any(isinstance(getattr(one, "_self_wrapper", None), _Optimize) for one in every)


def check_function(decorator: str, function: Any) -> None:
    """Raise `TypeError` unless a decorator is given a function or a method."""
    if not (callable(function) or isinstance(function, (classmethod, staticmethod))) or inspect.isclass(function):
        raise TypeError(
            f"@{decorator} decorates a function or method, got {shown(function)};"
            f" its own arguments are keywords, as in @{decorator}(...)"
        )
