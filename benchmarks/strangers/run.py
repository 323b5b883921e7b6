"""Speech systems that no plan knows, decorated as README shows and compared with themselves undecorated.

    python benchmarks/strangers/run.py [NAME ...] [--loads exact,again,every] [--seconds 8] [--results FILE]

The systems of a package run in one process. Each system of `systems.py` is built with seeded weights, called
undecorated, and
then, built anew, loaded by a method with `@optimized_model(warmup=...)` and called by a method with `@inference`:

    exact, balanced, fast   the three precisions, as a user has them
    again                   exact once more, from the warm pack of the first load
    every                   exact, with each change kept that is right, whether it is faster or not
    every-fast              the same in `fast`
    timed                   exact, and timed in turn with the same system undecorated; only if it is asked for

The decorated object is called with the input of the warm-up, with another length, in another thread, and with the
first input again; each output is compared with that of the undecorated object, with the same random numbers. One line
a load; everything is in the JSON file. The exit status is 1 if a system works undecorated and fails decorated: it
raises, its warm-up fails, its guard finds a fault, or its output differs by more than the precision allows. A system
whose package is not installed is left out, with the reason. No time is measured but in `timed`, beside which nothing
else may run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "STRANGERS.md"
TIMED = "timed"
LOADS = ("exact", "again", "balanced", "fast", "every", "every-fast", TIMED)
LIMITS = {"exact": 1e-4, "balanced": 2e-2, "fast": 4e-2}
"""Relative error of a whole output: what the precisions promise."""
_CHILD_SECONDS = 900.0
_SAY = "STRANGER "
_BEGIN, _END = "<!-- strangers: begin -->", "<!-- strangers: end -->"

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from systems import Stranger, System


# --- one system, in a process of its own ------------------------------------------------------------------------------


def _leaves(value: Any) -> list[Any]:
    """The tensors and numbers of an output, in order; a generator is run to its end."""
    import numpy as np
    import torch

    if isinstance(value, types.GeneratorType):
        value = list(value)
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu()]
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(np.asarray(value, dtype=value.dtype if value.dtype != object else float))]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, (int, float, bool, np.number)):
        return [torch.tensor(value)]
    return _leaves(vars(value)) if hasattr(value, "__dataclass_fields__") else []


def difference(expected: list[Any], found: list[Any]) -> tuple[float, str]:
    """The largest relative error of the tensors of two outputs, and in words what cannot be compared; infinite then."""
    import torch

    if len(expected) != len(found):
        return float("inf"), f"{len(found)} tensors in place of {len(expected)}"
    worst = 0.0
    for mine, other in zip(expected, found, strict=True):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            return float("inf"), f"{other.dtype}{list(other.shape)} in place of {mine.dtype}{list(mine.shape)}"
        if torch.equal(mine, other) or not mine.numel():
            continue
        if not (mine.is_floating_point() or mine.is_complex()):
            return float("inf"), "other tokens"
        odd = ~torch.isfinite(mine)
        if not torch.equal(odd, ~torch.isfinite(other)):
            return float("inf"), "other places are not finite"
        mine, other = mine[~odd].to(torch.complex128), other[~odd].to(torch.complex128)  # noqa: PLW2901
        norm = float(torch.linalg.vector_norm(mine))
        worst = max(worst, float(torch.linalg.vector_norm(mine - other)) / (norm or 1.0))
    return worst, ""


def _called(speak: Any, arguments: tuple[Any, ...], seed: int) -> list[Any]:
    import torch

    given = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments)
    torch.manual_seed(seed)
    return _leaves(speak(*given))


def built(stranger: Stranger) -> System:
    """Build a system, always with the same weights, none of which is all zeros.

    Code books begin with zeros, and so do the last layers of some blocks: nothing after them depended on anything, and
    what was wrong before them would not be heard.
    """
    import torch

    from accelerate_tts.models import describe

    torch.manual_seed(0)
    made = stranger.build()
    with torch.no_grad():
        for root in describe(made.model).roots:
            books = [(name, held) for name, held in root.named_buffers() if "embed" in name]
            for name, held in (*root.named_parameters(), *books):
                if held.is_floating_point() and held.dim() > 1 and not held.any():
                    held.normal_(0, 1.0 if "embed" in name else 0.05)
    return made


def undecorated(stranger: Stranger) -> tuple[list[list[Any]], bool]:
    """Return the outputs for both inputs, and True if a second object gives the same.

    Raises:
        ValueError: Both inputs give the same, so that a comparison would prove nothing.
    """
    outputs = []
    for _ in range(2):
        made = built(stranger)
        outputs.append([_called(lambda *given: made.call(made.model, *given), given, 1) for given in made.inputs])  # noqa: B023
    same = all(difference(one, two)[0] == 0 for one, two in zip(*outputs, strict=True))
    if not _differ(*outputs[0]):
        raise ValueError("both inputs give the same")
    return outputs[0], same


def _differ(one: list[Any], two: list[Any]) -> bool:
    """Tell if two outputs differ in more than their lengths."""
    import torch

    for mine, other in zip(one, two, strict=False):
        shared = tuple(slice(min(sizes)) for sizes in zip(mine.shape, other.shape, strict=False))
        if mine.dim() == other.dim() and not torch.equal(mine[shared], other[shared]):
            return True
    return False


def _decorated(made: System, load: str, seconds: float) -> Any:
    """A loaded service, decorated as README shows."""
    from accelerate_tts import inference, optimized_model

    warmup: Any = made.warmup if made.warmup is not None else lambda backend: backend.speak(*made.inputs[0])
    precision = _precision(load)

    class Backend:
        @optimized_model(warmup=warmup, precision=precision, tune_seconds=seconds)
        def load(self) -> None:
            self.model = made.model

        @inference
        def speak(self, *given: Any) -> Any:
            return made.call(self.model, *given)

    backend = Backend()
    backend.load()
    return backend


def _policy(load: str) -> Any:
    if not load.startswith("every"):
        return nullcontext()
    from accelerate_tts.tuning.policy import current_policy, tuning_policy
    from accelerate_tts.tuning.timing import Timing

    faster = Timing(before=2.0, after=1.0, ratio=2.0, low=2.0, high=2.0, pairs=5)
    return tuning_policy(replace(current_policy(), compare=lambda *_args, **_kwargs: faster, looks=False))


def _compared(backend: Any, made: System, expected: list[list[Any]]) -> tuple[float, list[str]]:
    """Call a decorated object; return the largest difference, and what cannot be compared."""
    worst, words = 0.0, []
    calls = [("the warm-up's input", 0), ("another length", 1), ("another thread", 1), ("the first again", 0)]
    for name, number in calls:
        if name == "another thread":
            with ThreadPoolExecutor(1) as threads:
                found = threads.submit(_called, backend.speak, made.inputs[number], 1).result()
        else:
            found = _called(backend.speak, made.inputs[number], 1)
        error, why = difference(expected[number], found)
        worst = max(worst, error)
        if why:
            words.append(f"{name}: {why}")
    return worst, words


def _verdict(load: str, worst: float, words: list[str], *, sampled: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"error": worst if worst != float("inf") else None}
    limit = LIMITS[_precision(load)]
    if worst > limit:
        said = "; ".join(words) or f"a relative error of {worst:.1e}, {limit:g} is the most allowed"
        if sampled and limit > LIMITS["exact"]:
            facts["note"] = f"other choices than in fp32 ({said})"
        else:
            facts["failed"] = said
    return facts


def _precision(load: str) -> Any:
    return {"again": "exact", "every": "exact", "every-fast": "fast", TIMED: "exact"}.get(load, load)


_FEWEST, _MOST, _ENOUGH = 7, 60, 6.0  # pairs, pairs, and seconds after which the fewest are enough


def in_turn(stranger: Stranger, backend: Any, made: System) -> dict[str, float]:
    """Return how many times as fast the decorated object is as an undecorated one: median and quartiles of pairs."""
    plain = built(stranger)

    def undecorated_call() -> None:
        _called(lambda *given: plain.call(plain.model, *given), plain.inputs[0], 1)

    def decorated_call() -> None:
        _called(backend.speak, made.inputs[0], 1)

    def seconds(call: Callable[[], None]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    undecorated_call(), decorated_call()  # warm
    ratios: list[float] = []
    end = time.perf_counter() + _ENOUGH
    while len(ratios) < _FEWEST or (time.perf_counter() < end and len(ratios) < _MOST):
        if len(ratios) % 2:
            before, after = seconds(undecorated_call), seconds(decorated_call)
        else:
            after, before = seconds(decorated_call), seconds(undecorated_call)
        ratios.append(before / after)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def one_load(
    stranger: Stranger, load: str, expected: list[list[Any]], seconds: float, *, sampled: bool
) -> dict[str, Any]:
    """Load a system decorated, call it, and say what was found."""
    from accelerate_tts import add_hook, get_performance_optimizer, receipt_of
    from accelerate_tts.events import FellBack, Guarded, NotApplied, WarmupFailed
    from accelerate_tts.runtime.mode_choice import mode_of

    events: list[Any] = []
    row: dict[str, Any] = {"load": load, "failed": None, "error": None, "note": "", "kept": [], "mode": "inference"}
    remove = add_hook(events.append)
    begun = time.perf_counter()
    try:
        made = built(stranger)
        if load.startswith("every") or load == TIMED:  # it tunes anew
            shutil.rmtree(os.environ["ACCELERATE_TTS_PACK_FOLDER"], ignore_errors=True)
        with _policy(load):
            backend = _decorated(made, load, seconds)
        row |= _verdict(load, *_compared(backend, made, expected), sampled=sampled)
        receipt = receipt_of(backend)
        row["kept"] = [f"{stage.part}: {stage.stage}" for stage in receipt.kept] if receipt else []
        row["dropped"] = (
            {f"{stage.part}: {stage.stage}": stage.reason for stage in receipt.stages if not stage.kept}
            if receipt
            else {}
        )
        row["mode"] = mode_of(backend, "inference")
        if load == TIMED:
            row |= in_turn(stranger, backend, made)
        get_performance_optimizer().undo(backend)
        error, why = difference(expected[0], _called(backend.speak, made.inputs[0], 1))
        if error > LIMITS["exact"]:
            row["failed"] = row["failed"] or f"after undo: {why or f'a relative error of {error:.1e}'}"
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        row["traceback"] = traceback.format_exc()[-3000:]
    finally:
        remove()
    for event in events:
        # A guard that finds a fault which the untouched model has, too, counts none: random weights may be silent.
        if isinstance(event, WarmupFailed) or (isinstance(event, Guarded) and event.count):
            row["failed"] = row["failed"] or str(event)[:300]
    row["events"] = [
        str(event)[:400] for event in events if isinstance(event, (NotApplied, FellBack, WarmupFailed, Guarded))
    ]
    row["seconds"] = round(time.perf_counter() - begun, 1)
    return row


def child(names: Sequence[str], loads: Sequence[str], seconds: float) -> None:
    """Run systems; each line of standard output that begins with `STRANGER` is JSON for the parent."""
    from systems import SYSTEMS

    def say(**facts: Any) -> None:
        sys.__stdout__.write(f"\n{_SAY}{without_folders(json.dumps(facts))}\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]

    for name in names:
        say(begins=name)
        _run(SYSTEMS[name], loads, seconds, say)
    say(begins=None)


def without_folders(text: str) -> str:
    """Cut the folders of this machine off the paths in a text, such as a traceback's."""
    folders = {os.fspath(HERE.parents[1]), tempfile.gettempdir(), os.fspath(Path.home()), *sys.path} - {os.fspath(HERE)}
    for folder in sorted((folder.rstrip(os.sep) for folder in folders), key=len, reverse=True):
        if folder:
            text = text.replace(folder + os.sep, "")
    return text


