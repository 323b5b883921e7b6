"""The demo's voice, plain against decorated, in turn: cold start, warm ratio, exactness, and the arithmetic floor.

    python benchmarks/voice.py [--pairs N] [--precision exact|balanced|fast] [--json FILE]

Run nothing else meanwhile. The floor is what the same multiplications take at the rate at which this machine multiplies
large fp32 matrices, measured in the same run. What the two say is compared by log-spectral distance, and by the words
that an offline recogniser (pocketsphinx) hears.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from accelerate_tts import receipt_of
from accelerate_tts.cli.demo.command import compare_backends
from accelerate_tts.cli.demo.phonemes import sentences
from accelerate_tts.cli.receipt import show
from accelerate_tts.cli.tables import table
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.compare import spectral_distance

TEXT = "The quick brown fox jumps over the lazy dog, and every word of it is spoken on your own machine."


def matrix_rate() -> float:
    """Best fp32 multiply-add rate of this machine on a large product, in FLOP/s."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    a @ b
    times = []
    for _ in range(15):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1536**3 / min(times)


def words(wave: torch.Tensor, rate: int) -> list[str]:
    """Return the words that a recogniser hears in a waveform of shape (samples,)."""
    from pocketsphinx import Decoder

    # To the recogniser's 16,000 Hz, by dropping the spectrum above 8 kHz.
    count = int(len(wave) * 16000 / rate)
    slow = torch.fft.irfft(torch.fft.rfft(wave.float())[: count // 2 + 1], n=count) * (count / len(wave))
    decoder = Decoder(samprate=16000, loglevel="FATAL")
    decoder.start_utt()
    decoder.process_raw((slow.clamp(-1, 1) * 32000).to(torch.int16).numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return [] if heard is None else heard.hypstr.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--precision", default="exact", choices=["exact", "balanced", "fast"])
    options = parser.parse_args()
    os.environ["ACCELERATE_TTS_PRECISION"] = options.precision
    console = Console(highlight=False, width=110)
    plain, decorated, comparison = compare_backends(sentences(TEXT), options.pairs, console)
    console.print(table(comparison.rows(), "Plain against decorated, in turn", {"plain", "decorated"}))
    receipt = receipt_of(decorated)
    assert receipt is not None
    show(receipt, console)
    waves = []
    for backend in (plain, decorated):
        torch.manual_seed(0)
        waves.append(backend.synthesize(TEXT))
    same_length = waves[0].shape == waves[1].shape
    distance = spectral_distance(*waves) if same_length else None
    heard = [words(wave, plain.voice.sampling_rate) for wave in waves]
    console.print(
        f"{options.precision}: log-spectral distance "
        + (f"{distance:.2f} dB" if same_length else "unknown (other lengths)")
        + f"; recognised words {'the same' if heard[0] == heard[1] else 'differ'}:"
    )
    for name, found in zip(("plain", "decorated"), heard, strict=True):
        right = len(set(found) & set(TEXT.lower().replace(",", "").replace(".", "").split()))
        console.print(f"  {name}, {right} of the text's words: {' '.join(found)}")
    with FlopCounterMode(display=False) as counter:
        plain.synthesize(TEXT)
    rate = matrix_rate()
    floor = counter.get_total_flops() / rate
    median = statistics.median(comparison.decorated)
    console.print(
        f"{counter.get_total_flops() / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s:"
        f" floor {floor * 1e3:.0f} ms, warm / floor = {median / floor:.2f}"
    )
    if options.json:
        content = {
            "ratio": comparison.ratio,
            "cold_ratio": comparison.plain_cold / comparison.decorated_cold,
            "floor_seconds": floor,
            "precision": options.precision,
            "spectral_distance_db": distance,
            "words": heard,
            **dataclasses.asdict(comparison),
            "receipt": json.loads(receipt.to_json()),
        }
        write_whole(options.json, json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
