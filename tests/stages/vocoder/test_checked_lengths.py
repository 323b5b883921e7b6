"""Lengths from rounded values: never a different one, even near an edge, and the same random draws."""

from __future__ import annotations

import copy
import inspect
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import VitsConfig, VitsModel

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.vocoder.checked_lengths import CheckedStage, holds, is_checked
from accelerate_tts.stages.vocoder.vits import DURATIONS, TEXT, Amplified
from accelerate_tts.tuning.compare import compare


def small(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = VitsConfig(
        vocab_size=38, hidden_size=32, num_hidden_layers=2, ffn_dim=64, flow_size=32, spectrogram_bins=17,
        upsample_initial_channel=16, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=2,
        duration_predictor_filter_channels=32, posterior_encoder_num_wavenet_layers=1,
    )  # fmt: skip
    return VitsModel(config).eval()


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 37, (1, length), generator=torch.Generator().manual_seed(seed))


def speak(model: Any, tokens: torch.Tensor, seed: int = 1, **named: Any) -> tuple[Any, float, float]:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that upstream draws from
    with torch.inference_mode():
        waveform = model(tokens, **named).waveform
    return waveform, float(torch.rand(())), float(np.random.uniform())  # noqa: NPY002


def at_rate(model: Any, rate: float | None) -> dict[str, Any]:
    """Arguments that ask for a speaking rate; before transformers 4.47 it is an attribute alone."""
    if "speaking_rate" in inspect.signature(model.forward).parameters:
        return {"speaking_rate": rate}
    model.speaking_rate = 1.0 if rate is None else rate
    return {}


class Checked:
    """A model whose text encoder and durations are computed to rounding, beside an untouched one."""

    def __init__(self) -> None:
        self.plain, self.model = small(), small()
        parts = {part.name: part for part in describe(self.model).parts}
        self.changes = []
        for kernel, name in ((DURATIONS, "duration_predictor"), (TEXT, "text_encoder")):
            stage = CheckedStage(kernel)
            assert stage.applies(parts[name]) is None
            self.changes.append(stage.prepare(parts[name]))
            self.changes[-1].on()
        self.guard = self.changes[0].guard

    def undo(self) -> None:
        for change in reversed(self.changes):
            change.off()

    def assert_alike(self, tokens: torch.Tensor, seed: int = 1, rate: float | None = None) -> None:
        models = (self.plain, self.model)
        (expected, *draws), (found, *others) = (speak(m, tokens, seed, **at_rate(m, rate)) for m in models)
        assert found.shape == expected.shape
        assert draws == others, "the random generators are where they would be"
        assert compare(expected, found).error < EXACT_TOLERANCE


@pytest.fixture(scope="module")
def checked() -> Checked:
    return Checked()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(0, 10_000), st.sampled_from([None, 0.5, 1.0, 1.7, 3]))
def test_no_length_differs(checked: Checked, length: int, seed: int, rate: float | None) -> None:
    """A sample; `benchmarks/lengths.py` takes ten thousand texts of a real voice."""
    checked.assert_alike(ids(length, seed), seed, rate)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, 4000), st.floats(-1e-3, 1e-3), st.floats(0, 1e-3)), min_size=1, max_size=5
    )
)  # fmt: skip
def test_what_holds_rounds_alike_whatever_the_error(near: list[tuple[int, float, float]]) -> None:
    """Adversarial values: next to whole numbers, with errors about as large as their distance."""
    logs = torch.tensor([math.log(max(whole + off, 1e-9)) for whole, off, _ in near])
    errors = torch.tensor([error for *_, error in near])
    if holds(torch.exp(logs), errors):
        frames = torch.ceil(torch.exp(logs))
        for share in (-1.0, -0.5, 0.5, 1.0):
            assert torch.equal(torch.ceil(torch.exp(logs + share * errors)), frames)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, 1.0 + 2**-23, math.nan, math.inf, -math.inf, 2.0**30])
def test_edges_hold_never(value: float) -> None:
    for error in (0.0, 1e-6):
        assert not holds(torch.tensor([0.5, value]), torch.tensor(error))
    assert not holds(torch.tensor([0.5]), torch.tensor(math.nan))
    assert holds(torch.tensor([0.5, 1.5]), torch.tensor(1e-4))


def test_where_the_deciding_part_is_not_served_it_draws_once() -> None:
    """A hook inside it: upstream's own decides, after the other part was computed in fewer operators."""
    both = Checked()
    for model in (both.plain, both.model):
        model.duration_predictor.conv_pre.register_forward_hook(lambda _m, _given, out: out * 1.5)
    both.assert_alike(ids(20))
    both.undo()
    both.assert_alike(ids(20))


