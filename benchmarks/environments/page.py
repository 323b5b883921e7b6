"""Makes docs/ENVIRONMENTS.md and README's table from the rows, for figures.py. A test compares them."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run import other_tokens, without_kernels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from listed import Environment

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "ENVIRONMENTS.md"
README = HERE.parents[1] / "README.md"
_BEGIN, _END = "<!-- environments: ", "<!-- environments: end -->"

_HEAD = """# Where it was run

Runs have written this page; nobody writes figures here. `make environments` builds each environment
below from its upstream's own pins, in a virtual environment of its own. It installs the wheel
beside it without changing a package, runs the contract tests of that system and a check, and writes
one file under `benchmarks/environments/rows/`, in the folder of its machine. `make environments
ONLY=name` runs one, `LAYERS=full` runs them at upstream's full size, and `make figures` writes this
page. Each machine has tables of its own.

A check builds a system from its true configuration with seeded weights and with as many layers as
the table says, tunes it, and times it untouched and tuned in turn, five pairs. "One token" is one
step of the decode loop. The floor is the time in which the machine's memory gives that step's
weights once, as they were loaded. Ratios are medians, with the lowest and the highest of the pairs.
Few layers show that everything applies; they are no speed-up of a whole system.

A model in half precision rounds each result. Where two tokens are about equally likely, what is
sampled depends on the order of its sums, also in `exact`. Such a row says by how much a step
diverges, and is not judged by its tokens
([why](decisions/0011-tolerances.md)).
"""


Rows = dict[str, dict[str, dict[str, Any]]]
"""Rows as `run.py` writes them, by the folder of their machine and the environment's name."""


def page(environments: Sequence[Environment], rows: Rows) -> str:
    """Return the page's text.

    Args:
        environments: The environments of environments.toml, in its order.
        rows: Rows. The page says so where an environment has none on any machine.
    """
    found = list(by_machine(environments, rows))
    never = [one for one in environments if not any(one.name in of_it for of_it in rows.values())]
    parts = [_HEAD, "## What was installed and tested\n"]
    for where, _, of_it in found:
        parts += [f"### Tested on {where}\n", table(_OVERVIEW, (_overview(one, row) for one, row in of_it))]
    if never:
        told = (f"`{one.name}` ({', '.join(one.requires)})" for one in never)
        parts.append(wrapped(f"- Never run: {'; '.join(told)}") + "\n")
    checks = [(at, where, [line for one, row in rows for line in _checks(one, row)]) for where, at, rows in found]
    if any(lines for _, _, lines in checks):
        parts.append("## What it gave\n")
    for at, where, lines in checks:
        image = [f"{chart_image(f'figures/{chart_file(at)}')}\n"] if any(map(is_timed, rows[at].values())) else []
        parts += [f"### Timed on {where}\n", *image, table(_CHECKS, lines)] if lines else []
    parts.append("## What was tried in each\n")
    for one in environments:
        of_one = [of_it[one.name] for of_it in rows.values() if one.name in of_it]
        heads = [f"{one.name}, {cell(name_of(row['machine']))}" for row in of_one] if len(of_one) > 1 else [one.name]
        parts += [_details(head, one, row) for head, row in zip(heads, of_one, strict=False)]
    return "\n".join(parts)


def name_of(machine: dict[str, Any]) -> str:
    """Return a machine in words."""
    return f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"


def by_machine(
    environments: Sequence[Environment], rows: Rows
) -> Iterator[tuple[str, str, list[tuple[Environment, dict[str, Any]]]]]:
    """Yield each machine in words and by its folder, with its rows in the environments' order."""
    for at, of_it in rows.items():
        found = [(one, of_it[one.name]) for one in environments if one.name in of_it]
        if found:
            yield cell(name_of(found[0][1]["machine"])), at, found


def is_timed(row: dict[str, Any]) -> bool:
    """Check that a check of a row has a ratio."""
    return any(check["failed"] is None and "whole" in check for check in row["checks"])


def chart_file(machine: str) -> str:
    """Return the name of the chart of a machine's folder."""
    return f"environments-{machine}.svg"


