"""Measurement of one system in one process: the same object with its changes switched off and on alternately."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench.floors import floors, moved
from accelerate_tts.cli.bench.systems import system_of
from accelerate_tts.device.memory import peak_resident_bytes, resident_bytes
from accelerate_tts.errors import AccelerateTTSError
from accelerate_tts.events import FellBack, NotApplied, add_hook
from accelerate_tts.kernels.library import level
from accelerate_tts.kernels.weight_formats import is_transposed
from accelerate_tts.patching.class_swap import copies_of, fused_by, open_modules
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.tuning.capture import removed_at_end
from accelerate_tts.tuning.disturbance import Watcher
from accelerate_tts.tuning.policy import current_policy
from accelerate_tts.tuning.timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import nn

    from accelerate_tts.cli.bench.floors import Floors
    from accelerate_tts.cli.bench.systems import Built, Size
    from accelerate_tts.receipts.receipt import Receipt
    from accelerate_tts.settings import Precision

_TINY_SECONDS = 0.8
_PATIENCE = 30.0  # total seconds that a measurement waits for a quiet machine


@dataclass(frozen=True)
class Ratio:
    """Two states timed alternately: their median seconds, and median, minimum and maximum of the paired ratios.

    Attributes:
        pairs: Number of pairs; 0 if it was not stored.
    """

    before: float
    after: float
    ratio: float
    lowest: float
    highest: float
    pairs: int = 0

    @classmethod
    def of(cls, pairs: list[tuple[float, float]]) -> Ratio:
        """Compute it from the seconds of each pair."""
        ratios = sorted(a / b for a, b in pairs)
        before, after = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        return cls(before, after, statistics.median(ratios), ratios[0], ratios[-1], len(pairs))


@dataclass(frozen=True)
class Measured:
    """Measurements of one system in one precision.

    Attributes:
        whole: Ratio of a whole call.
        step: Ratio of a decode step, if there is a decode loop.
        prompt: Ratio of the loop's first call (prefill).
        error: Relative error of the tuned output against the untouched one, infinite if their shapes differ; `None` if
            the output is tokens only.
        same_tokens: True if all integers in the output (tokens) are equal; `None` if there are none.
        floor: Seconds to read the weights of one token from memory once, in their loaded format, at the best of
            `floors`.
        cold: Seconds of the very first call.
        tuning: Seconds that tuning took.
        warm_start: Seconds that a second process took instead, with the warm pack; `None` if not requested.
        memory: Ratio of the bytes held (`held_bytes`) after and before tuning.
        recompiles: Number of graphs compiled after warm-up.
        peak: Maximum bytes that the process held (`peak_bytes`) until the first call after tuning.
        warm_peak: The same for the second process, with the warm pack.
        divergence: Largest divergence of a decode step among the kept stages, in nats.
        kept: Kept stages, as "part: stage".
        note: Differences to a system with real weights.
        receipt: The receipt, as its JSON.
        device: torch's name of the device type.
        events: Texts of `FellBack` and `NotApplied` events, each once.
        floors: Rates of the machine before, between and after the pairs; see `Floors`.
        moved: Floors that changed in between, in words; "" if none did. The pairs were then measured once more, if the
            machine was quiet.
        disturbed: Number of counted pairs during which other programs used the machine. Others were repeated.
        disturbance: The disturbance in words; "" if there was none.
        kernels: Instruction set of the kernels in use, or "none".
        dtype: Number format of the model's weights as loaded, such as "float32"; the decoder's, if there is one.
        read: Bytes of weights that a tuned decode step reads: fewer than the loaded ones where a kept stage has copies
            in bf16 or int8. `None` if there is no loop.
    """

    system: str
    size: str
    precision: str
    layers: int | None
    whole: Ratio
    step: Ratio | None
    prompt: Ratio | None
    error: float | None
    same_tokens: bool | None
    floor: float | None
    cold: float | None
    tuning: float
    warm_start: float | None
    memory: float
    recompiles: int
    peak: int | None = None
    warm_peak: int | None = None
    kept: list[str] = field(default_factory=list)
    note: str = ""
    divergence: float | None = None
    receipt: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    events: list[str] = field(default_factory=list)
    floors: list[Floors] = field(default_factory=list)
    disturbed: int = 0
    disturbance: str = ""
    kernels: str = ""
    moved: str = ""
    dtype: str = ""
    read: int | None = None


def device_type() -> str:
    """Return the type of the measured device: the detected one, or the one of the settings."""
    from accelerate_tts.device.detect import detect
    from accelerate_tts.settings import Settings

    return detect(Settings.from_environment().device).type


def bytes_of_a_token(decoder: nn.Module) -> int:
    """Return the bytes of the weights that a decoder reads for one token of speech, as they were loaded.

    Embedding tables do not count, since one line of them is read. Of Higgs Audio's two feed-forwards in each layer,
    only the one for audio counts.
    """
    return sum(p.numel() * p.element_size() for p in _weights_of_a_token(decoder))


def bytes_read_by_a_token(decoder: nn.Module) -> int:
    """Return the bytes of `bytes_of_a_token` as the changes that are on read them, from copies in bf16 or int8.

    A copy in int8 has a scale in fp32 for each output.
    """
    fused = {block: computed for block in decoder.modules() if (computed := fused_by(block)) is not None}
    formats = {layer: copies_of(block) for block, computed in fused.items() for layer in computed.copied()}
    # Copies in fp32 are those of convolutions in fewer products, which serve whole signals alone.
    formats |= {layer: found for layer in open_modules(decoder) if (found := copies_of(layer)) not in {"", "fp32"}}
    copied = {id(p): (layer, found) for layer, found in formats.items() for p in layer.parameters() if p.dim() > 1}
    total = 0
    for p in _weights_of_a_token(decoder):
        layer, found = copied.get(id(p), (None, ""))
        scales = 4 * p.shape[1 if is_transposed(layer) else 0] if found == "int8" else 0
        width = p.element_size() if not found else 1 if found == "int8" else 2
        total += p.numel() * width + scales
    return total


def _weights_of_a_token(decoder: nn.Module) -> list[nn.Parameter]:
    from torch import nn

    idle: list[Any] = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
    idle += [module.mlp for module in decoder.modules() if hasattr(module, "audio_mlp")]
    unread = {id(weight) for module in idle for weight in module.parameters()}
    return [p for p in decoder.parameters() if id(p) not in unread]


_OWN_MEMORY = ("cuda", "xpu")


def held_bytes(device: str) -> int:
    """Return the bytes that this process holds: resident memory, or on CUDA and XPU the allocator's reserved memory."""
    import torch

    if device not in _OWN_MEMORY:
        return resident_bytes()
    module = getattr(torch, device)
    module.empty_cache()
    return int(module.memory_reserved())


