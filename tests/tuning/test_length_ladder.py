"""A warm-up at the lengths of service: the ladder, inputs made longer and shorter, and no compilation afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaModel, VitsConfig, VitsModel

from accelerate_tts import Event, WarmupError, optimized_model, receipt_of
from accelerate_tts.errors import SettingsError
from accelerate_tts.events import FellBack, Recompiled
from accelerate_tts.models import generic
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.plan import Part
from accelerate_tts.stages import catalogue
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompileStage
from accelerate_tts.tuning.length_ladder import at_length, ladder
from accelerate_tts.tuning.warmup import Loaded, check_warmup, warmup_calls
from doubles import pays_off

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the ladder ----------------------------------------------------------------------------------------------------


@given(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)).map(lambda pair: (min(pair), max(pair))))
def test_a_ladder_leaves_no_power_of_two_out(lengths: tuple[int, int]) -> None:
    rungs = ladder(lengths)
    assert (rungs[0], rungs[-1]) == lengths
    assert list(rungs) == sorted(set(rungs))
    for lower, upper in pairwise(rungs):
        assert upper < 2 * lower or (lower, upper) == (1, 2)
    assert len(rungs) <= 16


@pytest.mark.parametrize(
    ("lengths", "rungs"),
    [((7, 7), (7,)), ((1, 2), (1, 2)), ((1, 3), (1, 2, 3)), ((2, 7), (2, 3, 5, 7)), ((10, 19), (10, 19)),
     ((5, 60), (5, 9, 17, 32, 60))],
)  # fmt: skip
def test_ladders(lengths: tuple[int, int], rungs: tuple[int, ...]) -> None:
    assert ladder(lengths) == rungs


# --- an input at another length --------------------------------------------------------------------------------------


@given(st.text("ab c", min_size=1, max_size=20).filter(str.strip), st.integers(1, 60))
def test_texts(text: str, length: int) -> None:
    """Repeated and cut; a text that would end in spaces ends before them."""
    found = at_length(text, length)
    repeated = (text.strip() + " ") * length
    assert repeated.startswith(found)
    assert found == (repeated[:length].strip() or text.strip()[:1])
    assert 1 <= len(found) <= length


def test_a_text_is_repeated_as_words() -> None:
    assert at_length("Good day.", 25) == "Good day. Good day. Good"
    assert at_length("Good day.", 6) == "Good d"
    assert at_length(" x ", 1) == "x"


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), length=st.integers(1, 30),
    dtype=st.sampled_from([torch.int64, torch.float32, torch.bool]),
)  # fmt: skip
def test_a_tensor_keeps_all_but_its_last_dimension(shape: list[int], length: int, dtype: torch.dtype) -> None:
    tensor = (torch.arange(torch.Size(shape).numel()) % 7).reshape(shape).to(dtype)
    before = tensor.clone()
    found = at_length(tensor, length)
    assert found.shape == (*shape[:-1], length)
    assert found.dtype == dtype
    for position in range(length):  # no value that was not there: ids stay in the vocabulary
        assert torch.equal(found[..., position], tensor[..., position % shape[-1]])
    assert torch.equal(tensor, before)


def test_a_square_spectrogram_keeps_its_channels() -> None:
    assert at_length(torch.zeros(1, 80, 80), 200).shape == (1, 80, 200)
    assert at_length((torch.zeros(1, 80, 80), torch.zeros(1, 80)), 200)[1].shape == (1, 200)


IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
REST = {
    "attention_mask": torch.ones(1, 6, dtype=torch.int64),
    "pairs": torch.ones(1, 1, 6, 6),
    "speaker": torch.zeros(1, 256),
    "batch": torch.zeros(6, 2),  # as many items as the input is long
    "positions": torch.arange(6),
    "number": torch.tensor(6),
    "speed": 1.5,
    "language": "en",
    "nothing": None,
}
SHAPES = {
    "attention_mask": (1, 11), "pairs": (1, 1, 11, 11), "speaker": (1, 256), "batch": (6, 2), "positions": (11,),
    "number": (),
}  # fmt: skip


@pytest.mark.parametrize("as_tuple", [True, False])
def test_what_belongs_to_the_input_gets_its_length(as_tuple: bool) -> None:
    given: Any = (IDS, *REST.values()) if as_tuple else {"input_ids": IDS, **REST}
    longer = at_length(given, 11)
    assert type(longer) is (tuple if as_tuple else dict)
    found = dict(zip(["input_ids", *REST], longer, strict=True)) if as_tuple else longer
    assert list(found) == ["input_ids", *REST]
    assert found["input_ids"].tolist() == [[3, 1, 4, 1, 5, 9, 3, 1, 4, 1, 5]]
    assert {name: tuple(found[name].shape) for name in SHAPES} == SHAPES
    assert (found["speed"], found["language"], found["nothing"]) == (1.5, "en", None)
    assert IDS.shape == (1, 6)


def test_the_first_tensor_with_a_length_counts() -> None:
    scalar, empty, ids = torch.tensor(3), torch.zeros(2, 0), torch.zeros(1, 4)
    assert [tuple(t.shape) for t in at_length((scalar, empty, ids), 9)] == [(), (2, 0), (1, 9)]


@pytest.mark.parametrize(
    "item", [(), {}, (1, "text"), {"speed": 1.0}, torch.tensor(5), torch.zeros(3, 0), (torch.tensor(1),)]
)
def test_without_a_length_there_is_none_to_change(item: Any) -> None:
    with pytest.raises(WarmupError, match="needs a tensor in warmup="):
        at_length(item, 5)


# --- at decoration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        (None, "no warmup= says what an input is"),
        ((), "needs a tensor"),
        ({"speed": 1.0}, "needs a tensor"),
        (torch.tensor(5), "needs a tensor"),
        ([IDS, (1, 2)], "needs a tensor"),
        (lambda: None, "takes two arguments"),
        (lambda loaded: loaded, "takes two arguments"),
        (["text", lambda loaded: loaded], "takes two arguments"),
        ([], "has nothing in it"),
        ([[IDS]], "a list inside a list"),
        (" ", "an empty text"),
        (5, "of type int cannot be used"),
    ],
)
def test_what_can_never_work_is_said_at_decoration(warmup: Any, message: str) -> None:
    with pytest.raises(WarmupError, match=message):
        optimized_model(warmup=warmup, lengths=(5, 60))


@pytest.mark.parametrize(
    "warmup",
    ["text", IDS, (IDS, 1.0), {"input_ids": IDS}, [IDS, "text"], lambda loaded, length: length, lambda *args: args],
)
def test_what_may_work_is_taken(warmup: Any) -> None:
    check_warmup(warmup, (5, 60))


@pytest.mark.parametrize("lengths", [(60, 5), (0, 5), (5,), (5.0, 60), [5, 60], 5, "5-60", (True, 5)])
def test_lengths_that_mean_nothing(lengths: Any) -> None:
    with pytest.raises(SettingsError, match="lengths="):
        optimized_model(warmup=IDS, lengths=lengths)


# --- the calls -------------------------------------------------------------------------------------------------------


class Lengths(nn.Module):
    """Remembers how long its inputs were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[-1])
        return self.linear(x.float().unsqueeze(-1))

    def synthesize(self, text: str) -> torch.Tensor:
        return self(torch.ones(1, len(text)))


