"""The kernels' library: every instruction set of this processor, what is not loaded, and one OpenMP in the process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accelerate_tts import Event
from accelerate_tts.events import FellBack
from accelerate_tts.kernels import library, structs
from accelerate_tts.kernels.library import KernelError, kernels, load
from doubles import given_to

HERE = kernels()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def run(code: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- instruction sets ------------------------------------------------------------------------------------------------

AT_EACH_LEVEL = """
import os, sys, torch
from accelerate_tts.kernels import calls
from accelerate_tts.kernels import library

def check(skinny_linear):
    for rows, inputs, outputs in [(1, 64, 48), (2, 130, 67), (3, 31, 9), (5, 257, 33), (8, 1024, 70)]:
        torch.manual_seed(inputs)
        x = torch.randn(rows, inputs)
        weight = torch.randint(-127, 128, (outputs, inputs)).float()
        bias, scale = torch.randn(outputs), torch.rand(outputs)
        expected = x.double() @ weight.double().t()
        size = x.double().abs() @ weight.double().abs().t() + 1
        for stored, limit, by in (
            (weight, 1e-6, None), (weight.bfloat16(), 1e-6, None), (weight.to(torch.int8), 1e-4, scale),
            (weight.t().contiguous(), 1e-6, None),
        ):
            y = skinny_linear(x, stored, by, bias, stored.shape[0] == inputs)
            right = expected * (1 if by is None else by.double()) + bias.double()
            assert ((y.double() - right).abs() <= limit * size).all(), (stored.dtype, rows, inputs, outputs)
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 64)
        x[1, 40] = value
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            y = skinny_linear(x, torch.ones(3, 64).to(dtype), None, None, False)
            assert torch.equal(y[0], torch.full((3,), 64.0)) and not y[1].isfinite().any(), (dtype, value)

for level in sys.argv[1:]:
    os.environ["ACCELERATE_TTS_KERNELS"] = level
    library.loaded_library.cache_clear()
    calls.skinny_linear.cache_clear()
    check(calls.skinny_linear())
    print(library.kernels().level)
