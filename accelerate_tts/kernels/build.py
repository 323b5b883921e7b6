"""Build of the kernels' library from `csrc/` by the local C++ compiler.

Platform wheels are built with it (hatch_build.py), so installing a wheel compiles nothing. In a checkout that is used
without installing it::

    python -m accelerate_tts.kernels.build

Each unit is compiled once for each instruction set, and all objects go into one library. It links neither torch nor
Python nor OpenMP; `library.py` hands it the OpenMP that torch has loaded. While a wheel is built, this file runs alone
and cannot import the package. It is not part of the wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_HERE = Path(__file__).parent
TOKENS = ("skinny_gemm", "decoder_block")
SEQUENCES = ("packed_gemm", "transformer_block", "residual_block", "toom_cook")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_VNNI = (*_AVX512, "-mavx512vnni")
_BF16 = (*_VNNI, "-mavx512bf16")
# The plainest first: of identical inline definitions, linkers keep the first, which must run on every processor.
X86: dict[str, tuple[str, ...]] = {
    "base": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512vnni": _VNNI,
    "avx512bf16": _BF16,
    "amx": (*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
# Instruction sets that gain nothing for decode steps, or for sequences. These use the kernels of the level below.
_NOT_FOR_TOKENS, _NOT_FOR_SEQUENCES = {"avx512bf16"}, {"avx512vnni"}
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fopenmp-simd",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
    "-Wno-unknown-warning-option", "-Wno-ignored-attributes",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC's own headers (bug 105593)
)  # fmt: skip


class BuildError(RuntimeError):
    """The compiler failed; the message has its output."""


class NoCompilerError(BuildError):
    """No C++ compiler was found."""


def build(target: Path | None = None, *, machine: str = "", tests: bool = False) -> Path:
    """Compile and link the library.

    Args:
        target: A folder, or the file's path. By default the folder of this file.
        machine: Target processor, as `platform.machine()` names it; by default this one. `CXX` must name a compiler for
            it.
        tests: Build a program of `csrc/tests` and the kernels instead, which compares them with plain loops.

    Returns:
        Path of the result.

    Raises:
        NoCompilerError: There is no C++ compiler: none of `CXX`, c++, g++ and clang++.
        BuildError: The compiler failed.
    """
    place: Path = target or _HERE
    name: str = _structs().library_name()
    place = place / name if place.is_dir() else place
    compiler = _compiler()
    file, text = _HERE / "csrc" / "abi.h", _structs().header()
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(path) for path in _compiled(compiler, Path(folder), machine or platform.machine())]
        made = Path(folder) / place.name
        if tests:
            sources = [str(path) for path in sorted((_HERE / "csrc" / "tests").glob("*.cpp"))]
            _run([*compiler, "-std=c++17", "-O1", "-pthread", "-static-libstdc++", *sources, *objects, "-o", str(made)])
        else:
            _run([*compiler, *_linking(), "-o", str(made), *objects])
        place.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target and renamed, so that a process with the old library mapped keeps it.
        beside = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            shutil.copyfile(made, beside)
            beside.chmod(0o755)
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
    return place


def _compiled(compiler: list[str], folder: Path, machine: str) -> list[Path]:
    """Compile all units for all instruction sets; return the objects in link order."""

    def compiled(job: tuple[str, str, list[str]]) -> Path:
        unit, level, flags = job
        made = folder / f"{unit}.{level}.o"
        _run([*compiler, *_flags(), *flags, "-c", str(_HERE / "csrc" / f"{unit}.cpp"), "-o", str(made)])
        return made

    jobs = jobs_of(_levels(compiler, machine, folder))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compiled, jobs))


def jobs_of(levels: dict[str, tuple[str, ...]]) -> list[tuple[str, str, list[str]]]:
    """Return the compilations: a unit, its instruction set, and its flags."""
    tokens, sequences = _taken(levels, _NOT_FOR_TOKENS), _taken(levels, _NOT_FOR_SEQUENCES)
    listed = " ".join(f"X({level},{tokens[level]},{sequences[level]})" for level in levels)
    jobs: list[tuple[str, str, list[str]]] = [
        ("dispatch", "", [f"-DKERNELS_LEVELS(X)={listed}"]), ("weight_digests", "", []),
    ]  # fmt: skip
    for level, flags in levels.items():
        units = (*(TOKENS if tokens[level] == level else ()), *(SEQUENCES if sequences[level] == level else ()))
        jobs += [(unit, level, [f"-DKERNELS_LEVEL={level}", *flags]) for unit in units]
    return jobs


def write_commands() -> Path:
    """Write `csrc/compile_commands.json` for clangd and clang-tidy, with each unit at each instruction set.

    Returns:
        Path of the file.

    Raises:
        NoCompilerError: As for `build`.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as folder:
        levels = _levels(compiler, platform.machine(), Path(folder))
    commands = [
        {
            "directory": str(_HERE / "csrc"),
            "file": f"{unit}.cpp",
            "arguments": [*compiler, *_flags(), *flags, f"{unit}.cpp"],
        }
        for unit, _, flags in reversed(jobs_of(levels))  # clangd uses the first, so the best level comes first
    ]
    target = _HERE / "csrc" / "compile_commands.json"
    target.write_text(json.dumps(commands, indent=1), encoding="utf-8")
    return target