class Speaking:
    def __init__(self) -> None:
        self.model = Lengths().eval()

    def synthesize(self, text: str) -> torch.Tensor:
        return self.model(torch.ones(1, len(text)))


def speak_at(loaded: Any, length: int) -> Any:
    return loaded.model(torch.ones(1, length))


@pytest.mark.parametrize(
    ("warmup", "main"),
    [
        (IDS, [6, 5, 60]),
        ({"x": IDS}, [6, 5, 60]),
        ([IDS, torch.ones(1, 40)], [6, 40, 5, 60, 5, 60]),
        ("sayings", [7, 5, 60]),
        (speak_at, [5, 60]),  # it has no length of its own
    ],
    ids=["tensor", "mapping", "list", "text", "callable"],
)
def test_the_given_inputs_both_ends_and_the_rungs_between(warmup: Any, main: list[int]) -> None:
    loaded = Speaking()
    calls = warmup_calls(warmup, Loaded(loaded), "inference", (5, 60))
    for call in calls.main:
        call.run()
    seen = list(loaded.model.seen)
    if isinstance(warmup, str):  # a text loses the space at its end
        assert all(wanted - 1 <= length <= wanted for length, wanted in zip(seen, main, strict=True))
    else:
        assert seen == main
    loaded.model.seen.clear()
    for call in calls.ladder:
        call.run()
    rungs = ladder((5, 60))[1:-1] * (2 if isinstance(warmup, list) else 1)
    assert [length for length in loaded.model.seen if length > 5] == pytest.approx(list(rungs), abs=1)


def test_one_length_is_run_once() -> None:
    loaded = Speaking()
    calls = warmup_calls(speak_at, Loaded(loaded), "inference", (8, 8))
    assert (len(calls.main), len(calls.ladder)) == (1, 0)


def test_a_callable_is_given_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    asked: list[int] = []

    def speak(loaded: Speaking, length: int) -> torch.Tensor:
        asked.append(length)
        return speak_at(loaded, length)

    @optimized_model(warmup=speak, lengths=(5, 60), tune_seconds=0.0)
    def load() -> Speaking:
        return Speaking()

    assert receipt_of(load()) is not None
    assert set(asked) == set(ladder((5, 60)))
    assert asked[:2] == [5, 60]


# --- a real model ----------------------------------------------------------------------------------------------------


def vits() -> VitsModel:
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=38, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, upsample_initial_channel=16, upsample_rates=[4], upsample_kernel_sizes=[8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1, duration_predictor_num_flows=1, wavenet_dilation_rate=1,
        duration_predictor_flow_bins=2,
    )  # fmt: skip
    return VitsModel(config).eval()


class CompiledWhereItMayBe(CompileStage):
    """Leaves out parts that decide durations: they would be rejected for their rounding, half a minute later."""

    least_share = 0.0

    def applies(self, part: Part) -> str | None:
        return "decides" if part.decides else super().applies(part)


