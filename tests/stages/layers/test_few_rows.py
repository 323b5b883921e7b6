"""Few-row linear layers: the same numbers to rounding at every number of rows, and an untouched module otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts.patching.class_swap import ClassSwap
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.few_rows import FEW_ROWS, FewRowsStage


def change_of(model: nn.Module) -> ClassSwap:
    change = FewRowsStage().prepare(Part("model", "decoder", model))
    change.on()
    return change


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3), features=st.integers(1, 40), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), strided=st.booleans(),
)  # fmt: skip
def test_every_shape(shape: list[int], features: int, bias: bool, dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(features, 7, bias=bias, dtype=dtype)
    x = torch.randn(*shape, features, dtype=dtype)
    if strided and x.dim() > 1:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    with torch.no_grad():
        expected = model(x)
        change_of(model)
        found = model(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.is_contiguous() == expected.is_contiguous()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_which_rows_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: taken.append(args[2].shape[1]) or real(*args))
    model = nn.Linear(8, 8)
    change_of(model)
    with torch.no_grad():
        for rows in range(1, 12):
            model(torch.randn(rows, 8))
    assert taken == list(FEW_ROWS)


def test_gradients_still_flow() -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    change_of(model)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_undo_copies_and_wrong_input() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    reference = model(torch.ones(2, 4))
    change = change_of(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(clone[0]) is nn.Linear
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 2))  # as many numbers as two rows of four: it must not be taken for them
    change.off()
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(torch.ones(2, 4)), reference)


def test_adapters_are_left_alone() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert FewRowsStage().applies(Part("adapted", "decoder", Adapted(2, 2))) == "no linear layer in it"
