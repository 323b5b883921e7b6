"""Fixtures shared by all tests. Each test gets a process whose optimizer, hooks and switch are as after import."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from packaging.version import Version

from accelerate_tts import events, settings
from accelerate_tts.device import flags
from accelerate_tts.device.usage import Usage
from accelerate_tts.kernels import decoder_block
from accelerate_tts.optimizer import replace_performance_optimizer
from accelerate_tts.stages.compile.inductor import compiled_by
from accelerate_tts.tuning import capture
from accelerate_tts.tuning.policy import TuningPolicy, current_policy, tuning_policy
from accelerate_tts.tuning.timing import compare_speed
from doubles import is_faster

# The machine that runs the tests must not decide what the settings are. Which kernels it runs may be chosen.
for variable in [name for name in os.environ if name.startswith(("ACCELERATE_TTS_", "TRANSLATOR_"))]:
    if variable != "ACCELERATE_TTS_KERNELS":
        del os.environ[variable]
# A warm pack of an earlier run would take the place of the tuning that a test is about.
os.environ["ACCELERATE_TTS_PACK"] = "0"
# In processes of its own a test meets the machine as it is: nobody waits there for others to be done.
os.environ["ACCELERATE_TTS_TUNE_PATIENCE"] = os.environ["ACCELERATE_TTS_RETUNE"] = "0"


class QuietMachine:
    """A machine that nobody else uses."""

    def usage(self) -> Usage:
        return Usage(time.perf_counter(), 0.0)

    def probe(self) -> float:
        return 1.0

    def sleep(self, seconds: float) -> None:
        pass


Decide = Callable[..., TuningPolicy]


# Processes that tests start import the wheel, too, and not this folder, which has no kernels.
os.environ.setdefault("PYTHONSAFEPATH", "1")


@pytest.fixture(scope="session", autouse=sys.version_info < (3, 11))
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Python 3.10 knows no PYTHONSAFEPATH, and its processes import from the present folder."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(autouse=True)
def decide() -> Iterator[Decide]:
    """Change the policy of this test's tunings. At first the machine counts as quiet."""
    with ExitStack() as scopes:

        def changed(**changes: object) -> TuningPolicy:
            return scopes.enter_context(tuning_policy(replace(current_policy(), **changes)))  # type: ignore[arg-type]

        changed(machine=QuietMachine)
        yield changed


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """No optimizer yet, nothing logged yet, switched on; at the end every flag and variable is put back."""
    before, held = dict(os.environ), flags.held()
    another = replace_performance_optimizer(None)
    with events.isolated():
        yield
    made = replace_performance_optimizer(another)
    if made is not None:
        made.close()
    settings.set_active(True)
    assert not settings.is_testing(), "a test left a testing() scope open"
    if flags.held() - held:
        gc.collect()  # what a tuning holds is let go with its model, and that may be a part of a cycle
    left = flags.held() - held
    assert not left, f"a test left an optimizer open, which holds {sorted(flag.name for flag in left)}"
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Skip the garbage collection of each load, which takes a second after the imports of other tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seen() -> Iterator[list[events.Event]]:
    """The events of the test, in order."""
    found: list[events.Event] = []
    remove = events.add_hook(found.append)
    yield found
    remove()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: for small tensors a team of threads only waits for its slowest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def blocks_a_call(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of blocks that the calls of the decoders' kernel were for."""
    found: list[int] = []
    kernel = decoder_block.decoder_blocks()

    def counted(blocks: Any, tokens: Any, count: int, threads: int) -> None:
        found.append(count)
        kernel(blocks, tokens, count, threads)

    monkeypatch.setattr(decoder_block, "decoder_blocks", lambda: counted)
    return found


Compiler = Callable[..., object]


@pytest.fixture
def compile_by() -> Iterator[Callable[[Compiler], None]]:
    """Has graphs compiled by something else than inductor for the rest of a test."""
    with ExitStack() as scopes:
        yield lambda compiler: scopes.enter_context(compiled_by(compiler))


def as_traced(graph: object, _inputs: object, **_options: object) -> object:
    """The cheapest compiler: graphs run as dynamo traced them."""
    return graph.forward  # type: ignore[attr-defined]


@pytest.fixture
def uncompiled(compile_by: Callable[[Compiler], None]) -> None:
    """Graphs run as dynamo traced them, without inductor."""
    compile_by(as_traced)


# --- stand-ins for machines -------------------------------------------------------------------------------------------


@pytest.fixture
def bf16_is_faster(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """A machine (a stand-in) that computes in bf16, and on which every stage pays off."""
    decide(compare=is_faster, looks=False, unworthy=lambda *_given: None)
    monkeypatch.setattr("accelerate_tts.device.half_dtypes.half_dtypes", lambda _device: (torch.bfloat16,))


class SteadyClock:
    """Stands in for the module `time`: it goes on when somebody sleeps, and by a microsecond when it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0)  # whoever interrupts it is another thread


@pytest.fixture
def steady_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, decide: Any) -> SteadyClock:
    """Give the engine and the test's module a clock on which only sleeping takes time; load decides no verdict."""
    clock = SteadyClock()
    decide(clock=clock.perf_counter, compare=partial(compare_speed, clock=clock.perf_counter))
    for module in (capture, request.module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="session")
def layered_caches() -> None:
    """Skips where caches have no layers: there the fused blocks grow them by themselves, which test_pairs.py shows."""
    transformers = pytest.importorskip("transformers")
    if Version(transformers.__version__) < Version("4.54"):  # by number: a release that renames them must fail
        pytest.skip("caches of this release have no layers (transformers before 4.54): these stages decline there")
