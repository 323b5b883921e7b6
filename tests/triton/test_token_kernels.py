"""A recorded step by the kernels, over a stand-in for CUDA graphs that runs the step again, against upstream's loop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from accelerate_tts import Event
from accelerate_tts.events import FellBack, NotApplied
from accelerate_tts.kernels.triton import token_block
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode import slot_pool
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.token_kernels import TokenKernels
from reruns import Reruns

WIDTH, LAYERS = 16, 2


@pytest.fixture(autouse=True)
def small_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens cross two of them; the interpreter is slow."""
    monkeypatch.setattr(slot_pool, "CAPACITIES", (8, 16, 32))


def llama(make: Any = transformers.LlamaModel, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=None, **options,
    )  # fmt: skip
    return make(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2Model(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Llama by eager attention": lambda: llama(attn_implementation="eager"),
    "GPT-2": gpt2,
}


def capture(model: Any, weights: Any = "fp32") -> Any:
    stage = CapturedStepStage(lambda device: Reruns(device, watched=False), kernels=TokenKernels(weights))
    part = Part("model", "decoder", model)
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


def loop(model: Any, count: int = 5, rows: int = 1, prompt: int = 5, seed: int = 1, **asked: Any) -> torch.Tensor:
    """The last hidden states of a prompt and of each token."""
    generator = torch.Generator().manual_seed(seed)
    past, states = None, []
    with torch.inference_mode():
        for number in range(count):
            x = torch.randn(rows, 1 if number else prompt, WIDTH, generator=generator)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked)
            past = out.past_key_values
            states.append(out.last_hidden_state[:, -1:])
    assert type(past) is transformers.DynamicCache
    assert past.get_seq_length() == prompt + count - 1
    return torch.cat(states, 1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A start of a kernel: its grid, and of its arguments those that a graph would freeze."""
    found: list[Any] = []
    launch = token_block.launch

    def noted(kernel: Any, programs: tuple[int, ...], *given: Any, **sizes: Any) -> None:
        found.append((kernel.__name__, programs, given, sizes))
        launch(kernel, programs, *given, **sizes)

    monkeypatch.setattr(token_block, "launch", noted)
    return found


@pytest.mark.parametrize(("name", "rows"), [("Llama", 2), ("Llama by eager attention", 1), ("GPT-2", 3)])
def test_tokens_are_upstreams_across_capacities(name: str, rows: int, launches: list[Any], seen: list[Event]) -> None:
    model = MODELS[name]()
    expected = loop(model, 14, rows)
    change = capture(model)
    assert torch.allclose(loop(model, 14, rows), expected, atol=1e-5)
    assert change.graphs == 3, "up to 8, 16 and 32 positions"
    # Each recording runs a step three times.
    assert len(launches) == 5 * LAYERS * (13 + 3 * 3)
    assert not [event for event in seen if isinstance(event, (FellBack, NotApplied))]
    change.off()
    launches.clear()
    assert torch.equal(loop(model, 14, rows), expected)
    assert not launches


def test_a_sequence_whose_prompt_came_before_is_served(launches: list[Any]) -> None:
    """The form of upstream's results is learnt from the first run of the step that is recorded."""
    model = llama()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 1, WIDTH, generator=generator)

    def tokens(past: Any) -> torch.Tensor:
        with torch.inference_mode():
            found = [model(inputs_embeds=each, past_key_values=past, use_cache=True).last_hidden_state for each in x]
        return torch.cat(found, 1)

    def prompt() -> Any:
        with torch.inference_mode():
            return model(inputs_embeds=x[:, 0, 0][None], use_cache=True).past_key_values

    expected = tokens(prompt())
    past = prompt()
    capture(model)
    assert torch.allclose(tokens(past), expected, atol=1e-5)
    assert len(launches) == 5 * (LAYERS - 1) + 5 * LAYERS * (2 + 3)


def test_what_is_started_is_the_same_for_each_token(launches: list[Any]) -> None:
    """A graph keeps kernels, grids, numbers and addresses, but for what is made in the step."""
    model = llama()
    capture(model)
    loop(model, 8, prompt=9)  # within one capacity
    kept = {tensor.data_ptr() for tensor in model.parameters()}
    per_step = 5 * LAYERS
    steps = [launches[at : at + per_step] for at in range(0, len(launches), per_step)][3:]
    assert len(steps) == 7

    def frozen(step: list[Any]) -> list[Any]:
        return [
            (name, programs, sizes, [
                (tuple(each.shape), each.stride(), each.dtype, each.data_ptr() if each.data_ptr() in kept else 0)
                if isinstance(each, torch.Tensor) else each for each in given
            ])
            for name, programs, given, sizes in step
        ]  # fmt: skip

    buffers = [[given[place].data_ptr() for name, _, given, _ in step if name == "attention" for place in (3, 4, 6)]
               for step in steps]  # fmt: skip
    assert all(frozen(step) == frozen(steps[0]) for step in steps)
    assert all(found == buffers[0] for found in buffers)


