"""Report of the bench: a table of all figures, an overview with one line a system, and summaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from accelerate_tts.cli.bench.systems import system_of
from accelerate_tts.settings import Precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate_tts.cli.bench.measure import Measured, Ratio
    from accelerate_tts.cli.bench.naive import Naive

OVERVIEW: tuple[str, ...] = (
    "system", "promised", "torch.compile", *get_args(Precision), "error", "first call", "cold start", "warm start",
    "peak memory",
)  # fmt: skip
"""Columns of `overview`: ratios of a whole call, then further figures of each precision that was run, in order.

The first call is the untouched model's, cold. A cold start is tuning without a warm pack, a warm start is with one.
Each peak memory is that of a separate process, in MiB for the untouched model and as a multiple of it for the others.
"""

_FAILED = "failed"


@dataclass
class Found:
    """Measurements of one system.

    Attributes:
        system: Name of the system.
        cold: Seconds of the untouched model's first call.
        peak: Maximum resident bytes of the untouched model's process.
        naive: Measurements of `torch.compile` alone; `None` if not requested, or failed.
        runs: Tuned measurements, one for each precision that succeeded.
        failed: Reasons of failed variants, by precision or "eager", "torch.compile", "warm start, ...".
    """

    system: str
    cold: float | None = None
    peak: int | None = None
    naive: Naive | None = None
    runs: list[Measured] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def overview(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Make one line a system: the promised range, `torch.compile` alone, and the tuned system in each precision.

    A failed variant has the cell "failed"; a variant that was not requested has an empty one.
    """
    return [OVERVIEW, *map(_row, found)]


def _row(one: Found) -> tuple[str, ...]:
    of_it = {run.precision: run for run in one.runs}
    runs = [of_it[precision] for precision in get_args(Precision) if precision in of_it]
    low, high = system_of(one.system).promised
    return (
        one.system, f"{low} to {high}x",
        _gap(one, "torch.compile") if one.naive is None else f"{one.naive.whole.ratio:.2f}x",
        *(f"{of_it[p].whole.ratio:.2f}x" if p in of_it else _gap(one, p) for p in get_args(Precision)),
        ", ".join(map(_error, runs)),
        "" if one.cold is None else f"{one.cold:.1f} s",
        ", ".join(f"{run.tuning:.0f} s" for run in runs),
        ", ".join(
            _gap(one, f"warm start, {run.precision}") or "-" if run.warm_start is None else f"{run.warm_start:.0f} s"
            for run in runs
        ),
        _peaks(one, runs),
    )  # fmt: skip


def _gap(one: Found, what: str) -> str:
    return _FAILED if what in one.failed or "eager" in one.failed else ""


def _peaks(one: Found, runs: list[Measured]) -> str:
    if one.peak is None:
        return ""
    peaks = {} if one.naive is None else {"torch.compile": one.naive.peak}
    for run in runs:
        peaks |= {run.precision: run.peak, f"{run.precision} warm": run.warm_peak}
    told = [f"{name} {peak / one.peak:.2f}x" for name, peak in peaks.items() if peak is not None]
    return "; ".join([f"{one.peak / 2**20:.0f} MiB", *told])


def rows(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Make a line for every ratio: of a whole call, of a decode step and of prefill."""
    lines: list[tuple[str, ...]] = [
        ("system", "precision", "what", "eager", "tuned", "ratio", "range", "floor", "error")
    ]
    for one in (run for system in found for run in system.runs):
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


def summaries(one: Found) -> list[str]:
    """Make a line for each variant with the figures that are not in the tables, and for each failure."""
    lines = [_summary(one, run) for run in one.runs]
    if one.naive is not None:
        lines.append(f"{one.system}, torch.compile: {_of_naive(one.naive)}")
    return lines + [f"{one.system}, {what}: failed: {why}" for what, why in one.failed.items()]


def _of_naive(found: Naive) -> str:
    ratio = found.whole
    facts = [
        f"is {ratio.ratio:.2f}x ({ratio.lowest:.2f}-{ratio.highest:.2f})", f"{found.graphs} graphs",
        f"its first call took {found.compiling:.1f} s",
    ]  # fmt: skip
    if found.same_tokens is not None:
        facts.append("same tokens" if found.same_tokens else "other tokens")
    elif found.error is not None:
        facts.append(f"error {found.error:.0e}")
    return "; ".join(facts)


def _summary(system: Found, one: Measured) -> str:
    low, high = system_of(one.system).promised
    facts = [
        f"promised {low}x to {high}x, is {one.whole.ratio:.2f}x",
        f"tuned in {one.tuning:.0f} s",
        f"memory {one.memory:.2f}x",
        f"{one.recompiles} recompiles",
    ]
    if one.peak is not None and system.peak is not None:
        facts.append(f"peak {one.peak / 2**20:.0f} MiB, untouched {system.peak / 2**20:.0f}")
    if one.cold is not None:
        facts.append(f"first call {one.cold:.1f} s")
    if one.warm_start is not None:
        facts.append(f"with a warm pack {one.warm_start:.1f} s ({one.warm_start / one.tuning:.0%})")
    if one.error is not None:
        facts.append(f"error {one.error:.0e}")
    rates = [rate for told in one.floors if (rate := told.get("memory")) is not None]
    if rates:
        facts.append(f"memory gave {', '.join(f'{rate / 1e9:.1f}' for rate in rates)} GB/s")
    if one.disturbed:
        facts.append(f"{one.disturbed} pairs were disturbed: {one.disturbance}")
    if one.moved:
        facts.append(f"the machine changed meanwhile: {one.moved}")
    facts.append(f"kept: {', '.join(one.kept) or 'nothing'}")
    if one.note:
        facts.append(one.note)
    return f"{one.system}, {one.precision}: " + "; ".join(facts)
