"""Time that upstream spends beside the arithmetic when it speaks.

    python benchmarks/waste.py [--layers N] [--json FILE]

Run nothing else meanwhile. Chatterbox's own classes at full size with random weights and seed 0, untouched. Each row is
something that upstream does at each request, token or step of the flow, timed by itself or switched on and off in turn,
beside the time of what it is done for.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.t3 import T3
from chatterbox.models.t3.inference.t3_hf_backend import T3HuggingfaceBackend
from rich.console import Console
from tqdm import tqdm

from accelerate_tts.cli.tables import table
from accelerate_tts.storage.files import write_whole

PAIRS, PROMPT, TOKENS, FRAMES = 7, 100, 8, 400


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(function: Callable[[], object], count: int = PAIRS) -> float:
    function()
    return statistics.median(seconds(function) for _ in range(count))


def difference(dear: Callable[[], object], cheap: Callable[[], object]) -> float:
    """Return the median difference in seconds, in pairs."""
    dear(), cheap()
    return statistics.median(seconds(dear) - seconds(cheap) for _ in range(PAIRS))


def of_the_loop(layers: int | None) -> list[tuple[str, float, str, float]]:
    torch.manual_seed(0)
    t3: Any = T3().eval()
    if layers is not None:
        t3.tfmr.layers, t3.tfmr.config.num_hidden_layers = t3.tfmr.layers[:layers], layers
    x, one = torch.randn(2, PROMPT, t3.cfg.hidden_size), torch.randn(2, 1, t3.cfg.hidden_size)

    def tokens(states: bool) -> None:
        past = t3.tfmr(inputs_embeds=x, use_cache=True).past_key_values
        for _ in range(TOKENS):
            t3.tfmr(inputs_embeds=one, past_key_values=past, use_cache=True, output_hidden_states=states)

    def bar(file: io.StringIO | None) -> None:
        for _ in tqdm(range(1000), desc="Sampling", dynamic_ncols=True, file=file, disable=file is None):
            pass

    prompt = median(lambda: t3.tfmr(inputs_embeds=x, use_cache=True))
    token = (median(lambda: tokens(states=False)) - prompt) / TOKENS
    wrapper = median(
        lambda: T3HuggingfaceBackend(t3.cfg, t3.tfmr, speech_enc=t3.speech_emb, speech_head=t3.speech_head)
    )
    states = difference(lambda: tokens(states=True), lambda: tokens(states=False)) / TOKENS
    bars = difference(lambda: bar(io.StringIO()), lambda: bar(None)) / 1000
    ids = torch.zeros(1, 1, dtype=torch.long)
    asked = median(lambda: [bool(ids.view(-1) == 1) for _ in range(1000)]) / 1000
    return [
        ("the wrapper around T3 that is made anew, a request of 100 tokens", wrapper, "the tokens", 100 * token),
        ("hidden states of all layers, a token", states, "the token", token),
        ("the progress bar, a token", bars, "the token", token),
        ("asking whether the token is the last, on a CPU", asked, "the token", token),
    ]


def of_the_flow() -> list[tuple[str, float, str, float]]:
    torch.manual_seed(0)
    estimator: Any = S3Gen().eval().flow.decoder.estimator
    given = [torch.randn(2, 80, FRAMES) for _ in range(3)]
    mask, at, voice = torch.ones(2, 1, FRAMES), torch.rand(2), torch.randn(2, 80)
    step = median(lambda: estimator.forward(given[0], mask, given[1], at, voice, given[2]))
    first = estimator.down_blocks[0][0].block1.block[0]
    whole, changing = torch.randn(2, 320, FRAMES), torch.randn(2, 80, FRAMES)
    narrow = torch.nn.Conv1d(80, first.out_channels, first.kernel_size)
    fixed = difference(lambda: first(whole), lambda: narrow(changing))
    joined = median(lambda: torch.cat([*given, voice[..., None].expand(-1, -1, FRAMES)], 1))
    return [
        ("the first convolution's part that all ten steps share, a step", fixed, "the step", step),
        ("joining what does not change to what does, a step", joined, "the step", step),
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer layers of T3 than it has")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [*of_the_loop(options.layers), *of_the_flow()]
    rows = [("what upstream does", "takes", "beside", "takes", "share")]
    rows += [
        (what, f"{1e3 * cost:.3f} ms", beside, f"{1e3 * whole:.0f} ms", f"{100 * cost / whole:.2f} %")
        for what, cost, beside, whole in found
    ]
    Console(width=140, highlight=False).print(table(rows, "Chatterbox, untouched", {"takes", "share"}))
    if options.json:
        write_whole(options.json, json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