def _taken(levels: Iterable[str], without: set[str]) -> dict[str, str]:
    """Map each instruction set to the one whose kernels it uses: itself, or the level below."""
    taken, last = dict[str, str](), ""
    for level in levels:
        last = last if level in without else level
        taken[level] = last
    return taken


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(candidate[0]):
            return candidate
    looked = f"CXX={shlex.join(named)} is not there" if named else "neither c++, g++ nor clang++ is on PATH"
    raise NoCompilerError(f"{looked}: install a C++ compiler (Debian: apt install g++; macOS: xcode-select --install)")


def _flags() -> list[str]:
    return [flag for flag in _FLAGS if not (sys.platform == "win32" and flag == "-fPIC")]


def _linking() -> list[str]:
    if sys.platform == "darwin":
        return ["-dynamiclib", "-Wl,-dead_strip"]
    if sys.platform == "win32":
        return ["-shared"]
    return ["-shared", "-Wl,--as-needed,--gc-sections,-z,noexecstack,-z,relro,-z,now", "-static-libgcc"]


def _levels(compiler: list[str], machine: str, folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the instruction sets of this processor family that the compiler supports."""
    if machine.lower() not in {"x86_64", "amd64"}:
        return {"base": ()}
    probe = folder / "probe.cpp"
    probe.write_text("#include <immintrin.h>\n", encoding="utf-8")

    def known(flags: tuple[str, ...]) -> bool:
        command = [*compiler, *flags, "-c", str(probe), "-o", str(folder / "probe.o")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603

    return {level: flags for level, flags in X86.items() if known(flags)}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the compiler
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr.strip()}")
    warnings = [line for line in done.stderr.splitlines() if ": warning:" in line]
    if warnings:
        sys.stderr.write("\n".join(warnings) + "\n")


def _structs() -> Any:
    spec = importlib.util.spec_from_file_location("_accelerate_tts_structs", _HERE / "structs.py")
    if spec is None or spec.loader is None:  # never for an existing file
        raise BuildError("structs.py cannot be read")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m accelerate_tts.kernels.build", description="Build the kernels.")
    parser.add_argument("--target", type=Path, help="a folder or a file; beside build.py by default")
    parser.add_argument("--machine", default="", help="the processor it is for, if CXX is a cross compiler")
    parser.add_argument("--tests", action="store_true", help="a program that compares the kernels with plain loops")
    parser.add_argument("--commands", action="store_true", help="write csrc/compile_commands.json, and build nothing")
    given = parser.parse_args()
    if given.commands:
        sys.stdout.write(f"{write_commands()}\n")
        return
    if given.tests and given.target is None:
        parser.error("--tests needs --target")
    sys.stdout.write(f"{build(given.target, machine=given.machine, tests=given.tests)}\n")


if __name__ == "__main__":
    _main()
