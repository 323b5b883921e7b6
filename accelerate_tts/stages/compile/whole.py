"""torch.compile of a whole part, in place, with counted graphs and a fallback at every call.

`torch.compile` is lazy and silent. A missing compiler shows at the first call, a skipped frame compiles nothing, and a
new input may compile again in the middle of a request. The compiled call therefore counts its graphs; without any, the
stage is dropped. One thread makes the first call while others wait. Each compilation after warm-up emits an event. If
the compiler fails, and only then, the untouched module runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from accelerate_tts.events import FellBack, emit
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.locks import rlock
from accelerate_tts.patching.change import CountedChange, Counter
from accelerate_tts.patching.class_swap import keeps_copies, make_copies
from accelerate_tts.patching.normal_tensors import call_normally
from accelerate_tts.patching.structure_watch import Calls
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.plan import CALL
from accelerate_tts.runtime.graph_thread import graph_owner
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.compile.inductor import Frozen, clone_outputs, compile_function, guard_of, options, reason_of
from accelerate_tts.stages.decode.call_args import Obstacles
from accelerate_tts.stages.layers.weight_norm import has_folds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import State, Target

    Compiler = Callable[[Callable[..., Any], str, Counter], Callable[..., Any]]

_LIMIT_REACHED = "it has as many graphs as dynamo keeps (8); give lengths= that cover service"

_SECONDS_A_LAYER = 0.2
"""Compile time on two cores: a vocoder of some hundred layers takes 30 s, a decoder of 300 over a minute."""

_MOSTLY = 0.5
"""Minimum share of a part's weights in linear layers for freezing to be worth it."""


def _obstacle(part: Part) -> str | None:
    if part.method != CALL:
        return f"it is run by .{part.method}(), which torch.compile does not replace"
    return "its cache grows at every call: the decode step is compiled by itself" if part.cached else None


@register_stage
class CompileStage(BaseStage):
    """Compiles a part as one piece, with dynamic lengths."""

    name = "torch.compile"
    group = "compilation"
    needs_compiler = True
    excluded_by: tuple[State, ...] = ("compiled", "fused")
    after = ("compiled blocks",)
    passes = 3  # with inductor's CUDA graphs: eager, recording and replay
    # Compiling adds 10 to 30 s to the start on two cores, and 1.5x on less than this share gains under 5 %.
    least_share = 0.15
    cost = 10.0

    @classmethod
    def variants(cls, target: Target) -> Iterable[CompileStage]:
        return () if target.compile_mode is None else (cls(target.compile_mode),)

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def cost_of(self, part: Part) -> float:
        """See `Stage.cost_of`. The cost grows with the number of traced layers."""
        layers = sum(next(inner.children(), None) is None for inner in part.module.modules())
        return max(self.cost, _SECONDS_A_LAYER * layers)

    def applies(self, part: Part) -> str | None:
        return _obstacle(part)

    def prepare(self, part: Part) -> CompiledCall:
        """See `Stage.prepare`. Compiles nothing yet."""
        return CompiledCall(part.module, part.name, self._mode)


@register_stage
class FrozenCompileStage(BaseStage):
    """Compiles a part made of linear layers with frozen weights, packed for kernels that are chosen by timing.

    With few rows (a decode step, a short sentence), reading the weights dominates a linear layer. inductor's C++
    kernels over packed weights read them at full memory bandwidth. Both `freezing` and `max_autotune` are needed for a
    gain (docs/decisions/0004-compiling.md). For CPUs.
    """

    name = "torch.compile, frozen"
    group = "linear layers"
    devices = ("cpu",)
    needs_compiler = True
    excluded_by: tuple[State, ...] = ("compiled", "fused")
    after = ("int8 recurrent layers",)
    # About 4 s of timing for each of a transformer's five weight shapes, and the compilation itself.
    cost = 30.0
    least_share = 0.15

    def applies(self, part: Part) -> str | None:
        few = None if _linear_share(part.module) >= _MOSTLY else "not made of linear layers"
        return _obstacle(part) or few

    def prepare(self, part: Part) -> CompiledCall:
        """See `Stage.prepare`. Compiles nothing yet."""
        return CompiledCall(part.module, part.name, "default", frozen=True)


