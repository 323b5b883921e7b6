"""`accelerate-tts tune` and `doctor` on a backend of the user's: VITS at small size, and wrong names of everything."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import struct
import sys
import wave
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from accelerate_tts import Receipt
from accelerate_tts.cli.app import app
from accelerate_tts.cli.backend import BackendError, find, values_of
from accelerate_tts.cli.tune import listening
from accelerate_tts.cli.tune.sound import ASSUMED_RATE, Sound, draw, sound_of
from accelerate_tts.settings import testing
from doubles import is_faster

SERVICE = """
import torch
from accelerate_tts import inference, optimized_model
from transformers import VitsConfig, VitsModel

def small():
    torch.manual_seed(0)
    return VitsModel(VitsConfig(
        vocab_size=38, hidden_size=32, num_hidden_layers=1, ffn_dim=64, flow_size=32, spectrogram_bins=17,
        upsample_initial_channel=32, upsample_rates=[8, 4], upsample_kernel_sizes=[16, 8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], duration_predictor_filter_channels=32, posterior_encoder_num_wavenet_layers=1,
    )).eval()

class Small:
    @optimized_model(warmup="Hello there.")
    def load(self):
        self.model = small()

    @inference
    def synthesize(self, text, speed=1.0):
        self.model.speaking_rate = speed
        return self.model(torch.tensor([[ord(c) % 38 for c in text]])).waveform

class Streaming(Small):
    @inference
    async def stream(self, text, *, language):
        for word in text.split():
            yield Small.synthesize(self, word)

class Several:
    @optimized_model(warmup=lambda b: b.first("Hi."))
    def load(self): self.model = small()
    @inference
    def first(self, text): return self.model(torch.tensor([[1, 2, 3]])).waveform
    @inference
    def second(self, text): return self.first(text)

class Undecorated:
    def load(self): ...
    def synthesize(self, text): ...

class Unspoken:
    @optimized_model
    def load(self): ...

class Broken(Small):
    @optimized_model(warmup="Hi.")
    def load(self): raise OSError("no weights in /models/voice.bin")

class Picky(Small):
    def __init__(self, device): self.device = device

class Loading(Small):
    @optimized_model(warmup="Hi.")
    def load(self, path): self.model = small()

class Empty(Small):
    @optimized_model(warmup="Hi.")
    def load(self): self.model = None

class Training(Small):
    @optimized_model(warmup="Hi.")
    def load(self): self.model = small().train()

class Failing(Small):
    @inference
    def synthesize(self, text):
        if text != "Hello there.": raise KeyError(text)
        return Small.synthesize.__wrapped__(self, text)

class Exiting(Small):
    def __init__(self): raise SystemExit(0)

class LoadExits(Small):
    @optimized_model(warmup="Hi.")
    def load(self): raise SystemExit(0)

class SpeechExits(Small):
    @inference
    def synthesize(self, text):
        if text != "Hello there.": raise SystemExit(0)
        return Small.synthesize.__wrapped__(self, text)

def function(): ...
def __getattr__(name):
    raise AttributeError(name) if name != "Lazy" else OSError("no disk")
