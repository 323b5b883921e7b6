"""Results of the bench as one JSON document, of format 1; benchmarks/results/schema.json describes it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench.machine import machine
from accelerate_tts.cli.bench.variant import finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate_tts.cli.bench.command import Options
    from accelerate_tts.cli.bench.report import Found


FORMAT = 1
"""Version of the document. It is raised when a field changes its meaning or goes; new fields do not raise it."""

_PACKAGES = (
    "accelerate_tts", "torch", "transformers", "chatterbox-tts", "chatterbox-light", "coqui-tts", "resemblyzer",
    "numpy", "torchao",
)  # fmt: skip
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
    other = options.python is not None  # then only the receipts know what is installed there
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": None,
        "machine": machine(),
        "python": None if other else platform.python_version(),
        "versions": {} if other else _versions(),
        "environment": {
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and name not in _SECRET
        },
        "options": {name: value for name, value in asdict(options).items() if name not in _FILES},
        "systems": [finite(one.as_dict()) for one in found],
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
