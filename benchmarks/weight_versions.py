"""Cost of checking a decoder's weights for changes: T3's 30 blocks, at each token."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from accelerate_tts.patching.weight_versions import WeightWatch

TOKENS = 200


def block() -> nn.Module:
    """The weights of one block of T3, 17 million."""
    linear = [nn.Linear(1024, 1024, bias=False) for _ in range(4)]
    feed = [nn.Linear(1024, 4096, bias=False), nn.Linear(1024, 4096, bias=False), nn.Linear(4096, 1024, bias=False)]
    return nn.ModuleList([*linear, *feed, nn.LayerNorm(1024, bias=False), nn.LayerNorm(1024, bias=False)])


def asked(weights: list[WeightWatch]) -> float:
    """Microseconds of one check of all blocks."""
    begun = time.perf_counter()
    if any(each.outdated() for each in weights):
        raise RuntimeError("nothing was written")
    return (time.perf_counter() - begun) * 1e6


def main() -> None:
    """Print quartiles of a token's checks, with and without content, in turn."""
    torch.set_num_threads(1)
    blocks = [block() for _ in range(30)]
    begun = time.perf_counter()
    kinds = {"content": [WeightWatch(each) for each in blocks]}
    seconds = time.perf_counter() - begun
    kinds["addresses and versions"] = [WeightWatch(each, content=False) for each in blocks]
    between = torch.zeros(64 << 20)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TOKENS):
        for kind, weights in kinds.items():
            between.add_(1)  # what a token reads in between
            times[kind].append(asked(weights))
    print(f"made in {seconds:.2f} s")
    for kind, found in times.items():
        low, middle, high = statistics.quantiles(found[TOKENS // 10 :], n=4)
        print(f"{kind}: {middle:.0f} us a token (quartiles {low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
