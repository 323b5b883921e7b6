"""`accelerate-tts doctor` finds each problem and its mend; `accelerate-tts receipt` shows a file or says why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from accelerate_tts._version import __version__
from accelerate_tts.cli import doctor
from accelerate_tts.cli.app import app
from accelerate_tts.kernels.library import kernels
from accelerate_tts.receipts.receipt import Receipt, StageResult
from doubles import given_to

Finding = dict[str, str]
LOOKS = {"python", "torch", "settings", "device", "flags", "torch.compile", "threads", "memory", "packages"}


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No accelerator (a stand-in, for machines that have one), a PATH of our own with a compiler on it, a cache."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("g++", "clang++"):
        put_on_path(tmp_path, name)


def put_on_path(folder: Path, name: str) -> Path:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def invoke(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def findings(code: int = 0) -> dict[str, Finding]:
    """Findings that `doctor --json` printed, by name."""
    return {finding["name"]: finding for finding in json.loads(invoke("doctor", "--json", code=code).stdout)}


def test_json_is_a_list_of_findings() -> None:
    found = json.loads(invoke("doctor", "--json").stdout)
    assert isinstance(found, list)
    for finding in found:
        assert set(finding) == {"name", "verdict", "found", "mend"}
        assert finding["verdict"] in {"ok", "info", "warning", "problem"}
        assert finding["found"]
        assert bool(finding["mend"]) == (finding["verdict"] in {"warning", "problem"})
    names = [finding["name"] for finding in found]
    assert set(names) >= {*LOOKS, "C++ compiler", "cache folder"}
    assert len(names) == len(set(names))


def test_what_it_says_of_this_machine_is_true() -> None:
    found = findings()
    assert torch.__version__ in found["torch"]["found"]
    assert found["device"]["found"].startswith("cpu: ")
    assert found["torch.compile"]["found"] == "will be tried, mode default"
    assert f"{torch.get_num_threads()} torch threads" in found["threads"]["found"]
    assert f"matmul precision {torch.get_float32_matmul_precision()}" in found["flags"]["found"]
    assert "typer" in found["packages"]["found"]


def test_the_doctor_changes_nothing(tmp_path: Path) -> None:
    variables, threads = dict(os.environ), torch.get_num_threads()
    findings()
    assert (dict(os.environ), torch.get_num_threads()) == (variables, threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_the_table_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    output = invoke("doctor").stdout
    assert f"accelerate_tts {__version__}" in output
    for name in LOOKS:
        assert name in output
    assert "! C++ compiler: install one" in output
    assert "{" not in output


def test_the_script_itself_prints_pure_json() -> None:
    command = [sys.executable, "-c", "from accelerate_tts.cli import main; main()", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert {finding["name"] for finding in json.loads(done.stdout)} >= LOOKS, done.stderr
    assert done.returncode == 0


# --- each problem --------------------------------------------------------------------------------------------------


def test_a_compiler_that_is_there(tmp_path: Path) -> None:
    finding = findings()["C++ compiler"]
    assert finding["verdict"] == "ok"
    assert finding["found"].startswith(str(tmp_path / "bin"))


def test_which_kernels_answer_and_on_whose_threads() -> None:
    library = kernels()
    found = findings()
    assert found["kernels"]["verdict"] == found["kernels' threads"]["verdict"] == "ok"
    assert found["kernels"]["found"].startswith(f"{library.level} (of base")
    assert str(library.path) in found["kernels"]["found"]
    assert library.threads in found["kernels' threads"]["found"]


def test_a_wheel_without_kernels_says_what_it_lost() -> None:
    code = "from accelerate_tts.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, check=False,
        env=os.environ | {"ACCELERATE_TTS_KERNELS": "none"},
    )  # fmt: skip
    (finding,) = [finding for finding in json.loads(done.stdout) if finding["name"] == "kernels"]
    assert finding["verdict"] == "warning"
    assert "a CPU's decode steps and few-row layers are left to torch" in finding["found"]
    assert finding["mend"] == "unset it to use them"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners are POSIX's")
def test_a_compiler_cache_of_somebody_else_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    given_to(tmp_path / "cache", 4321, monkeypatch)
    finding = findings(code=1)["cache folder"]
    assert finding["verdict"] == "problem"
    assert "it belongs to user 4321, and torch loads the code that lies there" in finding["found"]


def test_no_compiler_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = findings()["C++ compiler"]
    assert finding["verdict"] == "warning"
    assert "not on PATH" in finding["found"]
    assert "install" in finding["mend"]


def test_the_compiler_of_cxx_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "my-c++")
    finding = findings()["C++ compiler"]
    assert finding["verdict"] == "warning"
    assert "my-c++" in finding["found"]
    path = put_on_path(tmp_path, "my-c++")
    assert findings()["C++ compiler"]["found"] == str(path)


@pytest.mark.parametrize(
    ("variable", "text"),
    [("ACCELERATE_TTS_WORKERS", "many"), ("TRANSLATOR_TORCH_COMPILE", "maybe"), ("ACCELERATE_TTS_DISABLE", "perhaps")],
)
def test_a_bad_variable_is_a_problem(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv(variable, text)
    found = findings(code=1)
    assert found["settings"]["verdict"] == "problem"
    assert variable in found["settings"]["found"]
    assert repr(text) in found["settings"]["found"]
    assert found["settings"]["mend"]
    assert set(found) >= LOOKS, "one problem must not hide the rest"
    assert "!! settings: correct or unset" in invoke("doctor", code=1).stdout


@pytest.mark.parametrize("text", ["[/x]", "[bold]gpu[/bold]", "[red]", ":warning:"])
def test_text_that_looks_like_markup_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TF32", text)
    assert f"ACCELERATE_TTS_TF32={text!r}" in " ".join(invoke("doctor", code=1).stdout.split())


def test_settings_that_differ_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PACK", "RETUNE", "TUNE_PATIENCE"):  # what the tests themselves set
        monkeypatch.delenv(f"ACCELERATE_TTS_{name}", raising=False)
    assert "all defaults" in findings()["settings"]["found"]
    monkeypatch.setenv("ACCELERATE_TTS_WORKERS", "2")
    monkeypatch.setenv("TRANSLATOR_TORCH_COMPILE", "0")
    found = findings()
    assert "compile=False, workers=2" in found["settings"]["found"]
    assert "ACCELERATE_TTS_WORKERS, TRANSLATOR_TORCH_COMPILE" in found["settings"]["found"]
    assert found["torch.compile"]["found"] == "will not be tried"


def test_switched_off_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_DISABLE", "1")
    finding = findings()["switch"]
    assert finding["verdict"] == "warning"
    assert "ACCELERATE_TTS_DISABLE" in finding["mend"]


def test_a_forced_device_that_is_absent_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_DEVICE", "mps")
    found = findings(code=1)
    assert found["device"]["verdict"] == "problem"
    assert "device='mps' is not available" in found["device"]["found"]
    assert found["cache folder"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("built", "said"),
    [
        ({}, "CPU build"), ({"cuda": "13.0"}, "CUDA 13.0"), ({"hip": "7.1"}, "ROCm 7.1"),
        ({"xpu": "20260101"}, "XPU 20260101"),
    ],
)  # fmt: skip
def test_it_says_what_torch_was_built_for(built: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, kind, built.get(kind), raising=False)
    assert findings()["torch"]["found"] == f"{torch.__version__} ({said})"


def test_a_driver_that_torch_cannot_use(tmp_path: Path) -> None:
    """Stand-in for a GPU's driver: an `nvidia-smi` on PATH."""
    assert "GPU" not in findings()
    put_on_path(tmp_path, "nvidia-smi")
    finding = findings()["GPU"]
    assert finding["verdict"] == "warning"
    assert "CUDA build" in finding["mend"]


