"""Regional compilation: the repeated blocks of a part share one compiled graph. Exact to rounding.

A transformer repeats one block, for example thirty times. Compiling it as a whole traces thirty blocks, which takes
minutes. Compiling one block takes seconds; its graph takes the weights as inputs, and all blocks call it. For one token
and a growing cache (kv_cache/), the graph writes keys and values into the cache's buffers at dynamic lengths. This is
the decode step of an autoregressive model, independent of the loop that drives it. Prefill, other caches, requested
attention weights, lengths beyond the largest buffer and kinds of calls that were not warmed up take upstream's own
forward with the same cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.events import FellBack, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import parameters_of
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.locks import rlock
from accelerate_tts.patching.change import Changes, CountedChange, Counter
from accelerate_tts.patching.class_swap import (
    ClassSwap,
    in_fused,
    keeps_copies,
    make_copies,
    per_class,
    subclass_with,
)
from accelerate_tts.patching.normal_tensors import call_normally
from accelerate_tts.patching.structure_watch import Calls
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.compile.inductor import compile_function, guard_of, options, reason_of
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import Obstacles, attentions_wanted, cache_name, take_cache, token_layer
from accelerate_tts.stages.decode.growing_cache import growing_caches
from accelerate_tts.stages.layers.weight_norm import has_folds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import State, Target

_MOST_STACKS = 3
"""Maximum kinds of blocks of one part that are compiled, those with the most weights first."""
_WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Blocks share a graph, and lengths grow, so the next block would overwrite a CUDA graph's recording."""


@register_stage
class CompiledBlocksStage(BaseStage):
    """Compiles a part's repeated blocks, with shared graphs for each kind of block."""

    name = "compiled blocks"
    group = "compilation"
    needs_compiler = True
    excluded_by: tuple[State, ...] = ("compiled",)
    after = ("torch.compile, frozen",)
    cost = 15.0
    least_share = 0.15

    @classmethod
    def variants(cls, target: Target) -> Iterable[CompiledBlocksStage]:
        """See `BaseStage.variants`: without CUDA graphs, which `_WITHOUT_CUDA_GRAPHS` gives the reason for."""
        mode = target.compile_mode
        return () if mode is None else (cls(_WITHOUT_CUDA_GRAPHS.get(mode, mode)),)

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def applies(self, part: Part) -> str | None:
        stacks = block_stacks(part.module)
        if any(is_compiled(block) for stack in stacks for block in stack):  # by an earlier tuning of the same blocks
            return "its blocks are compiled already"
        return None if stacks else "no repeated blocks in it"

    def prepare(self, part: Part) -> _CompiledBlocks:
        """See `Stage.prepare`. Nothing is compiled yet."""
        return _CompiledBlocks(part, self._mode)


def block_stacks(module: nn.Module) -> list[list[nn.Module]]:
    """Group blocks that differ only in the values of their weights, in the order of their list."""
    stacks: list[list[nn.Module]] = []
    others: dict[Any, list[nn.Module]] = {}
    for holder in module.modules():
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            continue
        alike: dict[Any, list[nn.Module]] = {}
        for block in holder.children():  # without the gaps, where a list holds `None`
            if isinstance(block, (nn.ModuleList, nn.ModuleDict)):  # never called
                continue
            if {name for name, _ in block.named_children()} - {"parametrizations"}:  # a single layer is no block
                alike.setdefault(_kind(block), []).append(block)
        for kind, stack in alike.items():
            # The index in a list is the index in the cache. Without a cache, blocks of several lists share a graph.
            if cache_name(parameters_of(plain_class(stack[0]))) is not None:
                stacks += [stack]
            else:
                others.setdefault(kind, []).extend(stack)
    stacks = [list(dict.fromkeys(stack)) for stack in (*stacks, *others.values())]  # a list may be registered twice
    stacks = [stack for stack in stacks if len(stack) > 1]
    fused = in_fused(module)
    stacks = [stack for stack in stacks if stack[0] not in fused]
    inside = {inner for stack in stacks for block in stack for inner in block.modules() if inner is not block}
    outermost = [stack for stack in stacks if stack[0] not in inside]
    return sorted(outermost, key=_size, reverse=True)[:_MOST_STACKS]


def place_of(block: Any, number: int) -> int:
    """Return the block's index in the cache. Blocks of another kind may lie between those of one kind."""
    attention = getattr(block, "self_attn", None) or getattr(block, "attn", None)
    place = getattr(attention, "layer_idx", None)
    return place if isinstance(place, int) else number


def _kind(block: nn.Module) -> Any:
    state = block.state_dict().items()  # what `get_extra_state` of a module returns is of any type
    shapes = ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in state if isinstance(tensor, torch.Tensor))
    return plain_class(block), tuple(shapes)


def _size(stack: list[nn.Module]) -> int:
    return sum(parameter.numel() for block in stack for parameter in block.parameters())


class _CompiledBlocks(CountedChange, Changes):
    """The change: the forward of each block's class calls the shared graph first."""

    def __init__(self, part: Part, mode: str) -> None:
        self._counter = Counter(part.name)
        stacks = [_CompiledStack(stack, part.name, mode, self._counter) for stack in block_stacks(part.module)]
        self._stacks = {block: stack for stack in stacks for block in stack.blocks}
        super().__init__(
            growing_caches(part.module),  # the graph needs them, even where that change alone was not worth keeping
            ClassSwap(list(self._stacks), lambda block: _block_class(type(block))),
        )

    def on(self) -> None:
        for block, stack in self._stacks.items():
            _stacks.put(block, weakref.ref(stack))
        super().on()

    def off(self) -> None:
        super().off()
        for block, stack in self._stacks.items():
            known = _stacks.get(block)
            if known is not None and known() is stack:
                _stacks.remove(block)


