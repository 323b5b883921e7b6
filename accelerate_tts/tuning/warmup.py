"""Conversion of `warmup=` to complete calls of the loaded object."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.errors import TimeLimitError, WarmupError, abridged
from accelerate_tts.events import Lasting
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.runtime import inference_mode
from accelerate_tts.runtime.compile_timeout import compiling_within
from accelerate_tts.runtime.completion import begin, complete, is_stream
from accelerate_tts.runtime.mode_choice import ModeChoice, mode_of
from accelerate_tts.settings import Mode
from accelerate_tts.tuning.length_ladder import at_length, first_tensor, is_tensor, ladder

if TYPE_CHECKING:
    import asyncio

    from accelerate_tts.tuning.reload import Reloader

T = TypeVar("T")
Call = Callable[..., Any]

CUDA_GRAPH_PASSES = 3
"""Passes until a CUDA graph is warm: eager, recording and replay."""

SPEAKING = ("synthesize", "synthesise", "generate", "tts", "speak", "say", "infer", "text_to_speech")
"""Names of methods that take a text in known speech libraries, most usual first."""
_WARMUP = "a warm-up call"
_TAKES = (
    "a tensor, a tuple of arguments, a mapping of keyword arguments, a text, a callable of what was loaded,"
    " or a list of these"
)


@dataclass(frozen=True)
class Loaded:
    """Result of a load function, and the object that it was called on.

    Attributes:
        result: Its return value.
        owner: The object whose method it is, or `None` for a plain function.
        loop: The event loop that is free to run coroutines while the caller works in another thread, if any.
        again: Calls the load function again, if that may be needed.
    """

    result: Any
    owner: Any = None
    loop: asyncio.AbstractEventLoop | None = None
    again: Reloader | None = None

    @property
    def subject(self) -> Any:
        """The loaded object: the return value or, if that is `None`, the owner."""
        return self.owner if self.result is None else self.result


def check_warmup(warmup: Any, lengths: tuple[int, int] | None = None) -> None:
    """Raise `WarmupError` for a `warmup=` that can never work, alone or with `lengths=`, before anything is loaded."""
    if isinstance(warmup, list):
        if not warmup:
            raise WarmupError(f"warmup=[] has nothing in it; give {_TAKES}")
        for item in warmup:
            if isinstance(item, list):
                raise WarmupError(f"warmup={abridged(warmup)} holds a list inside a list; give {_TAKES}")
            check_warmup(item)
    elif isinstance(warmup, str):
        if not warmup.strip():
            raise WarmupError(f"warmup={abridged(warmup)} is an empty text; give a short sentence")
    elif not (warmup is None or isinstance(warmup, (tuple, Mapping)) or callable(warmup) or is_tensor(warmup)):
        raise WarmupError(f"warmup={abridged(warmup)} of type {type(warmup).__name__} cannot be used; give {_TAKES}")
    if lengths is not None:
        _check_lengths(warmup)


def _check_lengths(warmup: Any) -> None:
    if warmup is None:
        raise WarmupError(
            "lengths= says how long inputs are, but no warmup= says what an input is; give a warmup=, too"
        )
    for item in warmup if isinstance(warmup, list) else [warmup]:
        if callable(item) and not is_tensor(item):
            if not _accepts(item, 2):
                raise WarmupError(
                    "with lengths= a callable warm-up takes two arguments: warmup=lambda loaded, length: ..."
                )
        elif not isinstance(item, str):
            first_tensor(item)


@dataclass(frozen=True)
class WarmupCall:
    """One warm-up call, which runs to its end and returns the whole output.

    Attributes:
        run: The call.
        variant: The same call with tensors made in inference mode instead of outside. dynamo guards on that difference,
            and a service may use either. `None` if there are no tensors to vary.
        begin: The same call up to its first piece. It returns False, and does nothing, if the last `run` did not speak
            in pieces.
    """

    run: Call
    variant: Call | None = None
    begin: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class WarmupCalls:
    """Calls that a warm-up runs.

    Attributes:
        main: The calls that are compared and timed: the given ones, and both ends of `lengths=`.
        ladder: The lengths between the ends. They run once, so that they are compiled before service.
    """

    main: tuple[WarmupCall, ...] = ()
    ladder: tuple[WarmupCall, ...] = ()

    def run(self) -> list[Any]:
        """Run one pass of all calls that are compared."""
        return [call.run() for call in self.main]

    def begin(self) -> Iterator[None]:
        """Run the calls that speak in pieces up to the first piece. Yields after each of them."""
        for call in self.main:
            if call.begin():
                yield

    def run_others(self) -> None:
        """Run the other calls of service: other lengths, and tensors made in or outside inference mode."""
        for call in (*self.main, *self.ladder):
            if call in self.ladder:
                call.run()
            if call.variant is not None:
                call.variant()


def warmup_calls(
    warmup: Any, loaded: Loaded, mode: Mode, lengths: tuple[int, int] | None = None, timeout: float | None = None
) -> WarmupCalls:
    """Convert `warmup` to calls of the loaded object.

    Args:
        warmup: As given to `@optimized_model`, and checked by `check_warmup`.
        loaded: The loaded object.
        mode: Entered around the calls that do not go through an `@inference` method, which enters its own.
        lengths: Lengths of the shortest and the longest input of service.
        timeout: Seconds that each call may take before it is interrupted with a `TimeLimitError`; `None` is no limit.

    Raises:
        WarmupError: `warmup` does not fit what was loaded.
    """
    if warmup is None:
        return WarmupCalls()
    items = warmup if isinstance(warmup, list) else [warmup]
    maker = _CallMaker(loaded, mode, timeout)
    if lengths is None:
        return WarmupCalls(tuple(map(maker.call_of, items)))
    rungs = ladder(lengths)
    # A callable has no length of its own, so only the ends are run.
    given = [maker.call_of(item) for item in items if not callable(item) or is_tensor(item)]
    ends = [maker.call_at(item, length) for item in items for length in dict.fromkeys((rungs[0], rungs[-1]))]
    return WarmupCalls(
        (*given, *ends), tuple(maker.call_at(item, length) for item in items for length in rungs[1:-1])
    )  # fmt: skip


@dataclass(frozen=True)
class _CallMaker:
    """Makes calls of what was loaded, each of which runs to its end within a time limit."""

    loaded: Loaded
    mode: Mode
    timeout: float | None
    events: Lasting = field(default_factory=Lasting)

    def call_of(self, item: Any) -> WarmupCall:
        """Convert one item of a warm-up to a call."""
        loaded, mode = self.loaded, self.mode
        if isinstance(item, str):
            speak, decorated = _speaker(loaded)
            return self._call(speak, (item,), {}, "none" if decorated else mode)
        if isinstance(item, (Mapping, tuple)) or is_tensor(item):
            target = _target(loaded, item)
            kwargs = (
                {str(name): _placed(value, target) for name, value in item.items()} if isinstance(item, Mapping) else {}
            )
            given = () if isinstance(item, Mapping) else item if isinstance(item, tuple) else (item,)
            args = tuple(_placed(value, target) for value in given)
            call = self._call(_copying(target, args, kwargs, inside=False), (), {}, mode)
            if mode != "inference" or not any(is_tensor(value) for value in (*args, *kwargs.values())):
                return call
            vary = self._call(_copying(target, args, kwargs, inside=True), (), {}, "inference").run
            return replace(
                call, variant=lambda: vary() if mode_of(loaded.subject, "inference") == "inference" else None
            )
        return self._call(item, (loaded.subject,) if _accepts(item, 1) else (), {}, mode)

    def call_at(self, item: Any, length: int) -> WarmupCall:
        """Convert an item, resized to another length, to a call."""
        if callable(item) and not is_tensor(item):
            return self._call(item, (self.loaded.subject, length), {}, self.mode)
        return self.call_of(at_length(item, length))

    def _call(self, target: Call, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode) -> WarmupCall:
        loaded, timeout, events = self.loaded, self.timeout, self.events
        in_pieces = False

        def result() -> Any:
            choice = None if mode == "none" else ModeChoice(loaded.subject, target, args, kwargs, mode)
            return inference_mode.call(target, args, kwargs, mode, choice)

        def run() -> Any:
            nonlocal in_pieces
            made = result()
            in_pieces = is_stream(made)
            return complete(made, loaded.loop, events)

        def first() -> bool:
            if in_pieces:
                begin(result(), loaded.loop, events)
            return in_pieces

        return WarmupCall(lambda: _limited(run, timeout), begin=lambda: _limited(first, timeout))


def _limited(run: Callable[[], T], timeout: float | None) -> T:
    if timeout is None:
        return run()
    torch = sys.modules["torch"]
    grad = torch.is_grad_enabled()
    try:
        return compiling_within(timeout, _WARMUP, run)
    except TimeLimitError:
        # The interruption may have come between the switch of the mode and the `with` that restores it.
        torch.set_grad_enabled(grad)
        raise


def _copying(target: Call, args: tuple[Any, ...], kwargs: dict[str, Any], *, inside: bool) -> Call:
    """Wrap a call so that it gets copies of its tensors, since a model may write into its inputs.

    Args:
        target: What is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        inside: Make the copies in the caller's mode. Otherwise they are normal tensors, as the user's own.
    """

    def copied(value: Any) -> Any:
        import torch

        with nullcontext() if inside else torch.inference_mode(mode=False):
            return value.clone() if is_tensor(value) else value

    def call() -> Any:
        return target(*map(copied, args), **{name: copied(value) for name, value in kwargs.items()})

    return call


def _accepts(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        return True
    return True


def _speaker(loaded: Loaded) -> tuple[Callable[..., Any], bool]:
    """Return the method that speaks a text, and True if it is decorated with @inference."""
    from torch import nn

    subjects = [item for item in (loaded.owner, loaded.result) if item is not None]
    for subject in subjects:
        owner = subject if isinstance(subject, type) else type(subject)
        names = [name for name in inference_methods(owner) if _accepts(getattr(subject, name), 1)]
        usual = [name for name in SPEAKING if name in names]
        if usual or len(names) == 1:
            return getattr(subject, (usual or names)[0]), True
        if names:
            raise WarmupError(
                f"warmup is a text, and any of {', '.join(names)} could speak it; give"
                f" warmup=lambda loaded: loaded.{names[0]}(...) to say which"
            )
    for subject in reversed(subjects):
        if isinstance(subject, nn.Module):
            continue  # a module's generate() takes token ids
        for name in SPEAKING:
            method = getattr(subject, name, None)
            if callable(method) and _accepts(method, 1):
                return method, False
        if callable(subject) and _accepts(subject, 1):
            return subject, False
    raise WarmupError(
        f"warmup is a text, but {_describe(loaded.subject)} has no @inference method that takes one,"
        f" nor any of {', '.join(SPEAKING)}; give warmup=lambda loaded: ... instead"
    )


def inference_methods(owner: type) -> list[str]:
    """Return the names of a class's methods that `@inference` decorates, those of the class itself first."""
    names: dict[str, bool] = {}
    for cls in owner.__mro__:
        for name, member in vars(cls).items():
            functions = inference_mode.decorated(member)
            marked = any(getattr(one, inference_mode.INFERENCE_MARK, False) is True for one in functions)
            names.setdefault(name, marked)
    return [name for name, marked in names.items() if marked]


