"""Durations, ratios and errors as text."""

from __future__ import annotations

import math

__all__ = ["duration", "error_text", "ratio_text"]


def duration(seconds: float | None) -> str:
    """Seconds as a short text with its unit."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:  # noqa: PLR2004 - units
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds:.2f} s"


def ratio_text(ratio: float | None) -> str:
    """A ratio of speeds as a short text."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def error_text(error: float | None, spectral: float | None = None, divergence: float | None = None) -> str:
    """A relative error as a short text, with what else is known of audio (dB) and of a decoder's steps (nats)."""
    if error is None:
        return "-"
    if error == 0.0:
        return "bit-exact"
    text = f"{error:.0e}" if math.isfinite(error) else "differs"
    if spectral is not None:
        text += f", {spectral:.2g} dB"
    return text if divergence is None else f"{text}, {divergence:.0e} nats"
