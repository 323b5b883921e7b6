"""A decode step of a T3-shaped Llama (30 layers, 1,024 wide, 16 heads, 4,096 inner): ours, torch's, oneDNN's, ggml's.

    python benchmarks/against_others.py [--rows 2] [--layers 30] [--rounds 15] [--only steps|linears|prompt]

Run nothing else meanwhile. Candidates take turns, each round one call of each; medians with quartiles. "linears" is
what reads the weights: the 210 linear layers of a step, without attention and norms. "steps" is the whole step with
Python around it.

ggml is measured as llama.cpp runs it, where `llama_cpp` and `gguf` can be imported (pip install llama-cpp-python gguf):
a model of the same shape with random weights is written to a temporary folder (2 GB in F32). It runs in a process of
its own, asked to go when nothing else does, since it has threads of its own, which would spin beside torch's.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN, HEADS, INNER, PROMPT, VOCABULARY = 1024, 16, 4096, 100, 256
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
PAUSE = 0.05  # until threads that spin have fallen asleep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["steps", "linears", "prompt"], default=None)
    parser.add_argument("--ggml", metavar="FORMAT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ggml:
        serve_ggml(given)
        return
    import torch

    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        for name, candidates in (("linears", linears), ("steps", steps), ("prompt", prompts)):
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


# --- whole steps -----------------------------------------------------------------------------------------------------


def steps(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], float | None]]]:
    model = t3(given.layers)
    yield "eager, fp32", stepping(model, given.rows)
    for weights in ("fp32", "bf16", "int8"):
        yield f"ours, fused, {weights}", within(fused(model, weights), stepping(model, given.rows))
    yield from ggml(given, "step")


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
    yield from ggml(given, "prompt")


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


def stepping(model: Any, rows: int) -> Callable[[], None]:
    """One more token each time, behind a prompt."""
    import torch

    prompt, token = torch.randn(rows, PROMPT, HIDDEN), torch.randn(rows, 1, HIDDEN)
    past: list[Any] = []

    def step() -> None:
        if not past or past[0].get_seq_length() > 2 * PROMPT:
            past[:] = [model(inputs_embeds=prompt, use_cache=True).past_key_values]
        model(inputs_embeds=token, past_key_values=past[0], use_cache=True)

    step()
    return step


# --- ggml ------------------------------------------------------------------------------------------------------------


def ggml(given: argparse.Namespace, what: str) -> Iterator[tuple[str, Callable[[], float | None]]]:
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        print("(ggml is left out: pip install llama-cpp-python gguf)")
        return
    for kind in ("F32", "F16", "Q8_0"):
        command = [sys.executable, __file__, "--ggml", kind, "--rows", str(given.rows), "--layers", str(given.layers),
                   "--threads", str(given.threads)]  # fmt: skip
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()  # it is loaded

        def ask(child: Any = child) -> float:
            child.stdin.write(what + "\n")
            child.stdin.flush()
            return float(child.stdout.readline())

        yield f"ggml (llama.cpp), {kind}", ask


def serve_ggml(given: argparse.Namespace) -> None:
    """Answer each line, "step" or "prompt", with the seconds that it took."""
    import llama_cpp as ll

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t3.gguf"
        write_gguf(path, given.ggml, given.layers)
        ll.llama_backend_init()
        quiet = ll.llama_log_callback(lambda *_: None)
        ll.llama_log_set(quiet, None)
        model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
        options = ll.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = 512 * given.rows, 1024, given.rows
        options.n_ubatch = 1024
        options.n_threads = options.n_threads_batch = given.threads
        context = ll.llama_init_from_model(model, options)
        assert context
        batch = ll.llama_batch_init(1024, 0, given.rows)
        length = 0

        def decode(positions: int) -> float:
            nonlocal length
            batch.n_tokens = positions * given.rows
            for row in range(given.rows):
                for j in range(positions):
                    i = row * positions + j
                    batch.token[i], batch.pos[i], batch.n_seq_id[i] = (7 * i) % VOCABULARY, length + j, 1
                    batch.seq_id[i][0], batch.logits[i] = row, j == positions - 1
            start = time.perf_counter()
            assert ll.llama_decode(context, batch) == 0
            ll.llama_synchronize(context)
            length += positions
            return time.perf_counter() - start

        def forget() -> None:
            nonlocal length
            ll.llama_memory_clear(ll.llama_get_memory(context), True)
            length = 0

        decode(PROMPT)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "prompt" or length > 2 * PROMPT:
                forget()
            if length == 0:
                seconds = decode(PROMPT)
            print(seconds if line.strip() == "prompt" else decode(1), flush=True)


def write_gguf(path: Path, kind: str, layers: int) -> None:
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type({"F32": 0, "F16": 1, "Q8_0": 7}[kind])

    @cache
    def packed(*shape: int) -> Any:
        """Numbers of a weight; layers may have the same ones, each in memory of its own."""
        values = (generator.standard_normal(shape, np.float32) * 0.02).astype(np.float32)
        if kind == "Q8_0":
            return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return values.astype(np.float16) if kind == "F16" else values

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            of = gguf.GGMLQuantizationType.Q8_0 if kind == "Q8_0" else None
            writer.add_tensor(name, packed(*shape), raw_dtype=of)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("output.weight", VOCABULARY, HIDDEN)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