def test_where_nothing_holds_the_untouched_parts_decide(checked: Checked) -> None:
    before, checked.guard.factor = checked.guard.factor, 1e30
    try:
        repeated = checked.guard.repeated
        for length in (12, 40):
            expected, found = speak(checked.plain, ids(length)), speak(checked.model, ids(length))
            assert torch.equal(expected[0], found[0]), "bit for bit, with the same draws"
            assert expected[1:] == found[1:]
        assert checked.guard.repeated == repeated + 2
    finally:
        checked.guard.factor = before
    assert checked.guard.factor < 1e6


def test_what_is_asked_for_beside_is_upstreams(checked: Checked) -> None:
    tokens = ids(20)
    for named in (
        {"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False},
        {"attention_mask": torch.ones(1, 20, dtype=torch.long)},
        {"attention_mask": torch.tensor([[1] * 15 + [0] * 5])},
    ):  # fmt: skip
        results = []
        for model in (checked.plain, checked.model):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(model(tokens, **named))
        expected, found = results
        assert found[0].shape == expected[0].shape
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-5)
        assert type(found) is type(expected)
        if "output_hidden_states" in named:
            assert len(found.hidden_states) == 3
    checked.assert_alike(torch.cat((ids(20), ids(20, 7))))
    try:
        named = at_rate(checked.model, 0)
        with pytest.raises(ZeroDivisionError):
            checked.model(tokens, **named)
    finally:
        at_rate(checked.model, None)


def test_a_users_hook_is_called_once(checked: Checked) -> None:
    seen: list[Any] = []
    handle = checked.model.text_encoder.register_forward_hook(lambda *given: seen.append(given[2].last_hidden_state))
    try:
        found = speak(checked.model, ids(30))
    finally:
        handle.remove()
    assert len(seen) == 1
    assert torch.equal(found[0], speak(checked.plain, ids(30))[0]), "where somebody looks, the untouched parts run"


def test_outside_its_owner_a_part_is_bit_exact(checked: Checked) -> None:
    hidden, mask = torch.randn(1, 32, 30, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 30)
    results = []
    for model in (checked.plain, checked.model):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(model.duration_predictor(hidden, mask, None, reverse=True, noise_scale=0.8))
    assert torch.equal(*results), "nobody there checks what is made of it"
    with seeded("cpu"), torch.no_grad():
        replayed = checked.model.duration_predictor(hidden, mask, None, reverse=True, noise_scale=0.8)
    assert replayed.shape == results[0].shape
    assert isinstance(checked.guard.last, Amplified)


def test_weights_that_are_written_are_used_and_nothing_is_decided_by_them(seen: list[Event]) -> None:
    twin = Checked()
    with torch.no_grad():
        for model in (twin.plain, twin.model):
            model.duration_predictor.conv_pre.weight.mul_(1.5)
            model.text_encoder.embed_tokens.weight.mul_(0.7)
    for length in (15, 50):
        twin.assert_alike(ids(length))
    assert [type(event) for event in seen] == [NotApplied]
    assert twin.guard.repeated == 2


def test_training_and_gradients_are_upstreams(checked: Checked) -> None:
    torch.manual_seed(1)
    waveform = checked.model(ids(20)).waveform
    waveform.sum().backward()
    assert checked.model.text_encoder.embed_tokens.weight.grad is not None
    checked.model.zero_grad()


def test_threads_do_not_see_each_other(checked: Checked) -> None:
    shapes = {length: speak(checked.plain, ids(length))[0].shape for length in (12, 30, 60)}
    errors: list[str] = []

    def run(length: int) -> None:
        for _ in range(5):
            with torch.inference_mode():
                waveform = checked.model(ids(length)).waveform
            if waveform.dim() != 2 or not torch.isfinite(waveform).all():
                errors.append(str(waveform.shape))

    threads = [threading.Thread(target=run, args=(length,)) for length in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_undone_it_is_as_it_was_and_copies_are_plain() -> None:
    twin = Checked()
    assert is_checked(twin.model.duration_predictor)
    assert not is_checked(copy.deepcopy(twin.model).duration_predictor)
    assert type(copy.deepcopy(twin.model)) is VitsModel
    keys = list(twin.model.state_dict())
    twin.undo()
    assert [str(type(m)) for m in twin.model.modules()] == [str(type(m)) for m in twin.plain.modules()]
    assert type(twin.model.text_encoder) is type(twin.plain.text_encoder)
    assert list(twin.model.state_dict()) == keys
    assert torch.equal(speak(twin.model, ids(25))[0], speak(twin.plain, ids(25))[0])


def test_without_the_last_part_the_first_is_untouched() -> None:
    twin = Checked()
    twin.changes[0].off()  # what gains least is dropped first, and the other one stays
    assert torch.equal(speak(twin.model, ids(25))[0], speak(twin.plain, ids(25))[0])
    twin.changes[1].off()
