"""`LoadRequest`: the options of one decorated load, passed from the decorator to the tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate_tts.errors import SettingsError, abridged
from accelerate_tts.settings import Mode, Precision, Settings, check_mode, check_precision, check_tune_seconds
from accelerate_tts.tuning.length_ladder import LONGEST
from accelerate_tts.tuning.warmup import Loaded, WarmupCalls, check_warmup, warmup_calls


def never() -> bool:
    """Return False: this load is never stopped. A named function, so that a request can be pickled."""
    return False


@dataclass(frozen=True)
class LoadRequest:
    """Options of one `@optimized_model` and, once the load function has returned, its result.

    The options are checked here, and nowhere else.

    Attributes:
        warmup: Example of a real call, as for `@optimized_model`.
        mode: The mode of service calls that do not go through `@inference`.
        precision: Precision level: "exact", "balanced" or "fast"; `None` takes that of the settings.
        tune_seconds: Tuning budget in seconds; `None` takes that of the settings.
        lengths: Lengths of the shortest and the longest input in service.
        loaded: Result of the load function.
        stopped: Asked between stages; once it is true, everything is undone.

    Raises:
        WarmupError: `warmup` can never work, alone or with `lengths`.
        SettingsError: Another value is invalid.
    """

    warmup: Any = None
    mode: Mode = "inference"
    precision: Precision | None = None
    tune_seconds: float | None = None
    lengths: tuple[int, int] | None = None
    loaded: Loaded = field(default_factory=lambda: Loaded(None))
    stopped: Callable[[], bool] = never

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.precision is not None:
            check_precision(self.precision)
        if self.tune_seconds is not None:
            check_tune_seconds(self.tune_seconds)
        if self.lengths is not None and not _is_range(self.lengths):
            raise SettingsError(
                f"lengths={abridged(self.lengths)} must be two whole numbers, the shortest and the longest, from 1 to"
                f" {LONGEST}, such as (10, 300)"
            )
        check_warmup(self.warmup, self.lengths)

    def applied_to(self, settings: Settings) -> Settings:
        """Return the settings with these options applied."""
        given: dict[str, Any] = {"precision": self.precision, "tune_seconds": self.tune_seconds}
        return replace(settings, **{name: value for name, value in given.items() if value is not None})

    def calls(self, timeout: float | None) -> WarmupCalls:
        """Return the warm-up calls of the loaded object.

        Args:
            timeout: Seconds that each of them may take; `None` is no limit.

        Raises:
            WarmupError: `warmup` does not fit what was loaded.
        """
        return warmup_calls(self.warmup, self.loaded, self.mode, self.lengths, timeout)


def _is_range(lengths: object) -> bool:
    return (
        isinstance(lengths, tuple)
        and len(lengths) == 2  # noqa: PLR2004 - the shortest and the longest
        and all(isinstance(length, int) and not isinstance(length, bool) for length in lengths)
        and 1 <= lengths[0] <= lengths[1] <= LONGEST
    )
