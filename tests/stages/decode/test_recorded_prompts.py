"""Prompts recorded in buckets of lengths, as far as a CPU can show it: what is recorded is run anew, not replayed."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import small_decoders
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import UNREAD, WIDTH, edited, llama
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from accelerate_tts import Event
from accelerate_tts.cli.bench import systems
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.events import FellBack, NotApplied, Recompiled
from accelerate_tts.models import describe
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.kv_cache.layers import GrowingLayer
from accelerate_tts.stages.decode.prompt_call import BUCKETS, bucket_for
from accelerate_tts.stages.decode.prompt_recordings import PromptBounds, PromptRecordings
from accelerate_tts.stages.decode.recorded_prompts import RecordedPromptsStage
from accelerate_tts.stages.decode.slot_pool import Bounds
from accelerate_tts.stages.decode.static_prompt import PromptBuffers, StaticPrompt
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import TWICE_AS_FAST, tune
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("layered_caches", "one_thread")

LENGTHS = (1, 7, 31, 32, 40, 47)
"""Two buckets: of 32 positions, and of 48."""


def reruns(device: torch.device) -> Reruns:
    """Recordings that run again. Stages of ours inside them run upstream's forward where operators are watched."""
    return Reruns(device, watched=False)


def gpt2(**options: Any) -> Any:
    """Return one whose table of positions ends before its second bucket does."""
    return small_decoders.gpt2(**{"n_positions": 60, "bos_token_id": 1, "eos_token_id": 1, **options})


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Llama by eager attention": lambda: llama(attn_implementation="eager"),
    "GPT-2": gpt2,
    "GPT-2 by eager attention": lambda: gpt2(attn_implementation="eager"),
}


class Recorded:
    """A model whose steps and prompts are recorded."""

    def __init__(
        self,
        model: Any,
        recorder: Callable[[torch.device], Any] = Reruns,
        bounds: PromptBounds | None = None,
        slots: Bounds | None = None,
        inside: HalfStage | None = None,
    ) -> None:
        part = Part("model", "decoder", model)
        stage = RecordedPromptsStage(recorder, bounds or PromptBounds())
        assert stage.applies(part) == "no decoder in it whose steps are recorded"
        self.step: Any = CapturedStepStage(reruns, inside=inside, bounds=slots).prepare(part)
        self.step.on()
        assert stage.applies(part) is None
        self.prompts = stage.prepare(part)
        self.prompts.on()

    def off(self) -> None:
        self.prompts.off()
        self.step.off()


def spoken(model: Any, length: int, rows: int = 2, tokens: int = 3, seed: int = 0, **given: Any) -> list[torch.Tensor]:
    """All tensors of the results of a prompt and of some tokens, and then of the cache."""
    generator = torch.Generator().manual_seed(100 * seed + length)
    past, mask = given.pop("past", None), given.pop("attention_mask", None)
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for number in range(tokens + 1):
            x = torch.randn(rows, 1 if number else length, WIDTH, generator=generator)
            if number and mask is not None:
                mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True, attention_mask=mask, **given)
            given.pop("position_ids", None)
            past = out["cache" if "cache" in out else "past_key_values"]
            found += [out.last_hidden_state, *(out.hidden_states or ()), *(out.attentions or ())]
    assert type(past) is transformers.DynamicCache
    assert past.get_seq_length() == length + tokens
    # Copies: a view would keep a slot in use.
    return [*found, *(tensor.clone() for layer in past.layers for tensor in (layer.keys, layer.values))]


