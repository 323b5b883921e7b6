"""torch.compile in place: counted, single flight, and back to the untouched module when the compiler fails."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from accelerate_tts import Event, ModelError, PerformanceOptimizer, Settings
from accelerate_tts.device.setup import unsafe_compiler
from accelerate_tts.events import FellBack, NotApplied, Recompiled
from accelerate_tts.stages.compile import inductor
from accelerate_tts.stages.compile import whole as stage

pytestmark = pytest.mark.skipif(unsafe_compiler() is not None, reason="dynamo of torch 2.6 crashes on Python 3.10")


@pytest.fixture
def optimizer():
    made = PerformanceOptimizer(Settings())
    yield made
    made.close()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 8:
            raise ValueError(f"eight features, not {x.shape[-1]}")
        return torch.tanh(self.linear(x))

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) + 1


class Whole(Small):
    """Its own way to pickle it takes all that it has."""

    def __getstate__(self) -> dict[str, object]:
        return dict(self.__dict__)


def x(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))


def test_compiled_in_place_counted_and_dynamic(optimizer: PerformanceOptimizer, seen: list[Event]) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    state = list(model.state_dict())
    with torch.inference_mode():
        reference = {rows: model(x(rows)) for rows in range(2, 12)}
    assert optimizer.compile_model(model, "small", x()) is model
    call = model._compiled_call_impl
    assert isinstance(call, stage.CompiledCall)
    assert call.graphs == 1  # for tensors made outside inference mode, and inside
    assert type(model) is Small
    assert list(model.state_dict()) == state
    with torch.inference_mode():
        for rows, expected in reference.items():
            torch.testing.assert_close(model(x(rows)), expected)
    outside = {rows: x(rows) for rows in range(20, 30)}
    with torch.inference_mode():
        for inputs in outside.values():
            model(inputs)
    assert call.graphs == 1, "a new length must not compile again"
    clone = pickle.loads(pickle.dumps(model))
    assert clone._compiled_call_impl is None
    assert copy.deepcopy(model)._compiled_call_impl is None
    assert not [event for event in seen if event.degraded]


def test_a_module_that_pickles_all_that_it_has_is_copied_untouched(
    optimizer: PerformanceOptimizer, uncompiled: None
) -> None:
    model = Whole().eval()
    optimizer.compile_model(model, "whole", x())
    assert isinstance(model._compiled_call_impl, stage.CompiledCall)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone._compiled_call_impl is None
        assert torch.equal(clone(x()), model(x()))


def test_one_graph_serves_every_mode_and_both_kinds_of_tensors(optimizer: PerformanceOptimizer) -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor, more: list[torch.Tensor]) -> torch.Tensor:
            x.add_(1.0)
            return x * more[0]

    model = optimizer.compile_model(Writes().eval(), "writes", None)
    for outer in (torch.no_grad, torch.inference_mode):
        with outer():
            first, factor = torch.ones(3, 4), torch.full((4,), 2.0)
        for inner in (torch.no_grad, torch.inference_mode):
            if outer is torch.inference_mode and inner is torch.no_grad:
                with pytest.raises(RuntimeError, match="Inplace update to inference tensor"), inner():
                    Writes()(first, [factor])
                continue  # torch forbids it to the module itself
            before = first.clone()
            with inner():
                y = model(first, [factor])
            assert torch.equal(first, before + 1), "what is written into an input is the caller's"
            assert torch.equal(y, first * 2)
    assert model._compiled_call_impl.graphs == 1


def test_a_recompile_in_service_is_an_event(optimizer: PerformanceOptimizer, seen: list[Event]) -> None:
    model = optimizer.compile_model(Small().eval(), "small", x())
    model(x())  # with gradients, unlike the warm-up: a guard of dynamo's
    events = [event for event in seen if isinstance(event, Recompiled)]
    assert [event.graphs for event in events] == [2]
    assert "(3, 8)" in events[0].shapes


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
def test_classes_of_torch_itself_compile_too(optimizer: PerformanceOptimizer, make: Callable[[], nn.Module]) -> None:
    model = optimizer.compile_model(make().eval(), "plain", x())
    call = model._compiled_call_impl
    assert isinstance(call, stage.CompiledCall)
    assert call.graphs == 1


def test_zero_graphs_is_dropped(optimizer: PerformanceOptimizer, seen: list[Event]) -> None:
    class NeverCalled(Small):
        pass

    model = NeverCalled()
    optimizer.compile_model(model, "driven by generate()", lambda module: module.generate(x()))
    assert model._compiled_call_impl is None
    assert any(isinstance(event, FellBack) and "no graph" in event.reason for event in seen)


WITHOUT_COMPILER = """
import logging, torch
from torch import nn
from accelerate_tts import PerformanceOptimizer, add_hook
from accelerate_tts.events import FellBack
events = []
add_hook(events.append)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
x = torch.randn(3, 8)
with torch.inference_mode():
    reference = model(x)
