"""The script for a machine with a GPU: its steps, their limits, and what it writes, as far as a CPU can show it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from accelerate_tts.cli.app import app
from accelerate_tts.cli.bench import command

FOLDER = Path(__file__).parents[1] / "benchmarks"
TESTS = """
import time, pytest
@pytest.mark.parametrize("what", ["a b", "c"])
def test_passes(what): print("said")
def test_fails(): assert False
@pytest.mark.skip(reason="there is no CUDA device")
def test_is_skipped(): pass
def test_hangs(): time.sleep(60)
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    del sys.modules["gpu"]


@pytest.mark.slow
def test_each_test_is_told_and_the_one_that_hangs_is_named(gpu: Any, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS, "utf-8")
    options = ("-c", os.devnull, "--rootdir", str(tmp_path), "-v", "--color=no", "-p", "no:cacheprovider")
    step = gpu.Step("tests", ("-m", "pytest", *options, str(file)), 10.0, tests=True)
    (found,) = gpu.run_all([step], tmp_path, {**os.environ, "PYTHONUNBUFFERED": "1"})
    assert found.outcome == "stopped"
    assert {name.partition("::")[2]: what for name, what in found.tests.items()} == {
        "test_passes[a b]": "passed", "test_passes[c]": "passed", "test_fails": "failed",
        "test_is_skipped": "skipped", "test_hangs": "not ended",
    }  # fmt: skip


def test_a_step_is_stopped_with_its_children_and_the_next_one_runs(gpu: Any, tmp_path: Path) -> None:
    mark = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    steps = [
        gpu.Step("hangs", ("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"), 0.5),
        gpu.Step("tells", ("-c", "import sys; open(sys.argv[1], 'w').write('{\"a\": 1}')", "a.json"), 9.0, "a.json"),
        gpu.Step("fails", ("-c", "raise ValueError('no device')"), 9.0),
        gpu.Step("says", ("-c", "print('first'); print('[2]')"), 9.0),
    ]
    found = gpu.run_all(steps, tmp_path, dict(os.environ), dry_run=True)
    assert [one.outcome for one in found] == ["stopped", "ok", "failed", "ok"]
    assert [one.result for one in found[1:]] == [{"a": 1}, None, [2]]
    assert found[2].last_words[-1] == "ValueError: no device"
    written = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert written["dry_run"] is True
    assert [step["outcome"] for step in written["steps"]] == ["stopped", "ok", "failed", "ok"]
    time.sleep(2)
    assert not mark.exists()


def test_what_the_total_leaves_no_time_for_is_listed(gpu: Any, tmp_path: Path) -> None:
    steps = [gpu.Step(name, ("-c", "import time; time.sleep(30)"), 3.0) for name in ("one", "other")]
    found = gpu.run_all(steps, tmp_path, dict(os.environ), seconds=3.5)
    assert [one.outcome for one in found] == ["stopped", "not reached"]
    assert found[0].seconds < 10


def test_it_begins_without_the_package() -> None:
    """As in a fresh checkout: it installs the package itself."""
    script = [sys.executable, "-S", str(FOLDER / "gpu.py"), "--only", "none"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(script, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no step has that name" in done.stderr


def test_a_script_finds_its_neighbours(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("FOUND = 3", "utf-8")
    script = tmp_path / "one.py"
    script.write_text("import other; print(other.FOUND)", "utf-8")
    (found,) = gpu.run_all([gpu.Step("one", (str(script),), 9.0)], tmp_path, {**os.environ, "PYTHONSAFEPATH": "1"})
    assert (found.outcome, found.result) == ("ok", 3)
    assert (tmp_path / "gpu.log").read_text("utf-8") == "=== one\n3\n\n"


def test_what_is_known_is_written_meanwhile_and_all_ends_when_told(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "EVERY", 0.1)
    mark = tmp_path / "child"
    code = "import time; print([1], flush=True); print('half', flush=True); time.sleep(60)"
    stop, seen = threading.Event(), list[Any]()

    def watch() -> None:
        while not (seen and seen[-1]["result"]):
            time.sleep(0.05)
            if (tmp_path / "gpu.json").exists():
                seen.append(json.loads((tmp_path / "gpu.json").read_text("utf-8"))["steps"][0])
        stop.set()

    thread = threading.Thread(target=watch)
    thread.start()
    steps = [gpu.Step("slow", ("-c", code), 50.0), gpu.Step("next", ("-c", f"open({str(mark)!r}, 'w')"), 50.0)]
    found = gpu.run_all(steps, tmp_path, dict(os.environ), stop=stop)
    thread.join()
    assert (seen[-1]["outcome"], seen[-1]["result"]) == ("running", [1])
    assert [one.outcome for one in found] == ["interrupted", "not reached"]
    assert found[0].last_words == ["[1]", "half"]
    assert not mark.exists()


def test_steps_beside_each_other(gpu: Any, tmp_path: Path) -> None:
    def meets(own: str, other: str) -> Any:
        code = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch()\n"
        code += "while not Path(sys.argv[2]).exists(): time.sleep(0.01)"
        return gpu.Step("meets", ("-c", code, own, other), 20.0, beside=True)

    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    found = gpu.run_all([meets(one, other), meets(other, one)], tmp_path, dict(os.environ))
    assert [each.outcome for each in found] == ["ok", "ok"]


@pytest.mark.parametrize("dry", [False, True])
def test_the_steps_are_commands_that_exist(gpu: Any, dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "run", lambda systems, options: asked.append((systems, options)))
    steps = gpu.steps(dry=dry)
    longest = [max(steps[number].limit for number in batch) for batch in gpu.batches(steps)]
    assert dry or sum(longest[:6]) < gpu.SECONDS, "what matters most fits in any case"
    assert [len(batch) for batch in gpu.batches(steps)].count(5) == 1
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        if "bench" in step.command:
            done = CliRunner().invoke(app, step.command[2:])
            assert done.exit_code == 0, done.output
        elif step.tests:
            assert (FOLDER.parent / step.command[-1]).exists()
    assert asked[0][0] == ["chatterbox"]
    assert [options.warm_start for _, options in asked] == [True] + [False] * (len(asked) - 1), "set-up from a pack"
    assert {options.size for _, options in asked} == {"tiny" if dry else "full"}


@pytest.mark.skipif("GPU_DRY_RUN" not in os.environ, reason="it takes half a minute: make gpu-dry-run")
def test_a_dry_run_of_the_script(tmp_path: Path) -> None:
    only = "machine,tests/cuda/test_recording"
    script = [str(FOLDER / "gpu.sh"), "--dry-run", "--installed", "--only", only, "--out", str(tmp_path)]
    done = subprocess.run(
        script, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert written["package"] == "installed"
    assert written["steps"][0]["result"]["torch"]
    if not torch.cuda.is_available():
        assert set(written["steps"][1]["tests"].values()) == {"skipped"}
    wrong = subprocess.run(
        [*script[:3], "--only", "none"], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "no step has that name" in wrong.stderr
