"""The encoders' word on their first sound, which the service waits for before it begins an answer."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

import serving  # noqa: F401 - it skips where the extra is not installed
from service.sound import FORMATS, encoder
from standin import RATE, tone


def heard(form: str, content: bytes) -> int:
    """Return the number of samples that a player gets out of the beginning of an answer."""
    if form == "pcm":
        return len(content) // 2
    try:
        return len(soundfile.read(io.BytesIO(content))[0])
    except soundfile.LibsndfileError:
        return 0


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_what_was_heard_has_sound(form: str) -> None:
    made, content = encoder(form, RATE), b""
    assert not made.heard
    content += made.add(np.zeros(0, np.float32))
    for word in range(12):
        if made.heard:
            break
        assert heard(form, content) == 0
        content += made.add(tone(str(word)))
    assert made.heard
    assert heard(form, content) > 0


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_short_answer_is_heard_at_its_end(form: str) -> None:
    made = encoder(form, RATE)
    content = made.add(tone("one")) + made.end()
    assert made.heard
    assert heard(form, content) > 0
