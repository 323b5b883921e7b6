"""Chatterbox's multilingual T3: its alignment analyzer sees what it sees upstream, and is let go of afterwards."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

from accelerate_tts import Event
from accelerate_tts.events import Tidied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage

pytest.importorskip(
    "chatterbox.models.t3.inference.alignment_stream_analyzer", reason="this release has no multilingual model"
)
configs = pytest.importorskip("chatterbox.models.t3.llama_configs")
T3 = pytest.importorskip("chatterbox.models.t3").T3
T3Cond = pytest.importorskip("chatterbox.models.t3.modules.cond_enc").T3Cond
T3Config = pytest.importorskip("chatterbox.models.t3.modules.t3_config").T3Config

LAYERS, TOKENS = 14, 60  # the last layer that the analyzer looks at is number 13
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "head_dim": 4}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small multilingual T3; the same each time."""

    def made() -> Any:
        monkeypatch.setitem(
            configs.LLAMA_CONFIGS, "small", {**configs.LLAMA_CONFIGS["Llama_520M"], **SIZES, "initializer_range": 0.1}
        )
        hp = T3Config.multilingual()
        hp.llama_config_name, hp.use_perceiver_resampler = "small", False
        torch.manual_seed(0)
        return T3(hp).eval()

    return made


def speak(t3: Any, seed: int, letters: int = 12, count: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a text, and where in it the analyzer saw each."""
    torch.manual_seed(seed)
    text = torch.randint(1, 250, (1, letters)).repeat(2, 1)
    text = torch.nn.functional.pad(torch.nn.functional.pad(text, (1, 0), value=255), (0, 1), value=0)
    voice = T3Cond(torch.rand(1, 256), None, torch.randint(0, 6561, (1, 10)), emotion_adv=0.5 * torch.ones(1, 1, 1))
    tokens = t3.inference(t3_cond=voice, text_tokens=text, max_new_tokens=count)
    return tokens, t3.patched_model.alignment_stream_analyzer.alignment


def fuse(t3: Any) -> Any:
    change = FusedBlocksStage().prepare(Part("t3.tfmr", "decoder", t3.tfmr))
    change.on()
    return change


def hooks(t3: Any) -> int:
    """Hooks of the analyzers; transformers has some of its own, once."""
    return sum(
        hook.__module__.endswith("alignment_stream_analyzer")
        for layer in t3.tfmr.layers
        for hook in layer.self_attn._forward_hooks.values()
    )


def test_the_analyzer_decides_as_it_does_upstream(make: Any, blocks_a_call: list[int], seen: list[Event]) -> None:
    untouched, tuned = make(), make()
    fuse(tuned)
    for seed in range(4):
        expected, found = speak(untouched, seed), speak(tuned, seed)
        assert torch.equal(expected[0], found[0])
        assert expected[1].shape == found[1].shape
        assert torch.allclose(expected[1], found[1], atol=1e-5)
        assert expected[1].max() > 0, "it looked at something"
    assert blocks_a_call
    assert set(blocks_a_call) == {LAYERS}, "all blocks in one call, those that are looked at too"
    assert [event for event in seen if not isinstance(event, Tidied)] == []


def test_hooks_do_not_pile_up(make: Any, seen: list[Event]) -> None:
    untouched, tuned = make(), make()
    change = fuse(tuned)
    for seed in range(5):
        speak(untouched, seed, count=3)
        speak(tuned, seed, count=3)
    assert hooks(untouched) == 15
    assert hooks(tuned) == 3, "those of the last request"
    assert len([event for event in seen if isinstance(event, Tidied)]) == 1
    change.off()
    speak(tuned, 5, count=3)
    speak(tuned, 6, count=3)
    assert hooks(tuned) == 9, "as upstream again"


def test_forwards_do_not_pile_up(make: Any, blocks_a_call: list[int], seen: list[Event]) -> None:
    """As in 0.1.1, whose analyzer wraps a layer's forward in another one at each request, and never takes it away."""
    untouched, tuned = make(), make()
    fuse(tuned)
    expected = speak(untouched, 0)[0]

    def wrap(attention: Any) -> None:
        before = attention.forward

        def patched_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            del self
            return before(*args, **{**kwargs, "output_attentions": True})

        patched_forward.__module__ = "chatterbox.models.t3.inference.alignment_stream_analyzer"
        attention.forward = MethodType(patched_forward, attention)

    for _ in range(1500):
        for t3 in (untouched, tuned):
            wrap(t3.tfmr.layers[9].self_attn)
    with pytest.raises(RecursionError):
        speak(untouched, 0)
    blocks_a_call.clear()
    assert torch.equal(speak(tuned, 0)[0], expected)
    assert set(blocks_a_call) == {LAYERS}
    assert [event for event in seen if not isinstance(event, Tidied)] == []


def test_an_end_that_is_forced_and_one_that_is_forbidden(make: Any) -> None:
    """Against the logits: the analyzer suppresses the end early on, and forces it after repetitions."""
    lengths = set()
    for favoured, value in (("stop_speech_token", 30.0), ("start_speech_token", 60.0)):
        pair = make(), make()
        for t3 in pair:
            with torch.no_grad():
                bias = torch.zeros(t3.hp.speech_tokens_dict_size)
                bias[getattr(t3.hp, favoured)] = value
                t3.speech_head.register_forward_hook(lambda _m, _a, logits, bias=bias: logits + bias)
        fuse(pair[1])
        expected, found = (speak(t3, 1)[0] for t3 in pair)
        assert torch.equal(expected, found)
        lengths.add(expected.shape[1])
    assert max(lengths) < TOKENS, "an end was forced"
