"""The same model in other engines, in turn with eager and with ours: `make peers SYSTEM=llama`.

    python benchmarks/peers.py llama [--precision exact fast] [--layers N]      a decode step of a Llama of T3's shape
    python benchmarks/peers.py mms [--precision exact balanced]                 a call of MMS at full size
    python benchmarks/peers.py demo [--precision exact balanced]                a call of the demo's voice
    python benchmarks/peers.py voice-clone [--precision exact balanced]         an embedding of 12 s of sound
    python benchmarks/peers.py kokoro|f5 [--precision exact balanced]           systems of their own packages

Run nothing else meanwhile. All engines are in one process (llama.cpp in one of its own), with the same weights, inputs
and threads, and each round calls each of them once. A ratio is the median of the rounds', eager over the engine's. An
engine that fails, whose package is not installed, or that needs longer than `--set-up-seconds`, has the reason in the
table, with what to install. `--peers` chooses some: `--peers openvino llama.cpp` measures those whose names begin so,
beside eager and ours.

The set-up time is what passes until the second answer is there: exporting, quantizing, compiling, tuning. Lines are
those that a user writes beside the eager program: the functions of `engines.py`, counted from its source. The error is
that of the output, relative to eager's. The Llama has 30 layers of width 1,024, and two rows, as with T3's guidance;
its prompt is computed untimed, and by eager code where the engine compiles single steps. All noise of a voice is off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from engines import EAGER, SUBJECTS, lines_of

from accelerate_tts.cli.bench.command import Options
from accelerate_tts.cli.bench.floors import floors
from accelerate_tts.cli.bench.measure import Ratio, bytes_read_by_a_token, series
from accelerate_tts.cli.bench.results import document
from accelerate_tts.cli.bench.variant import finite
from accelerate_tts.errors import described
from accelerate_tts.kernels.library import level
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.disturbance import Machine, Watcher
from accelerate_tts.tuning.policy import current_policy

if TYPE_CHECKING:
    from engines import Candidate, Engine, Subject

    from accelerate_tts.cli.bench.floors import Floors
    from accelerate_tts.device.usage import Usage

_PAUSE = 0.05  # until threads that spin have fallen asleep
_PACKAGES = {
    "onnxruntime": "onnxruntime", "openvino": "openvino", "onnx": "onnx", "nncf": "nncf", "pruna": "pruna",
    "llama_cpp": "llama-cpp-python",
}  # fmt: skip
"""Names of the modules' packages."""


