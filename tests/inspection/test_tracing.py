"""A tuned model that is traced, exported or transformed: upstream's operators, and upstream's results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
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


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="before torch 2.7, nothing tells of an export")
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
    plain, model = tuned(name)
    compiled = [torch.compile(module, backend="eager") for module in (plain, model)]
    with torch.no_grad():
        same(*(module(x(name)) for module in compiled))
        for module in (plain, model):
            for parameter in module.parameters():
                parameter.data *= 1.5
        same(*(module(x(name)) for module in compiled))


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
