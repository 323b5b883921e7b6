"""Write a receipt as one HTML page; `page.html.j2` beside this file is its template.

jinja2 is not among the dependencies: torch brings it.
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

__all__ = ["to_html"]

_LONGEST_NAME = 40  # characters of a name in the chart; that many fit on a phone
_WIDEST_BAR = 40.0  # per cent of the chart; its figures stand to the right of a bar, on a phone too
_LEGEND_HEIGHT, _PAIR_HEIGHT = 32, 58  # pixels
_LEGEND = (("before", 0), ("kept", 70), ("dropped", 126), ("whole", 208))  # the classes of bars, and pixels
_COLUMNS = ("part", "stage", "before", "after", "ratio", "at least", "error", "trying took", "verdict")


def to_html(receipt: Any) -> str:
    """A receipt as an HTML5 page: the headline, a bar chart of what was timed, a table of every stage, the notes.

    Args:
        receipt: Any `Receipt`, one that was loaded from a file included; nothing in it is trusted.

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


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _figures(figures: tuple[str, str, str, str], low: str, seconds: float | None) -> tuple[str, ...]:
    before, after, ratio, error = figures
    return (before, after, ratio, low, error, duration(seconds))


def _pairs(receipt: Any) -> list[dict[str, Any]]:
    """Two bars for each stage that was timed, and for the whole: positions in pixels, widths in per cent."""
    named = [
        (f"{stage.part}: {stage.stage}", "kept" if stage.kept else "dropped", stage) for stage in receipt.stages
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
    """A bar's length in per cent of the chart; nothing for what is no length."""
    share = seconds / longest if longest > 0.0 and math.isfinite(seconds) else 0.0
    return f"{_WIDEST_BAR * max(share, 0.0):.2f}"


def _shortened(name: str) -> str:
    """A name without its middle if it is long: the part's first name and the stage are the telling ends."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
