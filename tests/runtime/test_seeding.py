"""Random numbers beside a tuning: other threads never get repeated ones, and never disturb a comparison."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accelerate_tts import optimized_model, receipt_of
from accelerate_tts.runtime.drawing import drawing
from accelerate_tts.runtime.seeding import seeded, without_collection
from doubles import ALONE, run_alone

SOURCES: dict[str, Callable[[], float]] = {
    "python": lambda: random.random(),
    "numpy": lambda: float(np.random.random_sample()),  # noqa: NPY002 - the generator of the process
    "torch": lambda: float(torch.rand((), dtype=torch.float64)),
}


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")


def seed_all(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


class Deterministic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1)), nn.Tanh())

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.net(wave)


class Sampling(Deterministic):
    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.net(wave + torch.randn_like(wave))


class Drawing(Deterministic):
    """Draws as transformers' VITS does, without any use of it."""

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        np.random.uniform(0, 1)  # noqa: NPY002
        random.randint(0, 3)
        return self.net(wave)


@contextmanager
def drawing_thread(draw: Callable[[], float]) -> Iterator[list[float]]:
    """A thread of the service, which draws all the time."""
    found: list[float] = []
    ends = threading.Event()

    def work() -> None:
        while not ends.wait(0.0005):
            found.append(draw())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()


@pytest.mark.parametrize("source", SOURCES)
def test_a_load_gives_another_thread_the_numbers_that_it_would_have_had(source: str) -> None:
    model = Deterministic().eval()

    @optimized_model(warmup=torch.ones(1, 8, 32))
    def load() -> nn.Module:
        return model

    seed_all(7)
    with drawing_thread(SOURCES[source]) as found:
        load()
    seed_all(7)
    assert found == [SOURCES[source]() for _ in found]
    assert len(found) > 10


def test_other_generators_than_the_model_s_own_are_left_alone() -> None:
    model = Sampling().eval()

    @optimized_model(warmup=torch.ones(1, 8, 32))
    def load() -> nn.Module:
        return model

    seed_all(7)
    with drawing_thread(SOURCES["python"]) as found:
        load()
    seed_all(7)
    assert found == [SOURCES["python"]() for _ in found]


@pytest.fixture(params=["alone", "beside a thread that draws nothing"])
def company(request: pytest.FixtureRequest) -> Iterator[None]:
    ends = threading.Event()
    idle = threading.Thread(target=ends.wait, daemon=True)
    if request.param != "alone":
        idle.start()
    yield
    ends.set()
    if request.param != "alone":
        idle.join()


def test_a_load_moves_no_generator() -> None:
    """Run in a process of its own: beside threads of other tests that draw, a warm-up moves the generators."""
    run_alone(__file__, "test_a_load_moves_no_generator_of_its_own_thread")


@pytest.mark.skipif(ALONE not in os.environ, reason="it is run in a process of its own, by the test before it")
@pytest.mark.usefixtures("company")
@pytest.mark.parametrize("kind", [Deterministic, Sampling, Drawing])
def test_a_load_moves_no_generator_of_its_own_thread(kind: type[nn.Module]) -> None:
    model = kind().eval()

    @optimized_model(warmup=torch.ones(1, 8, 32))
    def load() -> nn.Module:
        return model

    seed_all(7)
    first = {name: draw() for name, draw in SOURCES.items()}
    seed_all(7)
    load()
    assert {name: draw() for name, draw in SOURCES.items()} == first


