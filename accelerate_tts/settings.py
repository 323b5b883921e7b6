"""Options, their environment variables, and the switches for activity and testing.

Each option has a variable with the prefix `ACCELERATE_TTS_`; three older names, `TRANSLATOR_*`, are read too. If both
are set, the former wins. docs/OPTIMIZATIONS_SUMMARY.md lists them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from accelerate_tts.environment import flag, read
from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.events import Event, emit
from accelerate_tts.locks import lock

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Mode = Literal["inference", "no_grad", "none"]
"""Mode around a call: `torch.inference_mode()`, `torch.no_grad()`, or neither."""

Precision = Literal["exact", "balanced", "fast"]
"""Precision level of tuning: rounding only; half-precision weights; 8-bit weights, too."""

EXACT_TOLERANCE = 1e-4
"""The relative error up to which two fp32 results count as the same computation.

float32 rounds at 6e-8. Another order of the same sums, through the hundred layers of a vocoder, was seen to reach some
1e-6 ("exact" means to rounding); a bf16 anywhere costs 1e-3 and more. The limit lies between the two.
"""

GuardWeights = Literal["memory", "disk", "reload"]
"""Storage of original weights that tuning duplicated."""

DEVICES = ["cuda", "mps", "xpu", "cpu"]
"""torch's names of the device types, best first. `register_device` adds to them."""
_MOST = 2**31 - 1  # what torch takes as a number of threads
_LONGEST = 1e9  # seconds, some thirty years: a time that a clock's can be added to


@dataclass(frozen=True)
class Settings:
    """Settings of a `PerformanceOptimizer`. Immutable; `Settings.from_environment()` reads the variables.

    Attributes:
        device: Device type to use instead of the detected one: "cuda", "mps", "xpu" or "cpu".
        compile: Allow stages that use `torch.compile`.
        compile_mode: Mode of `torch.compile`; `None` selects the device's default ("reduce-overhead" on CUDA,
            "default" elsewhere).
        cudnn_benchmark: Let cuDNN time its algorithms and use the fastest (CUDA, without ROCm).
        tf32: Let matrix products and convolutions use TF32 (CUDA): about three decimal digits instead of seven.
        threads: Intra-op CPU threads of one process; `None` divides the usable cores by `workers`.
        workers: Number of worker processes that share this machine's cores.
        mps_high_watermark_ratio: Value of `PYTORCH_MPS_HIGH_WATERMARK_RATIO`. 0.0 means *no limit* on unified memory:
            it avoids out-of-memory errors of a large model, and is not a speed-up. `None` keeps PyTorch's own limit.
        precision: Precision level of tuning. "exact": rounding only, a relative error of at most 1e-4. "balanced":
            half-precision weights where they are faster, an error of at most 2e-2. "fast": 8-bit weights, too, 4e-2.
        tune_seconds: Wall-clock budget, in seconds, for trying optimisations on one loaded object. No stage begins
            after it is spent. A stage that is being prepared, or runs for the first time, is interrupted 10 seconds
            later. Up to a third is reserved for the check of the whole, which always runs and may take longer.
        tune_patience: Total seconds that tuning one object waits for a busy machine to become quiet, at most a quarter
            of `tune_seconds`. Verdicts on a busy machine are not final; see `retune`.
        retune: Let a load from a warm pack repeat the trials of an earlier process on a busy machine, if the machine is
            quiet now. If off, a load from a warm pack always takes the time of a few passes.
        warmup_timeout: Seconds after which a warm-up call is given up, and the model stays as loaded; `None` is no
            limit. It is meant for calls that never return: 600 is far more than a cold call with "max-autotune" takes.
        pack: Store the result of tuning in a warm pack on disk, and use an existing pack.
        pack_folder: Folder of warm packs; `None` selects the user's cache folder (`$XDG_CACHE_HOME/accelerate_tts`).
        pack_limit_mb: Maximum megabytes of the folder. The least recently used packs are removed first.
        pack_key: A secret text that machines share whose packs trust each other's compiled code; `None` selects a
            random one of this user. Code in a pack signed with another key is never loaded.
        guard: Check the outputs of `@inference` calls of tuned objects, and repeat a faulty call on the untouched
            model.
        guard_limit: Number of faulty outputs after which an object's tuning is undone for good.
        guard_weights: Storage of original weights that tuning duplicated ("balanced", "fast"). Only a second attempt,
            `undo` and `state_dict` read them. "memory": in place. "disk": in an unnamed file in `pack_folder`, mapped
            to their addresses (Linux), so that they take no memory until they are read. "reload": freed, and loaded
            again by the decorated load function when they are read. The function is called once more at the start, to
            check that it returns the same weights.

    Raises:
        SettingsError: A value is invalid.
    """

    device: str | None = None
    compile: bool = True
    compile_mode: CompileMode | None = None
    cudnn_benchmark: bool = True
    tf32: bool = True
    threads: int | None = None
    workers: int = 1
    mps_high_watermark_ratio: float | None = 0.0
    precision: Precision = "exact"
    tune_seconds: float = 180.0
    tune_patience: float = 15.0
    retune: bool = True
    warmup_timeout: float | None = 600.0
    pack: bool = True
    pack_folder: str | None = None
    pack_limit_mb: int = 2048
    pack_key: str | None = field(default=None, repr=False)
    guard: bool = True
    guard_limit: int = 3
    guard_weights: GuardWeights = "memory"

    def __post_init__(self) -> None:
        if self.device is not None:
            _check_name("device", self.device, tuple(DEVICES))
        for name in ("compile", "cudnn_benchmark", "tf32", "retune", "pack", "guard"):
            if not _is_flag(getattr(self, name)):
                raise SettingsError(f"{name}={shown(getattr(self, name))} must be True or False")
        if self.compile_mode is not None:
            _check_name("compile_mode", self.compile_mode, get_args(CompileMode))
        for name in ("threads", "workers", "pack_limit_mb", "guard_limit"):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
                raise SettingsError(f"{name}={shown(value)} must be a whole number of at least 1 and at most {_MOST}")
        ratio = self.mps_high_watermark_ratio
        if ratio is not None and not (_is_number(ratio) and 0.0 <= ratio <= 2.0):  # noqa: PLR2004
            raise SettingsError(f"mps_high_watermark_ratio={shown(ratio)} must be None or between 0.0 and 2.0")
        check_precision(self.precision)
        _check_name("guard_weights", self.guard_weights, get_args(GuardWeights))
        check_tune_seconds(self.tune_seconds)
        check_tune_seconds(self.tune_patience, "tune_patience")
        _check_warmup_timeout(self.warmup_timeout)
        if self.pack_folder is not None:
            check_folder("pack_folder", self.pack_folder)
        _check_text("pack_folder", self.pack_folder)
        _check_text("pack_key", self.pack_key)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, *, tell: Callable[[Event], object] = emit
    ) -> Settings:
        """Read the settings from environment variables.

        Args:
            environment: The variables to read; `os.environ` if not given. An empty variable counts as not set.
            tell: Receives events about variables that have no effect.

        Raises:
            SettingsError: A variable's text is invalid. The message names the variable, its value and the valid values.
        """
        given: Any = os.environ if environment is None else environment
        if not isinstance(given, Mapping):
            raise SettingsError(f"environment={shown(given)} must be None or a mapping of names to texts")
        return cls(**read(given, lambda name, value: cls(**{name: value}), tell))


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124


