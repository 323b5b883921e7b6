"""The strangers' runner: what it calls a difference and a failure, and which systems it leaves out.

That the systems work decorated is shown by `make strangers`, which runs each of them in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "strangers"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The runner and the systems."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run"), importlib.import_module("systems")
    for name in ("run", "systems"):
        del sys.modules[name]


def test_outputs_are_compared_leaf_by_leaf(scripts: Any) -> None:
    run, _ = scripts
    wave = torch.ones(4)
    assert run.difference([wave], [wave.clone()]) == (0.0, "")
    assert run.difference([wave, wave], [wave, wave * 1.5]) == (pytest.approx(0.5), "")
    assert run.difference([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == (float("inf"), "other tokens")
    assert run.difference([wave], [wave, wave])[0] == float("inf")
    assert run.difference([wave], [wave.double()])[0] == float("inf")
    broken = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    assert run.difference([broken], [broken.clone()])[0] == 0.0
    assert run.difference([wave], [broken])[0] == float("inf")


def test_the_page_is_what_the_results_say(scripts: Any) -> None:
    run, _ = scripts
    text = run.PAGE.read_text("utf-8")
    results = json.loads(run.RESULTS.read_text("utf-8"))
    assert run.with_table(text, results) == text, "run make strangers-page"
    assert run.with_table(text, {**results, "versions": {"torch": "0"}}) != text


def test_loads_are_made_in_one_order(scripts: Any) -> None:
    """A load in `fast` after `every-fast` found the pack of it, and said that what is not faster was kept."""
    run, _ = scripts
    assert run.ordered("every-fast,exact,fast,again") == ["exact", "again", "fast", "every-fast"]


def test_results_name_no_folder_of_this_machine(scripts: Any) -> None:
    run, _ = scripts
    said = f'File "{FOLDER}/run.py", line 1; {Path(torch.__file__)}: {Path.home()}/a'
    assert run.without_folders(said) == 'File "benchmarks/strangers/run.py", line 1; torch/__init__.py: a'
    for page in (FOLDER / "results.json", FOLDER.parents[1] / "docs" / "STRANGERS.md"):
        assert not re.search(r"/(site-packages|home|root|tmp)/|/benchmarks/strangers/", page.read_text("utf-8")), page


@pytest.mark.parametrize(
    ("undecorated", "failed", "expected"),
    [("works", None, False), ("works", "other tokens", True), ("ValueError: no", "x", False)],
)
def test_what_fails_undecorated_is_no_failure_of_ours(
    scripts: Any, undecorated: str, failed: str | None, expected: bool
) -> None:
    run, _ = scripts
    assert run.fails({"undecorated": undecorated, "loads": [{"failed": failed}]}) is expected


def test_a_system_whose_package_is_absent_is_left_out_with_the_reason(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, systems = scripts
    absent = systems.Stranger("none", "no_such_package", "no-such-package", lambda: None)
    monkeypatch.setitem(systems.SYSTEMS, "none", absent)
    row = run.run_together(["none"], ["exact"], 1.0, lambda *_args: None)["none"]
    assert row["skipped"] == "no_such_package is not installed"
    assert not run.fails(row)


class Book(torch.nn.Module):
    """A code book of zeros, as a codec begins with, and what decodes its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(8, 4))
        self.decoder = torch.nn.Linear(4, 4)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.get_buffer("embed")[codes])


def test_no_code_book_is_empty_and_what_says_the_same_to_each_input_proves_nothing(scripts: Any) -> None:
    run, systems = scripts

    def stranger(call: Any) -> Any:
        codes = ((torch.arange(4),), (torch.arange(4, 8),))
        return systems.Stranger("book", "torch", "torch", lambda: systems.System(Book().eval(), call, codes))

    outputs, repeats = run.undecorated(stranger(lambda model, codes: model(codes)))
    assert repeats
    assert not torch.equal(outputs[0][0], outputs[1][0]), "the decoder heard nothing of the codes"
    with pytest.raises(ValueError, match="both inputs give the same"):
        run.undecorated(stranger(lambda model, codes: model(codes * 0)))


def test_one_system_is_loaded_decorated_and_compared(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, systems = scripts
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")

    def build() -> Any:
        torch.manual_seed(0)
        inputs = ((torch.ones(1, 4),), (torch.ones(2, 4),))
        return systems.System(torch.nn.Linear(4, 4).eval(), lambda model, x: model(x), inputs)

    stranger = systems.Stranger("linear", "torch", "torch", build)
    expected, repeats = run.undecorated(stranger)
    assert repeats
    row = run.one_load(stranger, "exact", expected, 1.0, sampled=False)
    assert (row["failed"], row["error"], row["mode"]) == (None, 0.0, "inference")
    wrong = [[leaf + 1 for leaf in output] for output in expected]
    assert "relative error" in run.one_load(stranger, "exact", wrong, 1.0, sampled=False)["failed"]
