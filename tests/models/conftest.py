"""What every system has to satisfy, once for all of them, and its true classes at small size from the examples."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from accelerate_tts import optimized_model
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.engine.plan import Part
from accelerate_tts.engine.stages.base import BaseChange, BaseStage
from accelerate_tts.engine.tune import Limits, tune
from accelerate_tts.engine.verify import EXACT_TOLERANCE, compare
from accelerate_tts.engine.warmup import Loaded, warmup_calls
from accelerate_tts.models import describe
from accelerate_tts.optimizer import get_performance_optimizer

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


class Wrong(BaseChange):
    """Spoils the weights of a part."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._weights = [parameter.detach().clone() for parameter in module.parameters()]

    def on(self) -> None:
        with torch.no_grad():
            for parameter in self._module.parameters():
                parameter.mul_(1.1)

    def off(self) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._module.parameters(), self._weights, strict=True):
                parameter.copy_(weight)


class WrongStage(BaseStage):
    name = "spoiled weights"
    least_share = 0.0

    def applies(self, part: Part) -> str | None:
        return None

    def prepare(self, part: Part) -> Wrong:
        return Wrong(part.module)


def said(subject: Any, speak: Callable[[Any], Any]) -> Any:
    torch.manual_seed(1)
    with torch.inference_mode():
        return speak(subject)


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Parts found, each of them watched and a wrong change on it refused; tuned equal, state dict as it was, undone."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")  # minutes; compiling has tests of its own

    def check(make: Callable[[], Any], speak: Callable[[Any], Any], parts: list[tuple[str, str]]) -> None:
        torch.manual_seed(0)
        reference = said(make(), speak)
        torch.manual_seed(0)
        subject = make()
        plan = describe(subject)
        assert [(part.name, part.kind) for part in plan.parts] == parts
        assert compare(reference, said(subject, speak)).error == 0.0  # two of one seed; and lazy state is filled now
        modules = {id(module): module for root in plan.roots for module in root.modules()}.values()
        classes = [type(module) for module in modules]
        states = [{key: value.clone() for key, value in root.state_dict().items()} for root in plan.roots]

        def untouched() -> bool:
            now = [root.state_dict() for root in plan.roots]
            return all(
                list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)
                for old, new in zip(states, now, strict=True)
            )

        calls = warmup_calls(speak, Loaded(subject), "inference")
        spoiled = tune(plan, calls, [WrongStage()], DeviceInfo("cpu", "test"), Limits(300.0)).receipt
        assert [stage.part for stage in spoiled.stages] == [name for name, _ in parts]
        assert all(stage.reason.startswith("wrong output") for stage in spoiled.stages), spoiled
        assert untouched()

        optimized_model(warmup=speak, tune_seconds=3.0)(lambda: subject)()
        optimizer = get_performance_optimizer()
        receipt = optimizer.receipt(subject)
        assert receipt is not None
        assert receipt.stages
        assert all(stage.error is None or stage.error <= EXACT_TOLERANCE for stage in receipt.kept)
        assert compare(reference, said(subject, speak)).error <= EXACT_TOLERANCE
        assert untouched()
        assert optimizer.undo(subject)
        assert [type(module) for module in modules] == classes
        assert compare(reference, said(subject, speak)).error == 0.0
        assert untouched()

    return check
