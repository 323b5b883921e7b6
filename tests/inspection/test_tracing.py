"""A tuned model that is traced, exported or transformed: upstream's operators, and upstream's results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.inspection.tracing import is_watched
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.whole import CompiledCall
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.stages.layers.weight_norm import FoldStage

ENGINE = next(name for name in ("x86", "qnnpack") if name in torch.backends.quantized.supported_engines)
STAGES: dict[str, Callable[[], Any]] = {
    "skinny fp32": lambda: SkinnyStage("fp32"),
    "skinny bf16": lambda: SkinnyStage("bf16"),
    "skinny int8": lambda: SkinnyStage("int8"),
    "few rows": FewRowsStage,
    "half layers": lambda: HalfStage(torch.bfloat16, carried=False),
    "half part": lambda: HalfStage(torch.bfloat16, carried=True),
    "quantised": lambda: QuantizeStage(ENGINE),
    "fold": FoldStage,
}  # fmt: skip
each = pytest.mark.parametrize("name", STAGES)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "fold":
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(128, 8, 1)), nn.Tanh()).eval()
    return nn.Sequential(nn.Linear(128, 160), nn.Tanh(), nn.Linear(160, 128)).eval()


def x(name: str, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn((1, 128, rows) if name == "fold" else (rows, 128), generator=generator)


def tuned(name: str) -> tuple[nn.Module, nn.Module]:
    model = build(name)
    plain = copy.deepcopy(model)
    STAGES[name]().prepare(Part("model", "decoder", model)).on()
    with torch.inference_mode():
        model(x(name))  # whatever is made at the first call is there
    return plain, model


def same(expected: Any, found: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each
def test_jit_trace(name: str) -> None:
    plain, model = tuned(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x(name),))
        for rows in (2, 9, 1):
            same(plain(x(name, rows)), traced(x(name, rows)))


@each
def test_jit_script(name: str, seen: list[Event]) -> None:
    plain, model = tuned(name)
    if name == "fold":  # torch scripts a parametrized module, and refuses to run it: the same of a folded one
        for each_model in (plain, model):
            with torch.no_grad(), pytest.raises(torch.jit.Error, match="Parametrization is not working"):
                torch.jit.script(each_model)(x(name))
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
        same(plain(x(name)), scripted(x(name)))
        same(plain(x(name)), model(x(name)))
    assert any(isinstance(event, NotApplied) and "torch.jit.script" in event.reason for event in seen)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="before torch 2.7, nothing tells of an export")
@each
def test_export(name: str) -> None:
    plain, model = tuned(name)
    with torch.no_grad():
        program = torch.export.export(model, (x(name),))
        same(plain(x(name)), program.module()(x(name)))
    assert "accelerate_tts" not in str(program.graph)


@each
def test_fx(name: str) -> None:
    plain, model = tuned(name)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        found = traced(x(name))
    assert float((found - plain(x(name))).norm() / plain(x(name)).norm()) < 0.05  # its leaves are the tuned layers


@each
def test_functional_transforms(name: str) -> None:
    plain, model = tuned(name)
    batch = torch.stack([x(name), x(name) + 1])
    with torch.no_grad():
        same(torch.func.vmap(plain)(batch), torch.func.vmap(model)(batch))
        other = {key: value * 2 for key, value in plain.named_parameters()}
        expected, found = (torch.func.functional_call(m, other, (x(name),)) for m in (plain, model))
        assert float((found - expected).norm() / expected.norm()) < 0.05
        same(plain(x(name)).shape, model(x(name)).shape)
    loss = [torch.func.grad(lambda given, m=m: m(given).sum())(x(name)) for m in (plain, model)]
    same(*loss)
    with torch.inference_mode():
        again = model(x(name))
    assert float((again - plain(x(name))).norm() / again.norm()) < 0.05


@each
def test_a_users_own_compile_sees_what_is_written_later(name: str) -> None:
    """Its graph makes no check of weights, as those of the package do."""
    written_after_compiling(*tuned(name), x(name))


def test_a_users_own_compile_of_a_weight_norm_by_hooks() -> None:
    plain, model = (nn.utils.weight_norm(nn.Conv1d(128, 8, 1)).eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    FoldStage().prepare(Part("model", "decoder", model)).on()
    written_after_compiling(plain, model, x("fold"))


def written_after_compiling(plain: nn.Module, model: nn.Module, given: torch.Tensor) -> None:
    compiled = [torch.compile(module, backend="eager") for module in (plain, model)]
    with torch.no_grad():
        same(*(module(given) for module in compiled))
        for module in (plain, model):
            for parameter in module.parameters():
                parameter.data *= 1.5
        same(*(module(given) for module in compiled))


class Louder(TorchFunctionMode):
    """Doubles what every layer computes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        return output * 2 if function in {torch.nn.functional.linear, torch.conv1d} else output


