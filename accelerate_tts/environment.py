"""Environment variables as values for `Settings`, with events for unknown and contradictory ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.events import Event, NotApplied

Tell = Callable[[Event], object]

_WORDS = {
    "1": True, "true": True, "yes": True, "on": True,
    "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


def flag(variable: str, text: str) -> bool:
    """Parse a yes or no; raise SettingsError for other texts."""
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise SettingsError(f"{variable}={text!r} must be one of {', '.join(_WORDS)}") from None


def _text(_variable: str, text: str) -> str | None:
    return None if text.lower() in {"auto", "none"} else text


def _literal(_variable: str, text: str) -> str:
    return text


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

    def read(self, variable: str, text: str, check: Callable[[str, Any], object]) -> Any:
        value = self.parse(variable, text)
        try:
            check(self.field, value)
        except SettingsError as error:  # adds the variable's name, which the user knows
            said = "..." if self.field == "pack_key" else repr(text)  # a secret
            raise SettingsError(f"{variable}={said}: {error}") from None
        return value


def _own(field: str, parse: Callable[[str, str], Any], *older: str) -> _Option:
    return _Option(field, (f"ACCELERATE_TTS_{field.upper()}", *older), parse)


_OPTIONS = (
    _own("device", _text),
    _Option("compile", ("ACCELERATE_TTS_TORCH_COMPILE", "TRANSLATOR_TORCH_COMPILE"), flag),
    _own("compile_mode", _text, "TRANSLATOR_COMPILE_MODE"),
    _own("cudnn_benchmark", flag, "TRANSLATOR_CUDNN_BENCHMARK"),
    _own("tf32", flag),
    _own("threads", _whole),
    _own("workers", _whole),
    _own("mps_high_watermark_ratio", _number),
    _own("precision", _literal),
    _own("tune_seconds", _number),
    _own("tune_patience", _number),
    _own("retune", flag),
    _own("warmup_timeout", _number),
    _own("pack", flag),
    _own("pack_folder", _literal),
    _own("pack_limit_mb", _whole),
    _own("pack_key", _literal),
    _own("guard", flag),
    _own("guard_limit", _whole),
    _own("guard_weights", _literal),
)

# Variables that are no field of `Settings`: of the decorators' switch, the kernels, and the build of a wheel.
_READ_ELSEWHERE = {"ACCELERATE_TTS_DISABLE", "ACCELERATE_TTS_KERNELS", "ACCELERATE_TTS_PURE"}
VARIABLES = {variable for option in _OPTIONS for variable in option.variables} | _READ_ELSEWHERE
"""Names of all supported variables."""


def _report_unknown(environment: Mapping[str, str], tell: Tell) -> None:
    for variable in environment:
        if str(variable).startswith("ACCELERATE_TTS_") and variable not in VARIABLES:
            near = get_close_matches(variable, VARIABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else "see docs/OPTIMIZATIONS_SUMMARY.md for the list"
            tell(NotApplied(variable, f"there is no such setting; {hint}"))


def _report_set_aside(option: _Option, variable: str, text: str, winner: str, value: Any, tell: Tell) -> None:  # noqa: PLR0913, PLR0917
    """Report an older variable whose value differs from that of the newer one."""
    try:
        same = option.parse(variable, text) == value
    except SettingsError:
        same = False
    if not same:
        tell(NotApplied(f"{variable}={text!r}", f"{winner} says something else, and wins; unset one of the two"))


# Settings that have no effect beside another one, and the condition. Settings of packs always have one, since packs are
# also shipped.
_IDLE: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("compile_mode", "compile", lambda value: value is False),
    ("guard_limit", "guard", lambda value: value is False),
    ("workers", "threads", lambda value: value is not None),
)


def _report_contradictions(values: Mapping[str, Any], said: Mapping[str, str], tell: Tell) -> None:
    """Report a variable that has no effect because of another one."""
    for idle, other, wins in _IDLE:
        if idle in said and other in said and wins(values[other]):
            why = f"it has no effect beside {said[other]}={str(values[other])!r}; unset one of the two"
            tell(NotApplied(said[idle], why))


def read(environment: Mapping[str, str], check: Callable[[str, Any], object], tell: Tell) -> dict[str, Any]:
    """Read the settings that variables set. An empty variable counts as not set.

    Args:
        environment: The variables.
        check: Takes a setting's name and value, and raises `SettingsError` if the value is invalid.
        tell: Receives events about variables that have no effect.

    Returns:
        Values by the names of the settings.

    Raises:
        SettingsError: A variable's text is invalid. The message names the variable, its value and the valid values.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}  # the variable that each value came from
    for option in _OPTIONS:
        for variable in option.variables:
            text: Any = environment.get(variable, "")
            if not isinstance(text, str):
                raise SettingsError(f"{variable}={shown(text)} must be a text")
            text = text.strip()
            if text:
                if option.field in values:
                    _report_set_aside(option, variable, text, said[option.field], values[option.field], tell)
                else:
                    values[option.field], said[option.field] = option.read(variable, text, check), variable
    _report_unknown(environment, tell)
    _report_contradictions(values, said, tell)
    return values
