"""Set-up: what each kind of device is given, what a user has set survives, and `close()` puts everything back.

No accelerator is needed: where one is wanted, torch's own queries are replaced by stand-ins (the fixtures below say
which); every flag and variable that is then set is real.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate_tts.device import cpu, flags, setup
from accelerate_tts.device.detect import DeviceInfo, detect
from accelerate_tts.device.setup import unsafe_compiler
from accelerate_tts.errors import SettingsError
from accelerate_tts.events import Event, NotApplied, Prepared
from accelerate_tts.optimizer import PerformanceOptimizer
from accelerate_tts.settings import Settings

GIB = 1024**3
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OMP_WAIT_POLICY")
FALLBACK, RATIO = "PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
Optimizers = Callable[..., PerformanceOptimizer]
Become = Callable[[str], None]
Cores = Callable[[int], None]


def state() -> dict[str, Any]:
    """State that a set-up may change."""
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn enabled": torch.backends.cudnn.enabled,
        "threads": torch.get_num_threads(),
        **{name: os.environ.get(name) for name in (*THREAD_VARIABLES, FALLBACK, RATIO)},
    }


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No accelerator (a stand-in, for machines that have one), no variable set, no TF32, four torch threads."""
    before = state()
    for name in (*THREAD_VARIABLES, FALLBACK, RATIO):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(4)
    yield
    torch.set_float32_matmul_precision(before["matmul"])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before["cudnn tf32"], before["benchmark"]
    torch.set_num_threads(before["threads"])


