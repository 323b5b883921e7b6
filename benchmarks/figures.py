"""Writes every table and chart of README and docs from files that runs have written: `make figures`.

The files are those of benchmarks/results and of benchmarks/environments/rows. A test compares pages and files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "RESULTS.md"
LANDING = ROOT / "docs" / "index.md"
CLUSTER = ROOT / "docs" / "CLUSTER.md"
FIGURES = ROOT / "docs" / "figures"
sys.path.insert(0, str(HERE / "environments"))

import page as environments_page

from accelerate_tts.cli.bench.floors import moved
from accelerate_tts.storage.files import write_whole

if TYPE_CHECKING:
    from listed import Environment

_HEAD = """# What was measured

Runs have written this page; nobody writes figures here. `make record SYSTEMS=...` runs
`accelerate-tts bench` and stores one file under `benchmarks/results/`, and `make figures` writes
this page. [Where it was run](ENVIRONMENTS.md) has each released upstream under its own pins.

Systems are built at their true size, or with as many layers as the table says, with seeded random
weights. The same object is timed untouched and tuned in turn, in one process. Ratios are medians of
pairs, with the least and the most of them. "One token" is one step of the decode loop, and "floors"
is how often the memory could have given that step's weights meanwhile, as they were loaded. "Own
floors" counts the bytes that the tuned step reads, which are fewer in bf16 and int8: in `fast` they
should be 1.6 at most. Runs of an earlier state have not stored them. A peak is that of a process
of its own, over the untouched one's. A start is that of a second process with the warm pack.

Pairs and rounds during which other programs used the machine were repeated; "disturbed" counts
those that are in the figures all the same. "Floors moved" names the rates of the machine that bound
a row and differed by more than a quarter within its run, as they do on a machine whose host is
shared; the lines below a table have their figures.

