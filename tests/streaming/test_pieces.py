"""The receptive field of a vocoder, the sound in pieces, and the detector of clicks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from clicks import clicks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import Event
from accelerate_tts.errors import ModelError
from accelerate_tts.events import NotApplied
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.streaming import Pieces, ReceptiveField, field_of, measure

pytestmark = pytest.mark.usefixtures("one_thread")


def vits() -> tuple[nn.Module, torch.Tensor]:
    from transformers import VitsConfig
    from transformers.models.vits.modeling_vits import VitsHifiGan

    config = VitsConfig(flow_size=8, upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8])
    return VitsHifiGan(config), torch.zeros(1, 8, 1)


def xtts() -> tuple[nn.Module, torch.Tensor]:
    generator = pytest.importorskip("TTS.vocoder.models.hifigan_generator").HifiganGenerator
    made = generator(8, 1, "1", [[1, 3, 5]], [3], [16, 16, 4, 4], 32, [8, 8, 2, 2], inference_padding=0)
    return made, torch.zeros(1, 8, 1)


def hop_of_odd_strides() -> tuple[nn.Module, torch.Tensor]:
    """A codec's decoder (DAC's kind): odd strides with output padding."""
    layers = [nn.Conv1d(4, 8, 7, padding=3)]
    for stride in (5, 3, 2):
        layers += [
            nn.ELU(),
            nn.ConvTranspose1d(8, 8, 2 * stride, stride, math.ceil(stride / 2), output_padding=stride % 2),
        ]
    return nn.Sequential(*layers, nn.Conv1d(8, 1, 7, padding=3)), torch.zeros(1, 4, 1)


def run(module: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    return module(frames)


VOCODERS = [vits, xtts, hop_of_odd_strides]


@pytest.fixture(scope="module", params=VOCODERS, ids=[make.__name__ for make in VOCODERS])
def vocoder(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    module, like = request.param()
    return module.eval().requires_grad_(requires_grad=False), like


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_joined_pieces_are_the_whole(vocoder: Any, data: st.DataObject) -> None:
    module, like = vocoder
    field = field_of(module, run, like)
    assert field is not None
    count = data.draw(st.integers(1, 90))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    frames = torch.randn(1, like.shape[1], count, generator=torch.Generator().manual_seed(count))
    whole = module(frames)
    pieces, sound = Pieces(module, field), []
    for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
        sound.append(pieces.push(frames[..., begin:end], last=False))
    sound.append(pieces.push(frames[..., :0], last=True))
    joined = torch.cat(sound, dim=-1)
    assert joined.shape == whole.shape
    assert float((joined - whole).abs().max() / whole.abs().max()) <= EXACT_TOLERANCE


def test_without_an_overlap_the_pieces_do_not_join(vocoder: Any) -> None:
    module, like = vocoder
    field = field_of(module, run, like)
    assert field is not None
    frames = torch.randn(1, like.shape[1], 80, generator=torch.Generator().manual_seed(0))
    whole, pieces = module(frames), Pieces(module, ReceptiveField(0, 0, field.hop))
    joined = torch.cat([pieces.push(frames[..., :40]), pieces.push(frames[..., 40:], last=True)], dim=-1)
    assert float((joined - whole).abs().max() / whole.abs().max()) > EXACT_TOLERANCE


@pytest.mark.parametrize(("pads", "left", "right"), [((3, 3), 3, 3), ((6, 0), 6, 0), ((0, 6), 0, 6), ((2, 4), 2, 4)])
def test_the_field_of_one_convolution(pads: tuple[int, int], left: int, right: int) -> None:
    convolution = nn.Conv1d(2, 1, 7)
    measured = measure(lambda frames: convolution(nn.functional.pad(frames, pads)), torch.zeros(1, 2, 1))
    assert measured == ReceptiveField(left, right, 1)


def test_inputs_of_several_rates() -> None:
    """As a vocoder with a source: frames, and samples that belong to them."""
    up, down = nn.ConvTranspose1d(2, 1, 4, 4), nn.Conv1d(1, 1, 9, padding=4)

    def vocoder(frames: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return up(frames) + down(source)

    field = measure(vocoder, torch.zeros(1, 2, 1), torch.zeros(1, 1, 4))
    assert field == ReceptiveField(1, 1, 4)
    frames, source = torch.randn(1, 2, 30), torch.randn(1, 1, 120)
    pieces = Pieces(vocoder, field)
    sound = [
        pieces.push(frames[..., i : i + 7], source[..., 4 * i : 4 * (i + 7)], last=i == 28) for i in range(0, 30, 7)
    ]
    assert torch.allclose(torch.cat(sound, dim=-1), vocoder(frames, source), atol=1e-6)


class OfAll(nn.Module):
    """Looks at all frames, as attention does."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames[:, :1] - frames.mean()


