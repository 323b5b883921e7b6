"""Other packages name modules by entry points; a broken one costs an event, and never a load."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event, get_performance_optimizer, receipt_of
from accelerate_tts.events import NotApplied
from accelerate_tts.models import Part, describe, register_system
from accelerate_tts.models.catalogue import SYSTEMS
from accelerate_tts.registration import Registry
from accelerate_tts.stages.catalogue import STAGES, default_stages
from doubles import is_faster

STAGE = """
from accelerate_tts.stages import BaseStage, register_stage

@register_stage
class Mine(BaseStage):
    name = "{name}"

    def applies(self, part):
        return "nothing to do"

    def prepare(self, part):
        raise AssertionError
"""
SYSTEM = """
from accelerate_tts.models import Known, register_system

register_system("{name}")(Known("theirs", "1.0", {{"body": "vocoder"}}))
"""


@pytest.fixture(autouse=True)
def own_registries() -> Iterator[None]:
    with STAGES.scope(), SYSTEMS.scope():
        yield


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package as pip does: a module, and metadata with an entry point that names it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def installed(module: str, code: str, group: str, target: str = "") -> None:
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
        (metadata / "entry_points.txt").write_text(f"[{group}]\nfast = {target or module}\n", encoding="utf-8")
        modules.append(module)
        importlib.invalidate_caches()

    yield installed
    for module in modules:
        sys.modules.pop(module, None)


def tried() -> list[str]:
    return [stage.name for stage in default_stages("cpu", None)]


def test_a_stage_of_an_installed_package_is_tried(install: Callable[..., None], seen: list[Event]) -> None:
    ours = tried()
    install("their_stages", STAGE.format(name="theirs"), "accelerate_tts.stages")
    assert tried() == [*ours, "theirs"]
    assert not seen


class TheirVocoder(nn.Module):
    """A system that nobody has told us about."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv1d(1, 1, 3)


def test_a_system_of_an_installed_package_is_known(install: Callable[..., None], seen: list[Event]) -> None:
    assert [part.kind for part in describe(TheirVocoder()).parts] == ["model"]
    install("their_systems", SYSTEM.format(name="TheirVocoder"), "accelerate_tts.systems")
    assert [(part.name, part.kind) for part in describe(TheirVocoder()).parts] == [("body", "vocoder")]
    assert not seen


@pytest.mark.parametrize(
    ("code", "target", "reason"),
    [
        ("raise OSError('no licence')", "", "OSError: no licence"),
        ("import nobody_has_this", "", "No module named 'nobody_has_this'"),
        ("", "", "registers nothing"),
        ("", ":Missing", "has no attribute 'Missing'"),
        (STAGE.format(name="half done") + "raise OSError('later')", "", "OSError: later"),
        (STAGE.format(name="torch.compile"), "", "'torch.compile' is registered already"),
        (STAGE.format(name=""), "", "the stage Mine has no name"),
    ],
)
def test_a_broken_plugin_is_named_once(
    code: str, target: str, reason: str, install: Callable[..., None], seen: list[Event], request: pytest.FixtureRequest
) -> None:
    ours = tried()
    module = f"broken_{request.node.callspec.indices['code']}"
    install(module, code, "accelerate_tts.stages", module + target)
    assert tried() == ours
    assert tried() == ours
    (event,) = seen
    assert isinstance(event, NotApplied)
    assert event.what == f"the plugin fast = {module}{target} of accelerate_tts.stages"
    assert reason in event.reason


