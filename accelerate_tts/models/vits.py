"""VITS: transformers' `VitsModel`, the class of all MMS voices, and coqui-tts's `Vits`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.models.catalogue import register_system
from accelerate_tts.models.named import Known
from accelerate_tts.plan import Decision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from accelerate_tts.plan import Part

# The outputs of these two become durations, which are rounded up to whole frames. The flow and the vocoder also run at
# synthesis; `posterior_encoder` is used in training only.
_DECIDE = frozenset({"text_encoder", "duration_predictor"})

_VITS = Known(
    "VITS",
    "transformers 4.46 to 5.24",
    {"text_encoder": "encoder", "duration_predictor": "flow", "flow": "flow", "decoder": "vocoder"},
    _DECIDE,
)
coqui = register_system("Vits", package="TTS", holders=("Vits",))(
    Known(
        "VITS",
        "coqui-tts 0.27 to 0.28",
        {"text_encoder": "encoder", "duration_predictor": "flow", "flow": "flow", "waveform_decoder": "vocoder"},
        _DECIDE,
    )
)


@register_system("VitsModel")
def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
    """Return the parts of a `VitsModel`, with the decision that rounds its durations."""
    decision = Decision(module, ("text_encoder", "duration_predictor"), _frames, _text)
    return tuple(replace(part, decision=decision if part.decides else None) for part in _VITS(path, module))


def _frames(model: Any, named: Mapping[str, Any], log_duration: Any) -> Any:
    """Return the frames of each token before rounding up, as `VitsModel.forward` computes them without a mask."""
    rate = named.get("speaking_rate")
    return torch.exp(log_duration) * (1.0 / (model.speaking_rate if rate is None else rate))


def _text(model: Any, number: int) -> dict[str, Any]:
    """Make a text of some dozens of random tokens."""
    generator = torch.Generator().manual_seed(number)
    tokens, length = int(model.text_encoder.embed_tokens.num_embeddings), 24 + 37 * (number % 4)
    return {"input_ids": torch.randint(tokens, (1, length), generator=generator)}
