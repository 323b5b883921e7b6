"""Examples with upstream's models at small size."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
UPSTREAMS = {"chatterbox_backend": "chatterbox.tts", "higgs_backend": "transformers.models.higgs_audio_v2"}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports an example; the test is skipped where its upstream is not installed, or has not that model yet."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> Any:
        pytest.importorskip(UPSTREAMS[name])
        return importlib.import_module(name)

    return load
