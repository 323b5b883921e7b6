"""Environments as users have them, each built from its upstream's own pins and run: `make environments`.

    python benchmarks/environments/run.py [NAME ...] [--wheel FILE] [--layers N|full] [--keep FOLDER] [--rows FOLDER]

`environments.toml` beside this file lists them. For each, a virtual environment is made in the run's folder: first the
upstream as a user installs it, then our wheel, which changes nothing of the upstream. The tests that the file names run
in it, and the checks: a system is built from its true configuration with seeded weights, tuned, and timed untouched and
tuned in turn. The result is one JSON file under `rows/`, in the folder of its machine, from which `page.py` makes
docs/ENVIRONMENTS.md. An environment that fails has a row with the error, and does not stop the others; the exit status
is 1 if one failed.

Run nothing else meanwhile if figures matter. An environment takes five to seven gigabytes of disk while it runs, and
eleven while it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from listed import FILE, HERE, ROOT, EnvironmentsError, chosen, environments

from accelerate_tts.cli.bench import processes
from accelerate_tts.cli.bench.machine import machine, slug
from accelerate_tts.cli.bench.processes import VariantError
from accelerate_tts.cli.bench.variant import Request, finite
from accelerate_tts.storage.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from listed import Check, Environment

ROWS = HERE / "rows"
TOOLS = ("pytest>=8.2", "pytest-asyncio>=0.24", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100")
"""Packages that the tests need beside the upstream."""

_INSTALL_SECONDS, _TEST_SECONDS, _CHECK_SECONDS = 1500.0, 1800.0, 600.0
_PAIRS = 5
ROOM = 11_000_000_000
"""Bytes that must be free before an environment is made: torch 2.6.0 for CUDA with what Chatterbox asks for takes 7 GB,
and pip keeps 3 GB of downloads beside it while it installs."""
_MOST_NAMES = 40
"""Maximum number of failed tests that a row names; it counts all."""


class StepError(Exception):
    """A step of one environment failed; the row has the message."""


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        wheel: Our wheel.
        rows: The folder of the rows; in it, each machine has one.
        layers: "" for the file's own numbers, "full" for upstream's, or a number.
        keep: Folder in which virtual environments are kept and found the next time. If not given, they are removed with
            the run's folder.
        tests: True to run the tests.
        checks: True to run the checks.
        quick: True to run only the quick tests and the first check of each environment, as CI does at each change.
    """

    wheel: Path
    rows: Path = ROWS
    layers: str = ""
    keep: Path | None = None
    tests: bool = True
    checks: bool = True
    quick: bool = False


@dataclass
class Row:
    """Result of one environment; see `as_json`."""

    environment: str
    requires: list[str]
    beside: list[dict[str, Any]]
    date: str
    commit: str
    machine: dict[str, Any]
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[str, Any] | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    note: str = ""

    @property
    def good(self) -> bool:
        """True if it was installed, every test passed, every check gave figures: with kernels, with same tokens."""
        return not self.faults()

    def faults(self) -> list[str]:
        """Return all that makes it not good, a line each."""
        found = [] if self.failed is None else [self.failed]
        if self.tests is not None and (self.tests["failed"] or self.tests["errors"]):
            found.append(f"{self.tests['failed']} tests failed, {self.tests['errors']} had an error")
            found += [f"  {name}: {why}" for name, why in self.tests["failures"].items()]
        for check in self.checks:
            asked = f"check of {check['system']} in {check['precision']}"
            if check["failed"] is not None:
                found.append(f"{asked}: {check['failed']}")
                continue
            if other_tokens(check):
                found.append(f"{asked}: other tokens than untouched")
            if without_kernels(check):
                found.append(f"{asked}: made without the wheel's kernels")
        return found

    def as_json(self) -> str:
        """The row as JSON text; times are seconds."""
        return json.dumps(finite(asdict(self)), indent=1) + "\n"


def other_tokens(check: Mapping[str, Any]) -> bool:
    """Check that a check gave other tokens where they must be the same: in `exact`, of a model in fp32.

    A model in half precision rounds each result to 8 or 11 bits. Another order of sums rounds some of them to the
    other side, and what is sampled from two about equally likely tokens follows (docs/decisions/0011).
    """
    whole = check.get("dtype", "float32") not in {"bfloat16", "float16"}
    return whole and check["precision"] == "exact" and check.get("same_tokens") is False


def without_kernels(check: Mapping[str, Any]) -> bool:
    """Check that a check was made without the wheel's kernels."""
    return check.get("kernels") == "none"


