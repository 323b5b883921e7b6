"""Every figure of a page comes from a file of a run, and the files are in the documented format."""

from __future__ import annotations

import importlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accelerate_tts.cli.bench.command import Options
from accelerate_tts.cli.bench.measure import Measured, Ratio
from accelerate_tts.cli.bench.naive import Naive
from accelerate_tts.cli.bench.report import Found
from accelerate_tts.cli.bench.results import FORMAT, document
from accelerate_tts.streaming import sentences
from schemas import SCHEMA, objections

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
FLOORS = [{"memory": 2e10, "fp32": 1e11, "bf16": 2e11, "int8": None}] * 3


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("figures")
    for name in ("figures", "record", "page", "listed", "run"):
        sys.modules.pop(name, None)


def made(**changes: Any) -> dict[str, Any]:
    ratio = Ratio.of([(0.02, 0.01), (0.03, 0.01), (0.025, 0.01)])
    run = Measured(
        "xtts", "full", "exact", 4, ratio, ratio, ratio, 3e-7, None, 0.008, 1.0, 30.0, 2.0, 1.1, 0, 2**30, 2**30,
        ["gpt: <fused> | blocks"], "random weights", floors=FLOORS,
    )  # fmt: skip
    run = replace(run, **changes)
    naive = Naive(ratio, 9.0, 2, 1e-6, None, 2**30)
    found = [
        Found("xtts", 0.5, 2**30, naive, [run], {"fast": "MemoryError: <not> enough"}),
        Found("mms", failed={"eager": "no"}),
    ]
    return json.loads(json.dumps(document(found, Options(layers=4, json=Path("/a/path.json")))))


def test_the_pages_are_what_the_files_say(figures: Any) -> None:
    made = figures.files()
    for path, text in made.items():
        assert path.read_text("utf-8") == text, f"{path.name} differs: run make figures"
    assert figures.left_over(made) == [], "run make figures"


FOLDERS = (ROOT / "docs", ROOT / "docs" / "guides", ROOT / "docs" / "reference")
PAGES = (ROOT / "README.md", *(page for folder in FOLDERS for page in folder.glob("*.md")))
BY_HAND = sorted(page for page in PAGES if page.name not in {"ENVIRONMENTS.md", "RESULTS.md", "STRANGERS.md"})


UNIT = r"(?:x\b(?! \d)| (?:ms|us|GB/s|GFLOP/s)\b)"
FIGURE = re.compile(rf"(?<![\w.])(\d+(?:\.\d+)?)(?=(?: to \d+(?:\.\d+)?)?{UNIT})")
TARGETS = re.compile(r"\| target,.*", re.DOTALL)
PROMISE = re.compile(r'\*"[^"]*"\*', re.DOTALL)  # what others say, which the page then answers


