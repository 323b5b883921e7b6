"""Gains of stages on parts of a kind, measured beforehand: what is tried first, and what is not tried at all.

Each row is from measurements that are committed in docs/, on CPUs. A promise decides nothing about what is kept, which
is measured here and now; it decides what a budget is spent on. What takes long to try and gained nothing on its like is
not tried, unless the budget says that time is no matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from accelerate_tts.plan import Kind

__all__ = ["PROMISES", "Promise", "promise"]


@dataclass(frozen=True)
class Promise:
    """Gain of a stage.

    Attributes:
        stage: The stage's name.
        kind: The kind of part; "" is any.
        beside: The row is for parts on which a stage is kept whose name begins so; "" is any part.
        ratio: The least that it gained beyond doubt in the runs of the source; 1.0 is nothing, or a loss.
        source: Where the figures are.
    """

    stage: str
    kind: Kind | str
    beside: str
    ratio: float
    source: str


_MODELS = "docs/PERFORMANCE_OPTIMIZATIONS.md, models that nobody told it about"
_PATIENCE = "docs/decisions/0045-less-patience.md"

PROMISES = (
    Promise("fused decoder blocks (int8)", "decoder", "", 4.0, "docs/decisions/0030-the-budget-of-long-passes.md"),
    Promise("fused decoder blocks (bf16)", "decoder", "", 2.5, "docs/decisions/0030-the-budget-of-long-passes.md"),
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
"""The first row that fits counts."""


def promise(stage: str, kind: str, kept: Collection[str] = ()) -> Promise | None:
    """Find what a stage may gain on a part of a kind, on which others are kept; `None` if nobody knows."""
    for row in PROMISES:
        beside = not row.beside or any(name.startswith(row.beside) for name in kept)
        if stage == row.stage and row.kind in {"", kind} and beside:
            return row
    return None