@pytest.fixture
def optimizer() -> Iterator[Optimizers]:
    """Makes optimizers from settings; all are closed at the end."""
    made: list[PerformanceOptimizer] = []

    def make(**options: Any) -> PerformanceOptimizer:
        made.append(PerformanceOptimizer(Settings(**options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    """Stand-in for the number of usable cores."""

    def become(number: int) -> None:
        monkeypatch.setattr(cpu, "usable_cpus", lambda: number)

    become(64)
    return become


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch, cores: Cores) -> Become:
    """Stand-in for a device: torch's availability and property queries answer as if it were there."""
    properties = [SimpleNamespace(name=f"Test GPU {index}", total_memory=(24 + index) * GIB) for index in (0, 1)]

    def present(kind: str) -> None:
        if kind in {"cuda", "rocm"}:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
            monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
            monkeypatch.setattr(torch.version, "hip", "6.2.41134" if kind == "rocm" else None)
        elif kind == "mps":
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        elif kind == "xpu":
            monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
            monkeypatch.setattr(torch.xpu, "current_device", lambda: 1)
            monkeypatch.setattr(torch.xpu, "get_device_properties", properties.__getitem__)

    return present


# --- detection -----------------------------------------------------------------------------------------------------


def test_a_cpu_is_found_where_there_is_nothing_else() -> None:
    device = detect()
    assert (device.kind, device.type, device.total_memory) == ("cpu", "cpu", None)
    assert device.name


@pytest.mark.parametrize(
    ("kind", "torch_type", "name", "memory"),
    [
        *[(kind, "cuda", "Test GPU 1", 25 * GIB) for kind in ("cuda", "rocm")],
        *[("xpu", "xpu", "Test GPU 1", 25 * GIB), ("mps", "mps", "Apple GPU (MPS)", None)],
    ],
)
def test_each_device_is_told_apart(
    become: Become, kind: str, torch_type: str, name: str, memory: int | None, optimizer: Optimizers
) -> None:
    become(kind)
    assert detect() == DeviceInfo(kind, name, memory)  # type: ignore[arg-type] - a parameter loses the literal
    made = optimizer()
    assert made.initialize() == torch.device(torch_type)
    assert made.device.kind == kind


def test_the_best_device_is_taken(become: Become) -> None:
    for kind in ("xpu", "mps", "cuda"):  # each beats those before it
        become(kind)
        assert detect().kind == kind
    for wanted in ("xpu", "mps", "cuda", "cpu"):
        assert detect(wanted).kind == wanted


def test_a_torch_without_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a build of torch that has no `torch.xpu`."""
    monkeypatch.delattr(torch, "xpu")
    assert detect().kind == "cpu"


@pytest.mark.parametrize("wanted", ["cuda", "mps", "xpu"])
def test_a_forced_device_that_is_absent_is_named(wanted: str, optimizer: Optimizers, seen: list[Event]) -> None:
    before = state()
    made = optimizer(device=wanted)
    for _ in range(2):
        with pytest.raises(SettingsError, match=rf"device='{wanted}' is not available.*ACCELERATE_TTS_DEVICE"):
            made.initialize()
    assert state() == before
    assert seen == []


# --- what is set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("benchmark", [True, False])
def test_cuda_gets_tf32_and_autotune_unless_switched_off(
    become: Become, optimizer: Optimizers, kind: str, tf32: bool, benchmark: bool
) -> None:
    """On ROCm the flag of autotune is MIOpen's search through all that it has, which takes minutes for a new shape."""
    become(kind)
    before = state()
    made = optimizer(tf32=tf32, cudnn_benchmark=benchmark)
    made.initialize()
    inside = state()
    assert inside["matmul"] == ("high" if tf32 else before["matmul"])
    assert inside["cudnn tf32"] is tf32
    assert inside["benchmark"] is (benchmark if kind == "cuda" else before["benchmark"])
    for key in ("cudnn enabled", FALLBACK, RATIO):
        assert inside[key] == before[key]
    made.close()
    assert state() == before


@pytest.mark.parametrize(
    ("free", "allocated", "set_by_user", "share"),
    [
        (20, 0, 1.0, 10 / 25),
        (10, 12, 1.0, 17 / 25),
        (2, 20, 1.0, 22 / 25),  # little is free: all of it, and nothing of what is not
        (20, 0, 0.3, None),
    ],
)
def test_a_search_for_kernels_leaves_half_of_the_free_memory_while_tuning(
    become: Become, monkeypatch: pytest.MonkeyPatch, free: int, allocated: int, set_by_user: float, share: float | None
) -> None:
    """The allocator is a stand-in; it never ran on a device. MIOpen's search fails where the allocator refuses."""
    become("cuda")
    now = [set_by_user]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 25 * GIB))
    for what in ("reserved", "allocated"):
        monkeypatch.setattr(torch.cuda, f"memory_{what}", lambda: allocated * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", now.append)
    before = torch.backends.cudnn.benchmark
    try:
        for searches in (False, True):
            torch.backends.cudnn.benchmark = searches
            wanted = setup.tuning_flags(detect())
            with flags.hold(wanted):
                assert now[-1] == pytest.approx(share if searches and share else set_by_user)
            assert now[-1] == set_by_user
            with monkeypatch.context() as scope:
                scope.setattr(torch.version, "hip", "7.1")
                assert setup.tuning_flags(detect()) == []
    finally:
        torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_tf32_and_autotune_are_for_cuda_alone(become: Become, optimizer: Optimizers, kind: str) -> None:
    become(kind)
    before = state()
    made = optimizer(tf32=True, cudnn_benchmark=True)
    made.initialize()
    assert made.call_flags() == []
    inside = state()
    for key in ("matmul", "cudnn tf32", "benchmark"):
        assert inside[key] == before[key]
    made.close()
    assert state() == before


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("cuda", "reduce-overhead"), ("rocm", "reduce-overhead"), ("xpu", "default"), ("cpu", "default"), ("mps", None)],
)
def test_compile_mode_of_each_device(kind: Any, mode: str | None) -> None:
    device = DeviceInfo(kind, "x")
    assert setup.compile_mode(device, Settings()) == mode
    asked = setup.compile_mode(device, Settings(compile_mode="max-autotune"))
    assert asked == (None if kind == "mps" else "max-autotune")
    assert setup.compile_mode(device, Settings(compile=False, compile_mode="max-autotune")) is None


