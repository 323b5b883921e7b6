"""Parameters of a module's forward, and hooks that wait for its calls."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["has_hooks", "is_analyzer", "is_capture", "parameters_of"]


def parameters_of(cls: Any) -> list[str]:
    """The names of what a class's forward takes, after `self`."""
    return [
        parameter.name
        for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]
        if parameter.kind is not parameter.VAR_KEYWORD
    ]


# Hooks that look at nothing of a block but its attention weights, and change nothing.
_READERS = ("transformers.", "accelerate_tts.")  # transformers' own collect what was asked for, and ours only watch
_ANALYZER = ".alignment_stream_analyzer"  # Chatterbox's multilingual model looks where in its text it is


def has_hooks(*modules: Any) -> bool:
    """Whether a user's hooks wait for calls of some modules, which then must be called.

    transformers' own and Chatterbox's only read attention weights (`readers`), and ours only watch.
    """
    return any(map(_is_foreign, [m for m in modules if m._forward_hooks or m._forward_pre_hooks]))


def is_analyzer(hook: Any) -> bool:
    """Whether a hook is of Chatterbox's alignment analyzer, which only looks at attention weights."""
    return module_of(hook).endswith(_ANALYZER)


def is_capture(forward: Any) -> bool:
    """Whether a `forward` that was put over a module's own is transformers' way of collecting outputs (4.54 to 4.57).

    It is put there for a call, and what was found there before, the module's own method, is put back afterwards.
    """
    module = getattr(forward, "__globals__", {}).get("__name__", "")  # it is named as what it wraps
    return str(module).startswith("transformers.utils.")


def _is_foreign(module: Any) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not module_of(hook).startswith(_READERS) and not is_analyzer(hook) for hook in hooks)


def module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", ""))
