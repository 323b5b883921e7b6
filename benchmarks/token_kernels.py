"""A recorded token of a decoder of T3's size on a CUDA device: upstream's own kernels, and fewer (Triton's).

    python benchmarks/token_kernels.py [--layers 30] [--positions 100,500] [--rows 2]

Run nothing else meanwhile. transformers' Llama with random weights, seed 0, in fp32 without TF32. Each way is recorded
over its own copy of the buffers, compared with eager PyTorch's states of the same tokens, and then replayed at each
number of positions; `ms` is the median of the replays, by CUDA's events. `floor_ms` is the time in which the memory, as
measured here, gives the weights that the way reads. `kernels` is how many one replay starts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from accelerate_tts.cli.bench.floors import bandwidth
from accelerate_tts.events import FellBack, hooked
from accelerate_tts.kernels.weight_formats import FORMATS
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.token_kernels import TokenKernels

WIDTH, INNER, HEADS, TOKENS, REPLAYS = 1024, 4096, 16, 20, 50
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def decoder(layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval().cuda()


@torch.inference_mode()
def spoken(model: Any, positions: int, rows: int) -> tuple[torch.Tensor, Any]:
    """Return the states of some tokens behind a prompt, and the cache."""
    generator = torch.Generator().manual_seed(1)
    past, found = None, []
    for number in range(TOKENS + 1):
        x = torch.randn(rows, 1 if number else positions - TOKENS, WIDTH, generator=generator).cuda()
        out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.last_hidden_state[:, -1:])
    return torch.cat(found[1:], 1), past


def replayed(slot: Any) -> tuple[float, int]:
    """Return the median milliseconds of a replay, and the number of kernels in it."""
    recording = slot._recording
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        recording.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        recording.replay()
        torch.cuda.synchronize()
    return statistics.median(times), sum(event.count for event in told.key_averages())


def measure(model: Any, kernels: TokenKernels | None, positions: int, rows: int, expected: torch.Tensor) -> Any:
    fallen: list[str] = []
    part = Part("decoder", "decoder", model)
    with hooked(lambda event: fallen.append(str(event)) if isinstance(event, FellBack) else None):
        change: Any = CapturedStepStage(kernels=kernels).prepare(part)
        change.on()
        found, past = spoken(model, positions, rows)
        milliseconds, count = replayed(change.slots[-1])
        change.off()
    del past
    error = float((found - expected).norm() / expected.norm())
    return {"ms": milliseconds, "kernels": count, "error": error, "fell_back": fallen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--positions", default="100,500")
    parser.add_argument("--rows", type=int, default=2)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "there is no CUDA device"}))
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    model = decoder(given.layers)
    weights = sum(parameter.numel() for parameter in model.layers.parameters())
    speed = bandwidth("cuda")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "layers": given.layers, "rows": given.rows}
    for positions in map(int, given.positions.split(",")):
        expected, _ = spoken(model, positions, given.rows)
        ways = {"upstream's": None, **{f"kernels, {each}": TokenKernels(each) for each in reversed(FORMATS)}}
        for name, kernels in ways.items():
            one = measure(model, kernels, positions, given.rows, expected)
            one["floor_ms"] = 1000 * weights * BYTES[name.rpartition(" ")[2] if kernels else "fp32"] / speed
            found[f"{name}, {positions} positions"] = one
            print(name, positions, one, flush=True)
            print(json.dumps(found), flush=True)  # what is known, should there be no time for the others


if __name__ == "__main__":
    main()
