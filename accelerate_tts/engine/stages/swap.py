"""A change that gives modules another `forward` by giving them another class, and takes it away again.

The module's parameters, buffers, hooks, state dict and `__dict__` are not touched, so nothing can become stale. A copy
or a pickle of a changed module is one of its plain class.
"""

from __future__ import annotations

import copy
import copyreg
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["ClassSwap", "subclass_with"]


class ClassSwap:
    """The change; see `Change`.

    Args:
        modules: What is changed.
        swapped: From a module's class to the one it has while the change is on.
    """

    graphs: int | None = None

    def __init__(self, modules: list[nn.Module], swapped: Callable[[type], type]) -> None:
        self._modules = modules
        self._swapped = swapped
        self._before: list[type] = []

    def on(self) -> None:
        """See `Change.on`."""
        if not self._before:
            self._before = [type(module) for module in self._modules]
            for module, plain in zip(self._modules, self._before, strict=True):
                module.__class__ = self._swapped(plain)

    def off(self) -> None:
        """See `Change.off`."""
        if self._before:
            for module, plain in zip(self._modules, self._before, strict=True):
                module.__class__ = plain
            self._before = []

    def seal(self) -> None:
        """Nothing is compiled."""


def subclass_with(plain: type, forward: Callable[..., Any]) -> type:
    """A subclass of a module's class with another `forward`, whose copies and pickles are of the plain class.

    It has the plain class's own names: whoever prints or names the type finds what was there.
    """

    def twin(self: Any) -> Any:
        module: Any = object.__new__(plain)
        module.__dict__ = vars(self)
        return module

    def reduce_ex(self: Any, protocol: int) -> Any:
        if "__reduce_ex__" in vars(plain):  # a class of another stage: its own reduction makes an untouched module
            return twin(self).__reduce_ex__(protocol)
        # Not the twin's own: pickle insists that its __newobj__ makes an object of the module's present class.
        return copyreg._reconstructor, (plain, object, None), twin(self).__getstate__()  # type: ignore[attr-defined]

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(twin(self), memo)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    members = {**names, "forward": forward, "__reduce_ex__": reduce_ex, "__deepcopy__": deepcopy}
    return type(plain.__name__, (plain,), members)
