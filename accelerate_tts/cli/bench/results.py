"""Results of the bench as one JSON document, of format 1; benchmarks/results/schema.json describes it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench import processes
from accelerate_tts.cli.bench.machine import machine
from accelerate_tts.cli.bench.variant import finite
from accelerate_tts.errors import AccelerateTTSError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from accelerate_tts.cli.bench.command import Options
    from accelerate_tts.cli.bench.report import Found


FORMAT = 1
"""Version of the document. It is raised when a field changes its meaning or goes; new fields do not raise it."""

_PACKAGES = (
    "accelerate_tts", "torch", "transformers", "chatterbox-tts", "chatterbox-light", "coqui-tts", "resemblyzer",
    "numpy", "torchao",
)  # fmt: skip
_ASK = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps([platform.python_version(), found]))
"""
_SECRET = {"ACCELERATE_TTS_PACK_KEY", "ACCELERATE_TTS_PACK_FOLDER"}  # a key, and a path of the user's
_VARIABLES = ("ACCELERATE_TTS_", "TRANSLATOR_", "OMP_", "MKL_", "TORCHINDUCTOR_MAX")
_FILES = {"json", "plot", "python"}  # options that are paths


def document(found: Sequence[Found], options: Options) -> dict[str, Any]:
    """Make the document of a run.

    Args:
        found: Measurements so far, by system.
        options: Options of the command.

    Returns:
        The document for JSON. Its `commit` is `None`: whoever stores it in a checkout knows which that is.
    """
    python, versions = _installed(options.python)
    now = datetime.now(timezone.utc)
    return {
        "format": FORMAT,
        "date": now.date().isoformat(),
        "time": f"{now:%H:%M:%S}",
        "commit": None,
        "machine": machine(),
        "python": python,
        "versions": versions,
        "environment": {
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and name not in _SECRET
        },
        "options": {name: value for name, value in asdict(options).items() if name not in _FILES},
        "systems": [finite(asdict(one)) for one in found],
    }  # fmt: skip


def _installed(python: Path | None) -> tuple[str | None, dict[str, str]]:
    """Return an interpreter's version and those of its packages, or this one's; nothing if it cannot be asked."""
    if python is None:
        return platform.python_version(), _versions()
    try:
        version, versions = json.loads(processes.output_of(python, _ASK, *_PACKAGES))
    except (AccelerateTTSError, ValueError):
        return None, {}
    return version, versions


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