def run(one: Environment, options: Options, folder: Path, say: Callable[[str], None]) -> Row:
    """Build an environment, run its tests and checks, and return the result.

    Args:
        one: The environment.
        options: Options of the run.
        folder: An empty folder of this environment alone.
        say: Called with each line of progress.

    Returns:
        Its row, with every fault.
    """
    row = Row(
        one.name, list(one.requires), [asdict(extra) for extra in one.beside],
        datetime.now(timezone.utc).date().isoformat(), _commit(), machine(), note=one.note,
    )  # fmt: skip
    if options.quick:
        one = replace(one, tests=one.quick or one.tests, checks=one.checks[:1])
        row.note = f"A quick run: {' '.join(one.tests)}, and the first check alone. {one.note}".strip()
    place = folder / "venv" if options.keep is None else options.keep.absolute() / one.name
    try:
        with _timed(row, "install"):
            python = _install(one, options.wheel.absolute(), place, say)
            row.python, row.versions = _versions(python, one)
        if one.tests and options.tests:
            with _timed(row, "tests"):
                row.tests = _tests(one, python, folder, say)
        for number, check in enumerate(one.checks if options.checks else ()):
            with _timed(row, f"check {number + 1}"):
                row.checks.append(_check(one, _with_layers(check, options.layers), python, folder, say))
    except StepError as error:
        row.failed = str(error)
        say(f"FAILED: {error}")
    return row


@contextmanager
def _timed(row: Row, what: str) -> Generator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        row.seconds[what] = round(time.perf_counter() - start, 1)


def _with_layers(check: Check, layers: str) -> Check:
    if not layers or check.layers is None:
        return check
    return replace(check, layers=None if layers == "full" else int(layers))


def _install(one: Environment, wheel: Path, place: Path, say: Callable[[str], None]) -> Path:
    """Make the virtual environment; what upstream's own requirements brought stays as it is."""
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    frozen, made_of = place / "upstream.txt", place / "made-of.json"
    wanted = json.dumps([one.python, one.requires, [asdict(extra) for extra in one.beside]])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]

    def install(*told: str) -> None:
        run_step([*pip, "install", "--quiet", *told], _INSTALL_SECONDS, _without_ours())

    if made_of.exists() and made_of.read_text("utf-8") == wanted:  # kept by an earlier run
        say(f"taking what {place} has of {' '.join(one.requires)}")
        install("--force-reinstall", "--no-deps", str(wheel))
    else:
        interpreter = interpreter_of(one.python)
        ask_for_room(place, ROOM)
        say(f"installing {' '.join(one.requires)} on Python {one.python}")
        run_step([interpreter, "-m", "venv", "--clear", str(place)], _INSTALL_SECONDS)
        install("--upgrade", "pip")  # whatever Python brought: an old one may resolve for hours
        first = [extra.requires for extra in one.beside if extra.build]
        if first:
            install(*first)
        others = [extra.requires for extra in one.beside if not extra.build]
        install(*(["--no-build-isolation"] if first else []), *one.requires, *others)
        listed = run_step([*pip, "freeze", "--all"], _INSTALL_SECONDS, _without_ours())
        frozen.write_text("\n".join(line for line in listed.splitlines() if "==" in line), "utf-8")
        made_of.write_text(wanted, "utf-8")
    say(f"installing {wheel.name} and the tests' tools beside it")
    install("--constraint", str(frozen), f"{wheel}[{one.extra}]" if one.extra else str(wheel), *TOOLS)
    return python


