"""Process-wide flags of torch and the environment, changed in counted scopes.

Two overlapping `save, set, restore` scopes in two threads would leave the second one's saved value behind forever. Here
every change is a *hold* on a flag, under one lock. The first holder saves the state, the newest holder's value applies,
and when the last one releases the flag the saved state is restored, also after an exception.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import described
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from typing_extensions import Self


@dataclass(frozen=True)
class Flag:
    """One process-wide flag.

    Attributes:
        name: Name for people and receipts.
        write: Sets a value.
        save: Returns the present state, complete enough for `restore`.
        restore: Restores a state that `save` returned.
    """

    name: str
    write: Callable[[Any], None]
    save: Callable[[], Any]
    restore: Callable[[Any], None]


@dataclass
class _Held:
    saved: Any
    values: dict[int, Any] = field(default_factory=dict)
    applies: int = 0  # the holder whose value was written last; 0 for the saved state


_lock = rlock()
_held: dict[Flag, _Held] = {}
_UNKNOWN = -1  # while a value is written, and after a write that raised
_numbers = iter(range(1, 2**62))


class HeldFlags:
    """A set of flags that is held until `release()`, or until the end of its `with` block. At first none is.

    Who makes it before `take` can release it wherever an interruption comes.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self.flags: list[Flag] = []

    def take(self, wanted: Iterable[tuple[Flag, Any]]) -> None:
        """Set each flag's value.

        If a write raises, the flags written so far are restored and the exception is raised.
        """
        with _lock:
            try:
                for flag, value in wanted:
                    self.flags.append(flag)
                    _settle(flag, _entered(flag, self._number, value))
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Release the flags. The next holder's value or the saved state applies again. Idempotent."""
        with _lock:
            for flag in reversed(self.flags):
                try:
                    _let_go(flag, self._number)
                except Exception as error:  # the other flags must still be restored
                    emit(NotApplied(f"restoring {flag.name}", described(error)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _let_go(flag: Flag, number: int) -> None:
    held = _held.get(flag)
    if held is not None:
        held.values.pop(number, None)
        _settle(flag, held)


def _settle(flag: Flag, held: _Held) -> None:
    """Write the newest holder's value or, without a holder, the saved state.

    The garbage collector may release another holder of the flag at any point of this function, by calling it. After an
    interruption it can be repeated.
    """
    while True:
        holders = list(held.values.items())
        number, value = holders[-1] if holders else (0, held.saved)
        if held.applies == number:
            break
        held.applies = _UNKNOWN
        try:
            (flag.write if holders else flag.restore)(value)
        except Exception:
            _forget(flag, held)
            raise
        held.applies = number
    _forget(flag, held)


def _forget(flag: Flag, held: _Held) -> None:
    if not held.values and _held.get(flag) is held:
        del _held[flag]


def _entered(flag: Flag, number: int, value: Any) -> _Held:
    """Enter a holder of a flag. Nothing is written yet."""
    while True:  # the garbage collector may release the last of the other holders in between
        held = _held.get(flag) or _held.setdefault(flag, _Held(flag.save()))
        held.values[number] = value
        held.applies = _UNKNOWN  # one holder may want a flag twice
        if _held.get(flag) is held:
            return held


def hold(wanted: Iterable[tuple[Flag, Any]]) -> HeldFlags:
    """Set each flag's value until the returned `HeldFlags` is released.

    If a write raises, the flags written so far are restored and the exception is raised.
    """
    made = HeldFlags()
    try:
        made.take(wanted)
        return made  # noqa: TRY300 - an interruption on the way out counts, too
    except BaseException:
        made.release()
        raise


@contextmanager
def holding(wanted: Iterable[tuple[Flag, Any]]) -> Generator[HeldFlags, None, None]:
    """Hold flags while open."""
    held = HeldFlags()
    try:
        held.take(wanted)
        yield held
    finally:
        try:
            held.release()
        except BaseException:  # Ctrl-C in it
            held.release()
            raise


# --- torch's flags -------------------------------------------------------------------------------------------


def _torch() -> Any:
    import torch

    return torch


def _matmul_backends() -> list[Any]:
    torch = _torch()
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _save_matmul() -> Any:
    torch = _torch()
    new_style = [(backend, backend.fp32_precision) for backend in _matmul_backends()]
    try:
        return torch.get_float32_matmul_precision(), new_style
    except RuntimeError:
        # torch >= 2.9 refuses this read while the newer interface has another value. With "ieee" in both backends, the
        # older value, which is stored separately, can be read.
        for backend, _ in new_style:
            backend.fp32_precision = "ieee"
        try:
            return torch.get_float32_matmul_precision(), new_style
        finally:
            _restore_new_style(new_style)


def _restore_matmul(saved: Any) -> None:
    precision, backends = saved
    _write_matmul(precision)
    _restore_new_style(backends)


def _restore_new_style(backends: list[tuple[Any, str]]) -> None:
    # Written only if it differs, that is, if other code has used torch's newer `fp32_precision` interface (2.9 on). In
    # 2.9 and 2.10, a write to it makes inductor raise when it reads `allow_tf32`.
    for backend, value in backends:
        if backend.fp32_precision != value:
            backend.fp32_precision = value


def _cudnn_operators() -> list[Any]:
    operators = [getattr(_torch().backends.cudnn, name, None) for name in ("conv", "rnn")]
    return [operator for operator in operators if hasattr(operator, "fp32_precision")]


def _save_cudnn_tf32() -> Any:
    cudnn = _torch().backends.cudnn
    new_style = [(operator, operator.fp32_precision) for operator in _cudnn_operators()]
    try:
        return cudnn.allow_tf32, new_style
    except RuntimeError:  # torch >= 2.9 refuses this read after the two interfaces were mixed
        for operator, _ in new_style:
            operator.fp32_precision = "tf32"
        try:
            return cudnn.allow_tf32, new_style  # with "tf32" in both, readable only if it is True
        except RuntimeError:
            return False, new_style
        finally:
            _restore_new_style(new_style)


def _restore_cudnn_tf32(saved: Any) -> None:
    legacy, new_style = saved
    _write_cudnn_tf32(legacy)
    _restore_new_style(new_style)


def _write_cudnn_tf32(value: Any) -> None:
    _torch().backends.cudnn.allow_tf32 = value


def _write_benchmark(value: Any) -> None:
    # Not `cudnn.flags(benchmark=True)`: its `enabled` defaults to False, which disables cuDNN.
    _torch().backends.cudnn.benchmark = value


def _write_matmul(value: Any) -> None:
    # The only interface that works in all releases from torch 2.6 on.
    _torch().set_float32_matmul_precision(value)


def _write_cuda_share(value: Any) -> None:
    _torch().cuda.set_per_process_memory_fraction(value)


def _save_cuda_share() -> Any:
    return _torch().cuda.get_per_process_memory_fraction()


def _write_threads(value: Any) -> None:
    _torch().set_num_threads(value)


MATMUL_PRECISION = Flag("TF32 matrix products", _write_matmul, _save_matmul, _restore_matmul)
CUDNN_TF32 = Flag("TF32 convolutions", _write_cudnn_tf32, _save_cudnn_tf32, _restore_cudnn_tf32)
CUDNN_BENCHMARK = Flag("cuDNN autotune", _write_benchmark, lambda: _torch().backends.cudnn.benchmark, _write_benchmark)
CUDA_SHARE = Flag("share of the GPU's memory", _write_cuda_share, _save_cuda_share, _write_cuda_share)
TORCH_THREADS = Flag("CPU threads", _write_threads, lambda: _torch().get_num_threads(), _write_threads)
TORCH_FLAGS = (MATMUL_PRECISION, CUDNN_TF32, CUDNN_BENCHMARK, TORCH_THREADS)


def is_held(flag: Flag) -> bool:
    """Check that `flag` is held now, so that its present state is not the user's."""
    with _lock:
        return flag in _held


def held() -> frozenset[Flag]:
    """Return the flags that are held now."""
    with _lock:
        return frozenset(_held)


def original(flag: Flag) -> Any:
    """Return the flag's saved state from before the first holder, or its present state if it is not held."""
    with _lock:
        return _held[flag].saved if flag in _held else flag.save()


@cache  # one flag a name, so that all holders of a variable share it
def environment(name: str) -> Flag:
    """Return the flag of the environment variable `name`. The value `None` means that it is not set."""

    def write(value: Any) -> None:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    return Flag(name, write, lambda: os.environ.get(name), write)
