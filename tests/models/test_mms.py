"""The MMS example's model by the contract of all systems; more of it is in test_vits.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate_tts.models import describe


def test_contract(contract: Any, example: Any) -> None:
    random = example("mms_backend").random
    ids = torch.randint(1, 38, (1, 50), generator=torch.Generator().manual_seed(0))
    parts = [("text_encoder", "encoder"), ("duration_predictor", "flow"), ("flow", "flow"), ("decoder", "vocoder")]
    speak, other = (lambda model, n=n: model(ids[:, :n]).waveform for n in (30, 50))
    contract(lambda: random(tiny=True)[0], speak, parts, other, [("flow", "fold weight norm")])


@pytest.mark.slow
def test_contract_of_coqui_s_class(contract: Any) -> None:
    """Its lengths depend on two parts, and its vocoder and flow have their own kind of weight norm."""
    pytest.importorskip("TTS")
    from TTS.tts.configs.vits_config import VitsConfig
    from TTS.tts.models.vits import Vits, VitsArgs

    small = VitsArgs(num_chars=40, hidden_channels=32, hidden_channels_ffn_text_encoder=32, num_layers_text_encoder=1,
                     num_layers_flow=1, num_layers_posterior_encoder=1, upsample_initial_channel_decoder=32,
                     resblock_kernel_sizes_decoder=[3], resblock_dilation_sizes_decoder=[[1, 3, 5]])  # fmt: skip
    ids = torch.randint(1, 39, (1, 50), generator=torch.Generator().manual_seed(0))
    parts = [("text_encoder", "encoder"), ("duration_predictor", "flow"), ("flow", "flow"),
             ("waveform_decoder", "vocoder")]  # fmt: skip
    speak, other = (lambda model, n=n: model.inference(ids[:, :n])["model_outputs"] for n in (12, 20))

    def make() -> Vits:
        model = Vits(VitsConfig(model_args=small)).eval()
        for name, weight in model.named_parameters():
            if name.endswith(("post.weight", "proj.weight", "translation", "log_scale")) and not weight.any():
                torch.nn.init.normal_(weight, 0.0, 0.3)  # zeros until it is trained: a flow would do nothing
        return model

    contract(make, speak, parts, other, [("flow", "fold weight norm"), ("waveform_decoder", "fold weight norm")])
    decides = {part.name for part in describe(make()).parts if part.decides}
    assert decides == {"text_encoder", "duration_predictor"}
