"""Runs each example at its true size with random weights, one after the other, each in its own process.

    python benchmarks/examples.py [--tune-seconds S] [--layers N] [--tiny] [NAME ...]

For a machine with nothing else to do: minutes each on a CPU, and 16 GB for Higgs without `--layers`. The exit status is
1 if one fails or writes no sound. `--tiny` runs them at the small size of the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
HEADER = 44  # bytes, of a WAV file
RUNS: dict[str, tuple[str, ...]] = {
    "mms": ("mms_backend.py", "Hello there."),
    "voice-clone": ("voice_clone_service.py",),
    "xtts": ("xtts_backend.py", "Hello there.", "--seconds", "1"),
    "chatterbox": ("chatterbox_backend.py", "Hello there.", "--seconds", "1"),
    "multilingual": ("chatterbox_backend.py", "Hello there.", "--seconds", "1", "--variant", "multilingual"),
    "turbo": ("chatterbox_backend.py", "Hello there.", "--seconds", "1", "--variant", "turbo"),
    "higgs": ("higgs_backend.py", "Hello there.", "--seconds", "1"),
}


def run(name: str, options: argparse.Namespace, folder: Path) -> bool:
    """Run one of them and say how it went."""
    script, *told = RUNS[name]
    written = folder / f"{name}.out"
    more = ["--random-weights", "--tune-seconds", str(options.tune_seconds), "-o", str(written)]
    more += ["--tiny"] if options.tiny else []
    more += ["--layers", str(options.layers)] if name == "higgs" and options.layers else []
    environment = {**os.environ, "ACCELERATE_TTS_PACK": "0", "TQDM_DISABLE": "1"}
    begin = time.perf_counter()
    command = [sys.executable, str(EXAMPLES / script), *told, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    size = written.stat().st_size if written.exists() else 0
    well = done.returncode == 0 and size > HEADER
    last = (done.stderr.strip().splitlines() or [""])[-1]
    words = f"well, {size} bytes" if well else f"FAILED: status {done.returncode}, {size} bytes: {last}"
    print(f"{name}: {time.perf_counter() - begin:.0f} s, {words}", flush=True)
    if well:
        print("  " + "\n  ".join(done.stdout.strip().splitlines()[-2:]), flush=True)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []], help="all if none is given")
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--layers", type=int, help="of Higgs, where memory is short")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [run(name, options, Path(folder)) for name in options.names or RUNS]  # all, whatever fails
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
