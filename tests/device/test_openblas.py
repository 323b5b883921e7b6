"""OpenBLAS's threads: one while they are held, and the earlier number afterwards."""

from __future__ import annotations

import ctypes.util
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts.device import openblas
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.device.flags import hold, is_held
from accelerate_tts.device.openblas import BLAS_THREADS, busy_libraries
from accelerate_tts.plan import PROCESS, ModelPlan, Part
from accelerate_tts.stages.process.openblas_threads import QuietBlasStage
from accelerate_tts.tuning.findings import Tuning
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.policy import current_policy
from accelerate_tts.tuning.timing import Timing
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import tune


@dataclass
class Library:
    """A stand-in for a loaded OpenBLAS."""

    path: str
    threads: int


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> list[Library]:
    found = [Library("/numpy/libopenblas.so", 4), Library("/scipy/libopenblas.so", 2)]
    monkeypatch.setattr(openblas, "loaded_libraries", lambda: found)
    return found


def threads(libraries: list[Library]) -> list[int]:
    return [library.threads for library in libraries]


def test_held_nested_and_restored(libraries: list[Library]) -> None:
    first = hold([(BLAS_THREADS, 1)])
    assert threads(libraries) == [1, 1]
    assert busy_libraries() == []
    second = hold([(BLAS_THREADS, 3)])
    assert threads(libraries) == [3, 3]
    first.release()
    assert threads(libraries) == [3, 3], "the second holder is still there"
    third = hold([(BLAS_THREADS, 1)])
    third.release()
    assert threads(libraries) == [3, 3]
    second.release()
    assert threads(libraries) == [4, 2]
    second.release()
    libraries[0].threads = 7
    second.release()
    assert threads(libraries) == [7, 2]
    assert not is_held(BLAS_THREADS)


def test_only_what_has_several_threads_is_busy(libraries: list[Library]) -> None:
    libraries[1].threads = 1
    assert busy_libraries() == ["/numpy/libopenblas.so"]


def test_a_library_that_comes_or_goes_while_it_is_held(libraries: list[Library]) -> None:
    first = hold([(BLAS_THREADS, 1)])
    late = Library("/late/libopenblas.so", 8)
    libraries.append(late)
    assert busy_libraries() == ["/late/libopenblas.so"]
    second = hold([(BLAS_THREADS, 1)])
    assert late.threads == 1
    gone = libraries.pop(0)
    second.release()
    first.release()
    assert threads(libraries) == [2, 8]
    assert gone.threads == 1  # nobody could have told it


@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("hold"), st.integers(1, 9)),
            st.tuples(st.just("release"), st.integers(0, 9)),
            st.tuples(st.just("load"), st.integers(1, 9)),
        ),
        max_size=20,
    ),
)
def test_any_sequence_ends_where_it_began(actions: list[tuple[str, int]]) -> None:
    loaded = [Library("a", 4), Library("b", 1)]
    before = {library.path: library.threads for library in loaded}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openblas, "loaded_libraries", lambda: loaded)
        held: list[tuple[int, Any]] = []
        for action, number in actions:
            if action == "hold":
                held.append((number, hold([(BLAS_THREADS, number)])))
                assert {library.threads for library in loaded} == {number}
            elif action == "load":
                loaded.append(Library(f"late {len(loaded)}", number))
                before[loaded[-1].path] = number
            elif held:
                held.pop(number % len(held))[1].release()
        for _, one in held:
            one.release()
        assert {library.path: library.threads for library in loaded} == before


def test_without_proc_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_kwargs: object) -> str:
        raise FileNotFoundError("/proc/self/maps")

    monkeypatch.setattr(Path, "read_text", missing)
    assert busy_libraries() == []
    assert QuietBlasStage().applies(PART) == "no OpenBLAS with several threads is loaded"
    with hold([(BLAS_THREADS, 1)]):
        pass
    assert not is_held(BLAS_THREADS)


MAPS = """\
7f00-7f01 r-xp 00000000 08:01 11 /usr/lib/libc.so.6
7f02-7f03 r--p 00000000 08:01 12 /opt/with space/libscipy_openblas64_-1.so
7f03-7f04 r-xp 00001000 08:01 12 /opt/with space/libscipy_openblas64_-1.so
7f04-7f05 rw-p 00000000 00:00 0
7f05-7f06 r--p 00000000 08:01 13 /opt/openblas/share/table.bin
7f06-7f07 r--p 00000000 08:01 14 /opt/libopenblas.so.0 (deleted)
7f08-7f09 rw-p 00000000 00:00 0 [anon: openblas]
"""


def test_the_paths_are_read_from_the_maps_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_kwargs: MAPS)
    assert openblas.loaded_paths() == ["/opt/libopenblas.so.0 (deleted)", "/opt/with space/libscipy_openblas64_-1.so"]
    assert busy_libraries() == []  # neither file is there


def real_path() -> str:
    np.ones((2, 2)) @ np.ones((2, 2))
    libraries = openblas.loaded_libraries()
    if not libraries:
        pytest.skip("no OpenBLAS is loaded: this NumPy was built with another BLAS, or this is no Linux")
    return libraries[0].path


def test_a_file_that_took_the_place_of_a_loaded_library_is_not_loaded(tmp_path: Path) -> None:
    replaced = tmp_path / "libopenblas.so"
    replaced.write_bytes(Path(real_path()).read_bytes())  # as an upgrade under a running process leaves it
    assert openblas.opened(str(replaced)) is None
    assert str(replaced) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert openblas.opened(str(tmp_path / "removed.so")) is None


