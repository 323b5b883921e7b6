"""F5-TTS: `CFM`, a solver that calls its transformer at each step, and `Vocos`, which synthesises the mel."""

from __future__ import annotations

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

# `sample` calls the transformer as a module, once a step with both rows of the guidance. The transformer keeps the text
# of a call in its state, which `sample` clears.
parts = register_system("CFM", package="f5_tts", holders=("F5TTS",))(
    Known("F5-TTS", "f5-tts 1.1", {"transformer": "estimator"}, needs=("transformer.clear_cache", "odeint_kwargs"))
)
# `decode` is not a call of a module, but calls these two. The head ends in an inverse Fourier transform.
vocos = register_system("Vocos")(Known("Vocos", "vocos 0.1", {"backbone": "vocoder", "head": "vocoder"}))
