"""inductor as the stages use it: with counted graphs, optionally frozen weights, and errors at dynamo's limits."""

from __future__ import annotations

import inspect
import os
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils import _pytree

from accelerate_tts.device.compiler_folder import unwritable_folder
from accelerate_tts.events import NotApplied
from accelerate_tts.inspection.tracing import compiles_itself
from accelerate_tts.patching.change import Counter
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.runtime.own_random import Entry, OwnRandom, is_open, opened
from accelerate_tts.runtime.own_random import outside as outside_own_random
from accelerate_tts.runtime.random_functions import draws_in, said


class Frozen(WeightWatch):
    """Frozen weights of a module: inductor's options, and a check that the weights are unchanged."""

    def options(self) -> Any:
        """Return a context with the options for this thread. dynamo reads one of them whenever it traces."""
        from torch._inductor import config

        # inductor's cache of graphs gives a model the packed weights of another one with equal graphs: seen with torch
        # 2.8 (dynamic lengths, max_autotune); 2.6, 2.12 and 2.14 are right, and those between were not tried.
        cached: dict[str, Any] = {} if _caches_frozen_weights(torch.__version__) else {"fx_graph_cache": False}
        return config.patch({"freezing": True, "max_autotune": True, "autotune_num_choices_displayed": 0, **cached})


def _caches_frozen_weights(release: str) -> bool:
    """Check that inductor's cache keeps the packed weights of frozen graphs apart."""
    numbers = tuple(int(part) for part in release.split(".")[:2])
    return not (2, 7) <= numbers < (2, 12)


@cache
def settings_are_the_threads() -> bool:
    """Check that dynamo's settings are per thread (torch 2.12 and later) rather than per process."""
    from torch._dynamo import config

    before = config.error_on_recompile
    Context().run(setattr, config, "error_on_recompile", not before)
    if config.error_on_recompile == before:
        return True
    config.error_on_recompile = before
    return False


class _Strictness(threading.local):
    """True if this thread's call must not compile, for releases where dynamo's own setting is process-wide."""

    strict = False


_strictness = _Strictness()


class _Process:
    """Replaces `_Dynamo` where dynamo's settings are process-wide and must not affect other threads."""

    __slots__ = ("_before", "_outside", "_strict")

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def __enter__(self) -> None:
        self._before, _strictness.strict = _strictness.strict, self._strict
        self._outside = compiles_itself.set(True)

    def __exit__(self, *_exception: object) -> None:
        _strictness.strict = self._before
        compiles_itself.reset(self._outside)


class _Dynamo:
    """dynamo's configuration during a call. `config.patch` is slower: it makes a class each time, 30 times a token."""

    __slots__ = ("_before", "_outside", "_strict")

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def __enter__(self) -> None:
        from torch._dynamo import config

        self._outside = compiles_itself.set(True)
        self._before = (config.fail_on_recompile_limit_hit, config.error_on_recompile)
        config.fail_on_recompile_limit_hit = True
        config.error_on_recompile = self._strict

    def __exit__(self, *_exception: object) -> None:
        from torch._dynamo import config

        config.fail_on_recompile_limit_hit, config.error_on_recompile = self._before
        compiles_itself.reset(self._outside)


@contextmanager
def _frozen_options(settings: _Dynamo | _Process, frozen: Frozen) -> Generator[None]:
    with settings, frozen.options():
        yield


def options(frozen: Frozen | None, *, strict: bool = False) -> AbstractContextManager[None]:
    """Return a context with the settings of dynamo and inductor during a call of a compiled function.

    The settings hold for this thread, and dynamo reads them whenever it traces. Without `fail_on_recompile_limit_hit`,
    dynamo silently runs the function uncompiled once it has 8 graphs. Before torch 2.12 the settings are process-wide,
    with other names before 2.7, and would break another thread's `torch.compile`. There `compile_function` detects both
    cases without settings.

    Args:
        frozen: The weights that become constants, if any.
        strict: Raise `RecompileError`, which names the failed guard, instead of compiling again.
    """
    if settings_are_the_threads():
        return _Dynamo(strict) if frozen is None else _frozen_options(_Dynamo(strict), frozen)
    # Another thread that compiles meanwhile gets the same options. This happens only while tuning: later calls are
    # strict.
    return _Process(strict) if frozen is None or strict else _frozen_options(_Process(strict), frozen)


