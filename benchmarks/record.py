"""Runs `accelerate-tts bench`, and stores its figures in benchmarks/results, by machine: `make record SYSTEMS=mms`."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate_tts.cli.bench.machine import slug
from accelerate_tts.storage.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_UPSTREAM = {
    re.compile("chatterbox|t3"): ("chatterbox-tts", "chatterbox-light"),
    re.compile("xtts"): ("coqui-tts",),
    re.compile("voice-clone"): ("resemblyzer",),
}
"""Packages that only these systems run on."""
_BESIDE = {"accelerate_tts", "numpy"}
_LONGEST = 110  # to be read in a listing; file systems take 255 bytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="file", type=Path, help="store this file of `bench --json`, and run nothing")
    parser.add_argument("--into", type=Path, default=RESULTS, help="the folder of results")
    known, bench = parser.parse_known_args(arguments)
    if known.file is not None:
        content = json.loads(known.file.read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.json"
            command = [sys.executable, "-m", "accelerate_tts", "bench", *bench, "--json", str(file)]
            status = subprocess.run(command, check=False).returncode
            if status or not file.exists():
                return status or 1
            content = json.loads(file.read_text("utf-8"))
    path = store(content, known.into, commit())
    print(f"wrote {path}; make figures writes the pages")
    return 0


def store(content: dict[str, Any], folder: Path, at: str) -> Path:
    """Write a document into the folder of its machine.

    Args:
        content: The document.
        folder: The folder of results.
        at: The commit.
    """
    path = folder / slug(content["machine"]) / f"{name_of(content)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**content, "commit": at}, indent=1) + "\n")
    return path


def name_of(content: dict[str, Any]) -> str:
    """Return a file's name: the systems, the precisions, the options, and the environment."""
    options = content["options"]
    systems = [one["system"] for one in content["systems"]]
    if "service" in content:
        systems = ["service", *dict.fromkeys(one["model"] for one in content["service"])]
    if "cluster" in content:
        systems = ["cluster", *dict.fromkeys(one["system"] for one in content["cluster"])]
    if "peers" in content:
        systems = ["peers", *dict.fromkeys(one["system"] for one in content["peers"])]
    told = [*systems, *options["precisions"]]
    told += [f"{options['layers']}-layers"] if options["layers"] else []
    told += [f"{options['tokens']}-tokens"] if options["tokens"] else []
    told += [] if options["size"] == "full" else [options["size"]]
    told += [f"{options['at_once']}-at-once"] if options.get("at_once", 1) > 1 else []
    told += ["only", *options["peers"]] if options.get("peers") else []
    name = "-".join([*map(_slug, told), *environment_of(content, systems)])
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def environment_of(content: dict[str, Any], systems: Sequence[str]) -> Iterator[str]:
    """Yield what makes the same options another measurement: Python, what the systems run on, and variables.

    The library itself is left out, since a newer result replaces an older one.
    """
    if content["python"]:
        yield "python-" + ".".join(content["python"].split(".")[:2])
    absent = {one for name, packages in _UPSTREAM.items() if not any(map(name.match, systems)) for one in packages}
    for package, version in content["versions"].items():
        if package not in absent | _BESIDE:
            yield f"{package}-{version}"
    for name, value in content["environment"].items():
        yield _slug(f"{name.removeprefix('ACCELERATE_TTS_')}-{value}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def commit() -> str:
    """Return the commit of the working tree, with a plus where the package in it differs."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", "accelerate_tts"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "unknown" if done.returncode else done.stdout.strip() + ("+" if changed.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
