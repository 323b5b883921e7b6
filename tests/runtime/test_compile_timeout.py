"""A C++ compiler that never returns costs the stage that called it, and nothing else: no load, no other process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

from accelerate_tts import Event
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.errors import TimeLimitError
from accelerate_tts.events import FellBack
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.runtime import compile_timeout
from accelerate_tts.runtime.time_limit import WatchdogPolicy, watchdog_policy
from accelerate_tts.stages.compile.whole import CompileStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import tune

X = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
WAIT = 60.0  # seconds after which a test gives up

posix = pytest.mark.skipif(sys.platform == "win32", reason="the compiler that hangs is a shell script")


@pytest.fixture(scope="module", autouse=True)
def processor_known() -> None:
    """inductor finds out by compiling, once a process, and would take a killed compiler for an answer."""
    pick_vec_isa()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with watchdog_policy(WatchdogPolicy(again=0.2)):
        yield


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A compiler that answers what it is, and never comes to an end of what it is given to compile."""
    script = tmp_path / "hanging-g++"
    script.write_text(
        f"#!/bin/sh\ncase \"$*\" in *-version*) echo 'g++ (GCC) 12.2.0'; exit 0;; esac\necho $$ >> {tmp_path}/pids\n"
        "sleep 1000\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def time_flies(hanging: Path) -> Iterator[None]:
    """Let time limits expire as soon as a compiler hangs, since tracing takes longer on a busy machine."""
    ended = threading.Event()

    def wait() -> None:
        while not ((hanging.parent / "pids").exists() and waits()) and not ended.wait(0.05):
            pass
        with watchdog_policy(WatchdogPolicy(again=0.2, clock=lambda: time.monotonic() + 10 * WAIT)):
            ended.wait()

    waiting = threading.Thread(target=wait)
    waiting.start()
    yield
    ended.set()
    waiting.join()


@pytest.fixture
def own_child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that the user's program has started, and waits for in a thread."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    waiting = threading.Thread(target=child.wait)
    waiting.start()
    yield child
    child.kill()
    waiting.join()


class Model(nn.Module):
    """A function that differs at each use, so that inductor has no cached kernel of it."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        Model.count += 1
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(256, 256))
        self.offset = float(Model.count) + time.time() % 1
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x)) + self.offset


def waits() -> bool:
    """Check that a thread waits for a compiler."""
    return any(compile_timeout.on_stack(frame)[1] is not None for frame in sys._current_frames().values())


def state(model: nn.Module) -> list[object]:
    return [(type(m), dict(vars(m)), list(m._forward_hooks)) for m in model.modules()]


def sleepers(tmp_path: Path) -> list[psutil.Process]:
    """Return the compiler's processes that are still alive."""
    started = [int(line) for line in (tmp_path / "pids").read_text().split()]
    return [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]


@posix
@pytest.mark.usefixtures("time_flies")
@pytest.mark.parametrize("threads", [1, 2], ids=["in this thread", "in inductor's pool of threads"])
def test_a_compiler_that_never_returns_costs_its_stage(
    threads: int, hanging: Path, tmp_path: Path, seen: list[Event],
    own_child: subprocess.Popen[bytes],
) -> None:  # fmt: skip
    model, stage = Model(), CompileStage("default")
    stage.cost_of = lambda _: 0.0  # type: ignore[method-assign]
    with torch.no_grad():
        expected = model(X)
    before = state(model)
    plan = ModelPlan("model", (model,), (Part("model", "model", model),))
    calls = warmup_calls(X, Loaded(model), "inference")
    with config.patch({"cpp.cxx": (None, str(hanging)), "compile_threads": threads}):
        tuning = tune(plan, calls, [stage, FoldStage()], DeviceInfo("cpu", "test"), Limits(WAIT))
    failed = tuning.receipt.stages[0]
    assert not failed.kept
    assert failed.reason.startswith("stopped: over the tuning budget, interrupted; its compiler (")
    assert failed.reason.endswith("hanging-g++) did not return and was stopped")
    # The other stage may have been dropped as too slow.
    (event,) = [event for event in seen if isinstance(event, FellBack) and event.stage == stage.name]
    assert "hanging-g++" in event.reason
    tuning.undo()
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert own_child.poll() is None
    assert not sleepers(tmp_path)
    assert not list(compile_timeout.Compilers().waited_for())


@posix
@pytest.mark.usefixtures("time_flies")
def test_a_compilation_of_the_users_own_goes_on(hanging: Path, tmp_path: Path) -> None:
    """A compiler that a user's own thread waits for is left alone, whenever it was started."""
    ended = threading.Event()

    def compile_something() -> None:
        with (
            config.patch({"cpp.cxx": (None, str(hanging)), "compile_threads": 1}),
            torch.no_grad(),
            pytest.raises(torch._dynamo.exc.BackendCompilerFailed),
        ):
            torch.compile(Model(), backend="inductor")(X)
        ended.set()

    user = threading.Thread(target=compile_something)

    def work() -> None:
        user.start()
        while True:
            time.sleep(0.01)

    with pytest.raises(TimeLimitError, match="was interrupted$"):
        compile_timeout.compiling_within(WAIT, "the stage", work)
    (his,) = sleepers(tmp_path)
    assert not ended.is_set()
    for process in (*his.children(recursive=True), his):
        with suppress(psutil.NoSuchProcess):  # a shell ends by itself after its child
            process.kill()
    user.join(WAIT)
    assert ended.is_set()
