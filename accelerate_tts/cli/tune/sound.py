"""Sound in the output of a backend: found, and drawn as a waveform and a spectrogram."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.tuning.compare import sample_dtype, samples_in, tensors_of

if TYPE_CHECKING:
    from collections.abc import Sequence


ASSUMED_RATE = 24_000
"""Sampling rate in Hz where a backend tells none; most systems with a codec or a vocoder have it."""

_RATE_NAMES = ("output_sample_rate", "sampling_rate", "sample_rate", "samplerate", "sr", "rate")
_LEAST_RATE, _MOST_RATE = 4_000, 384_000
_LEAST_SAMPLES = 256  # fewer are no sound: lengths, scores
_MOST_ROWS, _MOST_CHANNELS = 16, 2  # channels or batch; spectrograms and hidden states have more rows
_MOST_SECONDS = 60.0  # of a sound on a page: 60 s at 24 kHz are 4 MB as base64
_COLUMNS, _BANDS, _WAVE_COLUMNS = 400, 128, 300
_FRAME = 1024
_RANGE = 80.0  # dB below the loudest that are drawn
# A palette of rising lightness, so that it reads in grey as well.
_ANCHORS = ((8, 8, 32), (72, 16, 108), (176, 46, 96), (240, 120, 52), (252, 244, 176))


@dataclass(frozen=True)
class Sound:
    """A sound.

    Attributes:
        samples: One channel, `(samples,)`, fp32 on the CPU, full scale 1.
        rate: Sampling rate in Hz.
        assumed: True if the rate is `ASSUMED_RATE`, since the backend tells none.
    """

    samples: torch.Tensor
    rate: int
    assumed: bool = False

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate

    @property
    def fault(self) -> str:
        """Fault of the sound by itself, as a phrase with a verb; "" without one."""
        if not bool(self.samples.isfinite().all()):
            return "has NaN or infinite numbers"
        return "is silent" if not bool(self.samples.any()) else ""

    def wav(self) -> bytes:
        """Return a WAV file of its first minute: one channel of 16 bits."""
        samples = self.samples[: int(_MOST_SECONDS * self.rate)]
        data = (samples.nan_to_num().clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16).numpy().tobytes()
        shape = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, self.rate, 2 * self.rate, 2, 16)
        body = b"WAVE" + shape + struct.pack("<4sI", b"data", len(data)) + data
        return struct.pack("<4sI", b"RIFF", len(body)) + body


@dataclass(frozen=True)
class Drawn:
    """A sound for a page.

    Attributes:
        wav: A data URI of a WAV file.
        wave: The outline of its waveform, a path of SVG in a box of 1000 x 100.
        spectrogram: A data URI of a PNG image; time goes right, frequency up.
        seconds: Its length.
        cut: True if the WAV file has its first minute only.
    """

    wav: str
    wave: str
    spectrogram: str
    seconds: float
    cut: bool


def sound_of(output: Any, backend: Any, rate: int | None = None) -> Sound | None:
    """Find the sound in the output of a call.

    Args:
        output: The output. The pieces of a stream are a list, and are joined.
        backend: The object that was called. It and what it holds are searched for a sampling rate if the output has
            none.
        rate: The sampling rate in Hz, if it is known.

    Returns:
        The longest waveform of the output, its first channel; `None` if nothing looks like one.
    """
    pieces = output if _is_stream(output) else [output]
    waves = [wave for piece in pieces if (wave := _longest(piece)) is not None] or _in_bytes(pieces)
    if not waves:
        return None
    samples = torch.cat(waves)
    if len(samples) < _LEAST_SAMPLES:
        return None
    told = next(filter(None, map(_rate_in, pieces)), None)
    found = rate or told or next(filter(None, map(_rate_of, _holders(backend))), None)
    return Sound(samples, found or ASSUMED_RATE, assumed=found is None)


def draw(sounds: Sequence[Sound]) -> list[Drawn]:
    """Draw sounds for one page, all with the same scales of time, loudness and frequency."""
    longest = max(sound.seconds for sound in sounds)
    peak = max(float(sound.samples.abs().nan_to_num().max()) for sound in sounds) or 1.0
    spectra = [_spectrum(sound, longest) for sound in sounds]
    loudest = max(float(spectrum.max()) for spectrum in spectra)
    return [
        Drawn(
            _uri("audio/wav", sound.wav()),
            _outline(sound.samples.nan_to_num() / peak, sound.seconds / longest),
            _uri("image/png", _png(_levels(spectrum, loudest))),
            sound.seconds,
            sound.seconds > _MOST_SECONDS,
        )
        for sound, spectrum in zip(sounds, spectra, strict=True)
    ]


def _is_stream(output: Any) -> bool:
    return isinstance(output, list) and not all(isinstance(item, (int, float)) for item in output)


def _longest(piece: Any) -> torch.Tensor | None:
    found = [wave for tensor in tensors_of(piece) if (wave := _as_wave(tensor)) is not None]
    return max(found, key=len, default=None)


def _in_bytes(pieces: Sequence[Any]) -> list[torch.Tensor]:
    """Return the wave in the byte strings of an output, joined; an empty list if they are something else."""
    strings = [tensor for piece in pieces for tensor in tensors_of(piece) if tensor.dtype == torch.uint8]
    content = torch.cat([tensor.reshape(-1).cpu() for tensor in strings]) if strings else torch.empty(0)
    dtype = sample_dtype(content) if strings else None
    wave = None if dtype is None else _as_wave(samples_in(content, dtype))
    return [] if wave is None else [wave]


def _as_wave(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.dim() > 1 and tensor.shape[-1] <= _MOST_CHANNELS and tensor.shape[-2] > _MOST_ROWS:
        tensor = tensor.transpose(-1, -2)  # as sound files have it
    if tensor.numel() < 2 or tensor.dim() == 0 or tensor.numel() // max(1, tensor.shape[-1]) > _MOST_ROWS:  # noqa: PLR2004
        return None
    if not (tensor.is_floating_point() or tensor.dtype == torch.int16):
        return None
    first = tensor.detach().reshape(-1, tensor.shape[-1])[0].cpu().float()
    return first / 32768.0 if tensor.dtype == torch.int16 else first


def _rate(value: Any) -> int | None:
    """Return a number as a rate, also one of NumPy's or a whole float, as librosa gives it; `None` for all else."""
    if isinstance(value, bool) or not isinstance(value, (float, Integral)):
        return None
    number = value if isinstance(value, float) else int(value)
    return int(number) if _LEAST_RATE <= number <= _MOST_RATE and number == int(number) else None


