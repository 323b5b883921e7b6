"""Something computed from a module's weights (a half-precision copy, packed integers), never out of date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from accelerate_tts.engine.absent import Absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch import nn

__all__ = ["Derived", "State", "weights_state"]

T = TypeVar("T")


State = list[tuple[int, int]]


def weights_state(tensors: Iterable[torch.Tensor]) -> State:
    """Address and version of each tensor: it differs once one of them is written.

    A write through `.data` counts no version and is not seen, nor is one to an inference tensor.
    """
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _own_tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    if module._modules:  # a parametrization keeps the weights
        return (*module.parameters(), *module.buffers())
    # Without the generators of nn.Module, which would cost a decode step of 200 layers a millisecond.
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


class Derived(Generic[T]):
    """A value that is made from a module's weights when it is first needed, and anew when they were written.

    Args:
        module: A small module: its tensors are looked at on each `get`.
        make: Makes the value; run without autograd.
    """

    def __init__(self, module: nn.Module, make: Callable[[Any], T]) -> None:
        self._module = module
        self._make = make
        self._made: tuple[State, T] | None = None

    def get(self) -> T:
        """The value for the weights as they are now."""
        import torch

        made = self._made
        # A compiler cannot trace the question, and whoever compiles asks it himself at each call (`keeps_copies`).
        # Weights that are away (`Absent`) were not written, and a look at them would have them loaded again.
        if made is not None and (
            torch.compiler.is_compiling()
            or type(self._module._parameters) is Absent
            or made[0] == weights_state(_own_tensors(self._module))
        ):
            return made[1]
        # Normal tensors even when tuning runs in inference mode: they outlive that scope.
        with torch.inference_mode(mode=False), torch.no_grad():
            state = weights_state(_own_tensors(self._module))  # before: what is written meanwhile is seen next time
            value = self._make(self._module)
        self._made = (state, value)
        return value
