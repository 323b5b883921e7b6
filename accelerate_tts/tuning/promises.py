"""Promises: gains of stages on kinds of parts, measured beforehand, by which the budget is spent.

Each entry is from measurements on CPUs that are committed in docs/. Promises do not decide what is kept, which is
always measured. A stage that is costly to try and gained nothing on similar parts is not tried, unless the budget is
large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from accelerate_tts.plan import Kind


@dataclass(frozen=True)
class Promise:
    """Measured gain of a stage.

    Attributes:
        stage: Name of the stage.
        kind: Kind of part; "" for any.
        beside: Prefix of the name of another stage that is kept on the part; "" for any part.
        ratio: Minimum certain speed-up in the runs of the source; 1.0 for no gain, or a loss.
        source: Document with the figures.
    """

    stage: str
    kind: Kind | str
    beside: str
    ratio: float
    source: str


_MODELS = "docs/decisions/0014-tuning-budget-and-noise.md, models that no plan knows"
_PATIENCE = "docs/decisions/0014-tuning-budget-and-noise.md"

PROMISES = (
    Promise("fused decoder blocks (int8)", "decoder", "", 4.0, "docs/decisions/0014-tuning-budget-and-noise.md"),
    Promise("fused decoder blocks (bf16)", "decoder", "", 2.5, "docs/decisions/0014-tuning-budget-and-noise.md"),
    Promise("fused decoder blocks (fp32)", "decoder", "", 1.2, _MODELS),
    Promise("channels-last convolutions", "vocoder", "", 1.14, _MODELS),
    Promise("fold weight norm", "", "", 1.02, _MODELS),
    Promise("torch.compile, frozen", "", "skinny linear layers", 1.0, _PATIENCE),
    Promise("torch.compile, frozen", "model", "", 1.1, _MODELS),
    Promise("torch.compile, frozen", "encoder", "", 1.1, _MODELS),
    Promise("torch.compile", "vocoder", "channels-last convolutions", 1.0, _PATIENCE),
    Promise("torch.compile", "flow", "", 1.0, _PATIENCE),
    Promise("compiled blocks", "flow", "", 1.0, _PATIENCE),
    Promise("torch.compile", "model", "", 1.2, _MODELS),
)
"""Promises in order; the first that matches applies."""


def promise(stage: str, kind: str, kept: Collection[str] = ()) -> Promise | None:
    """Return the promise of a stage for a kind of part with other stages kept; `None` if there is none."""
    for row in PROMISES:
        beside = not row.beside or any(name.startswith(row.beside) for name in kept)
        if stage == row.stage and row.kind in {"", kind} and beside:
            return row
    return None
