"""`accelerate-tts demo`: the whole way through, and every way of calling it wrongly."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from accelerate_tts import Receipt
from accelerate_tts.cli.app import app
from accelerate_tts.cli.demo import command
from accelerate_tts.cli.demo.phonemes import NothingToSayError, sentences


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "8")


def demo(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["demo", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_decorated_voice_speaks(tmp_path: Path) -> None:
    out, receipt = tmp_path / "out.wav", tmp_path / "receipt.json"
    code, text = demo("Hello there. --- 👋 And good-bye!", "-o", str(out), "--pairs", "3", "--receipt", str(receipt))
    assert code == 0, text
    for words in ("cold first call", "warm call", "real-time factor", "warm ratio", "Receipt", "fold weight norm"):
        assert words in text
    assert "relative error" in text
    with wave.open(str(out)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (22050, 1, 2)
        assert 1.0 < file.getnframes() / 22050 < 6.0
        assert max(file.readframes(file.getnframes())) > 0
    assert Receipt.from_json(receipt.read_text()).what == "DecoratedBackend"
    assert json.loads(receipt.read_text())["format"] == 1
    shown = CliRunner().invoke(app, ["receipt", str(receipt)])
    assert shown.exit_code == 0
    assert "fold weight norm" in shown.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["", "-o", "{}/a.wav"], "nothing to say in ''"),
        (["\x00", "-o", "{}/a.wav"], "nothing to say"),
        (["...", "-o", "{}/a.wav"], "can be pronounced"),
        (["hi", "-o", "{}/no/a.wav"], "there is no folder"),
        (["hi", "-o", "{}"], "is a folder"),
        (["hi", "-o", "/proc/version/a.wav"], "there is no folder"),
        (["hi", "-o", "/proc/version"], "cannot be written"),
        (["hi", "-o", "{}/a.wav", "--receipt", "{}/no/r.json"], "there is no folder"),
        (["hi", "--pairs", "0"], "--pairs"),
        ([], "Missing argument"),
    ],
)
def test_a_wrong_call_is_an_error_and_no_traceback(words: list[str], message: str, tmp_path: Path) -> None:
    code, text = demo(*[word.format(tmp_path) for word in words])
    assert code == 2
    assert message in " ".join(text.split())
    assert "Traceback" not in text
    assert not list(tmp_path.glob("*.wav"))


def test_an_existing_file_survives_a_refused_text(tmp_path: Path) -> None:
    out = tmp_path / "keep.wav"
    out.write_bytes(b"precious")
    code, _ = demo("...", "-o", str(out))
    assert code == 2
    assert out.read_bytes() == b"precious"


def test_what_is_timed_is_short_however_long_the_text() -> None:
    pieces = sentences("A sentence of some length, to be spoken aloud. " * 200)
    assert len(command.timed_part(pieces)) <= 300
    assert command.timed_part(["one"]) == "one"
    assert command.timed_part(iter(["one", "two"])) == "one\ntwo"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=400))
def test_any_text_can_be_split(text: str) -> None:
    try:
        pieces = sentences(text)
    except NothingToSayError:
        return
    assert all(piece.strip() and len(piece) <= 300 for piece in pieces)
