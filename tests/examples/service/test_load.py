"""The load test at small size: two services, a quick stand-in for a voice, and more callers than places."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import serving  # noqa: F401 - it skips where the extra is not installed
from schemas import SCHEMA, objections

if TYPE_CHECKING:
    import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_each_answer_is_what_it_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    service_load = importlib.import_module("service_load")
    command = ["--systems", "slow=standin:slow", "--callers", "1,4", "--most", "2", "--seconds", "1", "--rounds",
               "1", "--into", str(tmp_path)]  # fmt: skip
    service_load.main(command)
    (path,) = tmp_path.glob("*/service-slow-exact*.json")
    content = json.loads(path.read_text("utf-8"))
    assert list(objections(content, SCHEMA)) == []
    one, four = content["service"]
    assert (one["callers"], four["callers"]) == (1, 4)
    for item in (one, four):
        for name in ("plain", "decorated"):
            assert item[name]["answers"] >= item["callers"]
            assert item[name]["most_inside"] <= 2
            assert 0.0 < item[name]["first_p50"] <= item[name]["total_p50"]
    assert four["plain"]["refused"] > 0
    assert four["decorated"]["refused"] > 0
    assert one["plain"]["refused"] == 0
