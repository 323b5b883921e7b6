"""Upstream's classes at small size, from the examples."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
UPSTREAMS = {"chatterbox_backend": "chatterbox.tts", "xtts_backend": "TTS.tts.models.xtts",
             "mms_backend": "transformers", "higgs_backend": "transformers.models.higgs_audio_v2"}  # fmt: skip


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example; the test is skipped where its upstream is not installed, or has not that model yet."""

    def load(name: str) -> ModuleType:
        pytest.importorskip(UPSTREAMS[name])
        return importlib.import_module(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield load
