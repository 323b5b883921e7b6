"""The decode step for CUDA graphs, as far as a CPU can show it: what is recorded is run anew, not replayed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import UNREAD, WIDTH, edited, gpt2, llama
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from accelerate_tts import Event
from accelerate_tts.cli.bench import systems
from accelerate_tts.device.detect import SPECS, spec_of
from accelerate_tts.device.graphs import DeviceGraphs
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.events import FellBack, NotApplied, Recompiled
from accelerate_tts.kernels.triton import token_block
from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.kv_cache.layers import growing_class
from accelerate_tts.stages.decode.slot_pool import Bounds
from accelerate_tts.stages.decode.static_slot import StaticSlot
from accelerate_tts.stages.decode.token_kernels import TokenKernels
from accelerate_tts.stages.graphs.recorder import GraphRecorder
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.tuning.exclusions import obstacle
from reruns import Rerun, Reruns

pytestmark = pytest.mark.usefixtures("layered_caches")

BOUNDS = Bounds()


def reruns(device: torch.device) -> Reruns:
    """Stand-ins for CUDA graphs that run the step again."""
    return Reruns(device, watched=False)


class Stream:
    """A stand-in for a CUDA stream that records its calls."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self._told = told

    def wait_event(self, _event: object) -> None:
        self._told.append(f"{self.name} waits")


@contextmanager
def on(stream: Stream, now: list[Stream]) -> Iterator[None]:
    """Stand-in for `torch.cuda.stream`."""
    now.append(stream)
    yield
    now.pop()


class Noted(dict[str, Any]):
    """Results that note that they are copied."""

    told: ClassVar[list[str]]

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.told.append("results are copied")

    def __getattr__(self, name: str) -> Any:
        return self[name]


class OnStreams(DeviceGraphs):
    """Graphs that run again, on streams that only note what they are told."""

    def __init__(self, told: list[str], now: list[Stream]) -> None:
        super().__init__("cuda", "CUDAGraph", "1.10")
        self._told, self._now = told, now

    def on_device(self, device: torch.device) -> Any:
        return nullcontext()

    def current_stream(self, device: torch.device) -> Any:
        return self._now[-1]

    def on_stream(self, stream: Any) -> Any:
        return on(stream, self._now)

    def new_stream(self) -> None:
        return None

    def new_pool(self) -> None:
        return None

    def new_event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self._told.append(f"{stream.name} was used"),
            synchronize=lambda: self._told.append("all is done"),
        )

    def capture(self, run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Any, Any]:
        made = Rerun(run, lambda: self._told.append("replay"), watched=False)
        noted = type("Noted", (Noted,), {"told": self._told})(**made.outputs)
        self._told.pop()  # this is what they are copied from
        return made, noted


def test_streams_wait_for_each_other() -> None:
    """Inputs, buffers and results of a slot are one for all threads, and each thread has a stream."""
    told: list[str] = []
    streams = {name: Stream(name, told) for name in ("one", "other")}
    now = [streams["one"]]
    model = llama()
    stage = CapturedStepStage(bounds=Bounds(slots=1))
    change = stage.prepare(Part("model", "decoder", model))
    change.on()
    generator = torch.Generator().manual_seed(0)
    on_streams = SPECS.scope(cpu=replace(spec_of("cpu"), graphs=OnStreams(told, now)))
    with on_streams, torch.inference_mode():
        past = model(inputs_embeds=torch.randn(1, 4, WIDTH, generator=generator), use_cache=True).past_key_values
        for name in ("one", "other"):
            told.clear()
            now[:] = [streams[name]]
            model(inputs_embeds=torch.randn(1, 1, WIDTH, generator=generator), past_key_values=past, use_cache=True)
            # The results are copied before anyone else may write.
            assert told[0] == f"{name} waits"
            assert told[-3:] == ["replay", "results are copied", f"{name} was used"]
        assert len(told) == 4
        told.clear()
        now[:] = [streams["one"]]
        del past
        loop(model, 2, rows=1, seed=3)  # another sequence in the slot
        # Behind all that the last one's stream was told, though its cache is gone.
        assert told[:3] == ["other waits", "other was used", "one waits"]
        told.clear()
        now[:] = [streams["other"]]
        loop(model, 2, rows=2)  # needs the one slot there is, whose memory goes
        change.off()
    assert told[:3] == ["one waits", "one was used", "all is done"]


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Llama by eager attention": lambda: llama(attn_implementation="eager"),
    "GPT-2": gpt2,
}