def agree(expected: list[torch.Tensor], found: list[torch.Tensor], atol: float = 1e-5) -> None:
    assert [tensor.shape for tensor in expected] == [tensor.shape for tensor in found]
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert torch.allclose(one, other, atol=atol), (number, one.shape, float((one - other).abs().max()))


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_prompts_of_a_bucket_are_served_by_one_recording_and_are_upstreams(
    name: str, rows: int, seen: list[Event]
) -> None:
    model = MODELS[name]()
    expected = [spoken(model, length, rows) for length in LENGTHS]
    recorded = Recorded(model)
    for _ in range(2):
        for length, wanted in zip(LENGTHS, expected, strict=True):
            agree(wanted, spoken(model, length, rows))
    assert recorded.prompts.graphs == 2
    assert not seen
    recorded.off()
    for length, wanted in zip(LENGTHS, expected, strict=True):
        assert all(map(torch.equal, wanted, spoken(model, length, rows)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_on_the_left_and_all_that_is_asked_for(name: str, asked: str, padded: bool, seen: list[Event]) -> None:
    """Rows of padding themselves are compared, too."""
    model = MODELS[name]()

    def run() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for length in LENGTHS[1:]:
            mask = torch.ones(2, length, dtype=torch.long)
            mask[0, : length // 3 if padded else 0] = 0
            ids = (mask.cumsum(-1) - 1).clamp(min=0) if padded else None
            found += spoken(model, length, attention_mask=mask, position_ids=ids, **{asked: True})
        return found

    expected = run()
    recorded = Recorded(model)
    for _ in range(2):
        agree(expected, run())
    assert recorded.prompts.graphs == 2
    assert not seen


@pytest.mark.parametrize("make", [transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel])
@pytest.mark.parametrize("padded", [False, True])
def test_three_hundred_sampled_tokens_behind_it_are_upstreams(make: Any, padded: bool, seen: list[Event]) -> None:
    config = llama().config if make is transformers.LlamaForCausalLM else gpt2(n_positions=400).config
    torch.manual_seed(0)
    model = make(config).eval()
    generator = torch.Generator().manual_seed(0)

    def generate(length: int) -> torch.Tensor:
        ids = torch.randint(3, 50, (2, length), generator=generator.manual_seed(length))
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, : 3 * padded] = 0
        torch.manual_seed(3)
        found: torch.Tensor = model.generate(
            ids, attention_mask=mask, max_new_tokens=300, min_new_tokens=300, do_sample=True, pad_token_id=0
        )
        return found

    expected = [generate(length) for length in (9, 30)]
    recorded = Recorded(model)
    assert all(map(torch.equal, expected, [generate(length) for length in (9, 30)]))
    assert recorded.prompts.graphs == 1
    assert not [event for event in seen if isinstance(event, (FellBack, NotApplied))]


@pytest.mark.parametrize("begun", ["by the decoder", "empty", "of a configuration"])
@pytest.mark.parametrize("slots", [0, 4])
def test_keys_and_values_go_to_the_callers_cache(begun: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a free slot, where no token moves them, or else into tensors of the caller's own."""
    model = llama()
    make = {"by the decoder": lambda: None, "empty": transformers.DynamicCache,
            "of a configuration": lambda: transformers.DynamicCache(config=model.config)}[begun]  # fmt: skip
    expected = [spoken(model, length, past=make()) for length in LENGTHS]
    Recorded(model, slots=Bounds(slots=slots))
    moved: list[Any] = []
    spoken(model, LENGTHS[0])
    move_to = GrowingLayer.move_to
    monkeypatch.setattr(GrowingLayer, "move_to", lambda layer, *to: (moved.append(layer), move_to(layer, *to))[1])
    for length, wanted in zip(LENGTHS, expected, strict=True):
        agree(wanted, spoken(model, length, past=make()))
    assert not moved


def test_results_and_caches_are_the_callers_own() -> None:
    model = llama()
    Recorded(model, slots=Bounds(slots=1))
    x = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = model(inputs_embeds=x, use_cache=True, output_hidden_states=True)
    layers = out.past_key_values.layers
    first = [*out.hidden_states, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]
    before = [tensor.clone() for tensor in first]
    for seed in range(1, 4):
        spoken(model, 20, seed=seed)
        spoken(model, 25, seed=seed, tokens=0)
    assert all(map(torch.equal, before, first))


def test_a_number_that_is_none_stays_in_its_own_prompt() -> None:
    """Zero times what is behind a position is a sum like any other; behind a prompt nothing of another one is left."""
    model = llama()
    Recorded(model)
    expected = spoken(model, 5)
    with torch.inference_mode():
        broken = model(inputs_embeds=torch.full((2, 30, WIDTH), torch.nan), use_cache=True).last_hidden_state
    assert broken.isnan().all()
    assert all(map(torch.equal, expected, spoken(model, 5)))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 3), st.booleans()), min_size=1, max_size=6))
