"""Random numbers of one thread's call, from generators of its own.

torch's generators belong to the process. Calls in several threads draw from the same one, so what a seeded call says
depends on who else draws meanwhile. Here a mode of the thread (`TorchFunctionMode`, as `torch.set_default_device` uses)
hands a generator of its own to each function that draws. The numbers are those that the function draws after
`torch.manual_seed` of the same seed.

Not reached are draws inside other functions, which take no generator: dropout during training in attention and
recurrent layers (an event says so), and what scripts and extensions draw in C++. What this package compiles draws from
the process's generators, so graphs with draws are left out while such a mode is on (`is_open`).
"""

from __future__ import annotations

import sys
import weakref
from contextlib import nullcontext
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from accelerate_tts.events import NotApplied
from accelerate_tts.inspection.tracing import KEEPS_KERNELS
from accelerate_tts.runtime.random_functions import draw_of, said
from accelerate_tts.runtime.seeding import without_collection

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor


class States(NamedTuple):
    """A mode's seed, and its generators with their states."""

    seed: int
    generators: list[tuple[torch.device, torch.Generator, Tensor]]


_core: Any = torch._C
_overrides, _override_at = _core._len_torch_function_stack, _core._get_function_stack_at
_pop, _push = _core._pop_torch_function_stack, _core._push_on_torch_function_stack
_tracing = _core._get_tracing_state


class OwnRandom(TorchFunctionMode):
    """A mode with generators of its own, one for each device, which are made when they are first drawn from.

    It may be entered in several threads, which then draw from the same generators.

    Args:
        seed: The seed of each generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def entries(self) -> int:
        """Count how often the mode is entered on this thread."""
        return sum(mode is self for mode in _stack())

    def leave(self, entered: int) -> None:
        """Take the mode from this thread's stack until it is entered so many times there. Idempotent."""
        while self.entries() > entered:
            stack = _stack()
            place = max(number for number, mode in enumerate(stack) if mode is self)
            _put_above(place, stack[place + 1 :])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, with a generator if it draws."""
        draw = draw_of(func)
        if draw is None or torch.compiler.is_compiling() or _is_recorded(types):
            return func(*args, **(kwargs or {}))
        return draw(self, func, args, kwargs or {})

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of a device; `None`, with an event, if it can have none but the process's."""
        if _is_checkpointed():
            reason = (
                "torch.utils.checkpoint draws again in the backward pass, from the process's generators: other numbers"
            )
            said.emit(NotApplied("own_random", reason))
        if device.type in {"cuda", "xpu"} and device == torch.device(device.type):  # without a number
            device = torch.device(device.type, getattr(torch, device.type).current_device())
        found = self._generators.get(device)
        if found is None and device.type != "meta":  # which draws nothing
            try:
                made = torch.Generator(device)
            except RuntimeError as error:
                reason = f"{device.type} has no generators but the process's: {error}"
                said.emit(NotApplied("own_random", reason))
                return None
            found = self._generators.setdefault(device, made.manual_seed(self._seed))  # another thread may be first
        return found

    def seed(self, seed: int) -> None:
        """Begin again at another seed."""
        self._seed, self._generators = seed, {}

    def states(self) -> States:
        """Return the seed, and the generators that were made, with their states."""
        made = list(self._generators.items())
        return States(self._seed, [(device, each, without_collection(each.get_state)) for device, each in made])

    def put_back(self, states: States) -> None:
        """Set the states of `states()`. Generators that were made later begin at the seed again."""
        self._seed = states.seed
        self._generators = {device: each for device, each, _ in states.generators}
        for _, each, state in states.generators:
            each.set_state(state)


setattr(OwnRandom, KEEPS_KERNELS, True)


