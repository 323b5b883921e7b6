"""Our kernels for few rows against torch's, oneDNN's and ggml's, at the shapes of T3 (30 layers, 1,024 wide).

    python benchmarks/against_others.py [--rows 2] [--layers 30] [--rounds 15] [--only linears|prompt]

Run nothing else meanwhile. Candidates take turns, each round one call of each; medians with quartiles. "linears" is
what reads the weights: the 210 linear layers of a step, without attention and norms. "prompt" is the whole model with
100 positions; ggml is in it where `llama_cpp` and `gguf` are installed. For whole steps see peers.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import ggml

HIDDEN, HEADS, INNER, PROMPT, VOCABULARY = 1024, 16, 4096, 100, 256
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
PAUSE = 0.05  # until threads that spin have fallen asleep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["linears", "prompt"], default=None)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        for name, candidates in (("linears", linears), ("prompt", prompts)):
            if given.only in {None, name}:
                compare(f"{name}, {given.layers} layers, {given.rows} rows", candidates(given), given.rounds)


def compare(title: str, candidates: Iterator[tuple[str, Callable[[], float | None]]], rounds: int) -> None:
    """Time candidates in turn. One that returns a number has measured itself, in seconds."""
    named = dict(candidates)
    times: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(rounds + 1):
        for name, call in named.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            own = call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start if own is None else own)
    print(title)
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"  {name:32} {1e3 * middle:8.1f} ms ({1e3 * low:.1f} .. {1e3 * high:.1f})", flush=True)


# --- what reads the weights ------------------------------------------------------------------------------------------


def linears(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], float | None]]]:
    import torch
    from torch.nn import functional

    from accelerate_tts.kernels.calls import skinny_linear

    run = skinny_linear()
    count = given.layers * len(SHAPES)
    shapes = SHAPES * given.layers
    weights = [torch.randn(shape) for shape in shapes]
    scales = [weight.abs().amax(1) / 127 for weight in weights]
    int8 = [(w / s[:, None]).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)]
    bf16 = [weight.bfloat16() for weight in weights]
    xs = {inputs: torch.randn(given.rows, inputs) for _, inputs in set(SHAPES)}
    narrow = {inputs: x.bfloat16() for inputs, x in xs.items()}

    def each(one: Callable[[int, Any], Any], inputs: dict[int, Any] = xs) -> Callable[[], None]:
        def all_of_them() -> None:
            for i in range(count):
                one(i, inputs[shapes[i][1]])

        return all_of_them

    yield "F.linear, fp32", each(lambda i, x: functional.linear(x, weights[i]))
    for name, tensors, inputs in (("fp32", weights, xs), ("bf16", bf16, narrow)):
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, given.rows) for w in tensors]
        yield (
            f"oneDNN, packed, {name}",
            each(lambda i, x, p=packed: torch.ops.mkldnn._linear_pointwise(x, p[i], None, "none", [], ""), inputs),
        )
    yield "ours, fp32", each(lambda i, x: run(x, weights[i], None, None, False))
    yield "ours, bf16", each(lambda i, x: run(x, bf16[i], None, None, False))
    yield "ours, int8", each(lambda i, x: run(x, int8[i], scales[i], None, False))
    yield "_weight_int8pack_mm, fp32", each(lambda i, x: torch._weight_int8pack_mm(x, int8[i], scales[i]))
    half = [scale.bfloat16() for scale in scales]
    yield "_weight_int8pack_mm, bf16", each(lambda i, x: torch._weight_int8pack_mm(x, int8[i], half[i]), narrow)
    sums = [weight.view(-1) for weight in weights]
    yield "the memory's floor, fp32", lambda: [tensor.sum() for tensor in sums] and None


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], float | None]]]:
    import torch

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.decode.bf16_prefill import PromptStage

    model = t3(given.layers)
    x = torch.randn(given.rows, PROMPT, HIDDEN)

    def prompt() -> None:
        model(inputs_embeds=x, use_cache=True)

    yield "eager, fp32 (exact)", prompt
    for weights in ("bf16", "int8"):
        blocks = fused(model, weights)
        blocks.on()
        change = PromptStage().prepare(Part("t3", "decoder", model))
        blocks.off()
        yield f"ours, bf16 prompts, {weights}", within(blocks, within(change, prompt))
    if any(importlib.util.find_spec(name) is None for name in ggml.MODULES):
        print("(ggml is left out: pip install llama-cpp-python gguf)")
        return
    for kind in ("F32", "F16", "Q8_0"):
        yield f"ggml (llama.cpp), {kind}", ggml.Engine(model, kind, given.threads, x, x[:, :1][None]).prompt


def fused(model: Any, weights: Any) -> Any:
    from accelerate_tts.plan import Part
    from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage

    return FusedBlocksStage(weights).prepare(Part("t3", "decoder", model))


def within(change: Any, call: Callable[[], None]) -> Callable[[], float]:
    """The call while a change is on: seconds of the call alone."""

    def timed() -> float:
        change.on()
        try:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        finally:
            change.off()

    return timed


def t3(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaModel(config).eval()


if __name__ == "__main__":
    main()