"""


@pytest.fixture(autouse=True)
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decide: Any) -> Iterator[None]:
    """The user's module in the current folder; whatever is right counts as faster."""
    (tmp_path / "my_service.py").write_text(SERVICE, encoding="utf-8")
    (tmp_path / "my_broken.py").write_text("import nonesuch_package\n", encoding="utf-8")
    (tmp_path / "my_wrong.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(compare=is_faster)
    yield
    for name in ("my_service", "my_service.backends", "my_broken", "my_wrong"):
        sys.modules.pop(name, None)


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_backend_is_tuned_and_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PACK", "1")
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "packs"))
    page, receipt = tmp_path / "t.html", tmp_path / "r.json"
    said = invoke("tune", "my_service:Small", "--text", "Hello <b>there</b>.", "--pairs", "1", "--html", str(page),
                  "--receipt", str(receipt), "--arg", "speed=0.5")  # fmt: skip
    for words in ("Small.synthesize, untouched against tuned", "warm ratio", "at 16000 Hz", "fold weight norm",
                  "the next process loads the warm pack", "the outputs"):  # fmt: skip
        assert words in said
    assert any(stage.kept for stage in Receipt.from_json(receipt.read_text("utf-8")).stages)
    source = page.read_text("utf-8")
    shown = Page(source)
    sounds = [one["src"] or "" for one in shown.all("audio")]
    assert len(sounds) == 2
    for sound in sounds:
        with wave.open(io.BytesIO(base64.b64decode(sound.removeprefix("data:audio/wav;base64,")))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
            assert file.getnframes() > 4000
            assert any(file.readframes(file.getnframes()))
    assert [one["alt"] for one in shown.all("img")] == ["Spectrogram, untouched", "Spectrogram, tuned"]
    assert len([one for one in shown.all("path") if (one["d"] or "").startswith("M")]) == 2
    assert "Hello <b>there</b>." in shown.text
    # One file, for a phone and in the dark, that runs nothing.
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in shown.tags}
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[\w+/=]+", "", source))
    assert "prefers-color-scheme: dark" in source
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in shown.all("meta")
    again = invoke("tune", "my_service:Small", "--text", "Hello there.", "--pairs", "1", "--arg", "speed=0.5")
    assert "loaded from a warm pack of an earlier process" in again


def test_a_stream_of_a_method_with_other_arguments() -> None:
    words = ("tune", "my_service:Streaming", "--text", "Hello there.", "--pairs", "1", "--method", "stream")
    assert "stream() needs language, too; give --arg language=VALUE" in invoke(*words, code=2)
    said = invoke(*words, "--arg", "language=en")
    assert "Streaming.stream, untouched against tuned" in said
    assert "no warm pack was written: ACCELERATE_TTS_PACK=0; unset it" in said


GUIDE = Path(__file__).parents[2] / "docs" / "INTEGRATION_GUIDE.md"


