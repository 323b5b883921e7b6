"""XTTS's own classes at small size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate_tts import Event, optimized_model, receipt_of
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.tuning.compare import compare

PARTS = [
    ("model.gpt.gpt", "decoder"), ("model.hifigan_decoder.waveform_decoder", "vocoder"), ("model.gpt.mel_head", "head"),
]  # fmt: skip


class Speaking:
    """The example's model and voice, without a decorator."""

    def __init__(self, loaded: Any) -> None:
        self.model, self.latents, self.speaker = loaded

    def whole(self) -> torch.Tensor:
        return torch.from_numpy(self.model.inference("Hello.", "en", self.latents, self.speaker)["wav"])

    def streamed(self, chunk: int = 3) -> list[torch.Tensor]:
        return list(self.model.inference_stream("Hello.", "en", self.latents, self.speaker, stream_chunk_size=chunk))


@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_contract(contract: Any, example: Any, way: str) -> None:
    """The stream is compared with the untouched stream, since upstream cross-fades it and it differs from the whole."""
    random = example("xtts_backend").random
    right = [("model.gpt.gpt", "growing cache")]
    contract(lambda: Speaking(random(0.3, tiny=True)), lambda speaking: getattr(speaking, way)(), PARTS, None, right)


def test_the_stream_is_the_whole(example: Any, only_growing: None) -> None:
    """A single piece is equal to rounding; several pieces have the same length and differ at upstream's seams only."""

    def seeded(way: Any) -> Any:
        torch.manual_seed(3)
        with torch.inference_mode():
            return way()

    torch.manual_seed(0)
    speaking = Speaking(example("xtts_backend").random(0.6, tiny=True))
    (untouched,) = seeded(lambda: speaking.streamed(1000))
    receipt = receipt_of(optimized_model(warmup=Speaking.whole)(lambda: speaking)())
    assert receipt is not None
    assert [stage.stage for stage in receipt.kept] == ["growing cache"]

    whole = seeded(speaking.whole)
    (piece,) = seeded(lambda: speaking.streamed(1000))
    assert piece.shape == untouched.shape
    assert len(whole) - len(piece) in {0, 1024}, "coqui-tts 0.27's stream leaves the last token out"
    whole = whole[: len(piece)]
    assert compare(whole, piece).error <= EXACT_TOLERANCE
    pieces = seeded(lambda: speaking.streamed(4))
    assert len(pieces) > 2
    together = torch.cat(pieces)
    assert together.shape == whole.shape
    assert compare(whole, together).error <= 0.02


@pytest.mark.slow
def test_fifty_sentences(steady: Any, example: Any) -> None:
    """The graphs are those of inductor."""
    random = example("xtts_backend").random

    def spoken(speaking: Speaking, text: str) -> torch.Tensor:
        speaking.model.gpt.max_gen_mel_tokens = 8 + len(text) // 2
        return torch.from_numpy(speaking.model.inference(text, "en", speaking.latents, speaking.speaker)["wav"])

    steady(lambda: Speaking(random(tiny=True)), {"model.gpt.gpt": CompiledBlocksStage("default")}, spoken)


def test_a_release_of_another_shape_is_said(example: Any, seen: list[Event]) -> None:
    model = example("xtts_backend").random(tiny=True).model
    del model.hifigan_decoder.waveform_decoder
    assert [part.kind for part in describe(model).parts] == ["model"]
    reasons = [event.reason for event in seen if isinstance(event, NotApplied)]
    assert any("Xtts has no hifigan_decoder.waveform_decoder" in reason and "0.28" in reason for reason in reasons)
