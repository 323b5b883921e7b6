"""Convolutions along time: torch's, oneDNN's in channels-last layout, and ours in fewer products, beside the floor.

    python benchmarks/convolutions.py [--rounds N]

Run nothing else meanwhile. Candidates take turns within a round, and ratios are of one round; the median of the rounds
counts. The floor is the time of all products of the convolution at the rate of a large product of matrices, as measured
in the same rounds: what a convolution that computes each product cannot go below. `products` is by how much ours has
fewer. Errors are relative, to float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional

from accelerate_tts.cli.tables import table
from accelerate_tts.kernels.toom_cook import Geometry, Packed, Tiling, convolve
from accelerate_tts.stages.vocoder.convolution import Convolution

# Channels, taps, dilation, frames: of HiFi-GAN's levels, of VITS's flow and text encoder, of a mel's encoder.
SHAPES = [
    (512, 7, 1, 1000), (512, 3, 1, 2000), (256, 3, 1, 8000), (256, 7, 3, 8000), (256, 11, 5, 8000),
    (128, 3, 1, 40_000), (128, 7, 1, 40_000), (128, 11, 5, 40_000), (64, 3, 1, 80_000), (64, 11, 3, 80_000),
    (32, 3, 1, 160_000), (32, 11, 1, 160_000), (192, 5, 1, 500), (192, 3, 1, 80), (80, 7, 1, 400),
]  # fmt: skip
SIZE = 1536


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int, int], rounds: int) -> tuple[str, ...]:
    channels, taps, dilation, frames = shape
    weight, bias = torch.randn(channels, channels, taps) / (channels * taps) ** 0.5, torch.randn(channels)
    x, square = torch.randn(1, channels, frames), torch.randn(SIZE, SIZE)
    padding = dilation * (taps - 1) // 2
    image, rows = x.unsqueeze(2).contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT
    onednn = Convolution(weight, bias, padding, dilation, short=False)
    packed, geometry = Packed.of(weight, bias), Geometry(channels, taps, dilation, padding, padding)
    candidates: list[Callable[[], Any]] = [
        lambda: functional.conv1d(x, weight, bias, padding=padding, dilation=dilation),
        lambda: onednn(image),
        lambda: convolve(x, packed, geometry, last=False),
        lambda: convolve(rows, packed, geometry, last=True),
        lambda: square @ square,
    ]
    for candidate in candidates:
        candidate()
    taken = [[seconds(candidate) for candidate in candidates] for _ in range(rounds)]
    plain, last, ours, ours_last, product = (statistics.median(column) for column in zip(*taken, strict=True))
    floor = product * channels * channels * taps * frames / SIZE**3
    ratios = sorted(row[1] / row[3] for row in taken)
    tiling = Tiling.of(taps)
    fewer = taps * tiling.frames / (tiling.points * tiling.chunks)
    exact = functional.conv1d(x.double(), weight.double(), bias.double(), padding=padding, dilation=dilation)
    errors = [float((candidate() - exact).norm() / exact.norm()) for candidate in (candidates[0], candidates[2])]
    return (
        f"{channels}, {taps} taps, every {dilation}, {frames} frames",
        *(f"{1e3 * value:.2f}" for value in (plain, last, ours, ours_last, floor)),
        f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} .. {ratios[-1]:.2f})",
        f"{statistics.median(row[0] / row[2] for row in taken):.2f}x", f"{fewer:.2f}x",
        " ".join(f"{error:.0e}" for error in errors),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    found = [
        (
            "channels",
            "torch",
            "oneDNN, last",
            "ours",
            "ours, last",
            "floor",
            "last",
            "torch's order",
            "products",
            "errors",
        )
    ]
    for shape in SHAPES:
        found.append(measure(shape, rounds))
        print(" | ".join(found[-1]), flush=True)
    title = f"Milliseconds, {torch.get_num_threads()} threads"
    Console(width=170, highlight=False).print(table(found, title, set(found[0][1:])))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
