"""Capture of a warm-up pass: the real inputs and the time of each part."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.plan import CALL, READY, TimedCalls
from accelerate_tts.tuning.cache_delta import is_cache, is_past, without_past
from accelerate_tts.tuning.compare import tensors_of
from accelerate_tts.tuning.timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from torch.utils.hooks import RemovableHandle

    from accelerate_tts.plan import Part

# A few calls represent a part that is called in a loop; more would only cost memory and tuning time.
_MOST_CALLS = 6
_MOST_OF_A_SORT = 3
# Minimum calls of one sort that count as a loop, and the share of the part's time from which only the loop is timed.
_A_LOOP = 8
_MOSTLY = 0.5

Sort = tuple[tuple[int, ...], ...]
_MOST_OUTPUTS = 64
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class NotReplayableError(Exception):
    """An input cannot be copied, so the part cannot be run by itself."""


@dataclass
class Captured:
    """Calls of one part in one pass.

    Attributes:
        method: The method that runs the part.
        enough: Seconds of a loop's calls that one timing needs.
        calls: A few of the inputs, copied before the part could change them: the first ones of each sort.
        count: Number of calls.
        seconds: Wall-clock seconds inside it.
        obstacle: Reason why it cannot be replayed, or "".
        sorts: Of each sort of call (a prompt, a single token: the shapes of what is new), how many there were and what
            they took.
    """

    method: str = CALL
    enough: float = 1.0
    calls: list[_Call] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    obstacle: str = ""
    sorts: dict[Sort, _Tally] = field(default_factory=dict)

    def prepared(self, module: Any, which: TimedCalls) -> list[PreparedCall]:
        """Return captured calls with fresh copies of their inputs.

        Args:
            module: The module that they will run on. Its class may prepare caches (`READY`).
            which: See `TimedCalls`.
        """
        return [call.prepared(module) for call in self._chosen(which)]

    def outcomes(self, module: Any) -> list[Any]:
        """Return the outputs of the captured calls. They run in turn, with one copy of their inputs at a time."""
        return [
            without_past(call.prepared(module).run(module), (*call.args, *call.kwargs.values())) for call in self.calls
        ]

    @property
    def cached(self) -> bool:
        """True if it was called with a key/value cache, as a decoder in its loop is."""
        return any(is_past(value) for call in self.calls for value in (*call.args, *call.kwargs.values()))

    def place_for(self, sort: Sort) -> int | None:
        """Return the index among the recorded calls for one more of a sort; `None` if it is not recorded.

        A sort that comes late (a longer text, after a loop has filled all places) takes a place of the sort with the
        most, since calls that are not recorded are not compared.
        """
        kept = Counter(call.sort for call in self.calls)
        mine = kept[sort]
        if len(self.calls) < _MOST_CALLS and (mine < _MOST_OF_A_SORT or len(self.sorts) == 1):
            return len(self.calls)
        if mine and self.sorts[sort].is_milestone:
            return max(number for number, call in enumerate(self.calls) if call.sort == sort)
        most, count = kept.most_common(1)[0]
        if len(self.calls) == _MOST_CALLS and mine < _MOST_OF_A_SORT and mine + 1 < count:
            self.calls.remove(next(call for call in self.calls if call.sort == most))
            return len(self.calls)
        return None

    def _chosen(self, which: TimedCalls) -> list[_Call]:
        longest = max(self.sorts, key=lambda sort: self.sorts[sort].seconds, default=None)
        if which == "all" or longest is None:
            return self.calls
        tally = self.sorts[longest]
        loop = tally.count >= _A_LOOP and tally.seconds > _MOSTLY * self.seconds
        if not loop:
            return self.calls
        if which == "prefill":
            return [call for call in self.calls if call.sort != longest] or self.calls
        calls = [call for call in self.calls if call.sort == longest] or self.calls
        # The latest calls, in which a cache has the lengths of service.
        return calls[-max(1, math.ceil(self.enough * tally.count / tally.seconds)) :]


@dataclass
class _Tally:
    count: int = 0
    seconds: float = 0.0

    @property
    def is_milestone(self) -> bool:
        """True at powers of two, when the latest call replaces an earlier one, since a loop's cache grows."""
        return self.count >= _A_LOOP and self.count & (self.count - 1) == 0


@dataclass(frozen=True)
class PreparedCall:
    """A captured call with copies of its inputs, for one run."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: _Call

    def run(self, module: Any) -> Any:
        """Run the call under its original modes, and return its output."""
        call = self.call
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(call.inference))
            if not call.inference:
                modes.enter_context(torch.set_grad_enabled(call.grad))
            if call.autocast is not None:
                modes.enter_context(torch.autocast(*call.autocast))
            return getattr(module, call.method)(*self.args, **self.kwargs)


@dataclass(eq=False)  # tensors have no truth value
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inference: bool
    grad: bool
    autocast: tuple[str, Any] | None

    sort: Sort
    method: str

    def prepared(self, module: Any) -> PreparedCall:
        """Return the call with fresh copies of its inputs."""
        # Copied in the original mode: writing into an inference tensor outside inference mode fails.
        with torch.inference_mode(self.inference):
            args, kwargs = _copied(self.args), _copied(self.kwargs)
        ready = getattr(type(module), READY, None)
        if ready is not None:
            args = tuple(ready(value) for value in args)
            kwargs = {name: ready(value) for name, value in kwargs.items()}
        return PreparedCall(args, kwargs, self)


@contextmanager
def watch(parts: tuple[Part, ...], device_type: str, enough: float = 1.0) -> Generator[dict[str, Captured], None, None]:
    """While open, record each part's calls into the yielded mapping, by part name. See `Captured.enough`."""
    seen = {part.name: Captured(part.method, enough) for part in parts}
    with ExitStack() as stack:
        for part in parts:
            before, after = _watchers(seen[part.name], device_type)
            stack.enter_context(_around(part, before, after))
        yield seen


