"""One step of Chatterbox's flow estimator at full size: fp32 against half precision and compiled blocks.

    python benchmarks/estimator.py [--frames 400] [--pairs 9] [--json FILE]

Run nothing else meanwhile. The true class with random weights and seed 0, two rows (as for classifier-free guidance).
Each way is switched on and off in turn with the untouched module, in one process; the ratio is the median of the pairs.
The floor is the time that its products take at the rate at which this machine multiplies in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from accelerate_tts.cli.tables import table
from accelerate_tts.kernels.residual_block import RESIDUAL
from accelerate_tts.kernels.transformer_block import TRANSFORMER
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.layers.fused_sequence import FusedSequenceStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.protocol import Stage
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.compare import compare

CHANNELS = 80
BF16 = torch.bfloat16
FUSED = (FusedSequenceStage(TRANSFORMER), FusedSequenceStage(RESIDUAL))
WAYS: dict[str, tuple[Stage, ...]] = {
    "compiled blocks": (CompiledBlocksStage("default"),),
    "bf16 layers": (HalfStage(BF16, carried=False),),
    "bf16 part": (HalfStage(BF16, carried=True),),
    "bf16 part, compiled blocks": (HalfStage(BF16, carried=True), CompiledBlocksStage("default")),
    "fused transformer blocks": (FusedSequenceStage(TRANSFORMER),),
    "fused blocks": FUSED,
    "fused blocks, bf16 layers": (*FUSED, HalfStage(BF16, carried=False)),
}


def estimator(frames: int) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The module, and a function that runs one step of it."""
    from chatterbox.models.s3gen import S3Gen

    torch.manual_seed(0)
    module: Any = S3Gen().eval().flow.decoder.estimator
    sizes = ((2, CHANNELS, frames), (2, CHANNELS, frames), (2, CHANNELS, frames))
    x, mu, condition = (torch.randn(size) for size in sizes)
    mask, at, voice = torch.ones(2, 1, frames), torch.rand(2), torch.randn(2, CHANNELS)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = module.forward(x, mask, mu, at, voice, condition)
            return result

    return module, step


def multiplications(step: Callable[[], object]) -> int:
    """Floating-point operations of one step's linear layers, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def rate() -> float:
    """Operations a second of a large fp32 product: the best of ten."""
    a, best = torch.randn(2048, 2048), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(frames: int, pairs: int) -> dict[str, Any]:
    module, step = estimator(frames)
    expected = step()
    found: dict[str, Any] = {"frames": frames, "floor": multiplications(step) / rate(), "ways": {}}
    for name, stages in WAYS.items():
        print(f"{name} ...", flush=True)
        changes: list[Any] = []
        for stage in stages:
            changes.append(stage.prepare(Part("estimator", "estimator", module, method="forward")))
            changes[-1].on()
        clock = time.perf_counter()
        error = compare([expected], [step()]).error
        first = time.perf_counter() - clock
        seconds = []
        for _ in range(pairs):
            for change in reversed(changes):
                change.off()
            before = timed(step)
            for change in changes:
                change.on()
            seconds.append((before, timed(step)))
        for change in reversed(changes):
            change.off()
        ratios = sorted(a / b for a, b in seconds)
        found["ways"][name] = {
            "before": statistics.median(a for a, _ in seconds), "after": statistics.median(b for _, b in seconds),
            "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1], "error": error,
            "first": first,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=400, help="of 20 ms each")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = measure(options.frames, options.pairs)
    rows = [("way", "fp32", "so", "ratio", "lowest .. highest", "error", "first call")]
    for name, way in found["ways"].items():
        rows.append((
            name, f"{1e3 * way['before']:.0f} ms", f"{1e3 * way['after']:.0f} ms", f"{way['ratio']:.2f}x",
            f"{way['lowest']:.2f} .. {way['highest']:.2f}", f"{way['error']:.0e}", f"{way['first']:.1f} s",
        ))  # fmt: skip
    Console(width=120).print(table(rows, f"A step of the estimator, {found['frames']} frames"))
    over = statistics.median(way["before"] for way in found["ways"].values()) / found["floor"]
    print(f"its products at the machine's fp32 rate: {1e3 * found['floor']:.0f} ms; fp32 takes {over:.2f} times that")
    if options.json is not None:
        write_whole(options.json, json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
