"""Layers that change after their stage was put on: by their class, their attributes, their bias, as another module."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from accelerate_tts import Event
from accelerate_tts.patching.class_swap import serves_copies
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers import short_convolutions
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeRecurrentStage, QuantizeStage, engines
from accelerate_tts.stages.layers.short_convolutions import ShortConvolutionStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.stages.layers.weight_norm import FoldStage

STAGES: dict[str, tuple[Callable[[], Any], float]] = {
    "fold": (FoldStage, 0.0),
    "channels-last": (ChannelsLastStage, 1e-5),
    "fewer products": (ShortConvolutionStage, 1e-5),
    "half layers": (lambda: HalfStage(torch.bfloat16, carried=False), 0.05),
    "half part": (lambda: HalfStage(torch.bfloat16, carried=True), 0.05),
    "few rows": (FewRowsStage, 1e-5),
    "skinny": (lambda: SkinnyStage("fp32"), 1e-5),
    "skinny int8": (lambda: SkinnyStage("int8"), 0.05),
    "int8 recurrent": (QuantizeRecurrentStage, 0.05),
    **{
        f"int8 {name}": (lambda name=name: QuantizeStage(name), 0.05)
        for name in dict.fromkeys((engines()[0], engines()[-1]))
    },
}  # fmt: skip
X = torch.randn(1, 128, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(128, 128, 3, padding=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.up = nn.utils.weight_norm(nn.ConvTranspose1d(128, 128, 4))
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)
        self.memory = nn.LSTM(128, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(self.up(self.conv(x)).transpose(1, 2)))
        found: torch.Tensor = self.memory(self.second(y))[0]
        return found


def run(model: nn.Module) -> Any:
    with torch.inference_mode():
        return model(X)


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected - found).norm() / expected.norm())


@pytest.fixture(params=STAGES)
def tuned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Net, Net, Any, float]:
    monkeypatch.setattr(short_convolutions, "LEAST_FRAMES", 1)  # signals are as short as the others take them
    torch.manual_seed(0)
    with torch.no_grad():  # a hook's product can be copied then
        plain = Net().eval()
    model = copy.deepcopy(plain)
    make, tolerance = STAGES[request.param]
    change = make().prepare(Part("model", "decoder", model, few_rows=1.0))
    change.on()
    assert distance(run(plain), run(model)) <= tolerance
    return plain, model, change, tolerance


# --- what is no layer's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.ConvTranspose1d, nn.Linear, nn.LSTM])
def test_a_class_that_is_patched(
    cls: Any, tuned: tuple[Net, Net, Any, float], seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model, change, tolerance = tuned
    before, own = run(model), cls.forward
    replaced = [m for m in model.modules() if isinstance(m, cls) and type(m).forward is not own]
    # An LSTM in a half-precision part computes as upstream's; only its inputs are cast.
    is_told = any(cls is not nn.LSTM or serves_copies(module) for module in replaced)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        return (found[0] * 3, found[1]) if isinstance(found, tuple) else found * 3

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", patched)
        expected = run(plain)
        assert distance(expected, before) > 0.1
        for _ in range(2):
            assert distance(expected, run(model)) <= tolerance
        assert len(seen) == is_told
    assert torch.equal(run(model), before)
    change.off()
    assert torch.equal(run(model), run(plain))


def test_a_patched_step_of_a_convolution(
    tuned: tuple[Net, Net, Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    plain, model, _change, tolerance = tuned
    own = nn.Conv1d._conv_forward
    # torch's own step, which libraries patch on the class: the change that is to be noticed.
    monkeypatch.setattr(nn.Conv1d, "_conv_forward", lambda self, *given: own(self, *given) * 3)
    assert distance(run(plain), run(model)) <= tolerance


def test_copies_and_pickles_after_a_parametrization_came_and_went(tuned: tuple[Net, Net, Any, float]) -> None:
    """torch gives the layer classes of its own, whose copies have all attributes, those of the stage too."""
    plain, model, _change, tolerance = tuned
    for layer in (model.conv, model.first, model.memory):
        name = "weight_ih_l0" if layer is model.memory else "weight"
        parametrize.register_parametrization(layer, name, nn.Identity())
    with torch.no_grad():
        assert distance(run(plain), run(copy.deepcopy(model))) <= tolerance
    for layer in (model.conv, model.first, model.memory):
        parametrize.remove_parametrizations(layer, "weight_ih_l0" if layer is model.memory else "weight")
    assert distance(run(plain), run(pickle.loads(pickle.dumps(model)))) <= tolerance


def test_a_global_hook(tuned: tuple[Net, Net, Any, float]) -> None:
    plain, model, _change, tolerance = tuned
    handle = register_module_forward_hook(lambda m, _given, out: out * 3 if isinstance(m, nn.Linear) else None)
    try:
        assert distance(run(plain), run(model)) <= tolerance
    finally:
        handle.remove()


# --- what is -----------------------------------------------------------------------------------------------------


def reflecting(model: Net) -> None:
    model.conv.padding_mode, model.conv._reversed_padding_repeated_twice = "circular", [1, 1]


def in_groups(model: Net) -> None:
    model.conv.groups, model.conv.weight = 2, nn.Parameter(model.conv.weight.detach()[:, :64].clone())


def another_layer(model: Net) -> None:
    torch.manual_seed(5)
    model.second = nn.Linear(128, 128)


def narrower(model: Net) -> None:
    torch.manual_seed(5)
    model.first, model.second = nn.Linear(128, 64), nn.Linear(64, 128)


class Tripled(torch.Tensor):
    """A weight that torch's functions of layers know, and no other function of its kind, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in {nn.functional.linear, nn.functional.conv1d}:
            plain = [given.as_subclass(torch.Tensor) if isinstance(given, cls) else given for given in args]
            return 3 * function(*plain, **kwargs or {})
        return super().__torch_function__(function, types, args, kwargs or {})