@each
def test_a_users_function_mode(name: str) -> None:
    plain, model = tuned(name)
    with torch.no_grad(), Louder():
        same(plain(x(name)), model(x(name)))
    with torch.no_grad():
        assert float((model(x(name)) - plain(x(name))).norm() / plain(x(name)).norm()) < 0.05


def test_torchs_own_function_mode_for_devices_is_none_of_a_users() -> None:
    with torch.device("cpu"):
        assert not is_watched()
        with Louder():
            assert is_watched()
    assert not is_watched()


@each
def test_fake_tensors(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _plain, model = tuned(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model(mode.from_tensor(x(name))).shape == build(name)(x(name)).shape


def test_a_compiled_part_is_traced_as_upstreams() -> None:
    model = build("skinny fp32")
    plain = copy.deepcopy(model)
    CompiledCall(model, "model", "default").on()
    with torch.no_grad():
        same(plain(x("")), torch.jit.trace(model, (x(""),))(x("")))


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative": torch._neg_view,
    "negative zeros": lambda given: torch._neg_view(torch.zeros_like(given)),
    "zeros": lambda given: torch._efficientzerotensor(given.shape),
    "sparse": torch.Tensor.to_sparse,
    "sparse rows": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda given: torch.nested.nested_tensor(list(given[None])),
}


@pytest.mark.parametrize("name", [name for name in STAGES if name != "fold"])
@pytest.mark.parametrize("odd", ODD)
def test_inputs_whose_memory_does_not_hold_their_numbers(name: str, odd: str) -> None:
    plain, model = tuned(name)
    with torch.inference_mode():
        given = ODD[odd](x(name))
        expected, found = (each[0](given) for each in (plain, model))
    if odd == "nested":
        expected, found = (each.to_padded_tensor(0.0) for each in (expected, found))
    expected, found = (each.to_dense() if each.layout is not torch.strided else each for each in (expected, found))
    assert float((expected - found).norm()) <= 0.03 * float(expected.norm())


@pytest.mark.parametrize("name", [name for name in STAGES if name != "fold"])
def test_a_sparse_weight_after_tuning(name: str) -> None:
    plain, model = tuned(name)
    for each in (plain, model):
        layer: Any = each[0]
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.no_grad():  # torch's sparse products refuse inference mode
        assert torch.allclose(plain(x(name)), model(x(name)), atol=0.03)


@each
def test_tangents_under_no_grad(name: str) -> None:
    plain, model = tuned(name)

    def tangent(module: nn.Module) -> torch.Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(x(name), torch.ones_like(x(name)))
            return forward_ad.unpack_dual(module(dual)).tangent  # type: ignore[return-value]

    assert torch.allclose(tangent(plain), tangent(model), atol=1e-5)


@each
def test_gradients(name: str) -> None:
    """Copies have none; a model that is trained after tuning, by mistake or not, must not lose them silently."""

    def gradients(module: nn.Module) -> list[torch.Tensor]:
        given = x(name).requires_grad_()
        module(given).square().sum().backward()
        return [given.grad, *(parameter.grad for parameter in module.parameters())]  # type: ignore[list-item]

    for expected, found in zip(*map(gradients, tuned(name)), strict=True):
        assert torch.allclose(expected, found, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "fold"])
def test_the_input_by_keyword(name: str) -> None:
    plain, model = tuned(name)
    with torch.inference_mode():
        assert torch.allclose(plain[0](input=x(name)), model[0](input=x(name)), atol=0.05)
