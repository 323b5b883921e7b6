"""Arbitrary arguments of `accelerate-tts`: it works, or reports the error; it never prints a traceback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from accelerate_tts.cli.app import app
from accelerate_tts.cli.bench import command as bench
from accelerate_tts.cli.demo import command as demo

NUMBERS = ["0", "-1", "1", "50", "51", "1e400", "nan", "inf", "-inf", "9" * 400, "1.5", "", "x", "\0", "٣", "0x10"]
TEXTS = [
    "",
    " ",
    "exact",
    "fast",
    "EXACT",
    "tiny",
    "full",
    "mms",
    "all",
    "none",
    "é",
    "\ud800",
    "a" * 5000,
    "-",
    "--",
    "/",
]
WORDS = st.sampled_from([*NUMBERS, *TEXTS]) | st.text(max_size=8)
FLAGS = st.sampled_from(
    ["--size", "--precision", "--layers", "--pairs", "--tune-seconds", "--warm-start", "--no-naive", "--json", "--plot",
     "--html", "-o", "--output", "--receipt", "--help", "--version", "--nothing"]
)  # fmt: skip
COMMANDS = st.sampled_from(
    ["bench", "demo", "receipt", "pack", "doctor", "nothing", "pack export", "pack load", "pack list"]
)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record the commands that begin. Benchmarks and demonstrations take minutes: only their options are tested."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "packs"))
    monkeypatch.setattr(bench, "run", lambda *options: found.append(options))
    monkeypatch.setattr(demo, "run", lambda *options: found.append(options))
    monkeypatch.setattr("accelerate_tts.cli.doctor.run", lambda as_json, *_: 0 if isinstance(as_json, bool) else 3)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=COMMANDS, arguments=st.lists(WORDS | FLAGS, max_size=5))
@example(command="bench", arguments=["mms", "--tune-seconds", "nan"])
@example(command="bench", arguments=["mms", "--tune-seconds", "inf"])
@example(command="bench", arguments=["mms", "--precision", "int4"])
@example(command="bench", arguments=["mms", "--pairs", "51"])
@example(command="receipt", arguments=["missing.json"])
@example(command="receipt", arguments=["/"])
@example(command="receipt", arguments=["\ud800"])
@example(command="receipt", arguments=["a" * 5000])
@example(command="pack export", arguments=["/nowhere/at/all"])
@example(command="pack export", arguments=["a" * 5000])
@example(command="pack load", arguments=["/"])
@example(command="pack load", arguments=["a" * 5000])
def test_any_options(command: str, arguments: list[str], begun: list[tuple[Any, ...]]) -> None:
    begun.clear()
    result = CliRunner().invoke(app, [*command.split(), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in {0, 1, 2}
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or result.output.strip(), "it failed without a word"
    for options in begun:
        if isinstance(options[-1], bench.Options):
            assert math.isfinite(options[-1].tune_seconds)
            assert 1 <= options[-1].pairs <= 50
            assert options[-1].size in {"tiny", "full"}
            assert set(options[-1].precisions) <= {"exact", "balanced", "fast"}
