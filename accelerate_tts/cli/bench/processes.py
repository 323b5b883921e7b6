"""Starts the processes in which variants are measured, each with folders of the bench's own."""

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

__all__ = ["VariantError", "ask", "folders_of"]

_LIMIT_SECONDS = 7200.0


class VariantError(AccelerateTTSError):
    """A variant that gave no figures; the message says why."""


def ask(request: Request, folder: Path, python: Path | None = None, limit: float = _LIMIT_SECONDS) -> dict[str, Any]:
    """Measure a variant in a fresh process.

    Args:
        request: Which.
        folder: For the warm pack. What is compiled goes into a folder of this variant alone in it, so that a second
            process has nothing compiled but what the pack brings. The user's own packs are neither read nor written.
        python: The interpreter of another environment, which has this library and the system; this one if not given.
        limit: Seconds that it may take.

    Raises:
        VariantError: It failed, was killed (memory, mostly) or took longer than its limit.
    """
    with tempfile.TemporaryDirectory() as place:
        answer, complaints = Path(place) / "answer.json", Path(place) / "stderr"
        interpreter = str(python or sys.executable)
        command = [interpreter, "-m", "accelerate_tts.cli.bench.variant", json.dumps(asdict(request)), str(answer)]
        environment = {**os.environ, **folders_of(request, folder)}
        if python is not None:
            environment.pop("PYTHONPATH", None)  # this environment's packages are not that one's
        try:
            with complaints.open("wb") as stderr:
                code = subprocess.run(  # noqa: S603 - ourselves
                    command,
                    check=False,
                    env=environment,
                    stderr=stderr,
                    timeout=limit,
                ).returncode
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
    """The environment variables by which a process leaves the user's own packs and compiled files alone."""
    return {
        "ACCELERATE_TTS_PACK": "1",
        "ACCELERATE_TTS_PACK_FOLDER": str(folder / "packs"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"compiled-{request.variant}"),
    }


def _last_words(code: int, complaints: str) -> str:
    if code < 0:
        return f"its process was ended by signal {-code}; of memory, perhaps"
    return (complaints.strip().splitlines() or [f"its process ended with status {code}"])[-1]
