"""The few exceptions that this library raises itself. Each message names the wrong value and the mend.

An exception of the user's own code (a load function, a synthesis call) is never wrapped in one of these.
"""

from __future__ import annotations

__all__ = [
    "AccelerateTTSError",
    "InferenceContextError",
    "MissingExtraError",
    "ModelError",
    "PackError",
    "SettingsError",
    "WarmupError",
    "shown",
]


class AccelerateTTSError(Exception):
    """The base of every exception that comes from this library."""


class SettingsError(AccelerateTTSError, ValueError):
    """An option or an environment variable has a value that means nothing."""


class WarmupError(AccelerateTTSError, TypeError):
    """The `warmup=` argument cannot be turned into a call of what was loaded."""


class ModelError(AccelerateTTSError, TypeError):
    """Something that is not a `torch.nn.Module` was given where one is needed."""


class PackError(AccelerateTTSError, ValueError):
    """A warm pack cannot be named, written, exported or loaded as it was asked for."""


class InferenceContextError(AccelerateTTSError, RuntimeError):
    """`fast_inference()` was entered where it would leak its mode into other tasks."""


class MissingExtraError(AccelerateTTSError, ImportError):
    """A command needs an extra of this package that is not installed."""


def shown(value: object) -> str:
    """`repr(value)`, for a message; where that raises, as for a number of thousands of digits, what type it is of."""
    try:
        return repr(value)
    except Exception:  # the value is wrong already; the message must say so whatever its class does
        return f"<a {type(value).__name__} that cannot be shown>"
