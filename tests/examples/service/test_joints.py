"""Sentences one behind the other: the pieces in which they come cannot be heard, and no joint pops."""

from __future__ import annotations

import numpy as np
import torch
from clicks import clicks
from hypothesis import given
from hypothesis import strategies as st

from service.joints import FADE, PAUSE, joined

RATE = 16_000


def loud(seed: int, samples: int) -> np.ndarray:
    """A sentence that begins and ends in the middle of a loud sound."""
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    return (0.8 * np.cos(phase + 2 * np.pi * 150 * np.arange(samples) / RATE)).astype(np.float32)


@given(st.lists(st.lists(st.integers(0, 3 * int(FADE * RATE)), max_size=6), max_size=4))
def test_pieces_do_not_matter(sizes: list[list[int]]) -> None:
    wholes = [loud(number, sum(of_one)) for number, of_one in enumerate(sizes)]
    pieces = [np.split(whole, np.cumsum(of_one)[:-1]) for whole, of_one in zip(wholes, sizes, strict=True) if of_one]
    said, at_once = list(joined(pieces, RATE)), list(joined([[whole] for whole in wholes], RATE))
    empty = [np.zeros(0, np.float32)]
    assert np.array_equal(np.concatenate(empty + said), np.concatenate(empty + at_once))
    spoken = [len(whole) for whole in wholes if len(whole)]
    assert sum(map(len, said)) == sum(spoken) + max(0, len(spoken) - 1) * int(PAUSE * RATE)


def test_no_joint_pops() -> None:
    sentences = [loud(number, RATE // 4) for number in range(3)]
    wave = torch.from_numpy(np.concatenate(list(joined([[one] for one in sentences], RATE))))
    pause, length = int(PAUSE * RATE), RATE // 4
    joints = [length, length + pause, 2 * length + pause, 2 * (length + pause)]
    assert clicks(wave, joints) == []
    assert float(wave[0]) == float(wave[-1]) == 0.0
    cut = torch.from_numpy(np.concatenate([np.zeros(pause, np.float32), *sentences[:1], np.zeros(pause, np.float32)]))
    assert clicks(cut, [pause, pause + length]), "the detector hears a sentence that is cut off"


def test_sound_is_sent_before_its_sentence_ends() -> None:
    def endless() -> object:
        while True:
            yield loud(0, RATE)

    first = next(joined([endless()], RATE))  # type: ignore[list-item]
    assert RATE - len(first) == int(FADE * RATE)
