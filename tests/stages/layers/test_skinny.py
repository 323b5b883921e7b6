"""Our own kernel for a few rows: right at any shape, from the weights as they are, and torch's own answer otherwise."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from accelerate_tts import optimized_model, receipt_of
from accelerate_tts.kernels import calls, library
from accelerate_tts.kernels.calls import skinny_linear
from accelerate_tts.kernels.weight_formats import MOST_ROWS, WeightFormat
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.inductor import options
from accelerate_tts.stages.layers.skinny import SkinnyStage

INPUTS, OUTPUTS = 130, 140  # no multiple of any vector's length
LIMIT: dict[WeightFormat, float] = {"fp32": 1e-6, "bf16": 4e-3, "int8": 1.2e-2}


def layer(kind: str = "linear", *, bias: bool = True) -> Any:
    torch.manual_seed(0)
    if kind == "conv1d":
        made: Any = Conv1D(OUTPUTS, INPUTS)
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
        return made.eval()
    return nn.Linear(INPUTS, OUTPUTS, bias=bias).eval()


def changed(module: nn.Module, weights: WeightFormat = "fp32") -> Any:
    part = Part("model", "model", module)
    stage = SkinnyStage(weights)
    assert stage.applies(part) is None
    return stage.prepare(part)


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected.double() - found.double()).norm() / expected.double().norm())


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9), inputs=st.integers(1, 70), outputs=st.integers(1, 70), bias=st.booleans(),
    kind=st.sampled_from(["fp32", "bf16", "int8", "transposed"]), threads=st.integers(1, 3),
)  # fmt: skip
def test_the_kernel_at_any_shape(rows: int, inputs: int, outputs: int, bias: bool, kind: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows + 10 * inputs + 1000 * outputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).float()  # such as all formats hold
    offset = torch.randn(outputs, generator=generator) if bias else None
    scale = torch.rand(outputs, generator=generator) if kind == "int8" else None
    stored = {"fp32": weight, "bf16": weight.bfloat16(), "int8": weight.to(torch.int8), "transposed": weight.t()}[kind]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = skinny_linear()(x, stored.contiguous(), scale, offset, kind == "transposed")
    finally:
        torch.set_num_threads(before)
    expected = x.double() @ weight.double().t()
    expected = expected * scale.double() if scale is not None else expected
    expected = expected + offset.double() if offset is not None else expected
    size = x.double().abs() @ weight.double().abs().t() + 1  # what could cancel; x is in 16 bits beside int8
    size = size * (scale.double() if scale is not None else 1) + (offset.double().abs() if offset is not None else 0)
    assert ((y.double() - expected).abs() <= (1e-4 if kind == "int8" else 1e-6) * size).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_numbers_at_the_edge(value: float, dtype: torch.dtype) -> None:
    """NaN and Inf must stay visible in the result, for the guard and for the user's own checks."""
    x = torch.ones(2, 64)
    x[1, 40] = value
    scale = torch.ones(3) if dtype == torch.int8 else None
    y = skinny_linear()(x, torch.ones(3, 64).to(dtype), scale, None, False)
    assert torch.equal(y[0], torch.full((3,), 64.0)), "the other row has nothing to do with it"
    expected = x[1].double().sum()
    if expected.isfinite():
        torch.testing.assert_close(y[1].double(), expected.expand(3), rtol=1e-3, atol=1e-3)
    else:
        assert not y[1].isfinite().any()


