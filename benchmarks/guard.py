"""Cost of the guard as a share of a call: the demo's voice, some three seconds of speech.

    python benchmarks/guard.py [--pairs N] [--json FILE]

Run nothing else meanwhile. The guarded and the unguarded call are made in turn, A B B A, and the median of the paired
ratios is given. A call is longer than the guard by some thousand times and varies by more than it costs; so what the
guard does is also timed by itself (its look-up, the random states, the text, the look at the output), and given as a
share of the median call. That is what the limit of 1 % is about.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from accelerate_tts import inference
from accelerate_tts.cli.demo.backends import PlainBackend, speak_text
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.runtime import rng
from accelerate_tts.runtime.guard import checks
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.findings import Tuning

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more."
LIMIT = 0.01
PARTS = 301


class Backend(PlainBackend):
    """The demo's backend behind `@inference`, loaded without tuning."""

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        return speak_text(self.voice, text)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(function: Callable[[], object]) -> float:
    return statistics.median(seconds(function) for _ in range(PARTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    plain, guarded = Backend(), Backend()
    plain.load()
    guarded.voice = plain.voice
    with guards.listening() as listener:
        wave = plain.synthesize(TEXT)
    tuning = Tuning(Receipt("voice", "cpu", {}))  # without a change: the same model on both sides
    watcher = guards.Guard("voice", tuning, listener.expected, 3)
    guards.protect(guarded, watcher)

    ratios, calls = [], []
    for number in range(options.pairs):
        pair = [plain, guarded] if number % 2 else [guarded, plain]
        times = {id(backend): seconds(lambda backend=backend: backend.synthesize(TEXT)) for backend in pair}
        calls.append(times[id(plain)])
        ratios.append(times[id(guarded)] / times[id(plain)])
    call = statistics.median(calls)
    units, stats = checks.units_of((TEXT,), {}), checks.audio_stats(wave)
    parts = {
        "look-up": median(lambda: guards.watchers_of(guarded, (TEXT,), {})),
        "random states": median(lambda: rng.random_states((TEXT,))),
        "text": median(lambda: checks.units_of((TEXT,), {})),
        "output": median(lambda: checks.audio_stats(wave)),
        "verdict": median(lambda: watcher.judge("Backend.synthesize", units, stats, whole=True)),
    }
    share = sum(parts.values()) / call
    audio = wave.shape[-1] / plain.voice.sampling_rate
    print(f"{audio:.1f} s of speech, a call takes {call * 1e3:.1f} ms, {torch.get_num_threads()} threads")
    for name, took in parts.items():
        print(f"{name:14} {took * 1e6:7.1f} us")
    print(f"all of it is {share:.2%} of a call ({'within' if share <= LIMIT else 'OVER'} {LIMIT:.0%})")
    print(f"guarded / unguarded, in turn: {statistics.median(ratios):.4f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if options.json:
        content = {"audio_seconds": audio, "call_seconds": call, "parts_seconds": parts, "share": share}
        write_whole(options.json, json.dumps({**content, "ratios": ratios}, indent=2))
    if share > LIMIT:
        raise SystemExit(f"the guard costs {share:.2%} of a call, {LIMIT:.0%} is the limit")


if __name__ == "__main__":
    main()
