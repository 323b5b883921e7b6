"""Encoders of the answer: PCM, WAV, MP3 and Opus, whole or piece by piece."""

from __future__ import annotations

import io
import struct
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

FORMATS = {"mp3": "audio/mpeg", "opus": "audio/ogg", "wav": "audio/wav", "pcm": "audio/pcm"}
"""Content types by the API's names of the formats."""

# The API's PCM is 24 kHz, and Opus knows no rate between this and 16 kHz.
_RATE = 24_000
_UNKNOWN = 0xFFFFFFFF  # a WAV file's length, while nobody knows it


class Encoder(Protocol):
    """Takes samples, `(samples,)`, fp32 in -1..1, and returns bytes of the file as soon as they are there.

    Attributes:
        heard: True once bytes with sound were returned.
    """

    heard: bool

    def add(self, samples: np.ndarray) -> bytes:
        """Return the further bytes after further samples."""
        ...

    def end(self) -> bytes:
        """Return the last bytes."""
        ...


def encoder(name: str, rate: int, samples: int | None = None) -> Encoder:
    """Return an encoder of mono sound.

    Args:
        name: One of `FORMATS`.
        rate: Sampling rate of what it will be given, in Hz. "pcm" and "opus" are converted to 24 kHz.
        samples: Number of samples if it is known, for the head of a WAV file.
    """
    if name == "wav":
        return _Wav(rate, samples)
    if name == "pcm":
        return _Resampled(_Pcm(), rate)
    if name == "opus":
        return _Resampled(_Opus(), rate)
    return _Mp3(rate)


class _Pcm:
    """Signed 16 bits, little-endian."""

    heard = False

    def add(self, samples: np.ndarray) -> bytes:
        self.heard |= bool(len(samples))
        return (np.clip(samples, -1.0, 1.0) * 32767).round().astype("<i2").tobytes()

    def end(self) -> bytes:
        return b""


class _Wav(_Pcm):
    def __init__(self, rate: int, samples: int | None) -> None:
        size = _UNKNOWN if samples is None else 2 * samples
        riff = _UNKNOWN if samples is None else size + 36
        form = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
        self._head = form + struct.pack("<4sI", b"data", size)

    def add(self, samples: np.ndarray) -> bytes:
        head, self._head = self._head, b""
        return head + super().add(samples)

    def end(self) -> bytes:
        head, self._head = self._head, b""
        return head


class _Resampled:
    def __init__(self, inner: Encoder, rate: int) -> None:
        self._inner = inner
        self._resampler = soxr.ResampleStream(rate, _RATE, 1, dtype="float32") if rate != _RATE else None

    @property
    def heard(self) -> bool:
        return self._inner.heard

    def add(self, samples: np.ndarray) -> bytes:
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        return self._inner.add(samples)

    def end(self) -> bytes:
        if self._resampler is None:
            return self._inner.end()
        return self._inner.add(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)) + self._inner.end()


class _File:
    """A format of libsndfile, in memory."""

    heard = False

    def __init__(self, rate: int, container: str, codec: str, **options: Any) -> None:
        self._buffer = io.BytesIO()
        self._file = soundfile.SoundFile(self._buffer, "w", rate, 1, format=container, subtype=codec, **options)
        self._sent = 0

    def add(self, samples: np.ndarray) -> bytes:
        self._file.write(np.clip(samples, -1.0, 1.0))
        return self._new()

    def end(self) -> bytes:
        self._file.close()
        return self._new()

    def _new(self) -> bytes:
        everything = self._buffer.getvalue()
        new, self._sent = everything[self._sent :], len(everything)
        return new


class _Opus(_File):
    """Opus in Ogg. Its first two pages are the head, and each of the others has up to a second."""

    def __init__(self) -> None:
        super().__init__(_RATE, "OGG", "OPUS")

    def _new(self) -> bytes:
        self.heard = self.heard or self._buffer.getvalue().count(b"OggS") > 2  # noqa: PLR2004
        return super()._new()


class _Mp3(_File):
    """MP3 without the frame in front that says how long it is, which is written last.

    The bit rate is constant, since readers then find the length without that frame.
    """

    def __init__(self, rate: int) -> None:
        super().__init__(rate, "MP3", "MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.5)
        self._begun = False

    def _new(self) -> bytes:
        new = super()._new()
        if new and not self._begun:
            self._begun = True
            new = new[4:].lstrip(b"\0")  # a head of four bytes and zeros, where that frame will be
        self.heard |= bool(new)
        return new