def capture(model: Any, bounds: Bounds = BOUNDS, recorder: Callable[[torch.device], Any] = reruns) -> Any:
    stage, part = CapturedStepStage(recorder, bounds=bounds), Part("model", "decoder", model)
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


def loop(
    model: Any, count: int = 8, rows: int = 2, prompt: int = 6, seed: int = 1, past: Any = None, **asked: Any
) -> Any:
    """The last hidden states of a prompt and of each token, and the cache, which may have a sequence already."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    with torch.inference_mode():
        for _ in range(count):
            x = torch.randn(rows, prompt if past is None else 1, WIDTH, generator=generator)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked)
            past = out["cache" if "cache" in out else "past_key_values"]  # as of transformers 5.24
            states.append(out.last_hidden_state[:, -1:])
    return torch.cat(states, 1), past


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tokens_are_served_by_one_recording_and_are_upstreams(name: str, rows: int) -> None:
    model = MODELS[name]()
    expected, _ = loop(model, rows=rows)
    change = capture(model, recorder=Reruns)
    found, past = loop(model, rows=rows)
    assert torch.allclose(expected, found, atol=1e-5)
    assert change.graphs == 1
    assert type(past) is transformers.DynamicCache
    assert past.get_seq_length() == 6 + 7
    del past
    loop(model, rows=rows, seed=2)
    assert change.graphs == 1  # the next request moves in
    change.off()
    assert torch.equal(loop(model, rows=rows)[0], expected)


@pytest.mark.parametrize("make", [transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel])
def test_arguments_given_as_none_are_none_of_its_inputs(make: Any, seen: list[Event]) -> None:
    """A head over the decoder passes `position_ids=None` on; a recording gives the decoder its own positions."""
    model = make((llama() if make is transformers.LlamaForCausalLM else gpt2()).config).eval()
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))

    def logits() -> torch.Tensor:
        past, found = None, []
        with torch.inference_mode():
            for number in range(1, 6):
                out = model(input_ids=ids[:, number - 1 : number], past_key_values=past, position_ids=None)
                past = out.past_key_values
                found.append(out.logits)
        return torch.cat(found, 1)

    expected = logits()
    change = capture(model)
    assert torch.allclose(logits(), expected, atol=1e-5)
    assert change.graphs == 1
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_generating_with_padding_gives_the_same_tokens_and_hidden_states() -> None:
    model: Any = transformers.LlamaForCausalLM(llama().config).eval()
    ids = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def generate() -> Any:
        torch.manual_seed(3)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=300, min_new_tokens=300, do_sample=True, pad_token_id=0,
            return_dict_in_generate=True, output_hidden_states=True,
        )  # fmt: skip

    expected = generate()
    change = capture(model)
    found = generate()
    assert torch.equal(expected.sequences, found.sequences)
    for before, after in zip(expected.hidden_states, found.hidden_states, strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert change.graphs == 2  # up to 256 positions, and up to 512: the sequence moved with all that it held


@pytest.mark.parametrize("how", ["cropped", "copied", "reordered", "kept"])
def test_a_cache_that_others_change_is_served_right(how: str) -> None:
    model = llama()

    def run() -> torch.Tensor:
        _, past = loop(model)
        generator = torch.Generator().manual_seed(5)
        kept = past if how == "kept" else None
        if how == "cropped":
            past.crop(-6)
        elif how == "copied":
            past = copy.deepcopy(past)
        elif how == "reordered":
            past.reorder_cache(torch.tensor([1, 0]))
        elif how == "kept":
            loop(model, seed=9)  # another request meanwhile, in the same slot
        states = []
        with torch.inference_mode():
            for _ in range(3):
                x = torch.randn(2, 1, WIDTH, generator=generator)
                states.append(model(inputs_embeds=x, past_key_values=past, use_cache=True).last_hidden_state)
        del kept
        return torch.cat(states, 1)

    expected = run()
    capture(model)
    assert torch.allclose(run(), expected, atol=1e-5)


class Moves:
    """Notes each sequence that is moved into a slot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        moved = growing_class().move_to

        def move_to(layer: Any, *buffers: Any) -> None:
            self.count += 1
            moved(layer, *buffers)

        monkeypatch.setattr(growing_class(), "move_to", move_to)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("begun", ["by the decoder", "empty", "of a configuration"])
