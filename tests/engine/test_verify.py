"""Two results are compared number by number, whatever holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import ModelOutput

from accelerate_tts.engine.verify import NOTHING_TO_COMPARE, compare, tensors_of

T = torch.tensor([3.0, 4.0])


@dataclass
class Output(ModelOutput):
    waveform: torch.Tensor | None = None
    rest: Any = None


@dataclass
class Plain:
    wave: torch.Tensor
    rate: int


@pytest.mark.parametrize(
    "holder",
    [lambda t: t, lambda t: (1, [t, None]), lambda t: {"a": t}, lambda t: Output(waveform=t), lambda t: Plain(t, 5),
     lambda t: t.numpy()],
    ids=["tensor", "nested", "dict", "ModelOutput", "dataclass", "numpy"],
)  # fmt: skip
def test_relative_error_in_every_holder(holder: Any) -> None:
    assert compare(holder(T), holder(T.clone())).error == 0.0
    assert compare(holder(T), holder(T + torch.tensor([0.5, 0.0]))).error == pytest.approx(0.1)
    assert len(list(tensors_of(holder(T)))) == 1


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (torch.ones(3), "shape"),
        (T.double(), "float64"),
        (torch.tensor([3.0, math.nan]), "finite"),
        ((T, T), "2 tensors instead of 1"),
        (None, "0 tensors instead of 1"),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(candidate: Any, reason: str) -> None:
    difference = compare(T, candidate)
    assert math.isinf(difference.error)
    assert reason in difference.reason


def test_whole_numbers_must_be_equal_and_nans_may_agree() -> None:
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 2])).error == 0.0
    assert math.isinf(compare(torch.tensor([1, 2]), torch.tensor([1, 3])).error)
    both = torch.tensor([1.0, math.nan, math.inf])
    assert compare(both, both.clone()).error == 0.0
    assert math.isinf(compare(both, torch.tensor([1.0, math.inf, math.nan])).error)
    assert compare(torch.zeros(3), torch.zeros(3)).error == 0.0
    assert math.isinf(compare(torch.zeros(3), torch.full((3,), 1e-9)).error)
    assert compare(torch.zeros(0), torch.zeros(0)).error == 0.0


def test_speech_without_tensors() -> None:
    assert compare(b"abc", b"abc").error == 0.0
    assert math.isinf(compare(b"abc", b"abd").error)
    assert compare([0.1, 0.2], [0.1, 0.2]).error == 0.0
    assert compare([0.1, 0.2], [0.1, 0.3]).error > 0.1
    assert math.isinf(compare({"audio": b"a"}, {"audio": b"b"}).error)
    assert math.isinf(compare([b"ab", b"c"], [b"ab", b"d"]).error)


def test_a_plain_result_object_is_looked_into() -> None:
    class Result:
        def __init__(self, wave: torch.Tensor) -> None:
            self.wave, self.me, self.text = wave, self, "hello"

    assert compare(Result(T), Result(T)).error == 0.0
    assert compare(Result(T), Result(2 * T)).error == pytest.approx(1.0)


@pytest.mark.parametrize("nothing", [None, [], [None], "text", {"rate": 16000}, 5, object()])
def test_nothing_to_compare_is_not_right(nothing: Any) -> None:
    assert math.isinf(compare(nothing, nothing).error)
    assert compare(nothing, nothing).reason == NOTHING_TO_COMPARE


def test_another_memory_layout_is_a_difference() -> None:
    """The caller's .view() would fail on it."""
    a = torch.randn(2, 3, 4)
    b = a.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(a, b)
    assert compare(a, b).reason == "a different memory layout"
    assert compare(b, a).error == 0.0


def test_a_reference_of_infinities_is_compared_by_sign() -> None:
    assert math.isinf(compare(torch.tensor([math.inf]), torch.tensor([-math.inf])).error)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(1e-6, 1e-1))
def test_the_error_is_that_of_numpy(values: list[float], size: float) -> None:
    a = torch.tensor(values)
    b = a * (1 + size)
    left, right = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    norm = np.linalg.norm(left)
    if norm > 0:
        assert compare(a, b).error == pytest.approx(np.linalg.norm(left - right) / norm, rel=1e-9)
