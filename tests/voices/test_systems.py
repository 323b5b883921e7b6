"""`@cached_embedding` on the real resemblyzer, and on Chatterbox's and XTTS's own methods and classes."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from accelerate_tts import Event, cached_embedding
from accelerate_tts.events import NotApplied, PackIgnored

if TYPE_CHECKING:
    from torch import nn


def speech() -> list[Path]:
    s3tokenizer = pytest.importorskip("s3tokenizer")
    return sorted(Path(s3tokenizer.__file__).parent.rglob("*.wav"))


@pytest.fixture(scope="module")
def resemblyzer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webrtcvad's import of pkg_resources
        return pytest.importorskip("resemblyzer")


def test_resemblyzer_with_its_real_weights(resemblyzer: Any) -> None:
    import soundfile

    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    embed = cached_embedding(encoder.embed_utterance)
    one, two = (soundfile.read(path, dtype="float32")[0] for path in speech())
    first, second = embed(one), embed(two)
    assert np.array_equal(first, encoder.embed_utterance(one))
    first_again, second_again = embed(one.copy()), embed(two)
    assert np.array_equal(first, first_again)
    assert np.array_equal(second, second_again)
    assert embed.cache_info().misses == 2
    assert embed(one, return_partials=True)[0].shape == (256,)
    with torch.no_grad():
        encoder.linear.weight.mul_(-1)
    assert not np.array_equal(embed(one), first)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module


@pytest.fixture
def chatterbox(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes Chatterbox's own classes, those that listen to a reference, too; the tokenizer of speech has one layer."""
    from chatterbox.models.s3tokenizer import S3Tokenizer
    from s3tokenizer import model_v2

    small = model_v2.ModelConfig(n_audio_state=64, n_audio_head=1, n_audio_layer=1)
    monkeypatch.setattr(model_v2.S3TokenizerV2.__init__, "__defaults__", (small,))

    def make() -> Any:
        torch.manual_seed(0)
        model = example("chatterbox_backend").random(seconds=0.2, tiny=True)
        model.s3gen.tokenizer = S3Tokenizer("speech_tokenizer_v2_25hz").eval()
        return model

    return make


@pytest.fixture
def xtts(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes XTTS's own classes. Only its reader of files is another: torchaudio's needs FFmpeg's libraries."""
    import soundfile

    pytest.importorskip("TTS", reason="coqui-tts is not installed")
    module = example("xtts_backend")
    read = lambda path, _rate: torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]  # noqa: E731
    monkeypatch.setattr(module.xtts, "load_audio", read)

    def make() -> Any:
        torch.manual_seed(0)
        return module.random(0.3, tiny=True).model

    return make


def counting(*encoders: nn.Module) -> Counter[str]:
    """Counts what runs inside of each of these encoders: that is where the time of a voice goes."""
    runs: Counter[str] = Counter()
    for name, encoder in ((type(encoder).__name__, encoder) for encoder in encoders):
        for inner in encoder.modules():  # some are not called as modules themselves
            inner.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    return runs


def listening(model: Any) -> list[nn.Module]:
    return [model.ve, model.s3gen.tokenizer, model.s3gen.speaker_encoder]


def same(first: Any, second: Any) -> bool:
    """Check that two of Chatterbox's voices are equal, to the bit and to the class."""
    one, two = ({**vars(voice.t3), **voice.gen} for voice in (first, second))
    equal = [torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one]
    return type(first) is type(second) and type(first.t3) is type(second.t3) and list(one) == list(two) and all(equal)


