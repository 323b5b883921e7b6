"""Speaker encoders: the `VoiceEncoder` of resemblyzer, and Chatterbox's, which is derived from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part

# `embed_utterance` and `inference` call them as modules. One LSTM takes nearly all of the time, and the module around
# it returns what can be compared: an embedding.
_RESEMBLYZER = Known("the speaker encoder", "resemblyzer 0.1", {"": "encoder"}, needs=("lstm", "linear"))
_CHATTERBOX = Known(
    "the speaker encoder",
    "chatterbox-tts 0.1.1 to 0.1.7, chatterbox-light 1.0",
    {"": "encoder"},
    needs=("lstm", "proj"),
)


@register_system("VoiceEncoder")
def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
    """Return the encoder as one part. Its last layer identifies the system."""
    return (_CHATTERBOX if hasattr(module, "proj") else _RESEMBLYZER)(path, module)