def peak_bytes(device: str = "cpu") -> int | None:
    """Return the maximum of `held_bytes` over the process's life; `None` if the system does not report it."""
    if device in _OWN_MEMORY:
        import torch

        return int(getattr(torch, device).max_memory_reserved())
    platform: str = sys.platform  # typed as str, so that type checkers check all branches
    if platform == "linux":
        return peak_resident_bytes() or None
    if platform == "darwin":
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows has it
    return None if peak is None else int(peak)


def length_of(name: str, size: Size, tokens: int | None) -> float:
    """Return the seconds of speech of one measured call."""
    system = system_of(name)
    if tokens is not None and system.rate is not None:
        return tokens / system.rate
    return system.seconds if size == "full" else _TINY_SECONDS


def ordinary(name: str, size: Size, layers: int | None) -> Built:
    """Build a system with seeded weights on the measured device."""
    import torch

    torch.manual_seed(0)
    return system_of(name).build(size, layers, device_type())


def warm_up(name: str, size: Size) -> float:
    """Return the seconds of speech of a warm-up call."""
    return system_of(name).warm_up if size == "full" else _TINY_SECONDS / 2


def spoken(built: Built, seconds: float, watched: Loop | None = None) -> tuple[float, Any]:
    """Make a call with fixed random numbers; return its seconds and its output."""
    import torch

    device = device_type()
    with seeded(device), torch.no_grad(), _watching(built.decoder, watched, device):
        synchronize(device)
        start = time.perf_counter()
        output = built.speak(seconds)
        synchronize(device)
        return time.perf_counter() - start, output


