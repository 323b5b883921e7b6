"""Texts in sentences."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate_tts.errors import SettingsError
from accelerate_tts.streaming import StreamOptions, sentences


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met Mrs. Jones and Prof. Dr. Lee at St. Mary's.",
        "It is 3.14, or 1,000.50, and costs $9.99 at 12.30 on 1.2.2026.",
        "Read https://example.org/a.b?c=d&e=1.5!x today, or write to j.doe@example.org now.",
        "The U.S. Army and the E.U. met at 5 p.m. on Jan. 3 with J. R. R. Tolkien.",
        "See No. 5, Fig. 3 and pp. 7 to 9, i.e. what e.g. Vol. 2 says.",
        "Am 3. Mai kam Ludwig XIV. nach Berlin, z.B. mit Hrn. Dr. Faust.",
        "Wait... what is it?",
        '"Why?" he asked.',
        "Version 2.0.1 of node.js runs on v1.2 now.",
        "Hello",
    ],
)
def test_one_sentence_stays_one(text: str) -> None:
    assert sentences(text) == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello there. Bye.", ["Hello there.", "Bye."]),
        ("He said no. Then he left.", ["He said no.", "Then he left."]),
        ("It costs $3.50. Buy it!", ["It costs $3.50.", "Buy it!"]),
        ('"Stop." She ran. (He did not.) Why?!', ['"Stop."', "She ran.", "(He did not.)", "Why?!"]),
        ("It was 1999. We danced.", ["It was 1999.", "We danced."]),
        ("今日は。元気ですか？「はい。」と言った", ["今日は。", "元気ですか？", "「はい。」", "と言った"]),
        ("यह है। वह था।", ["यह है।", "वह था।"]),
        ("مرحبا؟ نعم.", ["مرحبا؟", "نعم."]),
        ("Что? Да. Нет!", ["Что?", "Да.", "Нет!"]),
        ("A title\n\nAnd its\ntext.", ["A title", "And its text."]),
        ("Well. ... Yes.", ["Well. ...", "Yes."]),
        ("", []), (" \n\t ", []), ("...", []), ("?! -- «»", []), ("🙂", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_a_long_sentence_without_a_stop_is_cut_at_a_comma_a_space_or_anywhere() -> None:
    commas = ", ".join(["a few words"] * 60)
    assert all(len(piece) <= 300 for piece in sentences(commas))
    assert all(piece.endswith(",") for piece in sentences(commas)[:-1])
    assert all(piece.endswith("word") for piece in sentences("word " * 200))
    assert [len(piece) for piece in sentences("あ" * 700)] == [300, 300, 100]
    assert all("1,000" in word for piece in sentences("1,000 " * 100) for word in piece.split())


@pytest.mark.parametrize("text", ["a" + "-" * 1000, "Go" + " —" * 900, "Hi. " + ". " * 900, "x." + '"' * 900 + "y"])
def test_a_piece_without_a_letter_is_never_spoken(text: str) -> None:
    found = sentences(text)
    assert all(any(character.isalnum() for character in piece) and len(piece) <= 300 for piece in found)


@pytest.mark.parametrize("text", ["." * 300_000, "1. " * 100_000, "a" * 300_000 + " x. Y", "Oh! " + "?" * 300_000])
@pytest.mark.timeout(60)  # quadratic time would be many minutes
def test_a_long_text_takes_time_in_proportion(text: str) -> None:
    assert all(len(piece) <= 300 for piece in sentences(text))


@given(st.text(alphabet=st.sampled_from("aB1.,!?…。？ \n\"'”()éд字-"), max_size=800))
def test_nothing_is_lost_or_said_twice(text: str) -> None:
    found = sentences(text)
    assert all(any(character.isalnum() for character in piece) for piece in found)
    assert all(len(piece) <= 300 + 50 or not piece.isalnum() for piece in found)
    letters = [character for character in text if character.isalnum()]
    assert [character for piece in found for character in piece if character.isalnum()] == letters


@pytest.mark.parametrize(
    "wrong",
    [
        {"first": 0.0}, {"first": 5.0}, {"growth": 0.5}, {"left_context": 0.0}, {"first": float("nan")},
        {"first": "1"}, {"most": 10**400}, {"most": True}, {"growth": None}, {"left_context": "1"}, {"split": 3},
    ],
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(SettingsError, match=name):
        StreamOptions(**wrong)


def test_sizes_grow_to_the_largest() -> None:
    sizes = StreamOptions(first=0.4, growth=2.0, most=1.0).sizes(25.0)
    assert [next(sizes) for _ in range(4)] == [10, 20, 25, 25]


@pytest.mark.parametrize("growth", [2.0, math.inf])
def test_a_piece_may_have_any_size(growth: float) -> None:
    sizes = list(islice(StreamOptions(most=math.inf, growth=growth).sizes(25.0), 2000))
    assert sizes[0] == 10
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 2**31


def test_a_splitter_may_be_given() -> None:
    assert StreamOptions(split=lambda text: text.split("|")).sentences("a|b.") == ["a", "b."]
    assert StreamOptions(split=None).sentences("A. B.") == ["A. B."]
    assert StreamOptions(split=None).sentences("...") == []
