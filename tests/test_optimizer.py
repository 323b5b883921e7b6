"""The contract of `PerformanceOptimizer`, row by row. Absent hardware is stood in for, and each test says so."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from accelerate_tts import (
    Event,
    PerformanceOptimizer,
    Settings,
    SettingsError,
    WarmupError,
    add_hook,
    create_inference_context,
    get_performance_optimizer,
    optimized_model,
    receipt_of,
)
from accelerate_tts.device import detect
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.errors import PackError
from accelerate_tts.events import NotApplied, Warmed, WarmupFailed
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.patching.class_swap import ClassSwap, subclass_with
from accelerate_tts.plan import Part
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.tuning.registry import TuningMap
from doubles import Stage, pays_off

GIB = 1024**3


@pytest.fixture
def optimizer():
    made = PerformanceOptimizer(Settings())
    yield made
    made.close()


def test_one_for_the_whole_process() -> None:
    found: list[PerformanceOptimizer] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.append(get_performance_optimizer())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(optimizer) for optimizer in found}) == 1


def test_initialize_returns_a_device_and_is_idempotent(optimizer: PerformanceOptimizer) -> None:
    device = optimizer.initialize()
    assert isinstance(device, torch.device)
    assert device == optimizer.initialize()
    torch.zeros(1, device=device)


def test_a_bad_variable_fails_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLATOR_COMPILE_MODE", "turbo")
    with pytest.raises(SettingsError, match="TRANSLATOR_COMPILE_MODE='turbo'"):
        get_performance_optimizer()


@pytest.mark.parametrize(
    ("form", "ok"),
    [
        (torch.ones(1, 4), True),
        ((torch.ones(1, 4),), True),
        ({"input": torch.ones(1, 4)}, True),
        (lambda model: model(torch.ones(2, 4)), True),
        ([torch.ones(1, 4), torch.ones(3, 4)], True),
        (torch.ones(1, 5), False),
        ({"wrong": torch.ones(1, 4)}, False),
    ],
)
def test_warmup_model(optimizer: PerformanceOptimizer, seen: list[Event], form: Any, ok: bool) -> None:
    inside: list[bool] = []
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert optimizer.warmup_model(model, form) is ok
    assert torch.equal(before, torch.get_rng_state())
    assert all(inside)
    assert bool(inside) is ok
    assert any(isinstance(event, Warmed if ok else WarmupFailed) for event in seen)


def test_warmup_model_refuses_what_means_nothing(optimizer: PerformanceOptimizer) -> None:
    with pytest.raises(WarmupError, match="warmup=3"):
        optimizer.warmup_model(nn.Linear(1, 1), 3)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (DeviceInfo("cuda", "stand-in", 24 * GIB), 4),
        (DeviceInfo("cuda", "stand-in", 16 * GIB + 1), 4),
        (DeviceInfo("cuda", "stand-in", 16 * GIB), 2),
        (DeviceInfo("cuda", "stand-in", 12 * GIB), 2),
        (DeviceInfo("cuda", "stand-in", 8 * GIB), 1),
        (DeviceInfo("rocm", "stand-in", 64 * GIB), 4),
        (DeviceInfo("mps", "stand-in"), 2),
        (DeviceInfo("cpu", "stand-in"), 1),
        (DeviceInfo("xpu", "stand-in", 16 * GIB), 3),
    ],
)
def test_batch_size_table(
    optimizer: PerformanceOptimizer, device: DeviceInfo, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-in: the detected device is given, for hardware that is not here."""
    monkeypatch.setattr(detect, "detect", lambda _wanted: device)
    assert optimizer.get_optimal_batch_size(default=3) == expected