@pytest.mark.parametrize("own", ["plain", "entry point"])
def test_the_example_of_a_stage_and_a_system(
    own: str, install: Callable[..., None], decide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered by being imported, or by its entry points: it is tried, kept and undone like any other."""
    code = (Path(__file__).parents[1] / "examples" / "own_stage.py").read_text(encoding="utf-8")
    group = "accelerate_tts.stages" if own == "entry point" else "nobody.asks.for.this"
    install("own_stage", code, group)
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(
        compare=is_faster,
        looks=False,
        unworthy=lambda *given: None if given[-1].name == "tables made once" else "not in this test",
    )
    if own == "entry point":
        assert "tables made once" in tried()
    module = importlib.import_module("own_stage")
    vocoder = module.load()
    receipt = receipt_of(vocoder)
    assert receipt is not None
    result = next(stage for stage in receipt.stages if stage.stage == "tables made once")
    assert (result.part, result.kept, result.error) == ("synthesis", True, 0.0)
    get_performance_optimizer().undo(vocoder)
    assert type(vocoder.synthesis) is module.Synthesis


def test_parts_that_cannot_be_named_are_found_by_watching(seen: list[Event]) -> None:
    @register_system("TheirVocoder")
    def parts(path: str, module: nn.Module) -> tuple[Part, ...]:
        return (Part(path, "vocoder", module.head),)  # type: ignore[arg-type]

    assert [part.kind for part in describe(TheirVocoder()).parts] == ["model"]
    (event,) = seen
    assert "no attribute 'head'; its parts are found by watching" in str(event)


@pytest.mark.parametrize(
    ("classes", "parts", "error", "message"),
    [
        ((), print, ValueError, "needs the name of a class"),
        ((TheirVocoder,), print, TypeError, "takes names of classes, got <class"),
        (("their.Vocoder",), print, TypeError, "takes names of classes, got 'their.Vocoder'"),
        (("TheirVocoder",), (), TypeError, r"needs a function of a path and a module, got \(\)"),
        (("T3",), print, ValueError, "'T3' is registered already"),
    ],
)
def test_what_cannot_be_registered(classes: Any, parts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_system(*classes)(parts)


def test_ctrl_c_while_a_plugin_is_imported_does_not_lose_it(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERRUPTED", "1")
    code = "import os\nif os.environ.pop('INTERRUPTED', None): raise KeyboardInterrupt\n" + STAGE.format(name="theirs")
    install("interrupted_stages", code, "accelerate_tts.stages")
    with pytest.raises(KeyboardInterrupt):
        tried()
    assert "theirs" in tried()


def test_a_module_may_be_imported_by_another_thread_meanwhile(install: Callable[..., None]) -> None:
    """A thread that imports a plugin holds the import lock and registers, while the registry waits for that import."""
    code = "import time; time.sleep(0.3)\n" + STAGE.format(name="slow")
    install("slow_stages", code, "accelerate_tts.stages")
    other = threading.Thread(target=importlib.import_module, args=("slow_stages",), daemon=True)
    mine = threading.Thread(target=tried, daemon=True)
    other.start()
    time.sleep(0.1)
    mine.start()
    for thread in (other, mine):
        thread.join(20.0)
        assert not thread.is_alive(), "they wait for each other"
    assert "slow" in tried()


def test_what_is_registered_is_found_while_a_plugin_is_imported(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls on a hot path ask, and must not wait for another thread's load."""
    registry: Registry[str] = Registry("accelerate_tts.device.kinds", "tests.slow")
    with registry.scope():
        registry.add("ours", "here")
        assert (registry.get("ours"), registry.get("theirs")) == ("here", None)
        gate = SimpleNamespace(begun=threading.Event(), go_on=threading.Event(), registry=registry)
        monkeypatch.setitem(sys.modules, "gate", gate)
        code = "import gate\ngate.begun.set()\ngate.go_on.wait(20)\ngate.registry.add('theirs', 'late')"
        install("slow_values", code, "tests.slow")
        loading = threading.Thread(target=registry.entries, daemon=True)
        loading.start()
        assert gate.begun.wait(10)
        found: list[str | None] = []
        asking = threading.Thread(target=lambda: found.append(registry.get("ours")), daemon=True)
        asking.start()
        asking.join(10)
        assert found == ["here"]
        gate.go_on.set()
        loading.join(10)
        assert registry.get("theirs") == "late"


def test_a_registry_forgets_what_a_scope_registered() -> None:
    registry: Registry[torch.dtype] = Registry("accelerate_tts.models", "nobody.has.this")
    with registry.scope():
        registry.add("half", torch.float16)
        assert registry.entries() == {"half": torch.float16}
    assert registry.entries() == {}
