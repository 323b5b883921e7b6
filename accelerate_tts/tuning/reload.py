"""Repeated calls of a user's load function, without side effects on the serving object.

A method is called on a twin of its object: an object of the same class with the attributes from before the first load.
The caller discards the result and the twin. Modules that the function stores elsewhere are removed again
(`bindings.py`).
"""

from __future__ import annotations

import copy
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import ReloadError, described
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.runtime import inference_mode, time_limit
from accelerate_tts.runtime.completion import complete
from accelerate_tts.runtime.seeding import loading_again, seeded
from accelerate_tts.tuning.bindings import Bindings

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Reloader:
    """A load function and its arguments.

    Attributes:
        function: The function; for a method, its plain function.
        kind: Class of its object, or `None` for a plain function.
        before: Attributes of the object before the load, without those that hold modules.
        args: Positional arguments.
        kwargs: Keyword arguments.
        obstacle: Reason why it cannot be called again, or "".
    """

    function: Callable[..., Any]
    kind: type | None
    before: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    obstacle: str = ""

    def modules(self, what: str, device_type: str, timeout: float | None) -> dict[str, nn.Module]:
        """Call the load function again; return the loaded modules by their path, as `find_modules` does.

        The state of random number generators is kept.

        Args:
            what: Name of the object, for messages.
            device_type: Device whose random state is kept beside the CPU's.
            timeout: Time limit in seconds; `None` is no limit.

        Raises:
            ReloadError: The function cannot be called again, raised, or did not return in time.
        """
        if self.obstacle:
            raise ReloadError(f"{what} cannot be loaded again: {self.obstacle}")
        token = loading_again.set(True)
        try:
            with seeded(device_type):
                return self._apart(lambda: time_limit.within(timeout, f"loading {what} again", self._load))
        except Exception as error:  # the user's function, or a resource that it needs and that is gone
            reason = described(error)
        finally:
            loading_again.reset(token)
        # Outside of `except`: the first error's traceback would keep a half-loaded model alive.
        raise ReloadError(f"{what} could not be loaded again: {reason}")

    def _apart(self, load: Callable[[], dict[str, nn.Module]]) -> dict[str, nn.Module]:
        bindings, found = Bindings(self.function, self.kind, self.before), None
        try:
            found = load()
            return found
        finally:
            bindings.restore(found)

    def _load(self) -> dict[str, nn.Module]:
        twin: Any = None
        function = self.function
        if self.kind is not None:
            twin = object.__new__(self.kind)
            twin.__dict__.update((name, _own(value)) for name, value in self.before.items())
            function = types.MethodType(function, twin)
        # Outside inference mode, since a request may call this, and inference tensors could not be used later.
        result = complete(inference_mode.call(function, self.args, dict(self.kwargs), "outside"))
        return modules_of(result, twin)


def remembered(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reloader:
    """Save a load function's call for a repetition. Must run before the function is called.

    Args:
        function: The function as wrapt passes it: a bound method, or a plain function.
        owner: The object whose method it is, or `None`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    obstacle = ""
    plain = getattr(function, "__func__", None)
    if any(isinstance(value, (Iterator, AsyncIterator, Awaitable)) for value in (*args, *kwargs.values())):
        obstacle = "an argument of its load function can be read once only"
    elif owner is not None and (isinstance(owner, type) or plain is None or not hasattr(owner, "__dict__")):
        obstacle = "its load function is no method of an object with a __dict__, nor a plain function"
    if obstacle or owner is None:
        return Reloader(function, None, {}, args, kwargs, obstacle)
    before = {name: _own(value) for name, value in vars(owner).items() if not find_modules(value)}
    return Reloader(plain or function, type(owner), before, args, kwargs)


def modules_of(result: Any, owner: Any) -> dict[str, nn.Module]:
    """Find the outermost modules of a load function's result, or of its object if the result has none."""
    found = {} if result is None else find_modules(result)
    return found if found or owner is None else find_modules(owner)


def _own(value: Any) -> Any:
    """Copy a container, so that `self.models["a"] = ...` does not write into the serving object's."""
    return copy.copy(value) if type(value) in {dict, list, set} else value
