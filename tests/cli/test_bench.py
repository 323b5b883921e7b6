"""The bench command: real classes at small size, figures that come from runs, and errors that name the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accelerate_tts import PerformanceOptimizer, SettingsError
from accelerate_tts.cli.app import app
from accelerate_tts.cli.bench import command, measure, report, systems
from accelerate_tts.cli.bench.measure import Measured, Ratio


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is other tests' business, and takes a minute."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setattr("accelerate_tts.optimizer._optimizer", PerformanceOptimizer())


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments, "--size", "tiny", "--pairs", "2", "--tune-seconds", "20"])


def test_it_prints_a_table_and_writes_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = bench("mms", "higgs", "--json", str(path))
    assert done.exit_code == 0, done.output
    mms, higgs = json.loads(path.read_text("utf-8"))
    assert (mms["system"], mms["size"], mms["precision"]) == ("mms", "tiny", "exact")
    assert mms["step"] is None
    assert mms["error"] <= 1e-4
    assert higgs["same_tokens"] is True
    for ratio in (mms["whole"], higgs["whole"], higgs["step"], higgs["prompt"]):
        assert 0 < ratio["lowest"] <= ratio["ratio"] <= ratio["highest"]
        assert ratio["before"] > 0
    assert higgs["floor"] > 0
    for text in ("promised 1.1x to 1.2x", "whole", "one token", "same tokens", "recompiles"):
        assert text in done.output


@pytest.mark.parametrize("name", ["chatterbox", "xtts", "voice-clone"])
def test_the_other_systems_speak_the_same_twice(name: str) -> None:
    """So that a difference between untouched and tuned is a difference."""
    import torch

    from accelerate_tts.engine.random_state import seeded
    from accelerate_tts.engine.verify import compare

    torch.manual_seed(0)
    built = systems.SYSTEMS[name].build("tiny", None)
    outputs = []
    for _ in range(2):
        with seeded("cpu"), torch.no_grad():
            outputs.append(built.speak(0.5))
    assert compare(*outputs).error == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonesuch"], "'nonesuch' is not one of chatterbox, higgs"),
        (["mms", "--precision", "sloppy"], "precision='sloppy'"),
        (["mms", "--pairs", "0"], "greater than or equal to 1"),
        (["mms", "--tune-seconds", "nan"], "--tune-seconds"),
        (["mms", "--json", "/no/such/folder/bench.json"], "--json /no/such/folder/bench.json"),
        (["mms", "--json", "/"], "--json /"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_a_size_that_there_is_not() -> None:
    done = CliRunner().invoke(app, ["bench", "mms", "--size", "huge"])
    assert done.exit_code == 2
    assert "size='huge'" in done.output


def test_a_system_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "import_module", lambda name: __import__("no_such_package_" + name))
    done = bench("xtts")
    assert done.exit_code == 2
    assert "pip install 'coqui-tts[codec]' six" in " ".join(done.output.split())
    both = bench("xtts", "mms")
    assert both.exit_code == 0
    assert "xtts, exact is left out: MissingExtraError" in both.output


def test_a_system_that_fails_costs_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an hour's bench of all, the one that ran out of memory is missing, and nothing else."""
    measured = command.bench

    def fails(name: str, *args: Any, **kwargs: Any) -> Measured:
        if name == "xtts":
            raise MemoryError("not enough")
        return measured(name, *args, **kwargs)

    monkeypatch.setattr(command, "bench", fails)
    done = bench("xtts", "mms")
    assert done.exit_code == 0
    assert "xtts, exact is left out: MemoryError: not enough" in done.output
    assert "mms, exact: promised" in done.output


def test_the_overview_has_a_row_a_system_and_a_column_a_precision() -> None:
    def measured(system: str, precision: str, after: float, **facts: Any) -> Measured:
        return Measured(
            system, "full", precision, None, Ratio.of([(2.0, after)]), None, None, 1e-6, None, None, None, 30.0,  # type: ignore[arg-type]
            facts.get("warm_start"), 1.25, 0, facts.get("naive"),
        )  # fmt: skip

    found = [
        measured("mms", "exact", 1.6, naive=2.5, warm_start=3.0), measured("mms", "fast", 0.5),
        measured("xtts", "balanced", 1.0),
    ]  # fmt: skip
    header, mms, xtts = (dict(zip(report.OVERVIEW, row, strict=True)) for row in report.overview(found))
    assert list(header) == list(header.values())
    assert (mms["torch.compile"], mms["exact"], mms["balanced"], mms["fast"]) == ("0.80x", "1.25x", "", "4.00x")
    assert (mms["tuned in"], mms["warm pack"], mms["memory"]) == ("30 s, 30 s", "3 s, -", "1.25x, 1.25x")
    assert (xtts["promised"], xtts["balanced"], xtts["torch.compile"]) == ("1.2 to 1.4x", "2.00x", "")


def test_ratios_are_of_pairs() -> None:
    ratio = measure.Ratio.of([(4.0, 2.0), (9.0, 3.0), (5.0, 5.0)])
    assert (ratio.before, ratio.after, ratio.ratio, ratio.lowest, ratio.highest) == (5.0, 3.0, 2.0, 1.0, 3.0)


def test_run_checks_its_names_before_it_builds_anything() -> None:
    with pytest.raises(SettingsError, match="'other' is not one of"):
        command.run(["mms", "other"], command.Options(size="tiny"))
