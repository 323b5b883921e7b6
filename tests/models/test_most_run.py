"""Kokoro, F5-TTS and Qwen3-TTS: their parts by name, and the true classes of those that are installed, tuned."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

from accelerate_tts import Event, optimized_model
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.compare import compare

STRANGERS = Path(__file__).parents[2] / "benchmarks" / "strangers"
PARTS = {
    "kokoro": [("bert", "encoder"), ("predictor.text_encoder", "encoder"), ("text_encoder", "encoder"),
               ("decoder", "vocoder")],
    "f5-tts": [("transformer", "estimator")],
    "vocos": [("backbone", "vocoder"), ("head", "vocoder")],
}  # fmt: skip


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Builds a system at small size, as `make strangers` does; the test is skipped where its package is absent."""
    monkeypatch.syspath_prepend(str(STRANGERS))
    before = set(sys.modules)
    systems = importlib.import_module("systems")

    def build(name: str) -> Any:
        stranger = systems.SYSTEMS[name]
        absent = [module for module in stranger.package.split("+") if find_spec(module) is None]
        if absent:
            pytest.skip(f"{stranger.distribution} is not installed: no {', '.join(absent)}")
        torch.manual_seed(0)
        return stranger.build()

    yield build
    for name in set(sys.modules) - before:  # packages that were imported without their `__init__`
        if name.split(".")[0] in {"systems", "kokoro", "f5_tts", "vocos"}:
            del sys.modules[name]


def said(made: Any, number: int) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return made.call(made.model, *made.inputs[number])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PARTS)
def test_tuned_by_name_it_says_the_same(name: str, built: Any, clockless: None) -> None:
    made, plain = built(name), built(name)
    assert [(part.name, part.kind) for part in describe(made.model).parts] == PARTS[name]
    keys = list(made.model.state_dict())
    optimized_model(warmup=lambda model: made.call(model, *made.inputs[0]))(lambda: made.model)()
    optimizer = get_performance_optimizer()
    receipt = optimizer.receipt(made.model)
    assert receipt is not None
    assert receipt.kept
    for number in range(2):
        assert compare(said(plain, number), said(made, number)).error < EXACT_TOLERANCE
    assert list(made.model.state_dict()) == keys
    optimizer.undo(made.model)
    for number in range(2):
        assert torch.equal(said(plain, number), said(made, number))


def test_in_half_precision_kokoro_speaks_as_long(built: Any, clockless: None) -> None:
    """Parts that decide durations stay bit-exact, and the vocoder computes in bf16."""
    made, plain = built("kokoro"), built("kokoro")
    assert {part.name for part in describe(made.model).parts if part.decides} == {"bert", "predictor.text_encoder"}
    warmup = lambda model: made.call(model, *made.inputs[0])  # noqa: E731
    optimized_model(warmup=warmup, precision="balanced")(lambda: made.model)()
    receipt = get_performance_optimizer().receipt(made.model)
    assert receipt is not None
    assert {stage.part for stage in receipt.kept if "bf16" in stage.stage} <= {"text_encoder", "decoder"}
    assert "decoder" in {stage.part for stage in receipt.kept}
    for number in range(2):
        assert said(plain, number).shape == said(made, number).shape


def named(name: str, **modules: nn.Module) -> Any:
    """A module of a class of that name, with these modules."""
    made = type(name, (nn.Module,), {})()
    for key, module in modules.items():
        made.add_module(key, module)
    return made


def qwen() -> Any:
    """A stand-in for qwen-tts, which asks for one release of transformers: its names, with layers like its own."""
    transformers = pytest.importorskip("transformers")
    if Version(transformers.__version__) < Version("4.51"):
        pytest.skip(f"transformers {transformers.__version__} has no Qwen 3; 4.51 brought it")
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    first, others = (transformers.Qwen3Model(config).eval() for _ in range(2))
    talker = named("Talker", model=first, codec_head=nn.Linear(32, 50), code_predictor=named("Codes", model=others))
    return named("Qwen3TTSForConditionalGeneration", talker=talker)


def test_the_parts_of_qwen_are_named(seen: list[Event]) -> None:
    model = qwen()
    parts = describe(model).parts
    assert [(part.name, part.kind) for part in parts] == [
        ("talker.model", "decoder"), ("talker.code_predictor.model", "decoder"), ("talker.codec_head", "head"),
    ]  # fmt: skip
    assert parts[0].head is not None
    assert parts[0].head.modules == (model.talker.codec_head,)
    assert parts[1].head is None
    decoder = named("Decoder", conv=nn.Conv1d(4, 4, 3))
    decoder.chunked_decode = lambda codes: codes
    codec = named("Qwen3TTSTokenizerV2Model", encoder=nn.Linear(2, 2), decoder=decoder)
    assert [(part.name, part.kind) for part in describe(codec).parts] == [("decoder", "vocoder")]
    assert not [event for event in seen if isinstance(event, NotApplied)]


def test_another_class_of_the_same_name_is_treated_as_a_whole(seen: list[Event]) -> None:
    for name in ("KModel", "CFM", "Vocos", "Qwen3TTSForConditionalGeneration", "Qwen3TTSTokenizerV2Model"):
        (part,) = describe(named(name, decoder=nn.Linear(2, 2))).parts
        assert (part.name, part.kind) == (name, "model")
        assert any(isinstance(event, NotApplied) and event.reason.startswith(f"{name} has no") for event in seen)
