"""2,000 calls of random length of a small tuned model leave nothing; and the soak test sees and names what would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"

# One process for all of it, of its own: its memory is then its own, and there are few objects to look through.
SOAK = """
import importlib.util, json, os, sys, types
import torch
spec = importlib.util.spec_from_file_location("soak", sys.argv[1])
soak = importlib.util.module_from_spec(spec)
sys.modules["soak"] = soak  # its dataclass asks for it
spec.loader.exec_module(soak)

from dataclasses import replace
from accelerate_tts.tuning.timing import Timing
from accelerate_tts.tuning.policy import current_policy, tuning_policy
sys.argv = [sys.argv[1], "small", "--calls", "2000", "--loads", "0", "--tune-seconds", "4", "--json", sys.argv[2]]
kept = replace(current_policy(), compare=lambda *_args, **_kwargs: Timing(2.0, 1.0, 2.0, 2.0, 2.0, 5))
with tuning_policy(kept):  # what is kept is no matter of this machine's noise
    status = soak.main()

class Service:
    def __init__(self):
        self.history = []

tensors, chunks, service, deep = [], [], Service(), {"by voice": {}}
def named(_length):
    tensors.append(torch.zeros(3, 7))
    service.history.append((torch.zeros(3, 8), 1))
    deep["by voice"][len(deep["by voice"])] = torch.zeros(3, 9)

def others(_length):
    chunks.append(os.urandom(1 << 20))
    kept.append(type("Owner", (), {})())
    soak.guards.protect(kept[-1], soak.guards.Guard("it", kept[-1], {}, 1))

found, kept = {}, []
for leak in (named, others, torch.zeros):
    found[leak.__name__] = soak.soak(leak.__name__, leak, 100, types.SimpleNamespace()).faults
    tensors.clear(), chunks.clear(), service.history.clear(), deep["by voice"].clear(), kept.clear()

class Held(soak.Small):  # a model whose weights somebody keeps
    def load(self):
        super().load()
        tensors.extend(self.vocoder.parameters())

dropped = {kind.__name__: soak.loads(kind.__name__, kind, 3).faults for kind in (soak.Small, Held)}
print("\\n" + json.dumps({"status": status, "found": found, "dropped": dropped}))
"""


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    done = subprocess.run(
        [sys.executable, "-c", SOAK, str(SCRIPT), str(out)],
        capture_output=True, text=True, check=False, cwd=out.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (seen,) = json.loads(out.read_text(encoding="utf-8"))
    return json.loads(done.stdout.splitlines()[-1]), seen, done.stdout


@pytest.mark.slow
def test_two_thousand_calls_leave_nothing(soaked: Any) -> None:
    result, seen, said = soaked
    assert result["status"] == 0, said
    assert "flat" in said
    assert "fold weight norm" in said, "it was not tuned"
    assert seen["calls"] == 2000
    assert len(seen["tensors"]) == len(seen["resident"]) == len(seen["entries"]) == 20
    assert min(seen["tensors"]) > 10, "nothing was counted"
    assert seen["entries"][-1]["cached embeddings"] > 10, "the bound of the cache was not tried"
    assert seen["entries"][-1]["guards"] > 0
    assert seen["entries"][-1]["recompiled graphs"] == 0


@pytest.mark.parametrize(
    ("kind", "holder"),
    [
        ("(3, 7) float32", "module __main__.tensors[...]"),
        ("(3, 8) float32", "Service.history[...][...]"),
        ("(3, 9) float32", "module __main__.deep['by voice'][99]"),
    ],
)
def test_tensors_that_leak_are_seen_and_who_holds_them_is_named(soaked: Any, kind: str, holder: str) -> None:
    faults = soaked[0]["found"]["named"]
    assert "tensors grew" in faults[0]
    assert f"75 more of {kind}, held by {holder}" in faults[0]


def test_weights_that_outlive_their_model_are_seen(soaked: Any) -> None:
    dropped = soaked[0]["dropped"]
    assert dropped["Small"] == []
    (fault,) = dropped["Held"]
    assert "of 3 dropped models" in fault
    assert "held by module __main__.tensors[...]" in fault


def test_other_leaks_are_seen_and_what_is_flat_is_not(soaked: Any) -> None:
    found = soaked[0]["found"]
    assert any("resident memory grew" in fault for fault in found["others"])
    assert any(fault.startswith("guards grew from") for fault in found["others"])
    assert found["zeros"] == []
