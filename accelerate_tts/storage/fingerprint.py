"""What a warm pack is for: a digest of the model, its weights, the machine, torch and the options."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import CodeType
from typing import TYPE_CHECKING, Any

from accelerate_tts.storage.tensor_bytes import content_digest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["code_of", "fingerprint", "outline"]

# A `repr` that shows a function (`activation=<function gelu at 0x7f...>`) differs in each process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(roots: Iterable[nn.Module], circumstances: Mapping[str, Any]) -> str:
    """A SHA-256 hex digest that two models share only if tuning may decide the same for both.

    The digest decides which pack is tried, not whether it is right: that is what the comparison after it is for. So
    what is no part of the computation stays out: `training` flags, paths, names of hooks, addresses in a `repr`.

    Args:
        roots: The outermost modules: their classes, structure, hyper-parameters (as `repr` shows them, and the plain
            attributes of the modules and their `config`), and the bytes of every parameter and buffer go in. About half
            a second per gigabyte on one core. Of sparse tensors and tensor subclasses only names, types and shapes do.
        circumstances: Whatever else counts; anything that JSON can say.
    """
    digest = hashlib.sha256(json.dumps(dict(circumstances), sort_keys=True, default=str).encode())

    def add(text: str) -> None:
        digest.update(text.encode("utf-8", errors="surrogatepass"))

    for root in roots:
        add(_ADDRESS.sub("", repr(root)))
        add(json.dumps([(name, _name(type(module)), _options(module)) for name, module in root.named_modules()]))
        tensors = [*root.named_parameters(), *root.named_buffers()]
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashlib lets go of the interpreter's lock
            for (name, tensor), content in zip(tensors, pool.map(content_digest, [t for _, t in tensors]), strict=True):
                add(f"{name} {_about(tensor)} {tensor.layout} {tensor.device.type} {tensor.requires_grad}")
                digest.update(content)
    return digest.hexdigest()


def outline(value: Any) -> Any:
    """A warm-up without its numbers, for the circumstances: a model that is tuned for another input is tuned anew.

    Of tensors only dtype and shape count, since a warm-up may draw them at random; of a callable its name and code.
    """
    if isinstance(value, Mapping):
        return {str(name): outline(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [outline(item) for item in value]
    if hasattr(type(value), "__torch_function__"):
        return _about(value)
    if not callable(value):
        return value if isinstance(value, (str, int, float, type(None))) else _name(type(value))
    code = code_of(value)
    return [_name(value), code] if code else [_name(value)]


def code_of(function: Any) -> str:
    """What a function's own code says: its instructions, names and constants, and those of the functions inside it.

    "" for what has no code of Python's. What it calls is not looked into.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else _told(code)


def _told(code: CodeType) -> str:
    constants = [_told(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} [{', '.join(constants)}]"


def _constant(value: object) -> str:
    # A set's order differs in each process, as texts' hashes do.
    return f"{sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)


def _name(named: Any) -> str:
    kind = type(named)
    name = getattr(named, "__qualname__", kind.__qualname__)  # a functools.partial has none
    return f"{getattr(named, '__module__', kind.__module__)}.{name}"


def _options(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module and its `config` hold as attributes; a forward may read them."""
    config = vars(module).get("config")
    holders = (vars(module), config if isinstance(config, dict) else getattr(config, "__dict__", {}))
    return {
        f"{number} {name}": value
        for number, holder in enumerate(holders)
        for name, value in holder.items()
        if not str(name).startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    # Of texts only words: a path, an address or a version says where a model came from, not what it computes.
    return type(value) in {int, float, bool, type(None)} or (type(value) is str and value.isidentifier())


def _about(tensor: Any) -> str:
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):  # it raises when it is asked for its shape
        return f"{tensor.dtype} of no shape yet"
    return f"{tensor.dtype} {tuple(tensor.shape)}"