def test_the_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "project" / "my_service"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    code = SERVICE.replace("class Small:", "class ChatterboxBackend:").replace("(Small)", "(ChatterboxBackend)")
    (package / "backends.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(package.parent)
    section = GUIDE.read_text("utf-8").partition("## From the command line")[2].partition("```console\n")[2]
    commands = section.partition("```")[0].splitlines()
    assert [shlex.split(line)[:2] for line in commands] == [["accelerate-tts", "doctor"], ["accelerate-tts", "tune"]]
    for line in commands:
        invoke(*shlex.split(line)[1:])
    assert "ChatterboxBackend.synthesize" in (package.parent / "tuned.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("my_service", (), "'my_service' names no class; give module:Class, such as"),
        ("my_service:", (), "names no class"),
        ("my_service.py:Small", (), "'my_service.py' is a file; give the name of the module, my_service:Small"),
        ("my_servce:Small", (), "there is no module 'my_servce' in"),
        ("my_service.inner:Small", (), "there is no module"),
        ("my_broken:Small", (), "my_broken cannot be imported: No module named 'nonesuch_package'; install"),
        ("my_wrong:Small", (), "my_wrong cannot be imported: ZeroDivisionError: division by zero; python -c"),
        ("my_service:Smal", (), "my_service has no Smal; did you mean Small?"),
        ("my_service:Other", (), "my_service has no Other; it has Small, Streaming, Several"),
        ("my_service:function", (), "'my_service:function' is a function, not a class"),
        ("my_service:Undecorated", (), "Undecorated has no method decorated with @optimized_model"),
        ("my_service:Unspoken", (), "Unspoken has no method decorated with @inference"),
        ("my_service:Small", ("--load", "start"), "--load start: Small has no @optimized_model method of this"),
        ("my_service:Small", ("--method", "spek"), "Small has no @inference method of this name, but synthesize"),
        ("my_service:Several", (), "any of first, second could speak the text; give --method first"),
        ("my_service:Small", ("--arg", "speed"), "--arg 'speed': write NAME=VALUE"),
        ("my_service:Small", ("--arg", "loud=1"), "Small.synthesize() has no argument loud; it takes text, speed"),
        ("my_service:Small", ("--arg", "text=x", "--arg", "speed=2"), "takes no text beside text, speed"),
        ("my_service:Picky", (), "Picky() needs device, too; give --init device=VALUE"),
        ("my_service:Picky", ("--init", "name=x"), "--init name=x: Picky() has no argument name; it takes device"),
        ("my_service:Loading", (), "Loading.load() needs path; give each a default"),
        ("my_service:Broken", (), "Broken.load() failed: OSError: no weights in /models/voice.bin; python -c"),
        ("my_service:Exiting", (), "Exiting() failed: SystemExit: 0; python -c"),
        ("my_service:LoadExits", (), "LoadExits.load() failed: SystemExit: 0; python -c"),
        ("my_service:SpeechExits", (), "SpeechExits.synthesize('Good day.') failed: SystemExit: 0; mend it"),
        ("my_service:Lazy", (), "my_service:Lazy cannot be read: OSError: no disk; mend that"),
        ("./inner/my_service.py:Small", (), "is a file; give the name of the module, inner.my_service:Small"),
        ("my_service:Empty", (), "Empty.load() was not tuned:"),
        ("my_service:Failing", (), "Failing.synthesize('Good day.') failed: KeyError: 'Good day.'; mend it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_mend(target: str, words: tuple[str, ...], message: str) -> None:
    assert message in invoke("tune", target, "--text", "Good day.", "--pairs", "1", *words, code=2)


def test_files_and_texts_are_checked_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "--text ' ' is empty" in invoke("tune", "my_service:Small", "--text", " ", code=2)
    wrong = str(tmp_path / "no" / "t.html")
    assert "there is no folder" in invoke("tune", "my_service:Small", "--text", "Hi.", "--html", wrong, code=2)
    monkeypatch.setenv("ACCELERATE_TTS_DISABLE", "1")
    assert "unset ACCELERATE_TTS_DISABLE" in invoke("tune", "my_service:Small", "--text", "Hi.", code=2)
    assert "my_service" not in sys.modules


@given(st.text())
@settings(max_examples=50)
def test_any_value_of_an_argument_is_read_or_is_text(text: str) -> None:
    (value,) = values_of([f"name={text}"], "--arg").values()
    if text.isalpha() and text not in {"None", "True", "False"}:
        assert value == text


def test_literals_are_values() -> None:
    given_words = ["a=1", "b=0.5", "c=None", "d=[1, 2]", "e=en", "f=a=b", "g="]
    assert values_of(given_words, "--arg") == {"a": 1, "b": 0.5, "c": None, "d": [1, 2], "e": "en", "f": "a=b", "g": ""}
    with pytest.raises(BackendError, match="--init '=1'"):
        values_of(["=1"], "--init")


# --- the doctor -------------------------------------------------------------------------------------------------------


def findings(*words: str, code: int = 0) -> dict[str, dict[str, str]]:
    result = CliRunner().invoke(app, ["doctor", *words, "--json"])
    assert result.exit_code == code, result.output
    return {finding["name"]: finding for finding in json.loads(result.stdout)}


def test_the_doctor_says_what_will_be_tried_on_a_backend() -> None:
    found = findings("my_service:Small")
    assert found["backend"]["found"] == "Small: load loads; synthesize may speak"
    assert "model.decoder (vocoder)" in found["parts"]["found"]
    assert "fewer operators" in found["stages on model.decoder"]["found"]
    assert found["lost without compiling"]["verdict"] == "warning"  # the fixture switches it off
    assert "torch.compile" in found["lost without compiling"]["found"]
    assert "ACCELERATE_TTS_TORCH_COMPILE" in found["lost without compiling"]["mend"]
    assert "train mode" not in found
    assert ".eval()" in findings("my_service:Training")["train mode"]["mend"]


@pytest.mark.parametrize(
    ("target", "found", "mend"),
    [
        ("my_servce:Small", "there is no module 'my_servce'", "run the command in the folder"),
        ("my_service:Broken", "Broken.load() failed: OSError", "python -c"),
        ("my_service:Empty", "no torch.nn.Module was found", "return the model, or set it on self"),
        ("my_service:Picky", "Picky() needs device", "give --init device=VALUE"),
    ],
)
def test_a_backend_that_cannot_be_examined_is_a_problem(target: str, found: str, mend: str) -> None:
    finding = findings(target, code=1)["backend"]
    assert finding["verdict"] == "problem"
    assert found in finding["found"]
    assert mend in finding["mend"]


# --- sounds -----------------------------------------------------------------------------------------------------------

TONE = torch.sin(torch.arange(8000) * 2 * math.pi * 1000 / 8000)


class Rated:
    def __init__(self, **facts: Any) -> None:
        vars(self).update(facts)


@pytest.mark.parametrize(
    ("output", "backend", "rate"),
    [
        (TONE, Rated(sampling_rate=8000), 8000),
        ((8000, TONE.numpy()), Rated(), 8000),
        ({"wav": TONE[None], "sample_rate": 8000}, Rated(sr=16000), 8000),
        (TONE.view(1, 1, -1), Rated(model=Rated(config=Rated(audio=Rated(output_sample_rate=8000)))), 8000),
        ((TONE * 32767).to(torch.int16), Rated(model=Rated(sr=8000)), 8000),
        ([TONE[:4000], TONE[4000:].numpy()], Rated(), None),
        ([(8000, TONE[:4000].numpy()), (8000, TONE[4000:].numpy())], Rated(), 8000),
        ((torch.ones(80, 300), TONE), Rated(), None),
        (TONE.tolist(), Rated(sr="loud"), None),
        (torch.stack([TONE, 0.5 * TONE], -1).numpy(), Rated(), None),
        (Sound(TONE, 8000).wav(), Rated(), 8000),
        (io.BytesIO(Sound(TONE, 8000).wav()), Rated(), 8000),
        (Sound(TONE, 8000).wav()[44:], Rated(), None),
        (TONE.numpy().tobytes(), Rated(), None),
        (
            [Sound(TONE, 8000).wav()[:44], *(Sound(TONE, 8000).wav()[44:][i : i + 999] for i in range(0, 16_000, 999))],
            Rated(),
            8000,
        ),
        (Rated(audio=TONE, sample_rate=8000), Rated(), 8000),
        ((Rated(audio=TONE), np.int64(8000)), Rated(), 8000),
        (TONE, Rated(sr=8000.0), 8000),
    ],
    ids=[
        "attribute",
        "tuple",
        "mapping",
        "configuration",
        "16 bits",
        "stream",
        "pieces with a rate",
        "beside a spectrogram",
        "list",
        "channels last",
        "file",
        "file in memory",
        "bytes",
        "bytes of floats",
        "stream of a file",
        "object",
        "NumPy's rate",
        "librosa's rate",
    ],
)
def test_a_sound_is_found_in_what_backends_return(output: Any, backend: Any, rate: int | None) -> None:
    sound = sound_of(output, backend)
    assert sound is not None
    assert (sound.rate, sound.assumed) == (rate or ASSUMED_RATE, rate is None)
    torch.testing.assert_close(sound.samples, TONE, atol=1e-4, rtol=0.0)
    given_rate = sound_of(output, backend, 11025)
    assert given_rate is not None
    assert given_rate.rate == 11025


@pytest.mark.parametrize("output", [None, "text", torch.ones(3), torch.ones(4000, dtype=torch.int64), []])
def test_what_is_no_sound(output: Any) -> None:
    assert sound_of(output, Rated()) is None


def test_a_sound_that_is_none_by_itself_is_told() -> None:
    assert Sound(TONE, 8000).fault == ""
    assert Sound(torch.zeros(300), 8000).fault == "is silent"
    assert "NaN" in Sound(torch.cat([TONE, torch.tensor([math.nan])]), 8000).fault


def test_a_spectrogram_shows_the_tone_and_where_it_ends() -> None:
    both = draw([Sound(TONE, 8000), Sound(TONE[:4000] * 0.5, 8000)])
    images = [base64.b64decode(one.spectrogram.removeprefix("data:image/png;base64,")) for one in both]
    shapes = {struct.unpack(">II", image[16:24]) for image in images}
    ((width, height),) = shapes
    for image, loudest, ends in zip(images, (255, 236), (1.0, 0.5), strict=True):
        start = image.index(b"IDAT")
        size = int.from_bytes(image[start - 4 : start], "big")
        rows = torch.tensor(list(zlib.decompress(image[start + 4 : start + 4 + size]))).view(height, width + 1)[:, 1:]
        middle = rows[:, int(width * ends / 2)]
        assert int(middle.argmax()) == pytest.approx(height * 3 / 4, abs=2)  # 1 kHz of 4, from below
        assert int(middle.max()) == pytest.approx(loudest, abs=3)
        assert (int(rows[:, -3].max()) > 0) == (ends == 1.0)
    ends_of_waves = [max(float(x) for x in re.findall(r"[ML](\d+) ", one.wave)) for one in both]
    assert ends_of_waves == [pytest.approx(1000, abs=5), pytest.approx(500, abs=5)]


def test_odd_sounds_are_drawn() -> None:
    odd = [torch.zeros(300), torch.full((300,), math.nan), torch.full((300,), 1e30), TONE[:257]]
    for sound in draw([Sound(samples, 8000) for samples in odd]):
        assert "nan" not in sound.wave
    assert draw([Sound(torch.zeros(61 * 8000), 8000)])[0].cut


@pytest.mark.slow
def test_both_sounds_are_judged_and_the_receipt_says_so(tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("resemblyzer")
    words = ("tune", "my_service:Small", "--text", "Good morning to you.", "--pairs", "1", "--receipt", "kept.json")
    said = invoke(*words, "--word-error-limit", "1.0")
    assert "word error" in said
    assert "speaker similarity" in said
    notes = Receipt.from_json((tmp_path / "kept.json").read_text("utf-8")).notes
    (note,) = [note for note in notes if note.startswith("judged by")]
    assert "on a text of 4 words" in note


@pytest.mark.parametrize(("option", "limit", "code"), [
    ("--similarity-limit", "0.95", 2), ("--similarity-limit", "0.85", 0), ("--word-error-limit", "0.05", 2),
    ("--word-error-limit", "0.15", 0),
])  # fmt: skip
def test_a_sound_beyond_a_limit_fails_the_command(
    option: str, limit: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judges are left out: their packages have tests of their own."""
    monkeypatch.setattr(listening, "check_installed", lambda: None)
    monkeypatch.setattr(listening, "judge", lambda *_sounds: listening.Judgement(0.1, 0.2, 0.9, 4))
    monkeypatch.setattr(listening.Judgement, "note", "judged by nobody")
    said = invoke("tune", "my_service:Small", "--text", "Hello there.", "--pairs", "1", option, limit, code=code)
    assert "judged by nobody" in said  # the figures are printed all the same
    assert ("use a stricter precision" in said) is (code == 2)


@pytest.mark.parametrize("exits", [False, True])
def test_what_an_async_backend_begins_goes_on_between_its_calls(
    exits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "batching_service.py").write_text(
        """
import asyncio, sys
from accelerate_tts import inference, optimized_model

class Batching:
    @optimized_model
    async def load(self):
        self.queue = asyncio.Queue()
        self.worker = asyncio.create_task(self.serve())

    async def serve(self):
        while True:
            text, answer = await self.queue.get()
            answer.set_result(text.upper())

    @inference
    async def speak(self, text):
        if text == "exit":
            sys.exit(1)
        answer = asyncio.get_running_loop().create_future()
        await self.queue.put((text, answer))
        return await asyncio.wait_for(answer, 60)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    backend = find("batching_service:Batching")
    made = backend.made({})
    with testing():
        backend.loaded(made)
        if exits:
            with pytest.raises(BackendError, match="SystemExit"):
                backend.call(made, "speak", "exit", {})()
        assert [backend.call(made, "speak", text, {})() for text in ("one", "two")] == ["ONE", "TWO"]
