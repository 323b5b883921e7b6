"""Channels-last convolutions: the same numbers to rounding, and a module that is itself in every other way."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts.patching.class_swap import ClassSwap
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.compare import compare


def change_of(model: nn.Module) -> ClassSwap:
    change = ChannelsLastStage().prepare(Part("model", "vocoder", model))
    change.on()
    return change


@settings(max_examples=60, deadline=None)
@given(
    transposed=st.booleans(), channels=st.integers(1, 9), kernel=st.integers(1, 7), stride=st.integers(1, 3),
    padding=st.integers(0, 3), dilation=st.integers(1, 3), bias=st.booleans(), batch=st.integers(1, 3),
    length=st.integers(20, 40), double=st.booleans(),
)  # fmt: skip
def test_every_shape_of_convolution(
    transposed: bool, channels: int, kernel: int, stride: int, padding: int, dilation: int, bias: bool, batch: int,
    length: int, double: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    model: nn.Module = kind(channels, 5, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
    x = torch.randn(batch, channels, length)
    if double:
        model, x = model.double(), x.double()
    with torch.no_grad():
        expected = model(x)
        change_of(model)
        found = model(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def vocoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(8, 16, 7, padding=3), nn.LeakyReLU(), nn.ConvTranspose1d(16, 8, 8, stride=4, padding=2),
        nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 8, 3, padding="same"),
        nn.Conv1d(8, 1, 3, padding=1, padding_mode="reflect"),
    ).eval()  # fmt: skip


X = torch.randn(1, 8, 50, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_only_what_is_understood_is_changed_and_undone_exactly() -> None:
    model = vocoder()
    before = [type(module) for module in model]
    reference = run(model)
    change = change_of(model)
    changed = [type(module) is not old for module, old in zip(model, before, strict=True)]
    assert changed == [True, False, True, False, False, False]
    torch.testing.assert_close(run(model), reference, rtol=1e-4, atol=1e-6)
    change.on()
    change.off()
    change.off()
    assert [type(module) for module in model] == before
    assert torch.equal(run(model), reference)


def test_the_order_is_kept_between_convolutions() -> None:
    model = vocoder()[:3]
    change_of(model)
    seen: list[bool] = []
    model[2].register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].unsqueeze(2).is_contiguous(memory_format=torch.channels_last))
    )
    run(model)
    assert seen == [True], "nothing must be reordered between two convolutions"


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Causal(nn.Conv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (2, 0)))

    part = Part("causal", "vocoder", Causal(2, 2, 3))
    assert ChannelsLastStage().applies(part) == "no 1-D convolution in it"


def test_a_convolution_with_a_step_of_its_own_is_left_alone() -> None:
    class Clamped(nn.Conv1d):
        def _conv_forward(self, *args: Any) -> torch.Tensor:
            return super()._conv_forward(*args).clamp(-0.1, 0.1)

    class Cropped(nn.ConvTranspose1d):
        def _output_padding(self, *args: Any, **kwargs: Any) -> list[int]:
            return [1]

    patched = nn.Conv1d(8, 8, 3)
    vars(patched)["_conv_forward"] = lambda *_: torch.zeros(1)
    for module in (Clamped(8, 8, 3), Cropped(8, 8, 3, stride=2), patched):
        assert ChannelsLastStage().applies(Part("own", "vocoder", module)) == "no 1-D convolution in it"


class Ending(nn.Module):
    """A part whose result is that of its last convolution, in whatever it is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def inference(self, x: torch.Tensor) -> dict[str, Any]:
        return {"mel": [self.conv(x)], "length": 3, "other way": self.conv(x).transpose(1, 2)}


@pytest.mark.parametrize("method", ["__call__", "forward", "inference"])
def test_what_leaves_the_part_is_in_the_usual_order(method: str) -> None:
    torch.manual_seed(0)
    model = Ending().eval()
    with torch.inference_mode():
        expected = getattr(model, method)(X)
        change = ChannelsLastStage().prepare(Part("part", "estimator", model, method=method))
        change.on()
        inner: list[torch.Tensor] = []
        hook = model.conv.register_forward_hook(lambda _module, _inputs, output: inner.append(output))
        found = getattr(model, method)(X)
        hook.remove()
    assert not any(y.is_contiguous() for y in inner), "nothing is reordered inside of it"
    assert compare(expected, found).reason == ""
    assert compare(expected, found).error < 1e-5
    if method == "inference":
        assert (list(found), found["length"]) == (["mel", "length", "other way"], 3)
    change.off()
    assert type(model) is Ending
    same = (1, (2, 3))
    change.on()
    object.__setattr__(model, "conv", lambda _: same)
    assert model(X) is same, "what has no such tensor in it is passed on as it is"


