"""A fingerprint tells apart what tuning may decide differently for, and nothing else; no tensor is too odd for it."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm

from accelerate_tts.storage.fingerprint import fingerprint, outline


class Net(nn.Module):
    """Model with a hyper-parameter that `repr` shows, one that it does not, one in a config, and a path."""

    def __init__(self, *, stride: int = 1, slope: float = 0.1, rate: int = 16000, path: str = "/models/a") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = weight_norm(nn.Conv1d(4, 4, 3, stride=stride))
        self.act = nn.LeakyReLU(0.2)
        self.slope = slope
        self.config = SimpleNamespace(sampling_rate=rate, _name_or_path=path)
        self.name_or_path = path
        self.kind = "gelu"
        self.scales = (1, 2.0, None)
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(self.act(self.conv(x)), self.slope)


def of(*models: nn.Module, **circumstances: Any) -> str:
    return fingerprint(models, circumstances)


def changed(change: Callable[[Any], object]) -> nn.Module:
    model = Net()
    with torch.no_grad():
        change(model)
    return model


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert of(Net()) == of(Net()) == of(copy.deepcopy(Net()))
    assert len(of(Net())) == 64


@pytest.mark.parametrize(
    "other",
    [
        lambda: Net(stride=2),
        lambda: Net(slope=0.2),
        lambda: Net(rate=22050),
        lambda: changed(lambda m: m.conv.bias[3].add_(1e-7)),
        lambda: changed(lambda m: m.window[3].add_(1e-7)),
        lambda: changed(lambda m: setattr(m.act, "negative_slope", 0.3)),
        lambda: changed(lambda m: setattr(m, "kind", "relu")),
        lambda: changed(lambda m: setattr(m, "scales", (1, 2.5, None))),
        lambda: changed(lambda m: setattr(m.conv, "dilation", (2,))),
        lambda: changed(lambda m: setattr(m, "config", {"sampling_rate": 22050})),
        lambda: Net().bfloat16(),
        lambda: nn.Sequential(Net()),
        lambda: changed(lambda m: setattr(m, "extra", nn.Identity())),
        lambda: changed(lambda m: m.register_buffer("more", torch.zeros(0))),
        lambda: changed(lambda m: m.requires_grad_(False)),
    ],
)
def test_what_tuning_may_decide_differently_for(other: Callable[[], nn.Module]) -> None:
    assert of(other()) != of(Net())


@pytest.mark.parametrize(
    "other",
    [
        lambda: Net().eval(),
        lambda: Net(path="/elsewhere/b"),
        lambda: changed(lambda m: m.register_forward_hook(lambda *_: None)),
        lambda: changed(lambda m: setattr(m, "_calls", 7)),
        lambda: changed(lambda m: setattr(m, "note", "loaded from https://example.org")),
        lambda: changed(lambda m: setattr(m.conv.bias, "data", m.conv.bias.data.clone())),
        lambda: changed(lambda m: m(torch.zeros(1, 4, 8))),
    ],
    ids=["training", "path", "hook", "private", "text", "address", "called"],
)
def test_what_is_no_part_of_the_computation_stays_out(other: Callable[[], nn.Module]) -> None:
    assert of(other()) == of(Net())


def test_every_circumstance_counts_in_whatever_order() -> None:
    assert of(Net(), torch="2.14", threads=2) == of(Net(), threads=2, torch="2.14")
    assert len({of(Net()), of(Net(), torch="2.14"), of(Net(), torch="2.13"), of(Net(), lengths=(1, 2))}) == 4
    assert of(Net(), Net()) != of(Net())
    assert of(Net(), odd=(Net, torch.float32)) != of(Net(), odd=(Net, torch.float16))  # what JSON cannot say


def test_a_repr_with_an_address_and_one_with_half_a_character() -> None:
    class Shown(nn.Module):
        def __init__(self, tail: str) -> None:
            super().__init__()
            self.tail = tail
            self.activation = lambda x: x

        def extra_repr(self) -> str:
            return f"activation={self.activation!r}, {self.tail}"

    one, two = Shown("a"), Shown("a")
    assert repr(one) != repr(two)
    assert of(one) == of(two)
    assert of(Shown("\ud800")) != of(Shown("a"))


PROBE = """
import torch
from torch import nn
from accelerate_tts.storage.fingerprint import fingerprint
torch.manual_seed(0)
model = nn.TransformerEncoderLayer(8, 2, activation=nn.functional.gelu)
model.sizes = {1, 2}
print(fingerprint([model], {"a": 1}))
"""


def test_another_process_with_other_hashes_finds_the_same() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, activation=nn.functional.gelu)
    model.sizes = {1, 2}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint([model], {"a": 1})


# --- odd tensors ---------------------------------------------------------------------------------------------------


def quantized(scale: float) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.14 announces its end
        return torch.quantize_per_tensor(torch.full((3, 3), 10 * scale), scale, 0, torch.qint8)


def per_channel() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scales, points = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int64)
        return torch.quantize_per_channel(torch.ones(3, 3), scales, points, 0, torch.qint8)


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(4).to_sparse_csr()


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.ones(3, device="meta"),
    "fake": fake,
    "not contiguous": lambda: torch.arange(12.0).view(3, 4).t(),
    "expanded": lambda: torch.ones(1).expand(5),
    "bf16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "fp8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "bool": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "quantized": lambda: quantized(0.1),
    "quantized per channel": per_channel,
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse rows": csr,
    "oneDNN": lambda: torch.ones(4, 4).to_mkldnn(),
    "empty": lambda: torch.zeros(0, 3),
    "no dimension": lambda: torch.tensor(3.0),
    "inference": inference,
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", ODD)
def test_no_tensor_is_too_odd(kind: str) -> None:
    def holder() -> nn.Module:
        model = nn.Module()
        model.register_buffer("odd", ODD[kind]())
        return model

    assert of(holder()) != of(nn.Module())
    if kind != "jagged":  # its shape is a symbol, which is another one for each tensor
        assert of(holder()) == of(holder())


def test_a_parameter_that_has_no_shape_yet_and_one_that_is_none() -> None:
    assert of(nn.LazyLinear(3)) == of(nn.LazyLinear(3)) != of(nn.Linear(3, 3))
    assert of(nn.Linear(3, 3, bias=False)) != of(nn.Linear(3, 3))


def test_odd_tensors_are_told_apart_by_their_content_where_they_have_one() -> None:
    def holder(tensor: torch.Tensor) -> nn.Module:
        model = nn.Module()
        model.register_buffer("odd", tensor)
        return model

    square = torch.arange(9.0).view(3, 3)
    assert of(holder(square)) != of(holder(square.t()))
    assert of(holder(square.t())) == of(holder(square.t().contiguous()))  # the memory's order is no part of the value
    assert of(holder(quantized(0.1))) != of(holder(quantized(0.2)))  # the same integers
    assert of(holder(torch.tensor(1.0))) != of(holder(torch.tensor(2.0)))
    assert of(holder(torch.tensor(1.0))) != of(holder(torch.tensor([1.0])))


def test_tied_weights() -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    untied = copy.deepcopy(tied)
    tied[1].weight = tied[0].weight
    untied[1].load_state_dict(tied[1].state_dict())
    assert of(tied) == of(copy.deepcopy(tied))
    assert of(tied) != of(untied)


# --- warm-ups ------------------------------------------------------------------------------------------------------


def test_the_outline_of_a_warm_up() -> None:
    assert outline(torch.rand(1, 5)) == outline(torch.rand(1, 5)) != outline(torch.rand(1, 6))
    assert outline(torch.rand(3)) != outline(torch.rand(3).double())
    assert outline(["Hi.", (torch.rand(2), 3), {"ids": torch.rand(1)}]) == [
        "Hi.", ["torch.float32 (2,)", 3], {"ids": "torch.float32 (1,)"},
    ]  # fmt: skip
    assert outline("Hi.") != outline("Hello.")
    assert outline(None) is None
    assert outline(SimpleNamespace(a=1)) == "types.SimpleNamespace"


def test_a_callable_is_known_by_its_name_and_code() -> None:
    one, same = (lambda model: model(1) for _ in range(2))
    assert outline(one) == outline(same)
    assert outline(one) != outline(lambda model: model.speak(1))
    assert outline(one) != outline(lambda model: (model(1), None)[1])
    assert outline(functools.partial(one, 1)) == ["functools.partial"]
    assert outline(nn.Linear(1, 1)) == ["torch.nn.modules.linear.Linear"]
    assert outline(len) == ["builtins.len"]
