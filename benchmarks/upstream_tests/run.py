"""transformers' own tests of its models, untouched and with each model tuned at its first call.

    python benchmarks/upstream_tests/run.py --checkout FOLDER [MODEL ...] [--seconds 600] [--results FILE]

FOLDER holds transformers' repository at the tag of the installed version, or near it. Its own tests of a model,
`tests/models/MODEL/test_modeling_MODEL.py`, run in two processes: as they are, and with each `PreTrainedModel` tuned
(`plugin.py`) at its first call in eval mode. Every change that applies and is right in `exact` is kept, faster or not.
A test that passes untouched and fails tuned is a finding, unless it fails untouched, too, when both run once more.

One line a model; everything is in the JSON file, and docs/STRANGERS.md has a table of it. A process that does not end
in `--seconds` is stopped; the same command goes on where it was, and begins a row anew if that was of another release
of transformers or of the tests. The exit status is 1 if there is a finding that `KNOWN` does not explain. No time is
compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate_tts.storage.files import write_whole

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "STRANGERS.md"
MODELS = (
    "vits", "speecht5", "fastspeech2_conformer", "univnet", "bark", "csm", "dia", "higgs_audio_v2",
    "higgs_audio_v2_tokenizer", "musicgen", "musicgen_melody", "moshi", "xcodec", "xcodec2", "dac", "encodec", "mimi",
    "vibevoice_acoustic_tokenizer", "kyutai_speech_to_text", "clvp", "seamless_m4t", "seamless_m4t_v2",
    "qwen2_5_omni", "llama", "gpt2", "qwen2", "qwen3", "mistral", "whisper", "wav2vec2", "hubert", "t5", "bert",
)  # fmt: skip
KNOWN: dict[str, str] = {}
"""Patterns of `model::test` that may fail tuned, and the reasons: they assert on what a change is allowed to change."""
_BEGIN, _END = "<!-- upstream tests: begin -->", "<!-- upstream tests: end -->"
_TIMEOUT = 60
"""Seconds of one test. Tuning takes most of them where a model has many parts."""
_WELL = {0, 1, 5, 124}
"""Status of pytest if all passed, some failed or none was left; the last one is timeout(1)'s, as `--python` may be."""


# --- one process ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """Runs tests of models in processes.

    Attributes:
        checkout: transformers' repository.
        python: The interpreter.
        seconds: Seconds after which a process is stopped.
    """

    checkout: Path
    python: str
    seconds: float

    def run(self, model: str, names: list[str] | None, *, tuned: bool) -> dict[str, Any]:
        """Run tests of a model.

        Args:
            model: The model.
            names: The tests; `None` for all of them.
            tuned: Tune the models.

        Returns:
            `collected`, the names of the tests; `tests`, what was logged of each that ran; and `ended`, how the process
            ended if it was neither well nor by the limit.
        """
        with tempfile.TemporaryDirectory() as folder:
            log, only = Path(folder) / "log", Path(folder) / "only"
            told = {
                "UPSTREAM_LOG": str(log), "UPSTREAM_TUNED": "1" if tuned else "0", "HF_HUB_OFFLINE": "1",
                "ACCELERATE_TTS_TORCH_COMPILE": "0", "ACCELERATE_TTS_PACK": "0", "ACCELERATE_TTS_TUNE_PATIENCE": "0",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
            }  # fmt: skip
            if names is not None:
                only.write_text("\n".join(names), encoding="utf-8")
                told["UPSTREAM_ONLY"] = str(only)
            command = [
                self.python, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-W", "ignore",
                f"--timeout={_TIMEOUT}", f"tests/models/{model}/test_modeling_{model}.py",
            ]  # fmt: skip
            ended = ""
            try:
                done = subprocess.run(
                    command, cwd=self.checkout, env={**os.environ, **told}, timeout=self.seconds, capture_output=True,
                    text=True, check=False,
                )  # fmt: skip
                if done.returncode not in _WELL:
                    ended = f"the process ended with status {done.returncode}: {done.stdout[-500:].strip()}"
            except subprocess.TimeoutExpired:
                pass
            return read_log(log, ended)


def without_folders(text: str) -> str:
    """Cut the folders of this machine off the paths in a text, such as a traceback's."""
    return re.sub(r"(?:/[\w.+-]+)+/(?=(?:site-packages|lib/python3\.\d+|src|tests)/)", "", text)


