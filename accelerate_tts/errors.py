"""The few exceptions that this library raises itself. Each message names the wrong value and the mend.

An exception of the user's own code (a load function, a synthesis call) is never wrapped in one of these.
"""

from __future__ import annotations

__all__ = [
    "AccelerateTTSError",
    "ConcurrencyError",
    "InferenceContextError",
    "MissingExtraError",
    "ModelError",
    "PackError",
    "ReloadError",
    "SettingsError",
    "TimeLimitError",
    "WarmupError",
    "abridged",
    "message_of",
    "printable",
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


class ReloadError(AccelerateTTSError, RuntimeError):
    """Weights that were let go (`guard_weights="reload"`) cannot be loaded again by the load function."""


class InferenceContextError(AccelerateTTSError, RuntimeError):
    """`fast_inference()` was entered where it would leak its mode into other tasks."""


class ConcurrencyError(AccelerateTTSError, RuntimeError):
    """A call with `concurrency=` would wait for ever, since its turn belongs to a call that waits for it."""


class TimeLimitError(AccelerateTTSError, RuntimeError):
    """A piece of work did not return within its time limit, and was interrupted.

    Attributes:
        stopped: What it waited for and what was stopped for it, as a clause; "" if nothing.
    """

    def __init__(self, message: str, stopped: str = "") -> None:
        super().__init__("; ".join(filter(None, (message, stopped))))
        self.stopped = stopped


class MissingExtraError(AccelerateTTSError, ImportError):
    """A command needs an extra of this package that is not installed."""


def shown(value: object) -> str:
    """`repr(value)`, for a message; where that raises, as for a number of thousands of digits, what type it is of."""
    try:
        return repr(value)
    except Exception:  # the value is wrong already; the message must say so whatever its class does
        return f"<a {type(value).__name__} that cannot be shown>"


def printable(value: object) -> str:
    """A foreign text for a terminal, a log or a page: on one line, and without control characters.

    Names and reasons come from users' objects and exceptions. An escape sequence among them must not reach a terminal,
    half of a surrogate pair cannot be written as UTF-8, and a bidirectional override would turn the words after it.
    """
    text = (c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return " ".join("".join(text).split())


_MOST_SHOWN = 200  # characters


def abridged(value: object) -> str:
    """`shown(value)`, but of a long one its beginning and its end; of a large container no whole text is made."""
    if isinstance(value, (str, bytes)):
        half = _MOST_SHOWN // 2
        return shown(value) if len(value) <= _MOST_SHOWN else f"{value[:half]!r}...{value[-half:]!r}"
    if _is_small(value):
        text = shown(value)
    else:
        import reprlib

        try:
            text = reprlib.repr(value)
        except Exception:  # see `shown`
            text = f"<a {type(value).__name__} that cannot be shown>"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN // 2]}...{text[-_MOST_SHOWN // 2 :]}"


def message_of(error: BaseException) -> str:
    """The message of somebody else's exception, for an event: its beginning, whatever its class does."""
    try:
        text = str(error)
    except Exception:  # see `shown`
        return "(no message)"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _is_small(value: object) -> bool:
    """Whether there is so little in a value, a container perhaps, that its whole text may be made."""
    left, waiting = _MOST_SHOWN, [value]
    while waiting and left > 0:
        item = waiting.pop()
        left -= len(item) if isinstance(item, (str, bytes)) else 1
        if isinstance(item, dict):
            waiting += [part for entry in list(item.items())[:_MOST_SHOWN] for part in entry]
            left -= len(item)
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += list(item)[:_MOST_SHOWN]
            left -= len(item)
    return left > 0
