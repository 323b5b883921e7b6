"""The comparison of workers with one and two threads, at small size, with a quick stand-in for a voice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from schemas import SCHEMA, objections

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.usefixtures("ray_here")
def test_threads_take_turns_and_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    workers: Any = importlib.import_module("workers")
    options = ["--systems", "standin:slow", "--threads", "1,2", "--sentences", "4", "--rounds", "2"]
    workers.main([*options, "--into", str(tmp_path)])
    (path,) = tmp_path.glob("*/cluster-standin-slow-exact*.json")
    content = json.loads(path.read_text("utf-8"))
    assert list(objections(content, SCHEMA)) == []
    assert [(one["threads"], one["rounds"]) for one in content["cluster"]] == [(1, 2), (2, 2)]
    for one in content["cluster"]:
        assert 0.0 < one["lowest"] <= one["rate"] <= one["highest"]
