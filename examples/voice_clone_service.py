"""The speaker encoder of a voice-clone service: reference recordings in, embeddings out, the nearest voice found.

    python examples/voice_clone_service.py alice.wav bob.wav -o voices.json
    python examples/voice_clone_service.py -o voices.json --random-weights    # made-up recordings, a seeded encoder

resemblyzer ships its real weights, so this one needs no hub.

Needs: pip install accelerate_tts resemblyzer "setuptools<81"
"""

from __future__ import annotations

import asyncio
import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import anew, parse
from resemblyzer import VoiceEncoder, preprocess_wav

from accelerate_tts import cached_embedding, inference, optimized_model, receipt_of

RATE = 16_000
Wave = np.ndarray[Any, np.dtype[np.float32]]


class VoiceCloneService:
    """Embeds the voice of a recording. A service meets the same reference again and again."""

    def __init__(self, make: Callable[[], VoiceEncoder], seconds: float = 4.0) -> None:
        self._make = make
        self.example = hum(120.0, seconds)

    @optimized_model(warmup=lambda service: service.embed(service.example))
    async def initialize(self) -> None:
        """Load the encoder without holding up the event loop."""
        self.encoder = await asyncio.to_thread(self._make)

    @cached_embedding
    @inference
    def embed(self, recording: Wave) -> Wave:
        """The voice as a vector of length one."""
        return self.encoder.embed_utterance(recording)

    def nearest(self, recording: Wave, voices: dict[str, Wave]) -> str:
        """The name of the most similar of some known voices."""
        voice = self.embed(recording)
        return max(voices, key=lambda name: float(voices[name] @ voice))


def pretrained(device: str) -> VoiceEncoder:
    """The encoder with its own weights."""
    return VoiceEncoder(device, verbose=False).eval()


def random(device: str = "cpu") -> VoiceEncoder:
    """The encoder with seeded weights."""
    encoder = pretrained(device)
    for module in encoder.modules():
        if isinstance(module, (torch.nn.LSTM, torch.nn.Linear)):
            module.reset_parameters()
    return encoder


def hum(pitch: float, seconds: float) -> Wave:
    """A made-up recording: a buzz with a wavering pitch and a little noise."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * pitch * (time + 0.01 * np.sin(5 * time))
    noise = np.random.default_rng(int(pitch)).normal(0, 0.01, time.shape)
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 12)) + noise).astype(np.float32)


def recording_of(path: Path) -> Wave:
    """A recording as resemblyzer wants it: mono, at its rate, without long silences."""
    with wave.open(str(path), "rb") as file:
        channels, rate = file.getnchannels(), file.getframerate()
        if file.getsampwidth() != np.dtype(np.int16).itemsize:
            raise SystemExit(f"{path} must have samples of 16 bits")
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16).reshape(-1, channels)
    return preprocess_wav(samples.mean(axis=1).astype(np.float32) / 32768, rate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, embed the recordings, say which are alike, write the file."""
    options = parse(arguments, __doc__, speaks=False)
    service = VoiceCloneService(
        lambda: random(options.device) if options.random_weights else pretrained(options.device),
        1.6 if options.tiny else 4.0,
    )
    asyncio.run(service.initialize())
    recordings = {path.stem: recording_of(path) for path in options.recordings} or {
        f"{p} Hz": hum(p, 3) for p in (100, 150, 220)
    }
    voices = {name: service.embed(recording) for name, recording in recordings.items()}
    for name, recording in recordings.items():
        others = {other: voice for other, voice in voices.items() if other != name}
        print(f"{name}: nearest is {service.nearest(recording, others) if others else name}")
    with anew(options.output) as made:
        made.write_text(json.dumps({name: voice.tolist() for name, voice in voices.items()}), encoding="utf-8")
    print(receipt_of(service))


if __name__ == "__main__":
    main()
