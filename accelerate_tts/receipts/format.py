"""Formatting of durations, ratios and errors."""

from __future__ import annotations

import math


def json_number(text: str) -> float:
    """Parse a number of a JSON text; raise `OverflowError` for Infinity and 1e999, which Python's parser accepts."""
    if not math.isfinite(number := float(text)):
        raise OverflowError(f"{text} is no number of JSON")
    return number


def duration(seconds: float | None) -> str:
    """Format seconds as a short text with a unit."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:  # noqa: PLR2004 - units
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds:.2f} s"


def ratio_text(ratio: float | None) -> str:
    """Format a ratio of speeds."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def error_text(error: float | None, spectral: float | None = None, divergence: float | None = None) -> str:
    """Format a relative error, with the spectral distance of audio (dB) and a decoder's divergence (nats) if known."""
    if error is None:
        return "-"
    if error == 0.0:
        return "bit-exact"
    text = f"{error:.0e}" if math.isfinite(error) else "differs"
    if spectral is not None:
        text += f", {spectral:.2g} dB"
    return text if divergence is None else f"{text}, {divergence:.0e} nats"
