"""The parts that a loaded object consists of, each with a kind that stages choose by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["Kind", "ModelPlan", "Part", "find_modules"]

Kind = Literal["decoder", "estimator", "vocoder", "encoder", "flow", "model"]
"""An autoregressive decoder, an iterative estimator, a vocoder, an encoder, a flow; "model" is a whole one."""


@dataclass(frozen=True)
class Part:
    """A module that is optimised as one piece.

    Attributes:
        name: Its path from the loaded object, for people.
        kind: What sort of computation it is.
        module: The module itself, inside the user's object.
        decides: Whether a discrete choice hangs on its output (a duration that is rounded up, a token): then even a
            rounding error can change the length of the result, and only bit-exact changes are allowed.
    """

    name: str
    kind: Kind
    module: nn.Module
    decides: bool = False


@dataclass(frozen=True)
class ModelPlan:
    """What a loaded object consists of.

    Attributes:
        what: A short name of the object, for people.
        roots: The outermost modules, whose outputs the user sees.
        parts: What stages are tried on; none of them contains another.
    """

    what: str
    roots: tuple[nn.Module, ...]
    parts: tuple[Part, ...]


# How deep a pipeline object is searched. Chatterbox, XTTS and transformers' pipelines need two.
_DEPTH = 3


def find_modules(subject: object) -> dict[str, nn.Module]:
    """The outermost `nn.Module`s of an object, by their attribute path from it.

    Looks into tuples, lists, mappings and the attributes of objects that are no modules, three levels deep. A module
    is never looked into. The path of `subject` itself is "".
    """
    from torch import nn

    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    queue: list[tuple[str, object, int]] = [("", subject, 0)]
    while queue:
        path, value, depth = queue.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[path] = value
        elif depth < _DEPTH:
            queue += [(f"{path}.{name}" if path else name, item, depth + 1) for name, item in _members(value)]
    return found


def _members(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, type) or callable(getattr(type(value), "__torch_function__", None)):
        return  # a class or a tensor
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, ModuleType):
        yield from vars(value).items()
