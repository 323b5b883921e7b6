"""XTTS v2 (coqui-tts) as a backend.

    python examples/xtts_backend.py "Hello there." -o out.wav --reference voice.wav
    python examples/xtts_backend.py "Hello there." -o out.wav --random-weights --seconds 1   # noise, offline

Needs: pip install accelerate_tts "coqui-tts[codec]" six "transformers<5.24"
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from _common import letters, parse, write_wav
from TTS.tts.configs.xtts_config import XttsConfig
from TTS.tts.models import xtts
from TTS.utils.manage import ModelManager

from accelerate_tts import cached_embedding, inference, optimized_model, receipt_of

VOICE = "Ana Florence"
RATE = 24_000
TOKENS_A_SECOND = 21.5


class Loaded(NamedTuple):
    """A model and the voice it speaks with."""

    model: xtts.Xtts
    latents: torch.Tensor
    speaker: torch.Tensor


class XTTSBackend:
    """Speaks a text at once, or as it is being decoded."""

    def __init__(self, make: Callable[[], Loaded], language: str = "en") -> None:
        self._make = make
        self.language = language

    @optimized_model(warmup=["Hello there.", lambda backend: list(backend.stream("Hello there."))])
    async def initialize(self) -> None:
        """Load the model without holding up the event loop."""
        self.model, self.latents, self.speaker = await asyncio.to_thread(self._make)

    @cached_embedding
    def voice(self, reference: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """The voice of a recording: latents of the decoder and a speaker's embedding. A service meets it again."""
        return self.model.get_conditioning_latents(audio_path=[reference])

    def speak_as(self, reference: Path) -> None:
        """Speak with the voice of a recording from here on."""
        self.latents, self.speaker = self.voice(reference)

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        """The speech, as one row of samples."""
        return torch.from_numpy(self.model.inference(text, self.language, self.latents, self.speaker)["wav"])

    @inference
    def stream(self, text: str) -> Iterator[torch.Tensor]:
        """The speech in pieces of some twenty tokens."""
        yield from self.model.inference_stream(text, self.language, self.latents, self.speaker)


def pretrained() -> Loaded:
    """The model from the hub, with a voice of its own. Ask for its licence's terms first."""
    weights, settings, _ = ModelManager().download_model("tts_models/multilingual/multi-dataset/xtts_v2")
    config = XttsConfig()
    config.load_json(settings)
    model = xtts.Xtts(config)
    model.load_checkpoint(config, checkpoint_dir=weights.parent, eval=True)
    return Loaded(model, *model.speaker_manager.speakers[VOICE].values())


def random(seconds: float = 1.0, *, tiny: bool = False) -> Loaded:
    """The architecture with seeded weights, a voice of noise, and a limit on tokens."""
    sizes: dict[str, Any] = {
        "gpt_number_text_tokens": 6681, "gpt_start_text_token": 261, "gpt_stop_text_token": 0,
        "gpt_num_audio_tokens": 1026, "gpt_start_audio_token": 1024, "gpt_stop_audio_token": 1025,
        "gpt_use_perceiver_resampler": True,
    }  # fmt: skip
    if tiny:
        sizes |= {"gpt_layers": 2, "gpt_n_model_channels": 64, "gpt_n_heads": 2, "decoder_input_dim": 64}
    config = XttsConfig()
    for name, value in sizes.items():
        setattr(config.model_args, name, value)
    narrow: dict[str, Any] = {}  # no options of the model's
    if tiny:
        narrow = {"upsample_initial_channel_decoder": 32, "resblock_kernel_sizes_decoder": [3],
                  "resblock_dilation_sizes_decoder": [[1, 3, 5]]}  # fmt: skip
    with patch.object(xtts, "HifiDecoder", partial(xtts.HifiDecoder, **narrow)):
        model = xtts.Xtts(config)
    model.tokenizer = Letters()
    model.eval()  # which also makes what generates
    model.gpt.max_gen_mel_tokens = max(6, round(seconds * TOKENS_A_SECOND))  # upstream cuts five off
    width = config.model_args.gpt_n_model_channels
    return Loaded(model, torch.randn(1, 32, width), torch.randn(1, config.model_args.d_vector_dim, 1))


class Letters:
    """Stands in for the tokeniser, whose vocabulary is a file of the hub."""

    tokenizer = None

    def encode(self, text: str, lang: str) -> list[int]:
        """Ids below those of the start token."""
        del lang
        return letters(text, 261)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, speak, write the file while it is being spoken."""
    options = parse(
        arguments, __doc__,
        reference={"type": Path, "help": "a WAV file of the voice to speak with"}, language={"default": "en"},
    )  # fmt: skip

    def make() -> Loaded:
        made = random(options.seconds, tiny=options.tiny) if options.random_weights else pretrained()
        return Loaded(made.model.to(options.device), made.latents, made.speaker)

    backend = XTTSBackend(make, options.language)
    asyncio.run(backend.initialize())
    if options.reference is not None:
        backend.speak_as(options.reference)
    torch.manual_seed(0)
    write_wav(options.output, backend.stream(options.text), RATE)
    print(receipt_of(backend))


if __name__ == "__main__":
    main()
