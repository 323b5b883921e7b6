"""Chatterbox's own classes at small size."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from accelerate_tts import Event, receipt_of
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe
from accelerate_tts.stages.compile.regional import CompiledBlocksStage

TEXT = "Hello there. Bye."
PARTS = [
    ("t3.tfmr", "decoder"),
    ("t3.speech_head", "head"),
    ("s3gen.flow.encoder", "encoder"),
    ("s3gen.flow.decoder.estimator", "estimator"),
    ("s3gen.mel2wav", "vocoder"),
]


# chatterbox-tts marks what it says by a network of another package; chatterbox-light does not.
MARKER = [("watermarker.perth_net", "model")] if find_spec("perth") else []
VARIANTS = ["english", "multilingual", "turbo"]


def speak(model: Any, text: str = TEXT) -> torch.Tensor:
    told = {"language_id": "en"} if "Multilingual" in type(model).__name__ else {}
    return model.generate(text, **told)


def without_encoder(model: Any) -> Any:
    """`generate` never runs the speaker encoder; here it is no part of what is loaded."""
    model.ve = None
    return model


def other(model: Any) -> torch.Tensor:
    return speak(model, "A longer sentence, for the other thread.")


@pytest.mark.parametrize(
    "variant", [pytest.param(one, marks=[pytest.mark.slow] * (one != "english")) for one in VARIANTS]
)
def test_contract(contract: Any, example: Any, variant: str) -> None:
    module = example("chatterbox_backend")
    pytest.importorskip(module.VARIANTS[variant][0], reason=f"this release of Chatterbox has no {variant} model")
    random = module.random
    right = [("t3.tfmr", "growing cache")]
    make = lambda: without_encoder(random(seconds=0.3, tiny=True, variant=variant))  # noqa: E731
    contract(
        make, speak, [*PARTS, *MARKER], other, right,
        # The alignment analyzer of each call of the multilingual model hears the attention layers of all calls:
        # two threads stack rows of two texts, untouched too.
        threads=variant != "multilingual",
    )  # fmt: skip


@pytest.mark.slow
def test_fifty_sentences(steady: Any, example: Any) -> None:
    """From letters to samples: T3's steps, S3Gen's encoder and flow, and the vocoder. Turbo has the fewest of each."""
    module = example("chatterbox_backend")
    blocks = CompiledBlocksStage("default")
    turbo = find_spec("chatterbox.tts_turbo") is not None  # since chatterbox-tts 0.1.6
    variant, method, limit = (
        ("turbo", "inference_turbo", "max_gen_len") if turbo else ("english", "inference", "max_new_tokens")
    )

    def spoken(model: Any, text: str) -> torch.Tensor:
        limited = module.at_most(getattr(module.T3, method), **{limit: 3 + len(text) // 2})
        setattr(model.t3, method, lambda *args, **given: limited(model.t3, *args, **given))
        return model.generate(text)

    make = lambda: without_encoder(module.random(tiny=True, variant=variant))  # noqa: E731
    # The loop of releases without turbo has caches that are tuples, with which blocks are not compiled.
    parts = [name for name, kind in PARTS if kind != "head" and (turbo or kind != "decoder")]
    steady(make, dict.fromkeys(parts, blocks), spoken, traced=True)


def test_the_speaker_encoder_is_a_part_of_its_own(example: Any) -> None:
    model = example("chatterbox_backend").random(tiny=True)
    assert [(part.name, part.kind) for part in describe(model).parts] == [*PARTS, ("ve", "encoder"), *MARKER]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sentence_by_sentence_is_the_whole(example: Any, only_growing: None, variant: str) -> None:
    import asyncio

    module = example("chatterbox_backend")
    told = {"language_id": "en"} if variant == "multilingual" else {}
    make = lambda: without_encoder(module.random(seconds=0.2, tiny=True, variant=variant))  # noqa: E731
    backend = module.ChatterboxBackend(make, **told)
    asyncio.run(backend.initialize())
    receipt = receipt_of(backend)
    assert receipt is not None
    assert [stage.stage for stage in receipt.kept] == ["growing cache"]
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


def test_another_shape_of_the_whole_is_said(example: Any, seen: list[Event]) -> None:
    """A release of upstream's class with other attributes, none of which has a known name."""
    model = example("chatterbox_backend").random(tiny=True)

    class Chatterbox2(type(model)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.text_model = model.t3.tfmr
            self.sound_model = model.s3gen.mel2wav

    class Service:
        def __init__(self) -> None:
            self.model = Chatterbox2()

    assert [part.kind for part in describe(Service()).parts] == ["model", "model"]
    reasons = [event.reason for event in seen if isinstance(event, NotApplied)]
    assert len(reasons) == 1
    assert reasons[0].startswith("in ChatterboxTTS of chatterbox nothing is of a class that we know")


def test_parts_that_are_loaded_alone_are_no_other_shape(example: Any, seen: list[Event]) -> None:
    model = example("chatterbox_backend").random(tiny=True)
    describe({"vocoder": model.s3gen.mel2wav, "voice": model.conds})
    describe(model)
    assert seen == []


def test_a_method_that_is_gone_is_said(example: Any, seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    model = example("chatterbox_backend").random(tiny=True)
    monkeypatch.delattr(type(model.s3gen.mel2wav), "inference")
    assert describe(model.s3gen).parts[0].kind == "model"
    assert any("has no mel2wav.inference()" in event.reason for event in seen if isinstance(event, NotApplied))
