"""The decode step: upstream's tokens in every loop, and caches that stay upstream's own."""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import Unsupported
from transformers import DynamicCache

from accelerate_tts import Event
from accelerate_tts.events import FellBack, NotApplied, Recompiled
from accelerate_tts.kernels import decoder_block
from accelerate_tts.patching.change import Counter
from accelerate_tts.patching.normal_tensors import call_normally
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile import inductor
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.decode.growing_cache import GrowingCacheStage
from accelerate_tts.stages.decode.kv_cache import sizes
from accelerate_tts.stages.decode.kv_cache.step import StepLayer
from accelerate_tts.tuning.compare import compare

HIDDEN, HEADS, LAYERS = 32, 4, 2


pytestmark = pytest.mark.usefixtures("layered_caches")


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=50,
        **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=50, bos_token_id=1, eos_token_id=49
    )
    return transformers.GPT2LMHeadModel(config).eval()


def change(stage: GrowingCacheStage | CompiledBlocksStage | FusedBlocksStage, model: Any) -> Any:
    part = Part("model", "decoder", model)
    assert stage.applies(part) is None
    return stage.prepare(part)


def tokens(model: Any, count: int = 40, batch: int = 2, **options: Any) -> torch.Tensor:
    """Sampled by transformers' own loop."""
    torch.manual_seed(3)
    prompt = torch.randint(2, 48, (batch, 7))
    options = {"do_sample": True, **options}
    with torch.inference_mode():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0, **options,
        )  # fmt: skip


def by_hand(
    model: Any, count: int, batch: int = 2, edit: Callable[[Any], Any] = lambda past: past
) -> list[torch.Tensor]:
    """A loop as Chatterbox has it: embeddings in, hidden states out; `edit` does something to the cache half-way."""
    decoder = model.model if hasattr(model, "model") else model.transformer
    generator = torch.Generator().manual_seed(4)  # of this call, which may be one of several at once
    past, seen = None, []
    with torch.inference_mode():
        for number in range(count):
            x = torch.randn(batch, 1 if number else 9, HIDDEN, generator=generator)
            if number == count // 2:
                past = edit(past)
                batch_now = past.layers[0].keys.shape[0]
                x = torch.randn(batch_now, 1, HIDDEN, generator=generator)
                batch = batch_now
            out = decoder(inputs_embeds=x, past_key_values=past, use_cache=True, output_hidden_states=True)
            past = out.past_key_values
            seen += [out.hidden_states[-1], out.last_hidden_state]
    assert past is not None
    seen += [layer.keys.contiguous() for layer in past.layers] + [layer.values.contiguous() for layer in past.layers]
    return seen


# --- the growing cache ---------------------------------------------------------------------------------------


def test_a_static_cache_that_upstream_made_in_inference_mode_is_written() -> None:
    # Upstream counts its positions in a tensor, in place, and our step runs outside inference mode.
    model = llama()
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = tokens(model, 8, **options)
    grown = change(GrowingCacheStage(), model)
    grown.on()
    assert torch.equal(tokens(model, 8, **options), expected)
    grown.off()
    assert torch.equal(tokens(model, 8, **options), expected)


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "LinearAttentionLayer"), reason="transformers 5 brought such layers"
)
def test_states_that_upstream_writes_in_place_may_come_from_inference_mode() -> None:
    """LFM2's convolutions keep theirs beside keys and values. Reordering makes tensors of the caller's mode."""
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=50, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = transformers.Lfm2Model(config).eval()

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        past, states = None, []
        with torch.inference_mode():
            for count in (5, 1, 1):
                x = torch.randn(2, count, HIDDEN, generator=generator)
                out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
                past = out.past_key_values
                past.reorder_cache(torch.tensor([1, 0]))
                states.append(out.last_hidden_state[:, -1:])
        return torch.cat(states, 1)

    expected = run()
    change(GrowingCacheStage(), model).on()
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_growing_changes_no_bit(make: Callable[[], Any]) -> None:
    model = make()
    expected, states = tokens(model, 150), by_hand(model, 12)
    grown = change(GrowingCacheStage(), model)
    grown.on()
    assert torch.equal(tokens(model, 150), expected)
    assert compare(states, by_hand(model, 12)).error == 0.0
    grown.off()
    assert type(model) is type(make())
    assert all(type(a) is type(b) for a, b in zip(model.modules(), make().modules(), strict=True))
    assert torch.equal(tokens(model, 150), expected)


