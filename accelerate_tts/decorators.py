"""`@optimized_model` and `@inference`: thin shells around the shared engine, with the decorated signature kept."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, overload

import wrapt

from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.runtime import inference_mode
from accelerate_tts.runtime.concurrency import limiter
from accelerate_tts.runtime.guard import guard as retries
from accelerate_tts.runtime.guard import guarded_call
from accelerate_tts.runtime.mode_choice import ModeChoice, made_once
from accelerate_tts.runtime.seeding import loading_again
from accelerate_tts.settings import Mode, Precision, check_mode, is_active

if TYPE_CHECKING:
    from accelerate_tts.tuning.load_request import LoadRequest
    from accelerate_tts.tuning.reload import Again

__all__ = ["inference", "optimized_model"]

F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, ..., Any] | staticmethod[..., Any]")


class _Shell(wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]  # wrapt < 2 ships no types
    """A wrapt function wrapper that can be copied and pickled, which wrapt's own refuses.

    A function is pickled by its name, so decorated functions can be sent to worker processes; a wrapper kept on an
    instance (`module.forward = inference(module.forward)`) goes with `copy.deepcopy` and `torch.save`.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shell:
        return type(self)(copy.deepcopy(self.__wrapped__, memo), self._self_wrapper)

    def __copy__(self) -> _Shell:
        return type(self)(self.__wrapped__, self._self_wrapper)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        if inspect.ismethod(self.__wrapped__):
            return _rewrap, (type(self), self.__wrapped__, self._self_wrapper)
        return self.__wrapped__.__qualname__  # pickle then takes it from its module by this name


class _InferenceShell(_Shell):
    pass


