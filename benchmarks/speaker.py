"""The speaker encoder with its real weights on real speech: plain against decorated, and the 8-bit refusal.

    python benchmarks/speaker.py [--json FILE]

Run nothing else meanwhile. `resemblyzer` embeds the speech files that the `s3tokenizer` package ships, 12 s of them.
Two encoders run in turn in one process. One of them is tuned exactly, and once more under `fast`, where the 8-bit LSTM
has to be refused. What holds for the process (OpenBLAS's threads) is switched with the encoder.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # webrtcvad's import of pkg_resources

import numpy as np
import s3tokenizer
import soundfile
import torch
from resemblyzer import VoiceEncoder, preprocess_wav

from accelerate_tts import Receipt, get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.engine.measure import compare_speed

SECONDS = 12


def speech() -> Any:
    files = sorted(Path(s3tokenizer.__file__).parent.rglob("*.wav"))
    wave = np.concatenate([soundfile.read(file)[0] for file in files]).astype(np.float32)
    return preprocess_wav(np.resize(wave, SECONDS * 16_000), 16_000)


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
    tuning = get_performance_optimizer()._tuning_of(service)
    assert tuning is not None
    state: dict[str, Any] = {}

    def off() -> None:
        tuning.undo()
        state["call"] = plain.embed_utterance

    def on() -> None:
        for change in tuning.changes:
            change.on()
        state["call"] = service.embed

    timing = compare_speed(lambda: state["call"](wave), off, on, "cpu", 20.0)
    off()
    return {
        "before": timing.before, "after": timing.after, "ratio": timing.ratio, "low": timing.low, "high": timing.high,
        "cosine": cosine, "refused": [f"{s.stage}: {s.reason}" for s in receipt.stages if s.reason.startswith("wrong")],
        "kept": [stage.stage for stage in receipt.kept], "tuning_seconds": receipt.seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    wave = speech()
    results = {precision: measure(precision, wave) for precision in ("exact", "fast")}
    for precision, found in results.items():
        print(
            f"{precision}: {1e3 * found['before']:.0f} ms -> {1e3 * found['after']:.0f} ms, {found['ratio']:.2f}x"
            f" ({found['low']:.2f} .. {found['high']:.2f}), cosine {found['cosine']:.6f}, kept {found['kept']},"
            f" refused {found['refused']}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
