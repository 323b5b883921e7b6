"""Higgs Audio v2 (as transformers has it) as a backend.

    python examples/higgs_backend.py "Hello there." -o out.wav
    python examples/higgs_backend.py "Hello there." -o out.wav --random-weights --layers 2   # noise, offline

The model has 28 layers and 5.8e9 weights: 23 GB in fp32, which is what --random-weights without --layers makes.

Needs: pip install accelerate_tts "transformers>=5.3" torchaudio
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from _common import letters, parse, write_wav
from transformers import (
    AutoProcessor,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
)

from accelerate_tts import inference, optimized_model, receipt_of

MODEL = "eustlb/higgs-audio-v2-generation-3B-base"
RATE = 24_000
FRAMES_A_SECOND = 25
LONGEST = 30.0


class Loaded(NamedTuple):
    """A model, its codec, and what is around them: text to the model's inputs, codes to samples."""

    model: HiggsAudioV2ForConditionalGeneration
    codec: HiggsAudioV2TokenizerModel
    prepare: Callable[[str], Mapping[str, torch.Tensor]]
    decode: Callable[[torch.Tensor], torch.Tensor]


class HiggsBackend:
    """Speaks a text in one piece.

    `generate(streamer=...)` hands out the codes of each frame as they come, but no sound: the codec has no streaming
    form, and the codebooks lag behind each other. To hear a part early, decode growing pieces, or speak by sentences.
    """

    def __init__(self, make: Callable[[], Loaded], seconds: float) -> None:
        self._make = make
        self.frames = round(seconds * FRAMES_A_SECOND)

    @optimized_model(warmup="Hello there.")
    async def initialize(self) -> None:
        """Load the model without holding up the event loop."""
        self.model, self.codec, self.prepare, self.decode = await asyncio.to_thread(self._make)

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        """The speech, as one row of samples."""
        inputs = {name: value.to(self.model.device) for name, value in self.prepare(text).items()}
        return self.decode(self.model.generate(**inputs, max_new_tokens=self.frames, do_sample=True))


def pretrained(device: str) -> Loaded:
    """The model from the hub."""
    processor = AutoProcessor.from_pretrained(MODEL)

    def prepare(text: str) -> Mapping[str, torch.Tensor]:
        turns = [("system", "Generate audio following instruction."), ("user", text)]
        chat = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns]
        return processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(MODEL, dtype="auto").to(device).eval()
    return Loaded(model, processor.audio_tokenizer, prepare, processor.decode)


def random(device: str = "cpu", layers: int = 28, *, tiny: bool = False) -> Loaded:
    """The architecture with seeded weights, and a codec of its own shape."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "codebook_size": 1026}
    acoustic: dict[str, Any] = {"model_type": "dac", "downsampling_ratios": [8, 5, 4, 2, 3],
                                "upsampling_ratios": [8, 5, 4, 2, 3], "hidden_size": 256}  # fmt: skip
    semantic: dict[str, Any] = {"model_type": "hubert"}
    if tiny:
        sizes |= {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 290,
                  "eos_token_id": 291, "audio_token_id": 292, "audio_bos_token_id": 293,
                  "audio_delay_token_id": 294}  # fmt: skip
        acoustic |= {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "hidden_size": 32,
                     "downsampling_ratios": [32, 30], "upsampling_ratios": [32, 30]}  # fmt: skip
        semantic |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                     "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
                     "num_conv_pos_embedding_groups": 4}  # fmt: skip
    config = HiggsAudioV2Config(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if tiny else torch.bfloat16)  # as it is shipped, and never in twice the memory
    try:
        model = HiggsAudioV2ForConditionalGeneration(config).to(device).eval()
    finally:
        torch.set_default_dtype(before)
    # Bandwidths that make eight codebooks at 25 frames a second, as the model writes them.
    shape = {
        "target_bandwidths": (0.5, 1, 1.5, 2),
        "acoustic_model_config": acoustic,
        "semantic_model_config": semantic,
    }
    codec = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**shape)).to(device).eval()

    def prepare(text: str) -> Mapping[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[*letters(text, 256), config.audio_bos_token_id]])}

    def decode(codes: torch.Tensor) -> torch.Tensor:
        # Codebook k lags k frames behind the first: upstream's processor does the same, and has files of its own.
        count, books = codes.shape[1], codes.shape[2]
        aligned = torch.stack([codes[0, book : count - books + 1 + book, book] for book in range(books)])
        return codec.decode(aligned.clip(0, 1023)[None]).audio_values[0]

    return Loaded(model, codec, prepare, decode)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, speak, write the file."""
    options = parse(
        arguments, __doc__, layers={"type": int, "default": 28, "help": "fewer, to try it in less memory"}
    )  # fmt: skip

    def make() -> Loaded:
        if options.random_weights:
            return random(options.device, options.layers, tiny=options.tiny)
        return pretrained(options.device)

    backend = HiggsBackend(make, options.seconds if options.random_weights else LONGEST)
    asyncio.run(backend.initialize())
    torch.manual_seed(0)
    write_wav(options.output, [backend.synthesize(options.text)], RATE)
    print(receipt_of(backend))


if __name__ == "__main__":
    main()
