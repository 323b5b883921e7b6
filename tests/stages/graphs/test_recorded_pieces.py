"""Vocoders recorded in pieces, as far as a CPU can show it: the recording of a piece runs again for each length.

Nothing here ran on a device; tests/cuda/test_recorded_parts.py is for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import Event
from accelerate_tts.cli.bench import systems
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.events import FellBack, NotApplied
from accelerate_tts.inspection.receptive_field import ReceptiveField, checked_field, pieces_of
from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.graphs.recorded_parts import PartBounds, RecordedPartsStage
from accelerate_tts.stages.graphs.recorded_pieces import RecordedPiecesStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.compare import compare
from accelerate_tts.tuning.exclusions import obstacle
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("one_thread")


class Divided:
    """A module with the stage on, over recordings that run again and fail where a graph would be wrong."""

    def __init__(self, module: nn.Module, bounds: PartBounds | None = None, **options: Any) -> None:
        self.recorders: list[Reruns] = []
        self.module: Any = module.eval()
        watched = options.pop("watched", True)

        def recorder(device: torch.device) -> Reruns:
            self.recorders.append(Reruns(device, watched=watched))
            return self.recorders[-1]

        self.stage = RecordedPiecesStage(recorder, bounds=bounds or PartBounds(), **options)
        self.part = Part("part", "vocoder", module)
        assert self.stage.applies(self.part) is None
        self.change: Any = self.stage.prepare(self.part)
        self.change.on()

    @property
    def replays(self) -> int:
        return sum(recorder.replays for recorder in self.recorders)

    def check(self, *args: Any, **kwargs: Any) -> int:
        """Call the module; the result must be the untouched one's to rounding. Returns the replays that it took."""
        before = self.replays
        with torch.inference_mode():
            self.change.off()
            expected = self.module(*args, **kwargs)
            self.change.on()
            found = self.module(*args, **kwargs)
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()
        assert compare(expected, found).error <= EXACT_TOLERANCE
        return self.replays - before


def reasons(seen: list[Event], kind: type[Event]) -> list[str]:
    return [str(event) for event in seen if isinstance(event, kind)]


# --- upstream's vocoders ----------------------------------------------------------------------------------------------


def xtts() -> tuple[nn.Module, Callable[[int], tuple[Any, ...]]]:
    """With a speaker, which has no frames."""
    generator = pytest.importorskip("TTS.tts.layers.xtts.hifigan_decoder").HifiganGenerator
    made = generator(
        8, 1, "1", [[1, 3, 5], [1, 3, 5]], [3, 7], [8, 8], 32, [4, 4], inference_padding=0,
        cond_channels=6, conv_pre_weight_norm=False, conv_post_weight_norm=False, conv_post_bias=False,
        cond_in_each_up_layer=True,
    )  # fmt: skip
    speaker = noise(1, 6, 1, seed=3)
    return made, lambda count: (noise(1, 8, count), speaker)


def mms() -> tuple[nn.Module, Callable[[int], tuple[Any, ...]]]:
    from transformers import VitsConfig
    from transformers.models.vits.modeling_vits import VitsHifiGan

    config = VitsConfig(flow_size=8, upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8])
    return VitsHifiGan(config), lambda count: (noise(1, 8, count),)


