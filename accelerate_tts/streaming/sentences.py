"""Texts in sentences: abbreviations, numbers and addresses are not cut in two.

When in doubt the text is not cut: two sentences in one sound better than one in two. Another splitter can be given to
`stream(split=...)`, such as pysbd's or sentencex's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_LONGEST = 300
"""Characters of the longest piece. What has no stop is cut at a comma, at a space, or anywhere."""
_NEAR = 64
"""Characters before and behind a stop that decide about it. More would take quadratic time in a long text."""

_STOPS = "!?.…‽؟۔।॥։።፧។៕။"  # noqa: RUF001 - stops of other scripts
_WIDE = "。！？｡"  # noqa: RUF001 - behind these there is no space
_CLOSING = "\"'”’»›)]}」』】》〉）］〕"  # noqa: RUF001
_BREAKS = (";:—，、；：؛،,", " \t\u3000")  # noqa: RUF001 - where a text without stops is cut, best first

# A stop, or several, with what closes behind it; then a space, or after a wide stop anything; or an empty line. Only
# the first of several stops is tried, since each of thousands would be followed to their end.
_END = re.compile(
    rf"(?<![{re.escape(_STOPS)}])[{re.escape(_STOPS)}]+[{re.escape(_CLOSING)}]*(?=\s)"
    rf"|[{_WIDE}]+[{re.escape(_CLOSING)}]*|\n\s*\n"
)
# Titles, places, months, Latin and commerce, in some languages of this script. Without their last full stop.
_ALWAYS = (
    "adj adm apr approx apt asst aug av ave bd bldg blvd brig bros bsp bzgl bzw ca capt cf cmdr comdr corp cpl dec dept"
    " dipl dir dr dra dt ed eds eng esp esq est etc ev evtl excl feb figs fr ft gen ggf gov hon hr hrn hrsg inc incl"
    " inkl jan jr jul jun kap lic lt ltd messrs mgr mio mlle mmes mme mr mrd mrs ms mt nov núm obj oct okt oz pág págs"
    " pl prof pvt rd rep resp rev sgt sog sr sra sres srta st sta ste supt tbsp tel temp tsp univ usf usw vgl vols"
    " vs zzgl"
)
# Words as well, so only before a number: "No. 5", but "He said no. Then".
_BEFORE_NUMBERS = "art cap ch co col eq fig maj max mi min no nos nr nro op pp pt ref sec secs sen sep sept str vol"
_ABBREVIATIONS, _NUMBERED = frozenset(_ALWAYS.split()), frozenset(_BEFORE_NUMBERS.split())
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]?\Z")  # "U.S", "p.m", "J", "z.B"
_ORDINAL = re.compile(r"(?:\d{1,2}|[IVXLC]+)\Z")  # "3. Mai", "Louis XIV. war"
_LAST_WORD = re.compile(r"[\w.&'’-]*\Z")  # noqa: RUF001


def sentences(text: str) -> list[str]:
    """Split a text into sentences, without the spaces around them.

    A sentence of more than 300 characters is cut at a comma, or else at a space, or else anywhere. A piece without a
    letter or a digit goes to the one before it, or is left out if that would be too long. A text without any has no
    sentences.
    """
    found: list[str] = []
    for piece in (short for whole in _cut(text) for short in _short(whole)):
        if any(character.isalnum() for character in piece):
            found.append(piece)
        elif found and len(found[-1]) + len(piece) < _LONGEST:
            found[-1] += piece if len(piece) == 1 else f" {piece}"
    return found


def _cut(text: str) -> Iterator[str]:
    begin = 0
    for end in _END.finditer(text):
        before = text[max(begin, end.start() - _NEAR) : end.start()]
        if _is_end(before, end[0], text[end.end() : end.end() + _NEAR]):
            yield " ".join(text[begin : end.end()].split())
            begin = end.end()
    yield " ".join(text[begin:].split())


def _is_end(before: str, stop: str, after: str) -> bool:
    """Check that a sentence ends with a stop.

    Args:
        before: The end of the sentence before the stop.
        stop: The stop with what closes behind it.
        after: The beginning of the text behind it.
    """
    if stop.isspace() or stop[0] in _WIDE:
        return True
    following = next((character for character in after if character.isalnum()), "")
    if following.islower():
        return False
    if stop != ".":  # several, or with a quotation mark behind
        return True
    found = _LAST_WORD.search(before)
    last = "" if found is None else found[0].lstrip(".-'")
    word = last.rpartition("-")[2].lower()
    if word in _ABBREVIATIONS or (following.isdigit() and word in _NUMBERED):
        return False
    single = len(last) == 1 and last.isalpha()
    return not (single or ("." in last and _ACRONYM.search(last)) or _ORDINAL.match(last))


def _short(piece: str) -> Iterator[str]:
    """Cut a piece that is too long for a model."""
    while len(piece) > _LONGEST:
        cut = _LONGEST
        for breaks in _BREAKS:
            # Not inside a number such as 1,000 or a time such as 12:30.
            at = [
                i + 1
                for i in range(_LONGEST // 3, _LONGEST)
                if piece[i] in breaks and not (piece[i - 1].isdigit() and piece[i + 1].isdigit())
            ]
            if at:
                cut = at[-1]
                break
        head, piece = piece[:cut].rstrip(), piece[cut:].lstrip()
        yield head
    if piece:
        yield piece
