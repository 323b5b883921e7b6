"""An MMS voice (transformers' VITS) as a backend.

    python examples/mms_backend.py "Hello there." -o out.wav                    # facebook/mms-tts-eng from the hub
    python examples/mms_backend.py "Hello there." -o out.wav --random-weights   # offline: the sound is noise

Needs: pip install accelerate_tts transformers
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch
from _common import letters, parse, write_wav
from transformers import AutoTokenizer, VitsConfig, VitsModel

from accelerate_tts import inference, optimized_model, receipt_of

VOICE = "facebook/mms-tts-eng"
Tokenize = Callable[[str], torch.Tensor]


class MMSBackend:
    """Speaks a text in one piece: VITS has no streaming form."""

    def __init__(self, make: Callable[[], tuple[VitsModel, Tokenize]]) -> None:
        self._make = make

    @optimized_model(warmup=["Hello there.", "The quick brown fox jumps over the lazy dog, and does so every day."])
    async def initialize(self) -> None:
        """Load the model without holding up the event loop."""
        self.model, self.tokenize = await asyncio.to_thread(self._make)

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        """The speech, as one row of samples."""
        return self.model(self.tokenize(text).to(self.model.device)).waveform[0]


def pretrained() -> tuple[VitsModel, Tokenize]:
    """The voice from the hub."""
    tokenizer = AutoTokenizer.from_pretrained(VOICE)
    return VitsModel.from_pretrained(VOICE).eval(), lambda text: tokenizer(text, return_tensors="pt").input_ids


def random(*, tiny: bool = False) -> tuple[VitsModel, Tokenize]:
    """The architecture of all MMS voices with seeded weights."""
    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "flow_size": 32, "upsample_initial_channel": 64,
        "duration_predictor_filter_channels": 32, "posterior_encoder_num_wavenet_layers": 1,
        "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
    }  # fmt: skip
    config = VitsConfig(vocab_size=38, spectrogram_bins=513, **size if tiny else {})
    return VitsModel(config).eval(), lambda text: torch.tensor([letters(text, 38)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, speak, write the file."""
    options = parse(arguments, __doc__)

    def make() -> tuple[VitsModel, Tokenize]:
        model, tokenize = random(tiny=options.tiny) if options.random_weights else pretrained()
        return model.to(options.device), tokenize

    backend = MMSBackend(make)
    asyncio.run(backend.initialize())
    torch.manual_seed(0)
    write_wav(options.output, [backend.synthesize(options.text)], backend.model.config.sampling_rate)
    print(receipt_of(backend))


if __name__ == "__main__":
    main()
