"""Profile of linear layers: the share of their work with few rows, as in decode steps."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.tuning.capture import removed_at_end

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

FEW = 8
"""Maximum rows for which reading a weight from memory takes longer than multiplying with it.

At 40 GB/s and 175 GFLOP/s, as measured on two cores with AVX-512, both take the same time at nine rows.
"""


class LinearWork:
    """Work of each module with a matrix as its weight, in units of one read of the weight."""

    def __init__(self) -> None:
        self._few: dict[int, float] = defaultdict(float)
        self._all: dict[int, float] = defaultdict(float)

    def note(self, module: Any, args: tuple[Any, ...]) -> None:
        """Record a call; used as a forward pre-hook."""
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or x.dim() == 0 or not x.is_floating_point() or x.numel() == 0:
            return
        rows = x.numel() // x.shape[-1]
        work = module.weight.numel() * max(1.0, rows / FEW)
        self._all[id(module)] += work
        if rows <= FEW:
            self._few[id(module)] += work

    def share_of_few(self, part: nn.Module) -> float:
        """Return the share of a module's linear work with few rows, 0.0 to 1.0; 1.0 without any linear work."""
        numbers = {id(module) for module in part.modules()}
        everything = sum(self._all[number] for number in numbers & self._all.keys())
        return sum(self._few[number] for number in numbers & self._few.keys()) / everything if everything else 1.0


@contextmanager
def linear_work(roots: tuple[nn.Module, ...]) -> Generator[LinearWork, None, None]:
    """Record the linear work of every module inside `roots` while open."""
    work = LinearWork()
    modules = {inner for root in roots for inner in root.modules() if _has_a_matrix(inner)}
    with removed_at_end(module.register_forward_pre_hook(work.note) for module in modules):
        yield work


def _has_a_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2  # noqa: PLR2004
