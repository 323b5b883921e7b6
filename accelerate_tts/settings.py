"""Options, the environment variables behind them, and the on/off/testing switch.

Each option has a variable with this library's prefix, `ACCELERATE_TTS_`; three older names, `TRANSLATOR_*`, are
read too. Where both are set, the library's own wins. docs/OPTIMIZATIONS_SUMMARY.md lists them all.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

from accelerate_tts.errors import SettingsError
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

__all__ = [
    "CompileMode",
    "Mode",
    "Settings",
    "check_mode",
    "is_active",
    "is_testing",
    "set_active",
    "testing",
]

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Mode = Literal["inference", "no_grad", "none"]
"""What runs around a call: `torch.inference_mode()`, `torch.no_grad()`, or neither."""

_DEVICES = ("cuda", "mps", "xpu", "cpu")


@dataclass(frozen=True)
class Settings:
    """How a `PerformanceOptimizer` behaves. Immutable; `Settings.from_environment()` reads the variables.

    Attributes:
        device: Device type to use instead of the detected one: "cuda", "mps", "xpu" or "cpu".
        compile: Whether `torch.compile` may be tried at all.
        compile_mode: A mode for `torch.compile`; `None` takes the device's own ("reduce-overhead" on CUDA,
            "default" elsewhere).
        cudnn_benchmark: Let cuDNN time its algorithms and keep the fastest (CUDA).
        tf32: Let matrix products and convolutions use TF32 (CUDA): about three decimal digits instead of seven.
        threads: Intra-op CPU threads of one process; `None` divides the usable cores by `workers`.
        workers: Worker processes that share this machine's cores.
        mps_high_watermark_ratio: Value of `PYTORCH_MPS_HIGH_WATERMARK_RATIO`. 0.0 means *no limit* on
            unified memory - it avoids out-of-memory errors of a large model and is no speed-up; `None` leaves
            PyTorch's own limit.
        tune_seconds: Wall-clock budget, in seconds, for trying optimisations on one loaded object. A stage that
            has begun (one compilation, say) is finished; no other begins after the budget is spent.

    Raises:
        SettingsError: A value is outside what its option takes.
    """

    device: str | None = None
    compile: bool = True
    compile_mode: CompileMode | None = None
    cudnn_benchmark: bool = True
    tf32: bool = True
    threads: int | None = None
    workers: int = 1
    mps_high_watermark_ratio: float | None = 0.0
    tune_seconds: float = 180.0

    def __post_init__(self) -> None:
        if self.device is not None and self.device not in _DEVICES:
            raise SettingsError(f"device={self.device!r} is not one of {', '.join(_DEVICES)}")
        for name in ("compile", "cudnn_benchmark", "tf32"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.compile_mode is not None and self.compile_mode not in get_args(CompileMode):
            modes = ", ".join(get_args(CompileMode))
            raise SettingsError(f"compile_mode={self.compile_mode!r} is not one of {modes}")
        for name in ("threads", "workers"):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(f"{name}={value!r} must be a whole number of at least 1")
        ratio = self.mps_high_watermark_ratio
        if ratio is not None and not (_is_number(ratio) and 0.0 <= ratio <= 2.0):  # noqa: PLR2004
            raise SettingsError(f"mps_high_watermark_ratio={ratio!r} must be None or between 0.0 and 2.0")
        if not (_is_number(self.tune_seconds) and 0.0 <= self.tune_seconds < float("inf")):
            raise SettingsError(f"tune_seconds={self.tune_seconds!r} must be a number of seconds, 0 or more")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from environment variables.

        Args:
            environment: The variables to read; `os.environ` if not given. An empty variable counts as not set.

        Raises:
            SettingsError: A variable's text cannot be read; the message names the variable, its value and
                what it takes.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for option in _OPTIONS:
            for variable in option.variables:
                text = environment.get(variable, "").strip()
                if text:
                    values[option.field] = option.read(variable, text)
                    break
        _report_unknown(environment)
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124


_WORDS = {
    "1": True, "true": True, "yes": True, "on": True,
    "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


def _flag(variable: str, text: str) -> bool:
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise SettingsError(f"{variable}={text!r} must be one of {', '.join(_WORDS)}") from None


def _text(_variable: str, text: str) -> str | None:
    return None if text.lower() in {"auto", "none"} else text


def _whole(variable: str, text: str) -> int | None:
    if text.lower() == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{variable}={text!r} must be a whole number") from None


def _number(variable: str, text: str) -> float | None:
    if text.lower() in {"none", "off"}:
        return None
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{variable}={text!r} must be a number") from None


@dataclass(frozen=True)
class _Option:
    field: str
    variables: tuple[str, ...]
    parse: Callable[[str, str], Any]

    def read(self, variable: str, text: str) -> Any:
        value = self.parse(variable, text)
        try:
            Settings(**{self.field: value})
        except SettingsError as error:  # name the variable, which the user knows, as well as the option
            raise SettingsError(f"{variable}={text!r}: {error}") from None
        return value


def _own(field: str, parse: Callable[[str, str], Any], *older: str) -> _Option:
    return _Option(field, (f"ACCELERATE_TTS_{field.upper()}", *older), parse)


_OPTIONS = (
    _own("device", _text),
    _Option("compile", ("ACCELERATE_TTS_TORCH_COMPILE", "TRANSLATOR_TORCH_COMPILE"), _flag),
    _own("compile_mode", _text, "TRANSLATOR_COMPILE_MODE"),
    _own("cudnn_benchmark", _flag, "TRANSLATOR_CUDNN_BENCHMARK"),
    _own("tf32", _flag),
    _own("threads", _whole),
    _own("workers", _whole),
    _own("mps_high_watermark_ratio", _number),
    _own("tune_seconds", _number),
)
if {option.field for option in _OPTIONS} != {field.name for field in fields(Settings)}:  # pragma: no cover
    raise AssertionError("every setting needs an environment variable")


_KNOWN = {variable for option in _OPTIONS for variable in option.variables} | {"ACCELERATE_TTS_DISABLE"}


def _report_unknown(environment: Mapping[str, str]) -> None:
    for variable in environment:
        if variable.startswith("ACCELERATE_TTS_") and variable not in _KNOWN:
            near = get_close_matches(variable, _KNOWN, n=1)
            hint = f"did you mean {near[0]}?" if near else "see docs/OPTIMIZATIONS_SUMMARY.md for the list"
            emit(NotApplied(variable, f"there is no such setting; {hint}"))


def check_mode(mode: str) -> None:
    """Raise `SettingsError` unless `mode` is one of "inference", "no_grad", "none"."""
    if mode not in get_args(Mode):
        raise SettingsError(f"mode={mode!r} is not one of {', '.join(get_args(Mode))}")


class _Switch:
    """Whether the decorators do anything, asked at each call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = True
        self.testing = 0


