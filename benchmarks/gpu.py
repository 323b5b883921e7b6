"""Tests and figures of a machine with a GPU, in steps that each have a time limit. `gpu.sh` starts it.

    benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--seconds 570] [--only NAME[,NAME]] [--installed]

A GPU is often at hand for minutes only, so everything is decided here: the order, most important first, and the limit
of each step. The tests of `tests/cuda` that time nothing run beside each other. The wheel is built with its kernels and
put into a folder of its own; `--installed` uses the package that the interpreter has. Two files are written to the
folder: `gpu.json`, again after each step and every few seconds meanwhile, so that it is complete up to the moment at
which the machine is taken away, and `gpu.log` with what each step has printed. A step that exceeds its limit is stopped
with its children, and so are all when this program is told to end. Steps that the total leaves no time for are listed
as not reached.

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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 570.0
LEAST = 5.0  # seconds with which a step is still begun
EVERY = 5.0  # seconds after which the JSON tells how far the running steps are
TICK = 0.2
BUILDING = 60.0  # maximum seconds of each way to build the package
WORDS = 12  # last lines of a failed step's log that go into the JSON

MACHINE = """
import json, os, platform, shutil, sysconfig, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
found |= {"hip": torch.version.hip, "cudnn": torch.backends.cudnn.version(), "processors": os.cpu_count()}
# What Triton needs to start its kernels.
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
found |= {"compiler": shutil.which("cc") or shutil.which("gcc"), "headers": os.path.exists(header)}
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found |= {"device": about.name, "capability": [about.major, about.minor], "free": free, "total": total}
from accelerate_tts.kernels.library import level
from accelerate_tts._version import __version__
print(json.dumps(found | {"accelerate_tts": __version__, "kernels": level()}))
"""
BENCH = "from accelerate_tts.cli import main; main()"
PARTS = ("mms", "voice-clone", "xtts", "encodec", "dac", "speecht5", "chatterbox", "bark")
"""Systems of which each part is recorded by itself."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Its name, for `--only`.
        command: Arguments of the interpreter.
        limit: Seconds after which it is stopped.
        answer: File that it writes as JSON; "" if its last line is the JSON or there is none.
        tests: True if it prints one line a test.
        beside: True if it runs beside the steps next to it that have the same.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    answer: str = ""
    tests: bool = False
    beside: bool = False


@dataclass
class Outcome:
    """Outcome of a step.

    Attributes:
        outcome: "ok", "failed", "stopped" (by its limit), "interrupted", "running" or "not reached".
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

    def tests(file: str, limit: float, *, beside: bool = True) -> Step:
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
        return Step(f"tests/cuda/{file}", command, limit, tests=True, beside=beside)

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
        Step("machine", ("-c", MACHINE), 30),
        tests("test_recorded_parts", 90),
        tests("test_recording", 90),
        tests("test_recorded_prompts", 90),
        tests("test_token_kernels", 90),
        tests("test_shared_recordings", 90),
        bench("chatterbox", 150, 40, "exact", "--warm-start"),  # a second process, which is set up from the pack
        bench("mms", 45, 20),
        Step("token kernels", ("benchmarks/token_kernels.py",), 50),
        bench("xtts", 75, 30),
        bench("chatterbox", 100, 45, "balanced"),
        bench("higgs", 70, 30),
        Step("parts", ("benchmarks/recordable.py", "--device", "cpu" if dry else "cuda", *PARTS), 180 if dry else 60),
        Step("callers", ("benchmarks/shared_recordings.py", "--callers", "1,2,4"), 40),
        bench("voice-clone", 35, 15),
        tests("test_tuned", 100, beside=False),  # its tunings keep what is faster
    ]


def batches(chosen: Sequence[Step]) -> Iterator[list[int]]:
    """Yield the numbers of steps that run beside each other, in order."""
    batch: list[int] = []
    for number, step in enumerate(chosen):
        if batch and not (step.beside and chosen[batch[-1]].beside):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def outcomes_of(log: str) -> dict[str, str]:
    """Return the outcome of each test in pytest's verbose output. One without an outcome was not ended."""
    found: dict[str, str] = {}
    for line in log.splitlines():
        if match := re.match(r"(\S+\.py::.+?)(?: (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b.*)?$", line.strip()):
            found[match[1].rstrip()] = (match[2] or "not ended").lower()
    return found