PerformanceOptimizer().compile_model(model, "small")
assert model._compiled_call_impl is not None  # wrapping succeeds; the failure shows at the first call
with torch.inference_mode():
    assert torch.equal(model(x), reference)
    assert torch.equal(model(x), reference)
assert model._compiled_call_impl is None
fallen = [event for event in events if isinstance(event, FellBack)]
assert len(fallen) == 1, fallen
print(fallen[0])
"""


def test_without_a_compiler_the_untouched_model_answers(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "small: torch.compile is off" in done.stdout
    assert "ompiler" in done.stdout


def test_the_users_error_passes_and_compilation_stays(optimizer: PerformanceOptimizer, seen: list[Event]) -> None:
    model = optimizer.compile_model(Small().eval(), "small", x())
    with torch.inference_mode():
        with pytest.raises(ValueError, match="eight features, not 5"):
            model(torch.zeros(3, 5))
        model(x())
    assert model._compiled_call_impl is not None
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_a_forward_that_calls_its_own_module_falls_back_without_hanging(seen: list[Event]) -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    class Chunked(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self(part) for part in x.split(1)]) if len(x) > 1 else super().forward(x)

    def failing(*_args: object, **_kwargs: object) -> torch.Tensor:
        raise FailOnRecompileLimitHit("limit")

    model = Chunked().eval()
    expected = model(x())
    call = stage.CompiledCall(model, "chunked", "default", compiler=lambda *_: failing)
    call.on()
    torch.testing.assert_close(model(x()), expected)
    assert model._compiled_call_impl is None
    assert [event.reason for event in seen if isinstance(event, FellBack)] == ["FailOnRecompileLimitHit: limit"]


def test_simultaneous_first_calls_compile_once(optimizer: PerformanceOptimizer) -> None:
    model = optimizer.compile_model(Small().eval(), "small")
    call = model._compiled_call_impl
    barrier = threading.Barrier(4)
    results: list[torch.Tensor] = []

    def work() -> None:
        barrier.wait()
        with torch.inference_mode():
            results.append(model(x()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(call, stage.CompiledCall)
    assert call.graphs == 1
    for result in results:  # upstream's forward is among them: while one thread compiles, torch says so on every thread
        torch.testing.assert_close(result, results[0])


def test_many_parts_do_not_share_dynamos_limit(optimizer: PerformanceOptimizer, uncompiled: None) -> None:
    """dynamo stops compiling a code object after 8 versions; each part has its own."""
    calls = []
    for number in range(12):
        model = optimizer.compile_model(nn.Linear(8, 8 + number).eval(), f"linear {number}", x())
        calls.append(model._compiled_call_impl)
    assert [call.graphs for call in calls] == [1] * 12


def test_not_compiled_where_switched_off_or_on_mps(seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    off = PerformanceOptimizer(Settings(compile=False))
    assert off.compile_model(Small(), "small", x())._compiled_call_impl is None
    off.close()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # stand-in: no Apple GPU here
    mps = PerformanceOptimizer(Settings())
    assert mps.compile_model(Small(), "small")._compiled_call_impl is None
    mps.close()
    assert len([event for event in seen if isinstance(event, NotApplied) and "compile" in event.what]) == 2


def test_only_modules_can_be_compiled(optimizer: PerformanceOptimizer) -> None:
    with pytest.raises(ModelError, match="'pipe', got a dict"):
        optimizer.compile_model({}, "pipe")


def test_outputs_of_cuda_graphs_are_cloned() -> None:
    """The clone that a CUDA graph's output needs, on whatever holds tensors."""
    out = {"a": (torch.ones(2), 3)}
    cloned = inductor.clone_outputs(out)
    assert cloned["a"][1] == 3
    assert torch.equal(cloned["a"][0], out["a"][0])
    assert cloned["a"][0].data_ptr() != out["a"][0].data_ptr()
