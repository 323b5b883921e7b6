"""Known systems that can be streamed, by the names of their classes. None is imported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from accelerate_tts.streaming.systems import chatterbox, higgs, vits, xtts

if TYPE_CHECKING:
    from torch import Tensor

Body = Callable[[threading.Event], Iterator["Tensor"]]
"""Takes the event that is set when the stream is left, and yields pieces of shape (1, samples)."""

SYSTEMS: dict[str, Callable[..., Body]] = {
    "ChatterboxTTS": chatterbox.body,
    "ChatterboxMultilingualTTS": chatterbox.body,
    "ChatterboxTurboTTS": chatterbox.body,
    "Xtts": xtts.body,
    "HiggsAudioV2ForConditionalGeneration": higgs.body,
    "VitsModel": vits.body,
}