def crop(past: Any) -> Any:
    past.crop(-3)
    return past


def reorder(past: Any) -> Any:
    past.reorder_cache(torch.tensor([1, 0]))
    return past


def repeat(past: Any) -> Any:
    past.batch_repeat_interleave(2)
    return past


def select(past: Any) -> Any:
    past.batch_select_indices(torch.tensor([1]))
    return past


def pickled(past: Any) -> Any:
    return pickle.loads(pickle.dumps(past))


def assigned(past: Any) -> Any:
    for layer in past.layers:
        layer.keys, layer.values = layer.keys * 1.5, layer.values * 0.5
    return past


EDITS = [crop, reorder, repeat, select, copy.deepcopy, pickled, assigned]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_whatever_is_done_to_a_cache_is_honoured(edit: Callable[[Any], Any]) -> None:
    model = llama()
    expected = by_hand(model, 10, edit=edit)
    change(GrowingCacheStage(), model).on()
    assert compare(expected, by_hand(model, 10, edit=edit)).error == 0.0


def test_a_copy_of_a_cache_is_upstreams_own_and_independent() -> None:
    model = llama()
    change(GrowingCacheStage(), model).on()
    with torch.inference_mode():
        past = model.model(inputs_embeds=torch.ones(1, 4, HIDDEN), use_cache=True).past_key_values
        assert type(past.layers[0]) is not transformers.cache_utils.DynamicLayer
        other = copy.deepcopy(past)
        assert type(other.layers[0]) is transformers.cache_utils.DynamicLayer
        model.model(inputs_embeds=torch.ones(1, 1, HIDDEN), past_key_values=past, use_cache=True)
        assert (past.get_seq_length(), other.get_seq_length()) == (5, 4)
        assert b"accelerate_tts" not in pickle.dumps(past)  # it may be loaded where there is none


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["append", "crop", "reorder", "repeat", "select", "reset", "wide", "misfit"]),
            st.integers(1, 5),
        ),
        max_size=12,
    )
)
def test_a_growing_layer_is_a_dynamic_layer(steps: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    first = torch.randn(2, HEADS, 3, 4)
    plain, grown = DynamicCache(), DynamicCache()
    for cache in (plain, grown):
        cache.update(first, first + 1, 0)
    kv_cache.adopt(grown)
    for name, number in steps:
        batch = 2 if plain.get_seq_length() == 0 else plain.layers[0].keys.shape[0]
        new = torch.randn(batch, HEADS, number, 4)
        index = torch.randint(0, batch, (batch,))
        for cache in (plain, grown):
            layer = cache.layers[0]
            if name in {"append", "wide"} or cache.get_seq_length() == 0:
                states = new.double() if name == "wide" else new
                with torch.no_grad():
                    cache.update(states, states * 2, 0)
            elif name == "misfit" and batch > 1:  # a batch of one must not be broadcast
                with torch.no_grad(), pytest.raises(RuntimeError, match="must match"):
                    cache.update(new[:1], new[:1], 0)
            elif name == "reset":
                layer.reset()
            elif name == "crop":
                layer.crop(-min(number, layer.get_seq_length() - 1))
            elif name == "reorder":
                layer.reorder_cache(index)
            elif name == "repeat" and batch < 8:
                layer.batch_repeat_interleave(2)
            elif name == "select":
                layer.batch_select_indices(index)
        for expected, found in (
            (plain.layers[0].keys, grown.layers[0].keys), (plain.layers[0].values, grown.layers[0].values)
        ):  # fmt: skip
            assert (expected is found is None) or torch.equal(expected, found)
            assert expected is None or expected.dtype == found.dtype
        assert plain.get_seq_length() == grown.get_seq_length()
        assert plain.layers[0].get_mask_sizes(1) == grown.layers[0].get_mask_sizes(1)


def test_every_cache_that_a_model_sees_is_upstreams() -> None:
    """Upstream converts or refuses other classes: its models ask for `Cache`, its mask for the layers' methods."""
    layer, whole = kv_cache.step_classes()
    step = kv_cache.step_cache((layer, whole), torch.zeros(1, HEADS, 8, 4), torch.zeros(1, HEADS, 8, 4), 3)
    assert isinstance(step, transformers.Cache)
    assert isinstance(step.layers[0], transformers.cache_utils.DynamicLayer)
    assert kv_cache.step_classes() == (layer, whole)  # one class per release, else every step compiles anew
    grown = DynamicCache()
    grown.update(torch.zeros(1, HEADS, 3, 4), torch.zeros(1, HEADS, 3, 4), 0)
    kv_cache.adopt(grown)
    assert isinstance(grown.layers[0], transformers.cache_utils.DynamicLayer)
    model = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS
        )
    )
    bare = kv_cache.CacheOfLayers([StepLayer(*step.layers[0].buffers, 3)])
    with pytest.raises((ValueError, AttributeError, TypeError)):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=bare)