def tuned(
    name: str, size: Size, precision: Precision, layers: int | None, seconds: float
) -> tuple[Built, Receipt, int]:
    """Build a system and tune it, as a user's load function would; also return the bytes held before tuning."""
    from accelerate_tts.decorators import optimized_model
    from accelerate_tts.optimizer import receipt_of

    built = ordinary(name, size, layers)
    held = held_bytes(device_type())

    def warmed(_model: Any) -> Any:
        return built.speak(warm_up(name, size))

    decorate = optimized_model(warmup=warmed, precision=precision, tune_seconds=seconds, mode="no_grad")
    decorate(lambda: built.model)()
    receipt = receipt_of(built.model)
    if receipt is None:
        raise AccelerateTTSError("nothing was tuned: is ACCELERATE_TTS_DISABLE set?")
    return built, receipt, held


def bench(  # noqa: PLR0913 - the options of the command
    name: str, size: Size, precision: Precision, *, layers: int | None, pairs: int, seconds: float,
    tokens: int | None = None,
) -> Measured:  # fmt: skip
    """Tune a system, then time whole calls of it, untouched and tuned alternately.

    Args:
        name: One of `SYSTEMS` or `PARTS`.
        size: "full" is the true architecture; "tiny" has the same classes and tests the command.
        precision: Precision level of tuning.
        layers: Number of layers, fewer than the system has if memory is short.
        pairs: Number of pairs of calls.
        seconds: Time budget of tuning.
        tokens: Speech tokens of one call, for a system that generates tokens; its usual length if not given.

    Raises:
        AccelerateTTSError: Nothing was tuned.
        MissingExtraError: The system's package is not installed.
    """
    import torch

    from accelerate_tts.optimizer import get_performance_optimizer

    device = device_type()
    said: dict[str, None] = {}
    forget = add_hook(lambda event: said.setdefault(str(event)) if isinstance(event, (FellBack, NotApplied)) else None)
    built, receipt, held = tuned(name, size, precision, layers, seconds)
    after = held_bytes(device)
    optimizer = get_performance_optimizer()
    length = length_of(name, size, tokens)
    found = spoken(built, length)[1]
    peak = peak_bytes(device)  # read before anything that a service does not do
    with optimizer.untouched(built.model):
        expected = spoken(built, length)[1]
    watcher = Watcher(current_policy().machine(), torch.get_num_threads(), _PATIENCE)
    whole: list[tuple[float, float]] = []
    loops: list[tuple[Loop, Loop]] = []

    def pair() -> None:
        plain, fast = Loop(), Loop()
        with optimizer.untouched(built.model):
            first = spoken(built, length, plain)[0]
        whole.append((first, spoken(built, length, fast)[0]))
        loops.append((plain, fast))

    disturbed, rates, why = series(pair, (whole, loops), pairs, watcher, lambda: floors(device))
    forget()
    has_loop = bool(loops[0][0].steps)
    weights = 0 if built.decoder is None else bytes_of_a_token(built.decoder)
    error, same_tokens = difference(expected, found)
    floor = weights / max(one["memory"] or 0.0 for one in rates) if has_loop else None
    return Measured(
        name, size, precision, layers, Ratio.of(whole),
        Ratio.of([(a.step, b.step) for a, b in loops]) if has_loop else None,
        Ratio.of([(a.prompt, b.prompt) for a, b in loops]) if has_loop else None,
        error, same_tokens, floor, receipt.cold, receipt.seconds, None,
        after / held, receipt.recompiles, peak, None,
        [f"{stage.part}: {stage.stage}" for stage in receipt.kept], built.note,
        max((stage.divergence for stage in receipt.kept if stage.divergence is not None), default=None),
        json.loads(receipt.to_json()), device, list(said), rates, disturbed, watcher.worst.why, level(), why,
        _dtype(built.decoder or built.model),
        None if built.decoder is None or not has_loop else bytes_read_by_a_token(built.decoder),
    )  # fmt: skip


