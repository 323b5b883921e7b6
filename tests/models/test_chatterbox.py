"""Chatterbox's own classes at small size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe

TEXT = "Hello there. Bye."
PARTS = [("t3.tfmr", "decoder"), ("s3gen.flow.encoder", "encoder"), ("s3gen.flow.decoder", "estimator")]


def speak(model: Any) -> torch.Tensor:
    return model.generate(TEXT)


def without_encoder(model: Any) -> Any:
    """`generate` never runs the speaker encoder; here it is no part of what is loaded."""
    model.ve = None
    return model


def test_contract(contract: Any, example: Any) -> None:
    random = example("chatterbox_backend").random
    contract(lambda: without_encoder(random(seconds=0.4, tiny=True)), speak, PARTS)


def test_the_speaker_encoder_is_a_part_of_its_own(example: Any) -> None:
    model = example("chatterbox_backend").random(tiny=True)
    assert [(part.name, part.kind) for part in describe(model).parts] == [*PARTS, ("ve", "encoder")]


def test_sentence_by_sentence_is_the_whole(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "2")
    module = example("chatterbox_backend")
    backend = module.ChatterboxBackend(lambda: without_encoder(module.random(seconds=0.4, tiny=True)))
    asyncio.run(backend.initialize())
    torch.manual_seed(3)
    whole = backend.synthesize(TEXT)
    torch.manual_seed(3)
    pieces = list(backend.stream(TEXT))
    assert len(pieces) == 2
    assert torch.equal(torch.cat(pieces, dim=-1), whole)


@pytest.mark.parametrize(("part", "lost"), [("t3", "tfmr"), ("s3gen", "mel2wav")])
def test_a_release_of_another_shape_is_said(example: Any, seen: list[Event], part: str, lost: str) -> None:
    model = without_encoder(example("chatterbox_backend").random(tiny=True))
    delattr(getattr(model, part), lost)
    assert part in [found.name for found in describe(model).parts if found.kind == "model"]
    reasons = [event.reason for event in seen if isinstance(event, NotApplied)]
    assert any(f"has no {lost}" in reason and "chatterbox-light 1.0" in reason for reason in reasons)
