"""Parameters of a module's forward, and hooks on its calls."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch.nn.modules import module as globally


def parameters_of(cls: Any) -> list[str]:
    """Return the parameter names of a class's forward, without `self` and `**kwargs`."""
    return [
        parameter.name
        for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]
        if parameter.kind is not parameter.VAR_KEYWORD
    ]


def sets_attributes(cls: Any) -> bool:
    """Check that a class's forward, or a method that it names, sets attributes: state that outlives a call."""
    pending, followed = ["forward"], set[str]()
    while pending:
        name = pending.pop()
        found: Any = getattr(cls, name, None)
        method = inspect.unwrap(found)
        if name in followed or not isinstance(method, FunctionType) or method.__module__.startswith("torch."):
            continue
        followed.add(name)
        if any(step.opname in {"STORE_ATTR", "DELETE_ATTR"} for step in dis.get_instructions(method)):
            return True
        pending += method.__code__.co_names
    return False


# Hooks that read only a block's attention weights, and change nothing.
_READERS = ("transformers.", "accelerate_tts.")  # transformers' own collect requested outputs, and ours only observe
_ANALYZER = ".alignment_stream_analyzer"  # Chatterbox's multilingual model tracks its position in the text


def hooks_of(*modules: Any) -> list[Any]:
    """Return torch's dictionaries of the hooks before and after the calls of modules.

    Their names are private in torch (2.0 to 2.14), which has no public way to read hooks.
    """
    return [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def global_hooks() -> tuple[Any, Any]:
    """Return torch's dictionaries of the hooks on the calls of all modules; see `hooks_of`."""
    return globally._global_forward_hooks, globally._global_forward_pre_hooks


def has_hooks(*modules: Any) -> bool:
    """Check for user's hooks on modules, which must then really be called.

    Hooks of transformers and Chatterbox only read attention weights, and this package's only observe; they do not
    count.
    """
    return bool(foreign_hooks(hooks_of(*modules)))


def calls_others(*modules: Any) -> bool:
    """Check that calls of modules run a user's code beside their classes' forward: hooks, or a forward of their own."""
    if any(global_hooks()) or has_hooks(*modules):
        return True
    return bool([1 for module in modules if "forward" in module.__dict__])


def foreign_hooks(places: Iterable[Any]) -> list[Any]:
    """Return the user's hooks in some of torch's dictionaries of hooks; see `has_hooks`."""
    filled = [hooks for hooks in places if hooks]  # mostly none: this runs at each token
    return [hook for hooks in filled for hook in hooks.values() if _is_foreign(hook)]


def is_analyzer(hook: Any) -> bool:
    """Check for a hook of Chatterbox's alignment analyzer, which only reads attention weights."""
    return module_of(hook).endswith(_ANALYZER)


def is_capture(forward: Any) -> bool:
    """Check for a `forward` by which transformers (4.54 to 4.57) collects outputs.

    transformers sets it in the module's `__dict__` for a call, and sets the module's own method there afterwards.
    """
    module = getattr(forward, "__globals__", {}).get("__name__", "")  # its own __module__ is that of the wrapped method
    return str(module).startswith("transformers.utils.")


def _is_foreign(hook: Any) -> bool:
    return not module_of(hook).startswith(_READERS) and not is_analyzer(hook)


def module_of(hook: Any) -> str:
    """Return the name of a function's module, or ""."""
    return str(getattr(hook, "__module__", ""))
