"""The two speaker encoders, at full size: they are small. resemblyzer's has its real weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accelerate_tts import Event, optimized_model
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.optimizer import get_performance_optimizer

if TYPE_CHECKING:
    import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # webrtcvad's import of pkg_resources
    import resemblyzer
    from chatterbox.models import voice_encoder

PARTS = [("VoiceEncoder", "encoder")]
MELS = torch.rand(2, 160, 40, generator=torch.Generator().manual_seed(0))


def test_contract_of_resemblyzer(contract: Any) -> None:
    make = lambda: resemblyzer.VoiceEncoder("cpu", verbose=False).eval()  # noqa: E731
    wave = np.random.default_rng(0).normal(0, 0.1, 30_000).astype(np.float32)
    contract(make, lambda encoder: torch.from_numpy(encoder.embed_utterance(wave)), PARTS)


def test_contract_of_chatterbox(contract: Any) -> None:
    speak = lambda encoder: encoder.inference(MELS, [160, 160])  # noqa: E731
    contract(lambda: voice_encoder.VoiceEncoder().eval(), speak, PARTS)


def test_an_embedding_that_turns_away_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever "fast" tries on the real weights, what is kept still says who speaks."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    plain, tuned = (resemblyzer.VoiceEncoder("cpu", verbose=False).eval() for _ in range(2))
    optimized_model(warmup=MELS, precision="fast", tune_seconds=10.0)(lambda: tuned)()
    receipt = get_performance_optimizer().receipt(tuned)
    assert receipt is not None
    assert all(stage.error is None or stage.error <= 4e-2 for stage in receipt.kept)
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(plain(MELS), tuned(MELS))
    assert cosine.min() > 0.99


def test_another_class_of_that_name_is_said(seen: list[Event]) -> None:
    class VoiceEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(2, 2)

    assert [part.kind for part in describe(VoiceEncoder()).parts] == ["model"]
    assert any(isinstance(event, NotApplied) and "has no lstm, linear" in event.reason for event in seen)
