"""What is known of each system. Systems are known by the names of their classes; none of them is imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.inspection.object_tree import members_of as members
from accelerate_tts.models import chatterbox, generic, higgs, speaker, vits, xtts
from accelerate_tts.plan import ModelPlan, Part

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


# Of each upstream package, how the names begin of what holds or is one of the systems above.
_UPSTREAM = {
    "boson_multimodal": ("HiggsAudioModel", "HiggsAudioServe"),
    "chatterbox": ("Chatterbox",),
    "TTS": ("Vits", "Xtts"),
}
_DEPTH = 3  # a service, its backend, upstream's own object


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
    known: set[str] = set()
    for path, module in modules.items():
        name = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _KNOWN), None)
        if name is not None:
            known |= {_package(cls) for cls in type(module).__mro__}
        parts += (generic.parts if name is None else _KNOWN[name])(path, module)
    _say_what_is_not_known(subject, known)
    # Parts of unknown models are taken apart once the first pass has shown where its time goes.
    refine = generic.refiner(tuple(parts)) if any(part.kind == "model" for part in parts) else None
    return ModelPlan(type(subject).__name__, tuple(modules.values()), tuple(parts), refine)


def _say_what_is_not_known(subject: object, known: Collection[str]) -> None:
    """An event for each upstream package whose object is there, and nothing in it is of a class that we know."""
    from torch import nn

    strange: dict[str, str] = {}
    level = [subject]
    for _ in range(_DEPTH):
        inner: list[object] = []
        for value in level:
            held = [] if isinstance(value, nn.Module) else [item for _, item in members(value)]
            inner += held
            if not isinstance(value, nn.Module) and not any(isinstance(item, nn.Module) for item in held):
                continue
            for cls in type(value).__mro__:
                package = _package(cls)
                if package not in known and cls.__name__.startswith(_UPSTREAM.get(package, ())):
                    strange.setdefault(package, cls.__qualname__)
        level = inner
    for package, name in strange.items():
        reason = (
            f"in {name} of {package} nothing is of a class that we know: a release of another shape, or parts of it"
        )
        emit(NotApplied(f"the plan for {name}", f"{reason}; its parts are found by watching"))


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
