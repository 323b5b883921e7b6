"""From any text to the token ids of a Piper voice, in pieces of bounded length.

espeak-ng (GPL-3.0) does the pronunciation, through phonemizer-fork; both belong to the demo extra alone.
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

__all__ = ["NothingToSayError", "sentences", "to_ids"]

# The encoder's attention grows with the square of a piece; some 300 characters are half a minute of speech.
_LONGEST = 300
_PAD, _START, _END = "_", "^", "$"
_SENTENCE_END = re.compile(r"(?<=[.!?;:\u2026\u3002\uff01\uff1f])\s+|\n+")


class NothingToSayError(AccelerateTTSError, ValueError):
    """A text that has nothing pronounceable in it."""


def sentences(text: str) -> list[str]:
    """Split a text into pieces of at most 300 characters, at the ends of sentences where there are any.

    Characters that no voice can speak (controls, lone surrogates) are left out.

    Raises:
        NothingToSayError: Nothing is left.
    """
    clean = "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else " " for c in text)
    pieces: list[str] = []
    for sentence in _SENTENCE_END.split(clean):
        pieces += _short(" ".join(sentence.split()))
    if not pieces:
        raise NothingToSayError(f"there is nothing to say in {text[:40]!r}; give a sentence of English")
    return pieces


def _short(sentence: str) -> list[str]:
    pieces: list[str] = []
    while len(sentence) > _LONGEST:
        space = sentence.rfind(" ", 0, _LONGEST)
        cut = space if space > 0 else _LONGEST  # one endless word is cut where it must be
        pieces.append(sentence[:cut].strip())
        sentence = sentence[cut:].strip()
    return [piece for piece in (*pieces, sentence) if piece]


def to_ids(voice: Voice, sentence: str) -> list[int]:
    """The token ids of one piece: start, each phoneme with a pad behind it, end.

    Returns:
        The ids, or an empty list for a piece in which nothing is pronounced (punctuation only, say).
    """
    spoken = _espeak(voice.language).phonemize([sentence], strip=True)
    # Piper's tokens are code points of the decomposed form; what the voice was not trained on is passed over.
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
    quiet = logging.getLogger("accelerate_tts.phonemizer")  # it warns of each switch of language in a text
    quiet.setLevel(logging.ERROR)
    return EspeakBackend(
        language, preserve_punctuation=True, with_stress=True, language_switch="remove-flags", logger=quiet
    )
