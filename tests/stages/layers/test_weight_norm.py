"""Folding weight norm: bit for bit the same, and everything else about the module unchanged."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.weight_norm import FoldStage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    OLD: Callable[..., nn.Module] = nn.utils.weight_norm
NEW: Callable[..., nn.Module] = nn.utils.parametrizations.weight_norm
X = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["hook", "parametrization"])
def norm(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return OLD if request.param == "hook" else NEW


def build(norm: Callable[..., nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(norm(nn.Conv1d(8, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose1d(8, 4, 4), dim=1)).eval()


def folded(model: nn.Module):
    change = FoldStage().prepare(Part("model", "vocoder", model))
    change.on()
    return change


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def operators(model: nn.Module) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model)
    return {event.name for event in profile.events()}


def snapshot(model: nn.Module) -> list[object]:
    """State that undo must restore."""
    return [
        (
            name, type(module), list(vars(module)), list(module._buffers), list(module._forward_pre_hooks),
            list(map(type, module._forward_pre_hooks.values())),
            list(module._load_state_dict_post_hooks), set(module._non_persistent_buffers_set),
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


def test_same_bits_and_less_work(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    reference = run(model)
    assert "aten::_weight_norm" in operators(model), "the test no longer sees where the norm is computed"
    folded(model)
    assert torch.equal(run(model), reference)
    assert "aten::_weight_norm" not in operators(model)


def test_undo_brings_everything_back(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    reference = run(model)
    before = snapshot(model)
    change = folded(model)
    assert snapshot(model) != before
    change.off()
    change.off()
    assert snapshot(model) == before
    assert torch.equal(run(model), reference)


def test_keys_types_and_parameters_stay(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    folded(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model[0], nn.Conv1d)
    assert isinstance(model[2], nn.ConvTranspose1d)


def test_load_state_dict_folds_the_new_weights(norm: Callable[..., nn.Module]) -> None:
    model, other = build(norm), build(norm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    folded(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), run(other))


def test_moving_to_another_dtype_moves_the_fold(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    reference = run(model)
    change = folded(model)
    model.double()
    assert (run(model, X.double()) - reference).abs().max() < 1e-6
    change.off()
    change.on()
    assert model[0].weight.dtype == torch.float64
    assert (run(model, X.double()) - reference).abs().max() < 1e-6


def test_a_copy_is_an_untouched_model(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    run(model)
    before = snapshot(model)
    change = folded(model)
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone), run(model))
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(2.0)
    assert not torch.equal(run(clone), run(model)), "the copy's norm must follow its own parameters"
    change.off()
    assert [entry[:1] for entry in snapshot(clone)] == [entry[:1] for entry in before]
    assert [type(module).__name__ for module in clone] == [type(module).__name__ for module in model]


@pytest.mark.parametrize("stage", [FoldStage, ChannelsLastStage, lambda: HalfStage(torch.bfloat16, carried=True)])
def test_a_norm_that_is_removed_after_tuning(stage: Callable[[], Any], norm: Callable[..., nn.Module]) -> None:
    """As `remove_weight_norm()` of vocoders does it, on both kinds."""
    model, plain = build(norm), build(norm)
    run(model)
    change = stage().prepare(Part("model", "vocoder", model))
    change.on()
    run(model)
    for each in (model, plain):
        for layer in (each[0], each[2]):
            if norm is OLD:
                nn.utils.remove_weight_norm(layer)
            else:
                parametrize.remove_parametrizations(layer, "weight")
        with torch.no_grad():
            each[0].weight.mul_(2.0)
    assert float((run(model) - run(plain)).norm() / run(plain).norm()) < (0.0 if stage is FoldStage else 0.02) + 1e-6
    assert list(model.state_dict()) == list(plain.state_dict())
    change.off()
    assert torch.equal(run(model), run(plain))
    assert type(model[0]) is nn.Conv1d
    assert not hasattr(model[0], "parametrizations")


def test_a_norm_that_is_removed_while_the_fold_is_off(norm: Callable[..., nn.Module]) -> None:
    """As by another thread while a faulty call is made again."""
    model, plain = build(norm), build(norm)
    change = folded(model)
    change.off()
    for each in (model, plain):
        if norm is OLD:
            nn.utils.remove_weight_norm(each[0])
        else:
            parametrize.remove_parametrizations(each[0], "weight")
    change.on()
    assert torch.equal(run(model), run(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    change.off()
    assert torch.equal(run(model), run(plain))


def test_a_norm_that_is_removed_leaves_the_others_folded(norm: Callable[..., nn.Module]) -> None:
    model, plain = build(norm), build(norm)
    folded(model)
    for each in (model, plain):
        if norm is OLD:
            nn.utils.remove_weight_norm(each[0])
        else:
            parametrize.remove_parametrizations(each[0], "weight")
        for parameter in each[2].parameters():
            parameter.data.neg_()
    assert torch.equal(run(model), run(plain))


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_another_step_behind_a_norm_is_seen() -> None:
    model, plain = build(NEW), build(NEW)
    change = folded(model)
    for each in (model, plain):
        parametrize.register_parametrization(each[0], "weight", Twice())
        parametrize.register_parametrization(each[0], "bias", Twice())
    assert torch.equal(run(model), run(plain))
    change.off()
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("factor", ["original0", "original1"])
def test_a_factor_that_is_parametrized_stays_so(factor: str) -> None:
    """torch derives the class of the list from the one that it has, which is ours while the fold is on."""
    model, plain = build(NEW), build(NEW)
    change = folded(model)
    for each in (model, plain):
        parametrize.register_parametrization(each[0].parametrizations.weight, factor, Twice())
    assert torch.equal(run(model), run(plain))
    for _ in range(2):
        change.off()
        assert torch.equal(run(model), run(plain))
        change.on()
        assert torch.equal(run(model), run(plain))
    change.off()
    for each in (model, plain):
        parametrize.remove_parametrizations(each[0].parametrizations.weight, factor, leave_parametrized=False)
        with torch.no_grad():
            next(each[0].parametrizations.weight.parameters()).mul_(3)
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("where", ["hook", "pre-hook", "forward", "global hook"])
def test_what_a_user_hangs_on_the_step_that_computes_the_weight_is_called(where: str) -> None:
    model, plain = build(NEW), build(NEW)
    change = folded(model)

    def doubled(module: nn.Module, _given: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * 2 if type(module).__name__ == "_WeightNorm" else None

    step, own = (each[0].parametrizations["weight"][0] for each in (model, plain))
    with ExitStack() as hooks:
        if where == "global hook":
            hooks.callback(nn.modules.module.register_module_forward_hook(doubled).remove)
        for inner in () if where == "global hook" else (step, own):
            if where == "hook":
                hooks.callback(inner.register_forward_hook(doubled).remove)
            elif where == "pre-hook":
                hooks.callback(inner.register_forward_pre_hook(lambda _, given: (given[0] * 2, given[1])).remove)
            else:
                inner.forward = lambda g, v, inner=inner: type(inner).forward(inner, g * 2, v)
                hooks.callback(vars(inner).pop, "forward")
        altered = run(plain)
        assert torch.equal(run(model), altered)
    assert torch.equal(run(model), run(plain))
    assert not torch.equal(run(plain), altered)
    change.off()


def test_a_module_has_no_buffer_that_upstreams_has_not(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    folded(model)
    assert not list(model.buffers()), "somebody who writes to all buffers would write to the product"


def test_pickling_is_as_before() -> None:
    model = build(OLD)
    run(model)
    folded(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(loaded), run(model))
    assert type(loaded[0]) is nn.Conv1d
    assert len(loaded[0]._forward_pre_hooks) == 1
    text = io.BytesIO()
    torch.save(model, text)
    assert b"accelerate_tts" not in text.getvalue()

    model = build(NEW)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)  # torch's own rule for parametrized modules ...
    folded(model)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)  # ... still holds


def test_other_hooks_keep_their_order() -> None:
    model = build(OLD)
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("a"))
    change = folded(model)
    model[0].register_forward_pre_hook(lambda *_: calls.append("b"))
    run(model)
    change.off()
    run(model)
    assert calls == ["a", "b"] * 2
    assert type(next(iter(model[0]._forward_pre_hooks.values()))).__name__ == "WeightNorm"


def test_nothing_to_fold_is_said() -> None:
    part = Part("linear", "model", nn.Linear(2, 2))
    assert FoldStage().applies(part) == "no weight norm in it"
    model = build(NEW)
    folded(model)
    assert FoldStage().applies(Part("model", "vocoder", model)) == "no weight norm in it"  # folded already


def test_folded_in_inference_mode_can_be_used_outside(norm: Callable[..., nn.Module]) -> None:
    model = build(norm)
    with torch.inference_mode():
        folded(model)
    out = model(X.clone().requires_grad_())
    out.sum().backward()  # an inference tensor as the weight would raise here


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["on", "off", "run", "load", "scale"]), max_size=12), st.booleans(), st.integers(0, 99))
def test_any_sequence_of_on_and_off(actions: list[str], old: bool, seed: int) -> None:
    """After any steps in any order, the outputs are those of an untouched model."""
    model, reference = build(OLD if old else NEW), build(OLD if old else NEW)
    untouched = snapshot(model)
    change = FoldStage().prepare(Part("model", "vocoder", model))
    torch.manual_seed(seed)
    on = False
    for action in actions:
        if action in {"on", "off"}:
            getattr(change, action)()
            on = action == "on"
        elif action == "load":
            state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
            model.load_state_dict(state)
            reference.load_state_dict(state)
        elif action == "scale" and not on:  # editing parameters by hand is seen when the fold is made anew
            with torch.no_grad():
                for both in zip(model.parameters(), reference.parameters(), strict=True):
                    for parameter in both:
                        parameter.mul_(1.25)
        assert torch.equal(run(model), run(reference))
    change.off()
    assert torch.equal(run(model), run(reference))
    assert snapshot(model) == untouched