def ask_for_room(place: Path, wanted: int) -> None:
    """Check that a disk has room for an environment, since pip finds out after minutes, and names no folder.

    Args:
        place: Folder of the environment, which need not exist yet.
        wanted: Bytes that must be free there and in the folder for temporary files.

    Raises:
        StepError: There is less.
    """
    for folder in (next(parent for parent in place.parents if parent.exists()), Path(tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        if free < wanted:
            raise StepError(
                f"{folder} has {free / 1e9:.1f} GB free, and an environment takes {wanted / 1e9:.0f} GB while it is "
                "installed: free some, or set TMPDIR to a folder on a larger disk"
            )


def interpreter_of(version: str) -> str:
    """Find a Python of this version: this one, one on PATH, or one of pyenv's.

    Raises:
        StepError: There is none.
    """
    found = [sys.executable, shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True)]
    for candidate in filter(None, found):
        done = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.stdout.strip() == version:
            return candidate
    raise StepError(f"there is no Python {version} on this machine: nothing was run")


def _versions(python: Path, one: Environment) -> tuple[str, dict[str, str]]:
    names = ["accelerate_tts", "torch", "transformers", *one.upstream]
    code = (
        "import json, platform, sys\nfrom importlib import metadata\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try:\n        found[name] = metadata.version(name)\n    except metadata.PackageNotFoundError:\n"
        "        pass\nprint(json.dumps([platform.python_version(), found]))"
    )
    version, found = json.loads(run_step([str(python), "-c", code, *names], 60.0))
    return version, found


def _tests(one: Environment, python: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"running {' '.join(one.tests)}")
    report = folder / "tests.xml"
    # pytest's script, which unlike `python -m pytest` does not put this folder's own package before the wheel's.
    command = [str(python.with_name("pytest")), *one.tests, "--quiet", "--numprocesses=2", "--dist=loadfile",
               f"--junitxml={report}", "--durations=5"]  # fmt: skip
    log = folder / "tests.log"
    with log.open("wb") as output:
        run_step(command, _TEST_SECONDS, {**_clean(folder), "OMP_NUM_THREADS": "1"}, output, {0, 1})
    if not report.exists():
        raise StepError(f"the tests left no report: {_last(log.read_text('utf-8', 'replace'))}")
    found = results(report.read_text("utf-8"))
    say(", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "errors", "skipped")))
    for name, why in found["failures"].items():
        say(f"  {name}: {why}")
    if not found["passed"]:
        raise StepError("no test passed")
    return found


def results(report: str) -> dict[str, Any]:
    """Read a JUnit report: counts, reasons of skipped tests, and failures with their messages."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "failures": {}, "skips": {}}
    kinds = {"failure": "failed", "error": "errors", "skipped": "skipped"}
    for case in ET.fromstring(report).iter("testcase"):  # noqa: S314 - of pytest's own, a moment ago
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = next((child for child in case if child.tag in kinds), None)
        found["passed" if outcome is None else kinds[outcome.tag]] += 1
        if outcome is None:
            continue
        why = (outcome.get("message") or outcome.text or "").strip().splitlines() or [""]
        if outcome.tag == "skipped":
            found["skips"][why[0]] = found["skips"].get(why[0], 0) + 1
        elif len(found["failures"]) < _MOST_NAMES:
            found["failures"][name] = why[0][:300]
    return found


def _check(one: Environment, check: Check, python: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one check. A fault is recorded in its place, and the next check runs all the same."""
    asked = {"system": check.system, "layers": check.layers, "tokens": check.tokens, "precision": check.precision}
    say(f"check: {check.system}, {'all' if check.layers is None else check.layers} layers, {check.precision}")
    try:
        describe = check.system == "describe"
        found = _described(one, python, folder) if describe else _benched(check, python, folder)
    except (VariantError, StepError) as error:
        say(f"  FAILED: {error}")
        return {**asked, "failed": str(error)}
    if "whole" in found:
        say(f"  {found['whole']['ratio']:.2f}x; kept: {', '.join(found['kept']) or 'nothing'}")
    return {**asked, "failed": None, **found}


def _benched(check: Check, python: Path, folder: Path) -> dict[str, Any]:
    request = Request(
        "tuned", check.system, "full", check.precision, check.layers, _PAIRS, check.tune_seconds, check.tokens
    )
    with tempfile.TemporaryDirectory(dir=folder) as own:
        found = processes.ask(request, Path(own), python, _CHECK_SECONDS + check.tune_seconds)
    receipt = found["receipt"]
    names = ("part", "stage", "kept", "reason", "ratio", "low", "error", "seconds")
    return {
        **{name: found[name] for name in (
            "whole", "step", "prompt", "error", "same_tokens", "floor", "tuning", "recompiles", "kept", "events",
            "note", "kernels", "dtype", "divergence", "read",
        )},
        "notes": receipt["notes"],
        "stages": [{name: stage[name] for name in names} for stage in receipt["stages"]],
    }  # fmt: skip


def _described(one: Environment, python: Path, folder: Path) -> dict[str, Any]:
    script = ROOT / ".ci" / "releases.py"
    said = run_step([str(python), str(script), "--here", one.upstream[0]], 300.0, _clean(folder))
    return {"said": said.strip().splitlines()}


def _clean(folder: Path) -> dict[str, str]:
    """Return the variables of a user's shell, without ours, and with caches in the run's own folder."""
    return {
        **_without_ours(), "XDG_CACHE_HOME": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def _without_ours() -> dict[str, str]:
    ours = ("ACCELERATE_TTS_", "TRANSLATOR_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def run_step(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None, output: Any = None,
    allowed: frozenset[int] | set[int] = frozenset({0}),
) -> str:  # fmt: skip
    """Run a command in the repository, with a time limit for all that it starts; return its output.

    Raises:
        StepError: It could not be started, took too long, or ended with a status that is not allowed.
    """
    where: Any = subprocess.PIPE if output is None else output
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=None if environment is None else dict(environment), text=True,
                stdin=subprocess.DEVNULL, stdout=where, stderr=complaints, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise StepError(f"{command[0]} could not be started: {error}") from error
        try:
            printed, _ = process.communicate(timeout=limit)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise StepError(f"it took longer than {limit:.0f} s: {' '.join(command)}") from error
            raise
        complaints.seek(0)
        said = complaints.read()
    if process.returncode not in allowed:
        raise StepError(_last(said or printed or "") or f"{command[0]} ended with status {process.returncode}")
    return printed or ""


def _end(process: subprocess.Popen[str]) -> None:
    if os.name == "nt":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last(text: str) -> str:
    """Return the line of an output with the error: pip's first, otherwise the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice"))]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:] or [""])[0]


def _commit() -> str:
    """The commit of the working tree, with a plus where something in it is not committed; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        done = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    if done.returncode:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", "accelerate_tts"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() + ("+" if changed.stdout.strip() else "")


def say(line: str) -> None:
    """Print a line at once, since an environment takes minutes."""
    sys.stdout.write(f"{datetime.now(timezone.utc):%H:%M:%S} {line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the requested environments; return 1 if one failed, 2 if a name is unknown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="of environments.toml; all if not given; commas separate them, too")
    parser.add_argument("--wheel", type=Path, help="our wheel; the newest in dist/ if not given")
    parser.add_argument("--layers", default="", help="a number, or full, in place of the file's few layers")
    parser.add_argument("--keep", type=Path, help="keep the virtual environments in this folder")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows go")
    parser.add_argument("--file", type=Path, default=FILE, help="another file of environments")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="only the checks")
    parser.add_argument("--no-checks", dest="checks", action="store_false", help="only the tests")
    parser.add_argument("--quick", action="store_true", help="only the quick tests and the first check, for CI")
    parser.add_argument("--list", action="store_true", help="only show the names")
    told = parser.parse_args(arguments)
    try:
        names = [name for text in told.names for name in text.split(",") if name]
        wanted = chosen(environments(told.file.read_text("utf-8")), names)
        if told.list:
            sys.stdout.write("".join(f"{one.name}: {' '.join(one.requires)}\n" for one in wanted))
            return 0
        options = Options(_wheel(told.wheel), told.rows, _layers(told.layers), told.keep, told.tests, told.checks,
                          told.quick)  # fmt: skip
    except EnvironmentsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    bad = [row for row in (_run_and_write(one, options) for one in wanted) if not row.good]
    names = ", ".join(row.environment for row in bad)
    say(f"{len(wanted) - len(bad)} of {len(wanted)} environments are good" + (f"; not: {names}" * bool(bad)))
    for row in bad:  # again, since the end of a log is what is read first, and sometimes all that is kept of it
        for fault in row.faults():
            say(f"{row.environment}: {fault}")
    return bool(bad)


def _run_and_write(one: Environment, options: Options) -> Row:
    say(f"==> {one.name}")
    with tempfile.TemporaryDirectory(prefix="environment-", ignore_cleanup_errors=True) as folder:
        row = run(one, options, Path(folder), lambda line: say(f"{one.name}: {line}"))
    write(row, options.rows)
    say(f"{one.name}: {'good' if row.good else 'NOT GOOD'}, {sum(row.seconds.values()):.0f} s")
    return row


def write(row: Row, folder: Path) -> None:
    """Write a row into the folder of its machine; it replaces an earlier one of this machine alone."""
    file = folder / slug(row.machine) / f"{row.environment}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, row.as_json())


def _layers(told: str) -> str:
    if told and told != "full" and not told.isdecimal():
        raise EnvironmentsError(f"--layers {told} must be a number, or full")
    return told


def _wheel(told: Path | None) -> Path:
    found = [told] if told is not None else sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not found or not found[-1].is_file():
        raise EnvironmentsError(f"there is no wheel at {told or ROOT / 'dist'}; `make environments` builds one")
    return found[-1]


if __name__ == "__main__":
    sys.exit(main())
