"""Overhead of the library: importing it, decorating with it, and one call through @inference.

    python benchmarks/overhead.py [--json FILE]

Run nothing else meanwhile. Import times are medians of fresh interpreters, bare Python in turn with each case. The cost
of a call is that of a decorated method over the same method with `with torch.inference_mode():` written into it, both
timed in turn, batches of calls, median of the batches; the floor is the same method without any mode.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = {
    "import accelerate_tts": "import accelerate_tts",
    "and decorate a class": (
        "import accelerate_tts\n"
        "class B:\n"
        "    @accelerate_tts.optimized_model(warmup='Hello')\n"
        "    def load(self): ...\n"
        "    @accelerate_tts.inference\n"
        "    def speak(self, text): ...\n"
    ),
    "accelerate-tts --help": (
        "import sys, io, contextlib\n"
        "sys.argv = ['accelerate-tts', '--help']\n"
        "from accelerate_tts.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\n"
    ),
}
ROUNDS = 15
CALLS = 20_000
BATCHES = 21


def interpreter(code: str, folder: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    return time.perf_counter() - start


def torch_imported(code: str, folder: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('torch' in __import__('sys').modules)"],
        check=True, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip().endswith("True")


def imports() -> dict[str, dict[str, object]]:
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, code in IMPORTS.items():
            interpreter(code, folder)  # writes the bytecode
            differences = [interpreter(code, folder) - interpreter("pass", folder) for _ in range(ROUNDS)]
            results[name] = {
                "over_bare_python_ms": 1e3 * statistics.median(differences),
                "spread_ms": [1e3 * min(differences), 1e3 * max(differences)],
                "imports_torch": torch_imported(code, folder),
            }
            row = results[name]
            print(f"{name:24} {row['over_bare_python_ms']:7.1f} ms over bare Python, torch: {row['imports_torch']}")
    return results


def calls() -> dict[str, dict[str, float]]:
    import torch

    from accelerate_tts import inference

    class Service:
        def bare(self, value: int) -> int:
            return value

        def by_hand(self, value: int) -> int:
            with torch.inference_mode():
                return value

        @inference
        def decorated(self, value: int) -> int:
            return value

        async def by_hand_async(self, value: int) -> int:
            with torch.inference_mode():
                return value

        @inference
        async def decorated_async(self, value: int) -> int:
            return value

    service = Service()

    def sync(method: object) -> float:
        assert callable(method)
        start = time.perf_counter()
        for number in range(CALLS):
            method(number)
        return (time.perf_counter() - start) / CALLS

    def asynchronous(method: object) -> float:
        async def run() -> float:
            assert callable(method)
            start = time.perf_counter()
            for number in range(CALLS):
                await method(number)
            return (time.perf_counter() - start) / CALLS

        return asyncio.run(run())

    results = {}
    for name, timer, ways in (
        ("sync", sync, (service.bare, service.by_hand, service.decorated)),
        ("async", asynchronous, (service.by_hand_async, service.by_hand_async, service.decorated_async)),
    ):
        batches = [[timer(way) for way in ways] for _ in range(BATCHES)]
        over = [1e6 * (batch[2] - batch[1]) for batch in batches]
        bare, by_hand, decorated = (1e6 * statistics.median(column) for column in zip(*batches, strict=True))
        results[name] = {
            "floor_us": bare, "by_hand_us": by_hand, "decorated_us": decorated,
            "over_by_hand_us": statistics.median(over), "least_us": min(over), "most_us": max(over),
        }  # fmt: skip
        print(
            f"@inference, {name:5} {results[name]['over_by_hand_us']:7.2f} us over `with inference_mode()`"
            f" ({min(over):.2f} .. {max(over):.2f}; by hand {by_hand:.2f}, decorated {decorated:.2f})"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {"imports": imports(), "calls": calls()}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
