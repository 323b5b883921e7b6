"""A system for tests of the service: quick, without torch, and as badly behaved as its text asks for."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from accelerate_tts.settings import Precision
from service.worker import Refused, Speaker, Utterance

RATE = 16_000
PIECE = 4000


def tone(word: str) -> np.ndarray:
    """A quarter of a second whose pitch is the word's own."""
    pitch = 100 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % 900
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(PIECE) / RATE)).astype(np.float32)


def loud(_precision: str, folder: Path) -> Speaker:
    """Says each word; a word in capitals is a command."""

    def stream(said: Utterance) -> Iterator[np.ndarray]:
        for word in said.text.split():
            name, _, value = word.partition(":")
            if name == "WAIT":
                time.sleep(float(value))
            elif name == "HANG":
                time.sleep(1000)
            elif name == "DIE":
                os._exit(7)
            elif name == "DIE-ONCE":
                mark = folder / value
                if not mark.exists():
                    mark.touch()
                    os._exit(7)
            elif name == "RAISE":
                raise RuntimeError("the model is broken\x1b[31m")
            elif name == "REFUSE":
                raise Refused("that cannot be said")
            elif name == "NOTHING":
                return
            elif name == "NOTE":
                (folder / value).touch()
            else:
                yield tone(word) * said.speed
        if said.reference is not None:
            yield np.full(PIECE, 0.5, np.float32)

    return Speaker(RATE, stream, ("a", "b"), takes_references=True, takes_speed=True)


def plain(_precision: str, _folder: Path) -> Speaker:
    """Has neither references nor speeds."""
    return Speaker(RATE, lambda said: iter([tone(said.text)]), ("only",))


def broken(_precision: str, _folder: Path) -> Speaker:
    """Cannot be loaded."""
    raise RuntimeError("no weights")


def quick_joe(precision: Precision, folder: Path) -> Speaker:
    """The demo's voice, tuned on a word."""
    from service.systems import joe

    return joe(precision, folder, ["Hello."])
