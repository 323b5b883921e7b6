"""Judges of sound: the words that a recogniser understands, how alike two voices are, and an estimate of quality.

The models are in their packages' wheels, so nothing is fetched. The recogniser is a small one for English: it
misunderstands some words of good speech. So the tuned sound is held to the untouched one, not to the text.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.errors import MissingExtraError

if TYPE_CHECKING:
    from accelerate_tts.cli.tune.sound import Sound

_RATE = 16_000  # Hz, of all models
_PEAK = 0.9  # of full scale; the models expect speech at a usual loudness


@dataclass(frozen=True)
class Judgement:
    """Untouched and tuned sound of one text, as judged.

    Attributes:
        untouched: Word error of the untouched sound: wrong, missing and added words, as a share of the text's words.
        tuned: The same of the tuned sound.
        similarity: Cosine of the two sounds' speaker embeddings; 1.0 is the same voice.
        words: Number of the text's words.
        quality: Estimates of the mean opinion score, 1 to 5, untouched and tuned (DNSMOS); `None` if its package is not
            installed.
    """

    untouched: float
    tuned: float
    similarity: float
    words: int
    quality: tuple[float, float] | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """Return rows of a table: name, untouched, tuned."""
        rows = [
            ("word error", f"{self.untouched:.0%}", f"{self.tuned:.0%}"),
            ("speaker similarity", "1.000", f"{self.similarity:.3f}"),
        ]
        if self.quality is not None:
            before, after = self.quality
            rows.append(("estimated MOS", f"{before:.2f}", f"{after:.2f}"))
        return rows

    @property
    def note(self) -> str:
        """The same as a sentence for the receipt."""
        names = ("pocketsphinx", "resemblyzer", *(() if self.quality is None else ("speechmos",)))
        judges = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        estimate = (
            "no estimated MOS, which speechmos gives"
            if self.quality is None
            else "estimated MOS {:.2f} untouched, {:.2f} tuned".format(*self.quality)
        )
        return (
            f"judged by {judges} on a text of {self.words} words: word error {self.untouched:.0%} untouched,"
            f" {self.tuned:.0%} tuned; speaker similarity {self.similarity:.3f}; {estimate}"
        )

    def objection(self, word_error: float | None = None, similarity: float | None = None) -> str:
        """Return the reason why the tuned sound is not accepted, or "".

        Args:
            word_error: The most that its word error may exceed that of the untouched sound; `None` for any.
            similarity: The least that its speaker similarity may be; `None` for any.
        """
        faults = []
        more = self.tuned - self.untouched
        if word_error is not None and more > word_error:
            faults.append(f"has {more:.0%} more word errors than the untouched one, and may have {word_error:.0%}")
        if similarity is not None and not self.similarity >= similarity:  # NaN is no voice
            faults.append(f"has a speaker similarity of {self.similarity:.3f}, and must have {similarity:.3f}")
        if not faults:
            return ""
        return f'the tuned sound {", and ".join(faults)}; use a stricter precision, such as "exact"'


def judge(text: str, untouched: Sound, tuned: Sound) -> Judgement:
    """Judge two sounds of one text.

    Raises:
        MissingExtraError: The recogniser or the speaker encoder is not installed.
    """
    check_installed()
    said = words_of(text)
    before, after = (word_error(said, words_of(_heard(sound))) for sound in (untouched, tuned))
    return Judgement(before, after, _similarity(untouched, tuned), len(said), _quality(untouched, tuned))


def check_installed() -> None:
    """Import the packages of the recogniser and of the speaker encoder.

    Raises:
        MissingExtraError: One of them cannot be imported.
    """
    try:
        for name in ("pocketsphinx", "resemblyzer"):
            importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"--listen needs {error.name}: pip install 'accelerate_tts[listen]'") from error


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def word_error(said: Sequence[str], heard: Sequence[str]) -> float:
    """Return the fewest substitutions, deletions and insertions of words, divided by the words that were said."""
    row = list(range(len(heard) + 1))
    for number, word in enumerate(said, 1):
        corner, row[0] = row[0], number
        for column, other in enumerate(heard, 1):
            least = min(row[column] + 1, row[column - 1] + 1, corner + (word != other))
            corner, row[column] = row[column], least
    return row[-1] / max(1, len(said))


def _heard(sound: Sound) -> str:
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=_RATE, loglevel="FATAL")
    decoder.start_utt()
    decoder.process_raw((_usual(sound) * 32767.0).to(torch.int16).numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return "" if found is None else str(found.hypstr)


def _similarity(first: Sound, second: Sound) -> float:
    from resemblyzer import VoiceEncoder

    encoder = VoiceEncoder("cpu", verbose=False)
    one, other = (torch.from_numpy(encoder.embed_utterance(_usual(sound).numpy())) for sound in (first, second))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def _quality(*sounds: Sound) -> tuple[float, float] | None:
    try:
        from speechmos import dnsmos
    except ImportError:  # a judge more, which nothing is decided by
        return None
    run: Any = dnsmos.run  # without annotations; of an array it returns a dictionary of numbers
    first, second = (float(run(_usual(sound).numpy(), sr=_RATE)["ovrl_mos"]) for sound in sounds)
    return first, second


def _usual(sound: Sound) -> torch.Tensor:
    """Return the samples at the models' rate and a usual loudness."""
    samples = sound.samples.nan_to_num()
    count = max(1, round(len(samples) * _RATE / sound.rate))
    if sound.rate != _RATE:
        # Through the spectrum: what is above the lower of both rates' halves goes.
        spectrum = torch.fft.rfft(samples)[: count // 2 + 1]
        samples = torch.fft.irfft(spectrum, n=count) * (count / len(samples))
    return (samples * (_PEAK / samples.abs().max().clamp_min(1e-9))).clamp(-1.0, 1.0)
