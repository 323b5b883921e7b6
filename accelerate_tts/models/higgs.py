"""Higgs Audio v2: transformers' `HiggsAudioV2ForConditionalGeneration`, and `HiggsAudioModel` of boson-multimodal."""

from __future__ import annotations

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

# The two heads are small beside the decoder, and `generate` calls the whole model with ids that each step changes.
parts = register_system("HiggsAudioV2ForConditionalGeneration")(
    Known(
        "Higgs Audio", "transformers 5.3 to 5.24", {"model": "decoder"}, heads={"model": ("audio_lm_head",)},
        codebooks="config.num_codebooks", reads_alone=True,
    )
)  # fmt: skip
# `decode` of the codec is not a call of a module, but its decoder is called as one.
codec = register_system("HiggsAudioV2TokenizerModel")(
    Known("Higgs Audio's codec", "transformers 5.3 to 5.24", {"acoustic_decoder": "vocoder"})
)
# `generate` calls this class itself with the cache, and gets logits of text and of sound. Known from its source and
# from building it (`make releases`); it was never run.
boson = register_system(
    "HiggsAudioModel", package="boson_multimodal", holders=("HiggsAudioModel", "HiggsAudioServe")
)(
    Known(
        "Higgs Audio", "boson-multimodal 0.1", {"": "decoder"}, needs=("layers", "embed_tokens"),
        heads={"": ("audio_decoder_proj.audio_lm_head",)}, codebooks="audio_num_codebooks", reads_alone=True,
    )
)  # fmt: skip
