"""Cost of checking a decoder's weights and structure for changes: T3's 30 blocks, at each token.

    python benchmarks/weight_versions.py

Run nothing else meanwhile. Each check is made after reading more than a cache holds, as in a decode step: block by
block ("each"), and for all blocks at once ("joined"), in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaModel

from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.patching.weight_versions import WeightWatch

TOKENS = 200


def asked(checks: list[Callable[[], object]]) -> float:
    """Microseconds of one check of all blocks."""
    begun = time.perf_counter()
    if any(check() for check in checks):
        raise RuntimeError("nothing was written")
    return (time.perf_counter() - begun) * 1e6


def main() -> None:
    """Print quartiles of a token's checks."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=30, num_attention_heads=16, vocab_size=8
    )
    layers = LlamaModel(config).eval().layers
    begun = time.perf_counter()
    content = [WeightWatch(layer) for layer in layers]
    seconds = time.perf_counter() - begun
    versions = [WeightWatch(layer, content=False) for layer in layers]
    inside = [Inside(layer, [(layer.self_attn, "config")], read=layer.self_attn) for layer in layers]
    kinds: dict[str, list[Callable[[], object]]] = {
        "content, each": [watch.outdated for watch in content],
        "content, joined": [WeightWatch.joined(content).outdated],
        "addresses and versions, each": [watch.outdated for watch in versions],
        "addresses and versions, joined": [WeightWatch.joined(versions).outdated],
        "structure, each": [watch.altered for watch in inside],
        "structure, joined": [Inside.joined(inside).altered],
    }
    between = torch.zeros(64 << 20)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TOKENS):
        for kind, checks in kinds.items():
            between.add_(1)  # what a token reads in between
            times[kind].append(asked(checks))
    print(f"digests made in {seconds:.2f} s")
    for kind, found in times.items():
        low, middle, high = statistics.quantiles(found[TOKENS // 10 :], n=4)
        print(f"{kind}: {middle:.0f} us a token (quartiles {low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
