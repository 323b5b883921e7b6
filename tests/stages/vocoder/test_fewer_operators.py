"""Known parts in fewer operators: the same to rounding, at every length, batch and configuration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import VitsConfig
from transformers.models.vits.modeling_vits import VitsHifiGan, VitsResidualCouplingBlock

from accelerate_tts.cli.demo.voice import TwoConvolutionBlock
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.stages.vocoder.fewer_operators import FewerOperatorsStage
from accelerate_tts.stages.vocoder.hifigan import hifigan
from accelerate_tts.stages.vocoder.vits import FLOW
from accelerate_tts.tuning.compare import compare

STAGE = FewerOperatorsStage((FLOW, hifigan()))


def config(**sizes: Any) -> VitsConfig:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "flow_size": 8, "upsample_initial_channel": 32, "upsample_rates": [4, 2],
             "upsample_kernel_sizes": [8, 4], "resblock_kernel_sizes": [3, 5],
             "resblock_dilation_sizes": [[1, 3], [1, 2]],
             "prior_encoder_num_flows": 3, "prior_encoder_num_wavenet_layers": 2}  # fmt: skip
    return VitsConfig(**{**small, **sizes})


def decoder(**sizes: Any) -> Any:
    made: Any = VitsHifiGan(config(**sizes)).eval()
    for parameter in made.parameters():  # what is next to nothing would hide an error
        nn.init.normal_(parameter, std=0.2)
    return made


def changed(module: Any, kind: Any = "vocoder") -> Any:
    part = Part("it", kind, module)
    assert STAGE.applies(part) is None
    change = STAGE.prepare(part)
    change.on()
    return change


def spectrogram(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, length, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"upsample_rates": [3, 5], "upsample_kernel_sizes": [7, 11]},  # no whole number of taps
        {"upsample_rates": [2, 2], "upsample_kernel_sizes": [2, 8]},
        {"resblock_kernel_sizes": [7], "resblock_dilation_sizes": [[1, 3, 5]], "leaky_relu_slope": 0.3},
    ],
)
def test_a_generator_computes_the_same(sizes: dict[str, Any]) -> None:
    plain, module = decoder(**sizes), decoder(**sizes)
    change = changed(module)
    with torch.inference_mode():
        for length, batch in ((1, 1), (7, 1), (33, 2), (400, 1)):
            found, expected = module(spectrogram(length, batch)), plain(spectrogram(length, batch))
            assert compare(expected, found).error < 1e-5
            assert found.stride() == expected.stride()
    change.off()
    assert torch.equal(module(spectrogram(9)), plain(spectrogram(9)))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 900), st.sampled_from([2 << 10, 20 << 10, 4 << 20]))
def test_pieces_meet(length: int, piece: int) -> None:
    """Levels are computed in pieces, with as much on both sides as the convolutions reach."""
    from accelerate_tts.stages.vocoder import hifigan as module

    plain = decoder(resblock_kernel_sizes=[5, 7], resblock_dilation_sizes=[[2, 6], [3, 12]])
    described = hifigan().described(plain)
    before = module.PIECE
    try:
        module.PIECE = module.Piece(piece, 16)
        with torch.inference_mode():
            assert compare(plain(spectrogram(length)), described(spectrogram(length))).error < 1e-5
    finally:
        module.PIECE = before


def test_the_demos_blocks_are_known() -> None:
    plain = decoder()
    plain.resblocks = nn.ModuleList(
        TwoConvolutionBlock(32 // 2 ** (level + 1), kernel, (2, 3), 0.1) for level in range(2) for kernel in (3, 5)
    )
    module = copy.deepcopy(plain)
    changed(module)
    with torch.inference_mode():
        assert compare(plain(spectrogram(60)), module(spectrogram(60))).error < 1e-5


@pytest.mark.parametrize("flows", [1, 2, 3, 4])
def test_a_flow_computes_the_same(flows: int) -> None:
    made: Any = VitsResidualCouplingBlock(config(prior_encoder_num_flows=flows)).eval()
    plain, module = made, copy.deepcopy(made)
    change = changed(module, "flow")
    with torch.inference_mode():
        for length in (1, 5, 40):
            inputs, mask = spectrogram(length), torch.ones(1, 1, length)
            expected, found = (m(inputs, mask, None, reverse=True) for m in (plain, module))
            assert compare(expected, found).error < 1e-5
            assert found.is_contiguous()
        hidden = mask.clone()
        hidden[..., -3:] = 0
        for given in (
            (inputs, hidden, None, True),
            (inputs, mask, None, False),
            (inputs.repeat(2, 1, 1), mask, None, True),
        ):
            assert torch.equal(plain(*given), module(*given)), "a mask, another direction, a batch: upstream's own"
    change.off()
    assert type(module) is VitsResidualCouplingBlock


def test_the_users_default_device_is_not_that_of_a_part() -> None:
    made: Any = VitsResidualCouplingBlock(config()).eval()
    plain, module = made, copy.deepcopy(made)
    inputs, mask = spectrogram(40), torch.ones(1, 1, 40)
    with torch.inference_mode():
        expected = plain(inputs, mask, None, reverse=True)
        with torch.device("meta"):
            change = changed(module, "flow")
            found = module(inputs, mask, None, reverse=True)
    assert compare(expected, found).error < 1e-5
    change.off()


def test_weights_that_are_written_are_used() -> None:
    plain = decoder()
    module = copy.deepcopy(plain)
    change = changed(module)
    with torch.inference_mode():
        module(spectrogram(9))
    with torch.no_grad():
        for model in (plain, module):
            model.resblocks[1].convs2[0].weight.mul_(3)
            model.conv_post.weight.add_(0.1)
    with torch.inference_mode():
        assert compare(plain(spectrogram(9)), module(spectrogram(9))).error < 1e-5
    state = decoder(leaky_relu_slope=0.1).state_dict()
    for model in (plain, module):
        model.load_state_dict({name: tensor * 0.9 for name, tensor in state.items()})
    with torch.inference_mode():
        assert compare(plain(spectrogram(9)), module(spectrogram(9))).error < 1e-5
    change.off()


def test_a_forward_that_somebody_keeps_is_upstreams_once_it_is_undone() -> None:
    module = decoder()
    with torch.inference_mode():
        expected = module(spectrogram(40))
        change = changed(module)
        kept = module.forward
        assert not torch.equal(kept(spectrogram(40)), expected)
        change.off()
        assert torch.equal(kept(spectrogram(40)), expected)


def test_another_slope_in_the_config_is_used() -> None:
    """Upstream reads it at each call."""
    plain = decoder()
    module = copy.deepcopy(plain)
    change = changed(module)
    for model in (plain, module):
        model.config.leaky_relu_slope = 0.7
    with torch.inference_mode():
        assert compare(plain(spectrogram(9)), module(spectrogram(9))).error < 1e-5
    change.off()


def test_upstream_serves_what_is_not_plain() -> None:
    plain = decoder()
    module = copy.deepcopy(plain)
    changed(module)
    assert module(spectrogram(9)).requires_grad
    assert torch.equal(module(spectrogram(9)), plain(spectrogram(9)))
    seen: list[Any] = []
    module.conv_pre.register_forward_hook(lambda *given: seen.append(given))
    with torch.inference_mode():
        module(spectrogram(9))
        assert len(seen) == 1
        with pytest.raises(RuntimeError):
            module(torch.randn(1, 9, 5))
    half = decoder().to(torch.float64)
    assert STAGE.applies(Part("it", "vocoder", half)) is not None
    assert STAGE.applies(Part("it", "vocoder", decoder().train())) is not None
    assert STAGE.applies(Part("it", "vocoder", decoder(), decides=True)) == "lengths hang on it"


def test_a_part_that_is_served_as_a_whole_is_not_tried_piece_by_piece() -> None:
    module = decoder()
    part = Part("it", "vocoder", module)
    assert ChannelsLastStage().applies(part) is None
    change = changed(module)
    assert ChannelsLastStage().applies(part) is not None
    change.off()
    assert ChannelsLastStage().applies(part) is None


def test_over_a_folded_flow() -> None:
    made: Any = VitsResidualCouplingBlock(config()).eval()
    plain = copy.deepcopy(made)
    fold = FoldStage().prepare(Part("it", "flow", made))
    fold.on()
    change = changed(made, "flow")
    with torch.inference_mode():
        expected = plain(spectrogram(12), torch.ones(1, 1, 12), None, reverse=True)
        assert compare(expected, made(spectrogram(12), torch.ones(1, 1, 12), None, reverse=True)).error < 1e-5
    change.off()
    fold.off()
    assert [str(type(m)) for m in made.modules()] == [str(type(m)) for m in plain.modules()]


def test_bf16_is_close() -> None:
    plain = decoder()
    described = hifigan(torch.bfloat16).described(plain)
    with torch.inference_mode():
        assert 0 < compare(plain(spectrogram(50)), described(spectrogram(50))).error < 5e-2
