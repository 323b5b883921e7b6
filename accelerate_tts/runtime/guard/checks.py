"""What is wrong with an output: NaN, Inf, silence where there was sound, flat clipping, runaway length.

Pure looking: nothing is called, changed or kept alive. A tensor is looked at once, for its least and greatest value (a
NaN or Inf anywhere in it is in one of them), and flatness on some four thousand of its samples at most. On a GPU that
waits for the tensor to be computed.

Only what is not finite is wrong in itself. Everything else is wrong by comparison, with what the untouched model gave
for the warm-up (`Expectation`); where that is not known, the limits are those of audio whose full scale is 1.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NamedTuple

__all__ = ["UNKNOWN", "Expectation", "Heard", "Units", "cut", "fault_of", "hear", "size_of", "units_of"]

# What a result may hold, so that looking at one stays cheap: a decoder's cache has a hundred tensors.
_DEEPEST, _DEEPEST_OBJECT, _MOST_TENSORS, _MOST_ITEMS = 6, 2, 64, 4096
# Audio has one channel or two, in a small batch; hidden states and spectrograms have more rows.
_MOST_ROWS = 16
# Beside a waveform, what is this much shorter is no part of the speech: lengths, durations, a speaker's embedding.
_ASIDE = 16
_SAMPLED = 4096

_INAUDIBLE = 1e-3
"""What lies 60 dB below the loudest of the warm-up is silence; nobody hears it beside that."""
_FLAT_LEVEL, _FLAT_SHARE = 0.99, 0.25
"""A wave is flat if a quarter of its samples lie within 1 % of its peaks. A sine has 9 % of them there, speech less."""
_FLAT_TIMES, _FLAT_PEAK = 4.0, 0.1
"""... and if that is four times what the warm-up had, at a tenth of its loudness at least: pauses are flat, too."""
_TOO_LONG, _LEAST_UNITS = 10.0, 20
"""Ten times the warm-up's samples per character are absurd. A text counts as twenty characters at least: a number, or
one word with the silence around it, takes longer than its letters say."""
_LEAST_SAMPLES = 4096
"""Of a call whose text is not known, less than this may well be nothing to say."""
_LEAST_LETTERS = 3
_TEXTS = ("text", "texts", "sentence", "sentences", "input", "inputs", "prompt", "input_ids")
_SPEAK_OF_TEXT = frozenset(
    {"text", "texts", "sentence", "sentences", "transcript", "script", "utterance", "say", "words"}
)
# "prompt_text" is what a reference says, "style_text" how, "text_language" in what language.
_OTHERS = frozenset({
    "prompt", "ref", "reference", "speaker", "voice", "voices", "style", "description", "instruct", "instruction",
    "negative", "lang", "language", "locale", "accent", "dialect", "emotion", "path", "file", "filename", "wav",
    "audio", "url", "uri", "format", "model", "device", "name", "id", "key", "mode", "split",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Heard:
    """What an output is like.

    Attributes:
        finite: Whether no floating-point number in it is NaN or infinite.
        audio: Whether there is anything in it that may be audio.
        samples: Samples of audio, along the last dimension.
        swing: Half of the distance between its least and its greatest sample; of 16-bit samples as a share of full
            scale.
        peak: The largest magnitude of a sample, likewise.
        flat: The share of samples within 1 % of the peaks, where there are enough of them to tell; else 0.0.
    """

    finite: bool = True
    audio: bool = False
    samples: int = 0
    swing: float = 0.0
    peak: float = 0.0
    flat: float = 0.0

    def joined(self, other: Heard) -> Heard:
        """What two outputs are like, one after the other."""
        return Heard(
            self.finite and other.finite,
            self.audio or other.audio,
            self.samples + other.samples,
            max(self.swing, other.swing),
            max(self.peak, other.peak),
            max(self.flat, other.flat),
        )


class Units(NamedTuple):
    """How much a call was asked to say.

    Attributes:
        amount: Characters of its text, or its token ids; `None` where it has neither.
        letters: The letters and digits among them; `None` where they are not known.
    """

    amount: int | None = None
    letters: int | None = None


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What the untouched model gave for the warm-up's calls of one function.

    Attributes:
        finite: Whether no number was NaN or infinite.
        sounds: Whether it was not silent.
        peak: The largest magnitude of a sample.
        flat: The largest share of samples at the peaks.
        longest: The samples of the longest output; `None` where lengths cannot be judged.
        rate: The largest number of samples per unit of text; `None` likewise.
    """

    finite: bool = True
    sounds: bool = True
    peak: float = 1.0
    flat: float = 0.0
    longest: int | None = None
    rate: float | None = None

    @classmethod
    def of(cls, calls: list[tuple[Units, Heard]]) -> Expectation:
        """What calls of the untouched model lead one to expect."""
        outputs = [heard for _, heard in calls]
        audible = [heard for heard in outputs if heard.audio and heard.swing > 0.0]
        rates = [heard.samples / max(units.amount, 1) for units, heard in calls if units.amount is not None]
        known = bool(rates) and bool(audible) and len(rates) == len(calls)
        return cls(
            finite=all(heard.finite for heard in outputs),
            sounds=len(audible) == len(outputs),
            peak=max((heard.peak for heard in audible), default=1.0),
            flat=max((heard.flat for heard in outputs), default=0.0),
            longest=max(heard.samples for heard in outputs) if known else None,
            rate=max(rates) if known else None,
        )