def test_too_many_omp_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    finding = findings()["OMP_NUM_THREADS"]
    assert finding["verdict"] == "warning"
    assert "4096" in finding["found"]
    assert "unset" in finding["mend"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in findings()


def test_too_many_torch_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads((os.cpu_count() or 1) + 1)
    try:
        finding = findings()["threads"]
    finally:
        torch.set_num_threads(before)
    assert finding["verdict"] == "warning"
    assert "OMP_NUM_THREADS=" in finding["mend"]


@pytest.mark.parametrize("folder", ["{tmp}/file/cache", *(["/proc/1/x"] if sys.platform == "linux" else [])])
def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("a file where a folder should be: not even root can write below it")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder.format(tmp=tmp_path))
    finding = findings()["cache folder"]
    assert finding["verdict"] == "warning"
    assert "not writable" in finding["found"]
    assert "TORCHINDUCTOR_CACHE_DIR" in finding["mend"]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for a disk with 1 GiB left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1024**3))
    finding = findings()["cache folder"]
    assert finding["verdict"] == "warning"
    assert "2 GiB" in finding["mend"]


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for a machine whose memory is taken."""
    monkeypatch.setattr(doctor.memory, "free_bytes", lambda _: 1024**3)
    monkeypatch.setattr(doctor.memory, "under_pressure", lambda _: True)
    finding = findings()["memory"]
    assert (finding["verdict"], finding["found"]) == ("warning", "1.0 GiB free on cpu")
    assert finding["mend"]


def test_a_look_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for a driver that fails."""

    def refuse(_device: object) -> int:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(doctor.memory, "free_bytes", refuse)
    found = findings(code=1)
    assert found["memory"]["verdict"] == "problem"
    assert found["memory"]["found"] == "RuntimeError: the driver is gone"
    assert set(found) >= LOOKS


