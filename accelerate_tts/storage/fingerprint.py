"""Fingerprint of a warm pack: a digest of the model, its weights, the machine, torch and the options."""

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

# A `repr` that shows a function (`activation=<function gelu at 0x7f...>`) differs in each process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(roots: Iterable[nn.Module], circumstances: Mapping[str, Any]) -> str:
    """Compute a SHA-256 hex digest that two models share only if the same tuning may apply to both.

    The digest selects a pack; the comparison afterwards decides if the pack is right. State that does not affect the
    computation is left out: `training` flags, paths, names of hooks, addresses in a `repr`.

    Args:
        roots: The outermost modules. Included are their classes, structure, hyper-parameters (`repr`, and the plain
            attributes of the modules and their `config`), and the bytes of every parameter and buffer, at about half a
            second a gigabyte on one core. For sparse tensors and tensor subclasses, only names, types and shapes are.
        circumstances: Further values, serialisable as JSON.
    """
    digest = hashlib.sha256(json.dumps(dict(circumstances), sort_keys=True, default=str).encode())

    def add(text: str) -> None:
        digest.update(text.encode("utf-8", errors="surrogatepass"))

    for root in roots:
        add(_ADDRESS.sub("", repr(root)))
        add(json.dumps([(name, _name(type(module)), _options(module)) for name, module in root.named_modules()]))
        tensors = [*root.named_parameters(), *root.named_buffers()]
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashlib releases the GIL
            for (name, tensor), content in zip(tensors, pool.map(content_digest, [t for _, t in tensors]), strict=True):
                add(f"{name} {_about(tensor)} {tensor.layout} {tensor.device.type} {tensor.requires_grad}")
                digest.update(content)
    return digest.hexdigest()


def outline(value: Any) -> Any:
    """Outline a warm-up for the circumstances, so that another warm-up leads to another pack.

    Tensors are reduced to dtype and shape, since a warm-up may draw them at random, and callables to name and code.
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
    """Return a function's bytecode, names and constants as a text, nested functions included.

    "" for a callable without Python code. Functions that it calls are not included.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else _told(code)


def _told(code: CodeType) -> str:
    constants = [_told(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} [{', '.join(constants)}]"


def _constant(value: object) -> str:
    # The order of a set differs in each process, since hashes of texts do.
    return f"{sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)


def _name(named: Any) -> str:
    kind = type(named)
    name = getattr(named, "__qualname__", kind.__qualname__)  # a functools.partial has none
    return f"{getattr(named, '__module__', kind.__module__)}.{name}"


def _options(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module and its `config`, which a forward may read."""
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
    # Only texts that are identifiers: a path, a URL or a version does not affect the computation.
    return type(value) in {int, float, bool, type(None)} or (type(value) is str and value.isidentifier())


def _about(tensor: Any) -> str:
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):  # reading its shape raises
        return f"{tensor.dtype} of no shape yet"
    return f"{tensor.dtype} {tuple(tensor.shape)}"
