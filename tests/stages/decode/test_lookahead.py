"""All blocks of a decoder in one call, while its own loop asks for one after the other."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage

LAYERS, WIDTH = 4, 32


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval().to(dtype)


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    """Upstream's model, and the same one with fused blocks."""
    plain, tuned = llama(), llama()
    change = FusedBlocksStage().prepare(Part("model", "decoder", tuned))
    change.on()
    yield plain, tuned
    change.off()


def prompt(model: Any, seed: int = 1) -> Any:
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(inputs_embeds=x.to(model.dtype), use_cache=True).past_key_values


def token(model: Any, past: Any, seed: int, **asked: Any) -> Any:
    x = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(100 + seed)).to(model.dtype)
    with torch.inference_mode():
        return model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked)


def run(model: Any, count: int = 5, seed: int = 1) -> torch.Tensor:
    past = prompt(model, seed)
    return torch.stack([token(model, past, number + seed).last_hidden_state for number in range(count)])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5))


@pytest.mark.usefixtures("layered_caches")
def test_one_call_for_each_token_and_the_states_of_every_layer(pair: tuple[Any, Any], blocks_a_call: list[int]) -> None:
    plain, tuned = pair
    pasts = prompt(plain), prompt(tuned)
    for number in range(4):
        one, other = (token(m, p, number, output_hidden_states=True) for m, p in zip(pair, pasts, strict=True))
        assert len(one.hidden_states) == len(other.hidden_states) == LAYERS + 1
        assert all(close(a, b) for a, b in zip(one.hidden_states, other.hidden_states, strict=True))
    assert blocks_a_call == [LAYERS] * 4
    for one, other in zip(pasts[0].layers, pasts[1].layers, strict=True):
        assert one.keys.shape == other.keys.shape
        assert close(one.keys, other.keys)
        assert close(one.values, other.values)


