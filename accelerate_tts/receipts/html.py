"""A receipt as one small HTML page: no script, no other file, and every text of the receipt escaped."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate_tts.errors import printable
from accelerate_tts.receipts.format import duration, ratio_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate_tts.receipts.receipt import Receipt, StageResult

__all__ = ["to_html"]

_LONGEST_NAME = 40  # characters of a name in the chart; that many fit on a phone
_WIDEST_BAR = 40.0  # per cent of the chart; its figures stand to the right of a bar, on a phone too
_LEGEND_HEIGHT, _PAIR_HEIGHT = 32, 58  # pixels
_LEGEND = (("before", 0), ("kept", 70), ("dropped", 126), ("whole", 208))  # the classes of bars, and pixels


def to_html(receipt: Receipt) -> str:
    """A receipt as an HTML5 page: the headline, a bar chart of what was timed, a table of every stage, the notes.

    Args:
        receipt: Any receipt, one that was loaded from a file included; nothing in it is trusted.

    Returns:
        The page's text, to be written as UTF-8.
    """
    name, device = _text(receipt.what), _text(receipt.device)
    versions = " &middot; ".join(f"{_text(key)} {_text(value)}" for key, value in receipt.versions.items())
    body = "\n".join((*_headline(receipt), *_chart(receipt), *_table(receipt), *_notes(receipt)))
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Receipt: {name} on {device}</title>
<style>
{_STYLE}</style>
</head>
<body>
<main>
<h1>Receipt: {name}</h1>
<p>on {device}</p>
<p class="quiet">{versions}</p>
{body}
</main>
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(printable(value))


def _headline(receipt: Receipt) -> Iterator[str]:
    before, after, ratio, error = receipt.figures()
    facts = (
        ("speed-up of the whole", ratio),
        ("relative error", error),
        ("warm pass before", before),
        ("warm pass after", after),
        ("cold first pass", duration(receipt.cold)),
        ("tuning took", duration(receipt.seconds)),
        ("stages kept", f"{len(receipt.kept)} of {len(receipt.stages)}"),
        ("recompiles since warm-up", receipt.recompiles),
    )
    yield "<dl>"
    for name, value in facts:
        yield f"<div><dt>{name}</dt><dd>{'not known' if value == '-' else _text(value)}</dd></div>"
    yield "</dl>"


@dataclass(frozen=True)
class _Pair:
    """Two bars: a name, the kind of the second bar, seconds before and after, and what to say of them."""

    name: str
    kind: str
    before: float
    after: float
    figures: tuple[str, str, str, str]


def _pairs(receipt: Receipt) -> Iterator[_Pair]:
    stages: list[tuple[str, str, StageResult | Receipt]] = [
        (f"{stage.part}: {stage.stage}", "kept" if stage.kept else "dropped", stage) for stage in receipt.stages
    ]
    for name, kind, timed in (*stages, ("the whole", "whole", receipt)):
        if timed.before is not None and timed.after is not None:
            yield _Pair(printable(name), kind, timed.before, timed.after, timed.figures())


def _chart(receipt: Receipt) -> Iterator[str]:
    pairs = list(_pairs(receipt))
    yield "<h2>Before and after</h2>"
    if not pairs:
        yield "<p>Nothing was timed.</p>"
        return
    longest = max((s for pair in pairs for s in (pair.before, pair.after) if math.isfinite(s)), default=0.0)
    height = _LEGEND_HEIGHT + len(pairs) * _PAIR_HEIGHT
    # Positions along a bar are in per cent, heights in pixels: so the text keeps its size on a narrow screen.
    yield "<figure>"
    yield f'<svg role="img" aria-label="Bar chart: seconds before and after each stage" width="100%" height="{height}">'
    for kind, left in _LEGEND:
        yield f'<rect class="{kind}" x="{left + 1}" y="5" width="12" height="11"/>'
        yield f'<text x="{left + 18}" y="15">{kind}</text>'
    for number, pair in enumerate(pairs):
        yield from _bars(pair, _LEGEND_HEIGHT + number * _PAIR_HEIGHT, longest)
    yield "</svg>"
    yield "<figcaption>Below each bar of before is that of after: shorter is faster. All share one scale from 0."
    yield "The table has the same figures.</figcaption>"
    yield "</figure>"


def _bars(pair: _Pair, top: int, longest: float) -> Iterator[str]:
    before, after, ratio, error = pair.figures
    rows = (
        ("before", pair.before, before, top + 18),
        (pair.kind, pair.after, f"{after} ({ratio}, {error})", top + 33),
    )
    yield f"<g><title>{html.escape(pair.name)} ({pair.kind})</title>"
    yield f'<text class="name" y="{top + 12}">{_shortened(pair.name)}</text>'
    for kind, seconds, figures, y in rows:
        width = _width(seconds, longest)
        yield f'<rect class="{kind}" x="1" y="{y}" width="{width}%" height="11"/>'
        yield f'<text x="{width}%" dx="8" y="{y + 10}">{html.escape(figures)}</text>'
    yield "</g>"


def _width(seconds: float, longest: float) -> str:
    """A bar's length in per cent of the chart; nothing for what is no length."""
    share = seconds / longest if longest > 0.0 and math.isfinite(seconds) else 0.0
    return f"{_WIDEST_BAR * max(share, 0.0):.2f}"


