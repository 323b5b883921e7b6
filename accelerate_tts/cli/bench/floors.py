"""Floors of a machine, measured in the run whose figures they explain: memory that is read, and products."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from accelerate_tts.tuning.timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


Floors = dict[str, float | None]
"""Rates by name: "memory" in bytes a second; "fp32", "bf16" and "int8" in operations a second. `None` is not there."""

STEADY = 1.25
"""Largest ratio between two measurements of one floor in a run. Beyond it the machine changed meanwhile."""

_SIDE = 1024  # of the matrices: 2 * 1024 ** 3 operations, and 12 MB in fp32
_PRODUCTS = 5


def floors(device: str = "cpu") -> Floors:
    """Measure all floors of a device. Takes a quarter of a second on two cores with bf16 units."""
    return {"memory": bandwidth(device), **{name: _product(name, device) for name in ("fp32", "bf16", "int8")}}


def moved(found: Sequence[Floors]) -> str:
    """Return which floors differed between the measurements of a run by more than `STEADY`; "" if none did.

    Args:
        found: Measurements of one run, in order.
    """
    told = []
    for name in found[0] if found else ():
        rates = [rate for one in found if (rate := one.get(name)) is not None]
        if rates and max(rates) > STEADY * min(rates):
            unit = "GB/s" if name == "memory" else "GFLOP/s"
            told.append(f"{name} gave {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} {unit}")
    return "; ".join(told)


def bandwidth(device: str = "cpu") -> float:
    """Measure the memory bandwidth in bytes a second: the best of ten reads of 256 MB, each by a sum and by a product.

    On other devices than the CPU, the size is 1 GB, larger than any cache, and ten reads in a row are timed, since one
    launch takes as long as the read.
    """
    import torch

    rows, readings = (16_384, 1) if device == "cpu" else (65_536, 10)
    matrix, vector = torch.ones(rows, 4096, device=device), torch.ones(4096, device=device)
    x = matrix.view(-1)
    # Either operation may be bound by arithmetic.
    best = min(_best(operation, readings, 10, device) for operation in (x.sum, lambda: torch.mv(matrix, vector)))
    return x.numel() * 4 / best


def _product(name: str, device: str) -> float | None:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[name]
    multiply: Any = getattr(torch, "_int_mm" if name == "int8" else "mm")
    try:
        a, b = (torch.ones(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda: multiply(a, b), 1, _PRODUCTS, device)
    except (RuntimeError, NotImplementedError):  # this torch has no such product on this device
        return None
    return 2.0 * _SIDE**3 / seconds


def _best(operation: Callable[[], object], times: int, tries: int, device: str) -> float:
    """Return the least seconds of one operation in some tries of several in a row."""
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            operation()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / times)
    return best