def test_a_reordered_cache_keeps_its_room() -> None:
    """A beam search reorders at every token, which must not reallocate the buffers."""
    cache = DynamicCache()
    cache.update(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4), 0)
    kv_cache.adopt(cache)
    layer: Any = cache.layers[0]
    layer.reserve(1)
    room = [buffer.shape for buffer in layer.buffers()]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert [buffer.shape for buffer in layer.buffers()] == room
    assert layer.reserve(1)
    assert [buffer.shape for buffer in layer.buffers()] == room


def test_the_room_is_bounded_in_bytes() -> None:
    cache = DynamicCache()
    wide = torch.zeros(2, 16, 1500, 64)  # of T3: 8 KiB for each position
    cache.update(wide, wide, 0)
    kv_cache.adopt(cache)
    layer: Any = cache.layers[0]
    layer.reserve(1)
    for buffer in layer.buffers():
        assert 0 < buffer.shape[2] - 1500 <= 512 + 128
        assert (buffer.shape[2] - 1500) * 8192 <= (4 << 20) + 128 * 8192


def test_buffers_grow_by_half_and_stop_at_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    kv_cache.adopt(cache)
    capacities = set()
    with torch.no_grad():
        for _ in range(1000):
            cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
            capacities.add(cache.layers[0].buffers()[0].shape[-2])
    assert len(capacities) <= 6
    assert max(capacities) <= 2 * 1003
    monkeypatch.setattr(sizes, "LARGEST", 1004)
    with torch.no_grad():
        for _ in range(5):  # beyond it as upstream has it
            cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    assert cache.get_seq_length() == 1008
    assert cache.layers[0].keys.sum() == 2 * 1008


def test_a_cache_dies_with_its_request() -> None:
    def tensors() -> int:
        # By type: isinstance() asks a proxy of something that is gone already, as other tests leave them.
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    model = llama()
    change(GrowingCacheStage(), model).on()
    tokens(model, 5)
    gc.collect()
    before = tensors()
    for _ in range(3):
        tokens(model, 30)
    gc.collect()
    assert tensors() <= before


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.LSTM(2, 2), nn.Sequential(nn.Linear(2, 2))], ids=lambda model: type(model).__name__
)
def test_what_is_no_decoder_is_left_alone(model: nn.Module) -> None:
    assert GrowingCacheStage().applies(Part("model", "model", model)) is not None


# --- the step, compiled and fused ----------------------------------------------------------------------------


STEPS: dict[str, Callable[[], CompiledBlocksStage | FusedBlocksStage]] = {
    "compiled": lambda: CompiledBlocksStage("default"),
    "fused": FusedBlocksStage,
}
PAIRS = [
    pytest.param((make, stage), id=f"{make.__name__} {name}") for make in (llama, gpt2) for name, stage in STEPS.items()
]


@pytest.fixture(scope="module")
def hooks_are_traced() -> None:
    """transformers 5.24 captures outputs by hooks with a `ContextVar`, which dynamo of torch 2.10 does not trace."""
    collected: ContextVar[bool] = ContextVar("collected", default=False)
    try:
        torch.compile(lambda x: -x if collected.get() else x, backend="eager", fullgraph=True)(torch.ones(1))
    except Unsupported:
        if importlib.util.find_spec("transformers.utils.output_capturing"):
            pytest.skip("dynamo of this torch does not trace the hooks by which this transformers captures outputs")