def test_where_graphs_crash_nothing_is_compiled_unless_a_mode_is_given(
    monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    assert setup.unsafe_compiler((3, 11), "2.6.0+cu124") is None
    assert setup.unsafe_compiler((3, 10), "2.10.0") is None
    monkeypatch.setattr(setup, "unsafe_compiler", lambda: unsafe_compiler((3, 10), "2.6.0+cu124"))
    device = DeviceInfo("cpu", "test")
    assert setup.compile_mode(device, Settings()) is None
    assert [event.reason for event in seen if isinstance(event, NotApplied)] == [
        "torch 2.6.0+cu124 may crash on Python 3.10 when it checks graphs; use Python 3.11, or torch 2.7"
    ]
    assert setup.compile_mode(device, Settings(compile_mode="default")) == "default"


def test_mps_sets_its_variables_and_says_that_torch_was_first(
    become: Become, optimizer: Optimizers, seen: list[Event]
) -> None:
    become("mps")
    made = optimizer()
    made.initialize()
    assert (os.environ[FALLBACK], os.environ[RATIO]) == ("1", "0.0")
    told, prepared = seen
    assert isinstance(told, NotApplied)
    assert told.what == FALLBACK
    assert "import accelerate_tts first" in told.reason
    assert isinstance(prepared, Prepared)
    assert {FALLBACK, RATIO} <= set(prepared.applied)
    made.close()
    assert FALLBACK not in os.environ
    assert RATIO not in os.environ


@pytest.mark.parametrize(("ratio", "text"), [(None, None), (0.7, "0.7")])
def test_the_watermark_ratio_is_a_setting(
    become: Become, optimizer: Optimizers, ratio: float | None, text: str | None
) -> None:
    become("mps")
    optimizer(mps_high_watermark_ratio=ratio).initialize()
    assert os.environ.get(RATIO) == text


def test_what_the_user_set_for_mps_survives(
    become: Become, optimizer: Optimizers, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    become("mps")
    monkeypatch.setenv(FALLBACK, "0")
    monkeypatch.setenv(RATIO, "1.1")
    made = optimizer(mps_high_watermark_ratio=0.0)
    made.initialize()
    assert (os.environ[FALLBACK], os.environ[RATIO]) == ("0", "1.1")
    assert [type(event) for event in seen] == [Prepared], "nothing to complain of: the user has decided"
    made.close()
    assert (os.environ[FALLBACK], os.environ[RATIO]) == ("0", "1.1")


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usable", "options", "threads"),
    [
        *[(2, {}, 2), (64, {}, 4)],  # never more than torch takes by itself
        *[(3, {"workers": 2}, 1), (64, {"workers": 16}, 4), (4, {"workers": 8}, 1)],
        *[(2, {"threads": 3}, 3), (2, {"threads": 3, "workers": 2}, 3)],
    ],
)
def test_threads_of_torch_and_of_the_children(
    cores: Cores, optimizer: Optimizers, usable: int, options: dict[str, Any], threads: int
) -> None:
    cores(usable)
    before = state()
    made = optimizer(**options)
    made.initialize()
    assert torch.get_num_threads() == threads
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == cpu.thread_environment(threads)
    made.close()
    assert state() == before


@pytest.mark.parametrize("name", THREAD_VARIABLES)
def test_a_variable_of_the_user_survives(
    cores: Cores, optimizer: Optimizers, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cores(2)
    monkeypatch.setenv(name, "7")
    before = state()
    made = optimizer()
    made.initialize()
    assert os.environ[name] == "7"
    others = {other: os.environ[other] for other in THREAD_VARIABLES if other != name}
    assert others == {other: value for other, value in cpu.thread_environment(2).items() if other != name}
    assert torch.get_num_threads() == (4 if name == "OMP_NUM_THREADS" else 2)
    made.close()
    assert state() == before


def test_threads_that_were_asked_for_win_over_omp(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_TTS_THREADS", "3")
    made = PerformanceOptimizer()
    made.initialize()
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "1")
    made.close()
    assert torch.get_num_threads() == 4


# --- the life of an optimizer --------------------------------------------------------------------------------------


def test_initialize_is_done_once(cores: Cores, optimizer: Optimizers, seen: list[Event]) -> None:
    cores(2)
    made = optimizer()
    assert made.initialize() == made.initialize() == torch.device("cpu")
    assert made.device is made.device
    (event,) = seen
    assert isinstance(event, Prepared)
    assert event.device.startswith("cpu (")
    assert set(event.applied) == {"CPU threads", *THREAD_VARIABLES}


def test_sixteen_threads_initialize_once(
    become: Become, optimizer: Optimizers, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    become("cuda")
    before = state()
    made = optimizer()
    barrier = threading.Barrier(16)
    # A real driver takes its time over this question: long enough for all sixteen to arrive.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: time.sleep(0.05) is None)

    def work() -> torch.device:
        barrier.wait(30)
        return made.initialize()

    with ThreadPoolExecutor(16) as pool:
        found = [future.result(60) for future in [pool.submit(work) for _ in range(16)]]
    assert set(found) == {torch.device("cuda")}
    assert [type(event) for event in seen] == [Prepared]
    made.close()
    assert state() == before


def test_close_before_twice_and_again(become: Become, optimizer: Optimizers) -> None:
    become("cuda")
    before = state()
    made = optimizer(threads=2)
    made.close()
    for _ in range(2):
        made.initialize()
        assert torch.backends.cudnn.benchmark is True
        made.close()
        made.close()
        assert state() == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_optimizers_do_not_undo_each_other(become: Become, optimizer: Optimizers, first_out: int) -> None:
    become("cuda")
    before = state()
    both = [optimizer(threads=2), optimizer(threads=2)]
    for each in both:
        each.initialize()
    inside = state()
    both[first_out].close()
    assert state() == inside, "the other one is still in"
    both[1 - first_out].close()
    assert state() == before