@pytest.mark.parametrize("prompt", [1, 6, 255])
def test_a_prompt_writes_into_a_free_slot(name: str, begun: str, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()

    def run(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        past = {"by the decoder": lambda: None, "empty": transformers.DynamicCache,
                "of a configuration": lambda: transformers.DynamicCache(config=model.config)}[begun]()  # fmt: skip
        states = []
        with torch.inference_mode():
            for number in range(4):
                x = torch.randn(2, 1 if number else prompt, WIDTH, generator=generator)
                out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
                past = out.past_key_values
                states.append(out.last_hidden_state)
        return torch.cat(states, 1), past.get_seq_length(), type(past)

    expected = [run(seed) for seed in range(3)]
    change = capture(model)
    run(0)
    moves = Moves(monkeypatch)
    for seed, (states, length, kind) in enumerate(expected):
        found = run(seed)
        assert torch.allclose(found[0], states, atol=1e-5)
        assert found[1:] == (length, kind)
    assert moves.count == 0 if prompt < 255 else moves.count, "a slot of 256 positions has no room for the second token"
    assert change.graphs == (1 if prompt < 255 else 2)


def test_a_prompt_takes_no_slot_that_a_sequence_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    expected = [loop(model, seed=seed)[0] for seed in range(3)]
    capture(model, Bounds(slots=2))
    moves = Moves(monkeypatch)
    kept = [loop(model, seed=seed) for seed in range(2)]
    assert moves.count == 4, "each was recorded first, for a sequence that was elsewhere"
    kept.append(loop(model, seed=2))
    assert moves.count == 4, "there is no room for another one, which visits a slot"
    for (states, past), whole in zip(kept, expected, strict=True):
        assert torch.allclose(states, whole, atol=1e-5)
        assert past.get_seq_length() == 6 + 7
    del kept, past
    loop(model, seed=2)
    assert moves.count == 4


@pytest.mark.parametrize("how", ["fails", "gradients", "autocast", "half", "no cache"])
def test_a_prompt_that_is_another_kind_of_call(how: str) -> None:
    model = llama()
    change = capture(model)
    expected, _ = loop(model)
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    if how == "fails":
        handle = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(3):
            with torch.inference_mode(), pytest.raises(ZeroDivisionError):
                model(inputs_embeds=x, use_cache=True)
        handle.remove()
    elif how == "gradients":
        model(inputs_embeds=x, use_cache=True).last_hidden_state.sum().backward()
        model.zero_grad()
    elif how == "autocast":
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            past = model(inputs_embeds=x, use_cache=True).past_key_values
            untouched = llama()(inputs_embeds=x, use_cache=True).past_key_values
        assert torch.equal(past.layers[1].values, untouched.layers[1].values)
    elif how == "half":
        model.to(torch.bfloat16)
        with torch.inference_mode():
            past = model(inputs_embeds=x.to(torch.bfloat16), use_cache=True).past_key_values
        assert past.layers[0].keys.dtype == torch.bfloat16
        return
    else:
        with torch.inference_mode():
            assert model(inputs_embeds=x, use_cache=False).past_key_values is None
    assert len(change.slots) == 1
    assert torch.equal(loop(model)[0], expected)


def test_weights_that_are_exchanged_during_a_prompt_end_its_slot() -> None:
    model = llama()
    change = capture(model)
    loop(model)
    (before,) = change.slots

    def exchange(*_given: Any) -> None:
        model.layers[0].mlp.up_proj.weight = nn.Parameter(model.layers[0].mlp.up_proj.weight * 2)
        handle.remove()
        other.extend(loop(model, rows=3, seed=2))  # another request, which finds that out

    other: list[Any] = []
    handle = model.norm.register_forward_hook(exchange)
    found, _ = loop(model, seed=1)
    assert before not in change.slots
    assert other
    change.off()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(0.5)
    first = loop(model, 1, seed=1)[0]
    assert torch.allclose(found[:, :1], first, atol=1e-5)


def test_two_requests_in_turn_keep_their_own_sequences(seen: list[Event]) -> None:
    """One is in the one slot, and the other one visits another."""
    model = llama()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 1, 5, WIDTH, generator=generator)

    def run() -> list[torch.Tensor]:
        pasts: list[Any] = [None, None]
        states = []
        with torch.inference_mode():
            for number in range(9):
                for which in (0, 1):
                    given = x[which, number] if number == 0 else x[which, number][:, :1]
                    out = model(inputs_embeds=given, past_key_values=pasts[which], use_cache=True)
                    pasts[which] = out.past_key_values
                    states.append(out.last_hidden_state[:, -1])
        return states

    expected = run()
    change = capture(model, Bounds(slots=1))
    for a, b in zip(expected, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert change.graphs == 2
    assert len(change.slots) == 1
    (event,) = seen
    assert isinstance(event, NotApplied)
    assert event.reason == "every slot holds a sequence in use; a token of another sequence copies its cache"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["token", "crop", "new", "copy"])), max_size=25))
