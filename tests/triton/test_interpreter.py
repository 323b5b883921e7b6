"""The tests of this folder, each file in a process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_token_block.py", "test_token_kernels.py"])
def test_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", str(FOLDER / file)]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[1], check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


def test_every_file_is_run() -> None:
    assert {path.name for path in FOLDER.glob("test_token_*.py")} == {"test_token_block.py", "test_token_kernels.py"}