@pytest.fixture(scope="module", params=PAIRS)
def stepping(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, Any]]:
    """The untouched model, the one with a fast step (compiled once for all tests here), and its change."""
    make, stage = request.param
    if stage is STEPS["compiled"]:
        request.getfixturevalue("hooks_are_traced")
    untouched, model = make(), make()
    step = change(stage(), model)
    step.on()
    tokens(model, 3)
    yield untouched, model, step
    step.off()


def test_a_step_is_served(stepping: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step must be in use, or the tests below would compare upstream with itself."""
    _, model, step = stepping
    if step.graphs is None:
        served: list[int] = []
        kernel = decoder_block.decoder_blocks()
        monkeypatch.setattr(
            decoder_block, "decoder_blocks", lambda: lambda *args: (served.append(args[2]), kernel(*args))
        )
        tokens(model, 5)
        assert served == [LAYERS] * 4, "one call of the kernel for each token"
    else:
        assert step.graphs > 0


def test_300_sampled_tokens_are_the_same(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    assert torch.equal(tokens(model, 300), tokens(untouched, 300))


def test_hidden_states_of_every_layer_and_the_cache_agree(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    assert compare(by_hand(untouched, 30), by_hand(model, 30)).error < 1e-5


def test_numbers_may_change_between_requests(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, step = stepping
    graphs = step.graphs
    for options in ({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"top_k": 5}, {"do_sample": False}):
        assert torch.equal(tokens(model, 30, **options), tokens(untouched, 30, **options)), options
    assert step.graphs == graphs


def test_an_edited_cache_is_served_right(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    for edit in EDITS:
        assert compare(by_hand(untouched, 8, edit=edit), by_hand(model, 8, edit=edit)).error < 1e-5, edit.__name__


def test_beam_search_and_other_batches(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    for options in ({"num_beams": 3}, {"batch": 5}, {"num_return_sequences": 2}):
        assert torch.equal(tokens(model, 20, **options), tokens(untouched, 20, **options)), options


def test_attention_weights_of_generate(stepping: tuple[Any, Any, Any], seen: list[Event]) -> None:
    """Fused blocks serve them (test_attentions.py); for compiled ones they are upstream's business, and one event."""
    untouched, model, step = stepping
    for candidate in (untouched, model):
        candidate.set_attn_implementation("eager")
    try:
        results = [
            tokens(candidate, 4, output_attentions=True, return_dict_in_generate=True).attentions
            for candidate in (untouched, model)
        ]
    finally:
        for candidate in (untouched, model):
            candidate.set_attn_implementation("sdpa")
    assert compare(*results).error < 1e-5
    told = [event for event in seen if isinstance(event, NotApplied) and "attention weights" in event.reason]
    assert len(told) == (0 if step.graphs is None else 1)


def test_a_sequence_longer_than_the_largest_buffer(
    stepping: tuple[Any, Any, Any], seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched, model, _ = stepping
    monkeypatch.setattr(sizes, "LARGEST", 20)
    assert torch.equal(tokens(model, 40), tokens(untouched, 40))
    assert any(isinstance(event, NotApplied) and "longer than 20" in event.reason for event in seen)


def test_three_requests_at_once(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    expected = [by_hand(untouched, 25, batch) for batch in (2, 3, 4)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda batch: by_hand(model, 25, batch), (2, 3, 4)))
    assert max(compare(a, b).error for a, b in zip(expected, found, strict=True)) < 1e-5


def test_a_thread_that_does_not_compile_is_not_told_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise hidden states would be collected in a place that another, compiling thread sees."""
    output_capturing = pytest.importorskip("transformers.utils.output_capturing")
    inductor.compile_function(lambda x: x, "default", Counter("test"))
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling(), "torch's own answer has changed: is the mend still needed?"
    assert not output_capturing.is_torchdynamo_compiling()
    monkeypatch.undo()

    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if output_capturing.is_torchdynamo_compiling() else x - 1

    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0)), "dynamo still sees that it traces"


def test_a_padded_batch(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    prompt = torch.randint(2, 48, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    with torch.inference_mode():
        both = [
            candidate.generate(prompt, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
            for candidate in (untouched, model)
        ]
    assert torch.equal(*both)


def test_copies_and_pickles_are_untouched_models(stepping: tuple[Any, Any, Any]) -> None:
    untouched, model, _ = stepping
    other = copy.deepcopy(
        model
    )  # transformers 5 puts hooks on a model that cannot be pickled; torch.save of it fails too
    assert [type(module) for module in other.modules()] == [type(module) for module in untouched.modules()]
    assert type(pickle.loads(pickle.dumps(type(model)))) is type(type(untouched))
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert torch.equal(tokens(other, 10), tokens(untouched, 10))


def test_with_gradients_it_is_the_untouched_model(stepping: tuple[Any, Any, Any]) -> None:
    _, model, step = stepping
    graphs = step.graphs
    ids = torch.ones(1, 5, dtype=torch.long)
    out = model(ids, use_cache=True)
    again = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    again.logits.sum().backward()
    assert step.graphs == graphs
    model.zero_grad()


@pytest.mark.usefixtures("hooks_are_traced")
@pytest.mark.usefixtures("uncompiled")
def test_compiled_blocks_that_change_places_use_their_new_ones() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2)
    plain = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(8.0)
    model = copy.deepcopy(plain)
    step = change(CompiledBlocksStage("default"), model)
    step.on()
    by_hand(model, 4)
    step.end_warmup()
    for each in (plain, model):
        blocks = each.transformer.h
        blocks[0], blocks[1] = blocks[1], blocks[0]
        for number, block in enumerate(blocks):
            block.attn.layer_idx = number
    assert compare(by_hand(plain, 4), by_hand(model, 4)).error < 1e-5
    step.off()


@pytest.mark.usefixtures("hooks_are_traced")
def test_written_weights_are_seen(seen: list[Event]) -> None:
    model = llama()
    step = change(CompiledBlocksStage("default"), model)
    step.on()
    assert compare(by_hand(llama(), 6), by_hand(model, 6)).error < 1e-5
    other = llama()
    with torch.no_grad():
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.copy_(parameter * 1.1)
    assert compare(by_hand(other, 6), by_hand(model, 6)).error < 1e-5
    assert not seen, "the weights are inputs of the graph: written ones are used as they are"


def test_after_warm_up_nothing_compiles(stepping: tuple[Any, Any, Any], seen: list[Event]) -> None:
    untouched, model, step = stepping
    step.end_warmup()
    graphs = step.graphs
    for count in (1, 60, 130, 200):
        tokens(model, count)
    assert not seen
    # A kind of call that nobody warmed up: upstream answers at once, and an event names the guard.
    both = []
    for candidate in (untouched, model):
        candidate.set_attn_implementation("eager")
        try:
            both.append(by_hand(candidate, 4))
        finally:
            candidate.set_attn_implementation("sdpa")
    assert compare(*both).error < 1e-5
    assert step.graphs == graphs
    assert not [event for event in seen if isinstance(event, Recompiled)]
    fallen = [event for event in seen if isinstance(event, FellBack)]
    assert bool(fallen) == (graphs is not None), "the fused step has no graphs, and serves it"
    assert all("not warmed up" in event.stage and event.reason for event in fallen)


def test_an_input_that_is_one_vector_for_all_rows() -> None:
    """An expanded tensor of inference mode: it can be read, and not be written to."""
    model = llama()
    with torch.inference_mode():
        x = torch.randn(1, 1, HIDDEN).expand(2, 4, HIDDEN)
        expected = model.model(inputs_embeds=x, use_cache=True).last_hidden_state
        change(GrowingCacheStage(), model).on()
        assert torch.equal(model.model(inputs_embeds=x, use_cache=True).last_hidden_state, expected)


def test_what_a_function_writes_into_an_input_is_seen_and_nothing_else_is_written() -> None:
    with torch.inference_mode():
        read, written = torch.zeros(2), torch.zeros(2)
        before = read[:]  # a second look at the same memory

        def function(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                before.add_(5.0)  # somebody else's write, which a copying back would undo
            return one + other.add_(1.0)

        assert call_normally(function, (read, written), {}).tolist() == [1.0, 1.0]
        assert written.tolist() == [1.0, 1.0]
        assert read.tolist() == [5.0, 5.0]