UNKNOWN = Expectation()
"""Of a function that the warm-up did not call: full scale is 1, and how long is too long nobody knows."""


def fault_of(heard: Heard, units: Units, expected: Expectation = UNKNOWN, *, whole: bool = True) -> str | None:
    """What is wrong with an output, in one or two words.

    Args:
        heard: What the output is like.
        units: How much there was to say.
        expected: What the untouched model gave for the warm-up.
        whole: Whether this is all of the output. A silent piece is a pause.

    Returns:
        "NaN or Inf", "clipped flat", "too long" or "silent"; `None` if nothing is wrong.
    """
    if not heard.finite:
        return "NaN or Inf" if expected.finite else None
    if not heard.audio:
        return None
    loud = heard.peak >= _FLAT_PEAK * expected.peak
    if loud and heard.flat > max(_FLAT_SHARE, _FLAT_TIMES * expected.flat):
        return "clipped flat"
    if _is_too_long(heard, units, expected):
        return "too long"
    if whole and expected.sounds and heard.swing <= _INAUDIBLE * expected.peak and _has_much_to_say(heard, units):
        return "silent"
    return None


def _is_too_long(heard: Heard, units: Units, expected: Expectation) -> bool:
    if expected.rate is None or expected.longest is None or units.amount is None:
        return False
    limit = _TOO_LONG * expected.rate * max(units.amount, _LEAST_UNITS)
    return heard.samples > max(limit, 2 * expected.longest)


def _has_much_to_say(heard: Heard, units: Units) -> bool:
    return heard.samples >= _LEAST_SAMPLES if units.letters is None else units.letters >= _LEAST_LETTERS


def units_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Callable[..., Any] | None = None) -> Units:
    """How much a call with these arguments is asked to say.

    Each argument goes by the name of its parameter. The text is the one that is named `text` or the like; else one
    whose name speaks of a text, and not of a reference, a style or a language; else the longest text that is neither
    a path nor named after something else. A request object or a mapping is looked into. Without any text, whole
    numbers in a tensor or array are token ids.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        function: What is called with them; without it, positional arguments have no name.
    """
    try:
        names = () if function is None or not args else _parameters_of(function)
        given = [*zip_longest(names[: len(args)], args, fillvalue=""), *kwargs.items()]
        return _units_of(given)
    except Exception:  # a proxy that is bound to nothing, say, raises when it is asked what it is
        return Units()


def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's positional parameters, without that of a bound object."""
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


# Asking takes 20 us; by function, without keeping it.
_parameters: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _rank(name: str, value: Any) -> tuple[int, int] | None:
    """How likely an argument is the text, the least first; `None` where it cannot be."""
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
    """Whether it looks like a path or an address rather than like something to say."""
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
    for _, value in given:  # a request: a mapping, a dataclass, a model of pydantic's
        inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
        if isinstance(inner, Mapping) and any(isinstance(inner.get(name), str) for name in _TEXTS):
            return _units_of([(name, inner[name]) for name in _TEXTS if name in inner])
    return Units()


def hear(output: Any) -> Heard:
    """What an output is like. Never raises: what cannot be looked at is nothing."""
    found: list[Heard] = []
    try:
        for leaf in _leaves(output, 0):
            heard = _of_leaf(leaf)
            if heard is not None:
                found.append(heard)
            if len(found) >= _MOST_TENSORS:
                break
    except Exception:  # a user's object may raise at any attribute; the guard must never cost a call
        return Heard(finite=all(heard.finite for heard in found))
    finite = all(heard.finite for heard in found)
    longest = max((heard.samples for heard in found if heard.audio), default=0)
    total = Heard(finite)
    for heard in found:
        if heard.audio and heard.samples >= longest / _ASIDE:
            total = total.joined(heard)
    return dataclasses.replace(total, finite=finite)


def size_of(chunk: Any) -> int | None:
    """Samples of a streamed piece that can be cut along its last dimension; `None` for any other object."""
    if isinstance(chunk, (bytes, bytearray)):
        return len(chunk)
    if not (_is_tensor(chunk) or _is_array(chunk)):
        return None
    shape = tuple(chunk.shape)
    return int(shape[-1]) if shape and all(size == 1 for size in shape[:-1]) else None