def quoted_figures(text: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield each paragraph that has measured ratios, times or rates, the figures, and the pages that it names."""
    for made_by_a_script in (r"<!-- (\w+): (?:made|written) by .*?<!-- \1: end -->", r"```.*?```"):
        text = re.sub(made_by_a_script, "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", text):
        plain = TARGETS.sub("", PROMISE.sub("", re.sub(r"`[^`]*`", "", paragraph)))
        if found := FIGURE.findall(plain):
            named = re.findall(r"decisions/0[\w-]+\.md|(?:ENVIRONMENTS|RESULTS)\.md", paragraph)
            yield paragraph, found, "\n".join((ROOT / "docs" / name).read_text("utf-8") for name in named)


def test_a_figure_without_a_source_is_found() -> None:
    (one,) = quoted_figures('A step took 2.12 ms, or 1.5 to 1.8x, at 20 GB/s.\n\n- *"9x!"* No: `3x` is not measured.')
    assert one[1:] == (["2.12", "1.5", "1.8", "20"], "")


@pytest.mark.parametrize("page", BY_HAND, ids=[path.name for path in BY_HAND])
def test_a_figure_in_a_text_is_in_the_page_that_it_names(page: Path) -> None:
    """A measured ratio, time or rate is that of a decision, or of a page that runs have written, beside its link."""
    for paragraph, found, source in quoted_figures(page.read_text("utf-8")):
        for figure in found:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", source), f"{figure} in: {paragraph}"


def test_every_stored_result_is_in_the_format(figures: Any) -> None:
    machines = figures.read(figures.RESULTS)
    for documents in machines.values():
        for one in documents:
            assert list(objections(one, SCHEMA)) == []
            assert re.fullmatch(r"[0-9a-f]{7,40}\+?", one["commit"])


def test_what_the_bench_writes_is_in_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PACK_KEY", "a secret")
    monkeypatch.setenv("ACCELERATE_TTS_TF32", "0")
    content = made()
    assert list(objections(content, SCHEMA)) == []
    assert content["format"] == FORMAT
    assert content["environment"]["ACCELERATE_TTS_TF32"] == "0"
    assert "a secret" not in json.dumps(content)
    assert "/a/path.json" not in json.dumps(content)
    assert content["machine"]["cores"] >= 1
    assert content["systems"][0]["runs"][0]["whole"]["pairs"] == 3
    for name in ("floors", "whole", "disturbed"):
        broken = json.loads(json.dumps(content))
        del broken["systems"][0]["runs"][0][name]
        assert list(objections(broken, SCHEMA)) == [f".systems[0].runs[0] has no {name}"]
    assert list(objections({**content, "format": 2}, SCHEMA)) == [".format is 2"]
    assert list(objections({**content, "host": "x"}, SCHEMA)) == [".host is not in the schema"]


def test_another_environment_is_asked_for_its_versions(tmp_path: Path) -> None:
    content = document([Found("mms")], Options(python=Path(sys.executable)))
    own = document([Found("mms")], Options())
    assert content["python"] == own["python"]
    assert content["versions"] == own["versions"]
    assert "torch" in content["versions"]
    absent = document([Found("mms")], Options(python=tmp_path / "python"))
    assert (absent["python"], absent["versions"]) == (None, {})
    assert list(objections(json.loads(json.dumps(absent)), SCHEMA)) == []


def test_a_document_is_stored_by_its_machine_and_shown(figures: Any, tmp_path: Path, capsys: Any) -> None:
    record = importlib.import_module("record")
    machine = {"system": "Linux", "machine": "x86_64", "processor": "Intel(R) Xeon(R) Processor (6 207 2)", "cores": 2,
               "isa": ["avx2", "amx_bf16"]}  # fmt: skip
    content = {**made(moved="memory gave 10.0 to 20.0 GB/s", kernels="avx512_bf16", read=10**8), "machine": machine}
    path = record.store(content, tmp_path, "0123456789")
    assert path.parent == tmp_path / "intel-xeon-6-207-2-amx-bf16-2-cores"
    assert path.name.startswith("xtts-mms-exact-4-layers-python-3.")
    page = figures.results_page(figures.read(tmp_path))
    row = next(line for line in page.splitlines() if line.startswith("| xtts |") and "25.0" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "xtts", content["versions"]["torch"], "4", "exact", "25.0 ms, 10.0 ms", "2.50x (2.00 to 3.00)", "1.25", "2.00",
        "2.50x (2.00 to 3.00)", "error 3e-07", "30 s", "2.0 s", "1.00x", "2.50x (2.00 to 3.00)", "3", "0", "",
    ]  # fmt: skip
    assert "**failed**: MemoryError: &lt;not> enough" in page
    assert "0123456789" in page
    assert "2 cores, Linux x86_64: avx2, amx_bf16. Kernels ran at: avx512_bf16." in " ".join(page.split())
    older_run = made(read=None)
    assert list(objections(older_run, SCHEMA)) == []
    assert "| 1.25 |  | 2.50x" in figures.results_page({"a": [older_run]})
    older, engines = {**made(kernels=""), "machine": machine}, {**content, "systems": [], "kernels": "amx"}
    assert list(objections(engines, SCHEMA)) == []
    assert "Kernels" not in figures.results_page({"a": [older]})
    assert "Kernels ran at: amx, avx512_bf16." in " ".join(figures.results_page({"a": [content, engines]}).split())
    assert "memory gave 20.0, 20.0, 20.0 GB/s; all floors that moved: memory gave 10.0 to 20.0 GB/s;" in " ".join(
        page.split()
    )
    assert "No result is stored" in figures.results_page({})
    assert record.main(["--from", str(path), "--into", str(tmp_path / "again")]) == 0
    assert "make figures" in capsys.readouterr().out
    assert len(list((tmp_path / "again").glob("*/*.json"))) == 1


def test_another_environment_is_another_file(figures: Any, tmp_path: Path) -> None:
    record = importlib.import_module("record")
    versions = {"accelerate_tts": "0.2.0", "torch": "2.6.0", "transformers": "5.2.0", "chatterbox-tts": "0.1.7",
                "coqui-tts": "0.28.0", "resemblyzer": "0.1.4", "numpy": "1.26.4"}  # fmt: skip
    old = {**made(), "python": "3.11.7", "versions": versions, "environment": {}}
    newer = {**old, "versions": {**versions, "accelerate_tts": "0.3.0"}}
    changes: list[dict[str, Any]] = [
        {"versions": {**versions, "torch": "2.14.1"}}, {"python": "3.12.1"}, {"python": None, "versions": {}},
        {"environment": {"ACCELERATE_TTS_TF32": "0"}}, {"environment": {"OMP_NUM_THREADS": "1"}},
    ]  # fmt: skip
    paths = [record.store(content, tmp_path, "0123456") for content in (old, newer, *(old | one for one in changes))]
    assert [path.stem.removeprefix("xtts-mms-exact-4-layers") for path in paths] == [
        *["-python-3.11-torch-2.6.0-transformers-5.2.0-coqui-tts-0.28.0"] * 2,
        "-python-3.11-torch-2.14.1-transformers-5.2.0-coqui-tts-0.28.0",
        "-python-3.12-torch-2.6.0-transformers-5.2.0-coqui-tts-0.28.0",
        "",
        "-python-3.11-torch-2.6.0-transformers-5.2.0-coqui-tts-0.28.0-tf32-0",
        "-python-3.11-torch-2.6.0-transformers-5.2.0-coqui-tts-0.28.0-omp-num-threads-1",
    ]
    long = [{**old, "environment": {"OMP_PLACES": "x" * 300 + end}} for end in "ab"]
    assert len({path.name for path in (record.store(one, tmp_path / "long", "0123456") for one in long)}) == 2
    (documents,) = figures.read(tmp_path).values()
    assert len(documents) == 6  # a name without an environment, as older files have it, is read, too


def test_engines_of_one_run_are_stored_and_shown(figures: Any, tmp_path: Path) -> None:
    record = importlib.import_module("record")

    def peer(name: str, ratio: float | None, **changes: Any) -> dict[str, Any]:
        timed = ratio and {"before": 0.1, "after": 0.1 / ratio, "ratio": ratio, "lowest": ratio, "highest": ratio,
                           "pairs": 7}  # fmt: skip
        return {"name": name, "lines": 3, "set_up": 12.3, "ratio": timed, "error": 1e-6, "kept": [], "failed": None,
                **changes}  # fmt: skip

    peers = [
        peer("eager", 1.0, error=0.0), peer("ours, exact", 1.25, kept=["model: fused | blocks"], read=10**9),
        peer("OpenVINO <bf16>", 2.0, error=None), peer("slow", 0.8),
        peer("broken", None, set_up=None, error=None, failed="RuntimeError: no"),
    ]  # fmt: skip
    item = {"system": "mms", "what": "a call", "layers": None, "threads": 2, "note": "", "floor": 0.04,
            "floor_of": "fp32", "floors": FLOORS, "disturbed": 1, "disturbance": "other processes", "moved": "",
            "peers": peers}  # fmt: skip
    options = {"precisions": ["exact"], "layers": None, "tokens": None, "size": "full", "peers": ["OpenVINO bf16"]}
    content = {**made(), "systems": [], "peers": [item], "options": options, "commit": "0123456"}
    assert list(objections(content, SCHEMA)) == []
    assert list(objections({**content, "peers": [{**item, "floors": None}]}, SCHEMA))
    assert record.store(content, tmp_path, "0123456").name.startswith("peers-mms-exact-only-openvino-bf16-python-3.")
    machines = figures.read(tmp_path)
    page = figures.results_page(machines)
    rows = [line for line in page.splitlines() if line.startswith("| mms, a call |")]
    assert [[cell.strip() for cell in row.strip("|").split("|")][2:] for row in rows[1:3] + rows[-1:]] == [
        ["ours, exact", "80.0 ms", "1.25x (1.25 to 1.25)", "2.00", "1.60", "error 1e-06", "12 s", "3", "7", "1", ""],
        [
            "OpenVINO &lt;bf16>",
            "50.0 ms",
            "2.00x (2.00 to 2.00)",
            "1.25",
            "",
            "other length",
            "12 s",
            "3",
            "7",
            "1",
            "",
        ],
        ["broken", "**failed**: RuntimeError: no", "", "", "", "", "", "3", "", "", ""],
    ]
    assert "faster than all of ours: OpenVINO &lt;bf16>" in " ".join(page.split())
    ((name, documents),) = machines.items()
    (group,) = figures.peer_groups(documents)
    assert f"(figures/{figures.peers_file(name)})" in page
    assert [name for name, _ in group.bars] == ["OpenVINO <bf16>", "ours, exact", "slow"]
    svg = figures.chart("Title", [group])
    bars = [bar.attrib for bar in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")]  # noqa: S314 - our own
    assert [bar["class"] for bar in bars] == ["bar other", "bar", "bar other"]
    for folder in (ROOT, ROOT / "docs"):
        text = figures.with_chart("# A\n<!-- chart: x -->\nold\n<!-- chart: end -->\nB\n", "![x](docs/a.svg)", folder)
        assert ("![x](docs/a.svg)" if folder == ROOT else "![x](a.svg)") in text
        assert text.endswith("<!-- chart: end -->\nB\n")
        assert "old" not in text
    tiny = {**content, "options": {**options, "size": "tiny"}}
    assert figures.peer_groups([tiny]) == []


def run_of_engines(machine: str, ratios: dict[str, float | None], **changes: Any) -> dict[str, Any]:
    """Return a document of peers.py on a machine, with the ratio of each engine or none where it failed."""
    peers = [
        {"name": name, "lines": 3, "set_up": ratio and 12.3, "error": ratio and 1e-6, "kept": [],
         "failed": None if ratio else "RuntimeError: no",
         "ratio": ratio and {"before": 0.1, "after": 0.1 / ratio, "ratio": ratio, "lowest": ratio, "highest": ratio,
                             "pairs": 7}}
        for name, ratio in ratios.items()
    ]  # fmt: skip
    item = {"system": "mms", "what": "a call", "layers": None, "threads": 2, "note": "", "floor": 0.04,
            "floor_of": "fp32", "floors": FLOORS, "disturbed": 0, "disturbance": "", "moved": "", "peers": peers,
            **changes}  # fmt: skip
    options = {"precisions": ["exact"], "layers": item["layers"], "tokens": None, "size": "full", "peers": None}
    about = {"system": "Linux", "machine": "x86_64", "processor": machine, "cores": 2, "isa": ["avx2"]}
    content = {**made(), "systems": [], "peers": [item], "options": options, "machine": about}
    assert list(objections({**content, "commit": "0123456"}, SCHEMA)) == []
    return content


def test_each_machine_has_a_chart_of_engines_and_the_fullest_is_in_front(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = importlib.import_module("record")
    for content in (
        run_of_engines("A <Zen>", {"eager": 1.0, "ours, exact": 1.5}),
        run_of_engines("B Xeon", {"eager": 1.0, "ours, exact": 1.25}),
        run_of_engines("B Xeon", {"eager": 1.0, "ours, exact": 1.75}, system="kokoro"),
        run_of_engines("B Xeon", {"eager": 1.0, "ours, exact": 9.0}, system="kokoro", layers=4),
    ):
        record.store(content, tmp_path, "0123456")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    made = figures.files()
    charts = {path.name: text for path, text in made.items() if path.name.startswith("peers")}
    assert list(charts) == ["peers-a-zen-avx2-2-cores.svg", "peers-b-xeon-avx2-2-cores.svg"]
    zen, xeon = charts.values()
    assert "A &lt;Zen&gt;, 2 cores, Linux" in zen
    assert ("1.50x" in zen, "1.25x" in zen, "1.50x" in xeon) == (True, False, False)
    assert xeon.index("MMS (VITS): a call") < xeon.index("1.25x") < xeon.index("Kokoro: a call") < xeon.index("1.75x")
    assert "9.00x" not in xeon  # of fewer layers
    front = made[ROOT / "README.md"]
    assert "docs/figures/peers-b-xeon-avx2-2-cores.svg" in front
    assert "peers-a-zen" not in front
    assert "Measured on B Xeon, 2 cores, Linux." in " ".join(front.split())
    assert "(figures/peers-b-xeon-avx2-2-cores.svg)" in made[ROOT / "docs" / "index.md"]
    page = made[figures.PAGE]
    for name in charts:
        assert f"(figures/{name})" in page.partition(f"## {name[6:-4]}\n")[2].partition("\n## ")[0]


def test_a_row_is_marked_by_the_floors_that_bound_it_alone(figures: Any) -> None:
    """Of int8, whose product was faster in the middle, an fp32 row takes no notice."""
    later = [{**FLOORS[0], "int8": 1e12}, {**FLOORS[0], "int8": 2e12, "bf16": 4e11}, {**FLOORS[0], "int8": 1e12}]

    def cells(document: dict[str, Any], start: str) -> list[list[str]]:
        page = figures.results_page({"a": [document]})
        return [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith(start)]

    for kept, in_a_loop, said in (
        (["gpt: fused blocks (fp32)"], "", ""), (["a: x (bfloat16)"], "bf16", "bf16"), (["a: x (int8)"], "", "int8"),
    ):  # fmt: skip
        assert cells(made(floors=later, kept=kept, disturbed=2), "| xtts |")[0][-3:-1] == ["2", in_a_loop]
        assert cells(made(floors=later, kept=kept, step=None), "| xtts |")[0][-3:-1] == ["0", said]
    slower = [{**FLOORS[0], "memory": 1e10}, *FLOORS[1:]]
    assert cells(made(floors=slower), "| xtts |")[0][-2] == "memory"
    assert cells(made(floors=slower, step=None), "| xtts |")[0][-2] == ""
    ratios: dict[str, float | None] = {"eager": 1.0, "ours, balanced": 2.0, "OpenVINO": 1.5, "OpenVINO int8": 3.0}
    bound = run_of_engines("A", ratios, floors=later)
    assert [row[-2] for row in cells(bound, "| mms, a call |")] == ["", "bf16", "", "int8"]
    bound = run_of_engines("A", ratios, floors=later, floor_of="memory")
    assert [row[-2] for row in cells(bound, "| mms, a call |")] == [""] * 4


def test_of_several_runs_each_engine_has_its_newest_row(figures: Any) -> None:
    first = run_of_engines("A", {"eager": 1.0, "ours, exact": 1.1, "OpenVINO": 1.2, "llama.cpp": 1.9, "x": None})
    second = run_of_engines("A", {"eager": 1.0, "ours, exact": 1.3, "OpenVINO": 1.4, "torchao": 0.5})
    third = run_of_engines("A", {"eager": 1.0, "ours, exact": 1.5, "llama.cpp": None, "y": None})
    fewer = run_of_engines("A", {"eager": 1.0, "ours, exact": 1.7}, layers=4)
    for day, content in zip(("27", "28", "28", "29"), (first, second, third, fewer), strict=True):
        content |= {"date": f"2026-11-{day}", "commit": f"commit{day}"}
    second["time"], third["time"] = "09:00:00", "10:00:00"
    page = figures.results_page({"a": [third, fewer, second, first]})
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| mms, a call |")]
    shown = [(layers.strip(), name.strip(), ratio.strip()[:5]) for _, _, layers, name, _, ratio, *_ in rows]
    assert shown == [
        ("all", "eager", "1.00x"), ("all", "ours, exact", "1.50x"), ("all", "y", ""), ("4", "eager", "1.00x"),
        ("4", "ours, exact", "1.70x"), ("all", "OpenVINO", "1.40x"), ("all", "torchao", "0.50x"),
        ("all", "llama.cpp", "1.90x"), ("all", "x", ""),
    ]  # fmt: skip
    text = " ".join(page.split())
    assert "engines of mms (OpenVINO, torchao alone): 2026-11-28, commit28" in text
    assert "engines of mms (llama.cpp, x alone): 2026-11-27, commit27" in text
    assert "faster than all of ours: llama.cpp" in text  # of its own run
    (group,) = figures.peer_groups([third, fewer, second, first])
    assert [(name, ratio["ratio"]) for name, ratio in group.bars] == [
        ("llama.cpp", 1.9), ("ours, exact", 1.5), ("OpenVINO", 1.4), ("torchao", 0.5),
    ]  # fmt: skip
    replaced = {**second, "peers": [{**second["peers"][0], "peers": second["peers"][0]["peers"][:3]}], "time": "08"}
    assert "commit28" not in figures.results_page({"a": [replaced | {"commit": "commit28"}, second | {"commit": "x"}]})
    older = run_of_engines("A", {"eager": 1.0, "ours, exact": 1.2}) | {"date": "2026-11-28"}
    larger = run_of_engines("A", {"eager": 1.0, "ours, exact": 1.4, "x": 1.0}) | {"date": "2026-11-28"}
    del older["time"], larger["time"]  # as files of that day have it
    assert figures.newest([older, larger])[0]["peers"][0]["whole"]
    assert len(figures.newest([older, larger])) == 1


def test_without_a_run_of_engines_a_chart_of_environments_is_in_front(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    made = figures.files()
    charts = [path.name for path in made if path.suffix == ".svg"]
    assert charts
    assert all(name.startswith("environments-") for name in charts)
    assert f"(docs/figures/{charts[0]})" in made[ROOT / "README.md"]
    assert f"(figures/{charts[0]})" in made[ROOT / "docs" / "index.md"]


def test_of_each_other_engine_the_chart_has_the_fastest_variant(figures: Any) -> None:
    ratios = {
        "eager": 1.0, "ours, exact": 1.5, "ours, fast": 3.0, "torch.compile": 0.9, "torch.compile, frozen": 1.1,
        "llama.cpp F32": 1.2, "llama.cpp Q8_0": 2.0, "OpenVINO": 1.3, "OpenVINO bf16": 1.25, "OpenVINO int8": None,
        "ONNX Runtime": 1.4, "ONNX Runtime int8": 0.5, "torchao, int8 weights": 0.2, "transformers, static": 0.8,
    }  # fmt: skip
    (group,) = figures.peer_groups([run_of_engines("A", ratios)])
    assert [name for name, _ in group.bars] == [
        "ours, fast", "llama.cpp Q8_0", "ours, exact", "ONNX Runtime", "OpenVINO", "torch.compile, frozen",
        "transformers, static", "torchao, int8 weights",
    ]  # fmt: skip


def test_the_line_of_the_chart_crosses_no_text(figures: Any) -> None:
    """Also where a ratio's text would begin left of 1.0 and end right of it."""
    bars = [(f"bar {n}", {"ratio": n / 20, "lowest": n / 25, "highest": n / 18}) for n in range(1, 60)]
    groups = [figures.Group("", bars), figures.Group("head", bars)]
    root = ET.fromstring(figures.chart("Title", groups))  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    lines = [one.attrib for one in root.iter(f"{space}line") if one.attrib["class"].startswith("one")]
    assert len(lines) == 2 * len(bars)
    texts = [(float(one.attrib["x"]), float(one.attrib["y"]), one.text or "") for one in root.iter(f"{space}text")]
    for line in lines:
        x, top, bottom = (float(line[key]) for key in ("x1", "y1", "y2"))
        for left, baseline, text in texts:
            above = baseline + 4 <= top or baseline - 11 >= bottom  # of 13 pixels, with what hangs below
            assert above or not left <= x <= left + 8 * len(text), text


def test_a_service_under_load_is_stored_and_shown(figures: Any, tmp_path: Path) -> None:
    record = importlib.import_module("record")
    ratio = {"before": 2.0, "after": 1.0, "ratio": 2.0, "lowest": 1.5, "highest": 2.5, "pairs": 3}
    answers = {"answers": 40, "refused": 7, "most_inside": 24, "first_p50": 0.5, "first_p95": 1.25, "total_p50": 2.0,
               "total_p95": 3.5, "speech_a_second": 4.0}  # fmt: skip
    item = {"model": "joe", "callers": 32, "most": 24, "plain": answers, "decorated": {**answers, "refused": 9},
            "first": ratio, "total": ratio, "others": 0.04}  # fmt: skip
    options = {"systems": ["joe"], "precisions": ["exact"], "layers": None, "tokens": None, "size": "full"}
    content = {**made(), "systems": [], "service": [item], "options": options, "commit": "0123456"}
    assert list(objections(content, SCHEMA)) == []
    assert list(objections({**content, "service": [{**item, "others": None}]}, SCHEMA))
    assert record.store(content, tmp_path, "0123456").name.startswith("service-joe-exact-python-3.")
    page = figures.results_page(figures.read(tmp_path))
    beside = {**content, "options": {**options, "at_once": 4}}
    assert record.store(beside, tmp_path, "0123456").name.startswith("service-joe-exact-4-at-once-python-3.")
    assert "| joe, 4 at once |" in figures.results_page(figures.read(tmp_path))
    rows = [line for line in page.splitlines() if line.startswith("| joe |")]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        ["joe", "32", "plain", "40", "7", "0.50 s, 1.25 s", "2.00 s, 3.50 s", "4.00 s", "", "", "4%"],
        ["joe", "32", "decorated", "40", "9", "0.50 s, 1.25 s", "2.00 s, 3.50 s", "4.00 s", "2.00x (1.50 to 2.50)",
         "2.00x (1.50 to 2.50)", "4%"],
    ]  # fmt: skip


