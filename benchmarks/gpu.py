"""Tests and figures of a machine with a GPU, in steps that each have a time limit. `gpu.sh` starts it.

    benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--seconds 600] [--only NAME[,NAME]] [--installed]

A GPU is often at hand for minutes only, so everything is decided here: the order, most important first, and the limit
of each step. The wheel is built with its kernels and put into a folder of its own; `--installed` uses the package that
the interpreter has. `gpu.json` in the folder is written again after each step, so that it is complete up to the moment
at which the machine is taken away; what a step prints goes to a log beside it. A step that exceeds its limit is stopped
with its children. Steps that the total leaves no time for are listed as not reached.

`--dry-run` does the same on a CPU at small size, where the tests of `tests/cuda` are skipped. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate_tts.storage.files import write_whole

ROOT = Path(__file__).parents[1]
SECONDS = 600.0
LEAST = 5.0  # seconds with which a step is still begun
WORDS = 12  # last lines of a failed step's log that go into the JSON

MACHINE = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
found |= {"hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found |= {"device": about.name, "capability": [about.major, about.minor], "free": free, "total": total}
from accelerate_tts.kernels.library import level
from accelerate_tts._version import __version__
print(json.dumps(found | {"accelerate_tts": __version__, "kernels": level()}))
"""
BENCH = "from accelerate_tts.cli import main; main()"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Its name, for `--only`.
        command: Arguments of the interpreter.
        limit: Seconds after which it is stopped.
        answer: File in the folder of results that it writes as JSON; "" if its last line is the JSON or there is none.
        tests: True if it prints one line a test.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    answer: str = ""
    tests: bool = False


@dataclass
class Outcome:
    """Outcome of a step.

    Attributes:
        outcome: "ok", "failed", "stopped" (by its limit) or "not reached".
        seconds: Its duration.
        tests: Outcome of each test; "not ended" for the one in which the step was stopped.
        result: The JSON that it wrote.
        last_words: The last lines of its log, unless it went well.
    """

    name: str
    limit: float
    outcome: str = "not reached"
    seconds: float = 0.0
    tests: dict[str, str] = field(default_factory=dict)
    result: Any = None
    last_words: list[str] = field(default_factory=list)


