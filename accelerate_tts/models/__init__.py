"""What is known of each system. Systems are known by the names of their classes; none of them is imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.engine.plan import ModelPlan, Part, find_modules
from accelerate_tts.models import chatterbox, generic, higgs, speaker, vits, xtts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import nn

__all__ = ["describe"]

# Class name (of the module or a class it derives from) -> what names its parts.
_KNOWN: dict[str, Callable[[str, nn.Module], tuple[Part, ...]]] = {
    "HiggsAudioModel": higgs.boson,
    "HiggsAudioV2ForConditionalGeneration": higgs.parts,
    "HiggsAudioV2TokenizerModel": higgs.codec,
    "S3Token2Mel": chatterbox.token_to_mel,
    "S3Token2Wav": chatterbox.token_to_wave,
    "T3": chatterbox.t3,
    "Vits": vits.coqui,
    "VitsModel": vits.parts,
    "VoiceEncoder": speaker.parts,
    "Xtts": xtts.parts,
}


def describe(subject: object, only: Collection[nn.Module] | None = None) -> ModelPlan:
    """Say what a loaded object consists of.

    Args:
        subject: A module, or an object, tuple or mapping that holds modules.
        only: Of its outermost modules, those that count; all of them if not given.
    """
    modules = find_modules(subject)
    if only is not None:
        wanted = {id(module) for module in only}
        modules = {path: module for path, module in modules.items() if id(module) in wanted}
    parts: list[Part] = []
    for path, module in modules.items():
        handler = next((_KNOWN[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _KNOWN), generic.parts)
        parts += handler(path, module)
    # Parts of unknown models are taken apart once the first pass has shown where its time goes.
    refine = generic.refiner(tuple(parts)) if any(part.kind == "model" for part in parts) else None
    return ModelPlan(type(subject).__name__, tuple(modules.values()), tuple(parts), refine)
