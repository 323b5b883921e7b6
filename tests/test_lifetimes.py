"""Fifty loads of each family on each stage leave nothing: no weight, module, class, thread, file, hook or entry.

Half of the models are dropped as they are, and half are undone first. Each test counts in a process of its own, from
its first few loads to its last: what is made once is made by then. benchmarks/soak.py says what is counted, and does
the same with whole systems.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.patching import class_swap
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompileStage, FrozenCompileStage
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.graphs.recorded_parts import RecordedPartsStage
from accelerate_tts.stages.protocol import Change, Stage
from doubles import ALONE, is_faster, run_alone
from reruns import Reruns

HERE = Path(__file__).parent
FIRST, LOADS = 5, 50
SLOW = {"durations": 15, "text": 15}
"""Loads of the families that take a quarter of a second each."""

pytestmark = pytest.mark.usefixtures("one_thread")
alone = pytest.mark.skipif(ALONE not in os.environ, reason="it is run in a process of its own, by the test before it")


def by_path(folder: Path, name: str) -> Any:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


soak = by_path(HERE.parent / "benchmarks", "soak")
weights = by_path(HERE / "fuzz", "test_weights")


def stays(load: Callable[[int, Any], object], first: int = FIRST, loads: int = LOADS) -> list[str]:
    """Load so many times, and say what stays. `load` notes the weights and modules of its model."""
    soak.import_all()
    early, living = soak.Living(), soak.Living()
    for number in range(first):
        load(number, early)
    gc.collect()
    gc.freeze()  # what is there now is not looked through
    try:
        counts = [soak.standing()]
        middle = (first + loads) // 2
        for half in (range(first, middle), range(middle, loads)):
            for number in half:
                load(number, living)
            counts.append(soak.standing())
    finally:
        gc.unfreeze()
    assert living.weights, "nothing was loaded"
    found = [f"{what} grew by {more}" for what, more in soak.growth(counts, middle - first).items()]
    return [*living.faults(loads - first), *found]


def through(stages: list[Stage], part: Callable[[Any, Stage], Part], model: Any, run: Any, *, undone: bool) -> None:
    """Put stages on a model, use it, and put it back or not."""
    changes: list[Change] = []
    for stage in stages:
        obstacle = stage.applies(part(model, stage))
        if obstacle is not None:
            pytest.skip(obstacle)
        changes.append(stage.prepare(part(model, stage)))
        changes[-1].on()
    with torch.inference_mode():
        for _ in range(2):
            run(model)
    assert all(change.graphs != 0 for change in changes), "nothing was compiled"
    if undone:
        for change in reversed(changes):
            change.off()


# --- each stage -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)  # three seconds for each of some eighty pairs
def test_each_stage() -> None:
    run_alone(__file__, "test_loads_of_a_family_on_a_stage_leave_nothing", skips=True)


WITH_GRAPHS = {weights.COMPILED, weights.FROZEN, weights.BLOCKS, *weights.STEP, *weights.RECORDED}  # further below
PAIRS = [(name, stage) for name, stage in weights.PAIRS if stage not in WITH_GRAPHS]


@alone
@pytest.mark.parametrize(("name", "stage"), PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_loads_of_a_family_on_a_stage_leave_nothing(name: str, stage: str) -> None:
    family = weights.FAMILIES[name]
    stages = [weights.STAGES_BY_NAME[each] for each in (*family.first, stage)]

    def load(number: int, living: Any) -> None:
        model = family.build()
        living.note(model)
        through(
            stages, lambda model, stage: weights.part_of(model, name, stage.name), model, family.run,
            undone=bool(number % 2),
        )  # fmt: skip

    assert not stays(load, loads=SLOW.get(name, LOADS))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def rerun(device: torch.device) -> Reruns:
    return Reruns(device, watched=False)


GRAPHS: list[Stage] = [
    CompileStage("default"), FrozenCompileStage(), CompiledBlocksStage("default"), RecordedPartsStage(rerun),
    CapturedStepStage(rerun),
]  # fmt: skip
"""Recorded pieces need a vocoder: they are among the pairs above."""


@pytest.mark.slow
def test_each_stage_with_graphs() -> None:
    run_alone(__file__, "test_loads_with_graphs_leave_nothing", skips=True)


@alone
@pytest.mark.parametrize("stage", GRAPHS, ids=lambda stage: stage.name)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("uncompiled")
def test_loads_with_graphs_leave_nothing(stage: Stage) -> None:
    """dynamo's graphs run as they were traced, and recordings by running again."""
    decodes = stage.name == "captured decode step"

    def load(number: int, living: Any) -> None:
        model = weights.decoder("Llama") if decodes else Blocks().eval()
        living.note(model)
        part = Part("part", "decoder" if decodes else "vocoder", model, few_rows=1.0, cached=decodes)
        run = weights.decoded if decodes else lambda model: [model(weights.noise(1, 5, 16))]
        through([stage], lambda *_: part, model, run, undone=bool(number % 2))

    found = stays(load, loads=FIRST + 20)
    # dynamo itself keeps what it has traced, in caches of its own: of ours nothing may stay.
    assert not [one for one in found if not one.startswith(("objects of class", "finalizers"))]


# --- the whole of a load ----------------------------------------------------------------------------------------------


class Backend:
    def __init__(self, name: str) -> None:
        self.family = weights.FAMILIES[name]

    @optimized_model(warmup=lambda self: self.speak(), precision="fast")
    def load(self) -> None:
        self.model = self.family.build()

    @inference(concurrency=2)
    def speak(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self.family.run(self.model)
        return found


@pytest.mark.slow
def test_tuned() -> None:
    run_alone(__file__, "test_tuned_loads_leave_nothing")


@alone
@pytest.mark.filterwarnings("ignore")
def test_tuned_loads_leave_nothing(decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All families in turn, tuned with every stage that is right."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(compare=is_faster, looks=False, unworthy=lambda *_given: None)
    names = itertools.cycle([name for name in weights.FAMILIES if name not in SLOW])
    optimizer, kept = get_performance_optimizer(), set()

    def load(number: int, living: Any) -> None:
        backend = Backend(next(names))
        backend.load()
        backend.speak()
        receipt = receipt_of(backend)
        assert receipt is not None
        kept.update(result.stage for result in receipt.kept)
        living.note(backend.model)
        if number % 2:
            assert optimizer.undo(backend)

    assert not stays(load, first=len(weights.FAMILIES), loads=len(weights.FAMILIES) + LOADS)
    assert len(kept) > 3, "hardly anything was tuned"


def test_what_stays_is_named() -> None:
    left: list[Any] = []

    def load(_number: int, living: Any) -> None:
        model = nn.Linear(2, 2)
        living.note(model)
        left.append((type("Left", (nn.Linear,), {}), weakref.finalize(model, list)))
        class_swap._patched[left[-1][0]] = None
        if len(left) > 10:
            left.append(model)

    found = stays(load, first=2, loads=42)
    left.clear()
    assert found[0].startswith("64 of 80 weights of 40 dropped models live, held by ")
    for what in ("classes of modules grew by 40", "accelerate_tts.patching.class_swap._patched grew by 40",
                 "finalizers grew by ", "objects of class Linear grew by 32"):  # fmt: skip
        assert any(one.startswith(what) for one in found), (what, found)
