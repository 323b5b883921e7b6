"""Thousands of calls of random length of small tuned models; memory and tensors must stay flat.

    python benchmarks/soak.py [--calls N] [--tune-seconds S] [--compile] [--json FILE] [mms] [llama]

transformers' own VITS (the class of MMS voices) and Llama with `generate`, small, with random weights, tuned by
`@optimized_model` and called through `@inference`. After each twentieth of the calls the garbage is collected, and the
resident memory and the tensors that Python can reach are counted. The first fifth of the samples is warm-up: torch,
the allocator and the caches fill. Then flat means

- resident memory: the median of the last third of the samples is at most 4 % and 8 MiB above that of the first third;
- tensors: the most in the last third is at most 8 above the most in the first third.

A call that leaks one small tensor is seen by the second, one that leaks 20 KiB outside of Python by the first. What
grows below that are torch's own caches of shapes; with ACCELERATE_TTS_DISABLE=1 the untouched models show the same. The
exit status is 1 if anything grows, and the shapes that became more are named. Without --compile torch.compile is left
out: what is compiled for a length that was not warmed up stays, as it should.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from accelerate_tts import inference, optimized_model, receipt_of

SAMPLES = 20
WARM = SAMPLES // 5
SHARE, SLACK, TENSORS = 0.04, 8 * 2**20, 8
SHORTEST, LONGEST = 5, 80


class Mms:
    """A VITS voice of token ids."""

    @optimized_model(warmup=[torch.ones(1, SHORTEST, dtype=torch.long), torch.ones(1, LONGEST, dtype=torch.long)])
    def load(self) -> torch.nn.Module:
        config = transformers.VitsConfig(
            vocab_size=38, hidden_size=32, num_hidden_layers=2, ffn_dim=64, flow_size=32, spectrogram_bins=17,
            upsample_initial_channel=64, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3, 5],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            duration_predictor_filter_channels=32, posterior_encoder_num_wavenet_layers=1,
        )  # fmt: skip
        self.model = transformers.VitsModel(config).eval()
        return self.model

    @inference
    def call(self, length: int) -> int:
        tokens = torch.randint(1, 37, (1, length))
        return int(self.model(tokens).waveform.shape[-1])


class Llama:
    """A decoder that is driven by transformers' own loop."""

    @optimized_model(warmup=lambda self: self.call(12))
    def load(self) -> None:
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
        )
        self.model = transformers.LlamaForCausalLM(config).eval()

    @inference
    def call(self, length: int) -> int:
        prompt = torch.randint(2, 48, (1, 1 + length // 4))
        made = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1 + length // 8, do_sample=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return int(made.shape[-1])


SYSTEMS: dict[str, Callable[[], Any]] = {"mms": Mms, "llama": Llama}


@dataclass
class Soaked:
    """What was seen during the calls of one system: resident bytes and tensors at each sample."""

    name: str
    calls: int
    resident: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What grew, in words; empty if all is flat."""
        found = []
        early, late = thirds(self.resident)
        before, after = statistics.median(early), statistics.median(late)
        if after > before * (1 + SHARE) + SLACK:
            found.append(f"resident memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
        early, late = thirds(self.tensors)
        if max(late) > max(early) + TENSORS:
            found.append(
                f"tensors grew from {max(early)} to {max(late)}: {', '.join(self.grown) or 'no shape stands out'}"
            )
        return found


def thirds(samples: list[int]) -> tuple[list[int], list[int]]:
    """The first and the last third of the samples after the warm-up."""
    settled = samples[WARM:]
    size = max(1, len(settled) // 3)
    return settled[:size], settled[-size:]


def census() -> Counter[str]:
    """The tensors that Python can reach, by shape and type."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would ask proxies, whose objects may be gone
            found[f"{tuple(thing.shape)} {str(thing.dtype).removeprefix('torch.')}"] += 1
    return found


def soak(name: str, call: Callable[[int], Any], calls: int) -> Soaked:
    """Make the calls, and sample twenty times meanwhile."""
    choose, process = torch.Generator().manual_seed(0), psutil.Process()
    seen = Soaked(name, calls)
    first: Counter[str] = Counter()
    for sample in range(SAMPLES):
        for _ in range(max(1, calls // SAMPLES)):
            call(int(torch.randint(SHORTEST, LONGEST + 1, (), generator=choose)))
        now = census()
        if sample == WARM:
            first = now
        seen.tensors.append(now.total())
        seen.resident.append(process.memory_info().rss)
    seen.grown = [f"{count} more of {shape}" for shape, count in (now - first).most_common(5)]
    return seen


def report(seen: Soaked, kept: str) -> bool:
    """Print a system's figures; returns whether it is flat."""
    early, late = thirds(seen.resident)
    few, many = thirds(seen.tensors)
    print(
        f"{seen.name}: {seen.calls} calls, kept: {kept}\n"
        f"  resident memory {statistics.median(early) / 2**20:.1f} -> {statistics.median(late) / 2**20:.1f} MiB"
        f" (bound: {SHARE:.0%} and {SLACK // 2**20} MiB more)\n"
        f"  tensors {max(few)} -> {max(many)} (bound: {TENSORS} more)\n"
        + "".join(f"  GROWS: {fault}\n" for fault in seen.faults)
        + ("" if seen.faults else "  flat")
    )
    return not seen.faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=[*SYSTEMS, []], help="all if none is given")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    os.environ["ACCELERATE_TTS_PACK"] = "0"
    os.environ["ACCELERATE_TTS_TUNE_SECONDS"] = str(options.tune_seconds)
    os.environ["ACCELERATE_TTS_TORCH_COMPILE"] = str(int(options.compile))
    torch.manual_seed(0)
    results = []
    for name in options.systems or SYSTEMS:
        backend = SYSTEMS[name]()
        backend.load()
        receipt = receipt_of(backend)
        kept = "nothing" if receipt is None else ", ".join(f"{s.part}: {s.stage}" for s in receipt.kept) or "nothing"
        seen = soak(name, backend.call, options.calls)
        results.append((seen, report(seen, kept)))
    if options.json:
        options.json.write_text(json.dumps([asdict(seen) for seen, _ in results], indent=2), encoding="utf-8")
    return 0 if all(flat for _, flat in results) else 1


if __name__ == "__main__":
    sys.exit(main())
