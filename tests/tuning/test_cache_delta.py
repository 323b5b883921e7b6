"""Cache deltas: a decoder's result is compared by the positions that the call added, and by changes of the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.tuning.cache_delta import is_past, without_past
from accelerate_tts.tuning.compare import compare, tensors_of
from accelerate_tts.tuning.first_passes import first_passes
from accelerate_tts.tuning.ledger import Ledger
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, tune

WIDTH, GIVEN = 32, 40


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaModel(config).eval()


@torch.inference_mode()
def step(model: Any, rows: int = 2) -> tuple[Any, tuple[Any, ...]]:
    """A token's result, and the arguments of its call as they were before it."""
    generator = torch.Generator().manual_seed(1)
    prompt, token = (torch.randn(rows, count, WIDTH, generator=generator) for count in (GIVEN, 1))
    # A cache is given: before transformers 4.48 a model that makes its own returns tuples.
    past = model(inputs_embeds=prompt, past_key_values=transformers.DynamicCache(), use_cache=True).past_key_values
    given = copy.deepcopy(past)
    return model(inputs_embeds=token, past_key_values=past, use_cache=True), (token, given)


def pairs_of(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer; a cache has no layers before transformers 4.54."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def cached(output: Any) -> list[torch.Tensor]:
    return list(tensors_of(output.past_key_values))


def test_a_token_leaves_a_position_of_each_layer_and_the_rest_of_its_output(model: Any) -> None:
    output, given = step(model)
    found = without_past(output, given)
    assert type(found) is BaseModelOutputWithPast
    assert found.last_hidden_state is output.last_hidden_state
    *added, kept = cached(found)
    whole = [tensor for pair in pairs_of(output.past_key_values) for tensor in pair]
    assert all(torch.equal(a[:-1], b[..., GIVEN:, :].flatten()) for a, b in zip(added, whole, strict=True))
    assert kept == 1.0
    assert compare(found, without_past(*step(model))).error == 0.0


def test_an_error_is_that_of_the_whole_cache(model: Any) -> None:
    """The position that was added is a part of it; by itself its error says more than `Tolerance` was made for."""
    (output, given), (other, _) = step(model), step(model)
    with torch.inference_mode():
        pairs_of(other.past_key_values)[1][1][..., GIVEN:, :] += 0.1
    expected = compare(output, other).error
    found = compare(without_past(output, given), without_past(other, given)).error
    assert 0.0 < found == pytest.approx(expected, rel=1e-3)


def test_in_a_tuple_too(model: Any) -> None:
    output, given = step(model)
    found = without_past((output.last_hidden_state, output.past_key_values), given)
    assert len(list(tensors_of(found))) == 1 + 4 + 1


@torch.inference_mode()
def test_whoever_writes_to_positions_that_it_was_given_is_found_out(model: Any) -> None:
    output, given = step(model)
    right = without_past(output, given)
    pairs_of(output.past_key_values)[1][1][0, 0, 3] += 1.0
    difference = compare(right, without_past(output, given))
    assert difference.error > 1e-3
    others = transformers.DynamicCache()
    for layer in range(2):
        others.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), layer)
    assert compare(right, without_past(output, (given[0], others))).error == float("inf"), (
        "another number of rows: not the same cache"
    )


@pytest.mark.parametrize("how", ["a prompt", "cropped", "another cache"])
def test_what_is_not_the_cache_that_was_given_is_compared_whole(model: Any, how: str) -> None:
    output, given = step(model)
    if how == "a prompt":
        given = given[:1]
    elif how == "cropped":
        output.past_key_values.crop(-6)
    else:
        given = (*step(model, rows=1)[1],)
    assert without_past(output, given).past_key_values is output.past_key_values


class Spoils(Stage):
    """A change under which a step writes to a position that is not its own."""

    least_share = BaseStage.least_share

    def changes(self, module: Any) -> dict[str, Any]:
        plain = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(module, *args, **kwargs)
            pairs_of(output.past_key_values)[0][0][..., 0, :] += 0.1
            return output

        return {"forward": forward}


def test_a_tuning_compares_so_and_drops_what_spoils_the_past(model: Any) -> None:
    def speak(loaded: Any) -> Any:
        torch.manual_seed(0)
        past = transformers.DynamicCache()
        for number in range(12):
            out = loaded(inputs_embeds=torch.randn(1, 1 if number else 5, WIDTH), past_key_values=past, use_cache=True)
            past = out.past_key_values
        return out.last_hidden_state

    part = Part("decoder", "decoder", model)
    calls = warmup_calls(speak, Loaded(model), "inference")
    plan, device = ModelPlan("model", (model,), (part,)), DeviceInfo("cpu", "test")
    outputs = first_passes(plan, calls, device, Limits(30.0), Ledger()).reference(part).outputs
    tuning = tune(plan, calls, [Spoils("spoils")], device, Limits(30.0))
    (result,) = tuning.receipt.stages
    assert not result.kept
    assert result.verdict.startswith("rejected: error ")
    tokens = [output for output in outputs if output.last_hidden_state.shape[1] == 1]
    assert tokens
    assert all(tensor.numel() == WIDTH + 1 for output in tokens for tensor in cached(output)[:-1])


def test_a_tuple_of_pairs_is_a_past_too() -> None:
    """Chatterbox 0.1.1 to 0.1.6 give one: it was compiled frozen as if it had none, which cost the whole budget."""
    pair = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert is_past((pair, pair))
    assert is_past(transformers.DynamicCache())
    for other in ((), pair, [pair], (pair, None), torch.zeros(1, 2, 3, 4), (torch.zeros(2), torch.zeros(2))):
        assert not is_past(other)