def _run(stranger: Stranger, loads: Sequence[str], seconds: float, say: Callable[..., None]) -> None:

    from accelerate_tts.models import describe

    try:
        expected, repeats = undecorated(stranger)
        made = built(stranger)
        plans = sorted({part.kind for part in describe(made.model).parts})
    except Exception as error:
        say(undecorated=f"{type(error).__name__}: {str(error)[:300]}", traceback=traceback.format_exc()[-3000:])
        return
    say(undecorated="works" if repeats else "works, and gives another output each time", parts=plans)
    shutil.rmtree(os.environ["ACCELERATE_TTS_PACK_FOLDER"], ignore_errors=True)
    for load in loads if repeats else ():
        say(**one_load(stranger, load, expected, seconds, sampled=made.sampled))


# --- all systems ------------------------------------------------------------------------------------------------------


def _missing(stranger: Stranger) -> str | None:
    for package in stranger.package.split("+"):
        try:
            if find_spec(package) is None:
                return f"{package} is not installed"
        except (ImportError, ValueError) as error:
            return f"{package} cannot be imported: {error}"
    return None


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _new_row(stranger: Stranger) -> dict[str, Any]:
    missing = _missing(stranger)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(), "package": stranger.distribution,
        "version": "" if missing else _version(stranger.distribution), "undecorated": "", "loads": [],
        "skipped": missing,
    }  # fmt: skip


