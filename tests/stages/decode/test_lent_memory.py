"""Memory that is lent until nobody has a tensor over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelerate_tts.stages.decode.lent_memory import LentMemory

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]


def rows(dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows of larger tensors, as a slot among others has them."""
    wholes = [torch.arange(4 * 2 * 6 * 8, dtype=torch.float32).reshape(4, 2, 6, 8).to(dtype) for _ in range(2)]
    return [whole[1:2] for whole in wholes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [True, False])
def test_a_loan_is_the_same_memory(dtype: torch.dtype, mode: bool) -> None:
    tensors = rows(dtype)
    with torch.inference_mode(mode):
        given = LentMemory(tensors).lend()
    for one, other in zip(tensors, given, strict=True):
        assert (one.shape, one.stride(), one.dtype, one.data_ptr()) == (
            other.shape, other.stride(), other.dtype, other.data_ptr()
        )  # fmt: skip
        assert not other.is_inference()
        other.zero_()
        assert not one.to(torch.float32).any()


@pytest.mark.parametrize(
    "keep",
    [
        lambda given: given[0],
        lambda given: given[1][..., :2, :],
        lambda given: given[0].flatten()[3:4],
        lambda given: given[0].view(torch.uint8),
        lambda given: given[0].detach(),
        lambda given: given[0].numpy(),
        lambda given: given[0].untyped_storage(),
    ],
)
def test_it_is_lent_as_long_as_anybody_has_a_part_of_it(keep: Callable[[list[torch.Tensor]], Any]) -> None:
    memory = LentMemory(rows(torch.float32))
    assert not memory.is_lent()
    given = memory.lend()
    kept = keep(given)
    del given
    assert memory.is_lent()
    with pytest.raises(RuntimeError, match="in use"):
        memory.lend()
    del kept
    assert not memory.is_lent()
    assert len(memory.lend()) == 2


def test_the_memory_lives_as_long_as_the_loan() -> None:
    tensors = rows(torch.float32)
    expected = tensors[0].clone()
    memory = LentMemory(tensors)
    given = memory.lend()
    del memory, tensors
    junk = [torch.zeros(4, 2, 6, 8) for _ in range(50)]
    assert torch.equal(given[0], expected)
    assert len(junk) == 50


def test_whose_it_is() -> None:
    memory = LentMemory(rows(torch.float32))
    first = memory.lend()
    assert memory.is_all_of(first)
    assert not memory.is_all_of(first[:1])
    assert not memory.is_all_of([first[1], first[0]])
    assert memory.has(first[0][..., 1:])
    del first
    assert not memory.is_all_of([None, None])
    second, other = memory.lend(), LentMemory(rows(torch.float32)).lend()
    assert memory.is_all_of(second)
    assert not memory.is_all_of(other)
    assert not memory.has(other[0])
