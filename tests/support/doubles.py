"""Doubles that several test files share: a stage, verdicts on its speed, and small modules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.optimizer import PerformanceOptimizer, replace_performance_optimizer
from accelerate_tts.plan import Part
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.tuning.findings import Tuning
from accelerate_tts.tuning.timing import Timing
from accelerate_tts.tuning.tune import find

if TYPE_CHECKING:
    import pytest

TWICE_AS_FAST = Timing(before=2.0, after=1.0, ratio=2.0, low=2.0, high=2.0, pairs=5)


def clock_of(offset: list[float]) -> Callable[[], float]:
    """A clock that goes on by a microsecond when it is read, and otherwise as a test moves its one item."""
    looks = count()
    return lambda: 1e-6 * next(looks) + offset[0]


def pays_off(run: Callable[[], object], before: Any, after: Any, *_: object, **__: object) -> Timing:
    """Runs the work once in each state, and says that the second one is twice as fast."""
    for switch in (before, after):
        switch()
        run()
    return TWICE_AS_FAST


def is_faster(*_: object, **__: object) -> Timing:
    """Says that the second state is twice as fast, and runs nothing."""
    return TWICE_AS_FAST


def begin_process(optimizer: PerformanceOptimizer | None = None) -> None:
    """As at the start of a process: the present optimizer is closed, and another one is made when it is needed.

    Args:
        optimizer: That of the process, instead of one that is made from the environment.
    """
    before = replace_performance_optimizer(optimizer)
    if before is not None:
        before.close()  # or what it set of this process would stay so


ALONE = "TESTED_ALONE"  # settings of ours are cleared before a test


def run_alone(file: str, name: str, *, skips: bool = False) -> None:
    """Run a test in a process of its own, with `ALONE` set. It must pass; it is skipped everywhere else.

    Args:
        file: Its file.
        name: Its name.
        skips: Some of its parameters may be skipped, such as stages that this processor does not have.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", f"{file}::{name}"],
        capture_output=True, text=True, check=False, cwd=Path(file).parent, env={**os.environ, ALONE: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* passed", done.stdout)
    assert skips or "skipped" not in done.stdout


def given_to(path: Path, user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a file or folder belong to another user, as far as `Path.stat` tells. Only root could give it away."""
    stat = Path.stat

    def told(self: Path, **options: Any) -> os.stat_result:
        found = stat(self, **options)
        if self != path:
            return found
        return os.stat_result((*found[:4], user, *found[5:10]))

    monkeypatch.setattr(Path, "stat", told)


def tune(*given: Any, **named: Any) -> Tuning:
    """Tune a loaded object as `find` does; return its receipt and the changes in force."""
    return find(*given, **named).tuning()


class Stage(BaseStage):
    """Sets attributes of a part's module while it is on, and does what a test tells it at each point of its life.

    Args:
        name: Its name.
        faults: What is called at "applies", "prepare", "on", "run" (a run of the module while it is on), "off" and
            "end_warmup".
        group: The group of alternatives that it belongs to.
        graphs: Number of graphs that it claims to have compiled.
        process: True for a change of the process.
        attributes: What is set. They may be changed later; a `seconds` of 0.0, say, is a stage that is worth keeping.

    Attributes:
        obstacle: What `applies` answers where the module has these attributes.
        prepared: For each time it was prepared, the part's name, and the module's `seconds`.
        sealed: True after a warm-up that it survived.
    """

    least_share = 0.0

    def __init__(
        self, name: str = "test stage", faults: dict[str, Callable[[], object]] | None = None, *, group: str = "",
        graphs: int | None = None, process: bool = False, **attributes: Any,
    ) -> None:  # fmt: skip
        self.name = name
        self.faults = faults or {}
        self.group = group
        self.graphs = graphs
        self.process = process
        self.attributes = attributes
        self.obstacle: str | None = None
        self.prepared: list[tuple[str, Any]] = []
        self.sealed = False

    def at(self, point: str) -> None:
        self.faults.get(point, lambda: None)()

    def changes(self, module: Any) -> dict[str, Any]:
        """Return the attributes of a module that are set, as they were before."""
        del module
        return self.attributes

    def applies(self, part: Part) -> str | None:
        self.at("applies")
        has_all = all(hasattr(part.module, name) for name in self.attributes)
        return self.obstacle if has_all else "it has no such attribute"

    def prepare(self, part: Part) -> Any:
        self.prepared.append((part.name, getattr(part.module, "seconds", None)))
        self.at("prepare")
        return _Set(self, part.module)


class _Set:
    """The change of a `Stage`."""

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        self.stage = stage
        self.own = vars(module)
        self.changes = stage.changes(module)
        self.run = {"then": self.then} if "run" in stage.faults else {}
        self.before = {name: self.own.get(name, _Set) for name in {**self.changes, **self.run}}

    @property
    def graphs(self) -> int | None:
        return self.stage.graphs

    def then(self, output: Any) -> Any:
        self.stage.at("run")
        return output

    def on(self) -> None:
        self.own.update({**self.changes, **self.run})
        self.stage.at("on")

    def off(self) -> None:
        self.stage.at("off")
        for name, value in self.before.items():
            if value is _Set:  # it was the class's own
                self.own.pop(name, None)
            else:
                self.own[name] = value

    def end_warmup(self) -> None:
        self.stage.sealed = True
        self.stage.at("end_warmup")


# --- modules ----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A small speaker encoder."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 3)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.linear(wave).tanh()


class Repeats(nn.Module):
    """A graph for each number of steps: the loop is unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        for _ in range(steps):
            x = torch.tanh(self.linear(x)) + 1
        return x
