"""Linear layers with few rows: torch's against our own kernel, and the memory's floor.

    python benchmarks/skinny.py

Run nothing else meanwhile. Several matrices of each shape are used in turn, so that none is still in the processor's
cache; of each candidate the best of five rounds counts, and candidates take turns within a round. `floor` is the time
in which the memory, as measured in the same rounds, gives the fp32 weights once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional

from accelerate_tts.cli.tables import table
from accelerate_tts.kernels.calls import skinny_linear

SHAPES = [(1024, 1024), (4096, 1024), (1024, 4096)]
ROWS = (1, 2, 4, 8)
BYTES = 500_000_000
ROUNDS = 5


def main() -> None:
    run = skinny_linear()
    rows = [("outputs x inputs", "rows", "F.linear", "W @ x.T", "fp32", "fp32, transposed", "bf16", "int8", "floor")]
    for outputs, inputs in SHAPES:
        weights = [torch.randn(outputs, inputs) for _ in range(BYTES // (outputs * inputs * 4))]
        scales = [weight.abs().amax(1) / 127 for weight in weights]
        int8 = [(w / s[:, None]).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)]
        bf16 = [weight.bfloat16() for weight in weights]
        transposed = [weight.t().contiguous() for weight in weights]
        for count in ROWS:
            x = torch.randn(count, inputs)
            candidates: list[Callable[[int], Any]] = [
                lambda i, x=x, w=weights: functional.linear(x, w[i]),
                lambda i, x=x, w=weights: torch.mm(w[i], x.t()).t().contiguous(),
                lambda i, x=x, w=weights: run(x, w[i], None, None, False),
                lambda i, x=x, w=transposed: run(x, w[i], None, None, True),
                lambda i, x=x, w=bf16: run(x, w[i], None, None, False),
                lambda i, x=x, w=int8, s=scales: run(x, w[i], s[i], None, False),
                lambda i, w=weights: w[i].sum(),
            ]  # fmt: skip
            best = [float("inf")] * len(candidates)
            for _ in range(ROUNDS):
                for number, candidate in enumerate(candidates):
                    start = time.perf_counter()
                    for i in range(len(weights)):
                        candidate(i)
                    best[number] = min(best[number], (time.perf_counter() - start) / len(weights))
            rows.append((f"{outputs} x {inputs}", str(count), *(f"{1e3 * seconds:.3f}" for seconds in best)))
            print(" ".join(rows[-1]), flush=True)
    Console(width=120, highlight=False).print(table(rows, "Milliseconds a layer", set(rows[0][1:])))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