def test_any_interleaving_of_requests_equals_upstreams(steps: list[tuple[int, str]]) -> None:
    model = llama()

    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        pasts: dict[int, Any] = {}
        found = []
        with torch.inference_mode():
            for which, what in steps:
                if what == "new" or which not in pasts:
                    x = torch.randn(1, 4, WIDTH, generator=generator)
                    pasts[which] = model(inputs_embeds=x, use_cache=True).past_key_values
                elif what == "crop":
                    pasts[which].crop(-min(2, pasts[which].get_seq_length() - 1))
                elif what == "copy":
                    pasts[which] = copy.deepcopy(pasts[which])
                x = torch.randn(1, 1, WIDTH, generator=generator)
                out = model(inputs_embeds=x, past_key_values=pasts[which], use_cache=True)
                found.append(out.last_hidden_state)
        return found

    expected = run()
    capture(model)
    for a, b in zip(expected, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_tensors_that_are_taken_out_of_a_cache_stay_as_they_are() -> None:
    """As where the keys and values of a voice's prompt are kept for the next sentences."""
    model = llama()
    capture(model, Bounds(slots=1))
    loop(model)
    _, past = loop(model, seed=1)
    kept = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
    before = [tensor.clone() for tensor in kept]
    del past
    for seed in range(2, 5):
        loop(model, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_caches_made_of_a_prompts_tensors_are_whole() -> None:
    """The prompt's cache is gone, and each sentence begins with a new one over its tensors."""
    model = llama()

    def run() -> list[torch.Tensor]:
        loop(model)
        _, prompt = loop(model, 2, seed=1)
        pairs = [(layer.keys, layer.values) for layer in prompt.layers]
        del prompt
        found = []
        for seed in range(2, 6):
            past = transformers.DynamicCache()
            for number, pair in enumerate(pairs):
                past.update(*pair, number)
            found.append(loop(model, 4, seed=seed, past=past)[0])
        return found

    expected = run()
    capture(model, Bounds(slots=2))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, run(), strict=True))


@pytest.mark.parametrize("slots", [1, 4])
def test_a_call_changes_no_cache_but_its_own(slots: int) -> None:
    """Its thread may be at work on it: here a cache is cropped, and others come in the middle of that."""
    model = llama()

    def run() -> list[torch.Tensor]:
        found = []
        _, past = loop(model)
        for layer in past.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                others = [loop(model, seed=seed) for seed in range(2, 7)]
                found += [states for states, _ in others]
                setattr(layer, name, tensor[..., :-2, :])
        found.append(loop(model, 5, seed=7, past=past)[0])
        return found + [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]

    expected = run()
    capture(model, Bounds(slots=slots))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, run(), strict=True))


@pytest.mark.parametrize("slots", [0, 1])
@pytest.mark.parametrize("begun", ["before", "by its prompt"])
def test_numbers_of_a_sequence_that_is_gone_reach_no_other(slots: int, begun: str) -> None:
    """Hidden places are multiplied by 0, and a NaN times 0 is a NaN. A tensor's whole storage is saved to a file."""
    model = llama()
    expected, _ = loop(model)
    capture(model, Bounds(slots=slots))
    for _ in range(2):
        past = loop(model, 1, prompt=30)[1] if begun == "before" else None
        with torch.inference_mode():
            for positions in (20, 1, 1) if past is None else (1, 1):
                x = torch.full((2, positions, WIDTH), torch.nan)
                past = model(inputs_embeds=x, past_key_values=past, use_cache=True).past_key_values
        del past
        found, kept = loop(model)
        assert torch.allclose(found, expected, atol=1e-5)
        for layer in kept.layers:
            assert not torch.empty(0).set_(layer.values.untyped_storage()).isnan().any()
        del kept, layer


def test_layers_that_somebody_holds_are_those_of_the_cache() -> None:
    model = llama()
    capture(model)
    loop(model)
    past = transformers.DynamicCache(config=model.config)
    layers, other = list(past.layers), transformers.DynamicCache()
    other.layers = list(past.layers)
    loop(model, past=past, prompt=6)  # one token, as the first of an empty cache
    loop(model, 3, past=past)
    assert all(layer is one for layer, one in zip(layers, past.layers, strict=True))
    assert other.get_seq_length() == past.get_seq_length() == 11
    whole: Any = transformers.DynamicCache()
    with torch.inference_mode():
        model(inputs_embeds=torch.ones(2, 4, WIDTH), past_key_values=whole, use_cache=True)
        first = whole.layers[0]
        model(inputs_embeds=torch.ones(2, 1, WIDTH), past_key_values=whole, use_cache=True)
    assert first.get_seq_length() == 5