# --- receipts ------------------------------------------------------------------------------------------------------


STAGES = (
    StageResult("decoder", "fold weight norm", True, "faster", 0.0123, 0.0100, 1.23, 1.2, 3e-7, None, 0.5),
    StageResult("encoder", "torch.compile", False, "no gain", 0.0002, 0.0002, 1.0, 0.9, 0.0, 1, 2.0),
)
RECEIPT = Receipt("Vits", "cpu (Test)", {"torch": "2.14"}, STAGES, 1.5, 1.4, 1.05, 1.33, 3e-7, 4.5, ("a note",))


def shown(receipt: Receipt, folder: Path) -> str:
    """Output of `accelerate-tts receipt`, with each run of white space as one space."""
    path = folder / "receipt.json"
    receipt.save(path)
    return " ".join(invoke("receipt", str(path)).stdout.split())


def test_a_receipt_is_shown(tmp_path: Path) -> None:
    output = shown(RECEIPT, tmp_path)
    for text in ("Receipt: Vits on cpu (Test)", "decoder: fold weight norm 12.3 ms 10.0 ms 1.23x 3e-07 kept, faster"):
        assert text in output
    for text in ("encoder: torch.compile 200 us 200 us 1.00x bit-exact rejected: no gain", "the whole 1.40 s 1.05 s"):
        assert text in output
    for text in ("1.33x", "1 kept, 0 recompiles", "tuning took 4.5 s (torch 2.14)", "note: a note"):
        assert text in output


@pytest.mark.parametrize("text", ["list[int]", "[/x]", "[red]", ":warning:"])
def test_a_receipt_s_own_texts_are_no_markup(tmp_path: Path, text: str) -> None:
    stage = StageResult(f"part {text}", f"stage {text}", False, f"reason {text}")
    output = shown(Receipt(f"what {text}", f"device {text}", {f"torch {text}": "2"}, (stage,), notes=(text,)), tmp_path)
    for name in ("part", "stage", "reason", "what", "device", "torch", "note:"):
        assert f"{name} {text}" in output


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(RECEIPT.to_json()), **fields}).encode()


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"hello",
    "cut off": RECEIPT.to_json().encode()[:-20],
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"3",
    "another thing": b'{"name": "x"}',
    "only a format": b'{"format": 1}',
    "a newer format": changed(format=99),
    "a stage with an unknown field": changed(stages=[{"part": "x", "surprise": 1}]),
    "stages are text": changed(stages="many"),
    "versions are text": changed(versions="2.14"),
    "seconds are text": changed(seconds="long"),
    "a ratio is a list": changed(ratio=[1]),
    "notes are a number": changed(notes=3),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_receipt_is_an_error_and_no_traceback(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(content)
    result = invoke("receipt", str(path), code=2)
    assert result.stderr.startswith(f"error: {path}: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    result = invoke("receipt", str(tmp_path / name), code=2)
    assert f"error: {tmp_path / name}: " in result.stderr
    assert "Traceback" not in result.output
