"""Thousands of calls of random length of small tuned models; memory and tensors must stay flat.

    python benchmarks/soak.py [--calls N] [--loads N] [--tune-seconds S] [--compile] [--json FILE] [system]...

The systems are `small`, a vocoder with a recurrent net and a cached speaker embedding; `mms` and `llama`,
transformers' own VITS (the class of MMS voices) and Llama with `generate`; and those of `accelerate-tts bench` at tiny
size, such as `bench-xtts`. All but the bench's speaker encoder have random weights. They are tuned by
`@optimized_model` and called through `@inference`. After each twentieth of the calls the garbage is collected, and the
resident memory and the tensors that Python can reach are counted. The first fifth of the samples is warm-up: torch,
the allocator and the caches fill. Then flat means

- resident memory: the median of the last third of the samples is at most 4 % and 8 MiB above that of the first third;
- tensors that were made since: the most in the last third is at most 8 above the most in the first third;
- what this library remembers by object, lock or message, compiled graphs, and cached embeddings: no more
  entries in the last third than in the first, and 8

Then each system is loaded, tuned, called and dropped `--loads` times. No weight and no module may outlive its model,
and nothing that is counted (`standing`) may become more with each load: classes, threads, open files, hooks, what the
library remembers, and objects that Python's garbage collector knows. With --compile this covers frozen graphs, which
have copies of weights. `--calls 0` makes loads alone. `--untimed` keeps every stage that is right, of precision "fast",
and times nothing, so that any machine has all stages in its loads.

A call that leaks one small tensor is seen by the second, one that leaks 20 KiB outside of Python by the first. What
grows below that are torch's own caches of shapes; with ACCELERATE_TTS_DISABLE=1 the untouched models show the same. The
exit status is 1 if anything grows; the shapes that became more are named, and who holds them. Without --compile
torch.compile is left out: what is compiled for a length that was not warmed up stays, as it should.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import itertools
import json
import logging
import os
import pkgutil
import statistics
import sys
import threading
import types
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch

import accelerate_tts
from accelerate_tts import cached_embedding, events, inference, locks, optimized_model, receipt_of
from accelerate_tts.cli.bench.systems import SYSTEMS as BENCH_SYSTEMS
from accelerate_tts.device import flags
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.runtime import time_limit
from accelerate_tts.runtime.concurrency import queue
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.policy import TuningPolicy, current_policy, tuning_policy
from accelerate_tts.tuning.timing import Timing

SAMPLES = 20
WARM = SAMPLES // 5
SHARE, SLACK, TENSORS = 0.04, 8 * 2**20, 8
SHORTEST, LONGEST = 5, 80


class Small:
    """A speech system with each kind of part, small enough for 2,000 calls in seconds."""

    @optimized_model(warmup=lambda self: [self.call(SHORTEST), self.call(LONGEST)])
    def load(self) -> None:
        normed, bounded = (getattr(torch.nn.utils.parametrizations, name) for name in ("weight_norm", "spectral_norm"))
        self.encoder = torch.nn.LSTM(16, 16, batch_first=True).eval()
        self.vocoder = torch.nn.Sequential(
            normed(torch.nn.Conv1d(16, 32, 3, padding=1)), torch.nn.LeakyReLU(),
            bounded(torch.nn.Conv1d(32, 32, 1)),
            normed(torch.nn.ConvTranspose1d(32, 1, 8, stride=4)), torch.nn.Tanh(),
        ).eval()  # fmt: skip

    @cached_embedding(limit_mb=0.01, encoder=lambda self: self.encoder)
    def embed(self, wave: torch.Tensor) -> torch.Tensor:
        return self.encoder(wave)[0][:, -1]

    @inference(concurrency=2)
    def call(self, length: int) -> int:
        voice = self.embed(torch.randn(1, 4, 16))
        return int(self.vocoder(torch.randn(1, 16, length) + voice[..., None]).shape[-1])


class Mms:
    """A VITS voice of token ids."""

    @optimized_model(warmup=[torch.ones(1, SHORTEST, dtype=torch.long), torch.ones(1, LONGEST, dtype=torch.long)])
    def load(self) -> torch.nn.Module:
        import transformers

        config = transformers.VitsConfig(
            vocab_size=38, hidden_size=32, num_hidden_layers=2, ffn_dim=64, flow_size=32, spectrogram_bins=17,
            upsample_initial_channel=64, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3, 5],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            duration_predictor_filter_channels=32, posterior_encoder_num_wavenet_layers=1,
        )  # fmt: skip
        self.model = transformers.VitsModel(config).eval()
        return self.model

    @inference
    def call(self, length: int) -> int:
        tokens = torch.randint(1, 37, (1, length))
        return int(self.model(tokens).waveform.shape[-1])


class Llama:
    """A decoder that is driven by transformers' own loop."""

    @optimized_model(warmup=lambda self: self.call(12))
    def load(self) -> None:
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
        )
        self.model = transformers.LlamaForCausalLM(config).eval()

    @inference
    def call(self, length: int) -> int:
        prompt = torch.randint(2, 48, (1, 1 + length // 4))
        made = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1 + length // 8, do_sample=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return int(made.shape[-1])


class Benched:
    """A system of the bench at tiny size.

    Args:
        name: Its name there.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @optimized_model(warmup=lambda self: [self.call(SHORTEST), self.call(LONGEST)])
    def load(self) -> None:
        built = BENCH_SYSTEMS[self.name].build("tiny", None, "cpu")
        self.model, self.speak = built.model, built.speak

    @inference
    def call(self, length: int) -> Any:
        return self.speak(length / 25)


SYSTEMS: dict[str, Callable[[], Any]] = {
    "small": Small, "mms": Mms, "llama": Llama, **{f"bench-{name}": partial(Benched, name) for name in BENCH_SYSTEMS},
}  # fmt: skip


@dataclass
class Soaked:
    """Resident bytes and tensors at each sample during the calls of one system."""

    name: str
    calls: int
    resident: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    entries: list[dict[str, int]] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Name what grew; empty if nothing did."""
        found = []
        early, late = thirds(self.resident)
        before, after = statistics.median(early), statistics.median(late)
        if after > before * (1 + SHARE) + SLACK:
            found.append(f"resident memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
        early, late = thirds(self.tensors)
        if max(late) > max(early) + TENSORS:
            found.append(
                f"tensors grew from {max(early)} to {max(late)}: {', '.join(self.grown) or 'no shape stands out'}"
            )
        for name in self.entries[-1] if self.entries else ():
            early, late = thirds([sample[name] for sample in self.entries])
            if max(late) > max(early) + TENSORS:
                found.append(f"{name} grew from {max(early)} to {max(late)} entries")
        return found


def thirds(samples: list[int]) -> tuple[list[int], list[int]]:
    """The first and the last third of the samples after the warm-up."""
    settled = samples[WARM:]
    size = max(1, len(settled) // 3)
    return settled[:size], settled[-size:]


def kind_of(tensor: torch.Tensor) -> str:
    """A tensor's shape and type."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def tensors() -> list[torch.Tensor]:
    """The tensors that Python can reach."""
    gc.collect()
    # isinstance would ask proxies, whose objects may be gone
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def holder_of(thing: Any, depth: int = 0, seen: tuple[int, ...] = ()) -> str:
    """Name the holder of an object, as a path from the nearest thing with a name, such as `Voice.history[...]`."""
    found = gc.get_referrers(thing)
    ours = {id(found), *seen}
    for holder in found:
        if id(holder) in ours or isinstance(holder, types.FrameType) or type(holder).__name__ == "list_iterator":
            continue
        if isinstance(holder, dict):
            return _in_dictionary(thing, holder, depth, ours)
        if isinstance(holder, types.CellType):
            return "a closure's variable"
        if isinstance(holder, (list, tuple, set, deque)):
            return _above(holder, "[...]", depth, ours)
        for name, value in getattr(holder, "__dict__", {}).items():  # from Python 3.11 on an object has no dictionary
            if value is thing:
                return f"{type(holder).__qualname__}.{name}"
        return f"a {type(holder).__qualname__}"
    return "nothing that Python knows"


def _in_dictionary(thing: Any, holder: dict[Any, Any], depth: int, seen: set[int]) -> str:
    key: Any = "?"
    for name, value in holder.items():  # no generator: its closure would hold the thing, too
        if value is thing:
            key = name
    if "__name__" in holder and "__spec__" in holder:
        return f"module {holder['__name__']}.{key}"
    for owner in gc.get_referrers(holder):
        if getattr(owner, "__dict__", None) is holder:
            return f"{type(owner).__qualname__}.{key}"
    return _above(holder, f"[{key!r}]", depth, seen)


def _above(holder: Any, step: str, depth: int, seen: set[int]) -> str:
    if depth == 4:  # noqa: PLR2004 - deep enough for a cache in an object
        return f"a {type(holder).__name__}"
    return holder_of(holder, depth + 1, (*seen, id(holder))) + step


def registries(backend: Any) -> dict[str, int]:
    """Count the entries of all that could grow for ever: what the library remembers, graphs, caches."""
    receipt = receipt_of(backend)
    found = {
        "guards": len(guards.known_guards), "queues": len(queue.known_queues), "locks": len(locks.all_locks()),
        "logged events": events.logged_count(), "recompiled graphs": 0 if receipt is None else receipt.recompiled,
    }  # fmt: skip
    embed = getattr(backend, "embed", None)
    return found if embed is None else {**found, "cached embeddings": embed.cache_info().entries}


def soak(name: str, call: Callable[[int], Any], calls: int, backend: Any = None) -> Soaked:
    """Make the calls, and sample twenty times meanwhile."""
    choose, process = torch.Generator().manual_seed(0), psutil.Process()
    seen = Soaked(name, calls)
    first: Counter[str] = Counter()
    gc.collect()
    gc.freeze()  # what is there now is not looked through twenty times: nothing of it can become more
    for sample in range(SAMPLES):
        for _ in range(max(1, calls // SAMPLES)):
            call(int(torch.randint(SHORTEST, LONGEST + 1, (), generator=choose)))
        now = Counter(map(kind_of, tensors()))
        if sample == WARM:
            first = now
        if backend is not None:
            seen.entries.append(registries(backend))
        seen.tensors.append(now.total())
        seen.resident.append(process.memory_info().rss)
    last = tensors()
    gc.unfreeze()
    for kind, count in (now - first).most_common(5):
        newest = next(tensor for tensor in reversed(last) if kind_of(tensor) == kind)
        seen.grown.append(f"{count} more of {kind}, held by {holder_of(newest, 0, (id(last),))}")
        del newest
    return seen


# --- what stays of a load ---------------------------------------------------------------------------------------------

BOUNDED = {"accelerate_tts.events._logged", "accelerate_tts.runtime.time_limit._limits"}
"""Registries that are emptied when they are full. They and what they hold may become more until then."""
EACH = 0.2
"""A count that grows by more than this for each load is a fault; what is made once may come late."""
_CONTAINERS = (
    dict, list, set, deque, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, IdentityMap,
)  # fmt: skip
_CACHE = type(cache(int))
_DEEPEST = 6
_OBJECTS = "objects of class "


def import_all() -> None:
    """Import every module of the library but the commands, since what is imported late would seem to stay."""
    for found in pkgutil.walk_packages(accelerate_tts.__path__, "accelerate_tts."):
        if not found.name.startswith(("accelerate_tts.cli", "accelerate_tts.__main__", "accelerate_tts.kernels._")):
            importlib.import_module(found.name)


def standing() -> Counter[str]:
    """Count what loads could leave behind in this process, after collecting the garbage."""
    gc.collect()  # finds the models, and what is let go with them
    gc.collect()
    files = Path("/proc/self/fd")
    finalizers: Any = weakref.finalize
    found: Counter[str] = Counter({
        "classes of modules": len(derived(torch.nn.Module)),
        "threads": threading.active_count(), "open files": len(list(files.iterdir())) if files.exists() else 0,
        "child processes": len(psutil.Process().children()), "finalizers": len(finalizers._registry),
        "calls at exit": atexit._ncallbacks(), "calls of the garbage collector": len(gc.callbacks),
        "held flags": len(flags.held()), "variables of the environment": len(os.environ),
        "filters of warnings": len(warnings.filters), "loggers": len(logging.Logger.manager.loggerDict),
        "imported modules": len(sys.modules), "event hooks": len(events._hooks),
    })  # fmt: skip
    for name, hooks in vars(torch.nn.modules.module).items():
        if name.startswith("_global_") and isinstance(hooks, dict):
            found[f"torch's{name.replace('_', ' ')}"] = len(hooks)
    dynamo, generated = (sys.modules.get(f"torch.{name}") for name in ("_dynamo.eval_frame", "_inductor.codecache"))
    found["dynamo's backends"] = len(getattr(dynamo, "cached_backends", ()))
    found["inductor's modules"] = len(getattr(getattr(generated, "PyCodeCache", None), "modules", ()))
    found.update(remembered())
    # All that the garbage collector knows, but the weak references of a test itself.
    found.update(f"{_OBJECTS}{type(thing).__name__}" for thing in gc.get_objects() if type(thing) is not weakref.ref)
    found.subtract(f"{_OBJECTS}{type(event).__name__}" for event in events._logged)
    found[f"{_OBJECTS}tuple"] -= time_limit.known_limits()
    return found


def total(counts: dict[str, int]) -> int:
    """Add up the objects of all classes."""
    return sum(count for name, count in counts.items() if name.startswith(_OBJECTS))


def derived(cls: type) -> set[type]:
    """All classes that derive from a class."""
    found: set[type] = set()
    left = [cls]
    while left:
        fresh = set(type.__subclasses__(left.pop())) - found
        found |= fresh
        left += fresh
    return found


def remembered() -> dict[str, int]:
    """Count the entries of each container that the library has for as long as the process runs, by its path.

    These are global variables, attributes of classes, caches of functions and variables of their closures, and what
    their values hold.
    """
    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".", 1)[0] == "accelerate_tts":
            found |= _Registries(name).of(name, vars(module), 0)
    return found


class _Registries:
    """Containers of one module, each found once."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._seen: set[int] = set()

    def of(self, path: str, values: dict[str, Any], depth: int) -> dict[str, int]:
        """Count the entries of containers among values, and in objects among them."""
        found: dict[str, int] = {}
        for name, value in list(values.items()):
            if name in {"__builtins__", "__dict__"} or id(value) in self._seen or isinstance(value, types.ModuleType):
                continue
            self._seen.add(id(value))
            place, is_own = f"{path}.{name}", getattr(value, "__module__", "") == self._module
            if isinstance(value, _CONTAINERS):
                found[place] = _entries(value, 0)
            elif isinstance(value, _CACHE) and is_own:
                found[place] = value.cache_info().currsize
            elif depth < _DEEPEST:
                found |= self.of(place, self._inside(value, is_own=is_own), depth + 1)
        return found

    @staticmethod
    def _inside(value: Any, *, is_own: bool) -> dict[str, Any]:
        if isinstance(value, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            return {name: cell.cell_contents for name, cell in cells if is_own and _is_filled(cell)}
        is_ours = is_own if isinstance(value, type) else type(value).__module__.startswith("accelerate_tts")
        return dict(getattr(value, "__dict__", {})) if is_ours else {}


def _entries(container: Any, depth: int) -> int:
    """Count the entries of a container and of those in it."""
    values = [value for _, value in container.items()] if hasattr(container, "items") else list(container)
    count = 0 if isinstance(container, tuple) else len(container)
    if depth < _DEEPEST:
        count += sum(_entries(value, depth + 1) for value in values if isinstance(value, (*_CONTAINERS, tuple)))
    return count


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def growth(counts: list[Counter[str]], loads: int) -> dict[str, int]:
    """Return the names of what became more with the loads between any two counts, and by how much in all.

    What is made once, however late, is in one of the gaps alone.
    """
    least = max(TENSORS, EACH * loads)
    names = [name for name in counts[-1] if name not in BOUNDED]
    gaps = list(itertools.pairwise(counts))
    grown = [name for name in names if all(after[name] - before[name] > least for before, after in gaps)]
    return {name: counts[-1][name] - counts[0][name] for name in grown}


@dataclass
class Loaded:
    """Models that were loaded, tuned, called and dropped, and what stayed.

    Attributes:
        name: The system.
        loads: Number of loads.
        weights: Number of their weights, none of which may live.
        modules: Number of their modules, none of which may live.
        before: Counts after the first loads.
        after: Counts after the last one.
        faults: What stayed.
    """

    name: str
    loads: int
    weights: int = 0
    modules: int = 0
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class Living:
    """Weak references to the weights and modules of models that were dropped."""

    def __init__(self) -> None:
        self.weights: list[weakref.ref[torch.Tensor]] = []
        self.modules: list[weakref.ref[torch.nn.Module]] = []

    def note(self, *roots: torch.nn.Module) -> None:
        """Refer to all weights and modules of a model."""
        for root in roots:
            self.weights += [weakref.ref(tensor) for tensor in (*root.parameters(), *root.buffers())]
            self.modules += [weakref.ref(module) for module in root.modules()]

    def faults(self, loads: int) -> list[str]:
        """Name what lives, and who holds it. The garbage must have been collected."""
        found = []
        for kind, references in (("weights", self.weights), ("modules", self.modules)):
            alive = [thing for reference in references if (thing := reference()) is not None]
            if not references or alive:
                holder = holder_of(alive[0], 0, (id(alive),)) if alive else "nobody: there are none"
                found.append(
                    f"{len(alive)} of {len(references)} {kind} of {loads} dropped models live, held by {holder}"
                )
        return found


def loads(name: str, kind: Callable[[], Any], count: int) -> Loaded:
    """Load, tune, call and drop a system some times, and look for what lives on or becomes more."""
    import_all()
    seen, living = Loaded(name, count), Living()
    first = min(count - 1, 5)  # what is made once is mostly made by then
    middle = (first + count) // 2
    counts: list[Counter[str]] = []
    for number in range(count):
        if number in {first, middle}:
            counts.append(standing())
        backend = kind()
        backend.load()
        backend.call(SHORTEST), backend.call(LONGEST)
        living.note(*find_modules(backend).values())
        if hasattr(backend, "embed"):
            backend.embed.cache_clear()  # it belongs to the class, and keeps embeddings up to its limit
        del backend
    counts.append(standing())
    seen.weights, seen.modules = len(living.weights), len(living.modules)
    seen.before, seen.after = dict(counts[0]), dict(counts[-1])
    seen.faults = living.faults(count)
    seen.faults += [f"{what} grew by {more}" for what, more in growth(counts, middle - first).items()]
    return seen


def report(seen: Soaked, kept: str) -> bool:
    """Print a system's figures; returns whether it is flat."""
    early, late = thirds(seen.resident)
    few, many = thirds(seen.tensors)
    print(
        f"{seen.name}: {seen.calls} calls, kept: {kept}\n"
        f"  resident memory {statistics.median(early) / 2**20:.1f} -> {statistics.median(late) / 2**20:.1f} MiB"
        f" (bound: {SHARE:.0%} and {SLACK // 2**20} MiB more)\n"
        f"  tensors {max(few)} -> {max(many)} (bound: {TENSORS} more)\n"
        + "".join(f"  GROWS: {fault}\n" for fault in seen.faults)
        + ("" if seen.faults else "  flat")
    )
    return not seen.faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=[*SYSTEMS, []], help="all if none is given")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--loads", type=int, default=10)
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--untimed", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["ACCELERATE_TTS_PACK"] = "0"
    os.environ["ACCELERATE_TTS_TUNE_SECONDS"] = str(options.tune_seconds)
    os.environ["ACCELERATE_TTS_TORCH_COMPILE"] = str(int(options.compile))
    if options.untimed:
        os.environ["ACCELERATE_TTS_PRECISION"] = "fast"
        os.environ["ACCELERATE_TTS_TUNE_PATIENCE"] = "0"
    with tuning_policy(untimed() if options.untimed else current_policy()):
        return _soaked(options)


def untimed() -> TuningPolicy:
    """Have every stage tried, and every one kept that computes what it should."""
    faster = Timing(before=2.0, after=1.0, ratio=2.0, low=2.0, high=2.0, pairs=5)
    return replace(
        current_policy(), compare=lambda *_args, **_kwargs: faster, looks=False, unworthy=lambda *_given: None
    )


def _soaked(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    results: list[tuple[Soaked | Loaded, bool]] = []
    for name in options.systems or SYSTEMS:
        backend = SYSTEMS[name]()
        backend.load()
        receipt = receipt_of(backend)
        kept = "nothing" if receipt is None else ", ".join(f"{s.part}: {s.stage}" for s in receipt.kept) or "nothing"
        if options.calls:
            seen = soak(name, backend.call, options.calls, backend)
            results.append((seen, report(seen, kept)))
        del backend, receipt
        if options.loads:
            dropped = loads(name, SYSTEMS[name], options.loads)
            print(
                f"{name}: {options.loads} loads, {dropped.weights} weights and {dropped.modules} modules;"
                f" kept: {kept}; {'; '.join(dropped.faults) or 'nothing stays'}"
            )
            for what in ("classes of modules", "threads", "open files", "finalizers"):
                print(f"  {what}: {dropped.before[what]} -> {dropped.after[what]}")
            print(f"  objects: {total(dropped.before)} -> {total(dropped.after)}")
            results.append((dropped, not dropped.faults))
    if options.json:
        write_whole(options.json, json.dumps([asdict(seen) for seen, _ in results], indent=2))
    return 0 if all(flat for _, flat in results) else 1


if __name__ == "__main__":
    sys.exit(main())