def test_batch_size_by_free_memory(optimizer: PerformanceOptimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a machine with 10 GiB free."""
    monkeypatch.setattr("accelerate_tts.device.memory.free_bytes", lambda _device: 10 * GIB)
    assert optimizer.get_optimal_batch_size(item_bytes=GIB) == 8
    assert optimizer.get_optimal_batch_size(item_bytes=100 * GIB) == 1
    for bad in (0, -1, True, 1.5):
        with pytest.raises(SettingsError, match="item_bytes="):
            optimizer.get_optimal_batch_size(item_bytes=bad)  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="default="):
            optimizer.get_optimal_batch_size(default=bad)  # type: ignore[arg-type]


def test_an_items_bytes_are_measured(optimizer: PerformanceOptimizer) -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(200 * 1024 * 1024 // 4).sum() + x  # 200 MiB, touched

    measured = optimizer.measure_item_bytes(Greedy(), torch.ones(1))
    if measured is None:  # no peak that can be reset: not Linux
        return
    assert 150 * 1024**2 < measured < 500 * 1024**2
    assert optimizer.get_optimal_batch_size(item_bytes=measured) >= 1


def test_inference_context(optimizer: PerformanceOptimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (optimizer.get_inference_context, create_inference_context):
        with make():
            assert torch.is_inference_mode_enabled()
        assert not torch.is_inference_mode_enabled()
    from accelerate_tts.runtime import inference_mode

    # Stand-in for a Python without torch: its import fails.
    inference_mode.mode_factory.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert isinstance(create_inference_context(), nullcontext)
    monkeypatch.undo()
    inference_mode.mode_factory.cache_clear()


def test_cleanup_never_raises(
    optimizer: PerformanceOptimizer, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer.cleanup_memory()
    optimizer.cleanup_memory(force=True)
    assert not [event for event in seen if event.degraded]
    optimizer.close()
    device = DeviceInfo("cuda", "stand-in", GIB)  # every driver call raises here
    monkeypatch.setattr(detect, "detect", lambda _wanted: device)
    optimizer.cleanup_memory()
    optimizer.cleanup_memory(force=True)
    assert [event for event in seen if event.degraded]


def test_cleanup_touches_nothing_in_use(optimizer: PerformanceOptimizer) -> None:
    model = nn.Linear(64, 64)
    expected = model(torch.ones(1, 64))
    stop = threading.Event()
    wrong: list[float] = []

    def call() -> None:
        while not stop.is_set():
            difference = (model(torch.ones(1, 64)) - expected).abs().max().item()
            if difference:
                wrong.append(difference)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        optimizer.cleanup_memory(force=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_receipts_do_not_keep_objects_alive() -> None:
    model = optimized_model(warmup=torch.ones(1, 4))(lambda: nn.Linear(4, 4))()
    assert receipt_of(model) is not None
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert receipt_of(SimpleNamespace()) is None
    assert receipt_of((1, 2)) is None


def _tuned_by_a_swap(monkeypatch: pytest.MonkeyPatch, decide: Any, model: nn.Module) -> list[weakref.ref[Any]]:
    """Tune a model by one change of its class; a reference to the change."""
    made: list[weakref.ref[Any]] = []

    class Copies(BaseStage):
        name = "copies"

        def applies(self, part: Part) -> str | None:
            return None

        def prepare(self, part: Part) -> BaseChange:
            change = ClassSwap([part.module], lambda module: subclass_with(type(module), type(module).forward))
            made.append(weakref.ref(change))
            return change

    decide(compare=pays_off, looks=False)  # what is kept must not hang on this machine's noise
    monkeypatch.setattr("accelerate_tts.stages.catalogue.default_stages", lambda *_: (Copies(),))
    monkeypatch.setenv("ACCELERATE_TTS_PACK", "0")
    tuned = optimized_model(warmup=torch.ones(1, 4))(lambda: model)()
    assert [stage.stage for stage in receipt_of(tuned).kept] == ["copies"]  # type: ignore[union-attr]
    return made


def test_undo_frees_what_tuning_made(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """Undoing is the documented cure for memory: copies of weights must go with it, and no trace stay on the model."""
    model = nn.Linear(4, 4).eval()
    before = dict(vars(model))
    made = _tuned_by_a_swap(monkeypatch, decide, model)
    assert vars(model) != before
    assert get_performance_optimizer().undo(model)
    gc.collect()
    assert [reference() for reference in made] == [None]
    assert vars(model) == before
    assert type(model) is nn.Linear


@pytest.mark.parametrize("during", ["retire", "retry", "nothing"])
def test_untouched_goes_by_what_the_guard_says(monkeypatch: pytest.MonkeyPatch, during: str, decide: Any) -> None:
    """A tuning that the guard has undone stays undone after the scope; a retry inside it switches nothing on."""
    model = nn.Linear(4, 4).eval()
    made = _tuned_by_a_swap(monkeypatch, decide, model)
    guard = guards.guard_of(model)
    assert guard is not None
    with get_performance_optimizer().untouched(model) as changed:
        assert changed
        assert type(model) is nn.Linear
        if during == "retire":
            guard.retire()
        elif during == "retry":
            with guard.untouched():
                assert type(model) is nn.Linear
            assert type(model) is nn.Linear
    assert (type(model) is nn.Linear) == (during == "retire")
    with get_performance_optimizer().untouched(model) as changed:
        assert changed == (during != "retire")
    assert made


def test_untouched_switches_changes_of_the_process_off_too(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """They would make the untouched object faster as well, and a comparison of the two would show no gain."""
    decide(compare=pays_off, looks=False)
    stages = [Stage("process stage", process=True, threads=1), Stage("part stage", copies=1)]
    monkeypatch.setattr("accelerate_tts.stages.catalogue.default_stages", lambda *_: stages)
    model: Any = nn.Linear(4, 4).eval()
    model.threads, model.copies = 2, 0
    optimized_model(warmup=torch.zeros(1, 4))(lambda: model)()
    assert guards.guard_of(model) is not None
    assert (model.threads, model.copies) == (1, 1)
    with get_performance_optimizer().untouched(model):
        assert (model.threads, model.copies) == (2, 0)
    assert (model.threads, model.copies) == (1, 1)


@pytest.mark.parametrize("path", [5, None, "", "a\0b", object(), b"packs"])
def test_pack_files_are_named_by_paths(optimizer: PerformanceOptimizer, path: Any) -> None:
    for ask in (optimizer.export_packs, optimizer.load_packs):
        with pytest.raises(PackError, match="must be the path of a file"):
            ask(path)


@pytest.mark.parametrize("number", [-(10**5000), 0, True, 1.5, float("nan")], ids=["huge", "0", "True", "1.5", "nan"])
def test_numbers_that_are_none(optimizer: PerformanceOptimizer, number: Any) -> None:
    for given in ({"default": number}, {"item_bytes": number}):
        with pytest.raises(SettingsError, match=next(iter(given))):
            optimizer.get_optimal_batch_size(**given)


def test_a_model_that_is_not_on_the_best_device_is_tuned_for_the_one_it_is_on(seen: list[Event]) -> None:
    """Left on the CPU beside a GPU: a GPU's stages would be tried on it, and its clock would be the GPU's."""
    gpu = replace(detect.spec_of("cuda"), probe=lambda: DeviceInfo("cuda", "stand-in", 24 * GIB))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).eval()
    with detect.SPECS.scope(cuda=gpu):
        optimized_model(warmup=lambda m: m(torch.ones(2, 8)), tune_seconds=1.0)(lambda: model)()
        assert get_performance_optimizer().initialize().type == "cuda"
    receipt = receipt_of(model)
    assert receipt is not None
    assert receipt.device.startswith("cpu")
    assert "captured decode step" not in {stage.stage for stage in receipt.stages}
    assert [e.reason for e in seen if isinstance(e, NotApplied)] == ["its weights are on cpu, so it is tuned for that"]


def ends(work: Callable[[], object]) -> bool:
    """Run some work in a thread; False if it does not end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def test_a_hook_may_use_the_optimizer_at_the_first_event_of_the_process(
    monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TREADS", "4")
    found: list[object] = []
    add_hook(lambda _event: found.append(get_performance_optimizer()))
    assert ends(get_performance_optimizer)
    assert found == [get_performance_optimizer()]
    assert "there is no such setting" in str(seen[0])


def test_an_object_that_is_freed_while_others_are_undone_undoes_itself() -> None:
    """Its destructor runs wherever its last reference is dropped, such as in our own loop over objects."""
    tunings, tuning = TuningMap(), cast("Any", Freed())

    class Backend:
        @property
        def __dict__(self) -> Any:  # stands in for the destructor
            tunings.forget(tuning)
            return {}

    backend = Backend()
    assert ends(lambda: tunings.put(backend, tuning))
    assert ends(lambda: tunings.forget(tuning))
    assert tunings.get(backend) is None


class Freed:
    """Something that can be referred to weakly."""
