"""Chatterbox: `T3`, which generates speech tokens, and `S3Token2Wav` (imported as `S3Gen`), which synthesises them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

if TYPE_CHECKING:
    from accelerate_tts.plan import Kind

_RELEASES = "chatterbox-tts 0.1.1 to 0.1.7, chatterbox-light 1.0"
_registered = partial(register_system, package="chatterbox", holders=("Chatterbox",))

# `T3.inference` and `inference_turbo` have loops of their own, which call the transformer as a module. They wrap it in
# a new object at each call, so the transformer is the outermost persistent module. The loop samples from two rows of
# logits with `cfg_weight`, 0.5 by default.
t3 = _registered("T3")(
    Known(
        "Chatterbox's T3", _RELEASES, {"tfmr": "decoder"}, heads={"tfmr": ("speech_head",)}, guidance=0.5,
        reads_alone=True,
    )
)  # fmt: skip
# The solver calls `estimator.forward` ten times, bypassing its hooks; timing the whole solver would take ten times as
# long. The vocoder is run by `mel2wav.inference`.
_PARTS: dict[str, Kind] = {"flow.encoder": "encoder", "flow.decoder.estimator": "estimator"}
_METHODS = {"flow.decoder.estimator": "forward", "mel2wav": "inference"}
token_to_mel = _registered("S3Token2Mel")(Known("Chatterbox's S3Gen", _RELEASES, _PARTS, methods=_METHODS))
token_to_wave = _registered("S3Token2Wav")(
    Known("Chatterbox's S3Gen", _RELEASES, {**_PARTS, "mel2wav": "vocoder"}, methods=_METHODS)
)
