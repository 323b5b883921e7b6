"""VITS: transformers' `VitsModel`, the class of all MMS voices, and coqui-tts's `Vits`."""

from __future__ import annotations

from accelerate_tts.models.named import Known

__all__ = ["coqui", "parts"]

# The outputs of these two become durations, which are rounded up to whole frames. The others that run at synthesis are
# the flow and the vocoder; `posterior_encoder` is for training.
_DECIDE = frozenset({"text_encoder", "duration_predictor"})

parts = Known(
    "VITS",
    "transformers 4.46 to 5.23",
    {"text_encoder": "encoder", "duration_predictor": "flow", "flow": "flow", "decoder": "vocoder"},
    _DECIDE,
)
coqui = Known(
    "VITS",
    "coqui-tts 0.27 to 0.28",
    {"text_encoder": "encoder", "duration_predictor": "flow", "flow": "flow", "waveform_decoder": "vocoder"},
    _DECIDE,
)
