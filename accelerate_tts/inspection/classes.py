"""Classes of modules, beneath the class swaps of a tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def state_of(module: object) -> Any:
    """Return what pickle stores of an object's attributes. `object.__getstate__` is of Python 3.11."""
    state: Any = object.__reduce_ex__(module, 2)
    return state[2]