def read_log(log: Path, ended: str) -> dict[str, Any]:
    """Read what a process wrote about its tests; the test that it was in has failed if it ended early."""
    ended = without_folders(ended)
    read: dict[str, Any] = {"collected": [], "tests": {}, "ended": ended}
    begun = None
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        facts = json.loads(without_folders(line))
        read["collected"] = facts.get("collected", read["collected"])
        begun = facts.get("begins", begun)
        if "test" in facts:
            read["tests"][facts.pop("test")] = {name: value for name, value in facts.items() if value}
            begun = None
    if ended and begun is not None:  # a crash, not the limit
        read["tests"][begun] = {"outcome": "failed", "why": ended, "seconds": 0.0, "text": ended}
    return read


# --- one model --------------------------------------------------------------------------------------------------------


def run_model(runner: Runner, model: str, row: dict[str, Any]) -> None:
    """Run what is left of a model's tests, untouched and tuned; enter it in its row."""
    if row.get("left", True):
        names = row.get("left")
        done = runner.run(model, names, tuned=False)
        if not done["collected"] and not row["untouched"]:
            row["skipped"] = done["ended"] or "no tests"
            return
        row["left"] = [name for name in names or done["collected"] if name not in done["tests"]]
        skips = row.setdefault("skips", {})
        for name, test in done["tests"].items():
            if test["outcome"] == "skipped":  # most are, and a reason says enough
                why = test.get("why", "")
                skips[why] = skips.get(why, 0) + 1
            else:
                row["untouched"][name] = test
    wanted = to_tune(row)
    if wanted:
        row["tuned"] |= runner.run(model, wanted, tuned=True)["tests"]
    _look_again(runner, model, row)


def to_tune(row: dict[str, Any]) -> list[str]:
    """Return the tests that pass untouched and have not run tuned."""
    return [name for name, test in row["untouched"].items() if test["outcome"] == "passed" and name not in row["tuned"]]


def _look_again(runner: Runner, model: str, row: dict[str, Any]) -> None:
    """Run both again where only the tuned one failed: many of these tests draw random numbers without a seed."""
    names = [name for name in findings(row) if "again" not in row["tuned"][name]]
    if not names:
        return
    untouched = runner.run(model, names, tuned=False)["tests"]
    tuned = runner.run(model, names, tuned=True)["tests"]
    for name in names:
        if name in untouched and name in tuned:
            row["tuned"][name]["again"] = [untouched[name]["outcome"], tuned[name]["outcome"]]


def findings(row: dict[str, Any]) -> list[str]:
    """Return the tests that pass untouched and fail tuned, each time that both were run."""
    return [
        name
        for name, test in row["tuned"].items()
        if test["outcome"] == "failed" and test.get("again", ["passed", "failed"]) == ["passed", "failed"]
    ]


def known(model: str, name: str) -> str | None:
    """Return the reason why a test may fail tuned, or `None`."""
    return next((why for pattern, why in KNOWN.items() if fnmatch(f"{model}::{name}", pattern)), None)


def unexplained(model: str, row: dict[str, Any]) -> list[str]:
    """Return the findings without a known reason."""
    return [name for name in findings(row) if known(model, name) is None]


# --- the page ---------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "model", "run on", "transformers", "tests", "pass untouched", "run tuned", "models tuned", "changes kept",
    "fail tuned only",
)  # fmt: skip


def _count(tests: dict[str, Any], outcome: str) -> int:
    return sum(test["outcome"] == outcome for test in tests.values())


def _kept(row: dict[str, Any]) -> dict[str, int]:
    kept: dict[str, int] = {}
    for test in row["tuned"].values():
        for stage, count in test.get("kept", {}).items():
            kept[stage] = kept.get(stage, 0) + count
    return kept


def _told(row: dict[str, Any]) -> str:
    """The day of a row, and the versions that it is of."""
    return " | ".join((row["date"], row["versions"]["transformers"], row["versions"]["tests"]))