def _own_positions(_block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "position_ids": kwargs["position_ids"].clone()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_what_the_blocks_make_one_by_one(dtype: torch.dtype, blocks_a_call: list[int]) -> None:
    model = llama(dtype)
    FusedBlocksStage().prepare(Part("model", "decoder", model)).on()
    together = run(model)
    assert blocks_a_call == [LAYERS] * 5
    for layer in model.layers:
        layer.register_forward_pre_hook(_own_positions, with_kwargs=True)
    run(model, 3)
    blocks_a_call.clear()
    assert torch.equal(run(model), together)
    assert blocks_a_call == [1] * LAYERS * 5


def _out_of_place(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
    return out * 1.25


def _in_place(_m: Any, _a: Any, out: torch.Tensor) -> None:
    out.mul_(1.25)


@pytest.mark.usefixtures("layered_caches")
@pytest.mark.parametrize("hook", [_out_of_place, _in_place])
def test_what_comes_between_two_blocks_is_seen(
    hook: Callable[..., Any], pair: tuple[Any, Any], blocks_a_call: list[int], seen: list[Event]
) -> None:
    for model in pair:
        model.layers[1].register_forward_hook(hook)
    assert close(*(run(model, 6) for model in pair))
    # Three tokens for which two blocks were made in vain, and from then on none.
    assert blocks_a_call == [LAYERS, LAYERS - 2] * 3 + [2, LAYERS - 2] * 3
    assert [event.reason for event in seen if isinstance(event, NotApplied) and "in one call" in event.what] == [
        "the decoder changes states or mask before block 2; another call begins there"
    ]


@pytest.mark.usefixtures("layered_caches")
def test_it_goes_on_in_one_call_once_nothing_comes_between(
    pair: tuple[Any, Any], blocks_a_call: list[int], seen: list[Event]
) -> None:
    handles = [model.layers[1].register_forward_hook(_in_place) for model in pair]
    run(pair[1], 6)
    for handle in handles:
        handle.remove()
    blocks_a_call.clear()
    assert close(*(run(model, 6) for model in pair))
    assert blocks_a_call == [2, LAYERS - 2] * 3 + [LAYERS] * 3
    pair[1].layers[0].register_forward_hook(_in_place)
    run(pair[1], 4)
    assert len([event for event in seen if isinstance(event, NotApplied)]) == 2, "one for each time"


HOOKED: dict[str, Callable[[Any], list[Any]]] = {
    "a block": lambda model: [model.layers[2]],
    "every block": lambda model: list(model.layers),
    "inside a block": lambda model: [model.layers[1].mlp],
    "inside every block": lambda model: [layer.mlp for layer in model.layers],
    "the first and the last": lambda model: [model.layers[0], model.layers[-1].self_attn.o_proj],
}


@pytest.mark.usefixtures("layered_caches")
@pytest.mark.parametrize("where", HOOKED)
def test_hooks_that_were_there_leave_nothing_behind(
    where: str, pair: tuple[Any, Any], blocks_a_call: list[int]
) -> None:
    """However many tokens they were there for: all blocks are computed in one call again."""
    handles = [module.register_forward_hook(_out_of_place) for model in pair for module in HOOKED[where](model)]
    assert close(*(run(model, 9) for model in pair))
    for handle in handles:
        handle.remove()
    run(pair[1], 3)
    blocks_a_call.clear()
    assert close(*(run(model, 4) for model in pair))
    assert blocks_a_call == [LAYERS] * 4


def test_a_mask_of_its_own_for_a_block_is_seen(pair: tuple[Any, Any]) -> None:
    def hide(_block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = torch.zeros(2, 1, 1, 7)
        hidden[0, ..., :3] = -1e9
        return args, {**kwargs, "attention_mask": hidden}

    found = []
    for model in pair:
        past = prompt(model)
        with model.layers[2].register_forward_pre_hook(hide, with_kwargs=True):
            found.append(token(model, past, 0).last_hidden_state)
    assert close(*found)
    assert not close(found[0], run(pair[0], 1)[0])


@pytest.mark.usefixtures("layered_caches")
def test_a_loop_that_breaks_off_leaves_no_trace(pair: tuple[Any, Any], blocks_a_call: list[int]) -> None:
    plain, tuned = pair

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    past = prompt(tuned)
    for _ in range(5):  # more often than a decoder may be odd
        with tuned.layers[2].register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
            token(tuned, past, 0)
        past = prompt(tuned)
    blocks_a_call.clear()
    assert close(run(plain), run(tuned))
    assert blocks_a_call == [LAYERS] * 5
    # And it holds no cache: that of a request which was given up would lie there until the next.
    with tuned.layers[2].register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
        token(tuned, past, 0)
    gone = weakref.ref(past)
    del past
    gc.collect()
    assert gone() is None


def test_what_is_not_a_number_is_no_surprise(pair: tuple[Any, Any], blocks_a_call: list[int]) -> None:
    _, tuned = pair
    past = prompt(tuned)
    with torch.inference_mode():
        for _ in range(5):
            x = torch.full((2, 1, WIDTH), float("nan"))
            assert tuned(inputs_embeds=x, past_key_values=past, use_cache=True).last_hidden_state.isnan().all()
    assert blocks_a_call == [LAYERS] * 5


@pytest.mark.usefixtures("layered_caches")
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["token", "crop", "break off", "copy"])), max_size=14))
@settings(max_examples=12, deadline=None)
def test_sequences_in_any_order(steps: list[tuple[int, str]]) -> None:
    """Three sequences in turn, cropped, copied and broken off: each continues as upstream's does."""
    plain, tuned = llama(), llama()
    FusedBlocksStage().prepare(Part("model", "decoder", tuned)).on()
    pasts = [[prompt(model, seed) for model in (plain, tuned)] for seed in range(3)]

    def fail(*_: Any) -> None:
        raise TimeoutError

    for number, (which, what) in enumerate(steps):
        one, other = pasts[which]
        if what == "token":
            assert close(
                *(token(m, p, number).last_hidden_state for m, p in zip((plain, tuned), (one, other), strict=True))
            )
        elif what == "crop":
            for past in (one, other):
                if past.get_seq_length() > 3:
                    past.crop(-1)
        elif what == "copy":
            pasts[which] = [copy.deepcopy(past) for past in (one, other)]
        else:
            broken = copy.deepcopy(other)
            with tuned.layers[1 + number % 3].register_forward_pre_hook(fail), pytest.raises(TimeoutError):
                token(tuned, broken, number)


def test_threads_have_each_their_own(pair: tuple[Any, Any]) -> None:
    plain, tuned = pair
    expected = [run(plain, 8, seed) for seed in range(6)]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda s=seed: found.update({s: run(tuned, 8, s)})) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(expected[seed], found[seed]) for seed in range(6))
