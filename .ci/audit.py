# ruff: noqa: INP001 - a script
"""Known vulnerabilities of what is installed beside this Python, by pip-audit. Offline, or without it: one loud line.

Fails only on a vulnerability for which a mended version is out: nobody can act on the others, which are named all the
same. pip-audit lives in a folder of its own (`make audit` puts it there), so that it does not audit itself. Needs the
standard library alone.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

TOOL = Path(sys.prefix) / ".audit" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
LIMIT = 120.0  # seconds for all of it; a single request gets 10, and there are some hundred packages
OPTIONS = ["-m", "pip_audit", "--path", sysconfig.get_path("purelib"), "--skip-editable", "--progress-spinner", "off",
           "--timeout", "10", "--format", "json"]  # fmt: skip


def say(line: str) -> None:
    """One line, at once: CI shows it where it happens."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def skipped(why: str) -> int:
    """The audit did not take place, which must not be overlooked and must not fail an offline run."""
    say(f"!!! audit SKIPPED, NO DEPENDENCY WAS CHECKED: {why}")
    return 0


def main() -> int:
    """Returns the exit status: 1 if something can and should be mended."""
    python = str(TOOL) if TOOL.exists() else sys.executable
    if python == sys.executable and importlib.util.find_spec("pip_audit") is None:
        return skipped("pip-audit is not there and could not be installed; is there a network?")
    try:
        done = subprocess.run(  # noqa: S603 - a constant command
            [python, *OPTIONS], capture_output=True, text=True, check=False, timeout=LIMIT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return skipped(f"no answer within {LIMIT:g} s; is there a network?")
    except (OSError, ValueError, KeyError, TypeError) as error:  # it exits with 1 offline, as it does on a finding
        return skipped(f"pip-audit gave no list, {type(error).__name__}; is there a network?")
    # Where its data cannot be had, pip-audit says of each package that PyPI does not know it, and that all is well.
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return skipped(
            f"of {len(packages)} packages none could be looked up; can PyPI's vulnerability data be reached?"
        )
    found = [(package, flaw) for package in packages for flaw in package.get("vulns", [])]
    for package, flaw in found:
        mend = ", ".join(flaw.get("fix_versions", [])) or "none yet"
        say(f"{package['name']} {package.get('version', '?')}: {flaw['id']}; mended in: {mend}")
    for package in packages:
        if "skip_reason" in package:
            say(f"not audited: {package['skip_reason']}")
    say(f"audit: {len(asked)} of {len(packages)} packages looked up, {len(found)} known vulnerabilities")
    return int(any(flaw.get("fix_versions") for _, flaw in found))


if __name__ == "__main__":
    sys.exit(main())