def check_mode(mode: str) -> None:
    """Raise `SettingsError` unless `mode` is one of "inference", "no_grad", "none"."""
    _check_name("mode", mode, get_args(Mode))


def is_path(value: object) -> bool:
    """Check that a value is a valid path, as a text or a path object."""
    try:
        path: Any = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        return isinstance(path, str) and bool(path) and b"\0" not in os.fsencode(path)
    except (TypeError, ValueError):  # an object that is not a path, or characters that no file name may have
        return False


def check_folder(name: str, folder: object) -> None:
    """Raise `SettingsError` unless `folder` is a valid path, as a text or a path object."""
    if not is_path(folder):
        raise SettingsError(f"{name}={shown(folder)} must be None or the path of a folder")


def _check_name(name: str, value: object, allowed: tuple[str, ...]) -> None:
    # Only texts are compared: the == of an array has no truth value.
    if not (isinstance(value, str) and value in allowed):
        raise SettingsError(f"{name}={shown(value)} is not one of {', '.join(allowed)}")


def _check_text(name: str, text: object) -> None:
    if text is None:
        return
    if not (isinstance(text, str) and text):
        # A value of a wrong type is not a secret, and an empty text reveals none.
        raise SettingsError(f"{name}={shown(text)} must be None or a text that is not empty")
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise SettingsError(f"{name}= holds characters that cannot be written as UTF-8") from None


def check_precision(precision: str) -> None:
    """Raise `SettingsError` unless `precision` is one of "exact", "balanced", "fast"."""
    _check_name("precision", precision, get_args(Precision))


def check_tune_seconds(seconds: float, name: str = "tune_seconds") -> None:
    """Raise `SettingsError` unless `seconds` is a budget: a number from 0 to 1e9."""
    if not (_is_number(seconds) and 0.0 <= seconds <= _LONGEST):
        raise SettingsError(f"{name}={shown(seconds)} must be a number of seconds, 0 or more, at most 1e9")


def _check_warmup_timeout(seconds: float | None) -> None:
    if seconds is not None and not (_is_number(seconds) and 0.0 < seconds <= _LONGEST):
        raise SettingsError(
            f"warmup_timeout={shown(seconds)} must be None or a number of seconds, more than 0 and at most 1e9"
        )


class _Switch:
    """State of the decorators' switch, read at each call."""

    def __init__(self) -> None:
        self.lock = lock()
        self.active = True
        self.testing: set[object] = set()  # open scopes


_switch = _Switch()


def set_active(active: bool) -> None:
    """Switch all decorators and contexts of this library on or off in this process, from the next call on.

    `ACCELERATE_TTS_DISABLE=1` in the environment switches them off, and wins over `set_active(True)`.

    Raises:
        SettingsError: `active` is neither `True` nor `False`. The text "no" would otherwise count as true.
    """
    if not _is_flag(active):
        raise SettingsError(f"active={shown(active)} must be True or False")
    with _switch.lock:
        _switch.active = active


def is_active() -> bool:
    """Check that the decorators are active now.

    Raises:
        SettingsError: `ACCELERATE_TTS_DISABLE` has a value that is neither yes nor no.
    """
    if not _switch.active or _switch.testing:
        return False
    text = os.environ.get("ACCELERATE_TTS_DISABLE", "").strip()
    return not text or not flag("ACCELERATE_TTS_DISABLE", text)


def is_testing() -> bool:
    """Check that a `testing()` scope is open in this process."""
    return bool(_switch.testing)


@contextmanager
def testing() -> Generator[None, None, None]:
    """Make every decorator a pass-through while the scope is open: no tuning, no compiling, no mode.

    For test suites, usually as an autouse fixture. Scopes may nest and overlap in any threads, and apply to the whole
    process until the last one ends.
    """
    scope = object()
    try:
        _switch.testing.add(scope)
        yield
    finally:
        _switch.testing.discard(scope)


testing.__test__ = False  # type: ignore[attr-defined]  # pytest would otherwise collect it for its name