"""


def test_each_instruction_set_of_this_processor() -> None:
    levels = HERE.levels[: HERE.levels.index(HERE.level) + 1]
    assert run(AT_EACH_LEVEL, *levels).split() == list(levels)


def test_a_limit_that_the_processor_lacks_takes_what_there_is() -> None:
    best = HERE.levels[-1]
    code = "from accelerate_tts.kernels.library import kernels; print(kernels().level)"
    assert run(code, ACCELERATE_TTS_KERNELS=best).split() == [HERE.level]


def test_an_unknown_limit_is_an_error_that_names_the_values() -> None:
    with pytest.raises(KernelError, match=r"ACCELERATE_TTS_KERNELS='avx9' is none of base, .*, none"):
        load(HERE.path, "avx9")


# --- what is not loaded ----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copy2(HERE.path, tmp_path / HERE.path.name))


def test_a_library_that_is_not_there_is_a_pure_wheel(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="built without kernels: install a wheel"):
        load(tmp_path / "_kernels.so")


@pytest.mark.parametrize("change", ["reordered", "renamed", "longer", "another version"])
def test_a_library_of_other_structs_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = structs.expected()
    if change == "reordered":
        ours[0], ours[1] = (ours[1][0], *ours[0][1:]), (ours[0][0], *ours[1][1:])
    elif change == "renamed":
        ours[3] = ("Linear.sizes", *ours[3][1:])
    elif change == "longer":
        ours.append(("ResidualCall.more", 48, 8))
    monkeypatch.setattr(library, "expected", lambda: ours)
    monkeypatch.setattr(library, "ABI_VERSION", structs.ABI_VERSION + (change == "another version"))
    with pytest.raises(KernelError, match="build it anew"):
        load(HERE.path)


def test_the_header_is_the_description() -> None:
    header = Path(__file__).parents[2] / "accelerate_tts" / "kernels" / "csrc" / "abi.h"  # the wheel has no sources
    assert header.read_text() == structs.header()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are lists there")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_everybody_may_write_is_not_loaded(what: str, copied: Path) -> None:
    load(copied)
    place = copied if what == "file" else copied.parent
    place.chmod(place.stat().st_mode | 0o002)
    with pytest.raises(KernelError, match=r"is not loaded, since everybody may write it: chmod o-w"):
        load(copied)


@pytest.mark.skipif(sys.platform == "win32", reason="owners are POSIX's")
def test_what_belongs_to_another_user_is_not_loaded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_to(copied, 4321, monkeypatch)
    with pytest.raises(KernelError, match="belongs to user 4321, who is neither this user nor"):
        load(copied)


def test_what_is_no_library_is_an_error_that_says_so(tmp_path: Path) -> None:
    broken = tmp_path / HERE.path.name
    broken.write_bytes(b"not a library")
    with pytest.raises(KernelError, match=r"cannot be loaded .*build it anew"):
        load(broken)


def test_a_failure_is_reported_once_and_remembered(seen: list[Event], tmp_path: Path) -> None:
    first, *others = [library.loaded_library(tmp_path / "_kernels.so") for _ in range(3)]
    assert isinstance(first, KernelError)
    assert "built without kernels" in str(first)
    assert all(other is first for other in others), "it was tried once"
    (event,) = [event for event in seen if isinstance(event, FellBack)]
    assert "built without kernels" in event.reason


def test_switched_off_is_no_fault() -> None:
    code = "from accelerate_tts.kernels.library import missing; print(missing())"
    assert run(code, ACCELERATE_TTS_KERNELS="none").startswith(
        "the kernels are switched off by ACCELERATE_TTS_KERNELS=none: "
    )


# --- threads ---------------------------------------------------------------------------------------------------------

AFTER_A_CALL = """
import re, torch
torch.set_num_threads(2)
from accelerate_tts.kernels.calls import skinny_linear
from accelerate_tts.kernels.library import kernels
a = torch.randn(600, 600); a @ a; (a + a).sum()
skinny_linear()(torch.randn(2, 600), a, None, None, False)
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(kernels().threads); print(*sorted(name for name in files if re.search(r"lib(gomp|omp|iomp5)\\b", name)))
"""


@LINUX
def test_one_openmp_in_the_process() -> None:
    used, loaded = run(AFTER_A_CALL).splitlines()
    assert loaded.split() == [used]


@LINUX
def test_teams_are_of_torchs_threads() -> None:
    """After torch's own parallel loop, a kernel starts no thread; it uses the existing ones."""
    code = """
import os, torch
torch.set_num_threads(3)
from accelerate_tts.kernels.calls import skinny_linear
a = torch.randn(900, 900); (a + a).exp()
before = len(os.listdir("/proc/self/task"))
for _ in range(5): skinny_linear()(torch.randn(2, 900), a, None, None, False)
print(before, len(os.listdir("/proc/self/task")))
"""
    before, after = run(code).split()
    assert before == after


def test_no_memory_is_an_error_of_pythons() -> None:
    x, y = torch.randn(1), torch.empty(1)
    with pytest.raises(MemoryError, match="no memory for what a kernel works in"):
        HERE.skinny_linear(
            structs.FORMATS.index("transposed"), x.data_ptr(), x.data_ptr(), None, None, y.data_ptr(), 2**30, 2**28, 1,
            1,
        )  # fmt: skip


def test_what_is_called_has_its_arguments_types() -> None:
    for function in (HERE.skinny_linear, HERE.decoder_blocks, HERE.transformer_block, HERE.residual_block):
        assert isinstance(function, ctypes._CFuncPtr)  # type: ignore[attr-defined]
        assert function.argtypes


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="asks nm")
def test_instruction_sets_share_no_code() -> None:
    """Linkers keep one of several equal functions, and it must run on a processor without newer instructions."""
    nm = str(shutil.which("nm"))
    symbols = subprocess.run([nm, "-C", HERE.path], capture_output=True, text=True, check=True).stdout.splitlines()
    shared = [line for line in symbols if line[17:18] in {"W", "V", "u"}]
    assert not shared


@LINUX
def test_it_needs_libc_alone() -> None:
    needed = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "_kernels" in line]
    assert needed, "it is loaded"
    readelf = shutil.which("readelf")
    if readelf is not None:
        text = subprocess.run([readelf, "-d", HERE.path], capture_output=True, text=True, check=True).stdout
        needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
        assert set(needed) <= {"libc.so.6", "libm.so.6"}
