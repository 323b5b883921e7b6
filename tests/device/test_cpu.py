"""CPU: how many cores may be used, from recorded control-group trees and affinity masks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelerate_tts.device import cpu

Machine = Callable[[int, float | None], None]
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write a recorded `/proc` and `/sys` under `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def v1(mount: str, quota: str, period: str = "100000\n") -> dict[str, str]:
    return {f"{mount}/cpu.cfs_quota_us": quota, f"{mount}/cpu.cfs_period_us": period}


V1_LINES = "12:memory:/docker/f0\n4:cpu,cpuacct:/docker/f0\n3:cpuset:/docker/f0\n1:name=systemd:/docker/f0\n"
TREES = {
    "v2 with a quota": ({"proc/self/cgroup": "0::/app\n", f"{V2}/app/cpu.max": "150000 100000\n"}, 1.5),
    "v2, own period": ({"proc/self/cgroup": "0::/app\n", f"{V2}/app/cpu.max": "20000 10000\n"}, 2.0),
    "v2, the parent is tighter": (
        {
            "proc/self/cgroup": "0::/pod/app\n",
            f"{V2}/pod/app/cpu.max": "400000 100000\n",
            f"{V2}/pod/cpu.max": "250000 100000\n",
        },
        2.5,
    ),
    "v2, the child is tighter": (
        {
            "proc/self/cgroup": "0::/pod/app/worker\n",
            f"{V2}/pod/app/worker/cpu.max": "max 100000\n",
            f"{V2}/pod/app/cpu.max": "300000 100000\n",
            f"{V2}/pod/cpu.max": "800000 100000\n",
        },
        3.0,
    ),
    "v2 without a limit": ({"proc/self/cgroup": "0::/app\n", f"{V2}/app/cpu.max": "max 100000\n"}, None),
    "v2, the limit of another group": ({"proc/self/cgroup": "0::/app\n", f"{V2}/other/cpu.max": "1 1\n"}, None),
    "v2, a colon in the name": ({"proc/self/cgroup": "0::/a:b\n", f"{V2}/a:b/cpu.max": "200000 100000\n"}, 2.0),
    "v2 in a container, the path is the host's": (
        {"proc/self/cgroup": "0::/system.slice/docker-f0.scope\n", f"{V2}/cpu.max": "400000 100000\n"},
        4.0,
    ),
    "v2 without /proc/self/cgroup": ({f"{V2}/cpu.max": "400000 100000\n"}, 4.0),
    "v1 with a quota": ({"proc/self/cgroup": V1_LINES, **v1(f"{V1}/docker/f0", "350000\n")}, 3.5),
    "v1, the mount is cpu,cpuacct": (
        {"proc/self/cgroup": V1_LINES, **v1("sys/fs/cgroup/cpu,cpuacct/docker/f0", "50000\n")},
        0.5,
    ),
    "v1, the mount is cpuacct,cpu": (
        {"proc/self/cgroup": "4:cpuacct,cpu:/a\n", **v1("sys/fs/cgroup/cpuacct,cpu/a", "200000\n")},
        2.0,
    ),
    "v1 without a limit": ({"proc/self/cgroup": V1_LINES, **v1(f"{V1}/docker/f0", "-1\n")}, None),
    "v1, the parent is tighter": (
        {"proc/self/cgroup": V1_LINES, **v1(f"{V1}/docker/f0", "-1\n"), **v1(f"{V1}/docker", "200000\n")},
        2.0,
    ),
    "v1 in a container, the path is the host's": ({"proc/self/cgroup": V1_LINES, **v1(V1, "100000\n")}, 1.0),
    "v1, cpuset is not cpu": (
        {"proc/self/cgroup": "3:cpuset:/a\n2:cpuacct:/a\n", **v1(f"{V1}/a", "100000\n"), **v1(V1, "100000\n")},
        None,
    ),
    "hybrid, the limit is in v1": (
        {"proc/self/cgroup": V1_LINES + "0::/docker/f0\n", **v1(f"{V1}/docker/f0", "200000\n")},
        2.0,
    ),
    "hybrid, the smaller counts": (
        {
            "proc/self/cgroup": V1_LINES + "0::/docker/f0\n",
            **v1(f"{V1}/docker/f0", "300000\n"),
            f"{V2}/docker/f0/cpu.max": "200000 100000\n",
        },
        2.0,
    ),
    "nothing there at all": ({}, None),
    "only /proc/self/cgroup": ({"proc/self/cgroup": V1_LINES + "0::/app\n"}, None),
    "v1, the period is missing": ({"proc/self/cgroup": V1_LINES, f"{V1}/docker/f0/cpu.cfs_quota_us": "1000\n"}, None),
    "a folder where the file should be": ({f"{V2}/cpu.max/x": ""}, None),
}


@pytest.mark.parametrize(("files", "expected"), TREES.values(), ids=TREES.keys())
def test_quota_of_a_recorded_tree(files: dict[str, str | bytes], expected: float | None, tmp_path: Path) -> None:
    assert cpu.quota_cpus(tree(tmp_path, files)) == expected
    assert cpu.quota_cpus(str(tmp_path)) == expected


GARBAGE = [
    *("", "\n", "max", "100000", "a b\n", "1 2 3\n", "-5 100000\n", "0 100000\n", "100000 0\n", "1.5 100000\n"),
    *("nan nan", "\xff\xfe", "\0", f"{'9' * 400} 1", f"{'9' * 5000} 1"),
]


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: repr(text[:12]))
def test_garbage_is_no_limit(text: str, tmp_path: Path) -> None:
    assert cpu.quota_cpus(tree(tmp_path / "2", {f"{V2}/cpu.max": text})) is None
    quota, _, period = text.partition(" ")
    assert cpu.quota_cpus(tree(tmp_path / "1", {"proc/self/cgroup": V1_LINES, **v1(V1, quota, period)})) is None


@given(
    groups=st.one_of(st.binary(max_size=40), st.text(":/.0cpu,\n\0", max_size=20).map(str.encode)),
    limit=st.one_of(st.binary(max_size=20), st.text("0123456789 -max\n", max_size=20).map(str.encode)),
)
@example(groups=b"0::/a\0b\n", limit=b"")
def test_no_content_of_the_files_can_raise(
    groups: bytes, limit: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files: dict[str, str | bytes] = {
        "proc/self/cgroup": groups,
        f"{V2}/cpu.max": limit,
        f"{V1}/cpu.cfs_quota_us": limit,
    }
    quota = cpu.quota_cpus(tree(tmp_path_factory.mktemp("tree"), files))
    assert quota is None or 0 < quota < math.inf


@given(limits=st.lists(st.none() | st.integers(1_000, 6_400_000), min_size=1, max_size=6))
def test_the_smallest_limit_on_the_way_up_counts(
    limits: list[int | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    group = "".join(f"/g{depth}" for depth in range(len(limits)))
    files: dict[str, str | bytes] = {"proc/self/cgroup": f"0::{group}\n"}
    for depth, limit in enumerate(limits, start=1):
        folder = "/".join(group.split("/")[: depth + 1])
        files[f"{V2}{folder}/cpu.max"] = f"{'max' if limit is None else limit} 100000\n"
    known = [limit for limit in limits if limit is not None]
    expected = min(known) / 100_000 if known else None
    assert cpu.quota_cpus(tree(tmp_path_factory.mktemp("tree"), files)) == expected


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with an affinity mask and a quota: stand-ins for hardware that the tests do not run on."""
    quota_cpus = cpu.quota_cpus

    def become(affinity: int, quota: float | None) -> None:
        limit = "max" if quota is None else str(round(quota * 100_000))
        root = tree(tmp_path_factory.mktemp("machine"), {f"{V2}/cpu.max": f"{limit} 100000\n"})
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
        monkeypatch.setattr(cpu, "quota_cpus", lambda: quota_cpus(root))

    return become


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"),
    [
        (8, None, 8),
        (8, 3.0, 3),
        (8, 2.99, 2),
        (2, 16.0, 2),
        (64, 0.5, 1),
        (64, 0.01, 1),
        (1, None, 1),
        (4, 4.0, 4),
    ],
)
def test_usable_is_the_smaller_of_affinity_and_quota(
    machine: Machine, affinity: int, quota: float | None, usable: int
) -> None:
    machine(affinity, quota)
    assert cpu.affinity_cpus() == affinity
    assert cpu.usable_cpus() == usable
    assert cpu.recommended_threads() == usable