def test_a_comparison_that_another_thread_s_draws_disturbed_is_made_again() -> None:
    """The model draws, and so does somebody else, now and then: each disturbed comparison must be noticed."""
    model = Sampling().eval()
    passes = iter(range(10**6))

    @contextmanager
    def other() -> Iterator[None]:  # a thread that is there for all of the load, and draws when it is told to
        asked, done, ends = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            while not ends.is_set():
                if asked.wait(0.01):
                    asked.clear()
                    torch.rand(1)
                    done.set()

        def ask(_module: nn.Module, _given: Any) -> None:
            if next(passes) % 3 == 2:
                done.clear()
                asked.set()
                assert done.wait(10)

        handle = model.register_forward_pre_hook(ask)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()
            handle.remove()

    @optimized_model(warmup=torch.ones(1, 8, 32))
    def load() -> nn.Module:
        return model

    with other():
        load()
    receipt = receipt_of(model)
    assert receipt is not None
    verdicts = [result.verdict for result in receipt.stages]
    assert verdicts
    assert not [one for one in verdicts if one.startswith(("rejected: error", "undone", "not compared"))], receipt
    assert not [note for note in receipt.notes if "not the whole" in note], receipt


def test_a_model_whose_numbers_are_never_its_own_is_left_and_says_why() -> None:
    model = Sampling().eval()

    def draw_elsewhere(_module: nn.Module, _given: Any) -> None:
        thread = threading.Thread(target=lambda: torch.rand(random.SystemRandom().randint(1, 10**4)))
        thread.start()
        thread.join()

    def sample(_module: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (given[0] + torch.randn_like(given[0]),)

    for module in (model, model.net, model.net[0]):
        module.register_forward_pre_hook(sample)
        module.register_forward_pre_hook(draw_elsewhere)

    @optimized_model(warmup=torch.ones(1, 8, 32))
    def load() -> nn.Module:
        return model

    with drawing_thread(lambda: 0.0):  # so that this is not the only thread
        load()
    receipt = receipt_of(model)
    assert receipt is not None
    assert not receipt.kept
    assert "other threads draw random numbers" in str(receipt)


def test_windows_of_two_threads_leave_the_generators_as_they_were() -> None:
    """The first to open is the first to close: what it found must come back all the same."""
    opened, close = threading.Event(), threading.Event()

    def first() -> None:
        with seeded("cpu"):
            opened.set()
            close.wait(10)

    seed_all(7)
    wanted = {name: draw() for name, draw in SOURCES.items()}
    seed_all(7)
    thread = threading.Thread(target=first)
    thread.start()
    opened.wait(10)
    with seeded("cpu"):
        close.set()
        thread.join()
        torch.rand(3)
    assert {name: draw() for name, draw in SOURCES.items()} == wanted


def test_who_draws_is_told_by_thread() -> None:
    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: [draw() for draw in SOURCES.values()])
        thread.start()
        thread.join()

    with drawing() as found:
        elsewhere()
        torch.rand(3, generator=torch.Generator())
        random.Random(0).random()
    assert found == set()
    for name, draw in SOURCES.items():
        with drawing() as found:
            draw()
        assert found == {name}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_while_a_state_is_read_collects_garbage() -> None:
    reading, done = threading.Event(), threading.Event()

    def get() -> None:
        reading.set()
        done.wait(30)

    thread = threading.Thread(target=without_collection, args=(get,))
    thread.start()
    assert reading.wait(30)
    assert not gc.isenabled()
    child = os.fork()
    if child == 0:
        os._exit(0 if gc.isenabled() else 3)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


DEADLOCK = """
import faulthandler, gc, threading, torch
from accelerate_tts.runtime.rng import random_states

class Knot:
    def __init__(self):
        self.me, self.tensors = self, [torch.ones(1) for _ in range(5)]

def work():
    for _ in range(500):
        Knot(), Knot(), Knot()
        random_states((torch.Generator(), generator))

faulthandler.dump_traceback_later(120, exit=True)
generator = torch.Generator()
gc.set_threshold(5)
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(gc.isenabled())
"""


def test_threads_that_save_states_do_not_wait_for_each_other_and_the_collector() -> None:
    """A collection while torch makes the tensor for a generator's state once ended all calls of a process."""
    done = subprocess.run([sys.executable, "-c", DEADLOCK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]
