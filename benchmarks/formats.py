"""Effect of fewer bits in a decoder's weights on what is sampled, at full size. No speed is measured.

    python benchmarks/formats.py [chatterbox] [xtts] [--layers N] [--json FILE]

The true classes with random weights and seed 0, see decode.py. All linear layers of the blocks are rounded to a format
and back; norms, cache, head and arithmetic stay in fp32. `divergence` is that of the next token's probabilities, given
the same past, over 10 steps, with guidance where the system has it; `allowed` is what a precision of ours tolerates.
Random weights are the easy case for rounding, since none is much larger than the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from decode import SYSTEMS
from rich.console import Console
from transformers.modeling_outputs import BaseModelOutputWithPast as Step
from transformers.pytorch_utils import Conv1D

from accelerate_tts.cli.tables import table
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.compare import TOLERANCES
from accelerate_tts.tuning.kl_divergence import divergence

if TYPE_CHECKING:
    from decode import Decoder

STEPS = 10


def grouped(bits: int, size: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds a weight (outputs, inputs) to signed integers with one scale for each output, or for so many inputs."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        groups = weight if size is None else weight.unflatten(-1, (-1, size))
        most = 2 ** (bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
        return ((groups / scale).round().clamp(-most - 1, most) * scale).view_as(weight)

    return rounded


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda weight: weight.bfloat16().float(),
    "int8, a scale for each output": grouped(8, None),
    "int6, a scale for 32 inputs": grouped(6, 32),
    "int4, a scale for 32 inputs": grouped(4, 32),
    "int4, a scale for 128 inputs": grouped(4, 128),
}


def layers_of(decoder: Decoder) -> list[torch.nn.Module]:
    return [module for module in decoder.model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


@torch.inference_mode()
def measure(decoder: Decoder) -> list[tuple[str, float, float, float]]:
    reference = decoder.speak(STEPS)
    found = []
    for name, rounded in FORMATS.items():
        print(f"  {name} ...", flush=True)
        before = [(layer, layer.weight.data) for layer in layers_of(decoder)]
        for layer, weight in before:
            transposed = isinstance(layer, Conv1D)  # keeps (inputs, outputs)
            new = rounded(weight.T.contiguous() if transposed else weight)
            layer.weight.data = new.T.contiguous() if transposed else new
        states = decoder.speak(STEPS)
        for layer, weight in before:
            layer.weight.data = weight
        error = max(float((a - b).norm() / a.norm()) for a, b in zip(reference, states, strict=True))
        steps = [divergence([Step(a)], [Step(b)], decoder.head) or 0.0 for a, b in zip(reference, states, strict=True)]
        found.append((name, max(steps), statistics.mean(steps), error))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=["chatterbox", "xtts", []])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [("system", "format", "largest", "mean", "error of the state")]
    results = {}
    for name in options.systems or ("chatterbox", "xtts"):
        print(f"{name} ...", flush=True)
        torch.manual_seed(0)
        results[name] = measure(SYSTEMS[name](options.layers))
        rows += [(name, f, f"{most:.1e}", f"{mean:.1e}", f"{error:.1e}") for f, most, mean, error in results[name]]
    allowed = ", ".join(f"{name} {TOLERANCES[name].divergence:g}" for name in ("exact", "balanced", "fast"))
    title = f"Divergence of a step in nats; allowed: {allowed}"
    Console(width=120, highlight=False).print(table(rows, title, {"largest", "mean", "error of the state"}))
    if options.json:
        write_whole(options.json, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
