"""What one `@optimized_model` asks for by itself, beside the settings of the process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from accelerate_tts.errors import SettingsError, abridged
from accelerate_tts.settings import Precision, Settings, check_precision, check_tune_seconds
from accelerate_tts.tuning.length_ladder import LONGEST

__all__ = ["TuneOptions"]


@dataclass(frozen=True)
class TuneOptions:
    """Options of one loaded object; `None` leaves the settings' own.

    Attributes:
        precision: What tuning may change: "exact", "balanced" or "fast".
        tune_seconds: Its budget in seconds.
        lengths: The shortest and the longest input that service will bring.

    Raises:
        SettingsError: A value means nothing.
    """

    precision: Precision | None = None
    tune_seconds: float | None = None
    lengths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_precision(self.precision)
        if self.tune_seconds is not None:
            check_tune_seconds(self.tune_seconds)
        if self.lengths is not None and not _is_range(self.lengths):
            raise SettingsError(
                f"lengths={abridged(self.lengths)} must be two whole numbers, the shortest and the longest, from 1 to"
                f" {LONGEST}, such as (10, 300)"
            )

    def applied_to(self, settings: Settings) -> Settings:
        """The settings with what is given here in their place."""
        given: dict[str, Any] = {"precision": self.precision, "tune_seconds": self.tune_seconds}
        return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _is_range(lengths: object) -> bool:
    return (
        isinstance(lengths, tuple)
        and len(lengths) == 2  # noqa: PLR2004 - the shortest and the longest
        and all(isinstance(length, int) and not isinstance(length, bool) for length in lengths)
        and 1 <= lengths[0] <= lengths[1] <= LONGEST
    )