def series(
    measure: Callable[[], object], found: Sequence[list[Any]], count: int, watcher: Watcher, rates: Callable[[], Floors]
) -> tuple[int, list[Floors], str]:
    """Measure `count` times between floors, and once more if the floors moved and the machine is quiet now.

    Args:
        measure: As for `undisturbed`.
        found: As for `undisturbed`.
        count: As for `undisturbed`.
        watcher: As for `undisturbed`.
        rates: Measures the floors: before, in the middle, and after.

    Returns:
        Number of disturbed measurements that are counted, the three floors, and how they moved in words.
    """
    told: list[Floors] = []

    def measured() -> None:
        measure()
        if len(told) == 1 and len(found[0]) == (count + 1) // 2:
            told.append(rates())

    for last in (False, True):
        told[:] = [rates()]
        disturbed = undisturbed(measured, found, count, watcher)
        told.append(rates())
        why = moved(told)
        if last or not why or not watcher.wait():
            break
        for figures in found:
            figures.clear()
    return disturbed, told, why


def undisturbed(measure: Callable[[], object], found: Sequence[list[Any]], count: int, watcher: Watcher) -> int:
    """Measure `count` times, and repeat disturbed measurements if the machine becomes quiet, at most `count` times.

    Args:
        measure: Appends one measurement to each list of `found`.
        found: Lists of measurements. A disturbed measurement is removed before it is repeated.
        count: Number of measurements.
        watcher: Detects disturbances, and waits for a quiet machine.

    Returns:
        Number of disturbed measurements that are counted.
    """
    disturbed, again = 0, count
    while len(found[0]) < count:
        with watcher.window() as window:
            measure()
        if window.disturbance.quiet:
            continue
        if again and watcher.wait():
            again -= 1
            for figures in found:
                figures.pop()
        else:
            disturbed += 1
    return disturbed


class Loop:
    """Seconds of a decode loop's calls."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.prompts: list[float] = []

    @property
    def step(self) -> float:
        """Median seconds of a decode step."""
        return statistics.median(self.steps)

    @property
    def prompt(self) -> float:
        """Median seconds of a prefill."""
        return statistics.median(self.prompts)


@contextmanager
def _watching(decoder: Any, loop: Loop | None, device: str) -> Generator[None, None, None]:
    """Time each call of a decoder while open. A call with one position is a decode step, others are prefill."""
    if decoder is None or loop is None:
        yield
        return
    starts: list[float] = []

    def begin(_module: Any, _args: Any) -> None:
        synchronize(device)
        starts.append(time.perf_counter())

    def end(_module: Any, _args: Any, output: Any) -> None:
        synchronize(device)
        positions = output.last_hidden_state.shape[1]
        (loop.steps if positions == 1 else loop.prompts).append(time.perf_counter() - starts.pop())

    with removed_at_end((decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end))):
        yield


def _tensors(output: Any) -> list[Any]:
    import torch

    items = output if isinstance(output, (tuple, list)) else [output]
    return [torch.as_tensor(item) for item in items]


def _floats(output: Any) -> list[Any]:
    return [tensor.float() for tensor in _tensors(output) if tensor.is_floating_point()]


def _dtype(model: Any) -> str:
    """Return the number format of most weights below a module, or of an object's modules."""
    import torch

    counts = Counter[torch.dtype]()
    for module in [model] if isinstance(model, torch.nn.Module) else vars(model).values():
        if isinstance(module, torch.nn.Module):
            for weight in module.parameters():
                counts[weight.dtype] += weight.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.") if counts else ""


def _same_tokens(first: Any, second: Any) -> bool | None:
    import torch

    both = [[tensor for tensor in _tensors(output) if not tensor.is_floating_point()] for output in (first, second)]
    return all(map(torch.equal, *both)) if both[0] else None


def difference(expected: Any, found: Any) -> tuple[float | None, bool | None]:
    """Return the relative error of floating-point outputs, and True if all integer outputs (tokens) are equal.

    Either is `None` if there are no such outputs.
    """
    from accelerate_tts.tuning.compare import compare

    floats = _floats(expected)
    return compare(floats, _floats(found)).error if floats else None, _same_tokens(expected, found)