def of_another_class(model: Net) -> None:
    for layer in (model.conv, model.first, model.second):
        layer._parameters["weight"] = layer.weight.detach().as_subclass(Tripled)  # type: ignore[assignment]


def bias(*shape: int) -> Callable[[Any], None]:
    def change(model: Net) -> None:
        model.first.bias = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)))

    return change


CHANGES: dict[str, Callable[[Any], object]] = {
    "padding": lambda model: setattr(model.conv, "padding", (2,)),
    "padding mode": reflecting,
    "stride": lambda model: setattr(model.conv, "stride", (2,)),
    "stride of the transposed": lambda model: setattr(model.up, "stride", (2,)),
    "groups": in_groups,
    "a bias of one": bias(1),
    "a bias without dimensions": bias(),
    "a bias for each row": bias(6, 128),
    "a bias for each frame": bias(6, 1),
    "no bias": lambda model: setattr(model.second, "bias", None),
    "a forward of its own": lambda model: setattr(model.conv, "forward", lambda x: x),
    "weights of another class": of_another_class,
    "another layer": another_layer,
    "another width": narrower,
    "time first": lambda model: setattr(model.memory, "batch_first", False),
    "gradients": lambda model: model.requires_grad_(requires_grad=False),
    "other weights": lambda model: [parameter.data.neg_() for parameter in model.parameters()],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_changes(name: str, tuned: tuple[Net, Net, Any, float]) -> None:
    plain, model, change, tolerance = tuned
    for each in (plain, model):
        CHANGES[name](each)
    assert distance(run(plain), run(model)) <= tolerance
    change.off()
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_and_back(dtype: torch.dtype, tuned: tuple[Net, Net, Any, float]) -> None:
    plain, model, change, tolerance = tuned
    for each in (plain, model):
        each.to(dtype)
    with torch.inference_mode():
        expected, found = (each(X.to(dtype)) for each in (plain, model))
    assert found.dtype == dtype
    assert distance(expected.double(), found.double()) <= max(tolerance, 0.02)
    for each in (plain, model):
        each.float()
    assert distance(run(plain), run(model)) <= tolerance
    change.off()
    assert torch.equal(run(model), run(plain))


class Strength(nn.Module):
    """A weight's change that is switched by attributes, as minLoRA's adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.function = 1.5, torch.neg

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.function(weight) * self.factor


@pytest.mark.parametrize("stage", [name for name in STAGES if "half" in name or ("int8" in name and "rec" not in name)])
def test_a_parametrization_is_switched_by_attributes_and_hooked(stage: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(128, 128), nn.Tanh()).eval()
    x, layer = torch.randn(2, 128), plain[0]
    parametrize.register_parametrization(layer, "weight", Strength())
    model = copy.deepcopy(plain)
    make, tolerance = STAGES[stage]
    change = make().prepare(Part("model", "decoder", model, few_rows=1.0))
    change.on()
    both = [module[0].parametrizations["weight"][0] for module in (plain, model)]

    def compare() -> None:
        with torch.inference_mode():
            assert distance(plain(x), model(x)) <= tolerance

    compare()
    for step in both:
        step.factor = 0.1
    compare()
    for step in both:
        step.function = torch.abs
    compare()
    hooks = [step.register_forward_hook(lambda _module, _inputs, weight: weight * 3) for step in both]
    compare()
    for hook in hooks:
        hook.remove()
    compare()
    change.off()
    with torch.inference_mode():
        assert torch.equal(plain(x), model(x))


# --- weights that are no parameters -----------------------------------------------------------------------------------


def as_attributes(model: Net) -> None:
    """Make weights plain attributes, as a hook that computes them from something else has them."""
    for layer in (model.conv, model.first, model.second):
        for name in ("weight", "bias"):
            tensor = layer._parameters.pop(name)
            assert tensor is not None
            setattr(layer, name, tensor.detach().clone())


def replaced(layer: Any, name: str) -> None:
    setattr(layer, name, getattr(layer, name).neg().add(0.5))


def written(layer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(-2.0).add_(0.5)


def written_unseen(layer: Any, name: str) -> None:
    getattr(layer, name).data.mul_(-2.0).add_(0.5)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("edit", [replaced, written, written_unseen])
def test_weights_that_are_plain_attributes(
    edit: Callable[[Any, str], None], name: str, tuned: tuple[Net, Net, Any, float]
) -> None:
    plain, model, change, tolerance = tuned
    for each in (plain, model):
        as_attributes(each)
    for _ in range(2):
        assert distance(run(plain), run(model)) <= tolerance
        for each in (plain, model):
            for layer in (each.conv, each.first, each.second):
                edit(layer, name)
    assert distance(run(plain), run(model)) <= tolerance
    change.off()
    assert torch.equal(run(model), run(plain))


class Scaled(nn.Module):
    """A parametrization whose tensor is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(1)
        self.more: Any = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor if self.more is None else weight * self.factor + self.more


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("edit", [
    lambda step: step.factor.mul_(-3.0), lambda step: setattr(step, "factor", torch.tensor([-3.0])),
    lambda step: setattr(step, "more", nn.Parameter(torch.tensor([0.1]))),
    lambda step: (delattr(step, "more"), step.register_buffer("more", torch.tensor([0.1]))),
])  # fmt: skip
def test_a_parametrization_by_a_plain_tensor(
    edit: Callable[[Any], object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_convolutions, "LEAST_FRAMES", 1)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            models.append(Net().eval())
        for layer in (models[-1].conv, models[-1].first, models[-1].second):
            parametrize.register_parametrization(layer, "weight", Scaled())
    plain, model = models
    make, tolerance = STAGES[name]
    change = make().prepare(Part("model", "decoder", model, few_rows=1.0))
    change.on()
    assert distance(run(plain), run(model)) <= tolerance
    for each in models:
        for layer in (each.conv, each.first, each.second):
            steps: Any = layer.parametrizations
            edit(steps["weight"][0])
    assert distance(run(plain), run(model)) <= tolerance


@pytest.mark.parametrize("name", STAGES)
def test_a_users_hook_that_makes_a_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that depends on the style of a call, and one of torch's own hooks, whose product is turned once."""
    monkeypatch.setattr(short_convolutions, "LEAST_FRAMES", 1)
    styles = torch.tensor([1.0, -2.0, 0.5])

    def build() -> Net:
        torch.manual_seed(0)
        with torch.no_grad():
            made = Net().eval()
        as_attributes(made)
        for layer in (made.conv, made.first, made.second):
            layer.register_buffer("base", layer.weight.clone())
            layer.register_forward_pre_hook(lambda m, _x: setattr(m, "weight", m.base * styles[calls[0]]))
        return made

    calls = [0]
    plain, model = build(), build()
    make, tolerance = STAGES[name]
    change = make().prepare(Part("model", "decoder", model, few_rows=1.0))
    change.on()
    for calls[0] in (0, 1, 2, 0):
        assert distance(run(plain), run(model)) <= tolerance
