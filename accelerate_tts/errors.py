"""The few exceptions that this library raises itself. Each message names the wrong value and the mend.

An exception of the user's own code (a load function, a synthesis call) is never wrapped in one of these.
"""

from __future__ import annotations

__all__ = [
    "AccelerateTTSError",
    "InferenceContextError",
    "MissingExtraError",
    "ModelError",
    "SettingsError",
    "WarmupError",
]


class AccelerateTTSError(Exception):
    """The base of every exception that comes from this library."""


class SettingsError(AccelerateTTSError, ValueError):
    """An option or an environment variable has a value that means nothing."""


class WarmupError(AccelerateTTSError, TypeError):
    """The `warmup=` argument cannot be turned into a call of what was loaded."""


class ModelError(AccelerateTTSError, TypeError):
    """Something that is not a `torch.nn.Module` was given where one is needed."""


class InferenceContextError(AccelerateTTSError, RuntimeError):
    """`fast_inference()` was entered where it would leak its mode into other tasks."""


class MissingExtraError(AccelerateTTSError, ImportError):
    """A command needs an extra of this package that is not installed."""
