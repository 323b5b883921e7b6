"""Checks of an output: NaN, Inf, silence where there was sound, flat clipping, runaway length.

The checks call, change and keep nothing. A tensor is read once for its minimum and maximum (a NaN or Inf anywhere shows
in one of them), and flatness is computed on at most some four thousand samples. On a GPU this waits for the tensor.

Only non-finite numbers are faults by themselves. All else is compared with the untouched model's outputs in the warm-up
(`Expectation`). If those are unknown, the limits are those of audio whose full scale is 1.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NamedTuple

from accelerate_tts.inspection.object_tree import items_of

# Limits that keep a check cheap: a decoder's cache has a hundred tensors.
_DEEPEST, _DEEPEST_OBJECT, _MOST_TENSORS, _MOST_ITEMS = 6, 2, 64, 4096
# Audio has one channel or two, in a small batch; hidden states and spectrograms have more rows.
_MOST_ROWS, _MOST_CHANNELS = 16, 2
# A tensor that is this many times shorter than the waveform is no speech: lengths, durations, a speaker embedding.
_ASIDE = 16
_SAMPLED = 4096

_INAUDIBLE = 1e-3
"""An output 60 dB below the warm-up's peak is silent."""
_FLAT_LEVEL, _FLAT_SHARE = 0.99, 0.25
"""A wave is flat if a quarter of its samples lie within 1 % of its peaks. A sine has 9 % of them there, speech less."""
_FLAT_TIMES, _FLAT_PEAK = 4.0, 0.1
"""The share must also be four times the warm-up's, and the peak at least a tenth of the warm-up's: pauses are flat."""
_TOO_LONG, _LEAST_UNITS = 10.0, 20
"""More than ten times the warm-up's samples per character is too long. A text counts as at least twenty characters: a
number, or one word with the silence around it, takes longer than its letters suggest."""
_LEAST_SAMPLES = 4096
"""Minimum samples for silence to be a fault if the text is unknown: a shorter output may have nothing to say."""
_LEAST_LETTERS = 3
_TEXTS = ("text", "texts", "sentence", "sentences", "input", "inputs", "prompt", "input_ids")
_SPEAK_OF_TEXT = frozenset(
    {"text", "texts", "sentence", "sentences", "transcript", "script", "utterance", "say", "words"}
)
# "prompt_text" is the text of a reference, "style_text" describes a style, "text_language" names a language.
_OTHERS = frozenset({
    "prompt", "ref", "reference", "speaker", "voice", "voices", "style", "description", "instruct", "instruction",
    "negative", "lang", "language", "locale", "accent", "dialect", "emotion", "path", "file", "filename", "wav",
    "audio", "url", "uri", "format", "model", "device", "name", "id", "key", "mode", "split",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AudioStats:
    """Audio statistics of an output.

    Attributes:
        finite: True if no floating-point number is NaN or infinite.
        audio: True if any tensor may be audio.
        samples: Samples of audio, along the last dimension.
        swing: Half the distance between the minimum and the maximum sample. Samples of 16 bits are scaled to [-1, 1].
        peak: Largest magnitude of a sample, likewise.
        flat: Share of samples within 1 % of the peaks; 0.0 if there are too few samples.
    """

    finite: bool = True
    audio: bool = False
    samples: int = 0
    swing: float = 0.0
    peak: float = 0.0
    flat: float = 0.0

    def joined(self, other: AudioStats) -> AudioStats:
        """Return the statistics of two outputs in sequence."""
        return AudioStats(
            self.finite and other.finite,
            self.audio or other.audio,
            self.samples + other.samples,
            max(self.swing, other.swing),
            max(self.peak, other.peak),
            max(self.flat, other.flat),
        )


class Units(NamedTuple):
    """Amount of text that a call speaks.

    Attributes:
        amount: Number of characters, or of token ids; `None` if there are neither.
        letters: Number of letters and digits; `None` if unknown.
    """

    amount: int | None = None
    letters: int | None = None


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Expected outputs of one function, from the untouched model's warm-up.

    Attributes:
        finite: True if no number was NaN or infinite.
        sounds: True if no output was silent.
        peak: Largest magnitude of a sample.
        flat: Largest share of samples at the peaks.
        longest: Samples of the longest output; `None` if lengths cannot be judged.
        rate: Largest number of samples per unit of text; `None` likewise.
    """

    finite: bool = True
    sounds: bool = True
    peak: float = 1.0
    flat: float = 0.0
    longest: int | None = None
    rate: float | None = None

    @classmethod
    def of(cls, calls: list[tuple[Units, AudioStats]]) -> Expectation:
        """Compute the expectation from calls of the untouched model."""
        outputs = [stats for _, stats in calls]
        audible = [stats for stats in outputs if stats.audio and stats.swing > 0.0]
        rates = [stats.samples / max(units.amount, 1) for units, stats in calls if units.amount is not None]
        known = bool(rates) and bool(audible) and len(rates) == len(calls)
        return cls(
            finite=all(stats.finite for stats in outputs),
            sounds=len(audible) == len(outputs),
            peak=max((stats.peak for stats in audible), default=1.0),
            flat=max((stats.flat for stats in outputs), default=0.0),
            longest=max(stats.samples for stats in outputs) if known else None,
            rate=max(rates) if known else None,
        )


UNKNOWN = Expectation()
"""Expectation of a function that the warm-up did not call: full scale is 1, and lengths are not judged."""


def fault_of(stats: AudioStats, units: Units, expected: Expectation = UNKNOWN, *, whole: bool = True) -> str | None:
    """Name the fault of an output in a few words.

    Args:
        stats: Statistics of the output.
        units: Amount of text.
        expected: Expected outputs.
        whole: True if this is the whole output. A silent piece of a stream is a pause.

    Returns:
        "NaN or Inf", "clipped flat", "too long" or "silent"; `None` if nothing is wrong.
    """
    if not stats.finite:
        return "NaN or Inf" if expected.finite else None
    if not stats.audio:
        return None
    loud = stats.peak >= _FLAT_PEAK * expected.peak
    if loud and stats.flat > max(_FLAT_SHARE, _FLAT_TIMES * expected.flat):
        return "clipped flat"
    if _is_too_long(stats, units, expected):
        return "too long"
    if whole and expected.sounds and stats.swing <= _INAUDIBLE * expected.peak and _has_much_to_say(stats, units):
        return "silent"
    return None


def _is_too_long(stats: AudioStats, units: Units, expected: Expectation) -> bool:
    if expected.rate is None or expected.longest is None or units.amount is None:
        return False
    limit = _TOO_LONG * expected.rate * max(units.amount, _LEAST_UNITS)
    return stats.samples > max(limit, 2 * expected.longest)


def _has_much_to_say(stats: AudioStats, units: Units) -> bool:
    return stats.samples >= _LEAST_SAMPLES if units.letters is None else units.letters >= _LEAST_LETTERS


def units_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Callable[..., Any] | None = None) -> Units:
    """Find the amount of text that a call with these arguments speaks.

    Arguments are ranked by the names of their parameters. First comes a string named `text` or similar. Second comes
    one whose name contains a word for text, but none for a reference, a style or a language. Last comes the longest
    string that is neither a path nor named after something else. A request object or a mapping is searched, too.
    Without a string, integers in a tensor or array count as token ids.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        function: The called function; without it, positional arguments have no names.
    """
    try:
        names = () if function is None or not args else _parameters_of(function)
        given = [*zip_longest(names[: len(args)], args, fillvalue=""), *kwargs.items()]
        return _units_of(given)
    except Exception:  # an unbound proxy, for example, raises at any attribute
        return Units()


def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's positional parameters, without `self` of a bound method."""
    plain = getattr(function, "__func__", function)
    bound = plain is not function
    try:
        names = _parameters.get(plain)
    except TypeError:  # not hashable, or takes no weak reference
        return _asked_of(function)
    if names is None:
        names = _asked_of(plain)
        with suppress(TypeError):
            _parameters[plain] = names
    return names[1:] if bound else names


def _asked_of(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in without a signature
        return ()
    return tuple(p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD})


# `inspect.signature` takes 20 us. Keyed weakly by function.
_parameters: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _rank(name: str, value: Any) -> tuple[int, int] | None:
    """Rank an argument as the text, lowest first; `None` if it cannot be the text."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    if not texts or not all(isinstance(text, str) for text in texts[:_MOST_TENSORS]):
        return None
    if name in _TEXTS:
        return 0, _TEXTS.index(name)
    words = set(name.lower().split("_"))
    if words & _OTHERS:
        return None
    if words & _SPEAK_OF_TEXT:
        return 1, 0
    if all(map(_is_no_speech, texts[:_MOST_TENSORS])):
        return None
    return 2, -sum(map(len, texts))


def _is_no_speech(text: str) -> bool:
    """Check that a string looks like a path or a URL rather than speech."""
    return "://" in text or (" " not in text and bool(re.search(r"[/\\]|\.\w{1,5}$", text)) and len(text) > 1)


def _units_of(given: list[tuple[str, Any]]) -> Units:
    ranked = [(rank, number) for number, (name, value) in enumerate(given) if (rank := _rank(name, value)) is not None]
    if ranked:
        value = given[min(ranked)[1]][1]
        whole = "".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        return Units(len(whole), sum(map(str.isalnum, whole)))
    ids = [value for name, value in given if name in _TEXTS] + [value for _, value in given]
    for value in ids:
        kind = str(getattr(value, "dtype", ""))
        shape = getattr(value, "shape", ())
        if kind.endswith(("int64", "int32")) and isinstance(shape, tuple) and len(shape) > 0:
            return Units(math.prod(int(size) for size in shape))
    for _, value in given:  # a request: a mapping, a dataclass, a pydantic model
        inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
        if isinstance(inner, Mapping) and any(isinstance(inner.get(name), str) for name in _TEXTS):
            return _units_of([(name, inner[name]) for name in _TEXTS if name in inner])
    return Units()


def audio_stats(output: Any) -> AudioStats:
    """Compute the statistics of an output. Never raises: objects that cannot be read are skipped."""
    found: list[AudioStats] = []
    try:
        for leaf in _leaves(output, 0):
            stats = _of_leaf(leaf)
            if stats is not None:
                found.append(stats)
            if len(found) >= _MOST_TENSORS:
                break
    except Exception:  # a user's object may raise at any attribute; the guard must not fail a call
        return AudioStats(finite=all(stats.finite for stats in found))
    finite = all(stats.finite for stats in found)
    longest = max((stats.samples for stats in found if stats.audio), default=0)
    total = AudioStats(finite)
    for stats in found:
        if stats.audio and stats.samples >= longest / _ASIDE:
            total = total.joined(stats)
    return dataclasses.replace(total, finite=finite)


def size_of(chunk: Any) -> int | None:
    """Return the number of samples of a streamed piece that can be cut; `None` for any other object."""
    if isinstance(chunk, (bytes, bytearray)):
        return len(chunk)
    if not (_is_tensor(chunk) or _is_array(chunk)):
        return None
    shape = tuple(chunk.shape)
    return int(shape[-1]) if shape and all(size == 1 for size in shape[:-1]) else None


def cut(chunk: Any, samples: int) -> Any:
    """Return a piece without its first samples. `size_of` must know its size."""
    return chunk[samples:] if isinstance(chunk, (bytes, bytearray)) else chunk[..., samples:]


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _numbers(value: Any) -> Any:
    """Return a list of floats as it is, a list of NumPy floats as an array, and `None` for any other list."""
    first = value[0]
    try:
        if _is_array(first) and first.dtype.kind == "f" and first.shape == ():
            # Five times as fast as a sum or asarray, which look up the class of each number.
            return sys.modules["numpy"].fromiter(value, first.dtype, len(value))
        if isinstance(first, float) and isinstance(sum(value), float):
            return value
    except (TypeError, ValueError):
        return None  # mixed with other types
    return None


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    """Yield tensors, arrays, byte strings, floats and lists of numbers from containers, dataclasses and objects."""
    if value is None or isinstance(value, (str, int, type)) or depth > _DEEPEST:
        return
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    if isinstance(value, (bytes, bytearray, float)) or _is_tensor(value) or _is_array(value):
        yield value
        return
    # Some libraries return speech as a list of numbers, Python's or NumPy's.
    if isinstance(value, (list, tuple)) and value and (numbers := _numbers(value)) is not None:
        yield numbers
        return
    for number, item in enumerate(_items(value, depth)):
        if number >= _MOST_ITEMS:
            return
        yield from _leaves(item, depth + 1)


def _items(value: Any, depth: int) -> Any:
    items = items_of(value)
    if items is not None:
        return items
    # A user's object around the waveform; not a module or a decoder's cache, whose tensors are large.
    if depth > _DEEPEST_OBJECT or hasattr(value, "parameters") or hasattr(value, "get_seq_length"):
        return ()
    return getattr(value, "__dict__", {}).values()


def _of_leaf(leaf: Any) -> AudioStats | None:
    """Compute the statistics of one leaf; `None` for irrelevant ones, such as token ids."""
    if isinstance(leaf, float):
        return AudioStats(math.isfinite(leaf))
    if isinstance(leaf, (bytes, bytearray)):
        loud = float(leaf.count(0) < len(leaf))  # encoded audio shows no more
        return AudioStats(audio=True, samples=len(leaf), swing=loud, peak=loud)
    if isinstance(leaf, (list, tuple)):
        return _of_floats(leaf) if math.isfinite(sum(leaf)) else AudioStats(finite=False)
    return _of_tensor(leaf) if _is_tensor(leaf) else _of_array(leaf)


def _of_floats(numbers: Any) -> AudioStats:
    some = [float(number) for number in numbers[:: max(1, len(numbers) // _SAMPLED)]]

    def at_peaks(lower: float, upper: float) -> float:
        return sum(number <= lower or number >= upper for number in some) / len(some)

    return _wave(len(numbers), min(some), max(some), at_peaks)


def _is_interleaved(shape: tuple[int, ...]) -> bool:
    """Check for audio with its channels in the last dimension, as sound files have it."""
    *rows, samples, channels = (1, 1, *shape)
    return channels <= _MOST_CHANNELS and math.prod(rows) * channels <= _MOST_ROWS < samples


def _of_tensor(tensor: Any) -> AudioStats | None:
    import torch

    scale = 1.0 / 32768.0 if tensor.dtype == torch.int16 else 1.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    elif not (tensor.is_floating_point() or tensor.dtype == torch.int16):
        return None
    elif _is_interleaved(tuple(tensor.shape)):
        tensor = tensor.transpose(-1, -2)
    shape = tuple(tensor.shape)
    if tensor.numel() == 0:
        return AudioStats(audio=bool(shape))
    tensor = tensor.detach()
    # One pass and one wait for the device. Both bounds are NaN if any number is.
    low, high = (float(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist())
    if not _is_audio(shape):
        return AudioStats(math.isfinite(low) and math.isfinite(high))

    def at_peaks(lower: float, upper: float) -> float:
        some = tensor[..., :: max(1, shape[-1] // _SAMPLED)]
        return float(((some <= lower) | (some >= upper)).to(torch.float32).mean())

    return _wave(shape[-1], low, high, at_peaks, scale)


def _of_array(array: Any) -> AudioStats | None:
    kind, shape = array.dtype.kind, tuple(array.shape)
    scale = 1.0 / 32768.0 if str(array.dtype) == "int16" else 1.0
    if kind == "c":
        return AudioStats(bool(math.isfinite(abs(complex(array.sum())))))
    if kind != "f" and scale == 1.0:
        return None
    if _is_interleaved(shape):
        array = array.swapaxes(-1, -2)
        shape = tuple(array.shape)
    if array.size == 0:
        return AudioStats(audio=bool(shape))
    with sys.modules["numpy"].errstate(all="ignore"):
        low, high = float(array.min()), float(array.max())
    if not _is_audio(shape):
        return AudioStats(math.isfinite(low) and math.isfinite(high))

    def at_peaks(lower: float, upper: float) -> float:
        some = array[..., :: max(1, shape[-1] // _SAMPLED)]
        return float(((some <= lower) | (some >= upper)).mean())

    return _wave(shape[-1], low, high, at_peaks, scale)


def _is_audio(shape: tuple[int, ...]) -> bool:
    return bool(shape) and math.prod(shape[:-1]) <= _MOST_ROWS


def _wave(
    samples: int, low: float, high: float, at_peaks: Callable[[float, float], float], scale: float = 1.0
) -> AudioStats:
    if not (math.isfinite(low) and math.isfinite(high)):
        return AudioStats(finite=False, audio=True, samples=samples)
    peak, swing = max(abs(low), abs(high)), high / 2 - low / 2
    flat = 0.0
    if samples >= _LEAST_SAMPLES // 4 and peak * scale >= _INAUDIBLE:
        margin = (1.0 - _FLAT_LEVEL) * swing
        flat = at_peaks(low + margin, high - margin)
    return AudioStats(audio=True, samples=samples, swing=swing * scale, peak=peak * scale, flat=flat)
