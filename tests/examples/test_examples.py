"""Each example runs offline; without its few decorated lines it is the plain backend, and says the same."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from doubles import is_faster

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEAKING = ["chatterbox_backend", "higgs_backend", "mms_backend", "xtts_backend"]
NAMES = [*SPEAKING, "voice_clone_service"]
# Lines of this library in an example.
OURS = ("from accelerate_tts import", "@optimized_model", "@inference", "@cached_embedding", "print(receipt_of(")


def is_ours(line: str) -> bool:
    return line.strip().startswith(OURS)


def plain(source: str) -> str:
    return "".join(line for line in source.splitlines(keepends=True) if not is_ours(line))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decide: Any) -> Callable[[str], ModuleType]:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    # Every correct change is kept without timing: the test is that none of them can be heard.
    decide(compare=is_faster)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(tmp_path))

    def module(name: str) -> ModuleType:
        (tmp_path / f"plain_{name}.py").write_text(plain((EXAMPLES / f"{name}.py").read_text("utf-8")), "utf-8")
        sys.modules.pop(f"plain_{name}", None)
        importlib.invalidate_caches()
        return importlib.import_module(f"plain_{name}")

    return module


def heard(path: Path) -> np.ndarray:
    if path.suffix == ".json":
        return np.concatenate([np.array(voice) for voice in json.loads(path.read_text("utf-8")).values()])
    with wave.open(str(path), "rb") as file:
        assert file.getnchannels() == 1
        return np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768


@pytest.mark.parametrize("name", NAMES)
def test_decorated_differs_from_plain_by_a_handful_of_lines(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()
    ours = [line.strip() for line in lines if is_ours(line)]
    assert 4 <= len(ours) <= 6, ours
    left = plain((EXAMPLES / f"{name}.py").read_text("utf-8"))
    code = left.split('"""', 2)[2]  # behind the docstring, which names what to install
    assert "accelerate_tts" not in code
    compile(left, name, "exec")


def test_a_voice_is_embedded_once(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "2")
    module = importlib.import_module("voice_clone_service")
    service = module.VoiceCloneService(lambda: module.pretrained("cpu"), 1.6)
    asyncio.run(service.initialize())
    module.VoiceCloneService.embed.cache_clear()
    voices = {f"{pitch} Hz": service.embed(module.hum(pitch, 2.0)) for pitch in (100, 220)}
    assert service.nearest(module.hum(220, 2.0), voices) == "220 Hz"
    info = module.VoiceCloneService.embed.cache_info()
    assert (info.hits, info.misses) == (1, 2)


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, ()) for name in NAMES), *(("chatterbox_backend", ("--variant", v)) for v in ("multilingual", "turbo"))],
)
def test_it_runs_offline_and_says_what_the_plain_one_says(
    name: str,
    more: tuple[str, ...],
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain_module, module = load(name), importlib.import_module(name)
    suffix = ".wav" if name in SPEAKING else ".json"
    text = ["Hello there."] if name in SPEAKING else []
    speed = ["--seconds", "0.4"] if name in SPEAKING else []
    results = []
    for which, run in (("plain", plain_module.main), ("decorated", module.main)):
        path = tmp_path / f"{which}{suffix}"
        run([*text, "--random-weights", "--tiny", "--tune-seconds", "60", *speed, *more, "-o", str(path)])
        printed = capsys.readouterr().out
        assert ("tuning took" in printed) == (which == "decorated")
        results.append(heard(path))
    reference, tuned = results
    assert reference.size > 200
    assert np.abs(reference).max() > 0
    assert tuned.shape == reference.shape
    # 16 bits round: a step of one is the most that an exact change can move a sample by.
    assert np.abs(tuned - reference).max() <= 1.01 / 32768
