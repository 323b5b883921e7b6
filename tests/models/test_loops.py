"""Three hundred sampled tokens of each system's own loop, with its decoder's blocks fused: the same as upstream's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage

TOKENS = 300


@pytest.fixture
def fused() -> Iterator[Callable[[Any], None]]:
    """Fuses the blocks of the decoder that the plan finds in a model."""
    changes = []

    def fuse(model: Any) -> None:
        part: Part = next(part for part in describe(model).parts if part.kind == "decoder")
        changes.append(FusedBlocksStage().prepare(part))
        changes[-1].on()

    yield fuse
    for change in changes:
        change.off()


def same(run: Callable[..., torch.Tensor], requests: list[dict[str, Any]], fuse: Callable[[], None]) -> list[int]:
    """Each request's tokens, untouched and then fused; how many there were."""

    def answers() -> list[torch.Tensor]:
        found = []
        for seed, request in enumerate(requests):
            torch.manual_seed(seed)
            with torch.inference_mode():
                found.append(run(**request))
        return found

    untouched = answers()
    fuse()
    tuned = answers()
    assert all(torch.equal(a, b) for a, b in zip(untouched, tuned, strict=True))
    return [tokens.shape[1] for tokens in tuned]


def test_chatterbox(example: Any, fused: Callable[[Any], None], blocks_a_call: list[int]) -> None:
    module = example("chatterbox_backend")
    model = module.random(tiny=True)
    t3 = model.t3
    text = torch.nn.functional.pad(model.tokenizer.text_to_tokens("Hello."), (1, 0), value=255)
    text = torch.nn.functional.pad(text, (0, 1)).expand(2, -1)

    def run(**numbers: Any) -> torch.Tensor:
        given = {"t3_cond": model.conds.t3, "text_tokens": text, "max_new_tokens": 40, **numbers}
        return module.T3.inference(t3, **given)  # upstream's own, without the example's limit

    requests = [{"max_new_tokens": TOKENS}, {"cfg_weight": 0.2, "temperature": 1.1}, {"cfg_weight": 0.9, "top_p": 0.7}]
    counts = same(run, requests, lambda: fused(model))
    assert counts == [TOKENS, 40, 40]
    assert blocks_a_call == [len(t3.tfmr.layers)] * sum(counts), "one call a token; upstream runs the last one too"


def test_chatterbox_turbo(example: Any, fused: Callable[[Any], None], blocks_a_call: list[int]) -> None:
    module = example("chatterbox_backend")
    pytest.importorskip(module.VARIANTS["turbo"][0], reason="this release of Chatterbox has no turbo model")
    model = module.random(tiny=True, variant="turbo")
    text = torch.arange(8)[None]

    def run(**numbers: float) -> torch.Tensor:
        given = {"t3_cond": model.conds.t3, "text_tokens": text, "max_gen_len": TOKENS - 1}
        return module.T3.inference_turbo(model.t3, **given, **numbers)

    counts = same(run, [{}], lambda: fused(model))
    assert counts == [TOKENS]
    assert set(blocks_a_call) == {len(model.t3.tfmr.h)}


def test_xtts(example: Any, fused: Callable[[Any], None], blocks_a_call: list[int]) -> None:
    loaded = example("xtts_backend").random(tiny=True)
    gpt = loaded.model.gpt
    gpt.max_gen_mel_tokens = TOKENS

    def run(**numbers: Any) -> torch.Tensor:
        return gpt.generate(  # type: ignore[no-any-return]
            cond_latents=loaded.latents, text_inputs=torch.arange(10, 18)[None], do_sample=True,
            **{"max_new_tokens": TOKENS, "min_new_tokens": 40, **numbers},
        )  # fmt: skip

    requests = [
        {"temperature": 0.75, "top_k": 50, "min_new_tokens": TOKENS},
        {"max_new_tokens": 40, "temperature": 1.2, "top_p": 0.8, "repetition_penalty": 3.0},
    ]
    assert same(run, requests, lambda: fused(loaded.model))[0] >= TOKENS
    assert set(blocks_a_call) == {len(gpt.gpt.h)}


def test_higgs(example: Any, fused: Callable[[Any], None], blocks_a_call: list[int]) -> None:
    loaded = example("higgs_backend").random(tiny=True)

    def run(**numbers: Any) -> torch.Tensor:
        return loaded.model.generate(  # type: ignore[no-any-return]
            **loaded.prepare("Hello."), max_new_tokens=TOKENS, do_sample=True, **numbers
        )

    # Its own stop comes by chance in each: several, of which each is another sample.
    requests: list[dict[str, Any]] = [{}, {"temperature": 0.6}, {}, {"temperature": 0.8}, {}, {"top_k": 20}]
    assert sum(same(run, requests, lambda: fused(loaded.model))) >= TOKENS
    assert set(blocks_a_call) == {len(loaded.model.model.layers)}
