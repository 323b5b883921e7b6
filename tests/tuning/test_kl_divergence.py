"""A decoder that samples is judged by each step's probabilities, and the whole by what is not sampled."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from accelerate_tts import Event
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import FellBack
from accelerate_tts.plan import Head, ModelPlan, Part
from accelerate_tts.tuning.compare import TOLERANCES
from accelerate_tts.tuning.findings import Tuning
from accelerate_tts.tuning.kl_divergence import divergence, head_of
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, tune

pytestmark = pytest.mark.usefixtures("steady_clock")


@dataclass
class Step(ModelOutput):
    logits: torch.Tensor | None = None


def logits(*values: float) -> Step:
    return Step(logits=torch.tensor(values).log().view(1, 1, -1))


def test_it_is_the_largest_divergence_of_a_step() -> None:
    expected = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    same, other = logits(0.5, 0.5), logits(0.4, 0.6)
    assert divergence([same, same, same], [same, other, same], None) == pytest.approx(expected)
    assert divergence([same], [logits(5.0, 5.0)], None) == pytest.approx(0.0), "logits have no scale of their own"
    before = Step(logits=torch.cat([logits(0.9, 0.1).logits, same.logits], 1))
    assert divergence([before], [same], None) == pytest.approx(0.0), "a prompt's last position is what is sampled from"


def test_what_is_not_finite_is_infinitely_far_and_what_is_masked_is_not() -> None:
    masked = logits(0.5, 0.5, 0.0)
    assert divergence([masked], [masked], None) == pytest.approx(0.0)
    assert divergence([masked], [Step(logits=torch.full((1, 1, 3), math.nan))], None) == math.inf
    assert divergence([logits(0.5, 0.5)], [logits(1.0, 0.0)], None) == math.inf


def test_hidden_states_need_a_head_and_codebooks_are_apart() -> None:
    torch.manual_seed(0)
    states = [BaseModelOutputWithPast(last_hidden_state=torch.randn(2, 3, 8)) for _ in range(2)]
    linear = nn.Linear(8, 12)
    assert divergence(states[:1], states[1:], None) is None
    one, four = (divergence(states[:1], states[1:], Head((nn.Identity(), linear), n)) for n in (1, 4))
    first, second = (linear(state.last_hidden_state[:, -1]).unflatten(-1, (4, 3)).double() for state in states)
    each = nn.functional.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="none", log_target=True)
    assert four == pytest.approx(float(each.sum(-1).max().detach()))
    assert one != pytest.approx(four)


def test_frames_of_sound_beside_text_are_compared_too() -> None:
    """boson-multimodal's Higgs Audio has audio logits, (frames, codebooks, vocabulary), which count while it speaks."""
    generator = torch.Generator().manual_seed(0)
    text, sound = torch.randn(1, 2, 6, generator=generator), torch.randn(3, 8, 5, generator=generator)
    off = sound.clone()
    off[1, 4] = off[1, 4].flip(-1)  # one codebook of a frame that is not the last
    same, other = (SimpleNamespace(logits=text, audio_logits=frames) for frames in (sound, off))
    first, second = (frames[1, 4].double().log_softmax(-1) for frames in (sound, off))
    expected = float((first.exp() * (first - second)).sum())
    assert divergence([same, same], [same, other], None) == pytest.approx(expected)
    writes = [SimpleNamespace(logits=text, audio_logits=frames) for frames in (None, sound[:0])]
    assert divergence(writes, writes, None) == pytest.approx(0.0), "while it writes there are none"


def test_what_a_guided_loop_samples_from_is_compared() -> None:
    # Each row errs by little, in opposite directions, and guidance adds the two up.
    right, wrong = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.1]], [[0.1, 0.0]]])
    alone, guided = (
        divergence(
            [BaseModelOutputWithPast(last_hidden_state=right)],
            [BaseModelOutputWithPast(last_hidden_state=wrong)],
            Head((nn.Identity(),), guidance=weight),
        )
        for weight in (None, 0.5)
    )
    assert alone is not None
    assert guided == pytest.approx(alone * 4, rel=0.02), "0.1 + 0.5 * 0.2 is twice the error, and it counts squared"
    single = [BaseModelOutputWithPast(last_hidden_state=wrong[:1])]
    assert divergence(single, single, Head((nn.Identity(),), guidance=0.5)) == 0.0, "one row guides nothing"


