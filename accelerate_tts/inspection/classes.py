"""Classes of modules, beneath the class swaps of a tuning."""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

PLAIN = "_accelerate_tts_plain"


def class_of(module: Any) -> Any:
    """Return the module's present class, typed so that type checkers accept it as a cache key."""
    return type(module)


def is_torchs_linear(cls: Any) -> bool:
    """Check that a class computes as torch's linear layer does: it inherits that forward, unpatched.

    A subclass with a forward of its own (an adapter, a quantised layer) does something that we do not know.
    """
    from torch import nn

    forward: Any = nn.Linear.forward
    # Not `__module__`, which `functools.wraps` copies.
    ours = getattr(forward, "__globals__", {}).get("__name__") == nn.Linear.__module__
    return bool(ours and issubclass(cls, nn.Linear) and cls.forward is forward)


def is_bias(bias: Any, outputs: int) -> bool:
    """Check that a bias has one number for each output. torch broadcasts other shapes, a kernel does not."""
    return bias is None or tuple(bias.shape) == (outputs,)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class beneath all class swaps."""
    return beneath_swaps(type(module))


def beneath_swaps(cls: type[Any]) -> type[Any]:
    """Return the class that class swaps have derived a class from."""
    while PLAIN in vars(cls):
        cls = vars(cls)[PLAIN]
    return cls


def twin_of(item: Any, cls: type, without: Collection[str]) -> Any:
    """Make a shallow copy of an object, with another class and without some attributes. No `__init__` runs."""
    twin: Any = object.__new__(cls)
    twin.__dict__ = {name: value for name, value in vars(item).items() if name not in without}
    return twin


def reduction_of(item: Any, cls: type, without: Collection[str]) -> tuple[Any, ...]:
    """Return what `__reduce_ex__` returns for an object whose pickle holds its `twin_of`.

    The twin's own would not do: pickle requires that its `__newobj__` makes an object of the present class.
    """
    state: Any = object.__reduce_ex__(twin_of(item, cls, without), 2)  # `object.__getstate__` is of Python 3.11
    return copyreg._reconstructor, (cls, object, None), state[2]  # type: ignore[attr-defined]
