"""A stage and a system of your own: a vocoder that the library does not know, and an optimisation made for it.

    python examples/own_stage.py            # loads it, and prints the receipt

`SpectralVocoder` makes its window and its filter bank anew at each call. The stage keeps them. In a package of your
own, name this module in pyproject.toml, and every load in that environment tries the stage:

    [project.entry-points."accelerate_tts.stages"]
    own_stage = "own_stage"

    [project.entry-points."accelerate_tts.systems"]
    own_stage = "own_stage"

Needs: pip install accelerate_tts
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from accelerate_tts import optimized_model, receipt_of
from accelerate_tts.models import Known, register_system
from accelerate_tts.patching.class_swap import ClassSwap, subclass_with
from accelerate_tts.plan import Part
from accelerate_tts.stages import BaseStage, register_stage

# --- the model, as upstream has it ------------------------------------------------------------------------------------


class Synthesis(nn.Module):
    """Log mel frames of shape (batch, mels, time) to samples of shape (batch, time * hop)."""

    def __init__(self, mels: int = 40, size: int = 256) -> None:
        super().__init__()
        self.mels, self.size, self.hop = mels, size, size // 4
        self.refine = nn.Conv1d(mels, mels, 5, padding=2)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The window, and the filters of shape (frequencies, mels)."""
        window = torch.hann_window(self.size)
        centres = torch.linspace(0.0, 1.0, self.mels) ** 2
        frequencies = torch.linspace(0.0, 1.0, self.size // 2 + 1)
        filters = torch.exp(-40.0 * (frequencies[:, None] - centres[None, :]) ** 2)
        return window, filters

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Speak."""
        window, filters = self.tables()
        magnitude = filters @ self.refine(mel).exp()
        phase = 2 * math.pi * torch.arange(magnitude.shape[1])[None, :, None] * torch.arange(mel.shape[2]) / 4
        return torch.istft(torch.polar(magnitude, phase), self.size, self.hop, window=window)


class SpectralVocoder(nn.Module):
    """The service's backend."""

    def __init__(self) -> None:
        super().__init__()
        self.synthesis = Synthesis()

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Speak."""
        return self.synthesis(mel)


# --- the system: what its parts are -----------------------------------------------------------------------------------

register_system("SpectralVocoder")(Known("the spectral vocoder", "1.0", {"synthesis": "vocoder"}))


# --- the stage --------------------------------------------------------------------------------------------------------


@register_stage
class TablesStage(BaseStage):
    """Keeps the tables of a `Synthesis`. Bit for bit the same."""

    name = "tables made once"
    after = ("fold weight norm",)

    def applies(self, part: Part) -> str | None:
        """Say why there is nothing to do on a part, or nothing."""
        return None if _found(part.module) else "no Synthesis in it"

    def prepare(self, part: Part) -> ClassSwap:
        """Make the change, switched off: it gives each module a class with another `tables`."""
        return ClassSwap(_found(part.module), _keeping)


def _found(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if isinstance(inner, Synthesis)]


def _keeping(module: Any) -> type:
    made = module.tables()
    return subclass_with(type(module), lambda _self: made, method="tables")


@optimized_model(warmup=[torch.randn(1, 40, 50), torch.randn(1, 40, 200)], tune_seconds=20)
def load() -> SpectralVocoder:
    """Load it: here with seeded weights."""
    torch.manual_seed(0)
    return SpectralVocoder().eval()


if __name__ == "__main__":
    print(receipt_of(load()))