@pytest.mark.parametrize("given", ["empty", "of a configuration"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_cache_whose_prompt_failed_is_as_upstream_leaves_it(given: str, failing: int) -> None:
    model = llama()

    def run() -> list[Any]:
        loop(model)
        past = transformers.DynamicCache() if given == "empty" else transformers.DynamicCache(config=model.config)
        handle = model.layers[failing].register_forward_pre_hook(lambda *_: 1 / 0)
        with torch.inference_mode(), pytest.raises(ZeroDivisionError):
            model(inputs_embeds=torch.ones(2, 4, WIDTH), past_key_values=past, use_cache=True)
        handle.remove()
        found = [len(past.layers), past.get_seq_length(), *(layer.is_initialized for layer in past.layers)]
        if not failing:  # as one of another size, for which there is no slot
            with torch.inference_mode():
                for positions in (5, 1):
                    x = torch.ones(3, positions, WIDTH)
                    out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
                    found.append(out.last_hidden_state[:, -1].sum().item())
        return found

    expected = run()
    capture(model)
    assert run() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("how", [*UNREAD, "layers"])
def test_what_a_replay_would_not_read_is_upstreams_with_an_event(how: str, seen: list[Event]) -> None:
    model = llama(attention_dropout=0.0)
    untouched = copy.deepcopy(model)
    change = capture(model)
    _, past = loop(model)
    _, twin = loop(untouched)
    if how == "layers":
        for each in (model, untouched):
            each.config.num_hidden_layers = 1  # as early exit in transformers' assisted generation
        past, twin = transformers.DynamicCache(), transformers.DynamicCache()
    with edited(how, model, untouched):
        found = [loop(model, 3, past=past)[0], loop(untouched, 3, past=twin)[0]]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert change.graphs == 1
    assert [type(event) for event in seen] == [NotApplied]


def test_a_module_that_is_put_in_later_has_its_hooks_called(seen: list[Event]) -> None:
    model = llama()
    capture(model)
    _, past = loop(model)
    called: list[Any] = []
    model.layers[0].mlp.act_fn = nn.SiLU()
    model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: called.append(1))
    loop(model, 3, past=past)
    assert len(called) == 3
    (event,) = seen
    assert "hooks inside it" in str(event)


def test_results_are_not_overwritten_by_the_next_token() -> None:
    model = llama()
    capture(model)
    _, past = loop(model)
    with torch.inference_mode():
        first = model(inputs_embeds=torch.ones(2, 1, WIDTH), past_key_values=past, use_cache=True).last_hidden_state
        before = first.clone()
        model(inputs_embeds=-torch.ones(2, 1, WIDTH), past_key_values=past, use_cache=True)
    assert torch.equal(first, before)


def test_a_sequence_beyond_the_largest_slot_goes_on_as_upstreams(
    monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    model = llama()
    expected, _ = loop(model, 20)
    monkeypatch.setattr("accelerate_tts.stages.decode.slot_pool.CAPACITIES", (8, 16))
    change = capture(model)
    found, past = loop(model, 20)
    assert torch.allclose(expected, found, atol=1e-5)
    assert change.graphs == 2
    assert past.get_seq_length() == 25
    assert any(isinstance(event, NotApplied) and "positions" in event.reason for event in seen)


def test_recordings_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[StaticSlot]] = []
    init = StaticSlot.__init__

    def noted(slot: StaticSlot, *args: Any, **named: Any) -> None:
        made.append(weakref.ref(slot))
        init(slot, *args, **named)

    def alive() -> list[StaticSlot]:
        gc.collect()
        return [slot for reference in made if (slot := reference()) is not None]

    monkeypatch.setattr(StaticSlot, "__init__", noted)
    model = llama()
    change = capture(model, Bounds(slots=3))
    for rows in range(1, 8):
        loop(model, 3, rows=rows)
    assert [slot.rows for slot in change.slots] == [5, 6, 7]
    kept = [loop(model, 3, rows=rows)[1] for rows in range(1, 8)]
    assert [slot.rows for slot in change.slots] == [1, 2, 3]
    assert [slot.rows for slot in alive()] == [1, 2, 3, 5, 6, 7], "three more, for sequences without a slot"
    change.off()
    most = 12 * change.slots[0].bytes  # of twelve rows
    made.clear()
    change = capture(model, Bounds(bytes=most))
    for rows in range(1, 8):
        kept.append(loop(model, 3, rows=rows)[1])
        assert sum(slot.bytes for slot in change.slots) <= most
        assert sum(slot.bytes for slot in alive()) <= 2 * most
    assert [slot.rows for slot in change.slots] == [1, 2, 3, 4]
    for rows, past in zip([*range(1, 8)] * 2, kept, strict=True):  # all sequences are whole still
        assert past.layers[0].keys.shape[:3] == (rows, 2, 8)
        assert torch.isfinite(past.layers[0].keys).all()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"attention_mask": torch.zeros(2, 1, 1, 7)}, "4 dimensions"),
        ({"something": torch.ones(1)}, "something"),
    ],
)
def test_what_a_recording_cannot_serve_is_upstreams_with_an_event(
    asked: dict[str, Any], reason: str, seen: list[Event]
) -> None:
    model = llama(attn_implementation="eager")
    change = capture(model)
    _, past = loop(model, 1)
    with torch.inference_mode():
        model(inputs_embeds=torch.ones(2, 1, WIDTH), past_key_values=past, use_cache=True, **asked)
    assert any(isinstance(event, NotApplied) and reason in event.reason for event in seen)
    assert change.graphs == 0


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_attention_weights_are_served(make: Callable[..., Any], how: str, seen: list[Event]) -> None:
    untouched, model = make(attn_implementation=how), make(attn_implementation=how)
    change = capture(model)
    found = []
    with torch.inference_mode():
        for candidate in (untouched, model):
            past = candidate(inputs_embeds=torch.ones(2, 5, WIDTH), use_cache=True).past_key_values
            x = torch.ones(2, 1, WIDTH)
            found.append([])
            for asked in (True, False, True):
                out = candidate(inputs_embeds=x, past_key_values=past, use_cache=True, output_attentions=asked)
                found[-1].append(out.attentions or ())
    assert change.graphs == 2
    assert not seen
    for one, other in zip(*found, strict=True):
        assert [weights.shape for weights in one] == [weights.shape for weights in other]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_hooks_inside_are_called(seen: list[Event]) -> None:
    model = llama()
    change = capture(model)
    called: list[int] = []
    model.layers[0].mlp.register_forward_hook(lambda *_: called.append(1))
    loop(model, 4)
    assert len(called) == 4
    assert change.graphs == 0
    assert any(isinstance(event, NotApplied) and "hooks" in event.reason for event in seen)