def higgs() -> tuple[nn.Module, Callable[[int], tuple[Any, ...]]]:
    """The decoder of its codec, as the library builds it: odd strides with output padding, and Snake activations."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.higgs_audio_v2_tokenizer")
    codec = transformers.DacConfig(
        encoder_hidden_size=8, decoder_hidden_size=32, hidden_size=16, upsampling_ratios=[4, 3, 2],
        downsampling_ratios=[2, 3, 4],
    )  # fmt: skip
    config = transformers.HiggsAudioV2TokenizerConfig(acoustic_model_config=codec.to_dict())
    return transformers.HiggsAudioV2TokenizerModel(config).acoustic_decoder, lambda count: (noise(1, 16, count),)


VOCODERS = [xtts, mms, higgs]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VOCODERS, ids=[make.__name__ for make in VOCODERS])
def vocoder(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    module, call = request.param()
    return module.requires_grad_(requires_grad=False), call


def test_each_length_is_replayed_by_one_recording(vocoder: Any, seen: list[Event]) -> None:
    module, call = vocoder
    divided = Divided(module)
    divided.check(*call(300))
    divided.change.end_warmup()
    (division,) = divided.change.divisions

    @settings(max_examples=25, deadline=None)
    @given(st.integers(division.size, 400), st.integers(1, 3))
    def lengths(count: int, step: int) -> None:
        frames, *more = call(step * count)
        assert divided.check(frames[..., ::step], *more) == len(pieces_of(count, division.size, division.field))
        assert divided.change.graphs == 1

    lengths()
    assert not seen


def test_a_call_that_is_shorter_than_a_piece_is_recorded_by_shape(vocoder: Any) -> None:
    module, call = vocoder
    divided = Divided(module)
    divided.check(*call(300))
    (division,) = divided.change.divisions
    for count in (1, 2, division.size - 1):
        assert divided.check(*call(count)) == 1
    assert divided.change.graphs == 4


@pytest.mark.parametrize("first", [1, 2, 40, 700])
def test_the_first_call_may_have_any_length(vocoder: Any, first: int) -> None:
    module, call = vocoder
    divided = Divided(module)
    divided.check(*call(first))
    divided.check(*call(300))
    (division,) = divided.change.divisions
    assert division.size > division.field.overlap
    divided.check(*call(division.longest if first < 3 else 500))
    divided.check(*call(301))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xtts", "mms", "higgs"])
def test_a_systems_vocoder_says_any_length_in_pieces(name: str, example: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    if name == "higgs":
        loaded = example("higgs_backend").random(tiny=True)
        model: Any = {"codec": loaded.codec}
        books = loaded.codec.quantizer.quantizers

        def say(count: int) -> torch.Tensor:
            codes = torch.randint(0, 16, (1, len(books), count), generator=torch.Generator().manual_seed(count))
            return loaded.codec.decode(codes).audio_values

        sizes = [90, 131, 77, 150]
    else:
        try:
            built = systems.SYSTEMS[name].build("tiny", None, "cpu")
        except MissingExtraError as missing:
            pytest.skip(str(missing))
        model = built.model

        def say(count: int) -> torch.Tensor:
            return torch.as_tensor(torch.utils._pytree.tree_leaves(built.speak(count / 10))[0])

        sizes = [10, 12, 14] if name == "xtts" else [32, 37, 29, 43]

    def speak(count: int) -> torch.Tensor:
        with seeded("cpu"), torch.inference_mode():
            return say(count)

    expected = [speak(count) for count in sizes]
    (part,) = (part for part in describe(model).parts if part.kind == "vocoder")
    made: list[Reruns] = []
    stage = RecordedPiecesStage(lambda device: made.append(Reruns(device)) or made[-1])
    assert stage.applies(part) is None
    change: Any = stage.prepare(part)
    change.on()
    try:
        replays = []
        for count, whole in zip(sizes, expected, strict=True):
            assert compare(whole, speak(count)).error <= EXACT_TOLERANCE
            replays.append(made[0].replays)
            change.end_warmup()
        assert sorted(set(replays)) == replays, "each call is replayed"
        assert change.graphs == 1
    finally:
        change.off()


def test_chatterboxes_vocoder_draws_and_the_modules_in_it_run_in_pieces(seen: list[Event]) -> None:
    hifigan = pytest.importorskip("chatterbox.models.s3gen.hifigan")
    predictor = pytest.importorskip("chatterbox.models.s3gen.f0_predictor").ConvRNNF0Predictor
    torch.manual_seed(0)
    vocoder = hifigan.HiFTGenerator(
        in_channels=8, base_channels=32, upsample_rates=[4, 2], upsample_kernel_sizes=[8, 4],
        source_resblock_kernel_sizes=[3, 3], source_resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        f0_predictor=predictor(in_channels=8, cond_channels=16),
    ).eval()  # fmt: skip
    part = Part("vocoder", "vocoder", vocoder, method="inference")
    stage = RecordedPiecesStage(Reruns)
    change: Any = stage.prepare(part)

    def say(count: int) -> list[torch.Tensor]:
        torch.manual_seed(count)
        with torch.inference_mode():
            return list(vocoder.inference(noise(1, 8, count)))

    expected = {count: say(count) for count in (200, 231, 180, 333)}
    change.on()
    graphs = []
    for count, whole in expected.items():
        for a, b in zip(whole, say(count), strict=True):
            assert compare(a, b).error <= EXACT_TOLERANCE
        graphs.append(change.graphs)
        change.end_warmup()
    # The predictor, and the residual blocks; the source draws.
    assert graphs == [1 + 2 + 4] * 4
    assert len(change.divisions) == 1 + 2 + 4
    assert any("draws random numbers" in told for told in reasons(seen, NotApplied))
    assert not reasons(seen, FellBack)


# --- what is not local ------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Convolutions, with what a test puts in their middle."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(4, 8, 5, padding=2), nn.Conv1d(8, 2, 3, padding=1)
        self.between = between

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> Any:
        return self.last(self.between(self.first(x).tanh()) * gain).tanh()


def of_the_mean(y: torch.Tensor) -> torch.Tensor:
    return y - y.mean(-1, keepdim=True)


def normed(y: torch.Tensor) -> torch.Tensor:
    return nn.functional.instance_norm(y)


def attends(y: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(*[y.transpose(1, 2)] * 3).transpose(1, 2)


def scaled_by_the_length(y: torch.Tensor) -> torch.Tensor:
    return y * (y.shape[-1] / 100)


def another_when_long(y: torch.Tensor) -> torch.Tensor:
    return y.relu() if y.shape[-1] > 900 else y.tanh()


def scaled_when_long(y: torch.Tensor) -> torch.Tensor:
    return y * (0.5 if y.shape[-1] > 900 else 1.0)


def summed_so_far(y: torch.Tensor) -> torch.Tensor:
    return y.cumsum(-1) / 50


def by_place(y: torch.Tensor) -> torch.Tensor:
    return y * torch.arange(y.shape[-1])


def backwards(y: torch.Tensor) -> torch.Tensor:
    return y.flip(-1)


def padded_to_eights(y: torch.Tensor) -> torch.Tensor:
    count = y.shape[-1]
    return nn.functional.pad(y + 1, (0, -count % 8)).roll(1, -1)[..., :count]


NOT_LOCAL = [
    (of_the_mean, "depend on frames more than"), (normed, "depend on frames more than"),
    (attends, "depend on frames more than"), (summed_so_far, "depend on frames more than"),
    (scaled_by_the_length, "joined pieces differ"), (by_place, "joined pieces differ"),
    (backwards, "joined pieces differ"), (another_when_long, "depends on the length"),
    (scaled_when_long, "depends on the length"), (padded_to_eights, "depends on the length"),
]  # fmt: skip


@pytest.mark.parametrize(("between", "reason"), NOT_LOCAL, ids=[case[0].__name__ for case in NOT_LOCAL])
def test_a_part_that_is_not_local_is_upstreams_with_an_event(between: Any, reason: str, seen: list[Event]) -> None:
    divided = Divided(Around(between))
    with torch.inference_mode():
        for count in (300, 301, 2000):
            divided.change.off()
            expected = divided.module(noise(1, 4, count))
            divided.change.on()
            assert torch.equal(divided.module(noise(1, 4, count)), expected)
    assert (divided.change.graphs, divided.change.divisions) == (0, [])
    (event,) = [event for event in seen if isinstance(event, FellBack)]
    assert (event.what, event.stage) == ("part", "recorded in pieces"), "tuning drops the stage by this event"
    assert reason in event.reason
    divided.change.off()
    assert RecordedPartsStage(Reruns).applies(divided.part) is None, "it is tried next"


def test_other_arguments_with_frames_are_not_divided(seen: list[Event]) -> None:
    """They would have to be cut where the frames are, and which they are cannot be told."""

    class Masked(Around):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) * mask

    divided = Divided(Masked())
    for count in (300, 301):
        divided.check(noise(1, 4, count), torch.ones(1, 1, count))
    assert divided.change.divisions == []
    assert reasons(seen, FellBack)


@pytest.mark.parametrize("width", [1, 300])
def test_an_argument_as_wide_as_the_frames_are_many_is_none_of_them(width: int) -> None:
    class Conditioned(Around):
        def forward(self, x: torch.Tensor, voice: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) + voice.mean(-1, keepdim=True)

    divided = Divided(Conditioned())
    for count in (300, 301, 450):
        divided.check(noise(1, 4, count), noise(1, 2, width, seed=count))
    assert divided.change.graphs == 1


def test_other_kinds_of_calls_have_a_recording_each() -> None:
    divided = Divided(Around())
    for count in (300, 420, 333):
        divided.check(noise(1, 4, count))
        divided.check(noise(3, 4, count))
        divided.check(noise(1, 4, count), 2.0)
    assert divided.change.graphs == 3
    frames = noise(1, count, 4).transpose(1, 2)
    with torch.inference_mode():
        assert torch.allclose(divided.module(frames), divided.module(frames.contiguous()), atol=1e-6)
    assert divided.change.graphs == 3


# --- weights, structure, threads -------------------------------------------------------------------------------------


def test_a_field_is_that_of_the_structure_and_not_of_the_weights() -> None:
    """Weights that are zero when it is measured hide no part of the field from a value that is not a number."""
    module = Around()
    with torch.no_grad():
        module.first.weight[..., 0] = 0
        module.last.weight[..., 2] = 0
    divided = Divided(module)
    divided.check(noise(1, 4, 300))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    divided.check(noise(1, 4, 301))
    (division,) = divided.change.divisions
    assert division.field == ReceptiveField(3, 3, 1)
    assert divided.change.graphs == 1


def test_a_module_that_is_exchanged_is_measured_again(seen: list[Event]) -> None:
    divided = Divided(Around())
    divided.check(noise(1, 4, 300))
    divided.change.end_warmup()
    divided.module.first = nn.Conv1d(4, 8, 9, padding=4)
    for count in range(300, 310):
        divided.check(noise(1, 4, count))
    (division,) = divided.change.divisions
    assert division.field == ReceptiveField(5, 5, 1)
    assert divided.change.graphs == 2
    divided.module.between = of_the_mean
    for count in range(400, 420):
        divided.check(noise(1, 4, count))
    assert divided.change.graphs == 2
    assert "depend on frames" in reasons(seen, FellBack)[0]


def test_hooks_inside_are_called() -> None:
    divided = Divided(Around())
    divided.check(noise(1, 4, 300))
    called: list[int] = []
    divided.module.first.register_forward_hook(lambda *_given: called.append(1))
    for _ in range(6):
        with torch.inference_mode():
            divided.module(noise(1, 4, 300))
    assert len(called) == 6


@pytest.mark.slow
def test_eight_threads_share_a_recording(vocoder: Any) -> None:
    module, call = vocoder
    work = list(range(150, 174))
    with torch.inference_mode():
        expected = [module.eval()(*call(count)) for count in work]
    divided = Divided(module)
    divided.check(*call(150))
    start = threading.Barrier(8)

    def ask(number: int) -> list[torch.Tensor]:
        start.wait()
        with torch.inference_mode():
            return [divided.module(*call(count)) for count in work[number:] + work[:number]]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(ask, range(8))):
            turned = expected[number:] + expected[:number]
            assert all(compare(a, b).error <= EXACT_TOLERANCE for a, b in zip(turned, found, strict=True))
    assert divided.change.graphs == 1


# --- pieces -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_cover_the_whole_with_what_they_need(data: st.DataObject) -> None:
    field = ReceptiveField(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)), data.draw(st.integers(1, 5)))
    size = data.draw(st.integers(field.overlap + 1, 40))
    frames = data.draw(st.integers(size, 200))
    pieces = pieces_of(frames, size, field)
    made = 0
    for begin, start, end in pieces:
        assert 0 <= begin <= frames - size
        stop = begin + size if end is None else begin + end // field.hop
        assert begin * field.hop + start == made, "it goes on where the one before ended"
        assert begin == 0 or start >= field.left * field.hop
        assert (end is None) == (begin + size == frames) or end is not None
        assert end is None or end <= (size - field.right) * field.hop
        made = stop * field.hop
    assert made == frames * field.hop
    assert pieces[0].begin == 0
    assert pieces[-1].end is None


def test_all_channels_and_rows_count() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Conv1d(2, 1, 1), nn.Conv1d(2, 1, 9, padding=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.first(x), self.other(x)], 1)

    found = checked_field(Grouped(), lambda module, x: module(x), torch.zeros(1, 2, 1))
    assert found == ReceptiveField(4, 4, 1)


# --- where it is tried -----------------------------------------------------------------------------------------------


def test_it_is_tried_before_recordings_by_shape_and_for_vocoders_only() -> None:
    def names(device: str) -> list[str]:
        return [stage.name for stage in default_stages(device, None)]

    for device in ("cuda", "xpu"):
        assert names(device).index("recorded in pieces") < names(device).index("recorded by shape")
    assert not any("in pieces" in name for device in ("cpu", "mps") for name in names(device))
    assert RecordedPiecesStage(Reruns).applies(Part("part", "encoder", Around())) == "it is no vocoder"
    assert RecordedPiecesStage().applies(Part("part", "vocoder", Around())) == "torch has no graphs for cpu"


def test_a_part_in_pieces_is_not_recorded_by_shape_too() -> None:
    divided = Divided(Around())
    by_shape, half = RecordedPartsStage(Reruns), HalfStage(torch.bfloat16, carried=True)
    assert by_shape.applies(divided.part) == "its pieces are recorded, which serve each length"
    assert obstacle(half, divided.part) == "its steps are recorded"
    assert RecordedPiecesStage(Reruns, inside=half).applies(divided.part) is None, "it competes with what is in force"
    divided.change.off()
    assert by_shape.applies(divided.part) is None


def test_half_precision_is_inside_the_pieces() -> None:
    divided = Divided(Around(), inside=HalfStage(torch.bfloat16, carried=True), watched=False)
    with torch.inference_mode():
        divided.change.off()
        exact = divided.module(noise(1, 4, 333))
        divided.change.on()
        divided.module(noise(1, 4, 300))
        found = divided.module(noise(1, 4, 333))
    assert divided.change.graphs == 1
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 1e-1


def test_a_folded_weight_norm_is_followed() -> None:
    module = Around()
    nn.utils.parametrizations.weight_norm(module.first)
    fold = FoldStage().prepare(Part("part", "vocoder", module.eval()))
    fold.on()
    divided = Divided(module, watched=False)
    divided.check(noise(1, 4, 300))
    with torch.no_grad():
        module.first.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr]
    for count in range(300, 306):
        divided.check(noise(1, 4, count))
    divided.change.off()
    fold.off()
