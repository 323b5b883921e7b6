"""Weights that are edited in every way that torch allows, on every stage that keeps something made of them."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

from accelerate_tts.patching import weight_versions
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.whole import CompiledCall
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeRecurrentStage, QuantizeStage, engines
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.stages.layers.weight_norm import FoldStage

EXAMPLES = int(os.environ.get("ACCELERATE_TTS_TEST_EXAMPLES", "0"))
"""Number of sequences of edits for each stage; 0 for the few of `make test`."""


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the question itself --------------------------------------------------------------------------------------------


def test_what_is_not_changed_is_not_outdated() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(3, 5)).eval()
    weights = WeightWatch(model)
    with torch.inference_mode():
        model[:2](torch.randn(2, 300))
    model.train().eval().requires_grad_(requires_grad=False)
    copy.deepcopy(model)
    assert not any(weights.outdated() for _ in range(2000))


@pytest.mark.parametrize("place", [0, 17, 512 * 512 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_element_is_found_when_the_pieces_come_round(place: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(512, 512, dtype=dtype)
    weights = WeightWatch(layer)
    layer.weight.data.view(-1)[place] += 1
    pieces = -(-layer.weight.numel() * layer.weight.element_size() // 1024)
    assert any(weights.outdated() for _ in range(pieces))


def test_content_that_comes_back_is_not_outdated() -> None:
    layer = nn.Linear(64, 64)
    weights, kept = WeightWatch(layer), layer.weight.detach().clone()
    layer.weight.data.add_(1)
    assert weights.outdated()
    layer.weight.data.copy_(kept)
    assert not weights.outdated()


def test_without_content_it_is_where_they_are_that_counts() -> None:
    layer = nn.Linear(64, 64)
    weights = WeightWatch(layer, content=False)
    layer.weight.data.add_(1)
    assert not weights.outdated()
    layer.weight.data = layer.weight.data.clone()
    assert weights.outdated()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(0),
        lambda: torch.quantize_per_tensor(torch.ones(40), 0.1, 0, torch.qint8),
        lambda: torch.ones(3, 5, dtype=torch.complex64),
        lambda: torch.ones(3, 5).t(),
        lambda: torch.ones(1).expand(7),
        lambda: torch.ones(6, dtype=torch.bool)[::2],
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_tensors_of_every_kind(make: Callable[[], Any], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(weight_versions, "missing", lambda: "there are none")
    holder = {"a": make()}
    weights = WeightWatch.at([holder])
    assert not any(weights.outdated() for _ in range(10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder["a"] = make().clone()
    assert weights.outdated()


def test_another_parameter_in_the_same_memory_is_seen_at_once() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
    weights = WeightWatch(layers)
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().t())  # type: ignore[union-attr,operator]
        assert weights.outdated()
        assert weights.moved()
        weights = WeightWatch(layers)
        assert not any(weights.outdated() for _ in range(40))


@pytest.mark.parametrize("joined", [False, True])
def test_other_weights_in_memory_that_was_freed_are_seen_at_once(joined: bool) -> None:
    """Weights of few other elements may come to lie where those before lay, with the same version."""
    memory = bytearray(4 * 64 * 64)
    numbers = memoryview(memory).cast("f")
    for place in range(3, 64 * 64, 97):
        layer = nn.Linear(64, 64).requires_grad_(requires_grad=False)
        layer.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(64, 64)
        weights = WeightWatch(layer)
        weights = WeightWatch.joined([weights, WeightWatch(nn.Tanh())]) if joined else weights
        version = layer.weight._version
        layer.weight.data = torch.zeros(64, 64)
        numbers[place] += 1.0
        layer.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(64, 64)
        assert layer.weight._version == version, "else it shows nothing"
        assert weights.outdated()


def test_a_tensor_that_is_kept_elsewhere_is_not_freed() -> None:
    layer = nn.Linear(64, 64)
    weights = WeightWatch(layer)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach().clone()))
    assert weights.outdated(), "and it could be swapped"
    weights = WeightWatch(layer)
    layer.share_memory()
    layer(torch.randn(1, 64)).sum().backward()
    gc.collect()
    del layer.weight.grad
    assert not any(WeightWatch(layer).outdated() for _ in range(40))


@pytest.mark.parametrize("content", [False, True])
def test_a_square_weight_that_is_turned_where_it_lies_is_seen_at_once(content: bool) -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
    for layer in layers:
        weights = WeightWatch(layers, content=content)
        joined = WeightWatch.joined(
            [WeightWatch(layers[:5], content=content), WeightWatch(layers[5:], content=content)]
        )
        assert not any(watch.outdated() for watch in (weights, joined) for _ in range(40))
        layer.weight.data = layer.weight.data.t()
        assert [watch.outdated() for watch in (weights, joined)] == [True, True]
        assert [watch.moved() for watch in (weights, joined)] == [True, True]


def test_where_there_are_no_kernels_some_places_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_versions, "missing", lambda: "there are none")
    layer = nn.Linear(64, 64)
    weights = WeightWatch(layer)
    assert not weights.outdated()
    layer.weight.data.mul_(1.001)
    assert any(weights.outdated() for _ in range(1_000_000))  # looks may take a hundredth of the time


def test_looks_where_they_are_dear_take_a_share_of_the_time() -> None:
    now = [0.0]
    pace = weight_versions.Pace(share=0.01, clock=lambda: now[0])
    looks = []

    def look() -> bool:
        looks.append(now[0])
        now[0] += 0.001
        return False

    for _ in range(10_000):
        pace.allows(look)
        now[0] += 0.0005
    assert len(looks) * 0.001 <= 0.0105 * now[0]
    assert len(looks) > 0.009 * now[0] / 0.001


def seen_edits(weights: WeightWatch, layer: nn.Linear) -> int:
    """Of one edit a piece of 1,024 bytes, each taken back, those that are seen."""
    before = [layer.weight.data.view(-1, 256)[number].clone() for number in range(1024)]
    seen = 0
    for number in range(1024):
        layer.weight.data.view(-1, 256)[number] += 1
        seen += weights.outdated()
        layer.weight.data.view(-1, 256)[number] = before[number]
    return seen


def test_a_file_is_read_at_one_place() -> None:
    layer = nn.Linear(512, 512, bias=False)
    weights = WeightWatch(layer)
    weights.outdated()
    weight_versions.lie_in_files([layer.weight.untyped_storage()])
    weights.outdated()
    assert seen_edits(weights, layer) == 1


def test_memory_that_was_in_a_file_and_is_used_again_is_read_as_a_whole() -> None:
    memory = (ctypes.c_float * (512 * 512))()

    def at_this_place() -> nn.Linear:
        layer = nn.Linear(512, 512, bias=False)
        layer.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(512, 512)
        return layer

    first = at_this_place()
    weight_versions.lie_in_files([first.weight.untyped_storage()])
    del first
    gc.collect()
    second = at_this_place()
    weights = WeightWatch(second)
    weights.outdated()
    second.weight.data.view(-1)[-1] += 1
    assert any(weights.outdated() for _ in range(1024))


def test_a_module_without_tensors_that_is_put_in_is_seen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    weights = WeightWatch(model)
    model[1] = nn.ReLU()
    assert weights.outdated()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    weights = WeightWatch(model[0])
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    assert weights.outdated()


# --- edits ----------------------------------------------------------------------------------------------------------


def _first(model: nn.Module) -> Any:
    """Return a layer with its own weight; for a weight-normed layer, the weight is its direction."""
    return next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.LSTM)))


def _name(layer: Any) -> str:
    return "weight" if isinstance(layer._parameters.get("weight"), torch.Tensor) else next(iter(layer._parameters))


def of_no_grad(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def of_data(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.data += factor - 1


def of_detached(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.detach().mul_(factor)


def of_numpy(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= factor


def of_new_data(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * factor


def of_set(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.set_(parameter.detach() * factor)


def of_a_view(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[: max(1, parameter.numel() // 2)].mul_(factor)


def of_a_new_parameter(model: nn.Module, factor: float) -> None:
    layer = _first(model)
    name = _name(layer)
    setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * factor))


def of_a_dictionary(model: nn.Module, factor: float) -> None:
    model.load_state_dict({name: value * factor for name, value in model.state_dict().items()})


def of_an_assigned_dictionary(model: nn.Module, factor: float) -> None:
    model.load_state_dict({name: value * factor for name, value in model.state_dict().items()}, assign=True)


def of_a_vector(model: nn.Module, factor: float) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * factor, model.parameters())


def of_an_average(model: nn.Module, factor: float) -> None:
    """An EMA of the weights is swapped in, as diffusers does it."""
    shadow = [parameter.detach() * factor for parameter in model.parameters()]
    for parameter, other in zip(model.parameters(), shadow, strict=True):
        parameter.data.copy_(other.data)


def of_shared_memory(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().share_memory_()
        torch.frombuffer(  # as another process has it
            (__import__("ctypes").c_char * parameter.nbytes).from_address(parameter.data_ptr()), dtype=parameter.dtype
        ).mul_(factor)


def of_a_move(model: nn.Module, factor: float) -> None:
    model.double()
    of_data(model, factor)
    model.float()


EDITS = [
    of_no_grad, of_data, of_detached, of_numpy, of_new_data, of_set, of_a_view, of_a_new_parameter, of_a_dictionary,
    of_an_assigned_dictionary, of_a_vector, of_an_average, of_shared_memory, of_a_move,
]  # fmt: skip


# --- stages ---------------------------------------------------------------------------------------------------------


def normed(new: bool) -> nn.Module:
    norm: Any = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(norm(nn.Conv1d(8, 8, 3)), nn.Tanh(), norm(nn.Conv1d(8, 8, 3)))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 160), nn.Tanh(), nn.Linear(160, 128))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[0]


SEQUENCE = (1, 8, 40)
STAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], Any], float]] = {
    "fold, hook": (lambda: normed(new=False), SEQUENCE, FoldStage, 0.0),
    "fold, parametrization": (lambda: normed(new=True), SEQUENCE, FoldStage, 0.0),
    "skinny fp32": (linear, (2, 128), lambda: SkinnyStage("fp32"), 1e-5),
    "skinny bf16": (linear, (2, 128), lambda: SkinnyStage("bf16"), 0.03),
    "skinny int8": (linear, (2, 128), lambda: SkinnyStage("int8"), 0.05),
    "half layers": (linear, (2, 128), lambda: HalfStage(torch.bfloat16, carried=False), 0.03),
    "half part": (linear, (2, 128), lambda: HalfStage(torch.bfloat16, carried=True), 0.03),
    "half, folded": (lambda: normed(new=True), SEQUENCE, lambda: HalfStage(torch.bfloat16, carried=True), 0.03),
    "recurrent": (Recurrent, (1, 5, 16), QuantizeRecurrentStage, 0.25),
    **{
        stage.name: (linear, (2, 128), lambda stage=stage: stage, 0.08)
        for stage in (*map(QuantizeStage, engines()), QuantizeRecurrentStage())
        if isinstance(stage, QuantizeStage)
    },
    "graph": (linear, (2, 128), lambda: None, 1e-5),
}  # fmt: skip


def change_of(stage: Any, model: nn.Module, name: str) -> Any:
    if stage is None:  # weights that are constants in a graph; which compiler made them so is no matter
        weights = copy.deepcopy(model)
        return CompiledCall(model, "model", "default", frozen=True, compiler=lambda *_: weights.forward)
    if "folded" in name:
        FoldStage().prepare(Part("model", "vocoder", model)).on()
    return stage.prepare(Part("model", "decoder", model))


def differs(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.double() - found.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=EXAMPLES or 8, deadline=None, database=None)
@given(
    edits=st.lists(st.tuples(st.sampled_from(EDITS), st.sampled_from([0.5, 0.75, 1.5, 2.0])), min_size=1, max_size=5),
    of_inference=st.booleans(),
)
def test_after_any_edits_it_computes_as_an_untouched_twin(
    name: str, edits: list[tuple[Callable[[nn.Module, float], None], float]], of_inference: bool
) -> None:
    build, shape, stage, tolerance = STAGES[name]
    torch.manual_seed(0)
    with torch.no_grad():  # a hook's product can be copied then
        model = build().eval()
    plain = copy.deepcopy(model)
    x = torch.randn(shape)
    change = change_of(stage(), model, name)
    change.on()
    with torch.inference_mode(mode=of_inference), torch.no_grad():
        model(x)
    for edit, factor in edits:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        edit(model, factor)
        plain.load_state_dict(model.state_dict())
        assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
        with torch.inference_mode(mode=of_inference), torch.no_grad():
            assert differs(plain(x), model(x)) <= tolerance, edit.__name__
    change.off()
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("name", [name for name in STAGES if "fold" not in name and name not in {"recurrent", "graph"}])
def test_a_parametrization_that_comes_and_goes(name: str) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    build, shape, stage, tolerance = STAGES[name]
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(shape)
    change_of(stage(), model, name).on()

    def expected() -> torch.Tensor:
        hidden = nn.functional.linear(x, model[0].weight, model[0].bias).tanh()
        return nn.functional.linear(hidden, model[2].weight, model[2].bias)

    with torch.inference_mode():
        model(x)
        for leave in (True, False):
            parametrize.register_parametrization(model[0], "weight", Twice())
            assert differs(expected(), model(x)) <= tolerance
            parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=leave)
            assert differs(expected(), model(x)) <= tolerance


def test_an_inference_tensor_counts_no_versions_and_is_seen() -> None:
    with torch.inference_mode():
        model = linear().eval()
        plain, x = copy.deepcopy(model), torch.randn(2, 128)
        change_of(SkinnyStage("int8"), model, "").on()
        model(x)
        for _ in range(3):
            for one in (model, plain):
                one[0].weight.mul_(1.5)
            assert differs(plain(x), model(x)) <= 0.05


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("edit", ["in place", "in memory", "moved", "turned", "replaced"])
def test_a_joined_watch_sees_what_each_sees(edit: str, content: bool, number: int) -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3)]
    each = [WeightWatch(layer, content=content) for layer in layers]
    joined = WeightWatch.joined(each)
    assert not any(joined.outdated() for _ in range(20))
    linear = layers[number][0]
    with torch.no_grad():
        if edit == "in place":
            linear.weight.add_(1)
        elif edit == "in memory":
            linear.weight.data += 1
        elif edit == "moved":
            linear.weight.data = linear.weight.data.clone()
        elif edit == "turned":
            linear.weight.data = linear.weight.data.t()
        else:
            layers[number][0] = copy.deepcopy(linear)
    found = any(watch.outdated() for _ in range(20) for watch in each)
    assert found == (content or edit != "in memory")
    assert any(joined.outdated() for _ in range(20)) == found
