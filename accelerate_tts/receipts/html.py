"""Rendering of a receipt as one HTML page, from the template `page.html.j2` beside this file.

jinja2 is not declared as a dependency, since torch requires it.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from accelerate_tts.errors import printable
from accelerate_tts.receipts.format import duration, ratio_text

_LONGEST_NAME = 40  # maximum characters of a name in the chart, as many as fit on a phone
_WIDEST_BAR = 40.0  # per cent of the chart; leaves room for the figures to the right of a bar on a phone
_LEGEND_HEIGHT, _PAIR_HEIGHT = 32, 58  # pixels
_LEGEND = (("before", 0), ("kept", 70), ("rejected", 126), ("whole", 212))  # classes of bars, and offsets in pixels
_COLUMNS = ("part", "stage", "before", "after", "ratio", "at least", "error", "trying took", "verdict")


def to_html(receipt: Any) -> str:
    """Render a receipt as an HTML5 page with the headline, a bar chart of times, a table of all stages, and the notes.

    Args:
        receipt: A `Receipt`, also one loaded from a file. Its texts are not trusted.

    Returns:
        The page's text, to be written as UTF-8.
    """
    before, after, ratio, error = receipt.figures()
    pairs = _pairs(receipt)
    return _templates().get_template("page.html.j2").render(
        receipt=receipt,
        headline=(
            ("speed-up of the whole", ratio),
            ("relative error", error),
            ("warm pass before", before),
            ("warm pass after", after),
            ("cold first pass", duration(receipt.cold)),
            ("tuning took", duration(receipt.seconds)),
            ("stages kept", f"{len(receipt.kept)} of {len(receipt.stages)}"),
            ("recompiles since warm-up", receipt.recompiles),
        ),
        legend=_LEGEND,
        pairs=pairs,
        height=_LEGEND_HEIGHT + len(pairs) * _PAIR_HEIGHT,
        columns=_COLUMNS,
        stages=[(stage, _figures(stage.figures(), ratio_text(stage.low), stage.seconds)) for stage in receipt.stages],
        whole=_figures(receipt.figures(), "-", receipt.seconds),
    )  # fmt: skip


def _shown(value: object) -> object:
    return value if isinstance(value, Markup) else printable(value)


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _figures(figures: tuple[str, str, str, str], low: str, seconds: float | None) -> tuple[str, ...]:
    before, after, ratio, error = figures
    return (before, after, ratio, low, error, duration(seconds))


def _pairs(receipt: Any) -> list[dict[str, Any]]:
    """Return two bars for each timed stage and for the whole object: positions in pixels, widths in per cent."""
    named = [
        (f"{stage.part}: {stage.stage}", "kept" if stage.kept else "rejected", stage) for stage in receipt.stages
    ] + [("the whole", "whole", receipt)]
    timed = [(name, kind, one) for name, kind, one in named if one.before is not None and one.after is not None]
    seconds = [value for *_, one in timed for value in (one.before, one.after) if math.isfinite(value)]
    longest = max(seconds, default=0.0)
    pairs = []
    for number, (name, kind, one) in enumerate(timed):
        before, after, ratio, error = one.figures()
        top = _LEGEND_HEIGHT + number * _PAIR_HEIGHT
        bars = (
            {"kind": "before", "y": top + 18, "width": _width(one.before, longest), "figures": before},
            {"kind": kind, "y": top + 33, "width": _width(one.after, longest),
             "figures": f"{after} ({ratio}, {error})"},
        )  # fmt: skip
        pairs.append({"name": name, "short": _shortened(printable(name)), "kind": kind, "top": top, "bars": bars})
    return pairs


def _width(seconds: float, longest: float) -> str:
    """Return a bar's width in per cent of the chart; 0 for an invalid time."""
    share = seconds / longest if longest > 0.0 and math.isfinite(seconds) else 0.0
    return f"{_WIDEST_BAR * max(share, 0.0):.2f}"


def _shortened(name: str) -> str:
    """Shorten a long name in the middle, since its ends (the part's first name and the stage) identify it."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
