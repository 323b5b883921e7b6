"""Memory: what is free, what a piece of work takes, and giving memory back without ever raising."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from accelerate_tts.device import memory
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import Event, NotApplied
from accelerate_tts.optimizer import PerformanceOptimizer
from accelerate_tts.settings import Settings

MIB, GIB = 1024**2, 1024**3
CPU = DeviceInfo("cpu", "test")
DEVICES = [DeviceInfo(kind, "test", 8 * GIB) for kind in ("cuda", "rocm", "xpu")] + [DeviceInfo("mps", "test"), CPU]
ROOT = "sys/fs/cgroup"
V1 = f"{ROOT}/memory/memory.limit_in_bytes", f"{ROOT}/memory/memory.usage_in_bytes"
V2 = f"{ROOT}/memory.max", f"{ROOT}/memory.current"


def v2(group: str, limit: int | str, used: int) -> dict[str, str]:
    return {f"{ROOT}{group}/memory.max": f"{limit}\n", f"{ROOT}{group}/memory.current": f"{used}\n"}


def v1(group: str, limit: int, used: int) -> dict[str, str]:
    folder = f"{ROOT}/memory{group}/memory"
    return {f"{folder}.limit_in_bytes": f"{limit}\n", f"{folder}.usage_in_bytes": f"{used}\n"}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


TREES = {
    "v2": ({V2[0]: f"{4 * GIB}\n", V2[1]: f"{GIB}\n"}, 3 * GIB),
    "v2, no limit": ({V2[0]: "max\n", V2[1]: f"{GIB}\n"}, None),
    "v2, over the limit": ({V2[0]: "1000\n", V2[1]: "2000\n"}, 0),
    "v2, use is missing": ({V2[0]: "1000\n"}, None),
    "v1": ({V1[0]: f"{2 * GIB}\n", V1[1]: f"{GIB}\n"}, GIB),
    "v1, no limit": ({V1[0]: "9223372036854771712\n", V1[1]: f"{GIB}\n"}, None),
    "v1, over the limit": ({V1[0]: "1000\n", V1[1]: "2000\n"}, 0),
    "hybrid: no limit in v2, one in v1": ({V2[0]: "max\n", V2[1]: "5\n", V1[0]: "9000\n", V1[1]: "1000\n"}, 8000),
    "v2, the group's own limit": ({"proc/self/cgroup": "0::/app\n", **v2("/app", 9000, 1000)}, 8000),
    "v2, a parent has less left": (
        {"proc/self/cgroup": "0::/pod/app\n", **v2("/pod/app", 9000, 1000), **v2("/pod", 9000, 8500)},
        500,
    ),
    "v2, the parent alone has a limit": (
        {"proc/self/cgroup": "0::/pod/app\n", **v2("/pod/app", "max", 1000), **v2("/pod", 4000, 1000)},
        3000,
    ),
    "v2, files that were read do not count": (
        {
            "proc/self/cgroup": "0::/app\n",
            **v2("/app", 9000, 8000),
            f"{ROOT}/app/memory.stat": "anon 1\ninactive_file 600\n",
        },
        1600,
    ),
    "v1, the group's own limit": (
        {"proc/self/cgroup": "7:memory:/docker/f0\n3:cpu,cpuacct:/\n", **v1("/docker/f0", 5000, 1000)},
        4000,
    ),
    "v1 in a container, the path is the host's": (
        {"proc/self/cgroup": "7:memory:/docker/f0\n", **v1("", 5000, 1000)},
        4000,
    ),
    "nothing there": ({}, None),
    "garbage": ({V2[0]: "lots\n", V2[1]: "\n", V1[0]: "\n", V1[1]: "1\n"}, None),
}


@pytest.mark.parametrize(("files", "expected"), TREES.values(), ids=TREES.keys())
def test_headroom_of_a_recorded_tree(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert memory.cgroup_headroom(tree(tmp_path, files)) == expected
    assert memory.cgroup_headroom(str(tmp_path)) == expected


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Stand-in for a machine: what psutil says of it, and a recorded tree in place of `/sys` and `/proc`."""
    read_text = Path.read_text

    def recorded(path: Path, *args: Any, **options: Any) -> str:
        if str(path).startswith(("/sys/fs/cgroup", "/proc/self/cgroup")):
            path = tmp_path / str(path).lstrip("/")
        return read_text(path, *args, **options)

    def become(available: int, total: int, limit: int | None = None, used: int = 0) -> None:
        if limit is not None:
            tree(tmp_path, {V2[0]: str(limit), V2[1]: str(used)})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=total))
        monkeypatch.setattr(Path, "read_text", recorded)

    return become


