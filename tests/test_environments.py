"""The environments as data: what the file may say, what a row says of a failure, and that the page is made of the rows.

That an environment is built, tested and timed is shown by building two of them at each change (.ci/run).
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accelerate_tts.cli.bench.machine import slug

FOLDER = Path(__file__).parents[1] / "benchmarks" / "environments"
FILE = FOLDER / "environments.toml"
ONE = """
[[environment]]
name = "one"
python = "9.9"
requires = ["something==1.0"]
"""
NO_PYTHON = "there is no Python 9.9 on this machine: nothing was run"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The runner and what makes the page."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run"), importlib.import_module("page")
    for name in ("run", "page", "listed"):
        del sys.modules[name]


def row(**facts: Any) -> dict[str, Any]:
    return {
        "environment": "one", "requires": ["something==1.0"], "beside": [], "date": "2026-11-28", "commit": "abc",
        "machine": {"system": "Linux", "machine": "x86_64", "processor": "EPYC 9xx5", "cores": 2, "isa": ["avx2"]},
        "python": "3.11.7", "versions": {"torch": "2.6.0"}, "seconds": {"install": 100.2}, "failed": None, "note": "",
        "tests": {"passed": 5, "failed": 0, "errors": 0, "skipped": 1, "failures": {}, "skips": {"no TTS": 1}},
        "checks": [],
    } | facts  # fmt: skip


def on(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the row as the only one of its machine."""
    return {"machine": {"one": found}}


def check(**facts: Any) -> dict[str, Any]:
    ratio = {"before": 0.02, "after": 0.01, "ratio": 2.0, "lowest": 1.9, "highest": 2.1}
    stage = {"part": "t3", "stage": "growing cache", "kept": True, "reason": "at least 1.5x"}
    return {
        "system": "t3", "layers": 4, "tokens": 60, "precision": "exact", "failed": None, "whole": ratio, "step": ratio,
        "prompt": None, "error": None, "same_tokens": True, "floor": 0.008, "kept": ["t3: growing cache"],
        "stages": [stage, {**stage, "stage": "torch.compile", "kept": False, "reason": "slower"}],
        "events": ["t3: the hooks <pile> up"],
    } | facts  # fmt: skip


def test_the_page_is_what_the_rows_say(scripts: tuple[Any, Any]) -> None:
    run, page = scripts
    found = run.environments(FILE.read_text("utf-8"))
    rows = page.read(run.ROWS)
    for machine, of_it in rows.items():
        assert set(of_it) <= {one.name for one in found}, "a row of an environment that the file does not have"
        assert all(row["environment"] == name for name, row in of_it.items())
        assert {slug(row["machine"]) for row in of_it.values()} == {machine}
    assert page.PAGE.read_text("utf-8") == page.page(found, rows), "run make figures"
    readme = page.README.read_text("utf-8")
    assert readme == page.with_table(readme, found, rows), "run make figures"


def test_every_upstream_that_is_claimed_is_there(scripts: tuple[Any, Any]) -> None:
    run, _ = scripts
    wanted = " ".join(one for found in run.environments(FILE.read_text("utf-8")) for one in found.requires)
    for name in ("chatterbox-tts==0.1.1", "chatterbox-tts==0.1.4", "chatterbox-tts==0.1.6", "chatterbox-tts==0.1.7",
                 "chatterbox-light==", "coqui-tts==0.27.0", "coqui-tts[codec]==", "transformers==4.46.3", "resemblyzer",
                 "boson-multimodal==", "torch==2.6.0", "torch==2.8.0", "torch==2.10.0", "torch==2.12.1"):  # fmt: skip
        assert name in wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[environment]", "is no TOML"),
        ("", "no environments"),
        (ONE + ONE, "two of one name: one, one"),
        (ONE + "colour = 'red'", "one: .*colour"),
        (ONE + "tests = ['tests/nonesuch.py']", "one: .*tests/nonesuch.py"),
        (ONE + "checks = [{ system = 'nonesuch' }]", "one: 'nonesuch' is not one of"),
        (ONE + "checks = [{ system = 'mms', precision = 'sloppy' }]", "precision='sloppy'"),
        (ONE + "beside = [{ requires = 'six', reason = '' }]", "one: .*reason is empty"),
    ],
)
def test_what_the_file_may_not_say(scripts: tuple[Any, Any], text: str, said: str) -> None:
    run, _ = scripts
    with pytest.raises(Exception, match=said) as caught:
        run.environments(text)
    assert type(caught.value).__name__ in {"EnvironmentsError", "SettingsError"}


def test_names_of_several_paths(scripts: tuple[Any, Any]) -> None:
    run, _ = scripts
    several = "[tests]\ncore = ['tests/device', 'tests/tuning']\n"
    (one,) = run.environments(several + ONE + "tests = ['core', 'tests/models/test_mms.py']")
    assert one.tests == ("tests/device", "tests/tuning", "tests/models/test_mms.py")


