"""Sentences one behind the other, with a pause between two of them, and without a pop at either end of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

PAUSE = 0.15
"""Seconds of silence between two sentences."""
FADE = 0.005
"""Seconds in which a sentence comes and goes. A wave that is cut off where it is not zero pops."""


def joined(sentences: Iterable[Iterable[np.ndarray]], rate: int) -> Iterator[np.ndarray]:
    """Yield the speech of sentences. It does not depend on the pieces in which each of them comes.

    Args:
        sentences: The pieces of each sentence, `(samples,)`, fp32. A sentence without samples has no pause.
        rate: Sampling rate in Hz.
    """
    pause, fade = np.zeros(int(PAUSE * rate), np.float32), int(FADE * rate)
    ramp = np.sin(np.linspace(0.0, np.pi / 2, fade, dtype=np.float32)) ** 2
    before = np.zeros(0, np.float32)
    for sentence in sentences:
        held, at = before, 0  # what is not sent yet, and the samples of the sentence so far
        for piece in sentence:
            if not len(piece):
                continue
            rising = ramp[at : at + len(piece)]
            held = np.concatenate([held, piece[: len(rising)] * rising, piece[len(rising) :]])
            at += len(piece)
            # The end fades, and any piece may be the last.
            if len(held) > fade:
                yield held[:-fade]
                held = held[-fade:]
        if at:
            last = min(at, len(held))
            yield np.concatenate([held[: len(held) - last], held[len(held) - last :] * ramp[::-1][-last:]])
            before = pause