class _BoundShell(wrapt.BoundFunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]  # wrapt < 2 ships no types
    """A decorated function that was read from an instance or a class.

    It is pickled and copied as a method is: by its object and its name. `weakref.WeakMethod` takes a method apart, into
    its function and its object, and calls the method's class with these two; so that works here, too.
    """

    def __new__(cls, wrapped: Any, instance: Any = None, *rest: Any, **named: Any) -> Any:
        if rest or named:
            return super().__new__(cls, wrapped, instance, *rest, **named)
        of_class = isinstance(wrapped.__wrapped__, classmethod)
        return wrapped.__get__(None, instance) if of_class else wrapped.__get__(instance, type(instance))

    def __init__(self, wrapped: Any, instance: Any = None, *rest: Any, **named: Any) -> None:
        if rest or named:  # else it is a method of `__new__`, and ready
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
            return _found, (wrapped.__module__, wrapped.__qualname__)
        return getattr, (owner, wrapped.__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        found, (owner, name) = self.__reduce_ex__(2)
        return found(copy.deepcopy(owner, memo), name)


setattr(_Shell, "__bound_function_wrapper__", _BoundShell)  # noqa: B010 - wrapt declares it an instance variable


setattr(_InferenceShell, inference_mode.INFERENCE_MARK, True)


def _rewrap(shell: type[_Shell], wrapped: Any, wrapper: Any) -> _Shell:
    return shell(wrapped, wrapper)


def _found(module: str, name: str) -> Any:
    """Find a function by its name. One of a class is pickled by that, since it is another object at each look."""
    return operator.attrgetter(name)(importlib.import_module(module))


class _RunInMode:
    """Calls of an @inference shell. A class, so that it can be pickled."""

    def __init__(self, mode: Mode, concurrency: int | None, *, retry: bool) -> None:
        self.mode: Mode = mode
        self.concurrency = concurrency
        self.retry = retry

    def call(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Make a call; a method and not `__call__`, which would take a frame more of what recursion may have."""
        if not is_active():
            return wrapped(*args, **kwargs)
        if type(wrapped) is wrapt.PartialCallableObjectProxy:  # `Class.method(instance, ...)`: as a method, too
            wrapped = MethodType(wrapped.__wrapped__, instance)
        if not self.retry:
            retries.not_again(str(getattr(wrapped, "__qualname__", wrapped)))
            made_once()
        if self.concurrency is None:
            if inference_mode.is_on(self.mode) and not retries.is_watched():
                # Inside another call that is in this mode: recursion has a limit, so no frame more than need be.
                result = wrapped(*args, **kwargs)
                return inference_mode.adopt(result, self.mode) if inference_mode.is_suspended(result) else result
            return self._run(wrapped, instance, args, kwargs)
        # A bound method that was read from the object anew has the same object behind it, or the same function.
        function = getattr(wrapped, "__func__", wrapped)
        make = partial(self._run, wrapped, instance, args, kwargs)
        return limiter.call(limiter.room_of(instance, function), self.concurrency, wrapped, make)

    def _run(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        choice = None
        if self.mode != "none":
            choice = ModeChoice(
                self if instance is None else instance, wrapped, args, kwargs, self.mode, again=self.retry
            )
        mode = self.mode if choice is None else choice.mode
        watcher = retries.watcher_of(instance, args, kwargs)
        if watcher is None:
            return inference_mode.call(wrapped, args, kwargs, mode, choice)
        return guarded_call.call(
            watcher, wrapped, args, kwargs, mode, instance=instance, retry=self.retry, choice=choice
        )


@overload
def inference(function: F, /) -> F: ...
@overload
def inference(*, mode: Mode = "inference", concurrency: int | None = None, retry: bool = True) -> Callable[[F], F]: ...
def inference(
    function: Any = None,
    /,
    *,
    mode: Mode = "inference",
    concurrency: int | None = None,
    retry: bool = True,
) -> Any:
    """Run a synthesis function without autograd, whatever kind of function it is.

    A call of a tuned object whose output is faulty (NaN or Inf, silence, flat clipping, runaway length) is **made
    again** on the untouched model, and its caller gets that. So whatever else the function does, such as charging or
    writing to a database, is done twice then. Give such a function `retry=False`, or keep what it computes in a
    decorated function of its own.

    Plain, `async`, generator and async generator functions, methods, class and static methods. The mode is on while
    the body runs and off at every suspension, so other tasks and callers never see it. Threads and tasks that the body
    starts do not inherit it: give them `carry_mode(work)`.

    Args:
        function: The function, when used bare.
        mode: "inference" (`torch.inference_mode()`), or "no_grad" for a model whose outputs are edited in place or
            used for training later, or "none".
        concurrency: How many calls of one object (or of one function that is no method) may run at once; `None` is no
            limit. The others wait, first come first served, a coroutine without blocking its event loop. A stream has
            its turn from its first item until it ends, is closed or collected, so 1 keeps the chunks of two requests
            apart. Methods with `concurrency=` of one object share its turns. What a call calls itself is a part
            of it; so is what it awaits through `asyncio.to_thread`, but not a thread that it starts otherwise.
        retry: Whether a call whose output is faulty may be made again. With False the output is given as it is, with
            a `Guarded` event, and a decorated function that called this one is not made again either. A call that
            raises is never made again for a fault, nor is one whose own output is good.

    Raises:
        SettingsError: An unknown mode, a `concurrency` that is no whole number of at least 1, or a `retry` that is not
            True or False.
        ConcurrencyError: At a call: it would wait for ever for a call that waits for it.
        TypeError: What is decorated is no function.
    """
    check_mode(mode)
    limiter.check_concurrency(concurrency)
    if not isinstance(retry, bool):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise SettingsError(f"retry={shown(retry)} must be True or False: whether a faulty call may be made again")
    if function is None:
        return partial(_decorate_inference, mode=mode, concurrency=concurrency, retry=retry)
    return _decorate_inference(function, mode=mode, concurrency=concurrency, retry=retry)


def _decorate_inference(function: Any, *, mode: Mode, concurrency: int | None, retry: bool) -> Any:
    _check_function("inference", function)
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
    """Tune, verify and warm up what a load function loads, in place, before anybody gets it.

    The function may be sync or async, a method or not, and return a module, an object or tuple that holds modules, or
    nothing, having set attributes on `self`. What it returns is passed on as it is. Each optimisation is tried on the
    warm-up's own inputs and kept only if it is faster and right; `receipt_of(...)` tells. An async load tunes in a
    worker thread while its event loop goes on.

    Args:
        function: The function, when used bare; nothing is verified then, so nothing is changed but the device set-up.
        warmup: What a real call looks like. A text for an object that speaks text (by its `@inference` method, else by
            `synthesize`, `generate`, `tts`, ...); a tensor, a tuple of arguments or a mapping of keyword arguments
            for the loaded module; a callable, called with what was loaded (the returned object, or `self`); a list
            of several of these, such as a short and a long text.
        mode: The mode of service calls that do not go through `@inference`.
        precision: What may be changed: "exact" (rounding only: relative error 1e-4), "balanced" (half precision where
            it is faster: 2e-2) or "fast" (8-bit weights too: 4e-2); `None` takes `Settings.precision`.
        tune_seconds: Budget for trying things, in seconds; `None` takes `Settings.tune_seconds`.
        lengths: The shortest and longest input of service calls, which are warmed up beside `warmup` so that none of
            them compiles later: characters of a text, positions of a tensor's last dimension; with a callable warm-up
            whatever it takes as its second argument, `warmup=lambda loaded, length: ...`.

    Raises:
        WarmupError: At decoration, for a warm-up that can never work; at loading, for one that does not fit.
        SettingsError: An unknown mode or precision, a budget or a range of lengths that means nothing.
        TypeError: What is decorated is no function.
    """
    from accelerate_tts.tuning.load_request import LoadRequest

    request = LoadRequest(warmup, mode, precision, tune_seconds, lengths)

    def decorate(decorated: Any) -> Any:
        _check_function("optimized_model", decorated)
        return _Shell(decorated, _Optimize(request))

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

    async def _optimize_async(self, pending: Awaitable[Any], owner: Any, again: Again | None) -> Any:
        import asyncio  # 40 ms, which a decorated synchronous class should not pay at its import

        from accelerate_tts.optimizer import get_performance_optimizer
        from accelerate_tts.tuning.warmup import Loaded

        result = await pending
        cancelled = threading.Event()
        loaded = Loaded(result, owner, asyncio.get_running_loop(), again=again)
        request = replace(self.request, loaded=loaded, stopped=cancelled.is_set)
        try:
            await asyncio.to_thread(get_performance_optimizer().optimize, request)
        except asyncio.CancelledError:
            cancelled.set()  # the thread cannot be interrupted; it undoes what it did before its next step
            raise
        return result


def _check_function(decorator: str, function: Any) -> None:
    if not (callable(function) or isinstance(function, (classmethod, staticmethod))) or inspect.isclass(function):
        raise TypeError(
            f"@{decorator} decorates a function or method, got {shown(function)};"
            f" its own arguments are keywords, as in @{decorator}(...)"
        )
