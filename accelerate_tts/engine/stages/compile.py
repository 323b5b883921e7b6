"""torch.compile of a part, in place, counted, with a way back at every call.

`torch.compile` is lazy and silent: a missing compiler shows at the first call, a frame that it skips compiles nothing,
and a new input may cost another compilation in the middle of a request. So the compiled call here counts its graphs
(none at all means that the stage is dropped), lets one thread make the first call while others wait, reports each
compilation after warm-up as an event, and turns to the untouched module when the compiler - and only the compiler -
fails.
"""

from __future__ import annotations

import threading
import types
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import FellBack, Recompiled, emit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from accelerate_tts.engine.plan import Part

__all__ = ["CompileStage", "CompiledCall"]


class CompileStage:
    """Compiles a part as one piece, with dynamic lengths."""

    name = "torch.compile"
    # A compilation takes 10 to 30 s of a user's start on two cores; 1.5x on less than this share gives under 5 %.
    least_share = 0.15

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        return "is compiled already" if part.module._compiled_call_impl is not None else None

    def prepare(self, part: Part) -> CompiledCall:
        """See `Stage.prepare`. Compiles nothing yet."""
        return CompiledCall(part.module, part.name, self._mode)


class CompiledCall:
    """Stands in for a module's `__call__` while the change is on.

    It lives in the private attribute that `nn.Module.compile()` fills (torch 2.0 to 2.14), which pickling and copying
    leave out: the module keeps its class, its `isinstance` and its state dict.
    """

    def __init__(self, module: nn.Module, what: str, mode: str) -> None:
        self._module = module
        self._untouched: Callable[..., Any] = module._call_impl
        self._what = what
        self._counter = _Counter(what)
        self._first_call = threading.RLock()  # a forward may call its own module
        self._ready = False
        self._broken = False
        self._clone_outputs = mode in {"reduce-overhead", "max-autotune"} and _on_cuda(module)
        self._compiled = _compile(module, mode, self._counter)

    @property
    def graphs(self) -> int | None:
        """Graphs compiled so far."""
        return self._counter.graphs

    def on(self) -> None:
        """See `Change.on`. After a compiler failure it stays off."""
        if not self._broken:
            self._module._compiled_call_impl = self

    def off(self) -> None:
        """See `Change.off`."""
        if self._module._compiled_call_impl is self:
            self._module._compiled_call_impl = None

    def seal(self) -> None:
        """See `Change.seal`."""
        self._counter.sealed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, compiled while that works."""
        if self._ready:
            return self._run(args, kwargs)
        with self._first_call:  # three simultaneous first calls would compile three times
            result = self._run(args, kwargs)
            self._ready = True
        return result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self._broken:
            return self._untouched(*args, **kwargs)
        try:
            result = self._compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = _reason(error)
        else:
            return _clone(result) if self._clone_outputs else result
        # Tracing with a wrong input fails in the compiler's name. Then the untouched module raises the user's own
        # error here, and nothing is wrong with the compilation.
        self._broken = True
        self.off()
        try:
            result = self._untouched(*args, **kwargs)
        except BaseException:
            self._broken = False
            self.on()
            raise
        emit(FellBack(self._what, "torch.compile", reason))
        return result


class _Counter:
    """Counts graphs. Apart from the call, because dynamo keeps every backend, and what that refers to, for ever."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.graphs = 0
        self.sealed = False

    def count(self, shapes: str) -> None:
        self.graphs += 1
        if self.sealed:
            emit(Recompiled(self.what, self.graphs, shapes))


def _compile(module: nn.Module, mode: str, counter: _Counter) -> Callable[..., Any]:
    import torch
    from torch._inductor import list_mode_options

    # The wrapper is compiled, not the module: classes of torch.nn itself (Linear, Sequential, LSTM) stand on dynamo's
    # skip list on older releases, and `Linear.compile()` then compiles nothing without a word.
    untouched: Callable[..., Any] = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return untouched(*args, **kwargs)

    # dynamo keeps its graphs, and counts its limit of 8, by code object: each part needs one of its own.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    # fallback_random: the compiled graph draws the same random numbers as eager does.
    patches = {**list_mode_options(mode), "fallback_random": True}
    inductor = _inductor()

    def backend(graph: Any, inputs: list[Any]) -> Any:
        counter.count(_shapes(inputs))
        return inductor(graph, inputs, config_patches=patches)

    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=True)
    return compiled


def _inductor() -> Any:
    from torch._dynamo import lookup_backend

    return lookup_backend("inductor")


def _shapes(inputs: list[Any]) -> str:
    # A graph's inputs begin with sizes and weights; the user's own come last.
    shapes = [tuple(item.shape) for item in inputs if hasattr(item, "shape")]
    return ", ".join(str(shape) for shape in shapes[-3:]) or "an input without tensors"


def _on_cuda(module: nn.Module) -> bool:
    return any(parameter.device.type == "cuda" for parameter in module.parameters())


def _clone(result: Any) -> Any:
    # A CUDA graph writes its outputs to the same addresses at every replay.
    import torch
    from torch.utils import _pytree

    return _pytree.tree_map_only(torch.Tensor, torch.clone, result)


def _reason(error: BaseException) -> str:
    # dynamo wraps what inductor raised; the inner error is the one that names the missing compiler.
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else 'no message'}"