CHART_TITLE = "Times as fast as untouched"


def chart_image(path: str) -> str:
    """Return the chart of a machine as an image in Markdown."""
    return f"![{CHART_TITLE}, by environment and system]({path})"


def with_table(readme: str, environments: Sequence[Environment], rows: Rows) -> str:
    """Return README's text with a small table of results for each machine between its two marks.

    A table has one row for each model and precision: that with the most layers, and of those the last environment's.

    Args:
        readme: The text.
        environments: As for `page`.
        rows: As for `page`.
    """
    tables: list[str] = []
    for where, _, of_it in by_machine(environments, rows):
        lines = [_in_short(check) for check in _fullest(check for one, row in of_it for check in _checks(one, row))]
        days = [row["date"] for _, row in of_it]
        span = " and ".join(sorted({min(days), max(days)}))
        tables += [f"{where}, {span}:\n\n{table(_SHORT, lines)}"] if lines else []
    head = readme.index("\n", readme.index(_BEGIN)) + 1
    text = "\n".join(tables) or "No row was written in this state.\n"
    return f"{readme[:head]}\n{text}\n{readme[readme.index(_END) :]}"


_SHORT = ("release", "model", "layers", "precision", "one token", "whole call", "output")
_MODELS = {
    "t3": "Chatterbox T3", "t3-multilingual": "T3, multilingual", "t3-turbo": "T3, turbo", "xtts": "XTTS v2",
    "mms": "MMS", "higgs": "Higgs Audio v2", "voice-clone": "speaker encoder", "chatterbox": "Chatterbox",
}  # fmt: skip


def _in_short(check: Sequence[str]) -> Sequence[str]:
    """Return the cells of README's table, with medians alone and the models as people call them."""
    release, system, layers, precision, seconds, ratio, _floor, whole, output, _kept = check
    output = "**failed**" if seconds.startswith("**failed**") else output.partition(":")[0]
    model = _MODELS.get(system, system)
    return release, model, layers, precision, ratio.partition(" ")[0], whole.partition(" ")[0], output


def _fullest(checks: Iterable[Sequence[str]]) -> list[Sequence[str]]:
    """Return the check with the most layers of each system and precision, the last of those that have as many."""
    found: dict[tuple[str, str], Sequence[str]] = {}

    def layers(check: Sequence[str]) -> float:
        return float("inf") if check[2] == "all" else float(check[2])

    for check in checks:
        of = (check[1], check[3])
        if of not in found or layers(check) >= layers(found[of]):
            found[of] = check
    return list(found.values())


_OVERVIEW = ("environment", "Python", "torch", "transformers", "upstream", "tests", "result", "run on")
_CHECKS = (
    "environment", "system", "layers", "precision", "one token: eager, tuned", "ratio", "times the floor",
    "whole call", "output", "kept",
)  # fmt: skip


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(cell(one) for one in row) + " |\n" for row in rows)