def run_together(
    names: Sequence[str], loads: Sequence[str], seconds: float, told: Callable[[str, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """Run systems in one process, and what is left in another one if a system ends it.

    Args:
        names: Names of systems.
        loads: The loads of each.
        seconds: Tuning budget of each load.
        told: Called with a name and its row after each load.

    Returns:
        The row of each system.
    """
    from systems import SYSTEMS

    rows = {name: _new_row(SYSTEMS[name]) for name in names}
    left = [name for name in names if not rows[name]["skipped"]]
    while left:
        now, begun = None, _started(left, loads, seconds)
        with begun as process:
            stop = threading.Timer(_CHILD_SECONDS, process.kill)
            stop.start()
            for line in process.stdout or ():
                if not line.startswith(_SAY):
                    continue
                facts = json.loads(line[len(_SAY) :])
                if "begins" in facts:
                    now = facts["begins"]
                    left = left[left.index(now) + 1 :] if now else []
                    stop.cancel()
                    stop = threading.Timer(_CHILD_SECONDS, process.kill)
                    stop.start()
                elif "load" in facts:
                    rows[now]["loads"].append(facts)
                    told(str(now), rows[now])
                else:
                    rows[now].update(facts, skipped=_skipped(facts["undecorated"]))
            stop.cancel()
        if now is None and left:
            raise SystemExit("the process of the systems did not begin")
        if now is not None:
            rows[now]["loads"].append(
                {"load": "process", "failed": f"the process ended with status {process.returncode}"}
            )
            rows[now]["undecorated"] = rows[now]["undecorated"] or "works"  # it may be ours: somebody is to look
    return rows


class _Ended(subprocess.Popen[str]):
    """A process that ends with the block that uses it, however that ends."""

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.kill()
        super().__exit__(*error)


def _started(names: Sequence[str], loads: Sequence[str], seconds: float) -> subprocess.Popen[str]:
    folder = tempfile.mkdtemp()
    told = {"ACCELERATE_TTS_PACK_FOLDER": folder, "ACCELERATE_TTS_TUNE_PATIENCE": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__)), *names, "--child", "--loads", ",".join(loads)]
    return _Ended(
        [*command, "--seconds", str(seconds)], env={**os.environ, **told}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def _skipped(undecorated: str) -> str | None:
    """A package whose own imports are not there is not installed either."""
    return undecorated if undecorated.startswith(("ModuleNotFoundError", "ImportError")) else None


def fails(row: dict[str, Any]) -> bool:
    """Tell if a system works undecorated and fails decorated."""
    return row["undecorated"].startswith("works") and any(load["failed"] for load in row["loads"])


def _line(load: dict[str, Any]) -> str:
    if load["failed"]:
        return f"FAILED: {load['failed']}"
    error = load["error"]
    output = "same output" if error == 0 else f"error {error:.1e}" if error is not None else "compared"
    mode = "" if load["mode"] == "inference" else f", mode {load['mode']}"
    kept = f", kept {len(load['kept'])}" if load["kept"] else ", nothing kept"
    if "ratio" in load:
        kept += ", {ratio:.2f}x ({low:.2f} .. {high:.2f})".format(**load)
    return f"{output}{mode}{kept}{', ' + load['note'] if load['note'] else ''}"


def _place(load: dict[str, Any]) -> int:
    return LOADS.index(load["load"]) if load["load"] in LOADS else len(LOADS)


def page(results: dict[str, Any]) -> str:
    """The table of docs/STRANGERS.md."""
    lines = [
        "| system | package | run on | undecorated | " + " | ".join(LOADS) + " |",
        "| --- " * (4 + len(LOADS)) + "|",
    ]
    for name, row in sorted(results["systems"].items()):
        by_load = {load["load"]: load for load in row["loads"]}
        cells = [_cell(by_load.get(load)) for load in LOADS] if not row["skipped"] else [""] * len(LOADS)
        state = f"left out: {row['skipped']}" if row["skipped"] else row["undecorated"]
        lines.append(
            f"| {name} | {row['package']} {row['version']} | {row['date']} | {state} | " + " | ".join(cells) + " |"
        )
    return "\n".join(line.rstrip() for line in lines)


def _cell(load: dict[str, Any] | None) -> str:
    if load is None:
        return ""
    if load["failed"]:
        return "**fails**"
    if "ratio" in load:
        return "{ratio:.2f}x ({low:.2f} .. {high:.2f})".format(**load)
    error = load["error"]
    output = "other choices" if load["note"] else "same" if error == 0 else f"{error:.0e}"
    kept = f", {len(load['kept'])} kept" if load["kept"] else ""
    return output + kept + ("" if load["mode"] == "inference" else f", {load['mode']}")


def with_table(text: str, results: dict[str, Any]) -> str:
    """Return the page's text with the table of these results between its marks."""
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{before}{_BEGIN}\n\nVersions: {told}.\n\n{page(results)}\n\n{_END}{after}"


def ordered(loads: str) -> list[str]:
    """The loads in the order of `LOADS`: `fast` after `every-fast` would find the pack of that load."""
    return sorted(loads.split(","), key=LOADS.index)


def _means(given: str, name: str) -> bool:
    """Tell if a name that was given means a system: its own name, or the beginning of several."""
    from systems import SYSTEMS

    return given == name or (given not in SYSTEMS and name.startswith(given))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="systems, or beginnings of their names; all by default")
    parser.add_argument("--loads", default=",".join(load for load in LOADS if load != TIMED))
    parser.add_argument("--seconds", type=float, default=8.0, help="tuning budget of each load")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write docs/STRANGERS.md from the results, and run nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of the systems ends, too
    sys.path.insert(0, str(HERE))
    if chosen.child:
        child(chosen.names, chosen.loads.split(","), chosen.seconds)
        return 0
    results = json.loads(chosen.results.read_text()) if chosen.results.exists() else {"systems": {}}
    if chosen.page:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), results), "utf-8")
        return 0
    from systems import SYSTEMS

    from accelerate_tts import __version__
    from accelerate_tts.storage.files import write_whole

    results["versions"] = {
        "accelerate_tts": __version__, "torch": _version("torch"), "Python": platform.python_version()
    }  # fmt: skip
    names = [name for name in SYSTEMS if not chosen.names or any(_means(given, name) for given in chosen.names)]
    loads = ordered(chosen.loads)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(SYSTEMS[name].package, []).append(name)

    def told(name: str, row: dict[str, Any]) -> None:
        load = row["loads"][-1]
        keep(name, row)
        print(f"[{names.index(name) + 1}/{len(names)}] {name} {load['load']}: {_line(load)}", flush=True)

    def keep(name: str, row: dict[str, Any]) -> None:
        """Write a row, with the loads of earlier runs that this run does not make; a run may be broken off."""
        earlier = results["systems"].get(name, {}).get("loads", []) if row["loads"] else []
        others = [load for load in earlier if load["load"] not in {*loads, "process"}]
        results["systems"][name] = {**row, "loads": sorted([*others, *row["loads"]], key=_place)}
        write_whole(chosen.results, json.dumps(results, indent=1) + "\n")

    failed = []
    for group in groups.values():
        for name, row in run_together(group, loads, chosen.seconds, told).items():
            keep(name, row)
            failed += [name] if fails(row) else []
            if row["skipped"] or not row["undecorated"].startswith("works"):
                print(
                    f"{name}: left out: {row['skipped'] or 'undecorated it fails: ' + row['undecorated']}", flush=True
                )
    ran = sum(bool(row["loads"]) for row in results["systems"].values())
    print(f"{ran} systems in {chosen.results.name}; {len(failed)} fail decorated: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
