"""A system for tests of the service: quick, without torch, and as badly behaved as its text asks for."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from accelerate_tts.events import DecodePasses, emit
from accelerate_tts.settings import Precision
from service.worker import Refused, Speaker, Utterance

RATE = 16_000
PIECE = 4000


def tone(word: str) -> np.ndarray:
    """A quarter of a second whose pitch is the word's own."""
    pitch = 100 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % 900
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(PIECE) / RATE)).astype(np.float32)


def die(_value: str, _folder: Path) -> None:
    os._exit(7)


def die_once(value: str, folder: Path) -> None:
    mark = folder / value
    if not mark.exists():
        mark.touch()
        os._exit(7)


def until(value: str, folder: Path) -> None:
    """Wait for a file that the test makes."""
    while not (folder / value).exists():
        time.sleep(0.01)


def fail(value: str, _folder: Path) -> None:
    raise RuntimeError(f"the model is broken\x1b[31m {value}")


def refuse(_value: str, _folder: Path) -> None:
    raise Refused("that cannot be said")


COMMANDS: dict[str, Callable[[str, Path], object]] = {
    "WAIT": lambda value, _folder: time.sleep(float(value)),
    "HANG": lambda _value, _folder: time.sleep(1000),
    "PASSES": lambda _value, _folder: emit(DecodePasses("a decoder", 10, 20, 25)),
    "NOTE": lambda value, folder: (folder / value).touch(),
    "UNTIL": until, "DIE": die, "DIE-ONCE": die_once, "RAISE": fail, "REFUSE": refuse,
}  # fmt: skip


def loud(_precision: str, folder: Path) -> Speaker:
    """Says each word; some words in capitals are commands."""

    def stream(said: Utterance) -> Iterator[np.ndarray]:
        for word in said.text.split():
            name, _, value = word.partition(":")
            if name == "NOTHING":
                return
            if name == "LEFT":  # its caller; that is told, and the next word is said all the same
                while not said.left.is_set():
                    time.sleep(0.01)
                (folder / value).touch()
                continue
            if name in COMMANDS:
                COMMANDS[name](value, folder)
            else:
                yield tone(word) * said.speed
        if said.reference is not None:
            yield np.full(PIECE, 0.5, np.float32)

    return Speaker(RATE, stream, ("a", "b"), takes_references=True, takes_speed=True)


def slow(precision: str, folder: Path) -> Speaker:
    """Takes a while for each text, so that a test can kill it meanwhile."""
    speaker = loud(precision, folder)

    def stream(said: Utterance) -> Iterator[np.ndarray]:
        time.sleep(0.1)
        yield from speaker.stream(said)

    return replace(speaker, stream=stream)


def plain(_precision: str, _folder: Path) -> Speaker:
    """Has neither references nor speeds."""
    return Speaker(RATE, lambda said: iter([tone(said.text)]), ("only",))


def late(precision: str, folder: Path) -> Speaker:
    """Is loaded as soon as the test makes a file."""
    until("loaded", folder)
    return loud(precision, folder)


def broken(_precision: str, _folder: Path) -> Speaker:
    """Cannot be loaded."""
    raise RuntimeError("no weights")


def quick_joe(precision: Precision, folder: Path) -> Speaker:
    """The demo's voice, tuned on a word."""
    from service.systems import joe

    return joe(precision, folder, ["Hello."])