def test_workers_of_a_cluster_are_stored_and_shown(figures: Any, tmp_path: Path) -> None:
    record = importlib.import_module("record")
    item = {"system": "joe", "precision": "exact", "threads": 1, "workers": 8, "processors": 8, "rate": 20.0,
            "lowest": 19.0, "highest": 22.5, "rounds": 3, "others": 0.01}  # fmt: skip
    options = {"systems": ["joe"], "precisions": ["exact"], "layers": None, "tokens": None, "size": "full"}
    content = {**made(), "systems": [], "cluster": [item], "options": options, "commit": "0123456"}
    assert list(objections(content, SCHEMA)) == []
    assert list(objections({**content, "cluster": [{**item, "rate": None}]}, SCHEMA))
    page = "Before\n<!-- workers: written -->\nold\n<!-- workers: end -->\nbehind\n"
    assert "No run is stored." in figures.with_workers(page, {})
    assert record.store(content, tmp_path, "0123456").name.startswith("cluster-joe-exact-python-3.")
    machines = figures.read(tmp_path)
    expected = ["joe, exact", "8 x 1", "20.00 s", "19.00, 22.50", "2.50 h", "3", "1%"]
    for text in (figures.results_page(machines), figures.with_workers(page, machines)):
        (row,) = [line for line in text.splitlines() if line.startswith("| joe, exact |")]
        assert [cell.strip() for cell in row.strip("|").split("|")] == expected
    assert figures.with_workers(page, machines).startswith("Before\n<!-- workers: written -->\n\nOn ")
    assert "old" not in figures.with_workers(page, machines)


@pytest.mark.usefixtures("figures")
def test_rounds_of_workers_have_sentences_of_their_own() -> None:
    workers = importlib.import_module("workers")
    rounds = [sentences(workers.text_of(1000 + number * 48, 48)) for number in range(3)]
    assert [len(one) for one in rounds] == [48] * 3
    assert len({sentence for one in rounds for sentence in one}) == 3 * 48


def test_the_chart_has_a_bar_for_each_ratio(figures: Any) -> None:
    ratio = {"ratio": 1.5, "lowest": 1.25, "highest": 2.0}
    bars = [("a <b>: t3", ratio), ("b: xtts", {**ratio, "ratio": 0.5, "lowest": 0.25})]
    root = ET.fromstring(figures.chart("Title", [figures.Group("", bars)]))  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    wide, narrow = (float(bar.attrib["width"]) for bar in root.iter(f"{space}rect"))
    assert wide == pytest.approx(3 * narrow, abs=0.2)
    assert wide > 300
    texts = [node.text for node in root.iter(f"{space}text")]
    assert texts[1:] == ["a <b>: t3", "1.50x", "b: xtts", "0.50x"]
    assert "prefers-color-scheme: dark" in next(iter(root.iter(f"{space}style"))).text
