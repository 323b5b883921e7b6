"""Qwen3-TTS: a talker that generates the first code of a frame, a predictor of its other codes, and a codec.

Known from the source of qwen-tts 0.1, which asks for one release of transformers. It ran at small size with random
weights (`make strangers`), never with published ones.
"""

from __future__ import annotations

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

_RELEASES = "qwen-tts 0.1"
# `generate` of the talker calls `generate` of the code predictor at each step. The predictor has another head for each
# code, and reads the talker's hidden states, too.
parts = register_system("Qwen3TTSForConditionalGeneration", package="qwen_tts", holders=("Qwen3TTSModel",))(
    Known(
        "Qwen3-TTS", _RELEASES, {"talker.model": "decoder", "talker.code_predictor.model": "decoder"},
        heads={"talker.model": ("talker.codec_head",)},
    )
)  # fmt: skip
# `chunked_decode` calls the decoder as a module. The encoder runs once a voice.
codec = register_system("Qwen3TTSTokenizerV2Model")(
    Known("Qwen3-TTS's codec", _RELEASES, {"decoder": "vocoder"}, needs=("decoder.chunked_decode",))
)
