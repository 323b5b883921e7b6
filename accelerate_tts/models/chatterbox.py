"""Chatterbox: `T3`, which writes speech tokens, and `S3Token2Wav` (imported as `S3Gen`), which voices them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

if TYPE_CHECKING:
    from accelerate_tts.plan import Kind

__all__ = ["t3", "token_to_mel", "token_to_wave"]

_RELEASES = "chatterbox-tts 0.1.1 to 0.1.7, chatterbox-light 1.0"
_registered = partial(register_system, package="chatterbox", holders=("Chatterbox",))

# `T3.inference` and `inference_turbo` are loops of their own; both call the transformer as a module. The loop wraps it
# in an object that it makes anew at every call, so the transformer itself is the outermost thing that stays.
# The loop samples from two rows of logits with `cfg_weight`, 0.5 if nothing else is said.
t3 = _registered("T3")(
    Known(
        "Chatterbox's T3", _RELEASES, {"tfmr": "decoder"}, heads={"tfmr": ("speech_head",)}, guidance=0.5,
        reads_alone=True,
    )
)  # fmt: skip
# The solver calls `estimator.forward` ten times, past its hooks; to time the solver as a whole would take ten
# times as long. The vocoder is driven by `mel2wav.inference`.
_PARTS: dict[str, Kind] = {"flow.encoder": "encoder", "flow.decoder.estimator": "estimator"}
_METHODS = {"flow.decoder.estimator": "forward", "mel2wav": "inference"}
token_to_mel = _registered("S3Token2Mel")(Known("Chatterbox's S3Gen", _RELEASES, _PARTS, methods=_METHODS))
token_to_wave = _registered("S3Token2Wav")(
    Known("Chatterbox's S3Gen", _RELEASES, {**_PARTS, "mel2wav": "vocoder"}, methods=_METHODS)
)