def test_chatterbox_s_own_method_sets_the_conditionals(chatterbox: Callable[[], Any]) -> None:
    model = chatterbox()
    runs = counting(*listening(model))
    model.prepare_conditionals = cached_embedding(sets=("conds",))(model.prepare_conditionals)
    one, two = speech()
    model.prepare_conditionals(one, exaggeration=0.7)
    first, once = copy.deepcopy(model.conds), sum(runs.values())
    assert set(runs) == {"VoiceEncoder", "S3Tokenizer", "CAMPPlus"}
    model.conds.t3.speaker_emb.zero_()  # as `generate` may do
    model.conds.gen.clear()
    runs.clear()
    model.prepare_conditionals(str(one), exaggeration=0.7)
    assert not runs, "a voice that is known costs no call of an encoder"
    assert same(model.conds, first)
    assert model.conds.t3.emotion_adv.item() == pytest.approx(0.7)
    assert not model.conds.gen["embedding"].is_inference()
    assert model.generate("Bye.").numel() > 0
    for path, exaggeration in ((two, 0.7), (one, 0.2)):
        runs.clear()
        model.prepare_conditionals(str(path), exaggeration=exaggeration)
        assert sum(runs.values()) == once
    assert not same(model.conds, first)


def test_chatterbox_s_voice_is_there_in_the_next_process(
    chatterbox: Callable[[], Any], tmp_path: Path, seen: list[Event]
) -> None:
    """The results are dataclasses of the encoder's package, whichever object has the method."""

    class Service:
        def __init__(self) -> None:
            self.model = chatterbox()

        @cached_embedding(folder=tmp_path)
        def voice(self, path: Path) -> Any:
            self.model.prepare_conditionals(path)
            return self.model.conds

    one, _ = speech()

    def prepared() -> tuple[Any, int]:
        service = Service()
        Service.voice.cache_clear()
        runs = counting(*listening(service.model))
        return service.voice(one), sum(runs.values())

    (first, cost), (second, again) = prepared(), prepared()
    assert cost > 0
    assert again == 0
    assert same(first, second)
    assert not [event for event in seen if isinstance(event, (NotApplied, PackIgnored))]


def test_xtts_s_own_method_with_a_list_of_paths(xtts: Callable[[], Any], tmp_path: Path) -> None:
    model = xtts()
    runs = counting(model.hifigan_decoder.speaker_encoder, model.gpt.conditioning_encoder)
    one, two = map(str, speech())
    expected = model.get_conditioning_latents(audio_path=[one, two])
    assert set(runs) == {"ResNetSpeakerEncoder", "ConditioningEncoder"}
    voice = cached_embedding(folder=tmp_path)(model.get_conditioning_latents)
    ran = []
    for paths in ([one, two], [two, one], [one], [one, two]):
        runs.clear()
        latents = voice(audio_path=paths)
        ran.append(sum(runs.values()))
    assert all(ran[:3])
    assert ran[3] == 0
    assert all(map(torch.equal, latents, expected))
    assert not latents[1].is_inference()
    runs.clear()
    stored = cached_embedding(folder=tmp_path)(model.get_conditioning_latents)(audio_path=[one, two])
    assert not runs
    assert all(map(torch.equal, stored, expected))
    with torch.no_grad():
        model.gpt.conditioning_encoder.init.weight.mul_(2)
    assert not torch.equal(voice(audio_path=[one, two])[0], expected[0])


@pytest.mark.parametrize("name", ["chatterbox", "xtts"])
def test_the_examples_hear_a_voice_once(
    name: str, request: pytest.FixtureRequest, example: Callable[[str], ModuleType]
) -> None:
    model = request.getfixturevalue(name)()
    module = example(f"{name}_backend")
    backend = (module.ChatterboxBackend if name == "chatterbox" else module.XTTSBackend)(lambda: model)
    backend.model = model
    type(backend).voice.cache_clear()
    runs = counting(*(listening(model) if name == "chatterbox" else [model.hifigan_decoder.speaker_encoder]))
    voices, ran = [], []
    for path in (*speech(), speech()[0]):
        runs.clear()
        backend.speak_as(path)
        ran.append(sum(runs.values()))
        voices.append(model.conds.t3.speaker_emb if name == "chatterbox" else backend.speaker)
    assert ran[0] > 0
    assert ran[1] > 0
    assert ran[2] == 0
    assert torch.equal(voices[0], voices[2])
    assert not torch.equal(voices[0], voices[1])
    assert backend.synthesize("Bye.").numel() > 0