class CompiledCall(CountedChange):
    """Replaces a module's `__call__` while the change is on.

    It is stored in the private attribute that `nn.Module.compile()` sets (torch 2.0 to 2.14), which pickling and
    copying omit. The module keeps its class and its state dict.

    Args:
        module: The module.
        what: Its name in events.
        mode: torch.compile's mode.
        frozen: True if weights become constants of the graphs.
        compiler: Compiles the call; tests pass another one than `compile_function`.
    """

    def __init__(
        self, module: nn.Module, what: str, mode: str, *, frozen: bool = False, compiler: Compiler | None = None
    ) -> None:
        self._module = module
        self._frozen = Frozen(module) if frozen else None
        # A graph does not notice writes to weights that are constants in it, or that a stage has copied.
        self._weights = self._frozen or (WeightWatch(module) if keeps_copies(module) or has_folds(module) else None)
        self._untouched: Callable[..., Any] = module._call_impl
        self._what = what
        self._calls, self._obstacles = Calls(module), Obstacles(f"the compiled {what}")
        self._counter = Counter(what)
        self._first_call = rlock()  # a forward may call its own module
        self._ready = False
        self._broken = False
        on_cuda = any(parameter.is_cuda for parameter in module.parameters())
        self._has_cuda_graphs = on_cuda and mode in {"reduce-overhead", "max-autotune"}
        self._compiled = (compiler or compile_function)(module._call_impl, mode, self._counter)
        self._stage = FrozenCompileStage.name if frozen else CompileStage.name

    def on(self) -> None:
        """See `Change.on`. After a compiler failure it stays off."""
        if not self._broken:
            self._module._compiled_call_impl = self

    def off(self) -> None:
        if self._module._compiled_call_impl is self:
            vars(self._module).pop("_compiled_call_impl", None)  # uncovers the class's attribute, which is None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as `None`, since a module's own `__getstate__` may include the attribute."""
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, compiled if possible."""
        if is_traced():
            return self._untouched(*args, **kwargs)
        if (obstacle := self._calls.altered()) is not None:
            self._obstacles.report(obstacle, 0)
            return self._untouched(*args, **kwargs)
        self._obstacles.served(0)
        if self._ready:
            return self._run(args, kwargs)
        with self._first_call:  # simultaneous first calls would each compile
            make_copies(self._module)
            result = self._run(args, kwargs)
            self._ready = True
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch._dynamo.exc import RecompileError

        try:
            with options(self._frozen, strict=self._counter.sealed):
                return self._graphs(args, kwargs)
        except RecompileError as error:
            if self._frozen is not None:
                raise
            self._counter.guard = guard_of(error)
        with options(None):
            return self._graphs(args, kwargs)

    def _graphs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._has_cuda_graphs:
            return call_normally(self._compiled, args, kwargs)
        # The outputs are copied on the same thread, before the next replay overwrites them.
        return graph_owner().call(lambda: clone_outputs(call_normally(self._compiled, args, kwargs)))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError, TorchDynamoException

        if self._broken:
            return self._untouched(*args, **kwargs)
        if self._weights is not None and self._weights.outdated():
            self._broken = True
            self.off()
            emit(FellBack(self._what, self._stage, "its weights were written, and its graph keeps the old ones"))
            return self._untouched(*args, **kwargs)
        try:
            result = self._call(args, kwargs)
        except RecompileError as error:
            # A frozen graph takes half a minute to compile, too long for a request.
            self._counter.unserved(f"{self._stage} for a kind of call that was not warmed up", guard_of(error))
            return self._untouched(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            # Existing graphs keep serving their lengths; other calls run the untouched module each time.
            if self._ready:
                self._counter.unserved(f"{self._stage} at further lengths", _LIMIT_REACHED)
                return self._untouched(*args, **kwargs)
            reason = reason_of(error)
        except TorchDynamoException as error:
            reason = reason_of(error)
        else:
            return result
        # Tracing a wrong input fails with a compiler error. The untouched module then raises the user's error here, and
        # the compilation stays valid.
        self._broken = True  # set before the call, since a forward may call its own module
        self.off()
        try:
            result = self._untouched(*args, **kwargs)
        except BaseException:
            self._broken = False
            self.on()
            raise
        emit(FellBack(self._what, self._stage, reason))
        return result


def _linear_share(module: nn.Module) -> float:
    total = sum(parameter.numel() for parameter in module.parameters())
    weights: list[Any] = [inner.weight for inner in module.modules() if isinstance(inner, nn.Linear)]
    linear: int = sum(weight.numel() for weight in weights if weight is not None)  # a layer may have none
    return linear / total if total else 0.0