Engines of other makers took turns with eager PyTorch and with this library in one run, and their
ratios are to eager in that run. The floors of a voice compute each product of its convolutions, of
which [ours take half](decisions/0005-vocoders.md#convolutions-in-fewer-products): below 1 is
possible. Of an engine that several runs of a machine have
measured, the newest row is shown.
"""
_COLUMNS = (
    "system", "torch", "layers", "precision", "one token", "ratio", "floors", "own floors", "whole call", "output",
    "tuning", "start", "peak", "torch.compile", "pairs", "disturbed", "floors moved",
)  # fmt: skip
_PEERS = (
    "model", "layers", "engine", "seconds", "ratio", "floors", "own floors", "output", "set-up", "lines", "rounds",
    "disturbed", "floors moved",
)  # fmt: skip
_LOAD = (
    "a service's model", "callers", "service", "answers", "refused", "first audio, p50 and p95", "whole, p50 and p95",
    "speech a second", "first audio, ratio", "whole, ratio", "others",
)  # fmt: skip
_WORKERS = (
    "cluster of", "workers x threads", "speech/s", "lowest, highest", "hour, processor", "rounds", "others",
)  # fmt: skip


def main() -> None:
    made = files()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        print(f"{path.relative_to(ROOT)} is written")
    for path in left_over(made):
        path.unlink()
        print(f"{path.relative_to(ROOT)} is removed: no file of a run is behind it")


def left_over(made: Iterable[Path]) -> list[Path]:
    """Return the charts of earlier states that are not made any more."""
    return sorted({*FIGURES.glob("peers*.svg"), *FIGURES.glob("environments*.svg")} - {*made})


def files() -> dict[Path, str]:
    """Return the content of each file that is made of figures."""
    from listed import FILE, environments
    from run import ROWS

    found, rows = environments(FILE.read_text("utf-8")), environments_page.read(ROWS)
    machines, readme = read(RESULTS), ROOT / "README.md"
    peers = {name: groups for name, documents in machines.items() if (groups := peer_groups(documents))}
    where = {name: environments_page.name_of(machines[name][-1]["machine"]) for name in peers}
    most = max(peers, key=lambda name: len(peers[name])) if peers else None
    charts = dict(environment_charts(found, rows))
    told = ""
    if most is not None:
        told = _PEERS_TEXT.format(where=environments_page.cell(where[most])).replace("\n", " ")
        told = f"{peers_image(f'docs/figures/{peers_file(most)}')}\n\n{environments_page.wrapped(told, indent='')}"
    elif charts:
        told = environments_page.chart_image(f"docs/figures/{next(iter(charts)).name}")
    front, landing = (with_chart(one.read_text("utf-8"), told, one.parent) for one in (readme, LANDING))
    return {
        environments_page.PAGE: environments_page.page(found, rows),
        readme: environments_page.with_table(front, found, rows),
        **charts,
        **{FIGURES / peers_file(name): chart(_PEERS_TITLE, groups, where[name]) for name, groups in peers.items()},
        PAGE: results_page(machines),
        LANDING: landing,
        CLUSTER: with_workers(CLUSTER.read_text("utf-8"), machines),
    }


_BEGIN, _END = "<!-- chart: ", "<!-- chart: end -->"
_PEERS_TITLE = "Times as fast as eager PyTorch"
_PEERS_TEXT = """Measured on {where}. Engines took turns with the same weights, inputs and threads; the fastest
variant of each is shown. Of ours, `exact` is the default and computes the same to rounding;
`balanced` may compute in bf16, and `fast` in int8. [What was measured](docs/RESULTS.md) has the
others, errors, set-up times, lines of code, and each machine."""


def with_chart(page: str, told: str, folder: Path = ROOT) -> str:
    """Return a page's text with a chart between its two marks.

    Args:
        page: The text.
        told: The chart, with what is said of it, as README has it.
        folder: The page's folder, this one or docs.
    """
    head = page.index("\n", page.index(_BEGIN)) + 1
    told = told if folder == ROOT else told.replace("](docs/", "](")
    return f"{page[:head]}\n{told}\n\n{page[page.index(_END) :]}"


_WORKERS_BEGIN, _WORKERS_END = "<!-- workers: ", "<!-- workers: end -->"


def with_workers(page: str, machines: dict[str, list[dict[str, Any]]]) -> str:
    """Return the cluster's page with each machine's table of workers between its two marks."""
    head = page.index("\n", page.index(_WORKERS_BEGIN)) + 1
    told = ""
    for documents in machines.values():
        rows = [row for one in documents for row in _workers(one)]
        if rows:
            told += f"On {environments_page.name_of(documents[-1]['machine'])}:\n\n"
            told += environments_page.table(_WORKERS, rows) + "\n"
    return f"{page[:head]}\n{told or 'No run is stored.' + chr(10)}\n{page[page.index(_WORKERS_END) :]}"


def peers_file(machine: str) -> str:
    """Return the name of the chart of peers of a machine's folder."""
    return f"peers-{machine}.svg"


def peers_image(path: str) -> str:
    """Return the chart of peers as an image in Markdown."""
    return f"![{_PEERS_TITLE}: this library and other engines]({path})"


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
    for name, stored in machines.items():
        documents = newest(stored)
        machine = stored[-1]["machine"]
        facts = f"{machine['processor']}, {machine['cores']} cores, {machine['system']} {machine['machine']}"
        tables = [
            (head, [line for one in documents for line in lines(one)])
            for head, lines in ((_COLUMNS, _rows), (_PEERS, _peers), (_LOAD, _loads), (_WORKERS, _workers))
        ]
        isa = ", ".join(machine["isa"]) or "no instruction set that is known by name"
        image = [f"{peers_image(f'figures/{peers_file(name)}')}\n"] if peer_groups(documents) else []
        parts += [
            f"## {name}\n",
            environments_page.wrapped(f"{facts}: {isa}.{_kernels(stored)}", indent="") + "\n",
            *image,
            *(environments_page.table(head, lines) for head, lines in tables if lines),
            *(environments_page.wrapped(f"- {line}") for one in documents for line in _about(one)),
            "",
        ]
    return "\n".join(parts)


def _kernels(documents: Sequence[dict[str, Any]]) -> str:
    """Return a sentence on the instruction sets that the kernels ran at; "" if no document has one."""
    runs = (run for one in documents for system in one["systems"] for run in system["runs"])
    levels = {one.get("kernels") for one in (*documents, *runs)} - {None, ""}
    return f" Kernels ran at: {', '.join(sorted(levels))}." if levels else ""


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
                _own_floors(step, run.get("read"), run["floors"]),
                environments_page.ratio_range(whole), _output(run), f"{run['tuning']:.0f} s",
                "" if run["warm_start"] is None else f"{run['warm_start']:.1f} s",
                "" if not peak or not alone else f"{peak / alone:.2f}x", naive, str(whole["pairs"]),
                str(run["disturbed"]), _moved(run["floors"], _bounds(run)),
            )  # fmt: skip
        for variant, why in system["failed"].items():
            yield (system["system"], torch, "", variant, f"**failed**: {why}", *[""] * (len(_COLUMNS) - 5))