def _rate_in(output: Any) -> int | None:
    """Return the rate in an output: `(24000, wave)`, `{"sampling_rate": 24000}`, an object with one, or a WAV file."""
    if isinstance(output, io.BytesIO):
        output = output.getvalue()
    if isinstance(output, (bytes, bytearray)):
        return int.from_bytes(output[24:28], "little") if bytes(output[:4]) == b"RIFF" else None
    if isinstance(output, Mapping):
        return next(filter(None, (_rate(output.get(name)) for name in _RATE_NAMES)), None)
    if isinstance(output, tuple) and (told := next(filter(None, map(_rate, output)), None)):
        return told
    return _rate_of(output)


def _holders(backend: Any) -> Iterator[Any]:
    """Yield a backend, what it holds, and their configurations."""
    held = [value for value in getattr(backend, "__dict__", {}).values() if hasattr(value, "__dict__")]
    for one in (backend, *held):
        for value in (one, getattr(one, "config", None), getattr(getattr(one, "config", None), "audio", None)):
            if value is not None:
                yield value


def _rate_of(holder: Any) -> int | None:
    return next(filter(None, (_rate(getattr(holder, name, None)) for name in _RATE_NAMES)), None)


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _outline(samples: torch.Tensor, share: float) -> str:
    """Return a closed path around the least and the most sample of each column, in a box of 1000 x 100."""
    columns = max(1, min(len(samples), int(_WAVE_COLUMNS * share)))
    size = math.ceil(len(samples) / columns)
    padded = torch.nn.functional.pad(samples, (0, size * columns - len(samples)))
    rows = padded.view(columns, size)
    across = [1000.0 * share * (number + 0.5) / columns for number in range(columns)]
    top = [f"{x:.0f} {50 - 48 * y:.1f}" for x, y in zip(across, rows.amax(1).tolist(), strict=True)]
    bottom = [f"{x:.0f} {50.4 - 48 * y:.1f}" for x, y in zip(across, rows.amin(1).tolist(), strict=True)]
    return f"M{'L'.join(top)}L{'L'.join(reversed(bottom))}Z"


def _spectrum(sound: Sound, longest: float) -> torch.Tensor:
    """Return the power in `(bands, columns)`, the lowest band first, as wide as the longest sound."""
    samples = sound.samples.nan_to_num().double()
    total = math.ceil(longest * sound.rate)
    samples = torch.nn.functional.pad(samples, (0, max(0, max(total, _FRAME) - len(samples))))
    hop = max(_FRAME // 4, math.ceil(total / _COLUMNS))
    window = torch.hann_window(_FRAME, dtype=samples.dtype)
    power = torch.stft(samples, _FRAME, hop, window=window, return_complex=True).abs().square()
    return torch.nn.functional.adaptive_max_pool2d(power[None], (_BANDS, power.shape[1]))[0]


def _levels(power: torch.Tensor, loudest: float) -> torch.Tensor:
    """Return the levels 0 to 255 of an image, the highest band first."""
    floor = max(loudest, 1e-20) * 10.0 ** (-_RANGE / 10.0)
    decibels = 10.0 * torch.log10(power.clamp_min(floor) / floor)
    return (decibels.clamp(0.0, _RANGE) * (255.0 / _RANGE)).round().to(torch.uint8).flip(0)


def _png(levels: torch.Tensor) -> bytes:
    """Encode `(height, width)` levels as a PNG image with the palette."""
    height, width = levels.shape
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in levels)

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, by a palette
    chunks = ((b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in chunks)


def _palette() -> bytes:
    colours = bytearray()
    for level in range(256):
        place = level / 255 * (len(_ANCHORS) - 1)
        first = min(int(place), len(_ANCHORS) - 2)
        between = place - first
        colours += bytes(
            round(a + (b - a) * between) for a, b in zip(_ANCHORS[first], _ANCHORS[first + 1], strict=True)
        )
    return bytes(colours)