_switch = _Switch()


def set_active(active: bool) -> None:
    """Switch every decorator and context of this library on or off, in this process, from the next call on.

    `ACCELERATE_TTS_DISABLE=1` in the environment does the same from outside and wins over `set_active(True)`.
    """
    with _switch.lock:
        _switch.active = bool(active)


def is_active() -> bool:
    """Whether the decorators do anything at this moment.

    Raises:
        SettingsError: `ACCELERATE_TTS_DISABLE` has a value that is neither yes nor no.
    """
    if not _switch.active or _switch.testing:
        return False
    text = os.environ.get("ACCELERATE_TTS_DISABLE", "").strip()
    return not text or not _flag("ACCELERATE_TTS_DISABLE", text)


def is_testing() -> bool:
    """Whether any `testing()` scope is open in this process."""
    return _switch.testing > 0


@contextmanager
def testing() -> Generator[None, None, None]:
    """Make every decorator a pass-through while the scope is open: no tuning, no compiling, no mode.

    For a test suite, usually as an autouse fixture. Scopes may nest and overlap in any threads; they hold for the
    whole process until the last one is left.
    """
    with _switch.lock:
        _switch.testing += 1
    try:
        yield
    finally:
        with _switch.lock:
            _switch.testing -= 1


testing.__test__ = False  # type: ignore[attr-defined]  # its name would make pytest collect it where it is imported
