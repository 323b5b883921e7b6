"""Conversion of any text to token ids of a Piper voice, in pieces of bounded length.

espeak-ng (GPL-3.0) provides the pronunciation through phonemizer-fork. Both belong to the demo extra only.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import AccelerateTTSError

if TYPE_CHECKING:
    from accelerate_tts.cli.demo.voice import Voice

# The encoder's attention grows with the square of the length; 300 characters are about half a minute of speech.
_LONGEST = 300
_PAD, _START, _END = "_", "^", "$"
_SENTENCE_END = re.compile(r"(?<=[.!?;:\u2026\u3002\uff01\uff1f])\s+|\n+")


class NothingToSayError(AccelerateTTSError, ValueError):
    """A text without anything pronounceable."""


def sentences(text: str) -> list[str]:
    """Split a text into pieces of at most 300 characters, at ends of sentences where possible, and make it `speakable`.

    Raises:
        NothingToSayError: Nothing is left.
    """
    pieces: list[str] = []
    for sentence in _SENTENCE_END.split(speakable(text)):
        pieces += _short(" ".join(sentence.split()))
    if not pieces:
        raise NothingToSayError(f"there is nothing to say in {text[:40]!r}; give a sentence of English")
    return pieces


def speakable(text: str) -> str:
    """Replace the characters of a text that cannot be spoken (controls, lone surrogates) by spaces."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else " " for c in text)


def _short(sentence: str) -> list[str]:
    pieces: list[str] = []
    while len(sentence) > _LONGEST:
        space = sentence.rfind(" ", 0, _LONGEST)
        cut = space if space > 0 else _LONGEST  # an endless word is cut in the middle
        pieces.append(sentence[:cut].strip())
        sentence = sentence[cut:].strip()
    return [piece for piece in (*pieces, sentence) if piece]


def to_ids(voice: Voice, sentence: str) -> list[int]:
    """Convert one piece to token ids: start, each phoneme followed by a pad, end.

    Returns:
        The ids, or an empty list for a piece without phonemes (punctuation only, for example).
    """
    spoken = _espeak(voice.language).phonemize([sentence], strip=True)
    # Piper's tokens are code points of the decomposed form; phonemes that the voice does not have are skipped.
    phonemes = [p for p in unicodedata.normalize("NFD", "".join(spoken)) if p in voice.phoneme_ids]
    if not any(unicodedata.category(p).startswith("L") for p in phonemes):
        return []
    ids = [*voice.phoneme_ids[_START], *voice.phoneme_ids[_PAD]]
    for phoneme in phonemes:
        ids += [*voice.phoneme_ids[phoneme], *voice.phoneme_ids[_PAD]]
    return ids + voice.phoneme_ids[_END]


@lru_cache(maxsize=4)
def _espeak(language: str) -> Any:
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    quiet = logging.getLogger("accelerate_tts.phonemizer")  # it would warn of each switch of language in a text
    quiet.setLevel(logging.ERROR)
    return EspeakBackend(
        language, preserve_punctuation=True, with_stress=True, language_switch="remove-flags", logger=quiet
    )