def steps(*, dry: bool = False) -> list[Step]:
    """Return the steps, most important first."""

    def tests(file: str, limit: float) -> Step:
        # Without the project's configuration, which asks for plug-ins that the machine may not have. Files are steps of
        # their own: after an error of the device, all later tests of a process fail.
        options = (
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            "-o",
            f"pythonpath={ROOT / 'tests' / 'support'}",
            "--import-mode=importlib",
        )
        stuck = ("--timeout=60",) if find_spec("pytest_timeout") else ()
        shown = ("-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "--durations=5")
        command = ("-m", "pytest", *options, *stuck, *shown, f"tests/cuda/{file}.py")
        return Step(f"tests/cuda/{file}", command, limit, tests=True)

    def bench(system: str, limit: float, tune: int, precision: str = "exact", *more: str) -> Step:
        name = f"{system} {precision}"
        file = f"{system}-{precision}.json"
        size = ("--size", "tiny", "--pairs", "1") if dry else ("--size", "full", "--pairs", "3")
        budget = ("--tune-seconds", str(5 if dry else tune))
        return Step(
            name, ("-c", BENCH, "bench", system, "--precision", precision, *size, *budget, *more, "--json", file),
            3 * limit if dry else limit,  # a CPU is slower even at small size
            file,
        )  # fmt: skip

    return [
        Step("machine", ("-c", MACHINE), 60),
        tests("test_recorded_parts", 75),
        tests("test_recording", 60),
        tests("test_recorded_prompts", 30),
        tests("test_tuned", 100),
        tests("test_token_kernels", 60),
        Step("token kernels", ("benchmarks/token_kernels.py",), 50),
        tests("test_shared_recordings", 40),
        Step("callers", ("benchmarks/shared_recordings.py", "--callers", "1,2,4"), 40),
        bench("chatterbox", 150, 40, "exact", "--warm-start"),  # a second process, which is set up from the pack
        bench("mms", 45, 20),
        bench("xtts", 75, 30),
        bench("chatterbox", 110, 45, "balanced"),
        bench("voice-clone", 40, 15),
        bench("higgs", 75, 30),
    ]


def outcomes_of(log: str) -> dict[str, str]:
    """Return the outcome of each test in pytest's verbose output. One without an outcome was not ended."""
    found: dict[str, str] = {}
    for line in log.splitlines():
        if match := re.match(r"(\S+\.py::.+?)(?: (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b.*)?$", line.strip()):
            found[match[1].rstrip()] = (match[2] or "not ended").lower()
    return found


def run(step: Step, folder: Path, limit: float, environment: dict[str, str]) -> Outcome:
    """Run a step in the checkout, and stop it with its children after `limit` seconds."""
    found = Outcome(step.name, limit)
    log = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', step.name)}.log"
    command = [sys.executable, *(str(folder / part) if part and part == step.answer else part for part in step.command)]
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            found.outcome = "ok" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            found.outcome = "stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: what it has started goes with it
                process.wait()
    found.seconds = round(time.monotonic() - begun, 1)
    said = log.read_text("utf-8", "replace")
    if step.tests:
        found.tests = outcomes_of(said)
    found.result = _answer(folder / step.answer if step.answer else None, said)
    if found.outcome != "ok":
        found.last_words = said.strip().splitlines()[-WORDS:]
    return found


def _answer(file: Path | None, said: str) -> Any:
    text = said.strip().splitlines()[-1:] if file is None else [file.read_text("utf-8")] if file.exists() else []
    try:
        return json.loads(text[0]) if text else None
    except ValueError:
        return None


def run_all(
    chosen: Sequence[Step], folder: Path, environment: dict[str, str], seconds: float = SECONDS, **about: Any
) -> list[Outcome]:
    """Run steps in order within a total, and write `gpu.json` after each.

    Args:
        chosen: The steps.
        folder: The folder of results.
        environment: Environment variables of the steps.
        seconds: The total. A step gets what is left of it where that is less than its own limit.
        about: Further fields of the JSON.
    """
    begun = time.monotonic()
    found = [Outcome(step.name, step.limit) for step in chosen]

    def write() -> None:
        report = {**about, "seconds": round(time.monotonic() - begun, 1), "steps": [asdict(one) for one in found]}
        write_whole(folder / "gpu.json", json.dumps(report, indent=2) + "\n")

    write()
    for number, step in enumerate(chosen):
        left = seconds - (time.monotonic() - begun)
        if left < min(LEAST, step.limit):
            break
        found[number] = run(step, folder, min(step.limit, left), environment)
        write()
        print(_line(found[number]), flush=True)
    return found


def _line(one: Outcome) -> str:
    counts = [f"{list(one.tests.values()).count(what)} {what}" for what in sorted(set(one.tests.values()))]
    wrong = [f"\n    {what}: {test}" for test, what in one.tests.items() if what not in {"passed", "skipped"}]
    return f"{one.name}: {one.outcome}, {one.seconds:.1f} s {', '.join(counts)}{''.join(wrong)}".rstrip()


def built(target: Path) -> tuple[str, Path]:
    """Install this checkout into a folder.

    Returns:
        "wheel" and the folder, or "checkout" and this folder with its kernels, where no wheel can be built.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    isolated = ("--no-build-isolation",) if find_spec("hatchling") else ()
    if subprocess.run([*pip, *isolated, "--target", str(target), "."], cwd=ROOT, check=False).returncode == 0:
        return "wheel", target
    print("no wheel could be built (hatchling is missing, or pip): the kernels are built into this folder", flush=True)
    subprocess.run([sys.executable, "accelerate_tts/kernels/build.py"], cwd=ROOT, check=False)
    return "checkout", ROOT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all steps that were reached went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at small size")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the total, with building")
    parser.add_argument("--only", default="", help="names of steps, with commas between them")
    parser.add_argument("--installed", action="store_true", help="use the package that is installed")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    chosen = [step for step in steps(dry=given.dry_run) if not given.only or step.name in given.only.split(",")]
    if not chosen:
        parser.error(f"--only {given.only}: no step has that name; {', '.join(step.name for step in steps())} do")
    folder = given.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if given.dry_run:
        environment["ACCELERATE_TTS_DEVICE"] = "cpu"
    with tempfile.TemporaryDirectory() as place:
        package = "installed"
        if not given.installed:
            package, site = built(Path(place))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), environment.get("PYTHONPATH", ""))))
        left = given.seconds - (time.monotonic() - begun)
        found = run_all(chosen, folder, environment, left, dry_run=given.dry_run, package=package)
    print(f"{folder / 'gpu.json'}", flush=True)
    return int(any(one.outcome in {"failed", "stopped"} for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