@contextmanager
def _around(part: Part, before: Callable[..., None], after: Callable[..., None]) -> Generator[None, None, None]:
    """Call `before(module, args, kwargs)` and `after(module, args, output)` around each run of a part while open."""
    module, method = part.module, part.method
    if method == CALL:
        with removed_at_end(_registered(module, before, after, with_kwargs=True)):
            yield
        return
    plain = getattr(module, method)

    def run(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        output = plain(*args, **kwargs)
        after(module, args, output)
        return output

    attributes = vars(module)
    own = {method: attributes[method]} if method in attributes else {}
    try:
        attributes[method] = run
        yield
    finally:
        attributes.pop(method, None)
        attributes.update(own)


@contextmanager
def time_modules(roots: tuple[Any, ...], device_type: str) -> Generator[dict[Any, float], None, None]:
    """Add up the seconds of every module inside `roots` in the yielded mapping while open.

    Modules that are never called (because `generate()` or `forward` is called, or for a list of modules) are missing.
    """
    seconds: dict[Any, float] = {}
    modules = {inner for root in roots for inner in root.modules()}
    with removed_at_end(handle for module in modules for handle in _timing_hooks(module, seconds, device_type)):
        yield seconds


@contextmanager
def calls_of(roots: tuple[Any, ...]) -> Generator[set[int], None, None]:
    """Collect the `id` of every called module inside `roots` in the yielded set while open."""
    called: set[int] = set()
    modules = {inner for root in roots for inner in root.modules()}

    def note(module: Any, _args: Any) -> None:
        called.add(id(module))

    with removed_at_end(module.register_forward_pre_hook(note) for module in modules):
        yield called


@contextmanager
def removed_at_end(hooks: Iterable[RemovableHandle]) -> Generator[None, None, None]:
    """Remove hooks at the end of the scope. They are registered when it begins, since `hooks` registers them lazily."""
    handles: list[RemovableHandle] = []
    try:
        handles.extend(hooks)
        yield
    finally:
        try:
            _remove(handles)
        except BaseException:  # Ctrl-C in it
            _remove(handles)
            raise


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _registered(
    module: Any, before: Callable[..., Any], after: Callable[..., Any], **options: bool
) -> Iterator[RemovableHandle]:
    # One at a time: each handle is known before the next hook is registered.
    yield module.register_forward_pre_hook(before, **options)
    yield module.register_forward_hook(after)


def _timing_hooks(module: Any, seconds: dict[Any, float], device_type: str) -> Iterator[RemovableHandle]:
    starts: list[float] = []

    def before(_module: Any, _args: Any) -> None:
        synchronize(device_type)
        starts.append(time.perf_counter())

    def after(_module: Any, _args: Any, _output: Any) -> None:
        synchronize(device_type)
        if starts:
            seconds[module] = seconds.get(module, 0.0) + time.perf_counter() - starts.pop()

    return _registered(module, before, after)


@contextmanager
def outputs_of(part: Part) -> Generator[list[Any], None, None]:
    """Copy the output tensors of a part's first calls into the yielded list while open."""
    seen: list[Any] = []

    def after(_module: Any, _args: Any, output: Any) -> None:
        if len(seen) < _MOST_OUTPUTS:
            seen.append([tensor.detach().clone() for tensor in tensors_of(output)])

    with _around(part, lambda *_given: None, after):
        yield seen


def _watchers(captured: Captured, device_type: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the hooks that record each call of a part, before and after it."""
    starts: list[tuple[float, Sort]] = []

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.count += 1
        sort = _sort_of((*args, *kwargs.values()))
        captured.sorts.setdefault(sort, _Tally())
        if not captured.obstacle:
            try:
                place = captured.place_for(sort)
                if place is not None:
                    captured.calls[place : place + 1] = [_record(args, kwargs, device_type, sort, captured.method)]
            except NotReplayableError as error:
                captured.obstacle = str(error)
                captured.calls.clear()
        synchronize(device_type)
        starts.append((time.perf_counter(), sort))

    def after(_module: Any, _args: Any, _output: Any) -> None:
        synchronize(device_type)
        if starts:
            start, sort = starts.pop()
            seconds = time.perf_counter() - start
            captured.seconds += seconds
            captured.sorts[sort].count += 1
            captured.sorts[sort].seconds += seconds

    return before, after


def _sort_of(values: tuple[Any, ...]) -> Sort:
    """Return the shapes of the floating-point tensors, or of the first tensor if there are none (token ids)."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return tuple(tuple(tensor.shape) for tensor in floating or tensors[:1])


def _record(args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str, sort: Sort, method: str) -> _Call:
    autocast = None
    if torch.is_autocast_enabled(device_type):
        autocast = (device_type, torch.get_autocast_dtype(device_type))
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return _Call(_copied(args), _copied(kwargs), inference, grad, autocast, sort, method)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in {tuple, list}:
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (*_PLAIN, torch.dtype, torch.device)):
        return value
    if is_cache(value):  # copy its present state, since the loop changes the object
        return copy.deepcopy(value)
    raise NotReplayableError(f"it is given a {type(value).__name__}, which cannot be copied")