@pytest.fixture(params=["linear", "conv1d"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (8, INPUTS), (2, 1, INPUTS), (2, 2, 2, INPUTS)])
def test_a_layer_computes_the_same(kind: str, weights: WeightFormat, shape: tuple[int, ...]) -> None:
    module = layer(kind)
    x = torch.randn(shape)
    with torch.inference_mode():
        expected = module(x)
        change = changed(module, weights)
        change.on()
        found = module(x)
        assert 0 < error(expected, found) < LIMIT[weights], "another kernel has another rounding: it did run"
        assert found.is_contiguous()
        change.off()
        assert torch.equal(module(x), expected)
    assert "_accelerate_tts_copy" not in vars(module)
    assert type(module) is type(layer(kind))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(MOST_ROWS + 1, INPUTS), torch.randn(0, INPUTS), torch.randn(2, INPUTS).double(),
        torch.randn(INPUTS, 2), torch.randn(2, INPUTS + 1), torch.tensor(1.0), torch.ones(2, INPUTS, dtype=torch.long),
        torch.randn(2, INPUTS, device="meta"),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}",
)  # fmt: skip
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_what_it_does_not_take_gets_torchs_own_answer(weights: WeightFormat, x: torch.Tensor) -> None:
    module = layer()

    def answer() -> Any:
        try:
            with torch.inference_mode():
                return module(x)
        except RuntimeError as error:
            return str(error)

    expected = answer()
    changed(module, weights).on()
    found = answer()
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor) and found.device.type == "cpu":
        assert torch.equal(found, expected)
    elif isinstance(found, str):
        assert found == expected


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_bf16_is_right_to_bf16s_rounding(bias: bool) -> None:
    """A bf16 model, such as Higgs, computes from its own weights, without a copy; each result is rounded once."""
    module = layer(bias=bias).bfloat16()
    x = torch.randn(2, 1, INPUTS).bfloat16()
    truth = nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if bias else None).detach()
    with torch.inference_mode():
        upstream = error(truth, module(x))
        changed(module).on()
        found = module(x)
    assert found.dtype == torch.bfloat16
    assert error(truth, found) <= max(upstream, 2e-3) * 1.05
    for weights in ("bf16", "int8"):
        assert SkinnyStage(weights).applies(Part("model", "model", layer().bfloat16())) is not None


def test_gradients_and_autocast_are_torchs_business() -> None:
    module = layer()
    x = torch.randn(2, INPUTS)
    changed(module).on()
    module(x).sum().backward()
    assert module.weight.grad is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_strided_inputs_and_weights(kind: str) -> None:
    module = layer(kind)
    x = torch.randn(INPUTS, 4).t()[::2]
    with torch.inference_mode():
        expected = module(x)
        changed(module).on()
        assert error(expected, module(x)) < 1e-6
        module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())  # same values, strided
        assert error(expected, module(x)) < 1e-6


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_written_weights_are_used_at_once(kind: str, weights: WeightFormat) -> None:
    module, x = layer(kind), torch.randn(2, INPUTS)
    changed(module, weights).on()
    with torch.no_grad():
        module(x)
        module.weight.mul_(-2.0)
        module.bias.add_(1.0)
        expected = layer(kind)
        expected.weight.mul_(-2.0)
        expected.bias.add_(1.0)
        assert error(expected(x), module(x)) < LIMIT[weights]
        module.load_state_dict(layer(kind).state_dict(), assign=True)
        assert error(layer(kind)(x), module(x)) < LIMIT[weights]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_copies_and_pickles_are_of_the_plain_class(kind: str, weights: WeightFormat) -> None:
    holder = nn.Sequential(layer(kind))
    plain = type(holder[0])
    changed(holder, weights).on()
    x = torch.randn(2, INPUTS)
    with torch.inference_mode():
        holder(x)
        for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
            assert type(other[0]) is plain
            assert not [name for name in vars(other[0]) if name.startswith("_accelerate")]
            assert torch.equal(other(x), nn.Sequential(layer(kind))(x))
    assert list(holder.state_dict()) == list(nn.Sequential(layer(kind)).state_dict())


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_compiled_around_it_is_one_graph_for_all_layers(weights: WeightFormat) -> None:
    layers = [nn.Linear(INPUTS, INPUTS) for _ in range(4)]
    model = nn.Sequential(*layers).eval()
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        x = torch.randn(2, INPUTS)
        expected = model(x)
        changed(model, weights).on()
        model(x)
        one = torch.compile(lambda block, y: block(y), backend=backend, fullgraph=True)
        y = x
        with options(None):
            for block in layers:
                y = one(block, y)
    assert error(expected, y) < 4 * LIMIT[weights]
    assert len(graphs) == 1
    assert any("skinny_linear" in str(node.target) for node in graphs[0].graph.nodes)


