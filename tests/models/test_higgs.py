"""Higgs Audio's own classes at small size, and a stand-in for those of boson-multimodal, which has no release."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompileStage


class Speaking:
    """The example's model and codec, without a decorator."""

    def __init__(self, loaded: Any) -> None:
        self.model, self.codec, self.prepare, self.decode = loaded

    def whole(self, text: str = "Hello.", frames: int = 14) -> torch.Tensor:
        return self.decode(self.model.generate(**self.prepare(text), max_new_tokens=frames, do_sample=True))

    def other(self) -> torch.Tensor:
        return self.whole("A longer sentence, for the other thread.", 20)


def test_contract(contract: Any, example: Any) -> None:
    random = example("higgs_backend").random
    parts = [("model.model", "decoder"), ("model.audio_lm_head", "head"), ("codec.acoustic_decoder", "vocoder")]
    right = [("model.model", "growing cache")]
    contract(lambda: Speaking(random(tiny=True)), Speaking.whole, parts, Speaking.other, right)


@pytest.mark.slow
def test_fifty_sentences(steady: Any, example: Any) -> None:
    random = example("higgs_backend").random

    def spoken(speaking: Speaking, text: str) -> torch.Tensor:
        return speaking.whole(text, 10 + len(text) // 2)

    stages = {"model.model": CompiledBlocksStage("default"), "codec.acoustic_decoder": CompileStage("default")}
    steady(lambda: Speaking(random(tiny=True)), stages, spoken, traced=True)


def test_a_release_of_another_shape_is_said(example: Any, seen: list[Event]) -> None:
    model = example("higgs_backend").random(tiny=True).model
    del model.audio_lm_head
    assert [part.kind for part in describe(model).parts] == ["model"]
    reasons = [event.reason for event in seen if isinstance(event, NotApplied)]
    assert any("has no audio_lm_head" in reason and "5.24" in reason for reason in reasons)


def test_a_release_that_does_not_say_its_codebooks_is_said(example: Any, seen: list[Event]) -> None:
    model = example("higgs_backend").random(tiny=True).model
    vars(model.config)["num_codebooks"] = None  # which it would not let anybody write
    assert [part.kind for part in describe(model).parts] == ["model"]
    assert any("has no config.num_codebooks" in event.reason for event in seen if isinstance(event, NotApplied))


class HiggsAudioModel(nn.Module):
    """Stand-in with the names of boson-multimodal 0.1.1; `make releases` builds the true class."""

    def __init__(self, proj: str = "audio_decoder_proj") -> None:
        super().__init__()
        self.audio_num_codebooks = 8
        self.embed_tokens = nn.Embedding(4, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        heads = {"text_lm_head": nn.Linear(2, 4), "audio_lm_head": nn.Linear(2, 8 * 5)}
        setattr(self, proj, nn.ModuleDict(heads))


def test_the_original_is_known_by_name(seen: list[Event]) -> None:
    model = HiggsAudioModel()
    (part,) = describe(model).parts
    assert (part.name, part.kind, part.module) == ("HiggsAudioModel", "decoder", model)
    assert part.head is not None
    assert part.head.reads_alone
    assert part.head(torch.ones(1, 3, 2)).shape == (1, 3, 8, 5)
    assert seen == []
    assert [part.kind for part in describe(HiggsAudioModel("projector")).parts] == ["model"]
    assert any("audio_decoder_proj.audio_lm_head" in event.reason for event in seen if isinstance(event, NotApplied))