def test_a_prompts_bits_do_not_depend_on_others(calls: list[tuple[int, int, bool]]) -> None:
    """Nor on which recordings were dropped meanwhile, on padding of others, or on a free slot."""
    length, rows, _ = calls[0]
    alone, among = llama(), llama()
    Recorded(alone, reruns)
    recorded = Recorded(among, reruns, PromptBounds(recordings=1), Bounds(slots=1))
    kept = []
    for other, many, padded in calls[1:]:
        mask = torch.ones(many, other, dtype=torch.long)
        mask[0, : other // 2 if padded else 0] = 0
        kept.append(spoken(among, other, many, attention_mask=mask))
    expected, found = spoken(alone, length, rows, tokens=0), spoken(among, length, rows, tokens=0)
    assert all(map(torch.equal, expected, found))
    assert recorded.prompts.kept == 1


def test_half_precision_of_the_step_is_in_its_prompts_too(seen: list[Event]) -> None:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # for what the blocks add to be more than a rounding
    exact = spoken(model, 20, tokens=0)
    half = HalfStage(torch.bfloat16, carried=True)
    inside = half.prepare(Part("model", "decoder", model))
    inside.on()
    expected = spoken(model, 20, tokens=0)
    inside.off()
    recorded = Recorded(model, reruns, inside=half)
    found = spoken(model, 20, tokens=0)
    assert recorded.prompts.graphs == 1
    assert not seen
    assert 1e-4 < float((found[0] - exact[0]).norm() / exact[0].norm()) < 3e-2
    assert float((found[0] - expected[0]).norm() / expected[0].norm()) < 5e-3


@pytest.mark.parametrize("name", ["chatterbox", "xtts", "higgs"])
def test_a_systems_own_prompts(name: str, seen: list[Event]) -> None:
    """The blocks of Higgs look for audio by indexing with a mask: such prompts stay upstream's."""
    torch.manual_seed(0)
    try:
        built = systems.SYSTEMS[name].build("tiny", None, "cpu")
    except MissingExtraError as missing:
        pytest.skip(str(missing))

    def speak() -> list[Any]:
        with seeded("cpu"), torch.no_grad():
            return [t for t in _pytree.tree_leaves(built.speak(1.0)) if isinstance(t, torch.Tensor)]

    expected = speak()
    part = next(part for part in describe(built.model).parts if part.kind == "decoder")
    step, stage = CapturedStepStage(reruns).prepare(part), RecordedPromptsStage(Reruns)
    step.on()
    change = stage.prepare(part)
    change.on()
    try:
        for _ in range(2):
            for a, b in zip(expected, speak(), strict=True):
                assert torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, atol=1e-4))
        reasons = [event.reason for event in seen if isinstance(event, FellBack)]
        assert len(seen) == len(reasons) == (name == "higgs")
        assert all("depends on values in HiggsAudioV2DecoderLayer" in reason for reason in reasons)
        assert change.graphs or name == "higgs"
    finally:
        change.off()
        step.off()


# --- what it does not serve -------------------------------------------------------------------------------------------


def _hooked(model: Any) -> dict[str, Any]:
    model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return {}


def _mask_of_four(_model: Any) -> dict[str, Any]:
    return {"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()}


@pytest.mark.parametrize("how", UNREAD)
def test_what_a_replay_would_not_read_is_upstreams_with_an_event(how: str, seen: list[Event]) -> None:
    model = llama()
    untouched = copy.deepcopy(model)
    recorded = Recorded(model)
    x = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(0))

    def ask(decoder: Any) -> torch.Tensor:
        with torch.inference_mode():
            states: torch.Tensor = decoder(inputs_embeds=x, use_cache=True).last_hidden_state
            return states

    assert torch.allclose(ask(model), ask(untouched), atol=1e-5)
    assert not seen
    with edited(how, model, untouched):
        assert torch.allclose(ask(model), ask(untouched), atol=1e-5)
    assert [type(event) for event in seen] == [NotApplied]
    assert recorded.prompts.graphs == 1


REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "hooks": (_hooked, "there are hooks inside it, which a replay does not call"),
    "another mask": (_mask_of_four, "its mask has 4 dimensions"),
    "positions": (lambda _model: {"position_ids": torch.arange(20)[None, :, None]}, "its position ids have the shape"),
    "a tensor": (lambda _model: {"said": torch.ones(3)}, "it is called with said"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_prompts_that_are_not_served_are_upstreams_with_one_event(why: str, seen: list[Event]) -> None:
    model = llama()
    prepare, reason = REFUSED[why]
    recorded = Recorded(model)
    given = prepare(model)
    x = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(0))

    def ask(decoder: Any) -> Any:
        with torch.inference_mode():
            try:
                return decoder(inputs_embeds=x, use_cache=True, **given).last_hidden_state
            except Exception as error:
                return type(error)

    found = [ask(model) for _ in range(2)]
    recorded.off()
    expected = ask(model)
    assert all(one is expected or torch.allclose(one, expected, atol=1e-6) for one in found)
    assert recorded.prompts.graphs == 0
    reasons = [
        event.reason for event in seen if isinstance(event, NotApplied) and event.what.startswith("the recorded")
    ]
    assert [one.startswith(reason) for one in reasons] == [True]


