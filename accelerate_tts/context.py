"""`fast_inference()`: the scoped form, for scripts."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, NoReturn

from accelerate_tts.errors import InferenceContextError
from accelerate_tts.settings import Mode, check_mode, is_active

if TYPE_CHECKING:
    from contextlib import ExitStack
    from types import FrameType, TracebackType

__all__ = ["fast_inference"]

_ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
_ADVICE = (
    "its thread-local mode would leak into other tasks at the next await. Decorate the coroutine function with"
    " @inference, or move the block into a plain function and call that"
)


class fast_inference:  # noqa: N801 - used like a function, as contextlib's own are
    """Run a block of synchronous code without autograd, with the fast process-wide flags of the device held.

    The flags (TF32 and cuDNN autotune on CUDA; none elsewhere) are counted: scopes may nest and overlap in any
    threads, and the last one to end restores what was there before the first. Threads started inside do not inherit
    the mode: give them `carry_mode(work)`.

    Args:
        mode: "inference", "no_grad" or "none", as for `@inference`.

    Raises:
        SettingsError: An unknown mode.
        InferenceContextError: Entered in the body of a coroutine or async generator.

    Example:
        >>> with fast_inference():
        ...     wav = model(**inputs).waveform
    """

    def __init__(self, *, mode: Mode = "inference") -> None:
        check_mode(mode)
        self._mode = mode
        self._scopes: list[ExitStack] = []

    def __enter__(self) -> None:
        _refuse_async(sys._getframe(1))
        from contextlib import ExitStack

        with ExitStack() as scope:
            if is_active():
                from accelerate_tts.device import flags
                from accelerate_tts.optimizer import get_performance_optimizer
                from accelerate_tts.runtime.modes import mode_factory

                scope.enter_context(flags.hold(get_performance_optimizer().call_flags()))
                scope.enter_context(mode_factory(self._mode)())
            self._scopes.append(scope.pop_all())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scopes.pop().__exit__(kind, error, traceback)

    async def __aenter__(self) -> NoReturn:
        raise InferenceContextError(f"`async with fast_inference()` cannot be: {_ADVICE}")

    async def __aexit__(self, *_: object) -> None:  # pragma: no cover - never entered
        return


def _refuse_async(frame: FrameType | None) -> None:
    # A plain function called from a coroutine is safe, it cannot be suspended; a coroutine's own body is not.
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":  # ExitStack.enter_context
        frame = frame.f_back
    if frame is not None and frame.f_code.co_flags & _ASYNC:
        raise InferenceContextError(f"fast_inference() was entered in async {frame.f_code.co_name}(): {_ADVICE}")
