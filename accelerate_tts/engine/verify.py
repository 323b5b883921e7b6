"""Compare what a candidate computes with what the untouched model computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["EXACT_TOLERANCE", "NOTHING_TO_COMPARE", "Difference", "compare", "tensors_of"]

NOTHING_TO_COMPARE = "nothing in the result can be compared; let the warm-up return the speech"

EXACT_TOLERANCE = 1e-4
"""The relative error up to which two fp32 results count as the same computation.

float32 rounds at 6e-8. Another order of the same sums, through the hundred layers of a vocoder, was seen to reach some
1e-6 (TRAPS: "exact" means to rounding); a bf16 anywhere costs 1e-3 and more. The limit lies between the two.
"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far apart two results are.

    Attributes:
        error: The largest relative error of any tensor: ||candidate - reference|| / ||reference||, in float64.
            0.0 is bit for bit; infinite where they cannot be compared.
        reason: What cannot be compared, or "".
    """

    error: float
    reason: str = ""


def compare(reference: Any, candidate: Any) -> Difference:
    """Compare two results of the same call: every tensor, array and byte string in them, in order.

    Floating-point tensors are compared by relative error in float64; all others must be equal. A different number of
    tensors, shape, dtype or memory layout, or a NaN where the reference has none, is an infinite error with its reason.
    So is a result in which nothing can be compared: what was not checked does not count as right.
    """
    left, right = list(tensors_of(reference)), list(tensors_of(candidate))
    if len(left) != len(right):
        return Difference(math.inf, f"{len(right)} tensors instead of {len(left)}")
    if not left:
        return Difference(math.inf, NOTHING_TO_COMPARE)
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return Difference(math.inf, f"{b.dtype} of shape {tuple(b.shape)} instead of {a.dtype} of {tuple(a.shape)}")
        if a.is_contiguous() and not b.is_contiguous():  # the caller's .view() would fail on it
            return Difference(math.inf, "a different memory layout")
        worst = max(worst, _error(a, b))
        if math.isinf(worst):
            return Difference(math.inf, "values that are not finite or not equal")
    return Difference(worst)


def tensors_of(value: Any) -> Iterator[Any]:
    """Every tensor in a result, in a fixed order: in containers, dataclasses and plain objects.

    NumPy arrays, byte strings, and lists of nothing but numbers (audio in other clothes) count as tensors.
    """
    yield from _tensors(value, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (bytes, bytearray)):
        yield torch.tensor(list(value), dtype=torch.uint8)
    elif isinstance(value, (str, int, float, complex, type, ModuleType, torch.nn.Module)) or value is None:
        return
    elif type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        if value.dtype.kind in "fiub":
            yield torch.as_tensor(value)
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, (tuple, list)) and value and all(isinstance(item, (int, float)) for item in value):
            yield torch.tensor(value, dtype=torch.float64)
        else:
            for item in _items(value):
                yield from _tensors(item, seen)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):  # transformers' ModelOutput too
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())


def _error(reference: Any, candidate: Any) -> float:
    import torch

    with torch.inference_mode():
        if not (reference.is_floating_point() or reference.is_complex()):
            return 0.0 if torch.equal(reference, candidate) else math.inf
        if reference.numel() == 0:
            return 0.0
        wide = torch.complex128 if reference.is_complex() else torch.float64
        # MPS has no float64, so the comparison is always made on the CPU.
        a, b = reference.detach().cpu().to(wide), candidate.detach().cpu().to(wide)
        finite = torch.isfinite(a)
        # NaN and infinity agree with their own kind only; an infinity with its sign.
        if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(a.isnan(), b.isnan()):
            return math.inf
        infinite = a.isinf()
        if not torch.equal(a[infinite], b[infinite]):
            return math.inf
        a, b = a[finite], b[finite]
        norm = float(torch.linalg.vector_norm(a))
        distance = float(torch.linalg.vector_norm(a - b))
        if distance == 0.0:
            return 0.0
        return distance / norm if norm > 0.0 else math.inf