def page(results: dict[str, Any]) -> str:
    """The table of docs/STRANGERS.md, and the findings with their reasons."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- " * len(_COLUMNS) + "|"]
    explained: dict[str, list[str]] = {}
    total = [0] * 4
    for model, row in sorted(results["models"].items()):
        if row.get("skipped"):
            lines.append(f"| {model} | {_told(row)} | left out: {row['skipped'][:80]} | | | | |")
            continue
        new = unexplained(model, row)
        for name in findings(row):
            why = known(model, name)
            if why is not None:
                explained.setdefault(why, []).append(f"{model} `{name.rpartition('::')[2]}`")
        tuned_models = sum(test.get("models", 0) for test in row["tuned"].values())
        figures = (_count(row["untouched"], "passed"), len(row["tuned"]), tuned_models, sum(_kept(row).values()))
        total = [before + now for before, now in zip(total, figures, strict=True)]
        cells = ", ".join(f"`{name.rpartition('::')[2]}`" for name in new) or "none"
        lines.append(f"| {model} | {_told(row)} | {' | '.join(map(str, figures))} | {cells} |")
    lines.append(f"| all | | | | {' | '.join(map(str, total))} | |")
    lines += ["", *(f"- {why}: {', '.join(sorted(names))}." for why, names in sorted(explained.items()))]
    return "\n".join(lines).strip()


def with_table(text: str, results: dict[str, Any]) -> str:
    """Return the page's text with the table of these results between its marks."""
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    return f"{before}{_BEGIN}\n\n{page(results)}\n\n{_END}{after}"


# --- all models -------------------------------------------------------------------------------------------------------


def versions_of(checkout: Path) -> dict[str, str]:
    """Return the versions that are run: the packages' and, as its `setup.py` says, the checkout's with the tests."""
    setup = checkout / "setup.py"
    text = setup.read_text("utf-8") if setup.exists() else ""
    said = re.search(r"""^\s*version=["']([^"']+)""", text, re.MULTILINE)
    packages = {name: metadata.version(name) for name in ("accelerate_tts", "torch", "transformers")}
    return {**packages, "tests": said[1] if said else "not told"}


def fresh_row(versions: dict[str, str]) -> dict[str, Any]:
    """Return the row of a model none of whose tests has run yet."""
    date = datetime.now(timezone.utc).date().isoformat()
    return {"date": date, "versions": versions, "untouched": {}, "tuned": {}}


def goes_on(row: dict[str, Any] | None, versions: dict[str, str]) -> bool:
    """Tell if a row can be gone on with: it ran, and what it ran was of the same release, tests and code alike."""
    same = row is not None and all(row["versions"][name] == versions[name] for name in ("transformers", "tests"))
    return same and not (row or {}).get("skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("models", nargs="*", help=f"folders of tests/models; by default {', '.join(MODELS)}")
    parser.add_argument("--checkout", type=Path, help="transformers' repository at the tag of the installed version")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the tests")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of one process; two to four a model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--anew", action="store_true", help="forget earlier runs of these models")
    parser.add_argument("--page", action="store_true", help="write docs/STRANGERS.md from the results, and run nothing")
    chosen = parser.parse_args()
    results = json.loads(chosen.results.read_text()) if chosen.results.exists() else {"models": {}}
    if chosen.page:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), results), "utf-8")
        return 0
    if chosen.checkout is None or not (chosen.checkout / "tests" / "test_modeling_common.py").exists():
        print(
            f"--checkout={chosen.checkout} holds no tests of transformers; get them by\n  git clone --depth 1 --branch"
            f" v{metadata.version('transformers')} https://github.com/huggingface/transformers"
        )
        return 2
    versions = versions_of(chosen.checkout)
    runner = Runner(chosen.checkout.resolve(), chosen.python, chosen.seconds)
    failed = []
    for number, model in enumerate(chosen.models or MODELS):
        if chosen.anew or not goes_on(results["models"].get(model), versions):
            results["models"][model] = fresh_row(versions)
        row = results["models"][model]
        run_model(runner, model, row)
        write_whole(chosen.results, json.dumps(results, indent=1) + "\n")
        new = unexplained(model, row)
        failed += [f"{model}::{name}" for name in new]
        said = row.get("skipped") or (
            f"{_count(row['untouched'], 'passed')} pass untouched, {_count(row['tuned'], 'passed')} pass tuned,"
            f" {len(new)} findings, {len(row['left']) + len(to_tune(row))} left"
        )
        print(f"[{number + 1}/{len(chosen.models or MODELS)}] {model}: {said}", flush=True)
        for name in new:
            print(f"    {name}: {row['tuned'][name].get('why', '')}", flush=True)
    print(f"{len(failed)} tests pass untouched and fail tuned: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