@pytest.mark.parametrize("codebooks", [1, 4])
@pytest.mark.parametrize("positions", [False, True], ids=["rows", "positions"])
def test_the_outputs_of_a_head_are_the_logits(codebooks: int, *, positions: bool) -> None:
    """Compared as those that a decoder with this head gives."""
    torch.manual_seed(0)
    states = [BaseModelOutputWithPast(last_hidden_state=torch.randn(2, 1, 8)) for _ in range(2)]
    linear = nn.Linear(8, 12)
    first, second = (
        linear(state.last_hidden_state if positions else state.last_hidden_state[:, 0]) for state in states
    )
    expected = divergence(states[:1], states[1:], Head((linear,), codebooks, guidance=0.5))
    assert divergence([first], [second], Head((), codebooks, guidance=0.5)) == pytest.approx(expected)


def test_other_results_have_none() -> None:
    assert divergence([torch.ones(3)], [torch.ones(3)], None) is None
    assert divergence([Step(logits=torch.ones(2, 3))], [Step(logits=torch.ones(2, 3))], None) is None


def test_the_head_of_a_model_of_transformers() -> None:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                      vocab_size=9)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    holder = nn.ModuleList([model])
    assert head_of(model.model, [holder]) == Head((model.lm_head,))
    assert head_of(model, [holder]) is None, "its outputs are logits already"
    assert head_of(model.model, [model.model]) is None
    assert head_of(nn.Linear(1, 1), [holder]) is None


class Inner(nn.Module):
    """A decoder with a head of its own kind, which generates by itself, inside a model with another one."""

    def __init__(self, decoder: nn.Module, head: nn.Module | None, *, generates: bool) -> None:
        super().__init__()
        self.decoder, self.head, self._generates = decoder, head, generates

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def can_generate(self) -> bool:
        return self._generates


def test_the_head_is_that_of_the_nearest_owner() -> None:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                      vocab_size=9)  # fmt: skip
    decoder, own, other = transformers.LlamaModel(config), nn.Linear(8, 5), nn.Linear(8, 9)

    def found(head: nn.Module | None, *, generates: bool) -> Head | None:
        return head_of(decoder, [Inner(Inner(decoder, head, generates=generates), other, generates=True)])

    assert found(own, generates=True) == Head((own,))
    assert found(None, generates=True) is None, "its head is of another kind, and the outer one is not its own"
    assert found(None, generates=False) == Head((other,)), "a model around it without a head"
    assert found(nn.Linear(7, 5), generates=True) is None, "of another width"


class Indexed(nn.Linear):
    """A head that needs to know which codebook's logits are asked for."""

    def forward(self, input: torch.Tensor, index: int) -> torch.Tensor:  # noqa: A002
        return super().forward(input) + index


def test_a_list_of_heads_is_one_of_several_codebooks_and_what_cannot_be_called_is_none() -> None:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                      vocab_size=9)  # fmt: skip
    decoder, heads = transformers.LlamaModel(config), nn.ModuleList(nn.Linear(8, 5) for _ in range(3))

    def found(head: nn.Module) -> Head | None:
        return head_of(decoder, [Inner(decoder, head, generates=True)])

    head, hidden = found(heads), torch.randn(2, 1, 8)
    assert head is not None
    assert torch.equal(head(hidden), torch.stack([each(hidden) for each in heads], 2))
    assert found(nn.ModuleDict({"a": heads[0]})) is None
    assert found(nn.ModuleList([nn.Linear(8, 5), nn.Linear(7, 5)])) is None, "of another width"
    assert found(nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 6)])) is None, "of different sizes"
    assert found(Indexed(8, 5)) is None


def test_the_depth_decoder_of_csm_has_no_head_of_the_backbone() -> None:
    csm = pytest.importorskip("transformers.models.csm.modeling_csm", reason="this release has no CSM")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 9, "num_codebooks": 4, "head_dim": 8}  # fmt: skip
    depth = {**sizes, "backbone_hidden_size": 16}
    config = transformers.CsmConfig(
        **sizes, text_vocab_size=11, depth_decoder_config=depth, pad_token_id=0, codebook_eos_token_id=0, bos_token_id=1
    )  # fmt: skip
    with torch.device("meta"):  # its codec has one size
        model = csm.CsmForConditionalGeneration(config)
    assert head_of(model.depth_decoder.model, [model]) is None
    assert head_of(model.backbone_model, [model]) == Head((model.lm_head,))


# --- tuning --------------------------------------------------------------------------------------------------------

COUNT = 200  # tokens: enough for one of them to be another one, whatever torch's generator gives


