"""A hundred calls of random length of small tuned models leave nothing behind; and the soak test sees what would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def test_a_hundred_calls_leave_nothing(tmp_path: Path) -> None:
    """In a process of its own, so that the memory is its own. `make soak` has the other system, and 2,000 calls."""
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "mms", "--calls", "100", "--tune-seconds", "3", "--json", str(out)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flat" in done.stdout
    (seen,) = json.loads(out.read_text(encoding="utf-8"))
    assert len(seen["tensors"]) == 20
    assert min(seen["tensors"]) > 10, "nothing was counted"


LEAKS = """
import importlib.util, json, os, sys
import torch
spec = importlib.util.spec_from_file_location("soak", sys.argv[1])
soak = importlib.util.module_from_spec(spec)
sys.modules["soak"] = soak  # its dataclass asks for it
spec.loader.exec_module(soak)
tensors, chunks = [], []
leaks = {
    "one tensor": lambda _length: tensors.append(torch.zeros(3, 7)),
    "no tensor": lambda _length: chunks.append(os.urandom(1 << 20)),
    "nothing": lambda length: torch.zeros(length),
}
print(json.dumps({name: soak.soak(name, leak, 200).faults for name, leak in leaks.items()}))
"""


def test_what_leaks_is_seen_and_named_and_what_is_flat_is_not() -> None:
    """In a process of its own: in this one, looking through all objects takes a second a sample."""
    done = subprocess.run(
        [sys.executable, "-c", LEAKS, str(SCRIPT)], capture_output=True, text=True, check=True,
    )  # fmt: skip
    faults = json.loads(done.stdout.splitlines()[-1])
    (fault,) = faults["one tensor"]
    assert "tensors grew" in fault
    assert "more of (3, 7) float32" in fault
    (fault,) = faults["no tensor"]
    assert "resident memory grew" in fault
    assert faults["nothing"] == []
