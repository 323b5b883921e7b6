"""Helpers of the examples: options, text without a tokeniser's files, WAV files. Not part of accelerate_tts."""

from __future__ import annotations

import argparse
import os
import re
import warnings
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TEXT = "The quick brown fox jumps over the lazy dog. It does so every day."


def parse(
    arguments: Sequence[str] | None, description: str | None, *, speaks: bool = True, **more: dict[str, Any]
) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: The command line; `sys.argv` if not given.
        description: Text of `--help`.
        speaks: True if it takes a text and makes sound; False if it takes recordings.
        **more: Further options, by their names with `_` for `-`, and what `add_argument` is told of each.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if speaks:
        parser.add_argument("text", nargs="?", default=TEXT)
        parser.add_argument("--seconds", type=float, default=2.0, help="where random weights, which never end, stop")
    else:
        parser.add_argument("recordings", nargs="*", type=Path, help="WAV files; made-up ones if there are none")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.wav" if speaks else "out.json"))
    parser.add_argument("--random-weights", action="store_true", help="the true architecture, seeded: noise, offline")
    parser.add_argument("--precision", choices=["exact", "balanced", "fast"], help="what tuning may change")
    parser.add_argument("--tune-seconds", type=float, help="the budget of tuning")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests: the classes, but small
    for name, told in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **told)
    options = parser.parse_args(arguments)
    # A service sets these in its environment; they are read when the first model is loaded.
    for variable, value in {"PRECISION": options.precision, "TUNE_SECONDS": options.tune_seconds}.items():
        if value is not None:
            os.environ[f"ACCELERATE_TTS_{variable}"] = str(value)
    warnings.simplefilter("ignore", FutureWarning)  # of the upstream packages' own imports
    torch.manual_seed(0)  # random weights are the same weights every time
    return options


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]


def letters(text: str, size: int) -> list[int]:
    """Token ids from 1 to `size` - 1 for a text: what random weights need no trained tokeniser for."""
    return [1 + ord(letter) % (size - 1) for letter in text]


def at_most(function: Callable[..., Any], **limits: int) -> Callable[..., Any]:
    """The function, called with these keyword arguments whatever the caller says."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**kwargs, **limits})

    return limited


@contextmanager
def anew(path: Path) -> Iterator[Path]:
    """The path of a new file that takes the place of `path` at the end, so that a failure leaves an older one there."""
    if path.exists() and not path.is_file():  # a device or a pipe
        yield path
        return
    path = path.resolve()  # a link stays one
    made = path.with_name(f"{path.name}.part")
    try:
        yield made
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def write_wav(path: Path, pieces: Iterable[torch.Tensor], rate: int) -> None:
    """Write pieces of speech to a file as they come, and say so."""
    samples = 0
    with anew(path) as made, wave.open(str(made), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        for piece in pieces:
            whole = (piece.detach().float().cpu().flatten().clamp(-1, 1) * 32767).round().to(torch.int16)
            file.writeframes(whole.numpy().tobytes())
            samples += whole.numel()
    print(f"{path}: {samples / rate:.2f} s of sound")
