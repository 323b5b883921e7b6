"""Linear layers of many rows in fp32: what torch does against weights that oneDNN has packed for it.

    python benchmarks/products.py [--pairs 15] [--json FILE]

Run nothing else meanwhile. The shapes are those of a prompt of Chatterbox's T3 and of its flow estimator. The two take
turns; rates are of the best of each, the ratio is the median of the pairs. inductor packs weights in this way when it
freezes a graph (`max-autotune`), and it would be the only thing that packing could add to eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional

from accelerate_tts.cli.tables import table
from accelerate_tts.storage.files import write_whole

SHAPES = {
    "T3's prompt, attention": (200, 1024, 1024), "T3's prompt, up": (200, 4096, 1024),
    "T3's prompt, down": (200, 1024, 4096), "flow estimator, queries": (800, 512, 256),
    "flow estimator, up": (800, 1024, 256), "flow estimator, down": (800, 256, 1024),
}  # fmt: skip


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(rows: int, outputs: int, inputs: int, pairs: int) -> dict[str, float]:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def ours() -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]

    def plain() -> torch.Tensor:
        return functional.linear(x, weight, bias)

    torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-3)
    times = [(seconds(plain), seconds(ours)) for _ in range(pairs + 2)][2:]
    operations = 2e-9 * rows * outputs * inputs
    return {
        "plain": operations / min(a for a, _ in times), "packed": operations / min(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {name: measure(*shape, options.pairs) for name, shape in SHAPES.items()}
    rows = [("layer", "rows, outputs, inputs", "torch", "packed", "ratio")]
    rows += [
        (name, str(SHAPES[name]), f"{f['plain']:.0f} GFLOP/s", f"{f['packed']:.0f} GFLOP/s", f"{f['ratio']:.2f}x")
        for name, f in found.items()
    ]
    Console(width=120, highlight=False).print(table(rows, "Products in fp32", {"torch", "packed", "ratio"}))
    if options.json:
        write_whole(options.json, json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