def test_new_weights_are_served() -> None:
    model = llama()
    capture(model)
    loop(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found, _ = loop(model)
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(found, loop(fresh)[0], atol=1e-5)


def test_a_recording_that_fails_costs_an_event_only(seen: list[Event]) -> None:
    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = llama()
    expected, _ = loop(model)
    capture(model, recorder=lambda device: Reruns(device, fails))
    assert torch.allclose(loop(model)[0], expected, atol=1e-6)
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["captured decode step"]


def test_recording_in_service_is_an_event(seen: list[Event]) -> None:
    model = llama()
    change = capture(model)
    loop(model)
    change.end_warmup()
    assert not [event for event in seen if isinstance(event, Recompiled)]
    loop(model, rows=3)
    assert len([event for event in seen if isinstance(event, Recompiled)]) == 1


def test_a_cache_that_is_gone_leaves_its_slot_to_the_next_and_keeps_nothing_alive() -> None:
    model = llama()
    change = capture(model)
    _, past = loop(model)
    (slot,) = change.slots
    gone = weakref.ref(past)
    assert not slot.is_free()
    del past
    gc.collect()
    assert gone() is None
    assert slot.is_free()


# --- is it safe to record? -----------------------------------------------------------------------------------------


def slot_of(model: Any, rows: int = 2) -> Any:
    change = capture(model)
    loop(model, 3, rows=rows)
    return change.slots[0]


FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
"""Operators that read a value from the device, or whose result has a size that depends on values."""


class Operators(TorchDispatchMode):
    """Lists the operators that run, with the shapes and addresses of what they are given and return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.shapes: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen.append(str(function))
        self.shapes.append([tuple(t.shape) for t in _pytree.tree_leaves(result) if isinstance(t, torch.Tensor)])
        return result


@pytest.mark.parametrize("name", MODELS)
def test_no_operator_depends_on_how_long_the_sequence_is(name: str) -> None:
    slot = slot_of(MODELS[name]())
    traces = []
    for position in (7, 100, slot.capacity - 1):
        with torch.no_grad(), Operators() as operators:
            slot.position.fill_(position)
            slot.step()
        traces.append((operators.seen, operators.shapes))
    assert traces[0] == traces[1] == traces[2]
    assert not [op for op in traces[0][0] if any(name in op for name in FORBIDDEN)]


@pytest.mark.parametrize("name", ["chatterbox", "xtts", "higgs"])
def test_a_systems_own_loop_is_served_by_one_recording(name: str) -> None:
    """Higgs gives neither ids nor embeddings, but a frame of audio ids, under a name of its own."""
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
    change = CapturedStepStage(reruns).prepare(part)
    change.on()
    try:
        for a, b in zip(expected, speak(), strict=True):
            assert torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, atol=1e-4))
        assert change.graphs == 1
        slot = change.slots[0]
        with torch.no_grad(), Operators() as operators:
            slot.step()
        assert not [op for op in operators.seen if any(name in op for name in FORBIDDEN)]
    finally:
        change.off()


@pytest.mark.parametrize("name", MODELS)
def test_the_step_can_be_traced_where_asking_for_a_value_is_an_error(name: str) -> None:
    slot = slot_of(MODELS[name]())

    def step(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        slot.inputs["inputs_embeds"], slot.position = x, position
        result: torch.Tensor = slot.step().last_hidden_state
        return result

    with torch.no_grad():
        x, position = torch.randn(2, 1, WIDTH), torch.tensor([7])
        graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(x, position)
        expected = step(x, position)
        assert torch.allclose(graph(x, position), expected, atol=1e-6)


def test_addresses_stay_the_same() -> None:
    model = llama()
    slot = slot_of(model)

    def addresses() -> list[int]:
        tensors = [*_pytree.tree_leaves(slot.buffers), *slot.inputs.values(), slot.position, slot.valid]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    loop(model, 12, seed=4)
    loop(model, 3, seed=5)
    assert addresses() == before


def test_a_step_that_asks_for_a_value_is_found_out() -> None:
    model = llama()
    slot = slot_of(model)
    plain = type(model.norm).forward

    def asks(self: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = plain(self, x) if float(x.sum()) > -1e9 else x
        return result

    type(model.norm).forward = asks  # type: ignore[method-assign]
    try:
        with torch.no_grad(), Operators() as operators:
            slot.step()
    finally:
        type(model.norm).forward = plain  # type: ignore[method-assign]
    assert any("_local_scalar_dense" in op for op in operators.seen)


# --- where it is tried ---------------------------------------------------------------------------------------------


def test_it_is_tried_where_torch_has_graphs() -> None:
    def names(device: str) -> list[str]:
        return [stage.name for stage in default_stages(device, "reduce-overhead")]

    tried = [device for device in ("cpu", "cuda", "mps", "xpu") if "captured decode step" in names(device)]
    assert tried == ["cuda", "xpu"]


def test_half_precision_is_tried_inside_recordings_and_not_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a recording it would change nothing, and without one it is slower there (H200: 0.68x to 0.76x)."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: True)
    names = [stage.name for stage in default_stages("cuda", None, "fast")]
    recorded = [name for name in names if name.startswith("captured")]
    assert recorded == ["captured decode step", "captured decode step, bf16 part"]
    assert names.index(recorded[-1]) < names.index("bf16 layers") < names.index("bf16 part")
    assert [name for name in names if "decode step" in name] == recorded
    assert len([stage.name for stage in default_stages("cuda", None) if stage.name.startswith("captured")]) == 1
    model = llama()
    part, half = Part("model", "decoder", model), HalfStage(torch.bfloat16, carried=False)
    assert obstacle(half, part) is None
    change = capture(model)
    assert obstacle(half, part) == "its steps are recorded"
    assert CapturedStepStage(reruns, inside=half).applies(part) is None, "it competes with what is in force"
    change.off()
    assert obstacle(half, part) is None


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_half_precision_is_inside_the_recording(how: str) -> None:
    model = llama(attn_implementation=how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # for what the blocks add to be more than a rounding
    part, half = Part("model", "decoder", model), HalfStage(torch.bfloat16, carried=True)
    exact, _ = loop(model)
    inside = half.prepare(part)
    inside.on()
    expected, _ = loop(model)
    inside.off()
    change = CapturedStepStage(reruns, inside=half).prepare(part)
    change.on()
    found, past = loop(model)
    assert change.graphs == 1
    assert past.get_seq_length() == 6 + 7
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 1e-2
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    change.off()
    assert torch.equal(loop(model)[0], exact)
    assert (
        CapturedStepStage(reruns, inside=half).applies(Part("gpt", "decoder", gpt2()))
        == "no layer that computes in fp32"
    )


def test_kernels_for_a_token_are_tried_where_triton_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order and obstacles alone: tests/triton shows their results."""
    names = [stage.name for stage in default_stages("cuda", "reduce-overhead") if "decode step" in stage.name]
    assert names == ["captured decode step", "captured decode step, token kernels (fp32)"]
    stage = CapturedStepStage(reruns, kernels=TokenKernels("fp32"))
    assert stage.superseded_by == tuple(f"captured decode step, token kernels ({less})" for less in ("bf16", "int8"))
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=WIDTH, n_layer=2, n_head=4)
    other = Part("model", "decoder", transformers.BloomModel(bloom).eval())
    with monkeypatch.context() as scope:
        scope.setattr(token_block, "find_spec", lambda name: ModuleSpec(name, None))
        assert stage.applies(other) == "no decoder's blocks that the kernels know in it"
        assert stage.applies(Part("model", "decoder", llama())) == "it is on no device that Triton computes on"
    monkeypatch.setattr(token_block, "find_spec", lambda _name: None)
    assert stage.applies(Part("model", "decoder", llama())) == "Triton is not installed"