class Entry:
    """Context with a mode on this thread. It is taken off whatever else was put there and left, and after any Ctrl-C.

    Args:
        mode: The mode.
    """

    __slots__ = ("__weakref__", "_before", "_dropped", "_mode")

    def __init__(self, mode: OwnRandom) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._before = self._mode.entries()
        # For Ctrl-C at the very beginning of `__exit__`, which is then not run.
        self._dropped = weakref.finalize(self, _leave, get_ident(), self._mode, self._before)
        try:
            _push(self._mode)
        except BaseException:  # Ctrl-C, after it was put there
            self._dropped()
            raise

    def __exit__(self, *_exception: object) -> None:
        try:
            self._mode.leave(self._before)
        finally:  # also after Ctrl-C in it
            self._dropped()


def _leave(thread: int, mode: OwnRandom, entered: int) -> None:
    if thread == get_ident():
        mode.leave(entered)


def opened() -> OwnRandom | None:
    """Return this thread's innermost mode, or `None`."""
    for place in reversed(range(_overrides())):
        mode = _override_at(place)
        if isinstance(mode, OwnRandom):
            return mode
    return None


def is_open() -> bool:
    """Check for a mode on this thread. Cheap where there is no function mode at all."""
    return bool(_overrides()) and opened() is not None


def _stack() -> list[Any]:
    """Return this thread's function modes, the innermost last."""
    return [_override_at(place) for place in range(_overrides())]


def _put_above(place: int, modes: list[Any]) -> None:
    """Replace this thread's function modes from a place on, also if Ctrl-C comes in between."""
    try:
        _replace(place, modes)
    except BaseException:
        _replace(place, modes)
        raise


def _replace(place: int, modes: list[Any]) -> None:
    while _overrides() > place:
        _pop()
    while _overrides() < place + len(modes):
        _push(modes[_overrides() - place])


class _Without:
    """Context without the innermost function mode. A class: a generator takes three times as long, 30 times a token."""

    __slots__ = ("_mode",)

    def __enter__(self) -> None:
        depth = _overrides()
        self._mode = _override_at(depth - 1)
        try:
            _pop()
        except BaseException:  # Ctrl-C, after it was taken away
            if _overrides() < depth:
                _push(self._mode)
            raise

    def __exit__(self, *_exception: object) -> None:
        _push(self._mode)


class _WithoutAny:
    """Context without any of this thread's modes, which may be below other function modes."""

    def __enter__(self) -> None:
        before = _stack()
        self._taken = [(each, before[place + 1 :]) for place, each in enumerate(before) if isinstance(each, OwnRandom)]
        try:
            _put_above(0, [each for each in before if not isinstance(each, OwnRandom)])
        except BaseException:  # Ctrl-C in it
            _put_above(0, before)
            raise

    def __exit__(self, *_exception: object) -> None:
        for mode, above in reversed(self._taken):
            stack = _stack()  # in which others may have been put meanwhile, such as `torch.set_default_device`
            places = [place for place, each in enumerate(stack) if any(each is other for other in above)]
            place = min(places, default=len(stack))
            _put_above(place, [mode, *stack[place:]])


_NOTHING = nullcontext()


def outside() -> AbstractContextManager[None]:
    """Return a context without this thread's modes.

    In it, functions of torch take no turn in Python, and dynamo finds no mode that it would have to trace.
    """
    if not _overrides():
        return _NOTHING
    owns = [isinstance(mode, OwnRandom) for mode in _stack()]
    if not any(owns):
        return _NOTHING
    return _Without() if owns[-1] and sum(owns) == 1 else _WithoutAny()


def _is_checkpointed() -> bool:
    """Check for `torch.utils.checkpoint` among the callers. In the backward pass, torch leaves the mode out."""
    frame = None if torch.is_inference_mode_enabled() else sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


def _is_recorded(types: Any) -> bool:
    """Check for a recorder (`torch.jit.trace`, `torch.fx`), whose graph a generator of a block would outlive in."""
    return _tracing() is not None or not all(issubclass(kind, torch.Tensor) for kind in types)
