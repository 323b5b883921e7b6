"""Trial of shared steps at load: kept where a pass for several callers is faster, and told on the receipt."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
import torch
import transformers
from torch import nn

from accelerate_tts import Event, Receipt, optimized_model, receipt_of
from accelerate_tts.events import NotApplied
from accelerate_tts.kernels import decoder_block
from accelerate_tts.patching.class_swap import fused_by
from accelerate_tts.plan import Part
from accelerate_tts.stages import Stage, Target
from accelerate_tts.stages.catalogue import STAGES, register_stage
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.joined_slots import JoinedSlots
from doubles import pays_off
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32


def llama(heads: int = 4, inner: int = 56) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def speak(model: Any, rows: int) -> torch.Tensor:
    x = torch.randn(rows, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    past, states = None, []
    for number in range(12):
        out = model(inputs_embeds=x if number == 0 else x[:, :1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        states.append(out.last_hidden_state[:, -1:])
    return torch.cat(states, 1)


def tuned(decide: Callable[..., object], rows: int, milliseconds: Callable[[int], float]) -> tuple[Any, str]:
    """Tune a model whose passes take so many milliseconds; return its meeting point and the note."""

    def look(run: Callable[[], Any], *_: object) -> float:
        made = run()
        callers = made.shape[1] // rows if isinstance(made, torch.Tensor) and made.dim() == 4 else 1
        return 1e-3 * milliseconds(callers)

    decide(
        compare=pays_off, look=look, unworthy=lambda _baseline, _part, stage: None if "fused" in stage.name else "no"
    )
    model = llama()
    optimized_model(warmup=lambda loaded: speak(loaded, rows))(lambda: model)()  # type: ignore[call-overload]
    receipt = receipt_of(model)
    assert isinstance(receipt, Receipt)
    assert any(stage.kept and "fused decoder" in stage.stage for stage in receipt.stages), str(receipt)
    (note,) = [note for note in receipt.notes if "concurrent calls" in note]
    fused: Any = fused_by(model.layers[0])
    return fused.steps, note


def test_kept_with_the_most_callers_that_gain(decide: Callable[..., object]) -> None:
    steps, note = tuned(decide, 1, lambda callers: {1: 1.0, 2: 1.25, 4: 2.0, 8: 8.0}[callers])
    assert steps.is_on
    assert steps.rules.most_rows == 4
    assert note.startswith("concurrent calls share steps of ")
    assert note.endswith("callers, and their tokens a second against one's: 2 1.60x, 4 2.00x, 8 1.00x")


def test_callers_with_guidance_are_two_rows(decide: Callable[..., object]) -> None:
    steps, note = tuned(decide, 2, lambda callers: 1.0 + 0.1 * callers)
    assert steps.rules.most_rows == 8
    assert note.endswith("2 1.83x, 4 3.14x")


def test_off_where_it_does_not_pay(decide: Callable[..., object]) -> None:
    steps, note = tuned(decide, 1, float)
    assert not steps.is_on
    assert "do not share steps" in note
    assert note.endswith("together they are as fast as one, 2 1.00x, 4 1.00x, 8 1.00x")


def test_off_where_too_few_rows_are_left(decide: Callable[..., object]) -> None:
    steps, note = tuned(decide, 5, lambda _callers: 1.0)
    assert not steps.is_on
    assert note.endswith("a call has too many rows")


def test_off_where_a_bit_differs(
    decide: Callable[..., object], monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    kernel = decoder_block.decoder_blocks()

    def inexact(blocks: Any, tokens: Any, count: int, threads: int) -> None:
        kernel(blocks, tokens, count, threads)
        if tokens[count - 1].rows > 1:
            (ctypes.c_float * 1).from_address(tokens[count - 1].y)[0] += 1.0

    monkeypatch.setattr(decoder_block, "decoder_blocks", lambda: inexact)
    steps, note = tuned(decide, 1, lambda _callers: 1.0)
    assert not steps.is_on
    assert note.endswith("ValueError: a step for 2 callers differs from the step of one")
    assert [event.reason for event in seen if isinstance(event, NotApplied) and "shared steps" in event.what]


class OnACpu(CapturedStepStage):
    """Recorded steps, over recordings that run again."""

    devices = ("cpu",)
    name = "steps recorded on a CPU"
    after = ()
    changes: ClassVar[list[Any]] = []

    @classmethod
    def variants(cls, _target: Target) -> list[Stage]:
        return [cast("Stage", cls(lambda device: Reruns(device, watched=False)))]

    def prepare(self, part: Part) -> Any:
        self.changes.append(super().prepare(part))
        return self.changes[-1]


def recorded(decide: Callable[..., object], model: Any, milliseconds: Callable[[int], float]) -> tuple[Any, str]:
    """Tune a model whose steps are recorded, and take so long; return its meeting point and the note."""

    def look(run: Callable[[], Any], *_: object) -> float:
        made = run()
        is_pass = isinstance(made, dict) and all(isinstance(row, int) for row in made)
        return 1e-3 * milliseconds(len(made) if is_pass else 1)

    decide(
        compare=pays_off, look=look, unworthy=lambda _baseline, _part, stage: None if "recorded" in stage.name else "no"
    )
    with STAGES.scope():
        register_stage(OnACpu)
        optimized_model(warmup=lambda loaded: speak(loaded, 1))(lambda: model)()  # type: ignore[call-overload]
    receipt = receipt_of(model)
    assert isinstance(receipt, Receipt)
    assert any(stage.kept and "recorded" in stage.stage for stage in receipt.stages), str(receipt)
    (note,) = [note for note in receipt.notes if "concurrent calls" in note]
    return OnACpu.changes.pop().steps[0], note


def by_rows(monkeypatch: pytest.MonkeyPatch, differs: tuple[int, ...] = ()) -> Any:
    """A model that computes row by row, but for these numbers of rows, where results are others in their last bits."""
    plain = nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        def cut(value: Any, at: int) -> Any:
            return value[at : at + 1] if isinstance(value, torch.Tensor) and len(value) == len(query) else value

        return torch.cat([
            plain(query[at : at + 1], *(cut(each, at) for each in others), **{n: cut(v, at) for n, v in named.items()})
            for at in range(len(query))
        ])  # fmt: skip

    def multiply(x: torch.Tensor, weight: torch.Tensor, _bias: Any = None) -> torch.Tensor:
        found = torch.cat([(row.unsqueeze(-2) * weight).sum(-1) for row in x.split(1)])
        return found * (1 + 1e-6 * (x.shape[0] in differs and x.shape[1] == 1))

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(nn.functional, "linear", multiply)
    return llama(heads=2, inner=64)  # no vector of the CPU is in part of one row


@pytest.mark.usefixtures("layered_caches")
@pytest.mark.parametrize("differs", [(), (4, 8), (2, 4, 8)])
def test_numbers_of_recorded_rows_whose_bits_differ_are_left_out(
    decide: Callable[..., object], differs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    """As cuBLAS may have other kernels for other numbers of rows."""
    model = by_rows(monkeypatch, differs)
    steps, note = recorded(decide, model, lambda callers: {1: 1.0, 2: 1.25, 4: 2.0, 8: 3.0}[callers])
    gains = {1: 1.0, 2: 1.6, 4: 2.0, 8: 8 / 3}
    shown = ", ".join(f"{callers} {gain:.2f}x" for callers, gain in gains.items() if callers not in differs)
    left_out = f"; not for {' and '.join(map(str, differs))}, whose results differ in bits from those of one"
    assert steps.is_on == (2 not in differs)
    if steps.is_on:
        assert steps.rules.most_rows == (2 if differs else 8)
        assert note.endswith(f"against one's: {shown}{left_out if differs else ''}")
    else:
        assert note.endswith("LlamaModel: not for 2 and 4 and 8, whose results differ in bits from those of one"), note
    assert not [event for event in seen if event.degraded]


@pytest.mark.usefixtures("layered_caches")
def test_recorded_steps_are_not_shared_where_one_caller_would_pay_for_it(
    decide: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    init = JoinedSlots.__init__

    def joined(slots: JoinedSlots, *args: Any) -> None:
        init(slots, *args)
        made.append(1)

    monkeypatch.setattr(JoinedSlots, "__init__", joined)
    # A caller alone takes 1 ms before slots lie side by side, and 2 ms after.
    steps, note = recorded(decide, by_rows(monkeypatch), lambda _callers: 2.0 if made else 1.0)
    assert not steps.is_on
    assert "1 0.50x, 2 1.00x, 4 2.00x, 8 4.00x" in note
