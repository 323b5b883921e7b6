"""Lengths that are decided by margin, against the untouched voice: not one may differ.

    python benchmarks/lengths.py [--texts N] [--first N] [--json FILE]

The demo's voice with its real weights speaks random texts (its own phonemes, blanks between them as its tokenizer puts
them, 14 to 120 of them), each at a random rate and with a seed of its own. Compared are the durations of each token,
what the random generators are at afterwards, and how far the log durations are from the untouched ones, against the
bound that was assumed of each. Only text encoder and durations are run. Fails if a duration differs or a bound is
passed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelerate_tts.cli.demo.backends import PlainBackend
from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.stages.vocoder.checked_lengths import CheckedStage, holds
from accelerate_tts.stages.vocoder.vits import DURATIONS, TEXT
from accelerate_tts.storage.files import write_whole


class DecidedError(Exception):
    """Ends a call once its durations are known."""


def decided(model: Any, ids: torch.Tensor, seed: int, rate: float) -> tuple[torch.Tensor, float, float]:
    """Log durations of a text, and a number of each random generator afterwards."""
    seen: list[torch.Tensor] = []

    def note(_module: Any, _args: Any, output: torch.Tensor) -> None:
        seen.append(output)

    def stop(*_given: Any) -> None:
        raise DecidedError

    handles = [model.duration_predictor.register_forward_hook(note), model.flow.register_forward_pre_hook(stop)]
    for hook in (note, stop):
        hook.__module__ = "accelerate_tts.benchmark"  # ours only watch, and what they watch may stay fast
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that upstream draws from
    try:
        model(ids, speaking_rate=rate)
    except DecidedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1], float(torch.rand(())), float(np.random.uniform())  # noqa: NPY002


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first text, to go on where a run ended")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    backend = PlainBackend()
    backend.load()
    tuned: Any = backend.voice.model
    plain = copy.deepcopy(tuned)
    parts: dict[str, Part] = {part.name: part for part in describe(tuned).parts}
    changes = []
    for kernel, name in ((DURATIONS, "duration_predictor"), (TEXT, "text_encoder")):
        change = CheckedStage(kernel).prepare(parts[name])
        change.on()
        changes.append(change)
    guard = changes[0].guard
    phonemes = sorted({ids[0] for ids in backend.voice.phoneme_ids.values()})
    worst, wrong, near, tokens, clock = 0.0, 0, 0, 0, time.perf_counter()
    for number in range(options.first, options.first + options.texts):
        draw = np.random.default_rng(number)
        said = draw.choice(phonemes, int(draw.integers(6, 60)))
        ids = torch.tensor([[1, *(token for spoken in said for token in (int(spoken), 0)), 2]])
        rate = float(draw.uniform(0.5, 2.0))
        before = guard.repeated
        (reference, *states), (found, *others) = (decided(model, ids, number, rate) for model in (plain, tuned))
        frames = [torch.ceil(torch.exp(value) * (1.0 / rate)) for value in (reference, found)]
        wrong += not (torch.equal(*frames) and states == others)
        if guard.repeated == before:
            near += 1
            gain = guard.last.gain
            worst = max(worst, float(((found - reference).abs() / (guard.factor * 2.0**-24 * gain)).max()))
        else:
            assert torch.equal(reference, found), "the untouched parts decided, and computed something else"
        tokens += ids.shape[1]
        if number % 500 == 499:  # noqa: PLR2004 - a line in half a minute
            print(f"{number + 1} texts, {wrong} with other lengths", flush=True)
    assert not holds(torch.tensor([2.0]), torch.tensor([0.0]))
    found = {
        "texts": options.texts, "tokens": tokens, "other_lengths": wrong, "by_margin": near,
        "repeated_untouched": options.texts - near, "largest_share_of_the_bound": worst, "factor": guard.factor,
        "seconds": time.perf_counter() - clock,
    }  # fmt: skip
    print(found)
    if options.json:
        write_whole(options.json, json.dumps(found, indent=2))
    return 1 if wrong or worst >= 1 else 0


if __name__ == "__main__":
    sys.exit(main())
