"""Writes every table and chart of README and docs from files that runs have written: `make figures`.

The files are those of benchmarks/results and of benchmarks/environments/rows. A test compares pages and files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "RESULTS.md"
CHART = ROOT / "docs" / "figures" / "environments.svg"
sys.path.insert(0, str(HERE / "environments"))

import page as environments_page

_HEAD = """# What was measured

Runs have written this page; nobody writes figures here. `make record SYSTEMS=...` runs
`accelerate-tts bench` and stores one file under `benchmarks/results/`, and `make figures` writes
this page. [Where it was run](ENVIRONMENTS.md) has each released upstream under its own pins.

Systems are built at their true size, or with as many layers as the table says, with seeded random
weights. The same object is timed untouched and tuned in turn, in one process. Ratios are medians of
pairs, with the least and the most of them. "One token" is one step of the decode loop, and "floors"
is how often the memory could have given that step's weights meanwhile. A peak is that of a process
of its own, over the untouched one's. A start is that of a second process with the warm pack.
"""
_COLUMNS = (
    "system", "torch", "layers", "precision", "one token", "ratio", "floors", "whole call", "output", "tuning", "start",
    "peak", "torch.compile", "pairs", "disturbed",
)  # fmt: skip
_LOAD = (
    "a service's model", "callers", "service", "answers", "refused", "first audio, p50 and p95", "whole, p50 and p95",
    "speech a second", "first audio, ratio", "whole, ratio", "others",
)  # fmt: skip


def main() -> None:
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        print(f"{path.relative_to(ROOT)} is written")


def files() -> dict[Path, str]:
    """Return the content of each file that is made of figures."""
    from listed import FILE, environments
    from run import ROWS

    found, rows = environments(FILE.read_text("utf-8")), environments_page.read(ROWS)
    readme = ROOT / "README.md"
    return {
        environments_page.PAGE: environments_page.page(found, rows),
        readme: environments_page.with_table(readme.read_text("utf-8"), found, rows),
        CHART: chart([bar for one in found if one.name in rows for bar in bars(one.name, rows[one.name])]),
        PAGE: results_page(read(RESULTS)),
    }


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the documents of a folder of results, by the name of the machine's folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text("utf-8")))
    return found


def results_page(machines: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page of all results."""
    parts = [_HEAD]
    if not machines:
        parts.append("No result is stored for this state of the library.\n")
    for name, documents in machines.items():
        machine = documents[-1]["machine"]
        facts = f"{machine['processor']}, {machine['cores']} cores, {machine['system']} {machine['machine']}"
        tables = [
            (head, [line for one in documents for line in lines(one)])
            for head, lines in ((_COLUMNS, _rows), (_LOAD, _loads))
        ]
        isa = ", ".join(machine["isa"]) or "no instruction set that is known by name"
        parts += [
            f"## {name}\n",
            environments_page.wrapped(f"{facts}: {isa}.").replace("\n  ", "\n") + "\n",
            *(environments_page.table(head, lines) for head, lines in tables if lines),
            *(environments_page.wrapped(f"- {line}") for one in documents for line in _about(one)),
            "",
        ]
    return "\n".join(parts)