def _peers(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for item in document.get("peers", []):
        for one in item["peers"]:
            about = (f"{item['system']}, {item['what']}", str(item["layers"] or "all"), one["name"])
            ratio = one["ratio"]
            if ratio is None:
                yield (*about, f"**failed**: {one['failed']}", *[""] * 5, str(one["lines"]), *[""] * 3)
                continue
            yield (
                *about, f"{1e3 * ratio['after']:.1f} ms", environments_page.ratio_range(ratio),
                f"{ratio['after'] / item['floor']:.2f}" if item["floor"] else "",
                _own_floors(ratio, one.get("read"), item["floors"]),
                "other length" if one["error"] is None else "same" if not one["error"] else f"error {one['error']:.0e}",
                f"{one['set_up']:.0f} s", str(one["lines"]), str(ratio["pairs"]),
                str(item["disturbed"]), _moved(item["floors"], _bounds_of_engine(one["name"], item["floor_of"])),
            )  # fmt: skip


def _own_floors(step: dict[str, Any] | None, read: int | None, floors: Sequence[dict[str, Any]]) -> str:
    """Return how often the memory could have given what a tuned step read; "" where that was not stored."""
    rate = max((one["memory"] or 0.0 for one in floors), default=0.0)
    return f"{step['after'] * rate / read:.2f}" if step is not None and read and rate else ""


_FORMATS = {"bf16": r"bf16|bfloat16|balanced|fast", "int8": r"int8|Q8_0|fast"}


def _bounds(run: dict[str, Any]) -> set[str]:
    """Return the floors that a tuned system can be bound by: those of what it was, and of what was kept.

    A decode loop in int8 reads fewer bytes, and multiplies few of them.
    """
    formats = {name for name, words in _FORMATS.items() if re.search(words, " ".join(run["kept"]))}
    return {"fp32", *formats} if run["step"] is None else {"memory", "fp32", *formats} - {"int8"}


def _bounds_of_engine(name: str, floor: str) -> set[str]:
    """Return the floors that an engine can be bound by: that of its run, and in other formats their products."""
    formats = () if floor == "memory" else (one for one, words in _FORMATS.items() if re.search(words, name))
    return {floor, *formats}


def _moved(floors: Sequence[dict[str, float | None]], bounds: set[str]) -> str:
    """Return the names of those floors among some that changed within a run."""
    names = [name for name in (*floors, {})[0] if name in bounds]
    return ", ".join(name for name in names if moved([{name: one.get(name)} for one in floors]))


def newest(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return documents of a machine, with each engine's row of its newest run alone.

    Runs are the same if system, size, layers, threads and what is timed are. A failure is left out if any run has a
    figure. A document without a row is left out.
    """
    order = sorted(range(len(documents)), key=lambda at: _age(documents[at]), reverse=True)

    def key(document: dict[str, Any], item: dict[str, Any], one: dict[str, Any]) -> tuple[Any, ...]:
        about = (item[name] for name in ("system", "what", "layers", "threads"))
        return (document["options"]["size"], *about, one["name"])

    chosen: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for failed in (False, True):
        for at in order:
            for item in documents[at].get("peers", []):
                for one in item["peers"]:
                    if (one["ratio"] is None) is failed:
                        chosen.setdefault(key(documents[at], item, one), (at, one))
    found: list[dict[str, Any]] = []
    for at, document in enumerate(documents):
        if "peers" not in document:
            found.append(document)
            continue
        items = []
        for item in document["peers"]:
            rows = [one for one in item["peers"] if chosen[key(document, item, one)] == (at, one)]
            shown = {one["name"] for one in rows}
            said = {"ahead": [name for name in ahead(item) if name in shown], "whole": len(rows) == len(item["peers"])}
            items += [{**item, **said, "peers": rows}] if rows else []
        found += [{**document, "peers": items}] if items else []
    return found


def _age(document: dict[str, Any]) -> tuple[str, str, int]:
    """Return what is greater for the newer document; for the larger of one day, if no time is stored."""
    rows = sum(len(item["peers"]) for item in document.get("peers", []))
    return document["date"], document.get("time", ""), rows


def ahead(item: dict[str, Any]) -> list[str]:
    """Return the engines of other makers that were faster than each of ours."""
    ratios = {one["name"]: one["ratio"]["ratio"] for one in item["peers"] if one["ratio"] is not None}
    ours = max((ratio for name, ratio in ratios.items() if name.startswith("ours")), default=0.0)
    return [name for name, ratio in ratios.items() if ratio > ours and not name.startswith("ours") and name != "eager"]


def _loads(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    number = document["options"].get("at_once", 1)
    at_once = "" if number == 1 else f", {number} at once"
    for item in document.get("service", []):
        for name in ("plain", "decorated"):
            one = item[name]
            ratios = (
                [environments_page.ratio_range(item[k]) for k in ("first", "total")]
                if name == "decorated"
                else ["", ""]
            )
            yield (
                item["model"] + at_once, str(item["callers"]), name, str(one["answers"]), str(one["refused"]),
                f"{one['first_p50']:.2f} s, {one['first_p95']:.2f} s",
                f"{one['total_p50']:.2f} s, {one['total_p95']:.2f} s", f"{one['speech_a_second']:.2f} s", *ratios,
                f"{item['others']:.0%}",
            )  # fmt: skip


def _workers(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for item in document.get("cluster", []):
        yield (
            f"{item['system']}, {item['precision']}", f"{item['workers']} x {item['threads']}", f"{item['rate']:.2f} s",
            f"{item['lowest']:.2f}, {item['highest']:.2f}", f"{item['rate'] / item['processors']:.2f} h",
            str(item["rounds"]), f"{item['others']:.0%}",
        )  # fmt: skip


def _about(document: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    variables = ", ".join(f"`{name}={value}`" for name, value in document["environment"].items())
    names = ", ".join(one["system"] for one in document["systems"]) or "a service"
    names = "workers of a cluster" if "cluster" in document else names
    if "peers" in document:
        names = "engines of " + ", ".join(one["system"] + _engines_of(one) for one in document["peers"])
    python = f"Python {document['python']}, " if document["python"] else ""
    yield f"{names}: {document['date']}, {document['commit']}; {python}{versions}; {variables or 'no variable set'}"
    for system in document["systems"]:
        for run in system["runs"]:
            memory = ", ".join(f"{one['memory'] / 1e9:.1f}" for one in run["floors"] if one["memory"])
            said = [f"memory gave {memory} GB/s", *_disturbances(run), *filter(None, [run["note"]])]
            yield f"{run['system']}, {run['precision']}: {'; '.join(map(environments_page.cell, said))}"

    for item in document.get("peers", []):
        memory = ", ".join(f"{one['memory'] / 1e9:.1f}" for one in item["floors"] if one["memory"])
        seconds = document["options"].get("tune_seconds")
        budget = "" if seconds is None else f"ours had a tuning budget of {seconds:g} s"
        said = [f"{item['threads']} threads", budget, f"memory gave {memory} GB/s", *_disturbances(item)]
        said += [item["note"], f"faster than all of ours: {', '.join(item['ahead']) or 'none'}"]
        told = "; ".join(environments_page.cell(one) for one in said if one)
        yield f"engines of {item['system']}{_engines_of(item)}: {told}"
        for one in item["peers"]:
            if one["kept"]:
                yield f"{item['system']}, {one['name']}, kept: {environments_page.cell('; '.join(one['kept']))}"


def _disturbances(one: dict[str, Any]) -> Iterator[str]:
    if one["disturbed"]:
        yield f"{one['disturbed']} were disturbed: {one['disturbance']}"
    if one["moved"]:
        yield f"all floors that moved: {one['moved']}"


def _engines_of(item: dict[str, Any]) -> str:
    """Return which engines' rows are shown, where a newer run has the others."""
    names = ", ".join(environments_page.cell(one["name"]) for one in item["peers"])
    return "" if item["whole"] else f" ({names} alone)"


def _output(run: dict[str, Any]) -> str:
    if run["same_tokens"] is not None:
        return "same tokens" if run["same_tokens"] else "other tokens"
    return "differs" if run["error"] is None else "bit-exact" if run["error"] == 0.0 else f"error {run['error']:.0e}"


# --- the charts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Bars of a chart below a heading, which may be empty.

    Attributes:
        bars: Names and ratios.
        engines: True if bars whose names do not begin with "ours" are of other engines, and have another colour.
    """

    heading: str
    bars: Sequence[tuple[str, dict[str, float]]]
    engines: bool = False


def environment_charts(found: Sequence[Environment], rows: environments_page.Rows) -> Iterator[tuple[Path, str]]:
    """Yield a chart for each machine on which an environment was timed."""
    for _, at, of_it in environments_page.by_machine(found, rows):
        groups = [Group(one.name, bars) for one, row in of_it if (bars := list(check_bars(row)))]
        if groups:
            where = environments_page.name_of(of_it[0][1]["machine"])
            title = environments_page.CHART_TITLE
            yield FIGURES / environments_page.chart_file(at), chart(title, groups, where)


def check_bars(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield a name and the ratio of one token for each check of a row; of a whole call where there is no token."""
    for check in row["checks"]:
        if check["failed"] is None and "whole" in check:
            layers = f", {check['layers']} layers" if check["layers"] else ""
            what = "one token" if check["step"] is not None else "a call"
            name = f"{check['system']}{layers}, {check['precision']}, {what}"
            yield name, check["step"] or check["whole"]


_TITLES = {
    "llama": "A Llama of the shape of Chatterbox's T3", "mms": "MMS (VITS)", "demo": "The demo's voice (VITS)",
    "voice-clone": "Speaker encoder (resemblyzer)", "kokoro": "Kokoro", "f5_tts": "F5-TTS",
}  # fmt: skip


def peer_groups(documents: Sequence[dict[str, Any]]) -> list[Group]:
    """Return a group for each system of a machine, with the fastest engine first.

    Each precision of ours has a bar, and of each other engine the fastest variant. Eager is the chart's 1.0. Of a
    system that was measured with several numbers of layers, the largest is shown.
    """
    full = [one for one in newest(documents) if one["options"]["size"] == "full"]
    found: dict[tuple[str, str, int], dict[float, list[dict[str, Any]]]] = {}
    for item in (item for one in full for item in one.get("peers", [])):
        by_layers = found.setdefault((item["system"], item["what"], item["threads"]), {})
        by_layers.setdefault(item["layers"] or float("inf"), []).extend(item["peers"])
    order = [*_TITLES, *(name for name, _, _ in found)]
    groups = []
    for system, what, threads in sorted(found, key=lambda one: order.index(one[0])):
        number, peers = max(found[system, what, threads].items())
        layers = f", {number:.0f} layers" if number < float("inf") else ""
        bars: dict[str, tuple[str, dict[str, float]]] = {}
        for one in peers:
            name, ratio = one["name"], one["ratio"]
            if ratio and name != "eager" and ratio["ratio"] > bars.get(family(name), ("", {"ratio": 0.0}))[1]["ratio"]:
                bars[family(name)] = name, ratio
        heading = f"{_TITLES.get(system, system)}{layers}: {what}, {threads} threads"
        groups.append(Group(heading, sorted(bars.values(), key=lambda bar: -bar[1]["ratio"]), engines=True))
    return groups


def family(name: str) -> str:
    """Return what engines that differ in a format or an option alone have in common; each of ours is its own."""
    return name if name.startswith("ours") else re.split(r",| (?=int8|[fF]\d|[bB][fF]\d|Q\d)", name)[0]


_LEFT, _WIDTH, _ROW, _TOP, _HEADING, _SECOND = 8, 760, 22, 28, 30, 20
_LABEL = 56  # the width of a ratio's text
_LETTER = 6.7  # the mean width of a name's letters


def chart(title: str, groups: Sequence[Group], where: str = "") -> str:
    """Return an SVG with a bar for each ratio, and a line from its least to its most round.

    The machine in words stands below the title. The dashed line at 1.0 stands beside bars only, and never behind a
    text.
    """
    bars = [bar for group in groups for bar in group.bars]
    start = _LEFT + 10 + _LETTER * max((len(name) for name, _ in bars), default=0)
    unit = (_WIDTH - _LABEL - start) / max([2.0, *(ratio["highest"] for _, ratio in bars)])
    one = start + unit
    lines: list[str] = []
    top = _TOP + (_SECOND if where else 0)
    for group in groups:
        if group.heading:
            top += _HEADING
            lines.append(f'<text class="head" x="{_LEFT}" y="{top - 8}">{escape(group.heading)}</text>')
        for name, ratio in group.bars:
            kind = "bar other" if group.engines and not name.startswith("ours") else "bar"
            low, high = start + ratio["lowest"] * unit, start + ratio["highest"] * unit
            within = " within" if ratio["ratio"] > 1 else ""
            label = max(high, start + ratio["ratio"] * unit) + 8
            if label - 6 < one < label + _LABEL:
                label = one + 8
            lines += [
                f'<text x="{_LEFT}" y="{top + 15}">{escape(name)}</text>',
                f'<rect class="{kind}" x="{start:.1f}" y="{top + 4}" width="{ratio["ratio"] * unit:.1f}" height="14"/>',
                f'<line class="one{within}" x1="{one:.1f}" y1="{top + 3}" x2="{one:.1f}" y2="{top + 19}"/>',
                f'<line class="spread" x1="{low:.1f}" y1="{top + 11}" x2="{high:.1f}" y2="{top + 11}"/>',
                f'<text x="{label:.1f}" y="{top + 15}">{ratio["ratio"]:.2f}x</text>',
            ]
            top += _ROW
    height = top + 8
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"',
        f'role="img" aria-label="{escape(title)}">',
        "<style>",
        "text { font: 13px system-ui, sans-serif; fill: #1b1f24 } .head { font-weight: 600 }",
        ".bar { fill: #0959c4 } .other { fill: #8c959f }",
        ".spread, .one { stroke: #24292f } .spread { stroke-width: 2 } .one { stroke-dasharray: 4 3 }",
        ".within { stroke: #ffffff }",
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #1f6feb } .other { fill: #6e7681 }",
        ".spread, .one { stroke: #f0f6fc } .within { stroke: #ffffff } }",
        "</style>",
        f'<text x="{_LEFT}" y="16">{escape(title)} (dashed: 1.0; lines: least to most)</text>',
        *([f'<text x="{_LEFT}" y="{16 + _SECOND}">{escape(where)}</text>'] if where else []),
    ]
    return "\n".join([*head, *lines, "</svg>", ""])


if __name__ == "__main__":
    main()
