"""The audit of dependencies: it fails on what can be mended, and offline it says loudly that nothing was checked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the source distribution has no .ci")


@pytest.fixture
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answering(monkeypatch: pytest.MonkeyPatch, audit: Any, answer: Any) -> None:
    def run(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "pip_audit"]
        assert options["timeout"] == audit.LIMIT
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer, returncode=1)

    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(audit.subprocess, "run", run)


UNKNOWN = [{"name": name, "skip_reason": f"Dependency not found on PyPI: {name}"} for name in ("torch", "wrapt")]
OFFLINE = [
    json.dumps({"dependencies": UNKNOWN, "fixes": []}),  # what it says where the registry has no vulnerability data
    "",
    "not json",
    "[]",
    "{}",
    subprocess.TimeoutExpired("pip_audit", 120),
    OSError("no such file"),
]


@pytest.mark.parametrize("answer", OFFLINE, ids=str)
def test_offline_it_says_so_and_passes(answer: Any, audit: Any, monkeypatch: Any, capsys: Any) -> None:
    answering(monkeypatch, audit, answer)
    assert audit.main() == 0
    line = capsys.readouterr().out
    assert line.startswith("!!! audit SKIPPED, NO DEPENDENCY WAS CHECKED: ")
    assert line.count("\n") == 1


def test_without_pip_audit_it_says_so_and_passes(audit: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(audit, "TOOL", tmp_path / "python")  # `make audit` may have been here before
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda _name: None)
    assert audit.main() == 0
    assert "pip-audit is not there" in capsys.readouterr().out


@pytest.mark.parametrize(("fixes", "status"), [(["2.0"], 1), ([], 0), (None, 0)])
def test_what_can_be_mended_fails(fixes: Any, status: int, audit: Any, monkeypatch: Any, capsys: Any) -> None:
    flaws = [] if fixes is None else [{"id": "PYSEC-1", "fix_versions": fixes}]
    packages = [{"name": "one", "version": "1.0", "vulns": flaws}, {"name": "local", "skip_reason": "not on PyPI"}]
    answering(monkeypatch, audit, json.dumps({"dependencies": packages, "fixes": []}))
    assert audit.main() == status
    said = capsys.readouterr().out
    assert f"audit: 1 of 2 packages looked up, {len(flaws)} known vulnerabilities\n" in said
    assert ("one 1.0: PYSEC-1; mended in: " in said) is (fixes is not None)