@pytest.mark.parametrize(
    ("available", "limit", "used", "free"),
    [(30, None, 0, 30), (30, 8, 2, 6), (5, 8, 2, 5), (30, 8, 9, 0)],
)
def test_free_on_a_cpu_is_what_machine_and_container_both_have(
    machine: Machine, available: int, limit: int | None, used: int, free: int
) -> None:
    machine(available * GIB, 64 * GIB, None if limit is None else limit * GIB, used * GIB)
    assert memory.free_bytes(CPU) == free * GIB


def test_free_on_this_machine_is_possible() -> None:
    free = memory.free_bytes(CPU)
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total


def stand_in(monkeypatch: pytest.MonkeyPatch, module: Any, **answers: Any) -> None:
    for name, answer in answers.items():
        monkeypatch.setattr(module, name, lambda *_, answer=answer: answer)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_cached_blocks_of_a_gpu_count_as_free(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Stand-in for a GPU: 10 GiB are free to the driver, torch holds 5 of which tensors use 3."""
    module = getattr(torch, kind)
    stand_in(monkeypatch, module, mem_get_info=(10 * GIB, 24 * GIB))
    stand_in(monkeypatch, module, memory_reserved=5 * GIB, memory_allocated=3 * GIB)
    assert memory.free_bytes(DeviceInfo(kind, "test", 24 * GIB)) == 12 * GIB


@pytest.mark.parametrize(("driver", "free"), [(4, 12), (17, 0)])
def test_free_on_mps(monkeypatch: pytest.MonkeyPatch, driver: int, free: int) -> None:
    """Stand-in for an Apple GPU."""
    stand_in(monkeypatch, torch.mps, recommended_max_memory=16 * GIB, driver_allocated_memory=driver * GIB)
    assert memory.free_bytes(DeviceInfo("mps", "test")) == free * GIB


def test_pressure_is_less_than_a_tenth(machine: Machine) -> None:
    machine(7 * GIB, 64 * GIB)
    assert not memory.under_pressure(CPU)
    machine(6 * GIB, 64 * GIB)
    assert memory.under_pressure(CPU)


def test_pressure_in_a_container_is_of_its_own_limit(machine: Machine) -> None:
    machine(60 * GIB, 64 * GIB, limit=4 * GIB, used=GIB)
    assert not memory.under_pressure(CPU), "3 of 4 GiB are free; the host's 64 are none of its business"
    machine(60 * GIB, 64 * GIB, limit=4 * GIB, used=int(3.9 * GIB))
    assert memory.under_pressure(CPU)


@pytest.mark.parametrize(("free", "tight"), [(3, False), (2, True)])
def test_pressure_on_a_gpu_is_of_its_total(monkeypatch: pytest.MonkeyPatch, free: int, tight: bool) -> None:
    """Stand-in for a GPU of 24 GiB."""
    stand_in(monkeypatch, torch.cuda, mem_get_info=(free * GIB, 24 * GIB), memory_reserved=0, memory_allocated=0)
    assert memory.under_pressure(DeviceInfo("cuda", "test", 24 * GIB)) is tight


# --- giving back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
def test_cleanup_never_raises_with_or_without_the_device(device: DeviceInfo) -> None:
    kept = torch.arange(1000.0)
    memory.cleanup(device)
    assert torch.equal(kept, torch.arange(1000.0))


@pytest.mark.parametrize(
    ("device", "owner", "name", "step"),
    [
        (CPU, gc, "collect", "garbage collection"),
        (DEVICES[0], torch.cuda, "empty_cache", "CUDA cache"),
        (DEVICES[1], torch.cuda, "empty_cache", "CUDA cache"),
        (DEVICES[2], torch.xpu, "empty_cache", "XPU cache"),
        (DEVICES[3], torch.mps, "empty_cache", "MPS cache"),
        (CPU, memory, "trim_heap", "malloc_trim"),
    ],
)
def test_a_failing_step_is_told_and_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch, seen: list[Event], device: DeviceInfo, owner: Any, name: str, step: str
) -> None:
    done: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: done.append("garbage collection"))
    monkeypatch.setattr(memory, "trim_heap", lambda: done.append("malloc_trim"))

    def refuse() -> None:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(owner, name, refuse)
    memory.cleanup(device)
    assert seen == [NotApplied(f"clean-up step {step!r}", "RuntimeError: the driver is gone")]
    assert {*done, step} >= {"garbage collection", "malloc_trim"}


def test_cleanup_collects_cycles() -> None:
    class Node:
        def __init__(self) -> None:
            self.tensor, self.me = torch.zeros(8), self

    def alive() -> int:
        return sum(type(item) is Node for item in gc.get_objects())

    gc.disable()
    try:
        Node()
        assert alive() == 1
        memory.cleanup(CPU)
        assert alive() == 0
    finally:
        gc.enable()


if sys.platform == "linux":

    def test_cleanup_gives_many_small_tensors_back_to_the_system() -> None:
        memory.cleanup(CPU)
        start = memory.resident_bytes()
        tensors = [torch.ones(512) for _ in range(150_000)]  # 2 KiB each: glibc keeps what is freed of these
        full = memory.resident_bytes()
        assert full - start > 200 * MIB
        last = tensors[-1]  # on top of the heap, so that glibc cannot trim by itself
        del tensors
        freed = memory.resident_bytes()
        memory.cleanup(CPU)
        assert memory.resident_bytes() < start + (full - start) / 3
        assert freed > start + (full - start) / 2, (
            "without the clean-up nothing was given back: the test means something"
        )
        assert last.sum() == 512

    def test_peak_of_one_tensor_is_its_size() -> None:
        memory.cleanup(CPU)
        peak = memory.peak_of(CPU, lambda: torch.ones(50_000_000))
        assert peak is not None
        assert 190_000_000 < peak < 260_000_000

    def test_peak_counts_what_was_freed_during_the_work() -> None:
        def work() -> None:
            for _ in range(8):
                torch.ones(50_000_000)

        memory.cleanup(CPU)
        peak = memory.peak_of(CPU, work)
        assert peak is not None
        # Where earlier tests left a hole in the heap, the first takes that, which stays resident, and the next another.
        assert 190_000_000 < peak < 460_000_000, "eight times one after the other, never at once"

    def test_an_earlier_peak_does_not_count() -> None:
        torch.ones(100_000_000)
        memory.cleanup(CPU)
        peak = memory.peak_of(CPU, lambda: torch.ones(25_000_000))
        assert peak is not None
        assert 90_000_000 < peak < 160_000_000

    def test_peak_is_the_same_at_each_run() -> None:
        def work() -> None:
            [torch.ones(512) for _ in range(100_000)]

        peaks = [memory.peak_of(CPU, work) or 0 for _ in range(4)]
        assert min(peaks) > 200_000_000, f"a batch size would follow from {peaks}: memory used again is memory needed"


def test_peak_without_a_resettable_peak_is_unknown_but_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for a system that keeps no such peak."""

    def refuse(*_args: Any, **_options: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    done: list[int] = []
    assert memory.peak_of(CPU, lambda: done.append(1)) is None
    assert done == [1]


def test_peak_passes_the_error_of_the_work_on() -> None:
    with pytest.raises(ZeroDivisionError):
        memory.peak_of(CPU, lambda: 1 / 0)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_peak_on_a_gpu_is_the_gpu_s_own(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Stand-in for a GPU whose tensors rise from 2 to 5 GiB; the host's 200 MB are not what is asked for."""
    stand_in(monkeypatch, getattr(torch, kind), synchronize=None, reset_peak_memory_stats=None)
    stand_in(monkeypatch, getattr(torch, kind), memory_allocated=2 * GIB, max_memory_allocated=5 * GIB)
    assert memory.peak_of(DeviceInfo(kind, "test", 24 * GIB), lambda: torch.ones(50_000_000)) == 3 * GIB


def test_peak_on_mps_is_unknown() -> None:
    """MPS keeps no peak, and the host's resident set, which Linux reports, would be a wrong answer."""
    assert memory.peak_of(DeviceInfo("mps", "test"), lambda: torch.ones(50_000_000)) is None


# --- the optimizer's own clean-up ----------------------------------------------------------------------------------


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call of `gc.collect`."""
    calls: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda *_: calls.append("collect"))
    return calls


def test_clean_up_does_nothing_without_pressure_or_force(machine: Machine, collections: list[str]) -> None:
    optimizer = PerformanceOptimizer(Settings(device="cpu"))
    machine(32 * GIB, 64 * GIB)
    optimizer.cleanup_memory()
    assert collections == []
    optimizer.cleanup_memory(force=True)
    assert collections == ["collect"]
    machine(3 * GIB, 64 * GIB)
    optimizer.cleanup_memory()
    assert collections == ["collect"] * 2
    optimizer.close()


def test_clean_up_survives_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch, seen: list[Event]) -> None:
    optimizer = PerformanceOptimizer(Settings(device="cpu"))
    optimizer.initialize()

    def refuse() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    optimizer.cleanup_memory()
    assert seen[-1] == NotApplied("cleanup_memory", "RuntimeError: no driver")
    optimizer.close()