def test_padding_is_masked() -> None:
    model = llama(transformers.LlamaForCausalLM)
    ids = torch.randint(3, 50, (2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def generate() -> Any:
        torch.manual_seed(3)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=True, pad_token_id=0,
            return_dict_in_generate=True, output_hidden_states=True,
        )  # fmt: skip

    expected = generate()
    capture(model)
    found = generate()
    assert torch.equal(expected.sequences, found.sequences)
    for before, after in zip(expected.hidden_states, found.hidden_states, strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_new_weights_are_served(weights: Any) -> None:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # for what the blocks add to be more than a rounding
    change = capture(model, weights)
    before = loop(model, 3)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.copy_(parameter.flip(0))
    found = loop(model, 3)
    change.off()
    expected = loop(model, 3)
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if weights == "fp32" else 3e-2)
    assert float((before - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_copies_are_made_once_for_all_recordings(weights: Any, launches: list[Any]) -> None:
    model = llama()
    expected = loop(model, 8)
    capture(model, weights)
    found = loop(model, 8)
    assert 0 < float((found - expected).norm() / expected.norm()) < 2e-2
    copies = {given[4].data_ptr() for name, _, given, _ in launches if name == "projections"}
    assert len(copies) == LAYERS
    assert {given[4].dtype for name, _, given, _ in launches if name == "projections"} == {
        torch.bfloat16 if weights == "bf16" else torch.int8
    }


def test_kernels_that_cannot_be_compiled_leave_upstreams_recorded_step(
    monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    def fails(*_given: object, **_sizes: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    model = llama()
    expected = loop(model, 8)
    monkeypatch.setattr(token_block, "launch", fails)
    change = capture(model)
    for _ in range(2):
        assert torch.allclose(loop(model, 8), expected, atol=1e-6)
    assert change.graphs == 2
    (event,) = [event for event in seen if isinstance(event, FellBack)]
    assert (event.what, event.stage) == ("model", "captured decode step, token kernels (fp32)")
    assert event.reason == "RuntimeError: Failed to find C compiler; upstream's own step is recorded"


def test_recordings_from_before_the_kernels_failed_keep_their_copies(
    monkeypatch: pytest.MonkeyPatch, launches: list[Any], seen: list[Event]
) -> None:
    """Graphs read them at their addresses."""

    def fails(*_given: object, **_sizes: object) -> None:
        raise RuntimeError("this card has too little shared memory")

    model = llama()
    capture(model, "int8")
    loop(model, 2)
    copies = [weakref.ref(given[4]) for name, _, given, _ in launches if name == "projections"]
    launches.clear()
    monkeypatch.setattr(token_block, "launch", fails)
    loop(model, 2, rows=2)
    assert len([event for event in seen if isinstance(event, FellBack)]) == 1
    gc.collect()
    assert all(copy() is not None for copy in copies)


def test_more_than_eight_rows_are_upstreams_recorded_step(launches: list[Any], seen: list[Event]) -> None:
    model = llama()
    expected = loop(model, 3, rows=9)
    change = capture(model)
    assert torch.allclose(loop(model, 3, rows=9), expected, atol=1e-5)
    assert change.graphs == 1
    assert not launches
    assert len([event for event in seen if isinstance(event, NotApplied)]) == 1


@pytest.mark.parametrize(("how", "served"), [("eager", False), ("sdpa", True)])
def test_attention_weights_that_are_asked_for_are_upstreams(how: str, served: bool, launches: list[Any]) -> None:
    """Released Chatterbox asks for them by an attention that returns none."""
    model = llama(attn_implementation=how)
    expected = loop(model, 3, output_attentions=True)
    capture(model)
    assert torch.allclose(loop(model, 3, output_attentions=True), expected, atol=1e-5)
    assert bool(launches) == served


class Doubled(nn.Module):
    """An adapter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.more = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * (1 + self.more)
        return result


def test_an_adapter_inside_a_block_is_computed(launches: list[Any], seen: list[Event]) -> None:
    model = llama()
    capture(model)
    before = loop(model, 3)
    model.layers[1].mlp.up_proj = Doubled(model.layers[1].mlp.up_proj)
    launches.clear()
    found = loop(model, 3)
    assert len(launches) == 5 * (2 + 3), "the other block is served"
    model.layers[1].mlp.up_proj = model.layers[1].mlp.up_proj.inner
    assert not torch.allclose(found, before, atol=1e-4)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(2)
    assert torch.allclose(loop(model, 3), found, atol=1e-5)
    assert len([event for event in seen if isinstance(event, NotApplied)]) == 1
