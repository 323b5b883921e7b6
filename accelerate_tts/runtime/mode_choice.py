"""Choice of a milder mode for objects whose calls fail in inference mode.

Some models work undecorated and fail in torch's inference mode. They pass tensors to threads of their own, which have
another mode, or keep tensors between calls and write into them: "Inplace update to inference tensor outside
InferenceMode", "Inference tensors do not track version counter". Such a call is repeated under `no_grad`, or without
any mode if it needs gradients. If that succeeds, the object's calls use this mode from then on, and one event names the
setting to write. Other errors are never caught. If the milder mode fails, too, the first error is raised, and no other
mode is tried for that object.
"""

from __future__ import annotations

import re
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.inspection.object_tree import attributes_of, base_of, can_be_read_once
from accelerate_tts.runtime.rng import random_states

if TYPE_CHECKING:
    from accelerate_tts.settings import Mode

# torch's own words: a user's error may speak of an "inference model" or of what is "saved for backward compatibility".
_OF_INFERENCE = re.compile(r"outside InferenceMode|\bcreated in inference mode\b|\binference tensors?\b", re.IGNORECASE)
_OF_GRADIENTS = re.compile(
    r"does not require grad\b|requires_grad=True on inference tensor|cannot be saved for backward", re.IGNORECASE
)
_CAUSES = 8  # maximum number of an error and its causes that are looked at
_MOST, _LONGEST = 200_000, 50_000  # limits of the search for inference tensors: objects, items of a container


class _OwnerMode:
    """Knowledge of an object: the mode that it needs, and True in `gave_up` if no milder mode helps."""

    __slots__ = ("gave_up", "mode")

    def __init__(self) -> None:
        self.mode: Mode | None = None
        self.gave_up = False


# Number of calls of functions with retry=False. A call during which it changes must not be repeated.
_made_once = [0]


def made_once() -> None:
    """Note the call of a function with side effects, so that enclosing calls are not repeated."""
    _made_once[0] += 1


known_owners = IdentityMap[_OwnerMode]()
"""Modes that were found for objects."""


def _is_referable(owner: object) -> bool:
    return type(owner).__weakrefoffset__ != 0


def mode_of(owner: object, mode: Mode) -> Mode:
    """Return the mode for calls of an object."""
    known = _known_of(owner if _is_referable(owner) else type(owner)) if known_owners else None
    return mode if known is None or known.mode is None else known.mode


def _known_of(owner: object) -> _OwnerMode | None:
    """Return the knowledge of an object, or of another one of its class around the same module.

    A service may make an object for each request.
    """
    known = known_owners.get(owner)
    if known is None and _around:
        found = (_around.get(value) for value in _held_by(owner))
        known = next((one for others in found if others and (one := others.get(type(owner))) is not None), None)
    return known


def _noted(owner: object) -> _OwnerMode:
    """Return the knowledge of an object, after making it if there is none."""
    known = known_owners.get(owner)
    if known is None:
        known = known_owners.setdefault(owner, lambda: _known_of(owner) or _OwnerMode())
        torch = sys.modules.get("torch")
        for value in _held_by(owner):
            if torch is not None and issubclass(type(value), torch.nn.Module):
                _around.setdefault(value, weakref.WeakKeyDictionary).setdefault(type(owner), known)
    return known


_around = IdentityMap[weakref.WeakKeyDictionary[type, _OwnerMode]]()
"""Knowledge of the objects around a module, by their class."""


def _held_by(owner: object) -> list[Any]:
    """Return the attributes of an object, and theirs."""
    held = list(attributes_of(owner).values())
    return held + [inner for value in held for inner in list(attributes_of(value).values())]


class ModeChoice:
    """One call, which may need a milder mode.

    Args:
        owner: The object whose call it is. Its class is used if it does not support weak references.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        mode: The mode of the decorator.
        again: True if the call may be repeated.

    Attributes:
        mode: The mode for the call.
        raised: The call's error in the requested mode, while a milder one is tried.
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
        self.raised: Exception | None = None
        # Saved for the first call only. A later call of another kind that fails is repeated with other random numbers.
        fresh = mode == "inference" and _known_of(self.owner) is None
        self._random = random_states((*args, *kwargs.values(), owner)) if fresh else None
        # torch writes into an inference tensor before it raises, so the inputs' content must be restored.
        self._given = _contents(owner, args, kwargs) if fresh else None

    def milder(self, error: Exception, *, given: bool = False) -> bool:
        """Decide whether a failed call is repeated; sets `mode` to the milder mode.

        Args:
            error: The call's error.
            given: True if a part of the result was already delivered, so that the call cannot be repeated.
        """
        kind = _kind_of(error)
        known = _known_of(self.owner)
        if self.raised is not None:  # the milder mode did not help
            _noted(self.owner).gave_up = True
            return False
        if not kind or self.mode == "none" or (known is not None and known.gave_up) or _is_callers():
            return False
        # Inference tensors of an earlier call may fail under `no_grad`, too: `_make_normal` replaces them.
        self.mode = "none" if kind == "gradients" else "no_grad"
        once = can_be_read_once((*self._args, *self._kwargs.values()))
        if given or once or not self._again or self._before != _made_once[0]:
            self.settle(error)
            return False
        if self._given is not None:
            _put_back(self._given)
        if _make_normal(self.owner, self._args, self._kwargs) and self._given is None:
            self.settle(error)  # the failed call may have written into them, so a repetition would not be the same
            return False
        self.raised = error
        return True

    def make(self) -> Any:
        """Repeat the call. The caller enters the mode."""
        if self._random is not None:
            self._random()
        args, kwargs = _normal_copies(self._args), _normal_copies(self._kwargs)
        return self._function(*args, **kwargs)

    def settle(self, error: Exception | None = None) -> None:
        """Note that the call succeeded. If that was in a milder mode, the object's later calls use it."""
        # The error is dropped: its traceback keeps the failed attempt's tensors, and this object.
        error, self.raised = error or self.raised, None
        known = _noted(self.owner)
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


