"""Trial of shared steps at load: kept where a pass for several callers is faster, and told on the receipt."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from accelerate_tts import Event, Receipt, optimized_model, receipt_of
from accelerate_tts.events import NotApplied
from accelerate_tts.kernels import decoder_block
from accelerate_tts.patching.class_swap import fused_by
from doubles import pays_off

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
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
