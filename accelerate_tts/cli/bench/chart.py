"""Chart of the bench: a bar for each variant of each system, and the promised range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from accelerate_tts.cli.bench.systems import system_of
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.settings import Precision
from accelerate_tts.storage.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from accelerate_tts.cli.bench.report import Found

_COLOURS = {"torch.compile": "#bbbbbb", "exact": "#4477aa", "balanced": "#66ccee", "fast": "#228833"}


def pyplot() -> Any:
    """Return matplotlib's module of figures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingExtraError("--plot draws with matplotlib; pip install 'accelerate_tts[bench]'") from error
    return figure


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw the ratios of whole calls to a file, in the format of its suffix."""
    bars: list[tuple[str, str, float]] = []
    spans: list[tuple[tuple[float, float], int, int]] = []
    for one in found:
        first = len(bars)
        if one.naive is not None:
            bars.append((f"{one.system}, torch.compile", "torch.compile", one.naive.whole.ratio))
        runs = {run.precision: run for run in one.runs}
        bars += [(f"{one.system}, {p}", p, runs[p].whole.ratio) for p in get_args(Precision) if p in runs]
        if len(bars) > first:
            spans.append((system_of(one.system).promised, first, len(bars) - 1))
    figure = pyplot().Figure(figsize=(8, 1 + 0.4 * len(bars)))
    axes = figure.add_subplot()
    axes.barh([name for name, _, _ in bars], [ratio for _, _, ratio in bars], color=[_COLOURS[v] for _, v, _ in bars])
    axes.axvline(1.0, color="black", linewidth=0.8)
    for (low, high), top, bottom in spans:
        axes.fill_betweenx([top - 0.45, bottom + 0.45], low, high, color="#ee6677", alpha=0.4, linewidth=0)
    axes.set_xlabel("times as fast as untouched, whole call (red: what was promised)")
    axes.invert_yaxis()
    figure.tight_layout()
    with replacing(path) as made:
        figure.savefig(made, dpi=150, format=path.suffix[1:] or "png")
