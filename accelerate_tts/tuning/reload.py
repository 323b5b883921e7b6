"""Call a user's load function again, so that the object that serves does not notice.

A method is called on a twin of its object: of the same class, with the attributes that it had when it was loaded first.
What the function returns or sets there is the caller's to throw away. Of what it may have put elsewhere, modules in
global variables and in objects that the twin shares are put back.
"""

from __future__ import annotations

import copy
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import ReloadError
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.runtime import inference_mode, time_limit
from accelerate_tts.runtime.completion import complete
from accelerate_tts.runtime.seeding import loading_again, seeded

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Again", "modules_of", "remembered"]


@dataclass(frozen=True)
class Again:
    """A load function and what it was called with.

    Attributes:
        function: The function; of a method, the plain function behind it.
        kind: The class of its object, or `None` for a function that is no method.
        before: The attributes that the object had before, without those that hold modules.
        args: Positional arguments.
        kwargs: Keyword arguments.
        obstacle: Why it cannot be called again, or "".
    """

    function: Callable[..., Any]
    kind: type | None
    before: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    obstacle: str = ""

    def modules(self, what: str, device_type: str, timeout: float | None) -> dict[str, nn.Module]:
        """The modules of what it loads now, by their path as in `find_modules`. Random numbers stay as they were.

        Args:
            what: Whose load function it is, for messages.
            device_type: Whose random numbers are kept, beside the CPU's.
            timeout: Seconds that it may take; `None` is no limit.

        Raises:
            ReloadError: It cannot be called again, or it raised, or did not return in time.
        """
        if self.obstacle:
            raise ReloadError(f"{what} cannot be loaded again: {self.obstacle}")
        token = loading_again.set(True)
        try:
            with seeded(device_type), _globals_kept(self.function):
                return time_limit.within(timeout, f"loading {what} again", self._load)
        except Exception as error:  # the user's own function, or something that it needs and that is gone
            reason = f"{type(error).__name__}: {error}"
        finally:
            loading_again.reset(token)
        # Outside of `except`: the error's traceback would hold what was half loaded for as long as this one is kept.
        raise ReloadError(f"{what} could not be loaded again: {reason}")

    def _load(self) -> dict[str, nn.Module]:
        twin: Any = None
        function = self.function
        if self.kind is not None:
            twin = object.__new__(self.kind)
            twin.__dict__.update((name, _own(value)) for name, value in self.before.items())
            function = types.MethodType(function, twin)
        # Weights made in inference mode could not be copied from later; a request may be what this is called in.
        result = complete(inference_mode.call(function, self.args, dict(self.kwargs), "outside"))
        return modules_of(result, twin)


def remembered(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Again:
    """Remember what is needed to call a load function again; to be called before the load function is.

    Args:
        function: As wrapt gives it: a bound method, or a plain function.
        owner: The object whose method it is, or `None`.
        args: What it is called with.
        kwargs: Likewise.
    """
    obstacle = ""
    plain = getattr(function, "__func__", None)
    if any(isinstance(value, (Iterator, AsyncIterator, Awaitable)) for value in (*args, *kwargs.values())):
        obstacle = "an argument of its load function can be read once only"
    elif owner is not None and (isinstance(owner, type) or plain is None or not hasattr(owner, "__dict__")):
        obstacle = "its load function is no method of an object with a __dict__, nor a plain function"
    if obstacle or owner is None:
        return Again(function, None, {}, args, kwargs, obstacle)
    before = {name: _own(value) for name, value in vars(owner).items() if not find_modules(value)}
    return Again(plain or function, type(owner), before, args, kwargs)


def modules_of(result: Any, owner: Any) -> dict[str, nn.Module]:
    """Find the outermost modules of what a load function returned; where that holds none, of its object."""
    found = {} if result is None else find_modules(result)
    return found if found or owner is None else find_modules(owner)


def _own(value: Any) -> Any:
    """A container of its own: `self.models["a"] = ...` must not write into the serving object's."""
    return copy.copy(value) if type(value) in {dict, list, set} else value


class _globals_kept:  # noqa: N801 - used like a function, as contextlib's own are
    """Put global variables back that a function bound to other modules."""

    def __init__(self, function: Any) -> None:
        self._variables: dict[str, Any] = getattr(function, "__globals__", {})

    def __enter__(self) -> None:
        self._before = dict(self._variables)

    def __exit__(self, *_: object) -> None:
        missing = object()
        for name, value in list(self._variables.items()):
            before = self._before.get(name, missing)
            if before is value or not find_modules(value):
                continue
            if before is missing:
                del self._variables[name]
            else:
                self._variables[name] = before
        self._before = {}
