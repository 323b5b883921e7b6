"""Unknown models: parts are found by their time, and nothing becomes slower or wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from accelerate_tts import Receipt, optimized_model
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.models import describe, generic
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.capture import time_modules
from accelerate_tts.tuning.compare import compare
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, tune


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")


def vocoder() -> tuple[nn.Module, Any]:
    config = SpeechT5HifiGanConfig(model_in_dim=20, upsample_initial_channel=64, upsample_rates=[4, 4],
                                   upsample_kernel_sizes=[8, 8])  # fmt: skip
    return SpeechT5HifiGan(config), torch.randn(1, 30, 20)


def language_model() -> tuple[nn.Module, Any]:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=100)  # fmt: skip

    def generate(model: LlamaForCausalLM) -> torch.Tensor:
        return model.generate(torch.ones(2, 5, dtype=torch.long), max_new_tokens=6, do_sample=False, pad_token_id=0)

    return LlamaForCausalLM(config), generate


def encoder() -> tuple[nn.Module, Any]:
    config = Wav2Vec2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                            conv_dim=[32] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)  # fmt: skip
    return Wav2Vec2Model(config), torch.randn(1, 4000)


class Pipeline:
    """Two models and a method, as the speech libraries have it."""

    def __init__(self) -> None:
        self.acoustic = nn.Sequential(nn.Linear(8, 20), nn.Tanh())
        self.vocoder = vocoder()[0].eval()

    def generate(self, text: str) -> torch.Tensor:
        return self.vocoder(self.acoustic(torch.ones(1, len(text), 8)))


@pytest.mark.parametrize("make", [vocoder, language_model, encoder], ids=lambda make: make.__name__)
def test_tuned_is_right_and_undone_is_untouched(make: Any) -> None:
    torch.manual_seed(0)
    model, warmup = make()
    model.eval()
    classes = [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def output() -> Any:
        torch.manual_seed(1)
        with torch.inference_mode():
            return warmup(model) if callable(warmup) else model(warmup)

    reference = output()
    optimized_model(warmup=warmup)(lambda: model)()
    optimizer = get_performance_optimizer()
    receipt = optimizer.receipt(model)
    assert isinstance(receipt, Receipt)
    assert receipt.stages
    assert all(stage.error is None or stage.error <= EXACT_TOLERANCE for stage in receipt.kept)
    assert compare(reference, output()).error <= EXACT_TOLERANCE
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert optimizer.undo(model)
    assert [type(module) for module in model.modules()] == classes
    assert compare(reference, output()).error == 0.0


def parts_of(subject: Any, warmup: Any) -> list[str]:
    calls = warmup_calls(warmup, Loaded(subject), "inference")
    receipt = tune(describe(subject), calls, [Stage("nothing")], DeviceInfo("cpu", "test"), Limits(60.0)).receipt
    return [stage.part for stage in receipt.stages]


def test_the_parts_of_a_pipeline_are_found_by_watching() -> None:
    assert parts_of(Pipeline(), "Hello there.") == ["acoustic", "vocoder"]


def test_a_module_driven_by_other_methods_is_taken_apart() -> None:
    class Driven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)])

        def speak(self, x: torch.Tensor) -> torch.Tensor:
            x = self.encoder(x)
            for layer in self.layers:
                x = layer(x)
            return x

    assert parts_of(Driven(), lambda model: model.speak(torch.ones(4, 64))) == ["Driven"]  # a row of layers is one


def test_named_parts_and_time() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3)))
    with time_modules((model,), "cpu") as seconds:
        model[0](torch.ones(1, 32))
        model[1](torch.ones(1, 1, 32))
    assert model not in seconds  # it was not called itself
    assert seconds[model[1]] >= seconds[model[1][0]] + seconds[model[1][1]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    whole = generic.parts("net", model)
    assert [part.name for part in generic.refine(whole, seconds)] == ["net.0", "net.1"]
    assert generic.refine(whole, {}) == whole  # nothing was seen: as it was
    assert generic.parts("empty", nn.ReLU()) == ()


def test_a_decoder_of_two_layers_stays_in_one_piece() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    model = LlamaForCausalLM(config).eval()
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.inference_mode(), time_modules((model,), "cpu") as seconds:
        past = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=past)
    found = {part.module for part in generic.refine(generic.parts("", model), seconds)}
    assert found in ({model}, {model.model, model.lm_head})  # as the clock has it: the head may be worth a part
    (inner,) = generic.refine(generic.parts("", model.model), seconds)
    assert inner.module is model.model
