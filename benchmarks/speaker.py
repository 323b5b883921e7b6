"""The speaker encoder with its real weights on real speech: plain against decorated, and the 8-bit refusal.

    python benchmarks/speaker.py [--seconds N ...] [--precision exact fast] [--json FILE]

Run nothing else meanwhile. `resemblyzer` embeds the speech files that the `s3tokenizer` package ships, so many seconds
of them, another piece at each call: every voice is a new one. Two encoders run in turn in one process. One of them is
tuned exactly, and once more under `fast`, where the 8-bit LSTM has to be refused. What holds for the process (threads
of OpenBLAS, kept constants) is switched with the encoder. Of both it is shown where the time of a call goes: encoder,
mel spectrogram, and the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # webrtcvad's import of pkg_resources

import numpy as np
import s3tokenizer
import soundfile
import torch
from resemblyzer import VoiceEncoder, audio, preprocess_wav

from accelerate_tts import Receipt, get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.timing import compare_speed


def speech(seconds: float = 12) -> Any:
    files = sorted(Path(s3tokenizer.__file__).parent.rglob("*.wav"))
    wave = np.concatenate([soundfile.read(file)[0] for file in files]).astype(np.float32)
    return preprocess_wav(np.resize(wave, round(seconds * 16_000)), 16_000)


def split(call: Callable[[Any], Any], wave: Any) -> dict[str, float]:
    """Median milliseconds of a call, and of what is in it."""
    inside: dict[str, list[float]] = {"encoder": [], "mel": []}

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside[name].append(time.perf_counter() - start)

        return run

    forward, mel, total = VoiceEncoder.__call__, audio.wav_to_mel_spectrogram, []
    VoiceEncoder.__call__, audio.wav_to_mel_spectrogram = timed("encoder", forward), timed("mel", mel)
    try:
        for number in range(25):
            piece = np.roll(wave, 1000 * number)
            start = time.perf_counter()
            call(piece)
            total.append(time.perf_counter() - start)
    finally:
        del VoiceEncoder.__call__  # it is inherited
        audio.wav_to_mel_spectrogram = mel
    found = {name: 1e3 * statistics.median(times) for name, times in (("total", total), *inside.items())}
    return {**found, "rest": found["total"] - found["encoder"] - found["mel"]}


def measure(precision: str, wave: Any) -> dict[str, Any]:
    class Service:
        @optimized_model(warmup=lambda self: self.embed(wave), precision=precision)
        def load(self) -> None:
            self.encoder = VoiceEncoder("cpu", verbose=False)

        @inference
        def embed(self, wave: Any) -> Any:
            return self.encoder.embed_utterance(wave)

    service, plain = Service(), VoiceEncoder("cpu", verbose=False)
    service.load()
    receipt = receipt_of(service)
    assert isinstance(receipt, Receipt)
    print(receipt, flush=True)
    cosine = float(plain.embed_utterance(wave) @ service.embed(wave))
    tuning = get_performance_optimizer().tuning_of(service)
    assert tuning is not None
    state: dict[str, Any] = {}

    def off() -> None:
        tuning.undo()
        state["call"] = plain.embed_utterance

    def on() -> None:
        for change in tuning.changes:
            change.on()
        state["call"] = service.embed

    count = itertools.count()
    timing = compare_speed(lambda: state["call"](np.roll(wave, 977 * next(count))), off, on, "cpu", 12.0)
    on()
    after = split(service.embed, wave)
    off()
    return {
        "where_before": split(plain.embed_utterance, wave), "where_after": after,
        "before": timing.before, "after": timing.after, "ratio": timing.ratio, "low": timing.low, "high": timing.high,
        "cosine": cosine, "refused": [f"{s.stage}: {s.reason}" for s in receipt.stages if s.reason.startswith("wrong")],
        "kept": [stage.stage for stage in receipt.kept], "tuning_seconds": receipt.seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, nargs="*", default=[12.0])
    parser.add_argument("--precision", nargs="*", default=["exact", "fast"], choices=["exact", "balanced", "fast"])
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {
        f"{precision}, {seconds:g} s": measure(precision, speech(seconds))
        for seconds in options.seconds
        for precision in options.precision
    }
    for name, found in results.items():
        for when in ("before", "after"):
            where = ", ".join(f"{part} {value:.1f}" for part, value in found[f"where_{when}"].items())
            print(f"{name}, {when}, ms: {where}")
        print(
            f"{name}: {1e3 * found['before']:.0f} ms -> {1e3 * found['after']:.0f} ms, {found['ratio']:.2f}x"
            f" ({found['low']:.2f} .. {found['high']:.2f}), cosine {found['cosine']:.6f}, kept {found['kept']},"
            f" refused {found['refused']}"
        )
    if options.json:
        write_whole(options.json, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