_stacks = IdentityMap[Callable[[], Any]]()
"""Weak references to the stacks of blocks, while their change is on. A stack lives as long as its change."""


def is_compiled(block: nn.Module) -> bool:
    """Check that a block runs a compiled graph."""
    known = _stacks.get(block)
    return known is not None and known() is not None


@per_class
def _block_class(plain: Any) -> type:
    """Make the class of blocks while the change is on. They share it, since a graph is guarded on it.

    It does not lead to their stack: dynamo keeps classes that it has seen, with the graphs and in caches of its own,
    where the garbage collector does not look. All blocks of a model would stay for ever.
    """

    def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        known = None if is_traced() else _stacks.get(block)
        stack = None if known is None else known()
        if stack is None:
            return plain.forward(block, *args, **kwargs)
        return stack.call(block, plain, args, kwargs)

    return subclass_with(plain, forward)


class _CompiledStack:
    """Blocks of one kind and the graphs that they share."""

    def __init__(self, blocks: list[nn.Module], what: str, mode: str, counter: Counter) -> None:
        self.blocks = {block: place_of(block, number) for number, block in enumerate(blocks)}
        self._what = what
        self._obstacles = Obstacles(f"the compiled blocks of {what}")
        self._calls = {block: Calls(block, itself=False) for block in blocks}
        self._mode = mode
        self._counter = counter
        self._names = parameters_of(plain_class(blocks[0]))
        self._cache = cache_name(self._names)
        # A graph does not notice writes to weights that a stage has copied.
        self._copies = {block: WeightWatch(block) for block in blocks if keeps_copies(block) or has_folds(block)}
        self._prepared: set[nn.Module] = set()
        self._compiled: Callable[..., Any] | None = None
        self._first_call = rlock()
        self._ready = self._broken = False

    def call(self, block: Any, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block by the shared graph, or by upstream's forward."""
        if self._broken or torch.is_grad_enabled() or block.training or _is_symbolic(args, kwargs):
            return plain.forward(block, *args, **kwargs)
        if (obstacle := self._calls[block].altered()) is not None:
            self._obstacles.report(obstacle, self.blocks[block])
            return plain.forward(block, *args, **kwargs)
        if self._cache is None:
            done, result = self._run(block, plain, None, args, kwargs)
            if done:
                self._obstacles.served(self.blocks[block])
        else:
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            past = take_cache(named)
            if past is None:
                done, result = self._run(block, plain, None, (), named)
            else:
                layer = self._layer(past, place_of(block, self.blocks[block]), named)  # it may be numbered anew
                done, result = (False, None) if layer is None else self._run(block, plain, layer, (), named)
        return result if done else plain.forward(block, *args, **kwargs)

    def _layer(self, past: Any, number: int, named: dict[str, Any]) -> Any:
        """Return the cache layer for one token; `None` if upstream's forward must run."""
        if kv_cache.cache_classes() is None:
            return None
        if named.get("output_attentions") or attentions_wanted.get():
            self._obstacles.report("attention weights are asked for", number)
            return None
        layer = token_layer(self._obstacles, past, number, named)
        if layer is not None:
            self._obstacles.served(number)
        return layer

    def _run(
        self, block: Any, plain: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        if self._ready:
            return self._graph(block, plain, layer, args, kwargs)
        with self._first_call:  # simultaneous first calls would each compile
            result = self._graph(block, plain, layer, args, kwargs)
            self._ready = True
        return result

    def _graph(
        self, block: Any, plain: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        """Run a block by the shared graph.

        Returns:
            True and the result, or False and `None` if the graph cannot serve the call.
        """
        from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError, TorchDynamoException

        copies = self._copies.get(block)
        if copies is not None:
            if copies.outdated():
                return self._give_up("its weights were written, and copies of them were made before")
            if block not in self._prepared:
                make_copies(block)
                self._prepared.add(block)
        if self._compiled is None:
            self._compiled = compile_function(_traced(plain, self._cache), self._mode, self._counter, fullgraph=True)
        store = None if layer is None else (*layer.buffers(), layer.length())
        try:
            with options(None, strict=self._counter.sealed):
                result = call_normally(self._compiled, (block, store, args, kwargs), {})
        except RecompileError as error:  # compiling takes seconds, too long for a request
            self._counter.unserved("compiled blocks for a kind of call that was not warmed up", guard_of(error))
            return False, None
        except FailOnRecompileLimitHit:
            self._counter.unserved("compiled blocks for further kinds of calls", "8 graphs are the limit")
            return False, None
        except TorchDynamoException as error:
            # Upstream's forward overwrites values that were written behind the sequence's end.
            return self._give_up(reason_of(error))
        if layer is not None:
            layer.advance(1)
        return True, result

    def _give_up(self, reason: str) -> tuple[bool, Any]:
        self._broken = True
        emit(FellBack(self._what, CompiledBlocksStage.name, reason))
        return False, None


def _is_symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Check for `torch.fx`, which passes proxies and cannot trace a compiled graph."""
    return torch.fx.Proxy in map(type, (*args, *kwargs.values()))


def _traced(plain: Any, cache: str | None) -> Callable[..., Any]:
    forward, classes = plain.forward, kv_cache.step_classes()

    def traced(block: Any, store: tuple[Any, Any, int] | None, args: Any, kwargs: dict[str, Any]) -> Any:
        if cache is None:
            return forward(block, *args, **kwargs)
        past = None if store is None else kv_cache.step_cache(classes, *store)
        return forward(block, *args, **{cache: past}, **kwargs)

    return traced