def compile_function(
    function: Callable[..., Any], mode: str, counter: Counter, *, fullgraph: bool = False
) -> Callable[..., Any]:
    """Compile a function by torch.compile, lazily, with dynamic lengths.

    Args:
        function: The function. It gets a code object of its own, by which dynamo keeps its graphs and counts its limit
            of 8.
        mode: torch.compile's mode.
        counter: Counts the graphs.
        fullgraph: Raise an error at a graph break.

    Raises:
        OSError: The compiler has no folder to write into.
    """
    why = unwritable_folder()
    if why is not None:
        raise OSError(f"the compiler has nowhere to write. {why}")
    mend_workers()  # before importing inductor, which may start them
    _mend_collector()
    from torch._dynamo import lookup_backend
    from torch._inductor import list_mode_options

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # dynamo traces this as True, so no graph has this branch
            _run_uncompiled(counter)
        return function(*args, **kwargs)

    plain = call if settings_are_the_threads() else watched
    # Globals of its own, too: dynamo stores each graph there, and graphs refer to the weights. With torch among them:
    # after a graph break, dynamo of torch 2.6 looks for it there, else it raises NameError (transformers' GPT2Model).
    known = {**plain.__globals__, "torch": torch}
    own = types.FunctionType(plain.__code__.replace(), known, "call", None, plain.__closure__)
    # fallback_random: the compiled graph draws the same random numbers as eager mode.
    patches = {**list_mode_options(mode), "fallback_random": True}
    inductor: Any = _compilers[-1] if _compilers else lookup_backend("inductor")
    loaded = _Loaded()
    drawing = False

    def backend(graph: Any, inputs: list[Any]) -> Any:
        nonlocal drawing
        shapes = _shapes(inputs)
        draws = draws_in(graph.graph)
        drawing = drawing or draws
        with loaded.noting():
            compiled = inductor(graph, inputs, config_patches=patches)
        # Counted last: if inductor specialises a number (an epsilon), dynamo calls this again for the same graph.
        counter.count(shapes)
        return _uncompiled_in_blocks(graph, compiled) if draws else compiled

    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=True, fullgraph=fullgraph)
    weakref.finalize(own, _release, own.__code__, id(backend), loaded).atexit = False
    strict = compiled if plain is call else _never_compiling_if_strict(own, compiled, counter)

    breaks = _Breaks()
    graphs = strict if fullgraph else breaks.noting(strict)

    def outside(*args: Any, **kwargs: Any) -> Any:
        if not is_open():
            return graphs(*args, **kwargs)
        if drawing or breaks.found:  # its graphs, or the code between them, may draw from the process's generators
            return function(*args, **kwargs)
        with _blocks.left_for_a_graph(), outside_own_random():
            result = graphs(*args, **kwargs)
        breaks.tell(counter.what)
        return result

    return outside


