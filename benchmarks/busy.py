"""Verdicts of tuning beside busy processes, compared with those on a quiet machine.

    python benchmarks/busy.py [--model mlp|t3|xtts|demo] [--tries N] [--busy 0,2,4] [--tune-seconds S]
                              [--precision exact|balanced|fast] [--json FILE]

Each try is two processes with a folder of warm packs of their own. The first loads the model while so many others
compute in Python loops; the second loads it when they are gone, from the pack of the first, and times a call of it
untouched and tuned, in turn. If its verdicts are uncertain too, there is a third, and a fourth process. The busy
processes end by themselves.
A try counts as

- *equal* if the first process kept what the quiet machine keeps,
- *again* if it did not, but marked the verdict as uncertain, and the second process kept it,
- *as fast* if the second process has other changes, and at least 95 % of the quiet machine's ratio,
- *lost* otherwise.

The quiet machine is measured by three tries without busy processes, since verdicts on gains of a few per cent differ
from one to the next. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.storage.files import write_whole
from accelerate_tts.tuning.disturbance import Machine, Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS = 9
LONGEST = 170.0  # seconds after which the others end by themselves, and a try is given up
AS_FAST = 0.95
LOADS = 3


class Mlp(nn.Module):
    """Four pairs of linear layers, 1,024 and 4,096 wide: 134 MB that are read for each of a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(4):
            self.layers += nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (rows, 1024) from the same."""
        result: torch.Tensor = self.layers(x)
        return result


def build(model: str) -> tuple[Any, Callable[[], Any]]:
    """Make the model, and a call of it."""
    torch.manual_seed(0)
    if model == "mlp":
        mlp, x = Mlp().eval(), torch.randn(2, 1024)
        return mlp, lambda: mlp(x)
    if model == "demo":
        from accelerate_tts.cli.demo.backends import PlainBackend

        backend = PlainBackend()
        backend.load()
        return backend.voice, lambda: backend.synthesize("Hello there. The quick brown fox jumps over the lazy dog.")
    from accelerate_tts.cli.bench.measure import ordinary

    name, layers = {"t3": ("chatterbox", 3), "xtts": ("xtts", 4)}[model]
    built = ordinary(name, "full", layers)
    return built.model, lambda: built.speak(0.4)


def load(arguments: argparse.Namespace) -> None:
    """Run one process: load, tune, time, and print the result as JSON."""
    from accelerate_tts import fast_inference, get_performance_optimizer, optimized_model, receipt_of
    from accelerate_tts.tuning.timing import compare_speed

    model, call = build(arguments.model)

    def warmed(_loaded: Any) -> Any:
        return call()

    optimized_model(
        warmup=warmed, precision=arguments.precision, tune_seconds=arguments.tune_seconds, mode="no_grad"
    )(lambda: model)()  # fmt: skip
    receipt = receipt_of(model)
    told: dict[str, Any] = {"kept": [], "unsure": 0, "seconds": 0.0, "notes": []}
    if receipt is not None:
        told = {
            "kept": sorted(f"{stage.part}: {stage.stage}" for stage in receipt.kept if stage.part != "process"),
            "unsure": len(receipt.unsure), "seconds": receipt.seconds, "notes": receipt.notes,
            "verdicts": [f"{stage.part}: {stage.stage}: {stage.verdict}" for stage in receipt.stages],
        }  # fmt: skip
    if arguments.timed:
        optimizer = get_performance_optimizer()
        state = {"untouched": True}

        def run() -> None:
            with fast_inference(mode="no_grad"):
                if state["untouched"]:
                    with optimizer.untouched(model):
                        call()
                else:
                    call()

        to = lambda untouched: lambda: state.update(untouched=untouched)  # noqa: E731 - a switch
        timing = compare_speed(run, to(True), to(False), "cpu", 4.0, fewest=PAIRS)
        told |= {"ratio": timing.ratio, "low": timing.low, "high": timing.high}
    print("TOLD " + json.dumps(told))


@contextmanager
def others(count: int) -> Iterator[None]:
    """Processes that compute in Python loops while it is open; they end by themselves as well."""
    work = f"import time\nend = time.monotonic() + {LONGEST}\nwhile time.monotonic() < end:\n    pass"
    started = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def in_a_process(arguments: argparse.Namespace, folder: str, *, timed: bool) -> dict[str, Any]:
    """Run a process that loads the model with a folder of warm packs; return its report."""
    given = [sys.executable, __file__, "--child", "--model", arguments.model, "--precision", arguments.precision]
    given += ["--tune-seconds", str(arguments.tune_seconds), *(["--timed"] if timed else [])]
    environment = {**os.environ, "ACCELERATE_TTS_PACK_FOLDER": folder}
    done = subprocess.run(given, capture_output=True, text=True, env=environment, timeout=LONGEST, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    if not lines:
        raise SystemExit(f"a try failed:\n{done.stdout}\n{done.stderr}")
    told: dict[str, Any] = json.loads(lines[-1][5:])
    return told


def one_try(arguments: argparse.Namespace, busy: int) -> dict[str, Any]:
    """Load beside so many others, and again when they are gone."""
    with tempfile.TemporaryDirectory() as folder:
        with others(busy):
            start = time.perf_counter()
            first = in_a_process(arguments, folder, timed=False)
            seconds = time.perf_counter() - start
        loads = 1
        wait_for_quiet()
        while (second := in_a_process(arguments, folder, timed=True))["unsure"] and loads < LOADS:
            loads += 1
            wait_for_quiet()
    return {"busy": busy, "first": first, "second": second, "load": seconds, "loads": loads}


def wait_for_quiet() -> None:
    """Wait, a minute at most, until nobody else is at work: a machine has other neighbours than this command's."""
    watcher = Watcher(Machine(), torch.get_num_threads(), 60.0)
    while not (watcher.wait() and watcher.look().quiet) and watcher.patience > 0:
        pass


