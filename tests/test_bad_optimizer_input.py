"""Any value at any method of `PerformanceOptimizer`: the answer that it should give, or an error of this library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import AccelerateTTSError, ModelError, PerformanceOptimizer, Settings, SettingsError
from accelerate_tts.errors import PackError, WarmupError


class Unshown:
    def __repr__(self) -> str:
        raise ArithmeticError("no repr")


class Odd:
    """Equal to nothing, without a hash, and not to be compared."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError("no comparison")


STRANGE: list[Any] = [
    None, True, 0, -1, 1, 10**30, 10**5000, 0.0, math.nan, math.inf, 1j, Fraction(1, 3), "", "cpu", "\0", "\ud800",
    b"x", (), [], {}, set(), [[]], (1, 2), {"a": 1}, {1: 2}, range(3), np.array([1, 2]), np.float64("nan"),
    torch.tensor(1.0), torch.zeros(0), object(), Odd(), Unshown(), int, len, Path("/nowhere/at/all"), nn.Identity,
    nn.Linear(2, 2),
]  # fmt: skip
values = st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.none(), max_size=3)


@pytest.fixture(scope="module")
def optimizer() -> Iterator[PerformanceOptimizer]:
    made = PerformanceOptimizer(Settings(device="cpu", compile=False, pack=False, pack_folder="/nowhere/at/all"))
    made.initialize()  # here, since it holds its flags until the end of the module
    yield made
    made.close()


def scoped(optimizer: PerformanceOptimizer, value: Any) -> bool:
    with optimizer.untouched(value) as in_force:
        return in_force


DOORS: dict[str, Callable[[PerformanceOptimizer, Any, Any], Any]] = {
    "compile_model": lambda o, a, b: o.compile_model(a, b),
    "warmup_model": lambda o, a, b: o.warmup_model(a, b),
    "measure_item_bytes": lambda o, a, b: o.measure_item_bytes(nn.Identity(), b) if b is None else None,
    "get_optimal_batch_size": lambda o, a, b: o.get_optimal_batch_size(a, item_bytes=b),
    "receipt": lambda o, a, _: o.receipt(a),
    "undo": lambda o, a, _: o.undo(a),
    "untouched": lambda o, a, _: scoped(o, a),
    "cleanup_memory": lambda o, a, _: o.cleanup_memory(isinstance(a, str)),
    "export_packs": lambda o, a, _: o.export_packs(a) if not _is_real(a) else None,
    "load_packs": lambda o, a, _: o.load_packs(a),
}


def _is_real(value: Any) -> bool:
    """Check that a file would really be written."""
    return isinstance(value, str) and value not in {"", "\0", "\ud800"}


def _check(error: AccelerateTTSError) -> None:
    assert str(error)
    assert error.__context__ is None or error.__suppress_context__, "another library's error shows through"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(door=st.sampled_from(sorted(DOORS)), first=values, second=values)
@example("compile_model", nn.Identity, "a class")
@example("warmup_model", Odd(), "hello")
@example("warmup_model", nn.Linear(2, 2), [])
@example("get_optimal_batch_size", 10**5000, None)
@example("untouched", Odd(), None)
@example("undo", [[], {"a": Odd()}], None)
@example("export_packs", Path("/nowhere/at/all/x"), None)
def test_any_value_at_any_door(optimizer: PerformanceOptimizer, door: str, first: Any, second: Any) -> None:
    try:
        answer = DOORS[door](optimizer, first, second)
    except (ModelError, SettingsError, WarmupError, PackError) as error:
        _check(error)
        return
    if door == "warmup_model":
        assert answer in {True, False}
    elif door in {"undo", "untouched"}:
        assert answer is False, "there is nothing that was tuned"
    elif door == "get_optimal_batch_size":
        assert type(answer) is int
        assert answer >= 1
    elif door == "compile_model":
        assert answer is first
        assert isinstance(first, nn.Module)
    elif door in {"receipt", "cleanup_memory"}:
        assert answer is None
