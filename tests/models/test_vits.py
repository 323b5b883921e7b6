"""MMS's own class at small size: parts found, exact, undone, no recompile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import VitsConfig, VitsModel

from accelerate_tts import Event, Settings, inference, optimized_model
from accelerate_tts.events import NotApplied, Recompiled
from accelerate_tts.models import describe
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.compare import compare
from doubles import is_faster


def small() -> VitsModel:
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=38, hidden_size=32, num_hidden_layers=2, ffn_dim=64, flow_size=32, spectrogram_bins=17,
        upsample_initial_channel=64, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=2,
        duration_predictor_filter_channels=32, posterior_encoder_num_wavenet_layers=1,
    )  # fmt: skip
    return VitsModel(config).eval()


# In frames, which are what is compiled for, these are 9 to 264 in steps of less than two: untrained durations have
# outliers, and the last two lengths are such.
WARM = (8, 12, 20, 44, 77, 110, 64, 92)


def ids(length: int) -> torch.Tensor:
    return torch.randint(1, 37, (1, length), generator=torch.Generator().manual_seed(length))


def speak(model: VitsModel, tokens: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(tokens).waveform


def test_the_parts_are_named() -> None:
    model = small()
    plan = describe(model)
    assert [(part.name, part.kind) for part in plan.parts] == [
        ("text_encoder", "encoder"), ("duration_predictor", "flow"), ("flow", "flow"), ("decoder", "vocoder"),
    ]  # fmt: skip
    assert plan.roots == (model,)

    class Service:
        def __init__(self) -> None:
            self.voice = model

    assert describe(Service()).parts[3].name == "voice.decoder"


def test_a_release_we_do_not_know_is_said_and_treated_as_a_whole(seen: list[Event]) -> None:
    model = small()
    del model.flow
    assert [part.name for part in describe(model).parts] == ["VitsModel"]
    assert any(isinstance(event, NotApplied) and "has no flow" in event.reason for event in seen)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_users_default_dtype_is_not_that_of_its_parts(default: torch.dtype, decide: Any, monkeypatch: Any) -> None:
    """Tuned or called under another default dtype, a part computes in its inputs' own."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(compare=is_faster, looks=False, unworthy=lambda *_given: None)
    reference, model, later = small(), small(), small()
    tokens = ids(12)
    optimized_model(warmup=(tokens,))(lambda: model)()
    torch.set_default_dtype(default)
    try:
        expected = speak(reference, tokens)
        optimized_model(warmup=(tokens,))(lambda: later)()
        found = speak(model, tokens), speak(later, tokens)
    finally:
        torch.set_default_dtype(torch.float32)
    for each in found:
        assert each.dtype == torch.float32
        assert compare(expected, each).error < EXACT_TOLERANCE


def test_tuned_speaks_the_same_and_undo_is_complete(decide: Any) -> None:
    """Keep every correct change, so that it is in force on any machine."""
    # One part is compiled: half a minute of compiling the duration predictor would be for nothing.
    refused = lambda _session, part, stage: "refused here" if stage.cost and part.name != "decoder" else None  # noqa: E731
    decide(compare=is_faster, looks=False, unworthy=refused)
    reference, model = small(), small()
    keys = list(model.state_dict())

    class Backend:
        @optimized_model(warmup=[ids(length) for length in WARM], tune_seconds=100)
        def load(self) -> VitsModel:
            self.model = model
            return model

        @inference
        def synthesize(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).waveform

    backend = Backend()
    backend.load()
    optimizer = get_performance_optimizer()
    receipt = optimizer.receipt(backend)
    assert receipt is not None
    checked = {f"{part} in fewer operators, checked by margin" for part in ("durations", "text encoder")}
    assert {stage.stage for stage in receipt.kept} >= {"fold weight norm", "fewer operators"} | checked
    assert receipt.error < 1e-4
    assert list(model.state_dict()) == keys
    for length in range(10, 110, 6):
        assert compare(speak(reference, ids(length)), speak(model, ids(length))).error < EXACT_TOLERANCE
    assert receipt.recompiles == 0
    assert optimizer.undo(backend)
    assert not optimizer.undo(backend)
    assert optimizer.receipt(model) is None
    assert torch.equal(speak(model, ids(50)), speak(reference, ids(50)))


@pytest.mark.parametrize("part", ["decoder", "flow"])
def test_a_compiled_part_is_right_at_every_length_without_recompiling(part: str, seen: list[Event]) -> None:
    """The change is correct; its speed depends on the machine and is not tested."""
    from accelerate_tts import PerformanceOptimizer

    reference, model = small(), small()
    optimizer = PerformanceOptimizer(Settings())
    optimizer.compile_model(getattr(model, part), part, None)
    call = getattr(model, part)._compiled_call_impl
    for length in WARM:
        speak(model, ids(length))
    graphs = call.graphs
    call.end_warmup()
    for length in range(10, 110, 2):
        torch.testing.assert_close(speak(model, ids(length)), speak(reference, ids(length)), rtol=1e-3, atol=1e-5)
    assert not [event for event in seen if isinstance(event, Recompiled)]
    assert 0 < call.graphs == graphs
    optimizer.close()
