"""The runner of upstream's own tests: what is a finding, what its log says, and when a model is tuned."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import receipt_of

FOLDER = Path(__file__).parents[1] / "benchmarks" / "upstream_tests"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The runner and the plugin."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run"), importlib.import_module("plugin")
    for name in ("run", "plugin"):
        del sys.modules[name]


def row(**tuned: Any) -> dict[str, Any]:
    test = {"outcome": "passed", "why": "", "seconds": 0.1}
    return {
        "date": "2026-11-28", "versions": {"transformers": "5.1", "tests": "5.2"}, "left": [],
        "untouched": dict.fromkeys(tuned, test),
        "tuned": {name: {**test, **facts} for name, facts in tuned.items()},
    }  # fmt: skip


def test_a_finding_fails_tuned_each_time_and_untouched_never(scripts: Any) -> None:
    run, _ = scripts
    found = row(
        well={}, new={"outcome": "failed"}, sure={"outcome": "failed", "again": ["passed", "failed"]},
        random={"outcome": "failed", "again": ["failed", "failed"]},
        once={"outcome": "failed", "again": ["passed", "passed"]}, long={"outcome": "stopped"},
    )  # fmt: skip
    assert run.findings(found) == ["new", "sure"]


def test_no_folder_of_a_machine_is_stored(scripts: Any) -> None:
    run, _ = scripts
    for kept in ("site-packages/torch/nn.py", "src/transformers/modeling_utils.py", "tests/test_modeling_common.py"):
        assert run.without_folders(f'File "/a/b-c/d.0/{kept}", line 3') == f'File "{kept}", line 3'


def test_the_page_is_what_the_results_say(scripts: Any) -> None:
    run, _ = scripts
    text = run.PAGE.read_text("utf-8")
    results = json.loads(run.RESULTS.read_text("utf-8"))
    assert run.with_table(text, results) == text, "run make upstream-tests-page"
    results["models"]["llama"]["versions"]["transformers"] = "0"
    assert run.with_table(text, results) != text


def test_what_is_known_has_its_reason(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = scripts
    monkeypatch.setattr(run, "KNOWN", {"*::T::test_class*": "it compares classes"})
    found = row(**{"T::test_class": {"outcome": "failed"}, "T::test_other": {"outcome": "failed"}})
    assert run.unexplained("toy", found) == ["T::test_other"]
    table = run.page({"models": {"toy": found, "gone": {**row(), "skipped": "no tests"}}})
    assert "| toy | 2026-11-28 | 5.1 | 5.2 | 2 | 2 | 0 | 0 | `test_other` |" in table
    assert "- it compares classes: toy `test_class`." in table
    assert "| gone | 2026-11-28 | 5.1 | 5.2 | left out: no tests |" in table


def test_a_process_that_died_is_laid_to_the_test_that_it_was_in(scripts: Any, tmp_path: Path) -> None:
    run, _ = scripts
    log = tmp_path / "log"
    text = "/home/me/env/lib/python3.11/site-packages/torch/nn.py:3: in\n/srv/python/lib/python3.11/copy.py:1"
    passed = {"test": "a", "outcome": "passed", "text": text}
    lines = [{"collected": ["a", "b", "c"]}, {"begins": "a"}, passed, {"begins": "b"}]
    log.write_text("\n".join(map(json.dumps, lines)))
    stopped = run.read_log(log, "")  # by the limit of seconds: nobody's fault
    assert list(stopped["tests"]) == ["a"]
    assert stopped["tests"]["a"]["text"] == "site-packages/torch/nn.py:3: in\nlib/python3.11/copy.py:1"
    died = run.read_log(log, "the process ended with status -11")
    assert died["collected"] == ["a", "b", "c"]
    assert died["tests"]["b"]["outcome"] == "failed"
    assert run.read_log(tmp_path / "none", "")["tests"] == {}


def test_tests_run_in_a_mixed_order_that_is_the_same_each_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plugin = scripts
    monkeypatch.delenv("UPSTREAM_ONLY", raising=False)
    names = [f"T::test_{letter}" for letter in "abcdefghijkl"]
    orders = []
    for number, given in enumerate((names, names[::-1])):
        items: list[Any] = [SimpleNamespace(nodeid=f"test_modeling_toy.py::{name}") for name in given]
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        log = tmp_path / str(number)
        plugin._Log(log, None).pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        orders.append(json.loads(log.read_text())["collected"])
        assert orders[-1] == [item.nodeid.partition("::")[2] for item in items]
    assert orders[0] == orders[1] != names
    assert sorted(orders[0]) == names


def test_a_row_is_gone_on_with_in_its_own_versions_alone(scripts: Any, tmp_path: Path) -> None:
    run, _ = scripts
    told = run.versions_of(tmp_path)
    assert told["tests"] == "not told"
    (tmp_path / "setup.py").write_text('setup(\n    name="transformers",\n    version="5.2.0.dev0",  # x.y.z\n)\n')
    versions = run.versions_of(tmp_path)
    assert versions == {**told, "tests": "5.2.0.dev0"}
    fresh = run.fresh_row(versions)
    assert run.goes_on(fresh, versions)
    assert run.goes_on(fresh, {**versions, "accelerate_tts": "0"}), "a mend is looked at by what is left"
    assert not run.goes_on(fresh, told)
    assert not run.goes_on(fresh, {**versions, "transformers": "0"})
    assert not run.goes_on({**fresh, "skipped": "no tests"}, versions)
    assert not run.goes_on(None, versions)


def test_only_what_passed_untouched_runs_tuned(scripts: Any) -> None:
    run, _ = scripts
    given: list[Any] = []

    class Runner:
        def run(self, _model: str, names: Any, *, tuned: bool) -> dict[str, Any]:
            given.append((names, tuned))
            outcomes = {"a": "failed" if tuned else "passed", "b": "skipped", "c": "passed"}
            ran = [name for name in names or outcomes if name != "c"]  # the limit came before it
            tests = {name: {"outcome": outcomes[name], "why": ""} for name in ran}
            return {"collected": names or list(outcomes), "tests": tests, "ended": ""}

    found = run.fresh_row({"transformers": "5.1", "tests": "5.2"})
    run.run_model(Runner(), "toy", found)
    assert given == [(None, False), (["a"], True), (["a"], False), (["a"], True)]
    assert found["left"] == ["c"]
    assert run.findings(found) == ["a"]
    given.clear()
    run.run_model(Runner(), "toy", found)  # the same command goes on where it was
    assert given == [(["c"], False)]


def test_a_model_is_tuned_at_its_first_call_in_eval_mode(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plugin = scripts
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    tuner = plugin.Tuner()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))

        def forward(self, x: torch.Tensor, memory: list[Any], processors: Any = ()) -> torch.Tensor:
            memory.append(1)
            for processor in processors:
                processor()
            return self.inner(x)

    class Processor:
        """It has a state and can be called, as logits processors of tests."""

        calls = 0

        def __call__(self) -> None:
            self.calls += 1

    class Called(Model):
        __call__ = tuner.entry(nn.Module.__call__)

    x, memory = torch.randn(1, 4, 9), []
    model = Called()
    model(x, memory)
    assert receipt_of(model) is None, "in train mode it is left alone"
    model.eval()
    expected = Model.__call__(model, x, [])
    processor = Processor()
    torch.testing.assert_close(model(x, memory, processors=[processor]), expected)
    assert memory == [1, 1], "the calls of the tuning have their own arguments"
    assert processor.calls == 1, "and so have those that can be called"
    receipt = receipt_of(model)
    assert receipt is not None
    assert {stage.stage for stage in receipt.kept} >= {"fold weight norm"}
    model(x, memory)
    told = tuner.told()
    assert told["models"] == 1
    assert told["kept"]["fold weight norm"] == 1
    assert tuner.told()["models"] == 0