class LikeLengths(nn.Module):
    """Convolutional, but what it computes depends on the length."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames[:, :1] * frames.shape[-1]


class Remembers(nn.Module):
    """Forgets the noise of the probes within some frames, but may remember speech for ever."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.memory = nn.LSTM(2, 4, batch_first=True).requires_grad_(requires_grad=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.memory(frames.transpose(1, 2))[0].transpose(1, 2)[:, :1]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OfAll(), "more than 512 away"),
        (LikeLengths(), "joined pieces differ"),
        (Remembers(), "more than 512 away"),
    ],
)
def test_without_a_bound_the_sound_is_made_at_once(seen: list[Event], module: nn.Module, reason: str) -> None:
    assert field_of(module, run, torch.zeros(1, 2, 1)) is None
    assert field_of(module, run, torch.zeros(1, 2, 1)) is None
    (event,) = seen
    assert isinstance(event, NotApplied)
    assert reason in event.reason
    pieces, frames = Pieces(module, None), torch.randn(1, 2, 20)
    assert pieces.push(frames[..., :12]).shape[-1] == 0
    assert torch.equal(pieces.push(frames[..., 12:], last=True), module(frames))


@pytest.mark.parametrize(
    ("vocoder", "reason"),
    [(lambda frames: frames[:, :1, :5], "is no vocoder"), (lambda frames: torch.zeros_like(frames[:, :1]), "does not")],
)
def test_what_is_no_vocoder_is_refused(vocoder: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        measure(vocoder, torch.zeros(1, 2, 1))


# --- clicks -----------------------------------------------------------------------------------------------------------


def sound(seed: int) -> torch.Tensor:
    """A second of a voice's kind: harmonics that swell and sink, and breath."""
    time = torch.arange(24_000) / 24_000
    breath = torch.randn(24_000, generator=torch.Generator().manual_seed(seed))
    breath = nn.functional.avg_pool1d(breath[None], 5, 1, 2)[0]
    tones = sum(torch.sin(2 * math.pi * 120 * k * time + k) / k for k in range(1, 12))
    return 0.1 * tones * (1.2 + torch.sin(2 * math.pi * 3 * time)) + 0.01 * breath


@pytest.mark.parametrize("seed", range(3))
def test_a_jump_is_a_click(seed: int) -> None:
    wave, joints = sound(seed), [3_000, 8_001, 15_000, 23_990]
    assert clicks(wave, joints) == []
    broken = wave.clone()
    broken[8_001:] += 0.1
    assert clicks(broken, joints) == [8_001]


def test_a_lost_piece_is_a_click() -> None:
    """A piece that begins 3 ms late, as one joined by its length alone."""
    wave = sound(0)
    joined = torch.cat([wave[:9_000], wave[9_072:]])
    assert clicks(joined, [9_000, 12_000]) == [9_000]


def test_probes_meet_nothing_that_watches_the_module(vocoder: Any) -> None:
    """Tuning records calls of its parts, and a probe is no call of service."""
    module, like = vocoder
    watched = nn.Sequential(module)
    hook = module.register_forward_pre_hook(lambda *_: pytest.fail("a probe was seen"))
    assert field_of(watched, run, like) == field_of(module, run, like)
    hook.remove()