def test_subclasses_small_and_half_layers_are_left_alone() -> None:
    class Adapter(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
            return super().forward(input) * 2

    for module in (Adapter(INPUTS, OUTPUTS), nn.Linear(4, 4), layer().half(), nn.Conv1d(INPUTS, OUTPUTS, 1)):
        assert SkinnyStage().applies(Part("model", "model", module)) is not None


def test_without_kernels_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is reported once, where the library is loaded, and by the doctor: not by each stage of each load."""
    monkeypatch.setattr("accelerate_tts.stages.layers.skinny.missing", lambda: "built without kernels")
    model = nn.Sequential(layer()).eval()
    expected = model(torch.ones(2, INPUTS))

    @optimized_model(warmup=torch.ones(2, INPUTS), tune_seconds=30)
    def load() -> nn.Module:
        return model

    load()
    receipt = receipt_of(model)
    assert receipt is not None
    assert not [result for result in receipt.stages if result.stage.startswith("skinny")]
    assert torch.allclose(model(torch.ones(2, INPUTS)), expected, atol=1e-5)


# --- what the kernel is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "bias",
    [
        torch.tensor([0.25]), torch.tensor(0.25), torch.randn(1, OUTPUTS), torch.randn(2, OUTPUTS),
        torch.randn(2 * OUTPUTS)[::2], torch.randn(OUTPUTS).double(), torch.randn(OUTPUTS + 1),
    ],
    ids=lambda bias: f"{tuple(bias.shape)} {bias.dtype} {bias.stride()}",
)  # fmt: skip
def test_a_bias_of_another_shape_is_torchs_business(kind: str, weights: WeightFormat, bias: torch.Tensor) -> None:
    """torch adds whatever can be broadcast; a kernel that is given an address would read past its end."""
    module, x = layer(kind), torch.randn(2, INPUTS)
    changed(module, weights).on()
    module.bias = nn.Parameter(bias)
    plain = layer(kind)
    plain.bias = nn.Parameter(bias)

    def answer(one: Any) -> Any:
        try:
            with torch.inference_mode():
                return one(x)
        except RuntimeError as error:
            return str(error)

    expected, found = answer(plain), answer(module)
    assert type(found) is type(expected)
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_bias_of_one_number_in_a_bf16_layer(weights: WeightFormat) -> None:
    module = layer().bfloat16() if weights == "fp32" else layer()
    changed(module, weights).on()
    module.bias = nn.Parameter(torch.tensor([0.25], dtype=module.weight.dtype))
    x = torch.randn(2, INPUTS, dtype=module.weight.dtype)
    with torch.inference_mode():
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


X, WEIGHT, VECTOR = torch.randn(2, 16), torch.randn(8, 16), torch.randn(8)
GOOD: dict[str, Any] = {"x": X, "weight": WEIGHT, "scale": None, "bias": VECTOR, "transposed": False}


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.randn(2, 15)}, {"x": torch.randn(16)}, {"x": torch.randn(16, 2).t()}, {"x": X.double()},
        {"x": X.to("meta")}, {"weight": torch.randn(16, 8).t()}, {"weight": WEIGHT.double()},
        {"weight": WEIGHT.bfloat16(), "transposed": True, "x": torch.randn(2, 8)}, {"weight": WEIGHT.to("meta")},
        {"bias": VECTOR[:1]}, {"bias": torch.randn(16)[::2]}, {"bias": VECTOR.bfloat16()}, {"bias": VECTOR.to("meta")},
        {"scale": VECTOR[:7]}, {"scale": torch.tensor(1.0)}, {"scale": VECTOR.half()},
    ],
    ids=lambda wrong: " ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in wrong.items()),
)  # fmt: skip
def test_the_kernel_refuses_what_it_would_misread(wrong: dict[str, Any]) -> None:
    skinny_linear()(**GOOD)
    with pytest.raises(ValueError, match=r"skinny_linear was given .* It takes contiguous tensors on the CPU"):
        skinny_linear()(**(GOOD | wrong))


def test_it_is_built_once() -> None:
    assert calls.skinny_linear() is calls.skinny_linear()


def test_the_operator_is_registered_once_though_the_kernel_is_loaded_again() -> None:
    """The kernel is loaded again, as after an interruption of the first load."""
    x = torch.randn(2, 16)
    first = torch.ops.accelerate_tts.skinny_linear if calls.skinny_linear() else None
    library.loaded_library.cache_clear()
    calls.skinny_linear.cache_clear()
    weight = torch.randn(8, 16)
    again = calls.skinny_linear()(x, weight, None, None, False)
    assert first is not None
    assert torch.equal(first(x, weight, None, None, False), again)
    assert torch.allclose(again, x @ weight.T, atol=1e-5)
