"""XTTS (coqui-tts's `Xtts`): a GPT-2 that generates audio tokens, run once more for its latents, and a HiFi-GAN."""

from __future__ import annotations

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

# `gpt.gpt` is also `gpt.gpt_inference.transformer`: `generate` and the stream use the latter, the pass for the latents
# the former, so the vocoder reads the hidden states, too. `speaker_encoder` and the conditioning run once a voice, and
# are not optimised.
parts = register_system("Xtts", package="TTS", holders=("Xtts",))(
    Known(
        "XTTS",
        "coqui-tts 0.27 to 0.28",
        {"gpt.gpt": "decoder", "hifigan_decoder.waveform_decoder": "vocoder"},
        heads={"gpt.gpt": ("gpt.final_norm", "gpt.mel_head")},
    )
)