@pytest.mark.slow
def test_no_length_of_service_compiles_again(monkeypatch: pytest.MonkeyPatch, decide: Any, seen: list[Event]) -> None:
    # Compiled changes are kept even if slow: the test is about later calls.
    decide(compare=pays_off, hopeless=float("inf"), unworthy=lambda *_given: None)
    monkeypatch.setattr(catalogue, "default_stages", lambda *_args: (CompiledWhereItMayBe("default"),))
    ids = torch.randint(1, 38, (1, 20), generator=torch.Generator().manual_seed(0))

    @optimized_model(warmup=ids, lengths=(5, 60))
    def load() -> VitsModel:
        return vits()

    model = load()
    receipt = receipt_of(model)
    assert receipt is not None
    assert [stage.part for stage in receipt.kept if stage.graphs] == ["flow", "decoder"], str(receipt)
    plain = vits()
    numbers = random.Random(0)
    for number in range(200):
        length = numbers.randint(5, 60)
        sentence = torch.randint(1, 38, (1, length), generator=torch.Generator().manual_seed(number))
        with torch.inference_mode():
            torch.manual_seed(number)
            waveform = model(sentence).waveform
            if number % 20 == 0:
                torch.manual_seed(number)
                torch.testing.assert_close(waveform, plain(sentence).waveform, rtol=1e-3, atol=1e-5)
    assert not [event for event in seen if isinstance(event, (Recompiled, FellBack))]
    assert receipt.recompiles == 0
    assert get_performance_optimizer().undo(model)


# --- other models ----------------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    """A model that no plan knows: convolutions over time, then layers, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.conv(x)).transpose(1, 2)
        return torch.softmax(self.linear(y), -1) * y.shape[1] + y.mean(1, keepdim=True)


class Encoder(nn.Module):
    """A speaker encoder: dilated convolutions, statistics over time, a norm. dynamo passes recurrent ones over."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=2, dilation=2) for _ in range(2))
        self.linear = nn.Linear(8, 8)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            mel = torch.relu(conv(mel)) + mel
        y = self.linear(torch.cat([mel.mean(-1), mel.std(-1)], -1))
        return y / (y.norm(dim=1, keepdim=True) + 1e-5)


class Decoder(nn.Module):
    """A decoder in somebody else's loop: a prompt, and two tokens after it."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = LlamaModel(LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            pad_token_id=None,
        ))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past, states, step = None, [], x.transpose(1, 2).repeat(1, 1, 4)
        for _ in range(3):
            out = self.model(inputs_embeds=step, past_key_values=past, use_cache=True)
            past, step = out.past_key_values, out.last_hidden_state[:, -1:]
            states.append(step)
        return torch.cat(states, 1)


@pytest.mark.parametrize(
    ("make", "stage"),
    [(Unknown, CompileStage("default")), (Encoder, CompileStage("default")), (Decoder, CompiledBlocksStage("default"))],
    ids=["a model that no plan knows", "a speaker encoder", "a decoder"],
)
def test_no_length_of_service_compiles_again_in_other_models(
    make: Callable[[], nn.Module],
    stage: Any,
    monkeypatch: pytest.MonkeyPatch,
    decide: Any,
    seen: list[Event],
    request: pytest.FixtureRequest,
) -> None:
    """dynamo's guards decide, and which those are is shown here; what its graphs are compiled to is left as it is."""
    if make is Decoder:
        request.getfixturevalue("layered_caches")
    decide(compare=pays_off, looks=False)
    monkeypatch.setattr(stage, "least_share", 0.0)
    request.getfixturevalue("uncompiled")
    monkeypatch.setattr(catalogue, "default_stages", lambda *_args: (stage,))
    # The division into parts depends on the clock, and is not tested here.
    monkeypatch.setattr(generic, "refine", lambda whole, _seconds: whole)
    torch.manual_seed(0)
    model, plain = make().eval(), make().eval()
    plain.load_state_dict(model.state_dict())

    def given(length: int, number: int = 0) -> torch.Tensor:
        return torch.randn(1, 4, length, generator=torch.Generator().manual_seed(number))

    optimized_model(warmup=given(20), lengths=(5, 60))(lambda: model)()
    receipt = receipt_of(model)
    assert receipt is not None
    if torch.__version__ < "2.7" and "Mapping.__contains__" in str(receipt):  # newer ones must trace it
        pytest.skip("dynamo of torch 2.6 does not trace the registry of attention of transformers 5.20")
    assert [result.stage for result in receipt.kept if result.graphs] == [stage.name], str(receipt)
    numbers = random.Random(0)
    between = [length for length in range(5, 61) if length not in {20, *ladder((5, 60))}]
    with torch.inference_mode():
        for number in range(200):
            length = between[number] if number < len(between) else numbers.randint(5, 60)
            x = given(length, number)
            found = model(x)
            if number < len(between):
                torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-6)
    assert not [event for event in seen if isinstance(event, (Recompiled, FellBack))]
    assert receipt.recompiles == 0
    assert get_performance_optimizer().undo(model)