def test_longer_prompts_than_any_bucket_are_upstreams(monkeypatch: pytest.MonkeyPatch, seen: list[Event]) -> None:
    monkeypatch.setattr("accelerate_tts.stages.decode.prompt_call.BUCKETS", (8, 16))
    model = llama()
    expected = [spoken(model, length) for length in (5, 15, 16, 17)]
    recorded = Recorded(model)
    for length, wanted in zip((5, 15, 16, 17), expected, strict=True):
        agree(wanted, spoken(model, length))
    assert recorded.prompts.graphs == 2
    assert [event.reason for event in seen if isinstance(event, NotApplied)] == [
        "a prompt has as many positions as the largest bucket, 16, or more"
    ]


def test_buckets_grow_by_half_at_most_and_are_larger_than_what_is_in_them() -> None:
    assert all(1.25 <= after / before <= 1.5 for before, after in itertools.pairwise(BUCKETS))
    assert [bucket_for(length) for length in (1, 31, 32, 2047, 2048)] == [32, 32, 48, 2048, None]


@pytest.mark.parametrize("how", ["both ways", "the mean", "bloom"])
def test_a_decoder_that_sees_what_is_behind_a_position_stays_upstreams(how: str, seen: list[Event]) -> None:
    """Or that makes something else of a mask: its first prompt in a bucket is compared with upstream's own."""
    torch.manual_seed(0)
    if how == "bloom":
        config = transformers.BloomConfig(vocab_size=50, hidden_size=WIDTH, n_layer=2, n_head=4)
        model = transformers.BloomModel(config).eval()
    else:
        model = llama(is_causal=how != "both ways")
    if how == "the mean":
        plain = type(model.norm)
        model.norm.__class__ = type(
            "Mean", (plain,), {"forward": lambda self, x: plain.forward(self, x - x.mean(1, True))}
        )
    x = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(0))

    def ask() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(inputs_embeds=x, use_cache=True).last_hidden_state
        return found

    expected = ask()
    recorded = Recorded(model)
    for _ in range(2):
        assert torch.allclose(ask(), expected, atol=1e-6)
    assert recorded.prompts.kept == 0
    assert len([event for event in seen if isinstance(event, (FellBack, NotApplied))]) == 1


def test_a_short_reach_of_attention_is_not_recorded() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    part = Part("model", "decoder", transformers.MistralModel(config).eval())
    CapturedStepStage(reruns).prepare(part).on()
    assert RecordedPromptsStage(reruns).applies(part) == "it attends to the last 8 positions only"


@pytest.mark.parametrize("how", ["gradients", "autocast", "training", "no cache", "a sequence", "no names"])
def test_other_calls_are_upstreams(how: str) -> None:
    model = llama()
    recorded = Recorded(model)
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    if how == "gradients":
        model(inputs_embeds=x, use_cache=True).last_hidden_state.sum().backward()
    elif how == "autocast":
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found, wanted = (m(inputs_embeds=x, use_cache=True).last_hidden_state for m in (model, llama()))
        assert torch.equal(found, wanted)
    elif how == "training":
        with torch.no_grad():
            model.train()(inputs_embeds=x, use_cache=True)
    elif how == "no cache":
        with torch.inference_mode():
            assert model(inputs_embeds=x, use_cache=False).past_key_values is None
    elif how == "no names":
        with torch.inference_mode():
            assert isinstance(model(inputs_embeds=x, use_cache=True, return_dict=False), tuple)
    else:
        with torch.inference_mode():
            past = model(inputs_embeds=x, use_cache=True).past_key_values
            model(inputs_embeds=x, use_cache=True, past_key_values=past)
        assert past.get_seq_length() == 12
        assert recorded.prompts.graphs == 1
        return
    assert recorded.prompts.graphs == 0