class Decoder(nn.Module):
    """Next-token logits of the token before, as slowly as it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 30)
        self.seconds, self.noise = 0.002, 0.0

    def forward(self, token: torch.Tensor) -> Step:
        time.sleep(self.seconds)
        return Step(logits=self.table(token) + self.noise * torch.sin(self.table(token) * 50))


class Speaker(nn.Module):
    """Samples tokens and voices each as a hundred samples."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.voice = nn.Linear(30, 100)
        self.stop = False
        self.eval()

    def speak(self) -> torch.Tensor:
        token, waves = torch.zeros(1, 1, dtype=torch.long), []
        for _ in range(COUNT):
            probabilities = self.decoder(token).logits[:, -1].softmax(-1)
            token = torch.multinomial(probabilities, 1)
            if self.stop and self.decoder.noise and len(waves) >= 5:
                break
            waves.append(self.voice(probabilities))
        return torch.cat(waves, 1)


def run(model: Speaker, *stages: Stage, precision: Any = "balanced") -> Tuning:
    parts = (Part("decoder", "decoder", model.decoder), Part("voice", "vocoder", model.voice))
    calls = warmup_calls(lambda loaded: loaded.speak(), Loaded(model), "inference")
    return tune(
        ModelPlan("speaker", (model,), parts), calls, list(stages), DeviceInfo("cpu", "test"), Limits(60.0, precision)
    )


def test_another_sequence_of_right_steps_is_kept_and_said() -> None:
    model = Speaker()
    with torch.inference_mode():
        torch.manual_seed(1)
        before = model.speak()
    tuning = run(model, Stage("rough", seconds=0.0, noise=0.015))
    (result,) = tuning.receipt.stages
    assert result.kept
    assert result.divergence is not None
    assert 0.0 < result.divergence < TOLERANCES["balanced"].divergence
    assert tuning.receipt.error is None, "the whole has no error to state: it is another sequence"
    assert any("another sequence is sampled" in note for note in tuning.receipt.notes)
    assert tuning.receipt.ratio > 1.5
    assert "divergence" in tuning.receipt.to_json()
    tuning.undo()
    with torch.inference_mode():
        torch.manual_seed(1)
        assert torch.equal(model.speak(), before)


def test_a_step_that_diverges_is_dropped() -> None:
    (result,) = run(Speaker(), Stage("too rough", seconds=0.0, noise=0.5), precision="fast").receipt.stages
    assert not result.kept
    assert "nats" in result.reason or result.reason.startswith("error ")


class Projection(nn.Module):
    """Logits of hidden states, as slowly as it is told."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(30, 30)
        self.scale, self.seconds, self.noise = scale, 0.002, 0.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        right = self.linear(hidden) * self.scale
        return right * (1 + self.noise * torch.sin(torch.arange(30.0)))


@pytest.mark.parametrize(("scale", "reason"), [(1.0, "at least"), (300.0, "nats")])
def test_a_head_is_judged_by_its_probabilities(scale: float, reason: str) -> None:
    """One relative error is nothing to flat probabilities, and much to peaked ones."""

    class Whole(Speaker):
        def __init__(self) -> None:
            super().__init__()
            self.head = Projection(scale)
            self.decoder.forward = lambda token: Step(logits=self.head(nn.functional.one_hot(token, 30).float()))

    model = Whole()
    part = Part("head", "head", model.head, head=Head(()))
    calls = warmup_calls(lambda loaded: loaded.speak(), Loaded(model), "inference")
    plan, stage = ModelPlan("speaker", (model,), (part,)), Stage("rough", seconds=0.0, noise=0.04)
    (result,) = tune(plan, calls, [stage], DeviceInfo("cpu", "test"), Limits(60.0, "fast")).receipt.stages
    assert result.kept is (reason == "at least"), result
    assert reason in result.reason
    assert result.divergence is not None


def test_the_rest_must_be_right_without_it(seen: list[Event]) -> None:
    class Louder(Speaker):
        """Enlarges a small error of another part in the whole output."""

        def speak(self) -> torch.Tensor:
            wave = super().speak()
            return wave if self.voice.training_scale == 1.0 else wave * 3.0

    model = Louder()
    model.voice.training_scale = 1.0  # type: ignore[assignment]
    slow = model.voice.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002 if model.voice.training_scale == 1.0 else 0.0)
        return slow(x) * model.voice.training_scale

    model.voice.forward = forward  # type: ignore[method-assign]
    tuning = run(model, Stage("rough", seconds=0.0, noise=0.01), Stage("louder", training_scale=1.01))
    assert [result.stage for result in tuning.receipt.kept] == ["rough"]
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["louder of voice"]
    assert model.voice.training_scale == 1.0


def test_a_sequence_that_breaks_off_is_undone() -> None:
    model = Speaker()
    model.stop = True
    tuning = run(model, Stage("rough", seconds=0.0, noise=0.015))
    assert not tuning.receipt.kept
    assert "undone: the whole is wrong: a result of shape" in tuning.receipt.stages[0].reason