class _Breaks:
    """Code of a compiled function that runs outside of its graphs.

    Attributes:
        found: True if there was some. It may also be another thread that compiled meanwhile.
    """

    def __init__(self) -> None:
        self.found = False

    def noting(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function such that each call notes if it was compiled with graph breaks."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = _frames()
            try:
                return compiled(*args, **kwargs)
            finally:
                # dynamo compiles what a graph break leaves as a frame of its own.
                self.found = self.found or _frames() > before + 1

        return call

    def tell(self, what: str) -> None:
        """Emit an event, after a call in a block of `own_random`, if it was the one that found the code."""
        if self.found:
            reason = (
                f"{what} was compiled in the block, and what is between its graphs drew from the process's generators"
                " if it draws; later calls are right"
            )
            said.emit(NotApplied("own_random", reason))


def _frames() -> int:
    """Return the number of frames that dynamo has tried to compile in this process."""
    from torch._dynamo.utils import counters

    return counters["frames"]["total"]


class _Blocks(threading.local):
    """The block of `own_random` that each thread has left for a compiled function; `None` if it is in none."""

    left: OwnRandom | None = None

    @contextmanager
    def left_for_a_graph(self) -> Generator[None]:
        """Note the present block."""
        before, self.left = self.left, opened()
        try:
            yield
        finally:
            self.left = before


_blocks = _Blocks()


def _uncompiled_in_blocks(graph: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Run a graph that draws uncompiled, in the block that was left. The call that compiled it has left one."""

    def run(*args: Any) -> Any:
        own = _blocks.left
        if own is None:
            return compiled(*args)
        with Entry(own):
            return graph(*args)

    return run


class _Loaded:
    """Modules of generated code with tensors (packed weights of a frozen graph), which inductor keeps alive."""

    def __init__(self) -> None:
        self._modules: list[types.ModuleType] = []

    @contextmanager
    def noting(self) -> Generator[None]:
        """Collect the modules that are loaded while open."""
        from torch._inductor.codecache import PyCodeCache

        before = {id(module) for module in PyCodeCache.modules}
        yield
        self._modules += [module for module in PyCodeCache.modules if id(module) not in before and _has_tensors(module)]

    def forget(self) -> None:
        """Remove the modules from inductor's list and from `sys.modules`."""
        from torch._inductor.codecache import PyCodeCache

        for module in self._modules:
            PyCodeCache.modules[:] = [kept for kept in PyCodeCache.modules if kept is not module]
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
        self._modules.clear()


def _release(code: types.CodeType, backend: int, loaded: _Loaded) -> None:
    """Free the compiled state of a function: graphs, guards, the backend, and weights that are constants.

    dynamo stores the graphs at the code object, in a cycle that the garbage collector does not detect.
    """
    from torch._dynamo import eval_frame

    native: Any = torch._C
    native._dynamo.eval_frame.reset_code(code)
    for number, kept in list(eval_frame.cached_backends.items()):  # torch.compile wraps the backend
        if id(getattr(kept, "compiler_fn", None)) != backend:
            continue
        if _graphs_hold_backends(torch.__version__):
            del eval_frame.cached_backends[number]
        else:
            cast("Any", kept).compiler_fn = _released
    loaded.forget()
    # inductor's choice among kernels for products keeps each choice's graph with its weights (torch 2.8 to 2.12; seen
    # to be let go in 2.14). What is cleared saves a second try of the same choice alone.
    selector: Any = sys.modules.get("torch._inductor.select_algorithm")
    getattr(getattr(selector, "_ALGORITHM_SELECTOR_CACHE", None), "precompile_cache", {}).clear()
    # Python 3.12.0 to 3.12.3 keeps classes that dynamo looked at by `getattr_static` (mended in 3.12.4), and with the
    # class of a parametrized module its weights.
    shadowed: Any = getattr(inspect, "_shadowed_dict_from_mro_tuple", None)
    if hasattr(shadowed, "cache_clear"):
        shadowed.cache_clear()


def _graphs_hold_backends(release: str) -> bool:
    """Check that dynamo's cache of graphs keeps the backends alive with which it compares the backend of a call.

    torch 2.6 has their addresses alone. Other code that was compiled on the way (what a graph break left, a callback)
    keeps its graphs, and the next call of that code would read freed memory: a crash, or damage that shows later. So
    the backend's wrapper stays there, some hundred bytes. 2.14 keeps references; those between were not looked at.
    """
    return tuple(int(part) for part in release.split(".")[:2]) >= (2, 14)


def _released(*_graph_and_inputs: object) -> Any:
    raise RuntimeError("this compiled function was let go, and nothing compiles by its backend any more")


def _has_tensors(module: types.ModuleType) -> bool:
    return any(issubclass(type(value), torch.Tensor) for value in vars(module).values())


def _never_compiling_if_strict(
    own: Callable[..., Any], compiled: Callable[..., Any], counter: Counter
) -> Callable[..., Any]:
    """Return the compiled function. Strict calls use existing graphs only, by `torch._dynamo.run`."""
    graphs_alone: Callable[..., Any] = torch._dynamo.run(own)

    def either(*args: Any, **kwargs: Any) -> Any:
        return (graphs_alone if _strictness.strict and not counter.left_out else compiled)(*args, **kwargs)

    return either


def _run_uncompiled(counter: Counter) -> None:
    """Raise the errors of newer dynamo releases when dynamo runs a function uncompiled.

    Raises:
        RecompileError: The call is strict and has no graph.
        FailOnRecompileLimitHit: The limit of graphs is reached.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError

    limit = getattr(config, "recompile_limit", None) or config.cache_size_limit  # before torch 2.7
    if _strictness.strict and not counter.left_out:
        raise RecompileError("no graph fits this call; torch before 2.12 does not name the failed guard")
    if counter.graphs >= limit:
        raise FailOnRecompileLimitHit(f"it has {counter.graphs} graphs, and {limit} are the limit")
    counter.left_out = True  # dynamo compiles what the function calls, but not itself


def mend_workers() -> None:
    """Let inductor's worker processes start despite a typing.py beside torch.

    The PyPI package `typing` 3.7.4.3 (a Python 2 backport that resemblyzer 0.1.4 requires) installs one. inductor
    (torch 2.14) puts that folder before the standard library in its workers' path, and they fail. The environment
    variable for this path is set to this process's own order, as in older releases.
    """
    if (Path(torch.__file__).parent.parent / "typing.py").exists():
        os.environ.setdefault("TORCH_CUSTOM_PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def _mend_collector() -> None:
    """Keep requests for hidden states on other threads correct while one thread compiles.

    transformers 5 (to 5.23) collects hidden states in a context variable, and while compiling in a process-wide one. It
    checks torch.compiler.is_compiling(), which is true on every thread then (torch 2.14). A request on another thread
    would get none, or another request's. Only code that dynamo traces needs the process-wide variable, and
    `is_dynamo_compiling` is true for that code alone.
    """
    module: Any = sys.modules.get("transformers.utils.output_capturing")
    if hasattr(module, "is_torchdynamo_compiling"):
        module.is_torchdynamo_compiling = torch.compiler.is_dynamo_compiling


_compilers: list[Callable[..., Any]] = []


@contextmanager
def compiled_by(compiler: Callable[..., Any]) -> Generator[None]:
    """While open, traced graphs go to another compiler than inductor, in this process.

    Args:
        compiler: Called with a graph, its example inputs and `config_patches=`; returns what runs in the graph's place.
    """
    own = partial(compiler)  # scopes may overlap, and several may be given the same
    try:
        _compilers.append(own)
        yield
    finally:
        try:
            _compilers[:] = [each for each in _compilers if each is not own]
        except BaseException:  # Ctrl-C in it
            _compilers[:] = [each for each in _compilers if each is not own]
            raise


def _shapes(inputs: list[Any]) -> str:
    # A graph's inputs begin with sizes and weights; the user's come last.
    shapes = [tuple(item.shape) for item in inputs if hasattr(item, "shape")]
    return ", ".join(str(shape) for shape in shapes[-3:]) or "an input without tensors"


def clone_outputs(result: Any) -> Any:
    """Copy a result's tensors."""
    # A CUDA graph writes its outputs to the same addresses at each replay.
    return _pytree.tree_map_only(torch.Tensor, torch.clone, result)


def guard_of(error: BaseException) -> str:
    """Return the first failed guard that dynamo's `RecompileError` lists."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    guards = [line for line in lines if re.match(r"\d+/\d+: ", line)]
    return guards[0].split(": ", 1)[1].split("  # ")[0].strip() if guards else (lines or [""])[0]


def reason_of(error: BaseException) -> str:
    """Return the first line of the compiler's underlying error."""
    # dynamo wraps inductor's error; the inner one names a missing compiler.
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else 'no message'}"