def run(  # noqa: PLR0913, PLR0917 - the step, and what limits and hears of it
    step: Step, scratch: Path, found: Outcome, environment: dict[str, str], stop: threading.Event,
    tell: Callable[[], object],
) -> str:  # fmt: skip
    """Run a step in the checkout, and stop it with its children at its end, after its limit, or when told to.

    Args:
        step: The step.
        scratch: Folder for its log and its answer.
        found: Its outcome so far, with its limit; filled in.
        environment: Its environment variables.
        stop: Set when all is to end.
        tell: Called every few seconds, when `found` was brought up to date.

    Returns:
        What it has printed.
    """
    log = scratch / f"{re.sub(r'[^A-Za-z0-9]+', '-', step.name)}.log"
    answer = scratch / step.answer if step.answer else None
    command = [sys.executable, *(str(answer) if part and part == step.answer else part for part in step.command)]
    if step.command[0].endswith(".py"):  # it may import its neighbours
        environment = {name: value for name, value in environment.items() if name != "PYTHONSAFEPATH"}
    begun = told = time.monotonic()

    def update() -> str:
        found.seconds = round(time.monotonic() - begun, 1)
        said = log.read_text("utf-8", "replace")
        if step.tests:
            found.tests = outcomes_of(said)
        found.result = _answer(answer, said)
        found.last_words = [] if found.outcome == "ok" else said.strip().splitlines()[-WORDS:]
        return said

    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        found.outcome = "running"
        try:
            while process.poll() is None and not stop.is_set() and time.monotonic() - begun < found.limit:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(TICK)
                if time.monotonic() - told > EVERY:
                    told = time.monotonic()
                    update()
                    tell()
            status = process.poll()
            if status is not None:
                found.outcome = "ok" if status == 0 else "failed"
            else:
                found.outcome = "interrupted" if stop.is_set() else "stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: what it has started goes with it
                process.wait()
    return update()


def _answer(file: Path | None, said: str) -> Any:
    """Return the JSON of a file, or the last line that is JSON: a step that is stopped has told what it knew."""
    texts = reversed(said.strip().splitlines()) if file is None else [file.read_text("utf-8")] if file.exists() else []
    for text in texts:
        with suppress(ValueError):
            return json.loads(text)
    return None


def _write(file: Path, text: str) -> None:
    """Write a file so that it is whole at any moment."""
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(file)


def run_all(
    chosen: Sequence[Step],
    folder: Path,
    environment: dict[str, str],
    seconds: float = SECONDS,
    stop: threading.Event | None = None,
    **about: Any,
) -> list[Outcome]:
    """Run steps in order within a total, and write `gpu.json` after each and meanwhile.

    Args:
        chosen: The steps.
        folder: The folder of results.
        environment: Environment variables of the steps.
        seconds: The total. A step gets what is left of it where that is less than its own limit.
        stop: Ends all once it is set.
        about: Further fields of the JSON.
    """
    begun, one_by_one = time.monotonic(), threading.Lock()
    ended = stop or threading.Event()
    found = [Outcome(step.name, step.limit) for step in chosen]
    (folder / "gpu.log").unlink(missing_ok=True)

    def write() -> None:
        with one_by_one:
            report = {**about, "seconds": round(time.monotonic() - begun, 1), "steps": [asdict(one) for one in found]}
            _write(folder / "gpu.json", json.dumps(report, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as scratch:

        def one(number: int) -> None:
            step = chosen[number]
            said = run(step, Path(scratch), found[number], environment, ended, write)
            write()
            with one_by_one, (folder / "gpu.log").open("a", encoding="utf-8") as log:
                log.write(f"=== {step.name}\n{said}\n")
                print(_line(found[number]), flush=True)

        write()
        for batch in batches(chosen):
            left = seconds - (time.monotonic() - begun)
            if ended.is_set() or left < min(LEAST, *(chosen[number].limit for number in batch)):
                break
            for number in batch:
                found[number].limit = min(chosen[number].limit, left)
            with ThreadPoolExecutor(len(batch)) as pool:
                list(pool.map(one, batch))
    write()
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
    if find_spec("hatchling") and find_spec("pip"):  # else pip would wait for a network
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        if _ran([*pip, "--no-index", "--no-build-isolation", "--target", str(target), "."]):
            return "wheel", target
    print("no wheel could be built (hatchling is missing, or pip): the kernels are built into this folder", flush=True)
    _ran([sys.executable, "accelerate_tts/kernels/build.py"])
    return "checkout", ROOT


def _ran(command: list[str]) -> bool:
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=ROOT, check=False, timeout=BUILDING).returncode == 0
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all steps that were reached went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at small size")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the total, with building")
    parser.add_argument("--only", default="", help="names of steps, with commas between them")
    parser.add_argument("--installed", action="store_true", help="use the package that is installed")
    given = parser.parse_args(arguments)
    begun, stop = time.monotonic(), threading.Event()
    chosen = [step for step in steps(dry=given.dry_run) if not given.only or step.name in given.only.split(",")]
    if not chosen:
        parser.error(f"--only {given.only}: no step has that name; {', '.join(step.name for step in steps())} do")
    for number in (signal.SIGINT, signal.SIGTERM):  # else the steps would go on without this process
        signal.signal(number, lambda *_: stop.set())
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
        found = run_all(chosen, folder, environment, left, stop, dry_run=given.dry_run, package=package)
    print(f"{folder / 'gpu.json'}", flush=True)
    return int(any(one.outcome in {"failed", "stopped", "interrupted"} for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
