"""Exceptions of this library. Each message names the wrong value and the solution.

Exceptions of the user's own code (a load function, a synthesis call) are never wrapped in these.
"""

from __future__ import annotations


class AccelerateTTSError(Exception):
    """Base class of this library's exceptions."""


class SettingsError(AccelerateTTSError, ValueError):
    """An option or an environment variable has an invalid value."""


class WarmupError(AccelerateTTSError, TypeError):
    """The `warmup=` argument cannot be turned into a call of what was loaded."""


class ModelError(AccelerateTTSError, TypeError):
    """An argument is not a `torch.nn.Module`, or not a system that `stream` knows."""


class PackError(AccelerateTTSError, ValueError):
    """A warm pack cannot be named, written, exported or loaded as requested."""


class ReloadError(AccelerateTTSError, RuntimeError):
    """The load function cannot reload weights that were freed (`guard_weights="reload"`)."""


class InferenceContextError(AccelerateTTSError, RuntimeError):
    """`fast_inference()` was entered where its mode would leak into other tasks."""


class ConcurrencyError(AccelerateTTSError, RuntimeError):
    """A call would wait forever: for a call that waits for it (`concurrency=`), or for a thread from before a fork."""


class TimeLimitError(AccelerateTTSError, RuntimeError):
    """Work did not return within its time limit, and was interrupted.

    Attributes:
        stopped: Description of a wait that was ended, as a clause; "" if there was none.
    """

    def __init__(self, message: str, stopped: str = "") -> None:
        super().__init__("; ".join(filter(None, (message, stopped))))
        self.stopped = stopped


class MissingExtraError(AccelerateTTSError, ImportError):
    """A command needs an optional dependency that is not installed."""


def shown(value: object) -> str:
    """Return `repr(value)` for a message, or the type if that raises, as for a number with thousands of digits."""
    try:
        return repr(value)
    except Exception:  # the value is already wrong, and the message must not fail
        return f"<a {type(value).__name__} that cannot be shown>"


def printable(value: object) -> str:
    """Make a foreign text safe for a terminal, a log or a page: one line without control characters.

    Names and reasons come from users' objects and exceptions. Escape sequences must not reach a terminal, a lone
    surrogate cannot be encoded as UTF-8, and a bidirectional override would reverse the following words.
    """
    text = (c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return " ".join("".join(text).split())


_MOST_SHOWN = 200  # characters


def abridged(value: object) -> str:
    """Return `shown(value)`, shortened in the middle. The full text of a large container is never made."""
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


def message_of(error: BaseException, most: int = _MOST_SHOWN) -> str:
    """Return the first `most` characters of a foreign exception's message, for an event. Never raises."""
    try:
        text = str(error)
    except Exception:  # see `shown`
        return "(no message)"
    return text if len(text) <= most else f"{text[:most]}..."


def described(error: BaseException, most: int = 1000) -> str:
    """Return the class of a foreign exception and the beginning of its message, for an event. Never raises."""
    return f"{type(error).__name__}: {message_of(error, most)}"


def _is_small(value: object) -> bool:
    """Check that a value, perhaps a container, is small enough for its full text."""
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