def _kind_of(error: BaseException) -> str:
    """Classify an error and its causes: "inference" or "gradients" for errors of the mode, "" for any other."""
    for text in _texts_of_torch(error):
        if _OF_GRADIENTS.search(text):
            return "gradients"
        if _OF_INFERENCE.search(text):
            return "inference"
    return ""


def _texts_of_torch(error: BaseException) -> Iterator[str]:
    """Yield the messages of an error and its causes that may be torch's, which raises RuntimeError."""
    return (_text(cause) for cause in _causes(error) if isinstance(cause, RuntimeError))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes, and those that it groups, as a task group's does."""
    waiting: deque[Any] = deque([error])
    for _ in range(_CAUSES):
        if not waiting:
            return
        found = waiting.popleft()
        yield found
        grouped = getattr(found, "exceptions", ())  # of an ExceptionGroup, or of one's backport to Python 3.10
        causes = (found.__cause__ or found.__context__, *(grouped if isinstance(grouped, tuple) else ()))
        waiting.extend(cause for cause in causes if isinstance(cause, BaseException))


def _is_callers() -> bool:
    """Check that the caller itself is in inference mode, so that a milder mode would not help."""
    torch = sys.modules.get("torch")
    return torch is None or torch.is_inference_mode_enabled()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the error's class is the user's, and its __str__ may raise
        return ""


def _first_line(error: BaseException) -> str:
    """Return the first line of the error, or of its cause that is about the mode."""
    texts = _texts_of_torch(error)
    found = next((text for text in texts if _OF_GRADIENTS.search(text) or _OF_INFERENCE.search(text)), _text(error))
    return (found.strip().splitlines() or [type(error).__name__])[0][:120]


# --- inference tensors ------------------------------------------------------------------------------------------------

_PLAIN = (
    str, bytes, bytearray, int, float, complex, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType, types.MethodType,
)  # fmt: skip


def _contents(*roots: Any) -> list[tuple[Any, Any]]:
    """Return the reachable inference tensors with copies of their content."""
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
    torch = sys.modules["torch"]
    if not issubclass(type(value), torch.Tensor):
        return False
    with torch._C.DisableTorchFunctionSubclass():  # a lazy module's parameter, or a user's subclass, may refuse
        return bool(value.is_inference())


def _make_normal(*roots: Any) -> int:
    """Replace inference tensors by normal tensors in reachable attributes and containers.

    Returns:
        Number of inference tensors found, those included that could not be replaced.
    """
    import torch

    count = len(_inference_tensors(roots))
    made: dict[int, tuple[Any, Any]] = {}  # keeps the replaced tensors alive, so that their ids stay unique

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
                with suppress(TypeError):  # a dictionary that refuses the value
                    holder[place] = normal(value)
            elif issubclass(type(value), tuple) and (whole := _with_normal(value, normal)) is not value:
                holder[place] = whole
    return count


def _reachable(roots: tuple[Any, ...]) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
    """Yield reachable containers and attribute dictionaries with their items."""
    torch = sys.modules["torch"]
    seen: set[int] = set()
    queue: deque[Any] = deque(roots)
    while queue and len(seen) < _MOST:
        item = queue.popleft()
        kind = type(item)  # not isinstance, which would resolve a proxy, and an unbound one raises
        if issubclass(kind, (*_PLAIN, torch.Tensor)) or id(item) in seen:
            continue
        seen.add(id(item))
        holder: Any = item
        base = base_of(kind)
        if base is None:
            holder, base = attributes_of(item), dict
        elif base.__len__(item) > _LONGEST:
            continue
        # The base's methods, since those of a user's class may raise, or load what they are asked for.
        places = list(dict.items(holder)) if base is dict else list(enumerate(base.__iter__(holder)))
        queue.extend(value for _, value in places)
        yield holder, places


def _with_normal(value: Any, normal: Callable[[Any], Any]) -> Any:
    """Return a tuple with normal tensors; the same object if there is nothing to replace."""
    items = [
        normal(item) if _is_inference(item) else _with_normal(item, normal) if type(item) is tuple else item
        for item in value
    ]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _normal_copies(given: Any) -> Any:
    """Return arguments with normal tensors. `_make_normal` cannot replace tensors that are arguments themselves."""
    import torch

    def normal(value: Any) -> Any:
        with torch.inference_mode(mode=False), torch.no_grad():
            return value.clone()

    if isinstance(given, dict):
        return dict(zip(given, _with_normal(tuple(given.values()), normal), strict=True))
    return _with_normal(given, normal)
