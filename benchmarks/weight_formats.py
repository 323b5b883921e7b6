"""Rounding of a product with weights in int8 and in fp8 (e4m3), each with one scale for an output. Nothing is timed.

    python benchmarks/weight_formats.py [--rows 16]

Layers have the shapes of T3's, XTTS's and Higgs Audio's blocks. Their weights are drawn, seed 0: normal, and of
Student's t with 5 degrees of freedom, whose rows have outliers. `trained` are resemblyzer's matrices, where it is
installed. Inputs are normal, and a hundredth of their channels is ten times as large, as behind a norm of a trained
decoder. `peak` is the mean of the rows' largest weight in standard deviations; `int8` and `fp8` are the distances of
the product from fp32's, relative to it; `equal_peak` is the peak at which both are alike. `both_fp8` has the inputs in
fp8, too, as tensor cores take them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch import nn

from accelerate_tts.kernels.weight_formats import in_int8

SHAPES = {
    "T3 and XTTS, attention": (1024, 1024), "T3 and XTTS, up": (4096, 1024), "T3 and XTTS, down": (1024, 4096),
    "Higgs, attention": (3072, 3072), "Higgs, up": (8192, 3072), "Higgs, down": (3072, 8192),
}  # fmt: skip
"""Outputs and inputs."""
_LEAST = 64
"""Inputs and outputs of a trained matrix, at least."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    """Round rows to fp8, with a scale for each, and return them in fp32."""
    scale = x.abs().amax(1, keepdim=True) / _LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def drawn(name: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Return weights of unit variance over the root of their inputs."""
    w = torch.randn(shape, generator=generator)
    if name == "t":
        squares = torch.stack([torch.randn(shape, generator=generator) ** 2 for _ in range(5)]).mean(0)
        w = w / squares.sqrt() * 0.6**0.5  # whose variance is 5 / 3 without the factor
    return w / shape[1] ** 0.5


def inputs(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, size, generator=generator)
    x[:, torch.randperm(size, generator=generator)[: size // 100]] *= 10
    return x


def measured(weight: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    quantized, scale = in_int8(layer)
    exact = x @ weight.t()

    def error(product: torch.Tensor) -> float:
        return round(float((product - exact).norm() / exact.norm()), 5)

    return {
        "peak": round(float((weight.abs().amax(1) / weight.std(1)).mean()), 1),
        "int8": error(x @ (quantized.float() * scale[:, None]).t()),
        "fp8": error(x @ in_fp8(weight).t()),
        "both_fp8": error(in_fp8(x) @ in_fp8(weight).t()),
    }


def equal_peak(x: torch.Tensor, generator: torch.Generator) -> float:
    """Return the peak from which fp8 is closer: normal rows, each with one larger weight."""
    for half in range(8, 200):
        weight = drawn("normal", (64, x.shape[1]), generator)
        weight[:, 0] = half / 2 * weight.std(1)
        found = measured(weight, x)
        if found["fp8"] <= found["int8"]:
            return half / 2
    return math.inf


def trained() -> dict[str, torch.Tensor]:
    try:
        from resemblyzer import VoiceEncoder
    except ImportError:
        return {}
    encoder = VoiceEncoder("cpu", verbose=False)
    return {name: p.detach() for name, p in encoder.named_parameters() if p.dim() > 1 and min(p.shape) >= _LEAST}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    rows = parser.parse_args().rows
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        x = inputs(rows, shape[1], generator)
        for spread in ("normal", "t"):
            found[f"{name}, {spread}"] = measured(drawn(spread, shape, generator), x)
    for name, weight in trained().items():
        found[f"trained, {name}"] = measured(weight, inputs(rows, weight.shape[1], generator))
    for name, each in found.items():
        print(f"{name:44} " + "  ".join(f"{what} {value:.4f}" for what, value in each.items()))
    print(json.dumps({"layers": found, "equal_peak": equal_peak(inputs(rows, 1024, generator), generator)}))


if __name__ == "__main__":
    main()