def _shortened(name: str) -> str:
    """A name escaped, without its middle if it is long: the part's first name and the stage are the telling ends."""
    if len(name) > _LONGEST_NAME:
        half = _LONGEST_NAME // 2
        name = f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
    return html.escape(name)


_COLUMNS = ("part", "stage", "before", "after", "ratio", "at least", "error", "trying took", "verdict")


def _table(receipt: Receipt) -> Iterator[str]:
    yield '<h2 id="stages">Every stage that was tried</h2>'
    # A region that can be scrolled must be in reach of the keyboard, and named.
    yield '<div class="scroll" role="region" aria-labelledby="stages" tabindex="0">\n<table>\n<thead>\n<tr>'
    yield "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    yield "</tr>\n</thead>\n<tbody>"
    for stage in receipt.stages:
        before, after, ratio, error = stage.figures()
        figures = (before, after, ratio, ratio_text(stage.low), error, duration(stage.seconds))
        yield _row("kept" if stage.kept else "dropped", stage.part, stage.stage, figures, stage.verdict)
    if not receipt.stages:
        yield f'<tr><td colspan="{len(_COLUMNS)}">No stage was tried.</td></tr>'
    yield "</tbody>\n<tfoot>"
    before, after, ratio, error = receipt.figures()
    figures = (before, after, ratio, "-", error, duration(receipt.seconds))
    yield _row("whole", "the whole", "all that was kept", figures, receipt.verdict)
    yield "</tfoot>\n</table>\n</div>"
    yield '<p class="quiet">"At least" is the ratio that the true one is above with 95 % confidence.</p>'


def _row(kind: str, part: str, stage: str, figures: tuple[str, ...], verdict: str) -> str:
    numbers = "".join(f'<td class="number">{_text(figure)}</td>' for figure in figures)
    first = f'<th scope="row">{_text(part)}</th><td>{_text(stage)}</td>'
    return f'<tr class="{kind}">{first}{numbers}<td class="verdict">{_text(verdict)}</td></tr>'


def _notes(receipt: Receipt) -> Iterator[str]:
    if receipt.notes:
        yield "<h2>Notes</h2>\n<ul>"
        yield from (f"<li>{_text(note)}</li>" for note in receipt.notes)
        yield "</ul>"


# Kept is solid, dropped is a dashed outline: the two differ for people who see no colours, and in print.
_STYLE = """\
:root { --ink: #1b1f24; --quiet: #57606a; --page: #fff; --line: #d0d7de;
  --before: #8c959f; --kept: #0a7d55; --dropped: #b3540b; --whole: #0959c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9aa5b1; --page: #0f1318; --line: #343b44;
  --before: #7d8794; --kept: #3fc48d; --dropped: #f0944d; --whole: #6cabff; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figure { margin: .25rem 0; }
.quiet, dt, figcaption { color: var(--quiet); font-size: .875rem; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 1rem 0; }
dd { margin: 0; font-weight: 600; }
svg { display: block; font-size: 13px; }
svg text { fill: var(--ink); }
svg .name { font-weight: 600; }
rect.before { fill: var(--before); }
rect.kept { fill: var(--kept); }
rect.dropped { fill: none; stroke: var(--dropped); stroke-width: 2; stroke-dasharray: 4 2; }
rect.whole { fill: var(--whole); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .35rem .75rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; }
tbody th { font-weight: 400; }
tfoot { font-weight: 600; }
.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.kept .verdict { color: var(--kept); font-weight: 600; }
tr.dropped .verdict { color: var(--dropped); }
th[scope=row], tr .verdict { min-width: 8rem; max-width: 24rem; overflow-wrap: anywhere; }
"""
