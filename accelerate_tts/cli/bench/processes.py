"""Processes in which variants are measured, with separate folders for packs and compiled code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate_tts.cli.bench.variant import NO_ANSWER, Request
from accelerate_tts.errors import AccelerateTTSError

_LIMIT_SECONDS = 7200.0


class VariantError(AccelerateTTSError):
    """A variant failed; the message says why."""


def ask(request: Request, folder: Path, python: Path | None = None, limit: float = _LIMIT_SECONDS) -> dict[str, Any]:
    """Measure a variant in a fresh process.

    Args:
        request: The variant.
        folder: Folder of the warm pack. Compiled code goes into a subfolder of each variant, so that a second process
            has only the code that the pack brings. The user's own packs are neither read nor written.
        python: Interpreter of another environment with this library and the system; by default this one.
        limit: Time limit in seconds.

    Raises:
        VariantError: The process failed, was killed (mostly for memory) or exceeded its time limit.
    """
    with tempfile.TemporaryDirectory() as place:
        answer, complaints = Path(place) / "answer.json", Path(place) / "stderr"
        interpreter = sys.executable
        if python is not None:  # absolute, but not resolved: an environment's python is a link; a bare name is on PATH
            interpreter = str(python if python.parent == Path() else python.absolute())
        command = [interpreter, "-m", "accelerate_tts.cli.bench.variant", json.dumps(asdict(request)), str(answer)]
        environment = {**os.environ, **folders_of(request, folder)}
        if python is not None:
            environment.pop("PYTHONPATH", None)  # it names packages of this environment
        try:
            with complaints.open("wb") as stderr:
                code = subprocess.run(  # noqa: S603 - ourselves
                    command, check=False, env=environment, stderr=stderr, timeout=limit,
                    # `-m` would import a checkout in the present folder in place of what that environment has.
                    cwd=None if python is None else place,
                ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise VariantError(f"it took longer than {limit:g} s") from error
        except OSError as error:
            raise VariantError(f"{interpreter} could not be started: {error}") from error
        if not answer.exists():
            raise VariantError(_last_words(code, complaints.read_text("utf-8", "replace")))
        content: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    if NO_ANSWER in content:
        raise VariantError(content[NO_ANSWER])
    return content


def folders_of(request: Request, folder: Path) -> dict[str, str]:
    """Return the environment variables that keep a process off the user's own packs and compiled code."""
    return {
        "ACCELERATE_TTS_PACK": "1",
        "ACCELERATE_TTS_PACK_FOLDER": str(folder.absolute() / "packs"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder.absolute() / f"compiled-{request.variant}"),
    }


def _last_words(code: int, complaints: str) -> str:
    if code < 0:
        return f"its process was ended by signal {-code}, perhaps for lack of memory"
    return (complaints.strip().splitlines() or [f"its process ended with status {code}"])[-1]


def output_of(python: Path, code: str, *arguments: str) -> str:
    """Run a few lines in an interpreter, from its own folder, and return what they print.

    Args:
        python: The interpreter.
        code: The lines.
        arguments: What they find in `sys.argv`.

    Raises:
        VariantError: It cannot be started, fails, or takes over a minute.
    """
    command = [str(python), "-c", code, *arguments]
    try:
        return subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=60, check=True, cwd=python.parent
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise VariantError(f"{python}: {error}") from error
