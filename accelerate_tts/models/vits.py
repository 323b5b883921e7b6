"""VITS as transformers has it (`VitsModel`, the class of all MMS voices). Known range: transformers 4.48 to 5.23."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.engine.plan import Kind, Part
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.models import generic

if TYPE_CHECKING:
    from torch import nn

__all__ = ["parts"]

# Their outputs become durations, which are rounded up to whole frames.
_DECIDE = {"text_encoder", "duration_predictor"}
# The four that run at synthesis; `posterior_encoder` is for training.
_PARTS: dict[str, Kind] = {
    "text_encoder": "encoder",
    "duration_predictor": "flow",
    "flow": "flow",
    "decoder": "vocoder",
}


def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
    """The four parts that synthesis runs through."""
    found = {name: getattr(module, name, None) for name in _PARTS}
    missing = [name for name, part in found.items() if part is None]
    if missing:
        reason = f"{type(module).__name__} has no {', '.join(missing)}: a release we do not know; treated as a whole"
        emit(NotApplied("the plan for VITS", reason))
        return generic.parts(path, module)
    prefix = f"{path}." if path else ""
    return tuple(
        Part(prefix + name, _PARTS[name], part, decides=name in _DECIDE)
        for name, part in found.items()
        if part is not None
    )
