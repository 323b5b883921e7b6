"""CONTRIBUTING.md is followed: each file that it describes is written where it says, and works."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import accelerate_tts.device.kinds
import accelerate_tts.models
import accelerate_tts.stages
import accelerate_tts.stages.vocoder
from accelerate_tts import Event, PerformanceOptimizer, Settings
from accelerate_tts.device import setup
from accelerate_tts.device.detect import SPECS, DeviceInfo, detect
from accelerate_tts.events import Prepared
from accelerate_tts.models import describe
from accelerate_tts.models.catalogue import SYSTEMS
from accelerate_tts.settings import DEVICES
from accelerate_tts.stages.catalogue import STAGES, default_stages

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
PACKAGES = (accelerate_tts.stages.vocoder, accelerate_tts.models, accelerate_tts.device.kinds)


@pytest.fixture(autouse=True)
def contributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with these files, which the packages see beside their own."""
    for path, code in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code, encoding="utf-8")
    devices = list(DEVICES)
    with STAGES.scope(), SYSTEMS.scope(), SPECS.scope():
        for package in PACKAGES:
            folder = tmp_path.joinpath(*package.__name__.split("."))
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        importlib.invalidate_caches()
        yield
    DEVICES[:] = devices
    for path in FILES:
        sys.modules.pop(module_name(path), None)


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def load(path: str) -> ModuleType:
    """Import a file as the registries do: by the name under which its package lists it."""
    name = module_name(path)
    package = importlib.import_module(name.rpartition(".")[0])
    assert name in {found.name for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")}
    return importlib.import_module(name)


def test_there_is_a_file_of_each_kind() -> None:
    assert list(FILES) == [
        "accelerate_tts/stages/vocoder/snake.py",
        "tests/stages/vocoder/test_snake.py",
        "accelerate_tts/models/snake_vocoder.py",
        "accelerate_tts/device/kinds/hpu.py",
    ]
    assert PAGE.count("```python") == len(FILES), "every block is the whole of a file"


def test_a_stage(decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load("accelerate_tts/stages/vocoder/snake.py")
    names = [stage.name for stage in default_stages("cpu", None)]
    assert names.index("channels-last convolutions") < names.index("snake in place")
    test: dict[str, Any] = {"__name__": "test_snake"}
    exec(FILES["tests/stages/vocoder/test_snake.py"], test)  # noqa: S102 - our own page
    test["test_it_is_kept_and_undone"](decide, monkeypatch)


def test_a_system() -> None:
    test: dict[str, Any] = {"__name__": "test_snake"}
    exec(FILES["tests/stages/vocoder/test_snake.py"], test)  # noqa: S102 - our own page
    load("accelerate_tts/models/snake_vocoder.py")
    plan = describe(test["SnakeVocoder"]())
    assert [(part.name, part.kind) for part in plan.parts] == [("encoder", "encoder"), ("body", "vocoder")]


def test_a_device(monkeypatch: pytest.MonkeyPatch, seen: list[Event]) -> None:
    """Stands in for torch's module of a device that is not here."""
    load("accelerate_tts/device/kinds/hpu.py")
    assert detect().kind != "hpu", "there is none yet"
    done: list[str] = []
    hpu = SimpleNamespace(
        is_available=lambda: True,
        get_device_name=lambda: "stand-in",
        mem_get_info=lambda: (3 << 30, 4 << 30),
        empty_cache=lambda: done.append("emptied"),
    )
    monkeypatch.setattr(torch, "hpu", hpu, raising=False)
    device = detect("hpu")
    assert device == detect() == DeviceInfo("hpu", "stand-in", 4 << 30)
    optimizer = PerformanceOptimizer(Settings(device="hpu"))
    assert optimizer.initialize() == torch.device("hpu")
    try:
        assert [event.device for event in seen if isinstance(event, Prepared)] == ["hpu (stand-in)"]
        assert setup.compile_mode(device, optimizer.settings) is None
        assert optimizer.get_optimal_batch_size(item_bytes=1 << 30) >= 1
        assert "bf16 part" in [stage.name for stage in default_stages("hpu", None, "balanced")]
        optimizer.cleanup_memory(force=True)
        assert done == ["emptied"]
    finally:
        optimizer.close()
