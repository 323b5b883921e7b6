"""Chatterbox as a backend.

    python examples/chatterbox_backend.py "Hello there." -o out.wav --reference voice.wav
    python examples/chatterbox_backend.py "Hello there." -o out.wav --random-weights --seconds 1   # noise, offline

Needs: pip install accelerate_tts chatterbox-light (or chatterbox-tts)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _common import at_most, letters, parse, sentences, write_wav
from chatterbox.models.s3gen import s3gen
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.tts import ChatterboxTTS, Conditionals

from accelerate_tts import inference, optimized_model, receipt_of

TOKENS_A_SECOND = 25


class ChatterboxBackend:
    """Speaks a text sentence by sentence."""

    def __init__(self, make: Callable[[], ChatterboxTTS]) -> None:
        self._make = make

    @optimized_model(warmup="Hello there.")
    async def initialize(self) -> None:
        """Load the model without holding up the event loop."""
        self.model = await asyncio.to_thread(self._make)

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        """The speech, as one row of samples."""
        return torch.cat([self.model.generate(sentence) for sentence in sentences(text)], dim=-1)

    @inference
    def stream(self, text: str) -> Iterator[torch.Tensor]:
        """The speech of each sentence as soon as it is there."""
        for sentence in sentences(text):
            yield self.model.generate(sentence)


def pretrained(device: str, reference: Path | None) -> ChatterboxTTS:
    """The model from the hub, with a voice of one's own if there is a reference."""
    model = ChatterboxTTS.from_pretrained(device)
    if reference is not None:
        model.prepare_conditionals(reference)
    return model


def random(device: str = "cpu", seconds: float = 1.0, *, tiny: bool = False) -> ChatterboxTTS:
    """The architecture with seeded weights, a voice of noise, and a limit on tokens for each sentence."""
    t3, s3 = (small_t3(), small_s3gen()) if tiny else (T3(), s3gen.S3Token2Wav())
    # Chatterbox's loop ends at the stop token, which random weights hardly ever choose.
    t3.inference = at_most(t3.inference, max_new_tokens=max(1, round(seconds * TOKENS_A_SECOND)))
    frames = 20 if tiny else 100  # of the reference, at 50 a second
    voice = Conditionals(
        T3Cond(torch.rand(1, 256), None, torch.randint(0, 6561, (1, 150)), emotion_adv=0.5 * torch.ones(1, 1, 1)),
        {
            "prompt_token": torch.randint(0, 6561, (1, frames // 2)), "prompt_token_len": torch.tensor([frames // 2]),
            "prompt_feat": torch.randn(1, frames, 80), "prompt_feat_len": None, "embedding": torch.randn(1, 192),
        },
    )  # fmt: skip
    parts = [part.to(device).eval() for part in (t3, s3, VoiceEncoder())]
    return ChatterboxTTS(*parts, Letters(), device, voice.to(device))


class Letters:
    """Stands in for the tokeniser, whose vocabulary is a file of the hub."""

    def text_to_tokens(self, text: str) -> torch.Tensor:
        """Ids between those of the stop and the start token."""
        return torch.tensor([letters(text, 255)])


def small_t3() -> T3:
    """The class at small size; its Perceiver has one size only, and is left out."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    config = T3Config()
    config.llama_config_name, config.use_perceiver_resampler = "small", False
    with patch.dict(LLAMA_CONFIGS, small={**LLAMA_CONFIGS["Llama_520M"], **size}):
        return T3(config)


def small_s3gen() -> s3gen.S3Token2Wav:
    """The classes at small size. Upstream writes the sizes into the constructor, so its classes are given others."""

    def smaller(name: str, **size: Any) -> Callable[..., Any]:
        cls = getattr(s3gen, name)
        return lambda *args, **kwargs: cls(*args, **{**kwargs, **size})

    replaced = {
        "S3Tokenizer": lambda _name: torch.nn.Linear(1, 1),  # for references; whose device upstream asks
        "UpsampleConformerEncoder": smaller(
            "UpsampleConformerEncoder", attention_heads=2, linear_units=64, num_blocks=1
        ),
        "ConditionalDecoder": smaller("ConditionalDecoder", channels=[64], n_blocks=1, num_mid_blocks=1, num_heads=2),
        "HiFTGenerator": smaller("HiFTGenerator", base_channels=32),
        "ConvRNNF0Predictor": smaller("ConvRNNF0Predictor", cond_channels=32),
    }
    with patch.multiple(s3gen, **replaced):
        return s3gen.S3Token2Wav()


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, speak, write the file while it is being spoken."""
    options = parse(arguments, __doc__, reference={"type": Path, "help": "a WAV file of the voice to speak with"})

    def make() -> ChatterboxTTS:
        if options.random_weights:
            return random(options.device, options.seconds, tiny=options.tiny)
        return pretrained(options.device, options.reference)

    backend = ChatterboxBackend(make)
    asyncio.run(backend.initialize())
    torch.manual_seed(0)
    write_wav(options.output, backend.stream(options.text), backend.model.sr)
    print(receipt_of(backend))


if __name__ == "__main__":
    main()