@pytest.mark.parametrize(("workers", "threads"), [(1, 7), (2, 3), (3, 2), (7, 1), (8, 1), (100, 1)])
def test_workers_share_the_usable_cores(machine: Machine, workers: int, threads: int) -> None:
    machine(16, 7.5)
    assert cpu.recommended_threads(workers) == threads


@given(affinity=st.integers(1, 512), quota=st.none() | st.integers(1_000, 60_000_000), workers=st.integers(1, 600))
def test_never_more_threads_than_cores_for_all_workers(affinity: int, quota: int | None, workers: int) -> None:
    share = None if quota is None else quota / 100_000
    with pytest.MonkeyPatch.context() as patch:  # stand-ins, as in `machine`
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
        patch.setattr(cpu, "quota_cpus", lambda: share)
        usable, threads = cpu.usable_cpus(), cpu.recommended_threads(workers)
    assert 1 <= usable <= affinity
    assert usable == 1 or share is None or usable <= share
    assert share is None or usable in {affinity, max(1, math.floor(share))}
    assert threads == 1 or threads * workers <= usable
    assert (threads + 1) * workers > usable


if hasattr(os, "sched_setaffinity"):

    def test_a_real_affinity_mask_counts() -> None:
        found: list[tuple[int, int]] = []

        def pinned() -> None:  # the mask is the thread's own, so the rest of the tests keep theirs
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            found.append((cpu.affinity_cpus(), cpu.usable_cpus()))

        thread = threading.Thread(target=pinned)
        thread.start()
        thread.join(30)
        assert found == [(1, 1)]


def test_without_affinity_masks_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `sched_getaffinity`: it is taken away as a stand-in."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cpu.affinity_cpus() == 10
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu.affinity_cpus() == 1


def test_this_machine_has_a_sensible_number() -> None:
    assert 1 <= cpu.usable_cpus() <= (os.cpu_count() or 1)
    quota = cpu.quota_cpus()
    assert quota is None or quota > 0


def test_the_environment_of_threads() -> None:
    assert cpu.thread_environment(3) == {
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "NUMEXPR_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def test_the_environment_reaches_a_child_process() -> None:
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    environment = {**os.environ, **cpu.thread_environment(1)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1