def _rows(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    torch = document["versions"].get("torch", "")
    for system in document["systems"]:
        naive = "" if system["naive"] is None else environments_page.ratio_range(system["naive"]["whole"])
        for run in system["runs"]:
            step, whole = run["step"], run["whole"]
            peak, alone = run["peak"], system["peak"]
            yield (
                run["system"], torch, str(run["layers"] or "all"), run["precision"],
                "" if step is None else f"{1e3 * step['before']:.1f} ms, {1e3 * step['after']:.1f} ms",
                "" if step is None else environments_page.ratio_range(step),
                "" if step is None or not run["floor"] else f"{step['after'] / run['floor']:.2f}",
                environments_page.ratio_range(whole), _output(run), f"{run['tuning']:.0f} s",
                "" if run["warm_start"] is None else f"{run['warm_start']:.1f} s",
                "" if not peak or not alone else f"{peak / alone:.2f}x", naive, str(whole["pairs"]),
                "yes" if run["disturbed"] or run["moved"] else "no",
            )  # fmt: skip
        for variant, why in system["failed"].items():
            yield (system["system"], torch, "", variant, f"**failed**: {why}", *[""] * (len(_COLUMNS) - 5))


def _loads(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for item in document.get("service", []):
        for name in ("plain", "decorated"):
            one = item[name]
            ratios = (
                [environments_page.ratio_range(item[k]) for k in ("first", "total")]
                if name == "decorated"
                else ["", ""]
            )
            yield (
                item["model"], str(item["callers"]), name, str(one["answers"]), str(one["refused"]),
                f"{one['first_p50']:.2f} s, {one['first_p95']:.2f} s",
                f"{one['total_p50']:.2f} s, {one['total_p95']:.2f} s", f"{one['speech_a_second']:.2f} s", *ratios,
                f"{item['others']:.0%}",
            )  # fmt: skip


def _about(document: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    variables = ", ".join(f"`{name}={value}`" for name, value in document["environment"].items())
    names = ", ".join(one["system"] for one in document["systems"]) or "a service"
    python = f"Python {document['python']}, " if document["python"] else ""
    yield f"{names}: {document['date']}, {document['commit']}; {python}{versions}; {variables or 'no variable set'}"
    for system in document["systems"]:
        for run in system["runs"]:
            memory = ", ".join(f"{one['memory'] / 1e9:.1f}" for one in run["floors"] if one["memory"])
            said = [f"memory gave {memory} GB/s", *filter(None, (run["disturbance"], run["moved"], run["note"]))]
            yield f"{run['system']}, {run['precision']}: {'; '.join(map(environments_page.cell, said))}"


def _output(run: dict[str, Any]) -> str:
    if run["same_tokens"] is not None:
        return "same tokens" if run["same_tokens"] else "other tokens"
    return "differs" if run["error"] is None else "bit-exact" if run["error"] == 0.0 else f"error {run['error']:.0e}"


# --- the chart --------------------------------------------------------------------------------------------------------


def bars(environment: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield a name and the ratio of one token for each check of a row; of a whole call where there is no token."""
    for check in row["checks"]:
        if check["failed"] is None and "whole" in check:
            layers = f", {check['layers']} layers" if check["layers"] else ""
            what = "one token" if check["step"] is not None else "a call"
            name = f"{environment}: {check['system']}{layers}, {check['precision']}, {what}"
            yield name, check["step"] or check["whole"]


_LEFT, _WIDTH, _ROW, _TOP = 8, 760, 42, 34
_SCALE_WIDTH = 560


def chart(bars: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Return an SVG with a bar for each ratio, and a line from its least to its most pair."""
    most = max([2.0, *(ratio["highest"] for _, ratio in bars)])
    unit = _SCALE_WIDTH / most
    height = _TOP + _ROW * len(bars) + 8
    one = _LEFT + unit
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"',
        'role="img" aria-label="Times as fast as untouched, by environment and system">',
        "<style>",
        "text { font: 13px system-ui, sans-serif; fill: #1b1f24 } .bar { fill: #0959c4 }",
        ".spread, .one { stroke: #57606a } .spread { stroke-width: 2 } .one { stroke-dasharray: 4 3 }",
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #6cabff }",
        ".spread, .one { stroke: #9aa5b1 } }",
        "</style>",
        f'<text x="{_LEFT}" y="16">Times as fast as untouched (dashed: 1.0; lines: least to most pair)</text>',
        f'<line class="one" x1="{one:.1f}" y1="{_TOP - 8}" x2="{one:.1f}" y2="{height - 4}"/>',
    ]
    for number, (name, ratio) in enumerate(bars):
        top = _TOP + number * _ROW
        width = ratio["ratio"] * unit
        low, high = _LEFT + ratio["lowest"] * unit, _LEFT + ratio["highest"] * unit
        lines += [
            f'<text x="{_LEFT}" y="{top + 11}">{escape(name)}</text>',
            f'<rect class="bar" x="{_LEFT}" y="{top + 16}" width="{width:.1f}" height="14"/>',
            f'<line class="spread" x1="{low:.1f}" y1="{top + 23}" x2="{high:.1f}" y2="{top + 23}"/>',
            f'<text x="{high + 8:.1f}" y="{top + 28}">{ratio["ratio"]:.2f}x</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
