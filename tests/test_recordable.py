"""The table of parts in decision 0009: what a trace as on CUDA finds in upstream's classes. No device is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {
    "mms": "transformers", "dac": "transformers", "encodec": "transformers", "univnet": "transformers",
    "xtts-speaker": "TTS", "campplus": "chatterbox", "voice-clone": "resemblyzer",
}  # fmt: skip
"""Systems that take seconds, and upstream's packages."""


@pytest.fixture
def recordable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for folder in ("benchmarks/strangers", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield importlib.import_module("recordable")
    for name in ("recordable", "systems"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_the_table_is_what_a_trace_finds(name: str, recordable: Any) -> None:
    pytest.importorskip(NEEDS[name])
    page = (ROOT / "docs" / "decisions" / "0009-cuda.md").read_text("utf-8").splitlines()
    expected = [line for line in page if line.startswith(f"| {name}: ")]
    assert expected
    assert [*recordable.told({name: recordable.rows(name, "cpu")})][2:] == expected