def test_a_library_without_the_functions_is_passed_over() -> None:
    real_path()  # skips where there is no /proc
    libc = ctypes.util.find_library("c")
    assert libc is not None
    assert openblas.opened(libc) is None


@pytest.fixture
def real() -> Iterator[str]:
    """The path of NumPy's own OpenBLAS, with two threads during the test."""
    pytest.importorskip("threadpoolctl")  # here, since a test that skips in its middle leaves its models tuned
    path = real_path()
    library = openblas.opened(path)
    assert library is not None
    before = library.threads
    library.threads = 2
    if library.threads != 2:
        pytest.skip("this OpenBLAS was built for one thread")
    yield path
    library.threads = before


def outside(path: str) -> int:
    """The thread count as another tool reads it."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    found = {Path(entry["filepath"]).resolve(): entry["num_threads"] for entry in threadpoolctl.threadpool_info()}
    return int(found[Path(path).resolve()])


def test_the_real_library_is_told_and_computes_the_same(real: str) -> None:
    assert outside(real) == 2
    assert real in busy_libraries()
    a = np.random.default_rng(0).standard_normal((64, 64))
    expected = a @ a
    with hold([(BLAS_THREADS, 1)]):
        assert outside(real) == 1
        assert real not in busy_libraries()
        np.testing.assert_allclose(a @ a, expected, rtol=1e-12, atol=1e-12)
    assert outside(real) == 2


def test_every_openblas_of_this_environment_is_found() -> None:
    real_path()
    threadpoolctl = pytest.importorskip("threadpoolctl")
    pytest.importorskip("scipy.linalg")
    known = {
        Path(entry["filepath"]).resolve()
        for entry in threadpoolctl.threadpool_info()
        if entry["internal_api"] == "openblas"
    }
    assert known <= {Path(library.path).resolve() for library in openblas.loaded_libraries()}


# --- the stage -----------------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


MODEL = Spectral().eval()
PART = Part(PROCESS, "process", MODEL)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def test_the_stage_is_switched_on_and_off(libraries: list[Library]) -> None:
    assert QuietBlasStage().applies(PART) is None
    change = QuietBlasStage().prepare(PART)
    assert threads(libraries) == [4, 2], "it is made switched off"
    for _ in range(2):
        change.on()
        change.on()
        assert threads(libraries) == [1, 1]
        change.off()
        change.off()
        assert threads(libraries) == [4, 2]
    assert change.graphs is None
    change.end_warmup()
    for library in libraries:
        library.threads = 1
    assert QuietBlasStage().applies(PART) == "no OpenBLAS with several threads is loaded"


def tuned(ratio: float, **changes: Any) -> Tuning:
    """Tuned with that stage alone, as if it had made the whole pass faster by a ratio."""

    def compare_speed(run: Any, before: Any, after: Any, *_args: object, **_kwargs: object) -> Timing:
        for switch in (before, after, after, before):
            switch()
            run()
        return Timing(1.0, 1.0 / ratio, ratio, ratio, ratio, 5)

    plan = ModelPlan("model", (MODEL,), (Part("model", "model", MODEL),))
    calls = warmup_calls(X, Loaded(MODEL), "inference")
    policy = replace(current_policy(), compare=compare_speed, looks=False, **changes)
    return tune(plan, calls, [QuietBlasStage()], DeviceInfo("cpu", "test"), Limits(60.0, policy=policy))


def test_kept_by_tuning_and_undone(libraries: list[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = tuned(1.5)
    (result,) = tuning.receipt.stages
    assert (result.part, result.stage, result.kept, result.error) == (PROCESS, "one OpenBLAS thread", True, 0.0)
    assert threads(libraries) == [1, 1]
    other = tuned(1.5)  # of a second model: there is nothing left to do
    assert other.receipt.stages == ()
    tuning.undo()
    tuning.undo()
    assert threads(libraries) == [4, 2]


def test_a_tuned_object_that_is_dropped_lets_go(libraries: list[Library]) -> None:
    """NumPy's other threads once stayed off for as long as the process ran."""
    tuning = tuned(1.5)
    assert threads(libraries) == [1, 1]
    del tuning
    gc.collect()
    assert threads(libraries) == [4, 2]
    assert not is_held(BLAS_THREADS)


def test_dropped_by_tuning(libraries: list[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = tuned(0.9)
    (result,) = tuning.receipt.stages
    assert not result.kept
    assert "slower" in result.reason
    assert threads(libraries) == [4, 2]
    assert not is_held(BLAS_THREADS)


def test_a_pass_that_takes_too_much_of_the_budget_is_not_repeated_for_it(libraries: list[Library]) -> None:
    """It once took 40 s of a 60 s budget, for a system whose passes take 3 s."""
    (result,) = tuned(1.5, pass_share=0.0).receipt.stages
    assert not result.kept
    assert "a dozen whole passes" in result.reason


def test_two_models_hold_the_real_library(real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tuned(1.5)
    assert outside(real) == 1
    library = openblas.opened(real)
    assert library is not None
    library.threads = 2  # somebody else's doing: a second model tuned now finds it busy
    second = tuned(1.5)
    assert [result.kept for result in second.receipt.stages] == [True]
    first.undo()
    assert outside(real) == 1
    second.undo()
    assert outside(real) == 2
