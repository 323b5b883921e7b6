"""What the bench found, in words: a table of every figure, one row a system, and a line for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from accelerate_tts.cli.bench.systems import SYSTEMS
from accelerate_tts.settings import Precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate_tts.cli.bench.measure import Measured, Ratio

__all__ = ["OVERVIEW", "overview", "rows", "summary"]

OVERVIEW: tuple[str, ...] = (
    "system", "promised", "torch.compile", *get_args(Precision), "error", "first call", "tuned in", "warm pack",
    "memory",
)  # fmt: skip
"""The columns of `overview`: ratios of a whole call, and of the precisions that were run, in their order, the rest.

The first call is the untouched model's, cold; its short text is the warm-up's.
"""


def overview(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    """One row a system: what was promised, what `torch.compile` alone gives, and ours in each precision."""
    lines = [OVERVIEW]
    for name in dict.fromkeys(one.system for one in found):
        of_it = {one.precision: one for one in found if one.system == name}
        low, high = SYSTEMS[name].promised
        naive = next((one.whole.before / one.naive for one in of_it.values() if one.naive is not None), None)
        runs = [of_it[precision] for precision in get_args(Precision) if precision in of_it]
        lines.append((
            name, f"{low} to {high}x", "" if naive is None else f"{naive:.2f}x",
            *(f"{of_it[p].whole.ratio:.2f}x" if p in of_it else "" for p in get_args(Precision)),
            ", ".join(_error(one) for one in runs),
            next((f"{one.cold:.1f} s" for one in runs if one.cold is not None), "-"),
            ", ".join(f"{one.tuning:.0f} s" for one in runs),
            ", ".join("-" if one.warm_start is None else f"{one.warm_start:.0f} s" for one in runs),
            ", ".join(f"{one.memory:.2f}x" for one in runs),
        ))  # fmt: skip
    return lines


def rows(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Every ratio: a whole call, and of a decoder one token and the prompt."""
    lines: list[tuple[str, ...]] = [
        ("system", "precision", "what", "eager", "tuned", "ratio", "range", "floor", "error")
    ]
    for one in found:
        parts = {"whole call": one.whole, "one token": one.step, "prompt": one.prompt}
        for what, ratio in parts.items():
            if ratio is not None:
                over = f"{ratio.after / one.floor:.2f}x" if what == "one token" and one.floor else ""
                lines.append((one.system, one.precision, what, *_figures(ratio), over, _error(one)))
    return lines


def _figures(ratio: Ratio) -> tuple[str, ...]:
    return (
        f"{1e3 * ratio.before:.0f} ms", f"{1e3 * ratio.after:.0f} ms", f"{ratio.ratio:.2f}x",
        f"{ratio.lowest:.2f}-{ratio.highest:.2f}",
    )  # fmt: skip


def _error(one: Measured) -> str:
    if one.same_tokens is not None:
        return "same tokens" if one.same_tokens else "other tokens"
    return "" if one.error is None else f"{one.error:.0e}"


def summary(one: Measured) -> str:
    """One line with everything that is not in the tables."""
    low, high = SYSTEMS[one.system].promised
    facts = [
        f"promised {low}x to {high}x, is {one.whole.ratio:.2f}x",
        f"tuned in {one.tuning:.0f} s",
        f"memory {one.memory:.2f}x",
        f"{one.recompiles} recompiles",
    ]
    if one.cold is not None:
        facts.append(f"first call {one.cold:.1f} s")
    if one.warm_start is not None:
        facts.append(f"with a warm pack {one.warm_start:.1f} s ({one.warm_start / one.tuning:.0%})")
    if one.naive is not None:
        facts.append(f"torch.compile alone {one.whole.before / one.naive:.2f}x")
    if one.error is not None:
        facts.append(f"error {one.error:.0e}")
    facts.append(f"kept: {', '.join(one.kept) or 'nothing'}")
    if one.note:
        facts.append(one.note)
    return f"{one.system}, {one.precision}: " + "; ".join(facts)