# --- what changes meanwhile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["written", "exchanged", "another dtype"])
def test_new_weights_are_served(how: str) -> None:
    model = llama()
    recorded = Recorded(model)
    spoken(model, 20)
    with torch.no_grad():
        for inner in model.modules():
            for name, parameter in list(inner.named_parameters(recurse=False)):
                if how == "exchanged":
                    setattr(inner, name, nn.Parameter(parameter * 1.5))
                else:
                    parameter.mul_(1.5)
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    if how == "another dtype":
        model.to(torch.float64)
        fresh.to(torch.float64)
        x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
        with torch.inference_mode():
            found, wanted = (m(inputs_embeds=x, use_cache=True).last_hidden_state for m in (model, fresh))
        assert torch.allclose(found, wanted, atol=1e-12)
    else:
        agree(spoken(fresh, 20), spoken(model, 20))
    assert recorded.prompts.graphs == (1 if how == "written" else 2), "written weights are read where they are"
    assert recorded.prompts.kept == 1


def test_what_upstream_raises_is_raised() -> None:
    model = gpt2()
    recorded = Recorded(model)
    x = torch.zeros(2, 70, dtype=torch.long)
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(IndexError):  # its table has 60 positions
            model(input_ids=x, use_cache=True)
    agree(spoken(gpt2(), 20), spoken(model, 20))
    assert recorded.prompts.graphs == 1


def test_a_recording_that_fails_costs_an_event_only(seen: list[Event]) -> None:
    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = llama()
    expected = spoken(model, 20)
    recorded = Recorded(model, lambda device: Reruns(device, fails))
    for _ in range(2):
        agree(expected, spoken(model, 20))
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["recorded prompts"]
    assert recorded.step.graphs == 1, "tokens are recorded as before"
    assert recorded.prompts.bytes == 0


def test_a_prompt_that_asks_for_a_value_is_found_out_before_it_is_recorded(seen: list[Event]) -> None:
    model = llama()
    plain = type(model.norm)
    asks = {"forward": lambda self, x: plain.forward(self, x if float(x.sum()) > -1e9 else -x)}
    model.norm.__class__ = type("Asks", (plain,), asks)
    expected = spoken(model, 20)
    Recorded(model, lambda device: Reruns(device, lambda: pytest.fail("it was recorded")))
    agree(expected, spoken(model, 20))
    (event,) = [event for event in seen if isinstance(event, FellBack)]
    assert event.reason == "aten._local_scalar_dense.default reads a value from the device in Asks"


def test_recording_in_service_is_an_event(seen: list[Event]) -> None:
    model = llama()
    recorded = Recorded(model)
    spoken(model, 20)
    recorded.prompts.end_warmup()
    recorded.step.end_warmup()
    spoken(model, 25)
    assert not seen
    spoken(model, 40)
    (event,) = seen
    assert isinstance(event, Recompiled)
    assert "a prompt of less than 48 positions" in str(event)


def test_an_event_s_hook_may_call_the_model() -> None:
    from accelerate_tts.events import hooked

    model = llama()
    recorded = Recorded(model)
    recorded.prompts.end_warmup()
    expected = spoken(llama(), 40)
    found: list[Any] = []
    with hooked(lambda _event: found or found.append(spoken(model, 40))):
        agree(expected, spoken(model, 40))
    agree(expected, found[0])


def test_recordings_are_bounded_in_number_and_bytes(seen: list[Event]) -> None:
    model = llama()
    recorded = Recorded(model, reruns, PromptBounds(recordings=3))
    for rows in range(1, 8):
        spoken(model, 5, rows, tokens=0)
    assert (recorded.prompts.kept, recorded.prompts.graphs) == (3, 7)
    used = recorded.prompts.bytes
    spoken(model, 5, 7, tokens=0)
    assert recorded.prompts.graphs == 7, "the last ones are kept"
    recorded.off()
    bounds = PromptBounds(bytes=used)
    recorded = Recorded(model, reruns, bounds)
    for rows in (1, 2, 3, 4, 5, 6, 7, 1):
        for length in LENGTHS:
            spoken(model, length, rows, tokens=0)
            assert 0 < recorded.prompts.bytes <= used
    assert not seen
    recorded.off()
    recorded = Recorded(model, reruns, PromptBounds(bytes=1000))
    agree(spoken(llama(), 5), spoken(model, 5))
    assert recorded.prompts.bytes == 0
    assert [event.reason for event in seen if isinstance(event, NotApplied)] == [
        "a recorded prompt takes more than 1000 bytes"
    ]