def test_one_that_fails_has_a_row_and_stops_nothing(
    scripts: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = scripts
    file, wheel = tmp_path / "environments.toml", tmp_path / "ours.whl"
    file.write_text(ONE + ONE.replace('"one"', '"two"'), "utf-8")
    wheel.write_bytes(b"")
    told = ["--file", str(file), "--wheel", str(wheel), "--rows", str(tmp_path / "rows")]
    assert run.main(told) == 1
    rows = page.read(tmp_path / "rows")
    (of_it,) = rows.values()
    assert {name: found["failed"] for name, found in of_it.items()} == {"one": NO_PYTHON, "two": NO_PYTHON}
    assert of_it["one"]["machine"]["cores"] >= 1
    assert of_it["one"]["requires"] == ["something==1.0"]
    printed = capsys.readouterr().out
    assert "0 of 2 environments are good; not: one, two" in printed
    assert f"**failed**: {NO_PYTHON}" in page.page(run.environments(file.read_text("utf-8")), rows)
    assert run.main([*told, "two,three"]) == 2
    assert run.main([*told, "--layers", "few"]) == 2
    assert run.main([*told, "--list"]) == 0


def test_a_machine_without_git_has_rows(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, page = scripts
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "one.toml").write_text(ONE, "utf-8")
    (tmp_path / "ours.whl").write_bytes(b"")
    told = ["--file", str(tmp_path / "one.toml"), "--wheel", str(tmp_path / "ours.whl"), "--rows", str(tmp_path)]
    assert run.main(told) == 1
    (of_it,) = page.read(tmp_path).values()
    assert of_it["one"]["commit"] == "unknown"


def test_each_machine_has_rows_of_its_own(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    run, page = scripts
    wheel = tmp_path / "ours.whl"
    wheel.write_bytes(b"")
    (one, two) = run.environments(ONE + ONE.replace('"one"', '"two"'))
    other = {"system": "Linux", "machine": "x86_64", "processor": "A <Zen>", "cores": 4, "isa": ["avx512_bf16"]}
    for machine, ratio in ((row()["machine"], 2.0), (other, 3.0)):
        timed = {"before": 0.02, "after": 0.01, "ratio": ratio, "lowest": ratio, "highest": ratio}
        written = run.Row(**row(machine=machine, checks=[check(step=timed, whole=timed)]))
        run.write(written, tmp_path / "rows")
    run.write(run.Row(**row(environment="two")), tmp_path / "rows")
    rows = page.read(tmp_path / "rows")
    assert {machine: list(of_it) for machine, of_it in rows.items()} == {
        "epyc-9xx5-avx2-2-cores": ["one", "two"], "a-zen-avx512-bf16-4-cores": ["one"],
    }  # fmt: skip
    text = page.page([one, two], rows)
    tested, _, timed = text.partition("## What it gave")
    for part in (tested, timed.partition("## What was tried")[0]):
        assert re.findall(r"^### \w+ on (.*)", part, re.MULTILINE) == [
            "EPYC 9xx5, 2 cores, Linux", "A &lt;Zen>, 4 cores, Linux",
        ]  # fmt: skip
    lines = r"\n\n(?:!.*\n\n)?(?:\|.*\n)*"
    assert re.search(rf"on EPYC.*{lines}\| one .*2\.00x.*{lines}\n?### Timed on A .*{lines}\| one .*3\.00x", text)
    assert text.count("| two |") == 1
    for machine, where in (("epyc-9xx5-avx2-2-cores", "EPYC 9xx5"), ("a-zen-avx512-bf16-4-cores", "A &lt;Zen>")):
        image = f"![Times as fast as untouched, by environment and system](figures/environments-{machine}.svg)"
        assert re.search(rf"### Timed on {where}, .*\n\n{re.escape(image)}\n", text)
    assert "### one, A &lt;Zen>, 4 cores, Linux\n" in text
    assert "### two\n" in text
    assert "Never run" not in text
    marks = "<!-- environments: x -->\n<!-- environments: end -->\n"
    readme = page.with_table(marks, [one, two], rows)
    assert [line for line in readme.splitlines() if line.endswith(":")] == [
        "EPYC 9xx5, 2 cores, Linux, 2026-11-28:", "A &lt;Zen>, 4 cores, Linux, 2026-11-28:",
    ]  # fmt: skip


def test_a_disk_without_room_is_named_before_anything_is_installed(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    run, _ = scripts
    run.ask_for_room(tmp_path / "kept" / "one", 1)
    with pytest.raises(run.StepError, match=r"GB free, and an environment takes 1000000000 GB .* set TMPDIR"):
        run.ask_for_room(tmp_path / "kept" / "one", 10**18)


def test_a_command_that_hangs_or_fails_says_so(scripts: tuple[Any, Any]) -> None:
    run, _ = scripts
    with pytest.raises(run.StepError, match=r"longer than 1 s"):
        run.run_step([sys.executable, "-c", "import time; time.sleep(60)"], 1.0)
    code = "import sys; print('ERROR: No matching distribution\\n[notice] a new pip', file=sys.stderr); sys.exit(1)"
    with pytest.raises(run.StepError, match="ERROR: No matching distribution"):
        run.run_step([sys.executable, "-c", code], 10.0)
    with pytest.raises(run.StepError, match="could not be started"):
        run.run_step(["/nowhere/python"], 1.0)


def test_a_report_of_pytests_own_is_read(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    run, _ = scripts
    (tmp_path / "test_four.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_none(): pytest.skip('no TTS')\n@pytest.fixture\ndef broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n", "utf-8",
    )  # fmt: skip
    report = tmp_path / "tests.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--junitxml={report}",
         "test_four.py"], cwd=tmp_path, check=False, capture_output=True,
    )  # fmt: skip
    found = run.results(report.read_text("utf-8"))
    assert [found[name] for name in ("passed", "failed", "errors", "skipped")] == [1, 1, 1, 1]
    assert found["skips"] == {"no TTS": 1}
    assert found["failures"]["test_four::test_bad"].startswith("AssertionError: one is not two")
    assert "gone" in found["failures"]["test_four::test_error"]


def test_the_page_says_what_was_found_and_what_was_not(scripts: tuple[Any, Any]) -> None:
    run, page = scripts
    several = run.environments(ONE + ONE.replace('"one"', '"two"') + "upstream = ['something']\n")
    text = page.page(several, on(row(checks=[check(), check(system="xtts", failed="no memory")])))
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100
    text = " ".join(text.split())
    for said in (
        "5 passed, 0 failed, 1 skipped", "2026-11-28, abc", "20.0 ms, 10.0 ms", "2.00x (1.90 to 2.10)", "1.25",
        "same tokens", "**failed**: no memory", "**xtts failed**", "Never run: `two` (something==1.0)",
        "EPYC 9xx5, 2 cores", "Not kept: t3: torch.compile (slower)", "the hooks &lt;pile> up", "Skipped, 1: no TTS",
    ):  # fmt: skip
        assert said in text, said
    other = page.page(several, on(row(checks=[check(same_tokens=False, step=None, error=None)])))
    assert "**t3: other tokens**" in other
    assert "**other tokens**" in other
    in_half = check(same_tokens=False, dtype="bfloat16", divergence=1.7e-4)
    other = page.page(several, on(row(checks=[in_half])))
    assert "other tokens: in bfloat16, a step diverges by 2e-04 nats at most" in other
    assert "**" not in other.partition("## What it gave")[2].partition("## What was tried")[0]
    assert "**t3: without kernels**" in page.page(several, on(row(checks=[check(kernels="none")])))
    other = page.page(several, on(row(checks=[check(kernels="amx"), check(kernels="amx")])))
    assert "Machine: EPYC 9xx5, 2 cores, Linux x86_64, avx2; kernels ran at amx" in " ".join(other.split())


def test_a_row_is_good_only_if_all_of_it_is(scripts: tuple[Any, Any]) -> None:
    run, _ = scripts
    made = lambda **facts: run.Row(**{**row(), **facts})  # noqa: E731
    assert made().good
    assert made(checks=[check()]).good
    assert not made(failed="no memory").good
    assert not made(checks=[check(failed="no memory")]).good
    assert not made(checks=[check(same_tokens=False)]).good
    assert made(checks=[check(same_tokens=False, dtype="bfloat16")]).good
    assert not made(checks=[check(kernels="none")]).good
    assert made(checks=[check(kernels="avx2")]).good
    bad = made(tests={**row()["tests"], "failed": 1, "failures": {"a test": "why"}}, checks=[check(same_tokens=False)])
    assert not bad.good
    said = "\n".join(bad.faults())
    assert all(part in said for part in ("1 tests failed", "a test: why", "other tokens than untouched")), said
    assert json.loads(made(checks=[check(error=float("inf"))]).as_json())["checks"][0]["error"] is None


def test_the_workflow_runs_each(scripts: tuple[Any, Any]) -> None:
    run, _ = scripts
    workflow = Path(__file__).parents[1] / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("the source distribution has no .github")
    named = re.findall(r"^ {10}- ([\w.-]+)$", workflow.read_text("utf-8"), re.MULTILINE)
    assert named == [one.name for one in run.environments(FILE.read_text("utf-8"))]
