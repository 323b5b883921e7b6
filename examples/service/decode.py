"""Decoding of an uploaded recording, in a process of its own with little time and memory.

`python -m service.decode SOURCE TARGET SHORTEST LONGEST` writes a WAV file of 24 kHz, mono, 16 bits. What a stranger
uploads meets the decoders' C code only here. Exit code 3 means that the recording is refused, and standard output says
why.
"""

from __future__ import annotations

import sys

import numpy as np
import soundfile
import soxr

RATE = 24_000
REFUSED = 3
_FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
_QUIET = 1e-3  # of full scale
_MOST_CHANNELS = 8
_RATES = (8_000, 192_000)
_MEMORY = 2**31  # bytes of address space, most of which libraries only reserve
_CPU_SECONDS = 20


def canonical(source: str, shortest: float, longest: float) -> np.ndarray:
    """Decode a recording to `(samples,)`, fp32, 24 kHz.

    Raises:
        ValueError: It is refused; the message says why.
    """
    try:
        file = soundfile.SoundFile(source)
    except soundfile.LibsndfileError:
        raise ValueError("the file is no recording that can be read; send WAV, FLAC, MP3, Ogg Vorbis or Opus") from None
    with file:
        if file.format not in _FORMATS:
            raise ValueError(f"the file is {file.format}; send WAV, FLAC, MP3, Ogg Vorbis or Opus")
        if file.channels > _MOST_CHANNELS or not _RATES[0] <= file.samplerate <= _RATES[1]:
            raise ValueError(f"{file.channels} channels at {file.samplerate} Hz cannot be used; send mono at 16 kHz")
        # The head may lie about the length, so one second more than allowed is read at most.
        try:
            sound = file.read(int((longest + 1) * file.samplerate), dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError:
            raise ValueError("the recording is damaged") from None
        seconds = len(sound) / file.samplerate
        if not shortest <= seconds <= longest:
            raise ValueError(
                f"the recording has {'more than ' if seconds > longest else ''}{min(seconds, longest):.1f} s;"
                f" send {shortest:g} to {longest:g} s"
            )
        if not np.isfinite(sound).all():
            raise ValueError("the recording has samples that are no numbers")
        if np.abs(sound).max() < _QUIET:
            raise ValueError("the recording is silent")
        return soxr.resample(sound, file.samplerate, RATE)


def main(arguments: list[str]) -> int:
    """Decode one file, and return the exit code."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    source, target, shortest, longest = arguments
    try:
        sound = canonical(source, float(shortest), float(longest))
    except ValueError as error:
        print(error)
        return REFUSED
    soundfile.write(target, np.clip(sound, -1, 1), RATE, format="WAV", subtype="PCM_16")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
