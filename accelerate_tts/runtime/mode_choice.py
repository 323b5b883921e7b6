"""Notice that a call fails by the mode that we run it in, and choose a milder one for its object.

A model that hands tensors to threads of its own, which no mode reaches, or that keeps tensors between calls and writes
into them, works undecorated and fails in torch's inference mode: "Inplace update to inference tensor outside
InferenceMode", "Inference tensors do not track version counter". Such a call is made once more under `no_grad` (without
any mode, if it wants gradients). If that goes well, the object's calls are made so from then on, and one event says
what to write. An error that is not of the mode is never caught, and one that the milder mode does not mend is raised
as it came, and not tried again for that object.
"""

from __future__ import annotations

import re
import sys
import types
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.runtime.rng import random_states

if TYPE_CHECKING:
    from accelerate_tts.settings import Mode

__all__ = ["ModeChoice", "made_once", "mode_of"]

_OF_INFERENCE = re.compile(r"inference ?tensor|inference ?mode", re.IGNORECASE)
_OF_GRADIENTS = re.compile(r"does not require grad|requires_grad=True on inference|saved for backward", re.IGNORECASE)
_CAUSES = 8  # an error of a thread may have been wrapped on its way
_MOST, _LONGEST = 200_000, 50_000  # what is looked through for inference tensors: objects, items of a container


class _Known:
    """What is known of an object: the mode that it needs, and whether a call of it went well or could not be mended."""

    __slots__ = ("gave_up", "mode", "owner")

    def __init__(self, owner: weakref.ref[Any]) -> None:
        self.owner = owner
        self.mode: Mode | None = None
        self.gave_up = False


# Calls so far of functions with retry=False. Whatever was under way meanwhile may have made one of them.
_made_once = [0]


def made_once() -> None:
    """Say that a function with side effects is called: what calls it is not made again."""
    _made_once[0] += 1


# By the identity of objects, without keeping them.
_known: dict[int, _Known] = {}


def _known_of(owner: object) -> _Known | None:
    known = _known.get(id(owner))
    return known if known is not None and known.owner() is owner else None


def _is_referable(owner: object) -> bool:
    return type(owner).__weakrefoffset__ != 0


def mode_of(owner: object, mode: Mode) -> Mode:
    """The mode that calls of an object are made in.

    Args:
        owner: The object.
        mode: What it was decorated with.
    """
    known = _known_of(owner if _is_referable(owner) else type(owner)) if _known else None
    return mode if known is None or known.mode is None else known.mode


class ModeChoice:
    """One call, which may turn out to need a milder mode.

    Args:
        owner: The object whose call it is; its class stands for one that takes no weak reference.
        function: What is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        mode: What it was decorated with.
        again: Whether it may be made again.
    """

    def __init__(  # noqa: PLR0913 - a call, and how it is made
        self,
        owner: object,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mode: Mode,
        *,
        again: bool = True,
    ) -> None:
        self.owner = owner if _is_referable(owner) else type(owner)
        self.mode: Mode = mode_of(self.owner, mode)
        self._function, self._args, self._kwargs = function, args, kwargs
        self._again = again
        self._before = _made_once[0]
        self._first: Exception | None = None
        # Of the first call only: once one went well, another kind of call may still fail, under other numbers.
        fresh = mode == "inference" and _known_of(self.owner) is None
        self._random = random_states((*args, *kwargs.values(), owner)) if fresh else None
        # torch writes into an inference tensor, and raises then: what a call was given must be as it was.
        self._given = _contents(owner, args, kwargs) if fresh else None

    def milder(self, error: Exception, *, given: bool = False) -> bool:
        """Whether the call is to be made again, in `mode`, which then is another one.

        Args:
            error: What it raised.
            given: Something of it was delivered already, so it cannot be made again.
        """
        kind = _kind_of(error)
        known = _known_of(self.owner)
        if self._first is not None:  # the milder mode did not mend it
            self._entry().gave_up = True
            return False
        if not kind or self.mode == "none" or (known is not None and known.gave_up) or _is_callers():
            return False
        # Under `no_grad`, what an earlier call made in inference mode may be in the way: `_make_normal` mends that.
        self.mode = "none" if kind == "gradients" else "no_grad"
        once = any(isinstance(value, (Iterator, AsyncIterator)) for value in (*self._args, *self._kwargs.values()))
        if given or once or not self._again or self._before != _made_once[0]:
            self.settle(error)
            return False
        if self._given is not None:
            _put_back(self._given)
        if _make_normal(self.owner, self._args, self._kwargs) and self._given is None:
            self.settle(error)  # the call may have written into these, so it would not be the same call
            return False
        self._first = error
        return True

    def make(self) -> Any:
        """Make the call again; its mode is the caller's to enter."""
        if self._random is not None:
            self._random()
        args, kwargs = _normal_copies(self._args), _normal_copies(self._kwargs)
        return self._function(*args, **kwargs)

    @property
    def raised(self) -> Exception | None:
        """What the call raised in the mode that was asked for."""
        return self._first

    def settle(self, error: Exception | None = None) -> None:
        """The call went well: if that was in a milder mode, the object's calls are made in it from now on."""
        # Not kept: its traceback has the failed attempt's tensors, and this object.
        error, self._first = error or self._first, None
        known = _known_of(self.owner) or self._entry()
        if error is None or known.mode == self.mode:
            return
        known.mode = self.mode
        name = getattr(self._function, "__qualname__", type(self._function).__qualname__)
        how = "torch.no_grad()" if self.mode == "no_grad" else "no mode at all"
        emit(
            NotApplied(
                f"inference mode for {name}",
                f"it fails there ({_first_line(error)}), so calls of this object are made under {how};"
                f' write @inference(mode="{self.mode}")',
            )
        )

    def _entry(self) -> _Known:
        known = _known_of(self.owner)
        if known is None:
            number = id(self.owner)

            def gone(reference: object) -> None:
                entry = _known.get(number)
                if entry is not None and entry.owner is reference:
                    del _known[number]

            known = _known[number] = _Known(weakref.ref(self.owner, gone))
        return known


