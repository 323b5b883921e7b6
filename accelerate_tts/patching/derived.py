"""Something computed from a module's weights (a half-precision copy, packed integers), never out of date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from accelerate_tts.patching.lazy_parameters import Absent
from accelerate_tts.patching.weight_versions import Weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Derived"]

T = TypeVar("T")


class Derived(Generic[T]):
    """A value that is made from a module's weights when it is first needed, and anew when they are others.

    Args:
        module: A small module: its tensors are looked at on each `get`.
        make: Makes the value; run without autograd.
    """

    def __init__(self, module: nn.Module, make: Callable[[Any], T]) -> None:
        self._module = module
        self._make = make
        self._made: tuple[Weights, T] | None = None

    def get(self) -> T:
        """The value for the weights as they are now."""
        import torch

        made = self._made
        # A compiler cannot trace the question, and whoever compiles asks it himself at each call (`keeps_copies`).
        # Weights that are away (`Absent`) were not written, and a look at them would have them loaded again.
        if made is not None and (
            torch.compiler.is_compiling() or type(self._module._parameters) is Absent or not made[0].outdated()
        ):
            return made[1]
        # Normal tensors even when tuning runs in inference mode: they outlive that scope.
        with torch.inference_mode(mode=False), torch.no_grad():
            weights = Weights(self._module)  # before: what is written meanwhile is seen next time
            value = self._make(self._module)
        self._made = (weights, value)
        return value