def cut(chunk: Any, samples: int) -> Any:
    """A piece that `size_of` knows the size of, without its first samples."""
    return chunk[samples:] if isinstance(chunk, (bytes, bytearray)) else chunk[..., samples:]


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _numbers(value: Any) -> Any:
    """A list of nothing but floats, as it is; of NumPy's, as an array; `None` for any other list."""
    first = value[0]
    try:
        if _is_array(first) and first.dtype.kind == "f" and first.shape == ():
            # Five times as fast as adding them up or as asarray, which look at each number's class.
            return sys.modules["numpy"].fromiter(value, first.dtype, len(value))
        if isinstance(first, float) and isinstance(sum(value), float):
            return value
    except (TypeError, ValueError):
        return None  # there are others among them
    return None


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    """Tensors, arrays, byte strings, floats and lists of numbers, in containers, dataclasses and plain objects."""
    if value is None or isinstance(value, (str, int, type)) or depth > _DEEPEST:
        return
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
    if isinstance(value, Mapping):  # transformers' ModelOutput too
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if dataclasses.is_dataclass(value):
        return (getattr(value, field.name, None) for field in dataclasses.fields(value))
    # An object of the user's own around the waveform; not a module, nor a decoder's cache, whose tensors are large.
    if depth > _DEEPEST_OBJECT or hasattr(value, "parameters") or hasattr(value, "get_seq_length"):
        return ()
    return getattr(value, "__dict__", {}).values()


def _of_leaf(leaf: Any) -> Heard | None:
    """What one leaf is like; `None` for one that says nothing, such as token ids."""
    if isinstance(leaf, float):
        return Heard(math.isfinite(leaf))
    if isinstance(leaf, (bytes, bytearray)):
        loud = float(leaf.count(0) < len(leaf))  # of encoded audio nothing else can be told
        return Heard(audio=True, samples=len(leaf), swing=loud, peak=loud)
    if isinstance(leaf, (list, tuple)):
        return _of_floats(leaf) if math.isfinite(sum(leaf)) else Heard(finite=False)
    return _of_tensor(leaf) if _is_tensor(leaf) else _of_array(leaf)


def _of_floats(numbers: Any) -> Heard:
    some = [float(number) for number in numbers[:: max(1, len(numbers) // _SAMPLED)]]

    def at_peaks(lower: float, upper: float) -> float:
        return sum(number <= lower or number >= upper for number in some) / len(some)

    return _wave(len(numbers), min(some), max(some), at_peaks)


def _of_tensor(tensor: Any) -> Heard | None:
    import torch

    scale = 1.0 / 32768.0 if tensor.dtype == torch.int16 else 1.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    elif not (tensor.is_floating_point() or tensor.dtype == torch.int16):
        return None
    shape = tuple(tensor.shape)
    if tensor.numel() == 0:
        return Heard(audio=bool(shape))
    tensor = tensor.detach()
    # One pass, and one wait for the device: either is NaN if any number is.
    low, high = (float(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist())
    if not _is_audio(shape):
        return Heard(math.isfinite(low) and math.isfinite(high))

    def at_peaks(lower: float, upper: float) -> float:
        some = tensor[..., :: max(1, shape[-1] // _SAMPLED)]
        return float(((some <= lower) | (some >= upper)).to(torch.float32).mean())

    return _wave(shape[-1], low, high, at_peaks, scale)


def _of_array(array: Any) -> Heard | None:
    kind, shape = array.dtype.kind, tuple(array.shape)
    scale = 1.0 / 32768.0 if str(array.dtype) == "int16" else 1.0
    if kind == "c":
        return Heard(bool(math.isfinite(abs(complex(array.sum())))))
    if kind != "f" and scale == 1.0:
        return None
    if array.size == 0:
        return Heard(audio=bool(shape))
    with sys.modules["numpy"].errstate(all="ignore"):
        low, high = float(array.min()), float(array.max())
    if not _is_audio(shape):
        return Heard(math.isfinite(low) and math.isfinite(high))

    def at_peaks(lower: float, upper: float) -> float:
        some = array[..., :: max(1, shape[-1] // _SAMPLED)]
        return float(((some <= lower) | (some >= upper)).mean())

    return _wave(shape[-1], low, high, at_peaks, scale)


def _is_audio(shape: tuple[int, ...]) -> bool:
    return bool(shape) and math.prod(shape[:-1]) <= _MOST_ROWS


def _wave(
    samples: int, low: float, high: float, at_peaks: Callable[[float, float], float], scale: float = 1.0
) -> Heard:
    if not (math.isfinite(low) and math.isfinite(high)):
        return Heard(finite=False, audio=True, samples=samples)
    peak, swing = max(abs(low), abs(high)), high / 2 - low / 2
    flat = 0.0
    if samples >= _LEAST_SAMPLES // 4 and peak * scale >= _INAUDIBLE:
        margin = (1.0 - _FLAT_LEVEL) * swing
        flat = at_peaks(low + margin, high - margin)
    return Heard(audio=True, samples=samples, swing=swing * scale, peak=peak * scale, flat=flat)