def _target(loaded: Loaded, item: Any) -> Callable[..., Any]:
    """Find the module or object that a tensor, tuple or mapping is given to."""
    subject = loaded.subject
    modules = find_modules(subject)
    if "" in modules:
        return modules[""]
    if loaded.result is not None and not isinstance(subject, (tuple, list)) and callable(subject):
        return subject  # type: ignore[no-any-return]  # callable() narrows Any to nothing better
    if modules and (len(modules) == 1 or isinstance(subject, (tuple, list))):
        return next(iter(modules.values()))  # the first one of a returned tuple
    found = f"holds the modules {', '.join(modules)}" if modules else "holds no module"
    raise WarmupError(
        f"warmup is a {type(item).__name__}, but {_describe(subject)} cannot be called and {found};"
        " give warmup=lambda loaded: ... to say what is called"
    )


def _placed(value: Any, target: Any) -> Any:
    """Move a tensor to the device of the module that it is for; return other values unchanged."""
    from torch import nn

    if not isinstance(target, nn.Module) or not is_tensor(value):
        return value
    parameter = next(target.parameters(), None)
    return value if parameter is None else value.to(parameter.device)


def _describe(subject: Any) -> str:
    return "what was loaded (nothing)" if subject is None else f"the loaded {type(subject).__name__}"