@dataclass
class Peer:
    """One row of the table, as benchmarks/results/schema.json describes it."""

    name: str
    lines: int
    set_up: float | None = None
    ratio: Ratio | None = None
    error: float | None = None
    kept: tuple[str, ...] = ()
    failed: str | None = None
    read: int | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and store the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SUBJECTS)
    parser.add_argument("--peers", nargs="*", help="beginnings of the names of peers; all if none is given")
    parser.add_argument("--precision", nargs="*", default=["exact"], choices=["exact", "balanced", "fast"])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tune-seconds", type=float, default=90.0)
    parser.add_argument("--set-up-seconds", type=float, default=150.0, help="the most that one peer may take")
    parser.add_argument("--json", type=Path, help="a file for the document")
    parser.add_argument("--into", type=Path, help="the folder of results to store the document in")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch._dynamo.config.recompile_limit = 64  # peers compile the same code, each with its own options
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # No set-up time is that of an earlier run's warm pack or compiled code.
        os.environ |= {"ACCELERATE_TTS_PACK_FOLDER": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        item = compared(SUBJECTS[given.system](given), given)
    content = documented(item, given)
    if given.json is not None:
        write_whole(given.json, json.dumps(content, indent=1) + "\n")
    if given.into is not None:
        from record import commit, store

        print(f"wrote {store(content, given.into, commit())}; make figures writes the pages")


def documented(item: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Return the document of a run."""
    options = Options(given.size, tuple(given.precision), given.layers, given.rounds, given.tune_seconds)
    content = document([], options)
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            content["versions"][package] = _version(package)
    content["options"] |= {"peers": given.peers, "threads": given.threads, "set_up_seconds": given.set_up_seconds}
    return {**content, "kernels": level(), "peers": [finite(item)]}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # it lies in a folder without metadata; the figures are no worse for it
        return "unknown"


class WithChildren(Machine):
    """A machine where what this process has started, as llama.cpp's engine, is not another program.

    Args:
        machine: The machine.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine
        self.probe, self.sleep = machine.probe, machine.sleep  # type: ignore[method-assign]

    def usage(self) -> Usage:
        """Read the counters; the processor time of children that are alive is this process's own."""
        found = self._machine.usage()
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:  # it has ended
                continue
            found = replace(found, own=found.own + times.user + times.system)
        return found


def compared(
    subject: Subject, given: argparse.Namespace, *, patience: float = 20.0, rates: Callable[[], Floors] = floors
) -> dict[str, Any]:
    """Set up all engines, time them in turn, and print and return what was found.

    Args:
        subject: The model and its engines.
        given: The options of the command.
        patience: Seconds to wait for a quiet machine, in all.
        rates: Measures the floors of the machine.
    """
    chosen = [one for one in subject.engines if one.ours or _chosen(one.name, given.peers)]
    rows: dict[str, Peer] = {}
    ready: dict[str, Engine] = {}
    expected: Any = None
    for one in chosen:
        row = rows[one.name] = Peer(one.name, lines_of(*one.code))
        absent = [name for name in one.needs if importlib.util.find_spec(name) is None]
        if absent:
            row.failed = (
                f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed:"
                f" pip install {' '.join(_PACKAGES.get(name, name) for name in absent)}"
            )
            print(f"{one.name} is left out: {row.failed}", flush=True)
            continue
        print(f"{one.name}: setting up", flush=True)
        start = time.perf_counter()
        try:
            with _alone(None, ready), ExitStack() if one.ours else _at_most(given.set_up_seconds):
                engine, output = _ready(one)
        except (Exception, OverTimeError) as error:  # of any engine, as its user would see it
            row.failed = described(error).splitlines()[0]
            print(f"{one.name} failed: {row.failed}", flush=True)
            continue
        row.set_up = time.perf_counter() - start + engine.before
        row.kept = engine.kept
        expected = output if one.name == EAGER else expected
        row.error = _error(expected, output)
        ready[one.name] = engine
    found: list[dict[str, float]] = []

    def measured() -> None:
        seconds = {}
        for name in list(ready) if len(found) % 2 == 0 else reversed(ready):
            with _alone(name, ready):
                time.sleep(_PAUSE)
                seconds[name] = ready[name].call()[0]
        found.append(seconds)

    watcher = Watcher(WithChildren(current_policy().machine()), torch.get_num_threads(), patience)
    disturbed, told, moved = series(measured, (found,), given.rounds, watcher, rates)
    kind, amount = subject.floor
    for name, engine in ready.items():
        rows[name].ratio = Ratio.of([(one[EAGER], one[name]) for one in found])
        if kind == "memory" and engine.tuned is not None:
            rows[name].read = bytes_read_by_a_token(engine.tuned)
    for engine in ready.values():
        engine.close()
    best = max((rate for one in told if (rate := one[kind]) is not None), default=None)
    item = {
        "system": subject.system, "what": subject.what, "layers": subject.layers, "threads": given.threads,
        "note": subject.note, "floor": amount / best if amount and best else None, "floor_of": kind, "floors": told,
        "disturbed": disturbed, "disturbance": watcher.worst.why, "moved": moved,
        "peers": [asdict(row) for row in rows.values()],
    }  # fmt: skip
    show(item)
    return item


def _ready(one: Candidate) -> tuple[Engine, Any]:
    """Return an engine and its second answer; one that gives none is ended."""
    engine = one.build()
    with ExitStack() as stack:
        stack.callback(engine.close)
        engine.call()
        output = engine.call()[1]
        stack.pop_all()
    return engine, output


def show(item: dict[str, Any]) -> None:
    """Print a table."""
    floor = "" if item["floor"] is None else f", floor {1e3 * item['floor']:.1f} ms ({item['floor_of']})"
    print(f"{item['system']}, {item['what']}, {item['threads']} threads{floor}; {item['moved']} {item['disturbance']}")
    for row in item["peers"]:
        if row["ratio"] is None:
            print(f"  {row['name']:42} failed: {row['failed']}")
            continue
        ratio = row["ratio"]
        error = "other length" if row["error"] is None else f"error {row['error']:.0e}"
        print(
            f"  {row['name']:42} {1e3 * ratio['after']:8.1f} ms  {ratio['ratio']:.2f}x"
            f" ({ratio['lowest']:.2f} .. {ratio['highest']:.2f})  {error}, set up in {row['set_up']:.0f} s,"
            f" {row['lines']} lines {', '.join(row['kept'])}"
        )


def _chosen(name: str, peers: Sequence[str] | None) -> bool:
    return peers is None or name == EAGER or name.lower().startswith(tuple(one.lower() for one in peers))


def _error(expected: Any, found: Any) -> float | None:
    a, b = (torch.as_tensor(one).double().flatten() for one in (expected, found))  # engines differ in dimensions of 1
    return float((b - a).norm() / a.norm()) if len(a) == len(b) else None


@contextmanager
def _alone(name: str | None, ready: dict[str, Engine]) -> Iterator[None]:
    """Switch off what the other tuned objects have changed, which may hold for the process."""
    optimizer = get_performance_optimizer()
    with ExitStack() as stack:
        for other, engine in ready.items():
            if other != name and engine.tuned is not None:
                stack.enter_context(optimizer.untouched(engine.tuned))
        yield


class OverTimeError(BaseException):
    """An engine took too long. A compiler must not catch it, so it is no `Exception`."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise in the block when it takes longer."""

    def over(_signal: int, _frame: Any) -> None:
        raise OverTimeError(f"not ready within {seconds:.0f} s")

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 2.0)  # again, since an exception in a destructor is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
