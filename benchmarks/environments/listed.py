"""The environments that users have, as `environments.toml` names them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench.systems import PARTS, SYSTEMS
from accelerate_tts.settings import check_precision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate_tts.settings import Precision

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILE = HERE / "environments.toml"


class EnvironmentsError(Exception):
    """The file or a requested name is invalid; the message says what to change."""


@dataclass(frozen=True)
class Extra:
    """A requirement that upstream does not state, and why it is needed.

    Attributes:
        requires: Requirement, as pip takes it.
        reason: Why nothing works without it.
        build: True if a package needs it to be built from its sources. It is installed first, and pip's own build
            environments are not used.
    """

    requires: str
    reason: str
    build: bool = False


@dataclass(frozen=True)
class Check:
    """A system that is tuned and timed in an environment.

    Attributes:
        system: A name that `accelerate-tts bench` takes; "describe" asks what `.ci/releases.py` asks of the first
            package of `upstream`.
        layers: Number of layers in place of all, for systems with layers; `--layers full` takes upstream's own number.
        tokens: Approximate number of tokens a call, for systems that write tokens.
        precision: Precision level of tuning.
        tune_seconds: The budget of tuning.
    """

    system: str
    layers: int | None = None
    tokens: int | None = None
    precision: Precision = "exact"
    tune_seconds: float = 60.0


@dataclass(frozen=True)
class Environment:
    """An environment of the file.

    Attributes:
        name: Name, as `ONLY=` takes it.
        python: The version of Python, as "3.11".
        requires: Requirements that a user gives pip, and nothing else.
        beside: Further requirements without which nothing works, each with its reason.
        extra: The extra of ours that is installed with the wheel, as "demo"; "" for none.
        upstream: The packages whose versions the page shows, next to those of torch and transformers.
        tests: Files and folders of tests.
        quick: Tests of a quick run; all if empty.
        checks: Systems that are tuned and timed.
        note: Further remark on the page.
    """

    name: str
    python: str
    requires: tuple[str, ...]
    beside: tuple[Extra, ...] = ()
    extra: str = ""
    upstream: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    note: str = ""


def environments(text: str) -> list[Environment]:
    """Return the environments of a file.

    Args:
        text: TOML; a table `[[environment]]` for each, and names for several paths of tests in `[tests]`.

    Raises:
        EnvironmentsError: A key, a value or a system is unknown, or two environments have one name.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EnvironmentsError(f"{FILE.name} is no TOML: {error}") from error
    several = content.get("tests", {})
    found = [_environment(table, several) for table in content.get("environment", [])]
    names = [one.name for one in found]
    if not names or len(names) != len(set(names)):
        raise EnvironmentsError(f"{FILE.name}: no environments, or two of one name: {', '.join(names)}")
    return found


def _environment(table: Mapping[str, Any], several: Mapping[str, list[str]]) -> Environment:
    name = table.get("name", "an environment without a name")
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        made["beside"] = tuple(Extra(**extra) for extra in table.get("beside", []))
        for key in ("tests", "quick"):
            made[key] = tuple(path for told in table.get(key, []) for path in several.get(told, [told]))
        made["checks"] = tuple(Check(**check) for check in table.get("checks", []))
        one = Environment(**made)
    except TypeError as error:
        raise EnvironmentsError(f"{FILE.name}, {name}: {error}") from error
    for check in one.checks:
        check_precision(check.precision)
        if check.system not in {*SYSTEMS, *PARTS, "describe"}:
            raise EnvironmentsError(f"{FILE.name}, {name}: {check.system!r} is not one of {[*SYSTEMS, *PARTS]}")
    missing = [path for path in (*one.tests, *one.quick) if not (ROOT / path).exists()]
    if missing or not one.requires or not all(extra.reason for extra in one.beside):
        raise EnvironmentsError(f"{FILE.name}, {name}: {missing or 'requires or a reason is empty'}")
    return one


def chosen(all_of_them: Sequence[Environment], names: Sequence[str]) -> list[Environment]:
    """Return the environments with these names, in the file's order; all without names.

    Raises:
        EnvironmentsError: The file does not have a name.
    """
    unknown = [name for name in names if name not in {one.name for one in all_of_them}]
    if unknown:
        known = ", ".join(one.name for one in all_of_them)
        raise EnvironmentsError(f"{', '.join(unknown)}: {FILE.name} has no such environment, but {known}")
    return [one for one in all_of_them if not names or one.name in names]
