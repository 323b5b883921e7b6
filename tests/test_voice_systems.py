"""`@cached_embedding` on the real resemblyzer, on Chatterbox's own method and classes, and on XTTS's signature."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accelerate_tts import cached_embedding


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


def test_chatterbox_s_own_method_sets_the_conditionals(resemblyzer: Any) -> None:
    tts = pytest.importorskip("chatterbox.tts")
    from types import SimpleNamespace

    class Generator(nn.Module):
        """In place of the 1 GB S3Gen: what `prepare_conditionals` asks of it."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.tokenizer = SimpleNamespace(forward=lambda waves, max_len: (torch.arange(max_len)[None], None))
            self.calls = 0

        @torch.inference_mode()
        def embed_ref(self, wave: Any, _rate: int, device: str) -> dict[str, Any]:
            self.calls += 1
            return {"embedding": torch.from_numpy(wave[:80].copy()).to(device) * self.scale, "prompt_feat_len": None}

    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    voices = SimpleNamespace(
        encoder=encoder,
        embeds_from_wavs=lambda waves, sample_rate: np.stack([encoder.embed_utterance(wave) for wave in waves]),
    )
    t3 = nn.Linear(1, 1)
    t3.hp = SimpleNamespace(speech_cond_prompt_len=150)  # type: ignore[assignment]
    model = tts.ChatterboxTTS(t3, Generator(), voices, None, "cpu")
    model.prepare_conditionals = cached_embedding(sets=("conds",))(model.prepare_conditionals)

    one, two = speech()
    model.prepare_conditionals(one, exaggeration=0.7)
    first = copy.deepcopy(model.conds)
    assert isinstance(model.conds, tts.Conditionals)
    model.conds.t3.speaker_emb.zero_()  # as `generate` may do
    model.conds.gen.clear()
    model.prepare_conditionals(str(two), exaggeration=0.7)
    model.prepare_conditionals(str(one), exaggeration=0.7)
    assert model.s3gen.calls == 2
    assert torch.equal(model.conds.t3.speaker_emb, first.t3.speaker_emb)
    assert torch.equal(model.conds.t3.cond_prompt_speech_tokens, first.t3.cond_prompt_speech_tokens)
    assert torch.equal(model.conds.gen["embedding"], first.gen["embedding"])
    assert model.conds.t3.emotion_adv.item() == pytest.approx(0.7)
    assert not model.conds.gen["embedding"].is_inference()
    model.prepare_conditionals(str(one), exaggeration=0.2)
    assert model.s3gen.calls == 3


def test_xtts_s_method_with_a_list_of_paths() -> None:
    import soundfile

    class Xtts(nn.Module):
        """XTTS's method by its signature: the real model is 2 GB."""

        def __init__(self) -> None:
            super().__init__()
            self.hifigan_decoder = nn.Linear(160, 8)
            self.calls = 0

        @cached_embedding
        @torch.inference_mode()
        def get_conditioning_latents(
            self, audio_path: Any, max_ref_length: int = 30, librosa_trim_db: float | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.calls += 1
            waves = [torch.from_numpy(soundfile.read(path, dtype="float32")[0][:160]) for path in audio_path]
            latent = self.hifigan_decoder(torch.stack(waves)).mean(0)
            return latent[None, None], latent[None, :, None]

    model = Xtts()
    one, two = map(str, speech())
    latents = [
        model.get_conditioning_latents(audio_path=paths) for paths in ([one, two], [two, one], [one], [one, two])
    ]
    assert model.calls == 3
    assert torch.equal(latents[0][0], latents[3][0])
    assert not latents[3][1].is_inference()
