"""Rendering of a receipt as one HTML page, from the templates beside this file.

`receipt.html.j2` is what a receipt says and `style.css.j2` the style of all pages; other pages include both. jinja2 is
not declared as a dependency, since torch requires it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from accelerate_tts.errors import printable
from accelerate_tts.receipts.format import duration, ratio_text

_MOST_PARTS = 6  # colours of the chart; smaller parts are one segment
_NUMBERED = 5.0  # per cent of the chart from which a segment has room for its number, on a phone too
_LEAST_RATIO = 1e-6
_ROWS = (("before", 16), ("after", 70))  # and the text's place from above, in pixels
_BREAKS = re.compile(r"(?<=[a-z][._])(?=\w)|(?<=[a-z])(?=[A-Z])")  # not inside a number
_COLUMNS = ("part", "stage", "before", "after", "ratio", "at least", "error", "trying took", "verdict")


def to_html(receipt: Any) -> str:
    """Render a receipt as an HTML5 page with the headline, stacked bars of the time by part, all stages, and the notes.

    Args:
        receipt: A `Receipt`, also one loaded from a file. Its texts are not trusted.

    Returns:
        The page's text, to be written as UTF-8.
    """
    return templates().get_template("page.html.j2").render(content_of(receipt))


def content_of(receipt: Any) -> dict[str, Any]:
    """Return the values that `receipt.html.j2` shows of a receipt."""
    before, after, ratio, error = receipt.figures()
    return {
        "receipt": receipt,
        "headline": (
            ("speed-up of the whole", ratio),
            ("relative error", error),
            ("warm pass before", before),
            ("warm pass after", after),
            ("cold first pass", duration(receipt.cold)),
            *([] if receipt.first_audio is None else [("first audio", duration(receipt.first_audio))]),
            ("tuning took", duration(receipt.seconds)),
            ("stages kept", f"{len(receipt.kept)} of {len(receipt.stages)}"),
            ("recompiles", receipt.recompiles),
        ),
        "segments": _segments(receipt),
        "totals": [(name, total, y) for (name, y), total in zip(_ROWS, (before, after), strict=True)],
        "columns": _COLUMNS,
        "stages": [
            (stage, _figures(stage.figures(), ratio_text(stage.low), stage.seconds or None)) for stage in receipt.stages
        ],
        "whole": _figures(receipt.figures(), "-", receipt.seconds),
    }


def _breakable(value: object) -> Markup:
    """Escape a text, and let a narrow screen break its long names after a dot or an underscore, or before a capital."""
    return Markup("<wbr>").join(_BREAKS.split(printable(value)))


def _shown(value: object) -> object:
    return value if isinstance(value, Markup) else printable(value)


@cache
def templates(*folders: Path) -> Environment:
    """Return the templates beside this file and in other folders. Values are made printable and escaped."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent], encoding="utf-8"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _figures(figures: tuple[str, str, str, str], low: str, seconds: float | None) -> tuple[str, ...]:
    before, after, ratio, error = figures
    return (before, after, ratio, low, error, duration(seconds))


@dataclass(frozen=True)
class _Place:
    """A segment's place in a bar, in per cent of the chart, and its time."""

    left: str
    width: str
    middle: str
    numbered: bool
    seconds: str


def _segments(receipt: Any) -> list[dict[str, Any]]:
    """Return the segments of both bars: the parts with the most time, the other parts, and what is in none.

    The upper bar is divided by the parts' shares. In the lower one each part takes less by the ratios of all stages
    that were kept on it; then all is scaled to the measured length.
    """
    before, after = receipt.before, receipt.after
    if before is None or after is None or not (_is_time(before) and _is_time(after)) or before == 0.0:
        return []
    shares = {name: share for name, share in receipt.shares.items() if _is_time(share) and share > 0.0}
    scale = max(1.0, sum(shares.values()))  # parts that run beside each other may take more than the whole
    gains = _gains(receipt.stages)
    parts = sorted(((name, share / scale) for name, share in shares.items()), key=lambda part: -part[1])
    both = [(name, share, share / _gain(gains.get(name))) for name, share in parts]
    shown = [(name, f"s{number}", was, now) for number, (name, was, now) in enumerate(both[:_MOST_PARTS])]
    small = both[_MOST_PARTS:]
    if small:
        shown.append(("smaller parts", "rest", sum(was for _, was, _ in small), sum(now for *_, now in small)))
    rest = max(0.0, 1.0 - sum(share for _, share in parts))
    shown.append(("everything else" if parts else "everything", "rest", rest, rest))
    longest, total = max(before, after), sum(now for *_, now in shown) or 1.0
    upper = _bar([was * before for _, _, was, _ in shown], longest)
    lower = _bar([now / total * after for *_, now in shown], longest)
    return [
        {"name": name, "kind": kind, "before": was, "after": now}
        for (name, kind, *_), was, now in zip(shown, upper, lower, strict=True)
    ]


def _gains(stages: tuple[Any, ...]) -> dict[str, float]:
    """Return the ratio of each part, untouched to tuned.

    A stage was timed with the earlier ones on, or against the slower alternative whose place it took.
    """
    gains: dict[str, float] = {}
    ratios: dict[tuple[str, str], float] = {}
    for stage in stages:
        place = stage.part, stage.stage
        ratios[place] = ratios.get(place, 1.0) * _gain(stage.ratio)
        if stage.kept:
            gains[stage.part] = gains.get(stage.part, 1.0) * ratios[place]
        elif stage.faster is not None:
            ratios[stage.part, stage.faster] = ratios[place]
    return gains


def _bar(seconds: list[float], longest: float) -> list[_Place]:
    places, left = [], 0.0
    for value in seconds:
        width = 100.0 * (value / longest)  # in this order: the largest floats times 100 are infinite
        middle = f"{left + width / 2:.2f}"
        places.append(_Place(f"{left:.2f}", f"{width:.2f}", middle, width >= _NUMBERED, duration(value)))
        left += width
    return places


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value >= 0.0


def _gain(ratio: float | None) -> float:
    # The ratio of a receipt from a file may be any number.
    return ratio if ratio is not None and _LEAST_RATIO <= ratio <= 1.0 / _LEAST_RATIO else 1.0
