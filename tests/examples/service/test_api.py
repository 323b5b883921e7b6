"""The API as OpenAI's client and browsers meet it, in front of a quick stand-in."""

from __future__ import annotations

import base64
import io
import json
import wave
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from serving import Served, openai, until
from standin import PIECE, RATE, tone

TEXT = "one two three"
WANTED = {"model": "loud", "voice": "a", "input": TEXT}


def wav(sound: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((sound * 32767).astype("<i2").tobytes())
    return file.getvalue()


def heard(content: bytes, form: str) -> tuple[np.ndarray, int]:
    import soundfile

    if form == "pcm":
        return np.frombuffer(content, "<i2") / 32768, 24_000
    return soundfile.read(io.BytesIO(content))


def pitches(sound: np.ndarray, rate: int) -> list[int]:
    """The strongest frequency of each word."""
    words = np.array_split(sound[: round(len(sound) / rate * 4) * (rate // 4)], max(1, round(len(sound) / rate * 4)))
    return [round(float(np.abs(np.fft.rfft(word, rate)).argmax()), -1) for word in words]


@pytest.mark.parametrize("form", ["wav", "pcm", "mp3", "opus"])
@pytest.mark.parametrize("how", [None, "audio", "sse"])
def test_each_format_is_heard_whole_and_streamed(served: Served, form: str, how: str | None) -> None:
    more = {} if how is None else {"stream_format": how}
    with served.client.audio.speech.with_streaming_response.create(**WANTED, response_format=form, **more) as answer:
        content = b"".join(answer.iter_bytes())
        kind = answer.headers["content-type"]
    if how == "sse":
        assert kind.startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line]
        assert events.pop()["type"] == "speech.audio.done"
        assert len(events) >= (1 if form == "opus" else 2)  # a page of Ogg has up to a second
        assert {event["type"] for event in events} == {"speech.audio.delta"}
        content = b"".join(base64.b64decode(event["audio"]) for event in events)
    sound, rate = heard(content, form)
    assert abs(len(sound) / rate - 0.75) < 0.15
    said = np.concatenate([tone(word) for word in TEXT.split()])
    delay = len(sound) - round(len(said) / RATE * rate)  # of MP3
    assert 0.15 < np.sqrt(np.mean(sound[delay // 2 :] ** 2)) < 0.25
    assert pitches(sound[delay // 2 :], rate) == pytest.approx(pitches(said, RATE), abs=20)


def test_a_whole_wav_file_has_its_length_and_the_samples_of_the_model(served: Served) -> None:
    content = served.client.audio.speech.create(**WANTED, response_format="wav").content
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 3 * PIECE)
    sound, _ = heard(content, "wav")
    assert np.abs(sound - np.concatenate([tone(word) for word in TEXT.split()])).max() <= 1 / 32767


def test_models_and_voices_are_listed(served: Served) -> None:
    client = served.client
    assert [model.id for model in client.models.list()] == ["loud", "plain"]
    assert client.models.retrieve("loud").voices == ["a", "b"]
    names = [voice["id"] for voice in served.get("/v1/audio/voices").json["data"]]
    assert names[:3] == ["a", "b", "only"]
    assert served.get("/v1/models/other").error["code"] == "model_not_found"
    assert served.get("/v1/models/loud/receipt").status == 404  # the stand-in was not tuned


def test_a_voice_may_be_an_object_and_speed_reaches_the_model(served: Served) -> None:
    usual, slow = (served.speak("x", voice={"id": "b"}, speed=speed) for speed in (1.0, 0.5))
    assert np.abs(heard(slow.content, "pcm")[0] * 2 - heard(usual.content, "pcm")[0]).max() < 1e-3


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "tts-9"}, 404, "model"), ({"model": None}, 400, "model"), ({"model": ...}, 400, "model"),
        ({"input": ""}, 400, "input"), ({"input": " \n\t\u2003"}, 400, "input"), ({"input": ...}, 400, "input"),
        ({"input": ["a"]}, 400, "input"), ({"input": "x" * 10_001}, 400, "input"), ({"voice": "zoe"}, 400, "voice"),
        ({"voice": ...}, 400, "voice.str"), ({"voice": "../../etc/passwd"}, 400, "voice"),
        ({"voice": "voice_" + "0" * 24}, 400, "voice"), ({"response_format": "aac"}, 400, "response_format"),
        ({"speed": 0.1}, 400, "speed"), ({"speed": 4.5}, 400, "speed"), ({"speed": "fast"}, 400, "speed"),
        ({"speed": float("nan")}, 400, "speed"), ({"speed": float("inf")}, 400, "speed"),
        ({"stream_format": "smoke"}, 400, "stream_format"), ({"precision": "fast"}, 400, "precision"),
        ({"seed": -1}, 400, "seed"), ({"seed": 2**63}, 400, "seed"), ({"instructions": "sing"}, 400, "instructions"),
        ({"colour": "red"}, 400, "colour"), ({"model": "plain", "voice": "only", "speed": 2}, 400, "speed"),
        ({"input": "REFUSE"}, 400, "input"), ({"input": "NOTHING"}, 400, "input"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(served: Served, change: dict[str, Any], status: int, param: str) -> None:
    body = {key: value for key, value in {**WANTED, **change}.items() if value is not ...}
    answer = served.post(body)
    assert answer.status == status, answer.content
    assert answer.error["type"] == "invalid_request_error"
    assert param.startswith(answer.error["param"].split(".")[0])
    assert served.speak("fine").status == 200


def test_the_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="use loud, plain"):
        served.client.audio.speech.create(**{**WANTED, "model": "other"})
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.audio.speech.create(**{**WANTED, "input": ""})
    assert (caught.value.param, caught.value.code) == ("input", "empty_input")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "loud"', b"[" * 100_000],
    ids=["empty", "opened", "list", "null", "bytes", "cut", "deep"],
)
def test_what_is_no_request_is_refused(served: Served, body: bytes) -> None:
    answer = served.post(body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_a_large_body_is_refused_before_it_is_read(served: Served) -> None:
    assert served.post(b" " * 300_000).status == 413
    connection = served.connection()  # and one that does not say how long it is
    connection.putrequest("POST", "/v1/audio/speech")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(5):
        connection.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "text",
    ["Grüße, Ελλάδα, 東京, مرحبا", "👩‍👩‍👧 \u202eback\u202c", "a\x00b", "a\ud800b", "\u0301", "x" * 10_000],
    ids=["scripts", "marks", "control", "surrogate", "combining", "longest"],
)
def test_any_text_reaches_the_model_as_it_is(served: Served, text: str) -> None:
    sound, _ = heard(served.speak(text, response_format="wav").content, "wav")
    said = np.concatenate([tone(word) for word in text.split()])
    assert np.abs(sound - said).max() <= 1 / 32767


def test_callers_do_not_hear_each_other(served: Served) -> None:
    texts = [f"caller {number} says {'so ' * (number % 4)}" for number in range(24)]
    alone = [served.speak(text).content for text in texts]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda text: served.speak(text, stream_format="audio").content, texts))
    assert together == alone
    assert len(set(alone)) == len(alone)


def test_a_reference_voice_is_checked_kept_and_spoken_with(served: Served) -> None:
    sound = wav(np.tile(tone("me"), 8))
    voice = served.upload(sound, name="Zoë").json
    assert served.upload(sound, name="Zoë").json["id"] == voice["id"], "the same sound is the same voice"
    assert voice in served.get("/v1/audio/voices").json["data"] or voice["name"] == "Zoë"
    assert len(served.speak("x", voice=voice["id"]).content) == 2 * len(served.speak("x").content)
    refused = served.post({"model": "plain", "input": "x", "voice": voice["id"]})
    assert (refused.status, refused.error["param"]) == (400, "voice")
    path = f"/v1/audio/voices/{voice['id']}"
    assert served.request("DELETE", path).json["deleted"]
    assert served.request("DELETE", path).status == 404
    assert served.speak("x", voice=voice["id"]).status == 400


def lying(sound: np.ndarray) -> bytes:
    """A file whose head tells of two hours more than there are."""
    content = bytearray(wav(sound))
    content[40:44] = (0x7FFFFFFE).to_bytes(4, "little")
    return bytes(content)


SECOND = np.tile(tone("me"), 4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no recording"), (b"RIFF", "no recording"), (b"#!/bin/sh\nrm -rf /\n" * 50, "no recording"),
        (np.random.default_rng(0).bytes(50_000), "no recording"), (wav(SECOND[:1000]), "send 1 to 30 s"),
        (wav(SECOND)[:60], "send 1 to 30 s"), (wav(0 * SECOND), "silent"), (wav(np.tile(SECOND, 32)), "more than 30"),
        (wav(SECOND, 1000), "1000 Hz"), (b"\0" * (2**20 + 1), "at most"), (lying(SECOND[:4000]), "send 1 to 30 s"),
        (b"fLaC" + b"\xff" * 1000, "no recording"), (b"OggS" + b"\0" * 1000, "no recording"),
    ],
    ids=["empty", "head", "script", "noise", "short", "cut", "silent", "long", "rate", "large", "lying", "flac", "ogg"],
)  # fmt: skip
def test_hostile_uploads_are_refused(served: Served, content: bytes, says: str) -> None:
    answer = served.upload(content)
    assert answer.status in {400, 413}
    assert says in answer.error["message"], answer.content
    assert served.get("/ready").status == 200


def test_uploads_with_a_wrong_form_are_refused(served: Served) -> None:
    assert served.upload(wav(SECOND), name="a\nb").error["param"] == "name"
    assert served.upload(wav(SECOND), name="").error["param"] == "name"
    assert served.upload(b"\0" * 2**21).status == 413
    assert served.request("POST", "/v1/audio/voices", b"x", content_type="text/plain").error["param"] == "name"
    broken = served.request("POST", "/v1/audio/voices", b"x", content_type="multipart/form-data; boundary=b")
    assert broken.status == 400
    assert broken.error
    names = [voice["id"] for voice in served.get("/v1/audio/voices").json["data"]]
    assert names == ["a", "b", "only"], "nothing is left of any"


def test_unknown_addresses_have_the_errors_form(served: Served) -> None:
    assert (served.get("/v1/other").status, served.get("/v1/other").error["param"]) == (404, None)
    assert served.get("/v1/audio/speech").status == 405
    assert served.get("/v1/audio/speech").error
    assert served.get("/page.py").status == 400


def test_health_and_metrics(served: Served) -> None:
    assert served.get("/health").json == {"status": "alive"}
    before = served.metric("tts_requests_total")
    served.speak(TEXT)
    assert served.metric("tts_requests_total") == before + 1
    until(lambda: served.metric("tts_requests_inside") == 0, "the place is given up after the last byte")
    assert served.metric("tts_worker_memory_bytes") > 2**20
    for name in ("tts_request_seconds", "tts_first_audio_seconds", "tts_real_time_factor", "tts_queue_seconds"):
        assert served.metric(f"{name}_count") > 0


def test_rows_of_shared_steps_are_metrics(served: Served) -> None:
    for _ in range(2):
        served.speak("PASSES one")
    until(lambda: served.metric("accelerate_tts_decode_passes_total") == 20, "the worker's events are counted")
    assert served.metric("accelerate_tts_decode_steps_total") == 40
    assert served.metric("accelerate_tts_decode_rows_total") == 50
    assert served.metric("accelerate_tts_rows_per_pass") == 2.5


def test_first_audio_is_that_of_the_first_bytes_that_were_sent(served: Served) -> None:
    """A whole answer has its first sound with its last; the metric and the header say so."""
    before = served.metric("tts_first_audio_seconds_sum")
    whole = served.speak("one WAIT:0.4 two")
    assert float(whole.headers["x-first-audio-seconds"]) >= 0.4
    until(lambda: served.metric("tts_first_audio_seconds_sum") >= before + 0.4, "it is measured")
    count = served.metric("tts_first_audio_seconds_count")
    with served.open("one UNTIL:heard two", stream_format="audio") as answer:
        assert len(answer.read(100)) == 100
        until(lambda: served.metric("tts_first_audio_seconds_count") == count + 1, "the first bytes count")
        (served.service.options.folder / "heard").touch()
        answer.read()
    assert served.metric("tts_first_audio_seconds_count") == count + 1


class Controls(HTMLParser):
    """Collects what a reader of the screen needs."""

    def __init__(self) -> None:
        super().__init__()
        self.labelled: set[str] = set()
        self.controls: list[dict[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "label":
            self.labelled.add(found.get("for") or "")
        elif tag in {"input", "select", "textarea"}:
            self.controls.append(found)


def test_the_page_is_labelled_and_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = served.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    page = Controls()
    page.feed(answer.content.decode())
    assert page.controls
    assert all(control["id"] in page.labelled for control in page.controls)
    assert ("html", {"lang": "en"}) in page.tags
    assert any("aria-live" in found or found.get("role") == "status" for _, found in page.tags)
    for _, found in page.tags:
        for address in (found.get("src"), found.get("href")):
            assert address is None or not address.startswith(("http", "//"))
            if address is not None and address.startswith("/page"):
                assert served.get(address).status == 200
        assert not any(name.startswith("on") or name == "style" for name in found), "the policy forbids it"