def test_a_part_that_is_one_convolution() -> None:
    model = nn.Conv1d(8, 8, 3)
    with torch.no_grad():
        expected = model(X)
        change_of(model)
        assert compare(expected, model(X)).reason == ""


def test_the_flow_estimator_of_chatterbox_keeps_its_layout() -> None:
    decoder: Any = pytest.importorskip("chatterbox.models.s3gen.decoder")
    torch.manual_seed(0)
    model = decoder.ConditionalDecoder(
        in_channels=32, out_channels=8, channels=[16], attention_head_dim=8, n_blocks=1, num_mid_blocks=1, num_heads=2
    ).eval()
    x, mu, cond, spks = torch.randn(2, 8, 20), torch.randn(2, 8, 20), torch.randn(2, 8, 20), torch.randn(2, 8)
    given = (x, torch.ones(2, 1, 20), mu, torch.rand(2), spks, cond)
    part = Part("estimator", "estimator", model, method="forward")
    with torch.inference_mode():
        expected = model.forward(*given)
        assert ChannelsLastStage().applies(part) is None
        ChannelsLastStage().prepare(part).on()
        difference = compare(expected, model.forward(*given))
    assert (difference.reason, difference.error < 1e-5) == ("", True)


def test_state_copies_and_pickles_are_those_of_the_plain_class() -> None:
    model = vocoder()
    keys = list(model.state_dict())
    reference = run(model)
    change_of(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], nn.Conv1d)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in clone] == [type(module) for module in vocoder()]
        assert torch.equal(run(clone), reference)
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    torch.testing.assert_close(run(model), run(_doubled()), rtol=1e-4, atol=1e-6)


def _doubled() -> nn.Module:
    model = vocoder()
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    return model


def test_other_calls_of_a_convolution_still_work() -> None:
    model = vocoder()
    reference = run(model[0], X[0]), model[2](torch.ones(1, 16, 9), output_size=[37])
    change_of(model)
    assert torch.equal(run(model[0], X[0]), reference[0])  # without a batch
    assert torch.equal(model[2](torch.ones(1, 16, 9), output_size=[37]), reference[1])


@pytest.mark.parametrize("old", [True, False], ids=["hook", "parametrization"])
@settings(max_examples=25, deadline=None)
@given(actions=st.lists(st.sampled_from(["fold", "layout", "undo", "load", "copy"]), max_size=8))
def test_any_sequence_with_folding_keeps_outputs_and_undoes(old: bool, actions: list[str]) -> None:
    """Changes are undone in the reverse order, as the engine does; outputs stay those of an untouched model."""
    norm: Any = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm

    def build() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(norm(nn.Conv1d(8, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose1d(8, 4, 4))).eval()

    model, reference = build(), build()
    run(model)
    classes = [type(module) for module in model]
    changes: list[Any] = []
    for action in actions:
        part = Part("model", "vocoder", model)
        stage: Any = FoldStage() if action == "fold" else ChannelsLastStage()
        if action in {"fold", "layout"} and stage.applies(part) is None and len(changes) < 2:
            changes.append(stage.prepare(part))
            changes[-1].on()
        elif action == "undo" and changes:
            changes.pop().off()
        elif action == "load":
            state = {key: value * 1.5 for key, value in model.state_dict().items()}
            model.load_state_dict(state)
            reference.load_state_dict(state)
        elif action == "copy":
            torch.testing.assert_close(run(copy.deepcopy(model)), run(reference), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(model), run(reference), rtol=1e-4, atol=1e-5)
    while changes:
        changes.pop().off()
    assert torch.equal(run(model), run(reference))
    assert [type(module) for module in model] == classes


def test_another_method_and_a_module_inside_give_the_usual_order_too() -> None:
    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv1d(1, 6, 8, stride=4), nn.Conv1d(6, 4, 3, padding=1))
            self.decoder = nn.Sequential(nn.ConvTranspose1d(4, 6, 8, stride=4), nn.Conv1d(6, 2, 3, padding=1))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)  # type: ignore[no-any-return]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.encode(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Codec().eval(), torch.randn(2, 1, 80)
    calls: list[Any] = [model.encode, model.encoder, model.encoder[0], model]
    with torch.inference_mode():
        expected = [call(x) for call in calls]
        change = change_of(model)
        for call, wanted in zip(calls, expected, strict=True):
            found = call(x)
            assert found.is_contiguous()  # `.view` of it works as before
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        with pytest.raises(RuntimeError):
            model(x[0, 0, :3])  # an error ends the call of the part, too
        assert model.encode(x).is_contiguous()
    change.off()