def _kind_of(error: BaseException | None) -> str:
    """Whether an error, or what it came of, is of inference mode or of missing gradients; "" for any other."""
    for _ in range(_CAUSES):
        if error is None:
            return ""
        if _OF_GRADIENTS.search(_text(error)):
            return "gradients"
        if _OF_INFERENCE.search(_text(error)):
            return "inference"
        error = error.__cause__ or error.__context__
    return ""


def _is_callers() -> bool:
    """Whether the caller is in inference mode anyway, so that no other mode of ours would change anything."""
    torch = sys.modules.get("torch")
    return torch is None or torch.is_inference_mode_enabled()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of a class of the user's own; his error is what he gets
        return ""


def _first_line(error: BaseException) -> str:
    """What was found in it, or in what it came of."""
    found: BaseException | None = error
    for _ in range(_CAUSES):
        if found is None or _OF_GRADIENTS.search(_text(found)) or _OF_INFERENCE.search(_text(found)):
            break
        found = found.__cause__ or found.__context__
    return (_text(found or error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- what was made in inference mode ----------------------------------------------------------------------------------

_PLAIN = (
    str, bytes, bytearray, int, float, complex, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType, types.MethodType,
)  # fmt: skip


def _contents(*roots: Any) -> list[tuple[Any, Any]]:
    """What was made in inference mode and can be reached, with copies of it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    with torch.inference_mode():
        return [(tensor, tensor.clone()) for tensor in _inference_tensors(roots)]


def _put_back(contents: list[tuple[Any, Any]]) -> None:
    torch = sys.modules["torch"]
    with torch.inference_mode():
        for tensor, copy in contents:
            tensor.copy_(copy)


def _inference_tensors(roots: tuple[Any, ...]) -> list[Any]:
    found: dict[int, Any] = {}
    for _, places in _reachable(roots):
        found.update((id(value), value) for _, value in places if _is_inference(value))
    return list(found.values())


def _is_inference(value: Any) -> bool:
    return issubclass(type(value), sys.modules["torch"].Tensor) and bool(value.is_inference())


def _make_normal(*roots: Any) -> int:
    """Replace what was made in inference mode by normal tensors, in attributes and containers that can be reached.

    Returns:
        How many there were, with those that are in no such place.
    """
    import torch

    count = len(_inference_tensors(roots))
    made: dict[int, tuple[Any, Any]] = {}  # with the replaced one, whose id no other object must get

    def normal(tensor: Any) -> Any:
        if id(tensor) not in made:
            with torch.inference_mode(mode=False), torch.no_grad():
                copy = tensor.clone()
                if isinstance(tensor, torch.nn.Parameter):
                    copy = torch.nn.Parameter(copy, tensor.requires_grad)
            made[id(tensor)] = (copy, tensor)
        return made[id(tensor)][0]

    for holder, places in _reachable(roots):
        for place, value in places if isinstance(holder, (dict, list)) else ():
            if _is_inference(value):
                with suppress(TypeError):  # a dictionary that does not take it
                    holder[place] = normal(value)
            elif issubclass(type(value), tuple) and (whole := _with_normal(value, normal)) is not value:
                holder[place] = whole
    return count


def _reachable(roots: tuple[Any, ...]) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
    """Containers and dictionaries of attributes that can be reached, with what each holds."""
    torch = sys.modules["torch"]
    seen: set[int] = set()
    queue: deque[Any] = deque(roots)
    while queue and len(seen) < _MOST:
        item = queue.popleft()
        kind = type(item)  # not isinstance, which asks a proxy, that may be bound to nothing and raise
        if issubclass(kind, (*_PLAIN, torch.Tensor)) or id(item) in seen:
            continue
        seen.add(id(item))
        holder: Any = item
        if issubclass(kind, (dict, list, tuple)):
            if len(item) > _LONGEST:
                continue
        else:
            try:
                holder = object.__getattribute__(item, "__dict__")
            except (AttributeError, TypeError):  # slots, or a class of an extension
                continue
        places = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        queue.extend(value for _, value in places)
        yield holder, places


def _with_normal(value: Any, normal: Callable[[Any], Any]) -> Any:
    """A tuple with normal tensors, itself if there is nothing to replace."""
    import torch

    items = [
        normal(item)
        if isinstance(item, torch.Tensor) and item.is_inference()
        else _with_normal(item, normal)
        if type(item) is tuple
        else item
        for item in value
    ]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _normal_copies(given: Any) -> Any:
    """Arguments with normal tensors: an argument that is a tensor itself is no place that `_make_normal` could fill."""
    import torch

    def normal(value: Any) -> Any:
        with torch.inference_mode(mode=False), torch.no_grad():
            return value.clone()

    if isinstance(given, dict):
        return dict(zip(given, _with_normal(tuple(given.values()), normal), strict=True))
    return _with_normal(given, normal)
