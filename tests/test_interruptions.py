"""Ctrl-C anywhere in a load: a model that works as its receipt says, and nothing left of what was under way.

`tests/test_load_faults.py` goes through each line of the files that end a load. Here a sample of all places of the
package that a load passes is interrupted, with stages of each sort: tuned, restored from a warm pack, and with the
original weights in a file. `INTERRUPTIONS=2000` takes more of them, and `INTERRUPTIONS_SEED` others.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers.audio_utils as audio
from interrupting import Interrupting
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from accelerate_tts import events, get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.device import flags, memory, openblas
from accelerate_tts.patching.class_swap import CARRIED
from accelerate_tts.runtime.guard.guard import guard_of
from accelerate_tts.runtime.seeding import warming
from accelerate_tts.stages import catalogue
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.weight_norm import FoldStage, has_folds
from accelerate_tts.stages.process.openblas_threads import QuietBlasStage
from doubles import ALONE, is_faster, run_alone

if TYPE_CHECKING:
    from interrupting import Place

PLACES = int(os.environ.get("INTERRUPTIONS", "30"))
SEED = int(os.environ.get("INTERRUPTIONS_SEED", "0"))
KINDS = {"tuned": {"PACK": "0"}, "restored": {"PACK": "1"}, "in a file": {"PACK": "0", "GUARD_WEIGHTS": "disk"}}
ONCE_LOST = {"originals_to_file", "enter", "without_collection"}
"""Functions in which an interruption has cost something; all their places are taken."""
X = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
UPSTREAM = (audio.mel_filter_bank,)  # in a tuple, since names of modules are given the replacement

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Something for a fold, a copy of weights that is worth a file, a kept constant, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = weight_norm(nn.Conv1d(8, 8, 3))
        self.up, self.down = nn.Linear(16, 1100), nn.Linear(1100, 16)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bank = audio.mel_filter_bank(257, 80, 0.0, 8000.0, 16_000)
        y: torch.Tensor = self.conv(self.down(torch.tanh(self.up(x))))
        return y + float(bank[0, 0]) + 1e-9 * torch.rand(1)


class Backend:
    @optimized_model(warmup=[lambda self: self.speak(X), lambda self: self.stream(X)], precision="fast")
    def load(self) -> None:
        self.model = Model()

    @inference
    def speak(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x)
        return found

    @inference
    def stream(self, x: torch.Tensor) -> Any:
        yield self.model(x)
        yield self.model(x)


class Library:
    """A stand-in for a loaded OpenBLAS."""

    path, threads = "/numpy/libopenblas.so", 4


def interrupted(place: tuple[Place, int] | None) -> tuple[Backend, Interrupting, str]:
    """Load, and return how that ended, too."""
    backend, tracer, ended = Backend(), Interrupting(place), "returned"
    sys.settrace(tracer)
    try:
        backend.load()
    except KeyboardInterrupt:
        ended = "interrupted"
    finally:
        sys.settrace(None)
    return backend, tracer, ended


# --- what must hold afterwards ----------------------------------------------------------------------------------------


def process(folder: Path) -> dict[str, Any]:
    """All of the process that a load changes for a while."""
    hooks = [value for name, value in vars(nn.modules.module).items() if name.startswith("_global_")]
    maps = Path("/proc/self/maps")
    return {
        "flags": sorted(flag.name for flag in flags.held()), "OpenBLAS": Library.threads,
        "inference mode": torch.is_inference_mode_enabled(), "gradients": torch.is_grad_enabled(),
        "collector": gc.isenabled(), "threads": torch.get_num_threads(), "hooks": len(events._hooks),
        "torch's hooks": sum(len(found) for found in hooks if isinstance(found, dict)),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "upstream's function": audio.mel_filter_bank is UPSTREAM[0], "warming": warming.get(),
        "files": sorted(path.suffix for path in folder.iterdir()),
        "mapped": maps.read_text(encoding="utf-8").count(str(folder)) if maps.exists() else 0,
    }  # fmt: skip


def left_on(model: nn.Module) -> list[str]:
    """Attributes and hooks that a tuning keeps on modules."""
    own = ("_accelerate_tts_fold", "_accelerate_tts_product", *CARRIED)
    found = [name for module in model.modules() for name in vars(module) if name in own]
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    return [*found, *(f"a hook on a {type(module).__name__}" for module in hooks)]


def wrong(backend: Any, expected: torch.Tensor) -> list[str]:
    """Faults of a loaded backend, and of what undoing it leaves."""
    found, model = [], backend.model
    receipt, guard, tuned = receipt_of(backend), guard_of(backend), has_folds(model)
    if (receipt is not None and bool(receipt.kept)) != tuned:
        found.append(f"its receipt is {receipt}, and it is tuned: {tuned}")
    if (guard is not None and guard.in_force) != tuned:
        found.append("its guard is on without a tuning, or off with one")
    if not tuned and left_on(model):
        found.append(f"it is not tuned, and has {left_on(model)}")
    torch.manual_seed(3)
    if not torch.allclose(backend.speak(X), expected, atol=0.02):
        found.append("it computes something else")
    if get_performance_optimizer().undo(backend) != (receipt is not None):
        found.append("what undo says is wrong")
    torch.manual_seed(3)
    if not torch.equal(backend.speak(X), expected) or left_on(model) or receipt_of(backend) is not None:
        found.append(f"it is not as it was loaded: {left_on(model)}")
    return found


def loads_again() -> bool:
    """Load once more, in a thread of its own."""
    done: list[bool] = []

    def load() -> None:
        backend = Backend()
        backend.load()
        receipt = receipt_of(backend)
        done.append(receipt is not None and bool(receipt.kept))
        get_performance_optimizer().undo(backend)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    return done == [True]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has other instructions for a call")
def test_ctrl_c_in_a_sample_of_all_places() -> None:
    run_alone(__file__, "test_ctrl_c_leaves_a_model_that_is_as_its_receipt_says")


@pytest.mark.skipif(ALONE not in os.environ, reason="it is run in a process of its own, by the test before it")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(0)
def test_ctrl_c_leaves_a_model_that_is_as_its_receipt_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decide: Callable[..., Any]
) -> None:
    for name, value in {**KINDS[kind], "PACK_FOLDER": str(tmp_path), "TORCH_COMPILE": "0"}.items():
        monkeypatch.setenv(f"ACCELERATE_TTS_{name}", value)
    stages = [FoldStage(), QuietBlasStage(), HalfStage(torch.bfloat16, carried=False)]
    monkeypatch.setattr(catalogue, "default_stages", lambda *_given: stages)
    monkeypatch.setattr(memory, "cleanup", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(openblas, "loaded_libraries", lambda: [Library])
    decide(compare=is_faster, looks=False, unworthy=lambda *_given: None)
    model = Model()
    torch.manual_seed(3)
    with torch.inference_mode():
        expected = model(X)
    assert loads_again()  # imports all, and writes the pack
    whole, tracer, ended = interrupted(None)
    receipt = receipt_of(whole)
    assert receipt is not None
    assert ended == "returned"
    assert {result.stage for result in receipt.kept} == {stage.name for stage in stages}
    assert any(note.startswith("from a warm pack") for note in receipt.notes) == (kind == "restored")
    assert any("are in a file" in note for note in receipt.notes) == (kind == "in a file")
    drawn = torch.get_rng_state()
    assert not wrong(whole, expected)
    del whole, receipt
    gc.collect()
    before = process(tmp_path)
    assert before["upstream's function"]
    assert len(tracer.places) > 1000, "places are counted in another way by this Python"
    choose, faults = random.Random(SEED), []
    known = [place for place in sorted(tracer.places) if place[1] in ONCE_LOST]
    for place in [*known, *choose.sample(sorted(tracer.places), min(PLACES, len(tracer.places)))]:
        times = tracer.places[place]
        backend, at, ended = interrupted((place, choose.choice((1, times, choose.randint(1, times)))))
        found = [] if ended == ("interrupted" if at.where else "returned") else ["Ctrl-C was lost"]
        if hasattr(backend, "model"):
            if not torch.equal(torch.get_rng_state(), drawn):
                found.append("the random state is another one")
            found += wrong(backend, expected)
        del backend
        gc.collect()
        now = process(tmp_path)
        found += [f"{name}: {now[name]} after {value}" for name, value in before.items() if now[name] != value]
        if not loads_again():
            found.append("nothing can be loaded any more")
        faults += [f"{at.where}: {one}" for one in found]
    assert not faults, "\n".join(faults)
