"""The two speaker encoders, at full size: they are small. resemblyzer's has its real weights."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from accelerate_tts import Event, optimized_model
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.stages.compile.whole import CompileStage
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import tune

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # webrtcvad's import of pkg_resources
    resemblyzer = pytest.importorskip("resemblyzer")

PARTS = [("VoiceEncoder", "encoder")]
MELS = torch.rand(2, 160, 40, generator=torch.Generator().manual_seed(0))


def test_contract_of_resemblyzer(contract: Any) -> None:
    make = lambda: resemblyzer.VoiceEncoder("cpu", verbose=False).eval()  # noqa: E731
    wave = np.random.default_rng(0).normal(0, 0.1, 50_000).astype(np.float32)
    speak = lambda encoder: torch.from_numpy(encoder.embed_utterance(wave[:30_000]))  # noqa: E731
    contract(make, speak, PARTS, lambda encoder: torch.from_numpy(encoder.embed_utterance(wave)))


def test_contract_of_chatterbox(contract: Any) -> None:
    voice_encoder = pytest.importorskip("chatterbox.models.voice_encoder")
    speak, other = (lambda encoder, mels=mels: encoder.inference(mels, [160, 160]) for mels in (MELS, MELS.cumsum(2)))
    contract(lambda: voice_encoder.VoiceEncoder().eval(), speak, PARTS, other)


def test_an_embedding_that_turns_away_is_refused(clockless: None) -> None:
    """Whatever "fast" keeps on the real weights, the embeddings still identify the speaker."""
    plain, tuned = (resemblyzer.VoiceEncoder("cpu", verbose=False).eval() for _ in range(2))
    optimized_model(warmup=MELS, precision="fast")(lambda: tuned)()
    receipt = get_performance_optimizer().receipt(tuned)
    assert receipt is not None
    assert all(stage.error is None or stage.error <= 4e-2 for stage in receipt.kept)
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(plain(MELS), tuned(MELS))
    assert cosine.min() > 0.99


def test_compiling_it_is_refused(clockless: None) -> None:
    """dynamo silently skips recurrent layers: there is no graph, so no length needs another one."""
    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False).eval()
    calls = warmup_calls(MELS, Loaded(encoder), "inference")
    tuning = tune(describe(encoder), calls, [CompileStage("default")], DeviceInfo("cpu", "test"), Limits(300.0))
    assert [stage.reason for stage in tuning.receipt.stages] == ["compiled no graph"]
    assert encoder._compiled_call_impl is None


def test_another_class_of_that_name_is_said(seen: list[Event]) -> None:
    class VoiceEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(2, 2)

    assert [part.kind for part in describe(VoiceEncoder()).parts] == ["model"]
    assert any(isinstance(event, NotApplied) and "has no lstm, linear" in event.reason for event in seen)
