"""Kokoro: `KModel`, a StyleTTS 2 whose vocoder ends in an inverse Fourier transform."""

from __future__ import annotations

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

# The durations come from `bert`, `bert_encoder` and the predictor's text encoder, LSTM and projection, and are rounded
# to frames. The layers without a name here are too small for a change of their own. `decoder` makes the sound.
parts = register_system("KModel", package="kokoro", holders=("KPipeline",))(
    Known(
        "Kokoro",
        "kokoro 0.9",
        {"bert": "encoder", "predictor.text_encoder": "encoder", "text_encoder": "encoder", "decoder": "vocoder"},
        decide=frozenset({"bert", "predictor.text_encoder"}),
        needs=("predictor.lstm", "predictor.duration_proj"),
    )
)