def outcome(found: dict[str, Any], quiet: list[dict[str, Any]]) -> str:
    """Classify a try."""
    wanted = [one["second"]["kept"] for one in quiet]
    if found["first"]["kept"] in wanted:
        return "equal"
    if found["first"]["unsure"] and found["second"]["kept"] in wanted:
        return "again"
    ratio = statistics.median(one["second"]["ratio"] for one in quiet)
    return "as fast" if found["second"]["ratio"] >= AS_FAST * ratio else "lost"


def main() -> None:
    """Run the tries, and print the result of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "t3", "xtts", "demo"), default="mlp")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--quiet", type=int, default=3, help="tries with nobody else, which say what is wanted")
    parser.add_argument("--busy", default="2,4")
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--json", type=Path, help="tries are added to what is there, and judged with it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        load(arguments)
        return
    file: Path | None = arguments.json
    tries: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if file is not None and file.exists() else []
    wanted = [0] * arguments.quiet + [int(text) for text in arguments.busy.split(",") if text] * arguments.tries
    for busy in wanted:
        tries.append(one_try(arguments, busy))
        if file is not None:
            write_whole(file, json.dumps(tries, indent=1))
        said(tries[-1], [one for one in tries if one["busy"] == 0])
    quiet = [one for one in tries if one["busy"] == 0]
    for busy in sorted({one["busy"] for one in tries} - {0}):
        counts = [outcome(one, quiet) for one in tries if one["busy"] == busy] if quiet else []
        print(f"{busy} others: " + ", ".join(f"{counts.count(name)} {name}" for name in dict.fromkeys(counts)))


def said(one: dict[str, Any], quiet: list[dict[str, Any]]) -> None:
    """Print one try as soon as it ends, since it takes a minute."""
    first, second = one["first"], one["second"]
    came = outcome(one, quiet) if quiet else ""
    print(
        f"{one['busy']} others: tuned in {first['seconds']:.0f} s, {first['unsure']} uncertain; then"
        f" {second['ratio']:.2f}x ({second['low']:.2f} to {second['high']:.2f}), loaded in {second['seconds']:.0f} s:"
        f" {came}",
        *(f"  first:  {line}" for line in first["kept"]),
        *(f"  second: {line}" for line in second["kept"]),
        sep="\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