def test_blocks_are_compiled_without_recordings_of_inductors() -> None:
    blocks = next(stage for stage in default_stages("cuda", "reduce-overhead") if stage.name == "compiled blocks")
    assert vars(blocks)["_mode"] == "default"


def test_a_recorder_for_cuda_needs_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, and this is about machines without one")
    with pytest.raises((RuntimeError, AssertionError)):
        GraphRecorder(torch.device("cuda"))


def test_a_decoder_that_takes_no_mask_of_four_dimensions_is_upstreams(seen: list[Event]) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=50, hidden_size=WIDTH, n_layer=2, n_head=4)
    model = transformers.BloomModel(config).eval()
    expected, _ = loop(model)
    capture(model)
    assert torch.allclose(loop(model)[0], expected, atol=1e-5)
    assert [type(event) for event in seen] == [FellBack]


def opt(**_options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=WIDTH,
    )
    return transformers.OPTModel(config).eval()


def mistral() -> Any:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    return transformers.MistralModel(config).eval()


@pytest.mark.parametrize(
    ("make", "reason"), [(llama, "different lengths"), (opt, "counts its positions"), (mistral, "the last 8 positions")]
)
def test_a_mask_or_a_cache_that_means_something_else_is_upstreams(make: Any, reason: str, seen: list[Event]) -> None:
    """One layer that holds less, as cross attention does; positions that are counted in a mask; a short reach."""
    model = make()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        past, states = transformers.DynamicCache(), []
        with torch.inference_mode():
            for number in range(5):
                x = torch.randn(2, 1 if number else 6, WIDTH, generator=generator)
                seen_by = torch.cat([mask, mask.new_ones(2, number)], 1) if make is opt else None
                out = model(inputs_embeds=x, past_key_values=past, use_cache=True, attention_mask=seen_by)
                states.append(out.last_hidden_state[:, -1:])
                if number == 0 and make is llama:
                    past.layers[1].keys, past.layers[1].values = (
                        tensor[:, :, 2:] for tensor in (past.layers[1].keys, past.layers[1].values)
                    )
        return torch.cat(states, 1)

    expected = run()
    capture(model)
    assert torch.allclose(run(), expected, atol=1e-5)
    assert [reason in event.reason for event in seen if isinstance(event, NotApplied)] == [True]


@pytest.mark.parametrize("how", ["cropped", "one layer's keys", "a view"])
def test_a_slot_is_not_free_while_a_cache_has_a_view_of_it(how: str) -> None:
    """Upstream's `crop` keeps the first positions where they are: a view of the slot's buffers."""
    model = llama()

    def run() -> torch.Tensor:
        _, past = loop(model)
        if how == "cropped":
            past.crop(-2)
        elif how == "one layer's keys":
            past.layers[1].keys = past.layers[1].keys[:]
        else:
            for layer in past.layers:
                layer.keys, layer.values = layer.keys[..., :, :], layer.values[:]
        other = loop(model, seed=9)  # another request meanwhile, which needs a slot
        with torch.inference_mode():
            x = torch.ones(2, 1, WIDTH)
            found = [model(inputs_embeds=x, past_key_values=one, use_cache=True) for one in (past, other[1])]
        return torch.cat([each.last_hidden_state for each in found], 1)

    expected = run()
    change = capture(model, Bounds(slots=1))
    assert torch.allclose(run(), expected, atol=1e-5)
    assert len(change.slots) == 1