# --- callers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_eight_threads_have_what_each_has_alone(shared: bool, seen: list[Event]) -> None:
    """A prompt is the same bits whoever else is there, also where steps are shared."""
    model = llama()
    alone = llama()
    Recorded(alone, reruns)
    plans = [(seed % 3 + 1, 5 + 9 * seed, seed) for seed in range(8)]
    expected = [spoken(alone, length, rows, 0, seed) for rows, length, seed in plans]
    recorded = Recorded(model, reruns, PromptBounds(recordings=4))
    if shared:
        (steps,) = recorded.step.steps
        steps.usual.arrange((1, 2, 4), 1)
        steps.rules, steps.is_on = steps.usual._replace(most_rows=4), True
    begin = threading.Barrier(8)

    def ask(plan: tuple[int, int, int]) -> list[list[torch.Tensor]]:
        rows, length, seed = plan
        begin.wait()
        return [spoken(model, length, rows, 0 if number % 2 else 6, seed) for number in range(4)]

    with ThreadPoolExecutor(8) as pool:
        for wanted, found in zip(expected, pool.map(ask, plans), strict=True):
            for each in found:
                assert torch.equal(each[0], wanted[0])
            for one, other in zip(found[1][1:], wanted[1:], strict=True):
                assert torch.equal(one, other)
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_nothing_of_a_load_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    for cls in (PromptRecordings, StaticPrompt):
        init: Any = cls.__init__

        def noted(self: Any, *given: Any, init: Any = init) -> None:
            made.append(weakref.ref(self))
            init(self, *given)

        monkeypatch.setattr(cls, "__init__", noted)
    model = llama()
    recorded = Recorded(model, reruns)
    spoken(model, 20)
    recorded.off()
    del recorded
    gc.collect()
    assert len(made) == 2
    assert not [one for reference in made if (one := reference()) is not None]


@pytest.mark.parametrize("pays", [True, False])
def test_tuning_keeps_the_step_and_drops_prompts_that_do_not_pay(pays: bool, decide: Any) -> None:
    model = llama()
    expected = spoken(model, 20, tokens=8)
    slower = replace(TWICE_AS_FAST, after=4.0, ratio=0.5, low=0.5, high=0.5)
    answers = [TWICE_AS_FAST, TWICE_AS_FAST if pays else slower]
    decide(compare=lambda *_args, **_kwargs: answers.pop(0) if answers else TWICE_AS_FAST, looks=False,
           unworthy=lambda *_given: None)  # fmt: skip
    stages: list[Any] = [CapturedStepStage(reruns), RecordedPromptsStage(reruns)]
    plan = ModelPlan("model", (model,), (Part("model", "decoder", model),))
    calls = warmup_calls(lambda loaded: spoken(loaded, 20, tokens=8), Loaded(model), "inference")
    tuning = tune(plan, calls, stages, DeviceInfo("cpu", "test"), Limits(60.0))
    kept = [result.stage for result in tuning.receipt.stages if result.kept]
    assert kept == ["captured decode step", *["recorded prompts"] * pays], str(tuning.receipt)
    agree(expected, spoken(model, 20, tokens=8))
    tuning.undo()
    assert all(map(torch.equal, expected, spoken(model, 20, tokens=8)))


# --- is it safe to record? --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_can_be_traced_where_asking_for_a_value_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    record = StaticPrompt.record
    monkeypatch.setattr(StaticPrompt, "record", lambda self, *given: (made.append(self), record(self, *given))[1])
    model = MODELS[name]()
    Recorded(model, reruns)
    spoken(model, 20, tokens=0)
    (prompt,) = made
    fixed = prompt.buffers

    def run(x: torch.Tensor, valid: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        buffers = PromptBuffers({"inputs_embeds": x}, fixed.positions, valid, length)
        result: torch.Tensor = prompt.compute(buffers)[0].last_hidden_state
        return result

    with torch.no_grad():
        x, valid = torch.randn(2, 32, WIDTH), torch.ones(2, 32, dtype=torch.bool)
        valid[0, :3] = False
        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(x, valid, torch.tensor([20]))
        for length in (9, 31):
            expected = run(x, valid, torch.tensor([length]))
            assert torch.allclose(graph(x, valid, torch.tensor([length])), expected, atol=1e-6)
