"""Prompts through fused blocks: from the copies that serve the tokens, in bf16."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from accelerate_tts.kernels.weight_formats import WeightFormat
from accelerate_tts.plan import Part
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.decode import bf16_prefill
from accelerate_tts.stages.decode.bf16_prefill import PromptStage
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage


def of(name: str) -> Any:
    torch.manual_seed(0)
    biases = {"attention_bias": True, "mlp_bias": True} if name == "Llama with biases" else {}
    if name == "GPT2":
        config: Any = transformers.GPT2Config(n_embd=32, n_inner=56, n_layer=2, n_head=4, vocab_size=50)
        model: Any = transformers.GPT2Model(config)
    else:
        of = name.split(maxsplit=1)[0]
        config = getattr(transformers, f"{of}Config")(
            vocab_size=50, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None, **biases,
        )  # fmt: skip
        model = getattr(transformers, f"{of}Model")(config)
    with torch.no_grad():  # weights of a trained size, where a block changes what it is given by as much as that is
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.double() - found.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def _bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the processor does not multiply in bf16, oneDNN does it slowly, and right.
    monkeypatch.setattr(bf16_prefill, "half_dtypes", lambda _device: (torch.bfloat16,))


def fused(model: Any, weights: WeightFormat) -> Any:
    FusedBlocksStage(weights).prepare(Part("model", "decoder", model)).on()
    stage, part = PromptStage(), Part("model", "decoder", model)
    assert stage.applies(part) is None
    return stage.prepare(part)


def prompt(model: Any, positions: int = 12, rows: int = 2) -> torch.Tensor:
    x = torch.randn(rows, positions, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model(inputs_embeds=x, use_cache=True).last_hidden_state.clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["Llama", "Llama with biases", "Qwen2", "GPT2"])
def test_a_prompt_is_served_from_the_copies(name: str, weights: WeightFormat) -> None:
    model = of(name)
    expected = prompt(model)
    change = fused(model, weights)
    plain = prompt(model)
    assert torch.equal(plain, expected)  # fused blocks alone leave prompts to upstream
    change.on()
    found = prompt(model)
    assert 0 < error(expected, found) < {"bf16": 0.03, "int8": 0.06}[weights]
    change.off()
    assert torch.equal(prompt(model), expected)


def test_it_multiplies_the_very_numbers_of_the_copies() -> None:
    model = of("Llama")
    change = fused(model, "int8")
    layer = model.layers[0].mlp.up_proj
    x = torch.randn(40, 32).bfloat16().float()
    change.on()
    with torch.inference_mode():
        found = layer(x)
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    integers = (layer.weight.detach() / scale).round()
    expected = (x.double() @ integers.double().t()).bfloat16().float() * scale.t()
    assert torch.allclose(found, expected, rtol=2**-7)


@pytest.mark.parametrize("rows", [1, 8])
def test_few_rows_are_not_its_business(rows: int) -> None:
    model = of("Llama")
    change = fused(model, "bf16")
    layer, x = model.layers[0].mlp.up_proj, torch.randn(rows, 32)
    with torch.inference_mode():
        expected = layer(x)
        change.on()
        assert torch.equal(layer(x), expected)


def test_a_written_weight_is_seen() -> None:
    model = of("Llama")
    fused(model, "bf16").on()
    prompt(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    fresh = of("Llama")
    fresh.load_state_dict(model.state_dict())
    assert error(prompt(fresh), prompt(model)) < 0.03


def test_training_and_wrong_inputs_are_torchs() -> None:
    model = of("Llama")
    fused(model, "bf16").on()
    layer = model.layers[0].mlp.up_proj
    x = torch.randn(40, 32, requires_grad=True)
    assert layer(x).requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(40, 31))


def test_copies_and_pickles_are_plain() -> None:
    model = of("Llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused(model, "int8").on()
    prompt(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.layers[0].mlp.up_proj) is nn.Linear
        assert state.keys() == twin.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in twin.state_dict().items())


def test_where_it_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("model", "decoder", of("Llama"))
    assert "no fused blocks" in str(PromptStage().applies(part))
    FusedBlocksStage("fp32").prepare(part).on()
    assert "no fused blocks" in str(PromptStage().applies(part))
    monkeypatch.setattr(bf16_prefill, "half_dtypes", lambda _device: ())
    assert "bf16" in str(PromptStage().applies(part))


def test_it_is_tried_after_fused_blocks_where_less_than_exact_is_asked_for() -> None:
    for precision in ("balanced", "fast"):
        names = [stage.name for stage in default_stages("cpu", "default", precision)]  # type: ignore[arg-type]
        assert names.index("bf16 prompts") > names.index("fused decoder blocks (bf16)")
    assert "bf16 prompts" not in [stage.name for stage in default_stages("cpu", "default", "exact")]
