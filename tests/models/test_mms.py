"""The MMS example's model by the contract of all systems; more of it is in test_vits.py."""

from __future__ import annotations

from typing import Any

import torch

from accelerate_tts.models import describe


def test_contract(contract: Any, example: Any) -> None:
    random = example("mms_backend").random
    ids = torch.randint(1, 38, (1, 50), generator=torch.Generator().manual_seed(0))
    parts = [("text_encoder", "encoder"), ("duration_predictor", "flow"), ("flow", "flow"), ("decoder", "vocoder")]
    speak, other = (lambda model, n=n: model(ids[:, :n]).waveform for n in (30, 50))
    contract(lambda: random(tiny=True)[0], speak, parts, other, [("flow", "fold weight norm")])


def test_the_class_of_coqui_is_known_by_name() -> None:
    from TTS.tts.configs.vits_config import VitsConfig
    from TTS.tts.models.vits import Vits, VitsArgs

    small = VitsArgs(num_chars=40, hidden_channels=32, hidden_channels_ffn_text_encoder=32, num_layers_text_encoder=1,
                     num_layers_flow=1, num_layers_posterior_encoder=1,
                     upsample_initial_channel_decoder=32)  # fmt: skip
    parts = describe(Vits(VitsConfig(model_args=small))).parts
    assert [(part.name, part.kind, part.decides) for part in parts] == [
        ("text_encoder", "encoder", True), ("duration_predictor", "flow", True), ("flow", "flow", False),
        ("waveform_decoder", "vocoder", False),
    ]  # fmt: skip