def cell(text: str) -> str:
    """Return a text as it may stand in a table's cell."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _overview(one: Environment, row: dict[str, Any]) -> Sequence[str]:
    versions = row["versions"]
    upstream = ", ".join(f"{name} {versions[name]}" for name in one.upstream if name in versions)
    tests = row["tests"]
    told = "" if tests is None else f"{tests['passed']} passed, {tests['failed'] + tests['errors']} failed"
    if tests is not None and tests["skipped"]:
        told += f", {tests['skipped']} skipped"
    return (
        one.name, row["python"] or one.python, versions.get("torch", ""), versions.get("transformers", ""), upstream,
        told, _result(row), f"{row['date']}, {row['commit']}",
    )  # fmt: skip


def _result(row: dict[str, Any]) -> str:
    if row["failed"] is not None:
        return f"**failed**: {row['failed']}"
    tests = row["tests"]
    bad = ["tests failed"] if tests is not None and tests["failed"] + tests["errors"] else []
    bad += [f"{check['system']} failed" for check in row["checks"] if check["failed"] is not None]
    bad += [f"{check['system']}: other tokens" for check in row["checks"] if other_tokens(check)]
    bad += [f"{check['system']}: without kernels" for check in row["checks"] if without_kernels(check)]
    return f"**{', '.join(bad)}**" if bad else "good"


def _checks(one: Environment, row: dict[str, Any]) -> Iterator[Sequence[str]]:
    for check in row["checks"]:
        about = (one.name, check["system"], str(check["layers"] or "all"), check["precision"])
        if check["failed"] is not None:
            yield (*about, f"**failed**: {check['failed']}", "", "", "", "", "")
        elif "whole" in check:
            step, floor = check["step"], check["floor"]
            yield (
                *about,
                "" if step is None else f"{_ms(step['before'])}, {_ms(step['after'])}",
                "" if step is None else ratio_range(step),
                "" if step is None or not floor else f"{step['after'] / floor:.2f}",
                ratio_range(check["whole"]), _output(check), ", ".join(check["kept"]) or "nothing",
            )  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def ratio_range(ratio: dict[str, float]) -> str:
    """Return a ratio with the least and the most of its pairs."""
    return f"{ratio['ratio']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def _output(check: dict[str, Any]) -> str:
    if check["same_tokens"] is not None:
        if check["same_tokens"]:
            return "same tokens"
        if check["precision"] == "exact" and not other_tokens(check):
            return f"other tokens: in {check['dtype']}, a step diverges by {check['divergence'] or 0:.0e} nats at most"
        return "**other tokens**" if other_tokens(check) else "other tokens"
    error = check["error"]
    return "differs" if error is None else "bit-exact" if error == 0.0 else f"error {error:.0e}"


def _details(head: str, one: Environment, row: dict[str, Any]) -> str:
    machine = row["machine"]
    levels = sorted({check["kernels"] for check in row["checks"] if check.get("kernels")})
    lines = [
        f"- Installed: {_code(row['requires'])}"
        + "".join(f"; beside it `{extra['requires']}`: {extra['reason']}" for extra in row["beside"]),
        f"- Machine: {name_of(machine)} {machine['machine']}, "
        + (", ".join(machine["isa"]) or "no instruction set that is known by name")
        + (f"; kernels ran at {', '.join(levels)}" if levels else ""),
    ]
    note = row["note"] or one.note  # a quick run says so in its row's
    if note:
        lines.append(f"- {note}")
    if row["seconds"]:
        lines.append("- Seconds: " + ", ".join(f"{what} {seconds:.0f}" for what, seconds in row["seconds"].items()))
    if row["tests"] is not None:
        lines += [f"- Skipped, {count}: {cell(why)}" for why, count in row["tests"]["skips"].items()]
        for name, why in row["tests"]["failures"].items():
            file, _, test = name.partition("::")
            # Names of tests are long, and a line is broken at spaces alone.
            lines.append(f"- Failed: `{test or file}` in `{file}`: {cell(why.replace('::', ':: '))}")
    for check in row["checks"]:
        lines += _of_check(check)
    return "\n".join([f"### {head}\n", *map(wrapped, lines)]) + "\n"


def wrapped(line: str, indent: str = "  ") -> str:
    """Wrap a list item at 100 columns, or a paragraph with an empty indent."""
    return textwrap.fill(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _of_check(check: dict[str, Any]) -> Iterator[str]:
    for line in check.get("said", []):
        yield f"- {check['system']}: {cell(line)}"
    stages = check.get("stages", [])
    kept = [f"{s['part']}: {s['stage']}" for s in stages if s["kept"]]
    others = [f"{s['part']}: {s['stage']} ({cell(s['reason'])})" for s in stages if not s["kept"]]
    if stages:
        yield f"- {check['system']}, kept: {'; '.join(kept) or 'nothing'}. Not kept: {'; '.join(others) or 'nothing'}"
    for event in check.get("events", []):
        yield f"- {check['system']}, event: {cell(event)}"


def read(folder: Path) -> Rows:
    """Return the rows of a folder; the machine with the most of them is first."""
    found: Rows = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text("utf-8"))
    return dict(sorted(found.items(), key=lambda one: -len(one[1])))
