"""Watch a warm-up pass: which inputs each part was really given, and how long it took."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.measure import synchronize
from accelerate_tts.engine.verify import tensors_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from accelerate_tts.engine.plan import Part

__all__ = ["Captured", "NotReplayableError", "outputs_of", "time_modules", "watch"]

# A part that is called in a loop shows itself in a few calls; more would only cost memory and tuning time.
_MOST_CALLS = 4
_MOST_OUTPUTS = 64
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class NotReplayableError(Exception):
    """An input (a cache object, say) cannot be copied, so the part cannot be run by itself."""


@dataclass
class Captured:
    """What was seen of one part in one pass.

    Attributes:
        calls: The first few inputs, copied before the part could change them.
        count: How often it was called.
        seconds: Wall-clock seconds inside it.
        obstacle: Why it cannot be replayed, or "".
    """

    calls: list[_Call] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    obstacle: str = ""

    def replay(self, module: Any) -> list[Any]:
        """Run the captured calls again, each on fresh copies, under the modes they had. Returns their outputs."""
        return [call.replay(module) for call in self.calls]


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inference: bool
    grad: bool
    autocast: tuple[str, Any] | None

    def replay(self, module: Any) -> Any:
        import torch

        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(self.inference))
            if not self.inference:
                modes.enter_context(torch.set_grad_enabled(self.grad))
            if self.autocast is not None:
                modes.enter_context(torch.autocast(*self.autocast))
            return module(*_copied(self.args), **_copied(self.kwargs))


@contextmanager
def watch(parts: tuple[Part, ...], device_type: str) -> Generator[dict[str, Captured], None, None]:
    """While open, record each part's calls into the yielded mapping, by part name."""
    seen = {part.name: Captured() for part in parts}
    handles: list[Any] = []
    for part in parts:
        handles += _hook(part.module, seen[part.name], device_type)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def time_modules(roots: tuple[Any, ...], device_type: str) -> Generator[dict[Any, float], None, None]:
    """While open, add up the seconds that every module inside `roots` takes, into the yielded mapping.

    A module that is never called (because `generate()` or `forward` is, or it is a mere list) does not appear.
    """
    seconds: dict[Any, float] = {}
    handles: list[Any] = []
    for module in {inner for root in roots for inner in root.modules()}:
        handles += _timing_hooks(module, seconds, device_type)
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _timing_hooks(module: Any, seconds: dict[Any, float], device_type: str) -> list[Any]:
    starts: list[float] = []

    def before(_module: Any, _args: Any) -> None:
        synchronize(device_type)
        starts.append(time.perf_counter())

    def after(_module: Any, _args: Any, _output: Any) -> None:
        synchronize(device_type)
        if starts:
            seconds[module] = seconds.get(module, 0.0) + time.perf_counter() - starts.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


@contextmanager
def outputs_of(module: Any) -> Generator[list[Any], None, None]:
    """While open, copy the tensors of what each of the first calls of `module` returns into the yielded list."""
    seen: list[Any] = []

    def after(_module: Any, _args: Any, output: Any) -> None:
        if len(seen) < _MOST_OUTPUTS:
            seen.append([tensor.detach().clone() for tensor in tensors_of(output)])

    handle = module.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def _hook(module: Any, captured: Captured, device_type: str) -> list[Any]:
    starts: list[float] = []

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.count += 1
        if len(captured.calls) < _MOST_CALLS and not captured.obstacle:
            try:
                captured.calls.append(_record(args, kwargs, device_type))
            except NotReplayableError as error:
                captured.obstacle = str(error)
                captured.calls.clear()
        synchronize(device_type)
        starts.append(time.perf_counter())

    def after(_module: Any, _args: Any, _output: Any) -> None:
        synchronize(device_type)
        if starts:
            captured.seconds += time.perf_counter() - starts.pop()

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


def _record(args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str) -> _Call:
    import torch

    autocast = None
    if torch.is_autocast_enabled(device_type):
        autocast = (device_type, torch.get_autocast_dtype(device_type))
    return _Call(_copied(args), _copied(kwargs), torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast)


def _copied(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in {tuple, list}:
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (*_PLAIN, torch.dtype, torch.device)):
        return value
    raise NotReplayableError(f"it is given a {type(value).__name__}, which cannot be copied")
