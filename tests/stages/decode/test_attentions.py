"""Results beside the hidden states, for every release: attention weights, hidden states, caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage

LAYERS, WIDTH, HEADS = 3, 32, 4


def decoder(name: str, how: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=50, bos_token_id=1, eos_token_id=2,
            attn_implementation=how, initializer_range=0.2,
        )  # fmt: skip
        return transformers.GPT2Model(config).eval().to(dtype)
    options: dict[str, Any] = {"sliding_window": None} if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, attn_implementation=how, initializer_range=0.2, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}Model")(config).eval().to(dtype)


@pytest.fixture
def fused() -> Iterator[Callable[[Any], Any]]:
    """Fuses the blocks of a model until the test's end."""
    changes = []

    def fuse(model: Any) -> Any:
        changes.append(FusedBlocksStage().prepare(Part("model", "decoder", model)))
        changes[-1].on()
        return model

    yield fuse
    for change in changes:
        change.off()


def steps(model: Any, count: int = 4, **asked: Any) -> list[Any]:
    """A loop as Chatterbox's: embeddings in, and the cache of the call before."""
    generator = torch.Generator().manual_seed(1)
    past, results = None, []
    with torch.inference_mode():
        for number in range(count):
            x = torch.randn(2, 1 if number else 6, WIDTH, generator=generator).to(model.dtype)
            results.append(model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked))
            past = results[-1].past_key_values
    return results


def same(one: Any, other: Any, limit: float) -> bool:
    """Two fields of results: tensors of one shape and dtype and nearly one value, in the same nesting."""
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(a, b, limit) for a, b in zip(one, other, strict=True))
    if not isinstance(one, torch.Tensor):
        return one is None and other is None
    close = torch.allclose(one.double(), other.double(), rtol=limit, atol=limit)
    return one.shape == other.shape and one.dtype == other.dtype and close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "GPT2"])
def test_attention_weights_are_served_as_upstream_gives_them(
    name: str, how: str, dtype: torch.dtype, fused: Callable[[Any], Any], blocks_a_call: list[int], seen: list[Event]
) -> None:
    if name == "GPT2" and dtype == torch.bfloat16:
        pytest.skip("the kernel has no transposed weights in bf16")
    untouched, model = decoder(name, how, dtype), fused(decoder(name, how, dtype))
    asked = {"output_attentions": True, "output_hidden_states": True}
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for one, other in zip(steps(untouched, **asked), steps(model, **asked), strict=True):
        assert same(one.attentions, other.attentions, limit)
        assert same(one.hidden_states, other.hidden_states, limit)
        assert list(one.keys()) == list(other.keys())
    if how == "eager":
        assert one.attentions[0].shape == (2, HEADS, 1, 9)
    assert blocks_a_call == [LAYERS] * 3
    assert not seen


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_by_the_config_and_not_at_all(name: str, fused: Callable[[Any], Any], blocks_a_call: list[int]) -> None:
    models = [decoder(name, "eager"), fused(decoder(name, "eager"))]
    for wanted in (True, False, True):
        for model in models:
            model.config.output_attentions = wanted
        results = [steps(model) for model in models]
        assert all(same(a.attentions, b.attentions, 1e-5) for a, b in zip(*results, strict=True))
        assert all(same(a[0], b[0], 1e-5) for a, b in zip(*results, strict=True))
    assert blocks_a_call == [LAYERS] * 9


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_as_a_tuple(name: str, fused: Callable[[Any], Any], blocks_a_call: list[int]) -> None:
    models = [decoder(name, "eager"), fused(decoder(name, "eager"))]
    x = torch.ones(1, 4, WIDTH)
    found = []
    with torch.inference_mode():
        for model in models:
            past = model(inputs_embeds=x, use_cache=True, output_attentions=True).past_key_values
            out = model(
                inputs_embeds=x[:, :1], past_key_values=past, use_cache=True, output_attentions=True, return_dict=False
            )
            found.append([item for item in out if isinstance(item, (torch.Tensor, tuple))])
    assert same(*found, 1e-5)
    assert blocks_a_call == [LAYERS]


def test_nothing_is_left_on_the_modules(fused: Callable[[Any], Any]) -> None:
    """transformers 4.54 to 4.57 leave a method of the class of the moment on each module that they collect from."""
    model = fused(decoder("Llama", "eager"))
    steps(model, output_attentions=True, output_hidden_states=True)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_what_was_left_on_the_modules_is_no_obstacle(fused: Callable[[Any], Any], blocks_a_call: list[int]) -> None:
    untouched, model = decoder("Llama", "eager"), decoder("Llama", "eager")
    for block in model.layers:
        for module in (block, block.self_attn):
            module.forward = module.forward
    fused(model)
    assert all(same(a[0], b[0], 1e-5) for a, b in zip(steps(untouched), steps(model), strict=True))
    assert blocks_a_call == [LAYERS] * 3


def test_a_users_hook_on_attention_is_called_by_upstream(
    fused: Callable[[Any], Any], blocks_a_call: list[int], seen: list[Event]
) -> None:
    """A hook may read and change anything: its block runs upstream's code, and the others run in two kernel calls."""
    models = [decoder("Llama", "eager"), fused(decoder("Llama", "eager"))]

    def halve(_module: Any, _args: Any, output: Any) -> Any:
        return output[0] * 0.5, *output[1:]

    handles = [model.layers[1].self_attn.register_forward_hook(halve) for model in models]
    results = [steps(model, 30, output_attentions=True) for model in models]
    assert all(same(a[0], b[0], 1e-5) for a, b in zip(*results, strict=True))
    assert all(same(a.attentions, b.attentions, 1e-5) for a, b in zip(*results, strict=True))
    assert blocks_a_call == [1, 1] * 29
    assert len([event for event in seen if isinstance(event, NotApplied)]) == 1
    for handle in handles:
        handle.remove()
    blocks_a_call.clear()
    assert all(same(a[0], b[0], 1e-5) for a, b in zip(*(steps(model) for model in models), strict=True))
    assert blocks_a_call == [LAYERS] * 3, "and together again, once it is gone"
    models[1].layers[1].self_attn.register_forward_hook(halve)
    steps(models[1])
    assert len([event for event in seen if isinstance(event, NotApplied)]) == 2, "another time, another event"
