"""Convolutions in fewer products: the same numbers to rounding, from the weights as they are, and torch's otherwise."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.models.vits.modeling_vits import VitsHifiGan

from accelerate_tts import Event, get_performance_optimizer, optimized_model, receipt_of
from accelerate_tts.kernels import toom_cook
from accelerate_tts.kernels.toom_cook import LEAST_FRAMES, MOST_DILATION, MOST_TAPS, Packed
from accelerate_tts.patching.class_swap import make_copies
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.inductor import options
from accelerate_tts.stages.layers import short_convolutions
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.short_convolutions import ShortConvolutionStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.compare import compare
from doubles import is_faster

CHANNELS = 36  # no multiple of any vector's length
LENGTH = 90
LIMIT = 1e-5
NOTHING = "no large 1-D convolution of stride 1 in fp32 in it"


def part_of(model: nn.Module, method: str = "__call__") -> Part:
    return Part("model", "vocoder", model, method=method)


def changed(model: nn.Module, *first: Any) -> Any:
    for stage in (*first, ShortConvolutionStage()):
        assert stage.applies(part_of(model)) is None
        change = stage.prepare(part_of(model))
        change.on()
    return change


def layer(taps: int = 3, channels: int = CHANNELS, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Conv1d(channels, channels + 4, taps, **{"padding": 1, **options}).eval()


def signal(batch: int = 2, channels: int = CHANNELS, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(1))


def run(model: Any, *given: Any) -> Any:
    with torch.inference_mode():
        return model(*(given or (signal(),)))


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    return float((expected.double() - found.double()).norm() / expected.double().norm())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The signals that the kernel was given."""
    found: list[torch.Size] = []
    own = toom_cook.convolve

    def counted(x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        found.append(x.shape)
        return own(x, *given, **named)

    monkeypatch.setattr(short_convolutions, "convolve", counted)
    return found


# --- vocoders -------------------------------------------------------------------------------------------------------

RATES: dict[str, Any] = {"upsample_initial_channel": 128, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
                         "resblock_kernel_sizes": [3, 7, 11],
                         "resblock_dilation_sizes": [[1, 3, 5]] * 3}  # fmt: skip


def quiet(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make().eval()


def speech_t5() -> Any:
    return quiet(lambda: transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(model_in_dim=40, **RATES)))


def vits() -> Any:
    return quiet(lambda: VitsHifiGan(transformers.VitsConfig(flow_size=40, **RATES)))


def xtts() -> Any:
    module = pytest.importorskip("TTS.vocoder.models.hifigan_generator")
    return quiet(lambda: module.HifiganGenerator(
        40, 1, "1", RATES["resblock_dilation_sizes"], [3, 7, 11], [8, 8], 128, [4, 4], inference_padding=0
    ))  # fmt: skip


class Hift(nn.Module):
    """Chatterbox's vocoder with a source that is given."""

    def __init__(self) -> None:
        super().__init__()
        module = pytest.importorskip("chatterbox.models.s3gen.hifigan")
        self.inner = module.HiFTGenerator(in_channels=40, base_channels=128, upsample_rates=[4, 4],
                                          upsample_kernel_sizes=[8, 8])  # fmt: skip

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        source = torch.randn(mel.shape[0], 1, mel.shape[2] * 64, generator=torch.Generator().manual_seed(2))
        found: torch.Tensor = self.inner.decode(x=mel, s=source)
        return found


VOCODERS: dict[str, tuple[Callable[[], Any], Callable[[], torch.Tensor]]] = {
    "SpeechT5": (speech_t5, lambda: signal(1, 40, 40)[0].t().contiguous()),
    "SpeechT5, batch": (speech_t5, lambda: signal(2, 40, 40).transpose(1, 2)),
    "VITS": (vits, lambda: signal(2, 40, 40)),
    "XTTS": (xtts, lambda: signal(1, 40, 40)),
    "Chatterbox": (lambda: quiet(Hift), lambda: signal(1, 40, 40)),
}


@pytest.mark.parametrize("below", ["", "fold", "layout", "fold, layout"])
@pytest.mark.parametrize("name", VOCODERS)
def test_a_vocoder(name: str, below: str, calls: list[torch.Size]) -> None:
    build, given = VOCODERS[name]
    model, x = build(), given()
    expected = run(model, x)
    classes = {path: type(module) for path, module in model.named_modules()}
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv1d)
              and min(layer.in_channels, layer.out_channels) >= 32 and layer.kernel_size[0] > 1]  # fmt: skip
    changes: list[Any] = []
    for stage in (*[FoldStage()] * ("fold" in below), *[ChannelsLastStage()] * ("layout" in below),
                  ShortConvolutionStage()):  # fmt: skip
        if stage.applies(part_of(model)) is None:  # XTTS and transformers come without a norm that is left
            changes.append(stage.prepare(part_of(model)))
            changes[-1].on()
    for _ in range(2):
        calls.clear()
        difference = compare(expected, run(model, x))
        assert (difference.reason, difference.error < LIMIT) == ("", True)
        assert len(calls) == len(layers), "each of them, once"
    for change in reversed(changes):
        change.off()
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("_accelerate")]
    assert torch.equal(run(model, x), expected)


def test_it_is_kept_said_and_undone(decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    only = ShortConvolutionStage.name
    decide(compare=is_faster, looks=False, unworthy=lambda _b, _p, stage: None if stage.name == only else "not here")
    model, x = vits(), signal(1, 40, 40)
    expected = run(model, x)
    optimized_model(warmup=x, tune_seconds=30, precision="exact")(lambda: model)()
    receipt = receipt_of(model)
    assert receipt is not None
    assert {result.stage for result in receipt.kept} == {only}, str(receipt)
    assert 0 < error(expected, run(model, x)) < LIMIT
    get_performance_optimizer().undo(model)
    assert torch.equal(run(model, x), expected)


# --- geometry -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(30, 70), outputs=st.integers(30, 70), taps=st.integers(1, 20), dilation=st.integers(1, 17),
    padding=st.one_of(st.integers(0, 9), st.sampled_from(["same", "valid"])), bias=st.booleans(),
    batch=st.integers(1, 3), more=st.integers(1, 60),
)  # fmt: skip
def test_every_shape_of_convolution(
    inputs: int, outputs: int, taps: int, dilation: int, padding: Any, bias: bool, batch: int, more: int
) -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(inputs, outputs, taps, padding=padding, dilation=dilation, bias=bias)
    x = signal(batch, inputs, dilation * (taps - 1) + more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that it copies for "same" with an even number of taps
        expected = run(model, x)
        stage = ShortConvolutionStage()
        fits = min(inputs, outputs) >= 32 and taps > 1 and dilation <= MOST_DILATION
        assert stage.applies(part_of(model)) == (None if fits else NOTHING)
        if fits:
            stage.prepare(part_of(model)).on()
        found = run(model, x)
    assert error(expected, found) < LIMIT
    assert found.stride() == expected.stride()
    if not fits or found.shape[2] < LEAST_FRAMES:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("frames", [1, LEAST_FRAMES - 1, LEAST_FRAMES, LEAST_FRAMES + 1])
def test_short_signals_are_upstreams(frames: int, calls: list[torch.Size]) -> None:
    model, x = layer(), signal(2, CHANNELS, frames)
    expected = run(model, x)
    changed(model)
    assert error(expected, run(model, x)) < LIMIT
    assert bool(calls) == (frames >= LEAST_FRAMES)
    assert calls or torch.equal(run(model, x), expected)


@pytest.mark.parametrize("lay", [
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    lambda x: torch.cat([x, x], 2)[..., 1 : x.shape[2]], lambda x: x[:1].expand(3, -1, -1), lambda x: x[..., ::2],
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
])  # fmt: skip
def test_results_are_contiguous_as_torchs_are(lay: Any, calls: list[torch.Size]) -> None:
    """An encoder gives what it has transposed, and may `.view()` the result."""
    model, x = layer(), lay(signal())
    expected = run(model, x)
    changed(model)
    found = run(model, x)
    assert calls
    assert error(expected, found) < LIMIT
    assert found.stride() == expected.stride()
    assert found.view(-1).numel() == expected.numel()


def in_layout(x: torch.Tensor) -> bool:
    return x.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)


def test_the_layout_is_kept_between_convolutions_in_channels_last_layout(calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(40, 40, 3), nn.LeakyReLU(), nn.Conv1d(40, 40, 3), nn.Conv1d(40, 40, 4, padding="same")
    )
    x = signal(2, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(model, x), run(model[2], x.transpose(1, 2).contiguous().transpose(1, 2))
    changed(model, ChannelsLastStage())
    seen: list[bool] = []
    hook = model[2].register_forward_hook(lambda _m, args, y: seen.append(in_layout(args[0]) and in_layout(y)))
    first = model[0].register_forward_hook(lambda _m, _args, y: y.transpose(1, 2).contiguous().transpose(1, 2))
    assert error(expected[0], run(model, x)) < LIMIT
    assert seen == [True], "nothing is reordered between two of them"
    for each in (hook, first):
        each.remove()
    assert run(model, x).is_contiguous()
    alone = run(model[2], x.transpose(1, 2).contiguous().transpose(1, 2))
    assert alone.is_contiguous(), "outside of a call of its part"
    assert error(expected[1], alone) < LIMIT
    assert len(calls) == 7


# --- what it leaves to torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        signal()[0], signal().double(), signal().bfloat16(), signal(2, CHANNELS - 1), signal(0), signal(2, CHANNELS, 0),
        signal()[0, 0], signal().long(), signal().to("meta"), signal()[None], torch.tensor(1.0),
        torch.view_as_complex(torch.stack([signal(), signal()], -1)).conj().imag, signal().to_sparse(),
        signal().to(torch.complex64),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device} {x.layout}",
)  # fmt: skip
def test_what_it_does_not_take_gets_torchs_own_answer(x: torch.Tensor, calls: list[torch.Size]) -> None:
    model = layer()

    def answer() -> Any:
        try:
            return run(model, x)
        except (RuntimeError, TypeError) as raised:
            return str(raised)

    expected = answer()
    changed(model)
    found = answer()
    assert not calls
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert found.device.type == "meta" or torch.equal(found, expected)
    else:
        assert found == expected


def test_something_that_is_no_tensor_is_torchs_error() -> None:
    model = layer()
    changed(model)
    with pytest.raises(TypeError, match=r"conv1d\(\)"):
        run(model, None)
    assert error(run(layer()), run(lambda x: model(input=x))) < LIMIT, "by torch's name of it"


class Causal(nn.Conv1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        return super().forward(nn.functional.pad(input, (2, 0)))


class Clamped(nn.Conv1d):
    def _conv_forward(self, *args: Any) -> torch.Tensor:
        return super()._conv_forward(*args).clamp(-0.1, 0.1)


class Named(nn.Conv1d):
    """A class of its own that computes as torch's."""


def with_own(name: str, what: Any) -> nn.Module:
    made = layer()
    vars(made)[name] = what
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    [
        Causal(40, 40, 3), Clamped(40, 40, 3), with_own("_conv_forward", lambda *_: torch.zeros(1)),
        with_own("forward", lambda x: x), layer().double(), layer().bfloat16(), layer(1), layer(stride=2),
        layer(groups=2), layer(padding_mode="reflect"), layer(dilation=MOST_DILATION + 1), layer(MOST_TAPS + 1),
        layer(channels=24), nn.Conv2d(40, 40, 3), nn.ConvTranspose1d(40, 40, 3), nn.Linear(40, 40),
        layer().to("meta"), nn.LazyConv1d(40, 3),
    ],
    ids=lambda model: f"{type(model).__name__} {str(model)[:70]}",
)  # fmt: skip
def test_other_layers_are_left_alone(model: nn.Module) -> None:
    assert ShortConvolutionStage().applies(part_of(nn.Sequential(model))) == NOTHING


def test_a_class_of_its_own_without_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    model = Named(40, 40, 3).eval()
    expected = run(model, signal(2, 40))
    change = changed(model)
    assert isinstance(model, Named)
    assert 0 < error(expected, run(model, signal(2, 40))) < LIMIT
    change.off()
    assert type(model) is Named


@pytest.mark.parametrize("step", ["forward", "_conv_forward"])
def test_a_patched_class(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is patched before is left alone; one that is patched later computes what the patch says."""
    own = getattr(nn.Conv1d, step)
    tuned, below, plain = nn.Sequential(layer()), nn.Sequential(layer()), nn.Sequential(layer())
    changed(tuned)
    changed(below, ChannelsLastStage())
    expected = run(plain)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv1d, step, lambda self, *given: own(self, *given) * 3)
        assert ShortConvolutionStage().applies(part_of(plain)) == NOTHING
        for model in (tuned, below):
            assert torch.equal(run(model), expected * 3)
    for model in (tuned, below):
        assert 0 < error(expected, run(model)) < LIMIT


def test_without_kernels_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_convolutions, "missing", lambda: "built without kernels")
    assert ShortConvolutionStage().applies(part_of(layer())) == "built without kernels"


def test_gradients_and_autocast_are_torchs_business(calls: list[torch.Size]) -> None:
    model, plain, x = layer(), layer(), signal().requires_grad_()
    changed(model)
    for each in (plain, model):
        each(x).square().sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(signal()), plain(signal()))
        assert model(signal()).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_inference(mode: Any, calls: list[torch.Size]) -> None:
    """Weights that were turned in one mode serve the other, and results are tensors of the mode of their call."""
    model = layer()
    changed(model)
    results = []
    for each in (mode, torch.inference_mode, torch.no_grad):
        with each():
            found = model(signal())
        assert found.is_inference() == (each is torch.inference_mode)
        results.append(found.clone())
    assert all(torch.equal(found, results[0]) for found in results)
    assert len(calls) == 3


# --- weights and attributes that change -------------------------------------------------------------------------------


def in_place(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.mul_(-2.0)
        model[0].bias.add_(1.0)


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model[0], "weight", Negative())


class Negative(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


def by_hook(model: Any) -> None:
    model[0].register_forward_pre_hook(lambda _module, given: (given[0] * 2,))
    model[0].register_forward_hook(lambda _module, _given, y: y + 1)


def other_layer(model: Any) -> None:
    model[0] = Causal(CHANNELS, 8, 3)
    torch.nn.init.constant_(model[0].weight, 0.1)
    torch.nn.init.constant_(model[0].bias, 0.1)


def fewer_outputs(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach()[:33].clone())
    model[0].bias = nn.Parameter(model[0].bias.detach()[:33].clone())


def more_taps(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.cat([model[0].weight.detach(), model[0].weight.detach()], -1))


def assign(**values: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for name, value in values.items():
            setattr(model[0], name, value)

    return edit


EDITS: dict[str, Callable[[Any], object]] = {
    "in place": in_place,
    "data": lambda model: model[0].weight.data.mul_(-1.5),
    "new data": lambda model: setattr(model[0].weight, "data", -model[0].weight.data.clone()),
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(-model[0].weight.detach())),
    "a strided one": lambda model: setattr(
        model[0].weight, "data", model[0].weight.data.flip(0).transpose(0, 1).contiguous().transpose(0, 1)
    ),
    "a state dict": lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    "an assigned one": lambda model: model.load_state_dict(
        {k: v * 2 for k, v in model.state_dict().items()}, assign=True
    ),
    "memory of numpy": lambda model: model[0].weight.detach().numpy().__imul__(-3),
    "a parametrization": parametrized,
    "a weight norm": lambda model: parametrizations.weight_norm(model[0]),
    "an old weight norm": lambda model: nn.utils.weight_norm(model[0]),
    "pruned": lambda model: prune.l1_unstructured(model[0], "weight", amount=0.5),
    "a hook": by_hook,
    "float64": lambda model: model.double(),
    "bf16": lambda model: model.bfloat16(),
    "bf16 and back": lambda model: model.bfloat16().float(),
    "no bias": assign(bias=None),
    "a bias of one": assign(bias=nn.Parameter(torch.tensor([0.25]))),
    "a bias of float64": assign(bias=nn.Parameter(torch.randn(CHANNELS + 4).double())),
    "a strided bias": assign(bias=nn.Parameter(torch.randn(2 * (CHANNELS + 4))[::2])),
    "no weight": assign(weight=None),
    "gradients": lambda model: model.requires_grad_(requires_grad=False),
    "padding": assign(padding=(4,)),
    "padding by a number": assign(padding=2),
    "padding by a list": assign(padding=[2]),
    "padding by name": assign(padding="same"),
    "negative padding": assign(padding=(-1,)),
    "padding of two": assign(padding=(1, 2)),
    "unknown padding": assign(padding="sane"),
    "stride": assign(stride=(2,)),
    "stride by a number": assign(stride=2),
    "stride by a list": assign(stride=[1]),
    "dilation": assign(dilation=(3,)),
    "dilation by a number": assign(dilation=2),
    "dilation by a list": assign(dilation=[2]),
    "dilation of two": assign(dilation=(1, 2)),
    "no dilation": assign(dilation=(0,)),
    "a wide dilation": assign(dilation=(20,)),
    "padding mode": assign(padding_mode="circular", _reversed_padding_repeated_twice=[1, 1]),
    "groups": lambda model: assign(groups=2, weight=nn.Parameter(model[0].weight.detach()[:, : CHANNELS // 2]))(model),
    "groups alone": assign(groups=2),
    "a name of channels": assign(in_channels=CHANNELS - 1),
    "a name of outputs": assign(out_channels=CHANNELS + 32),
    "a name of taps": assign(kernel_size=(5,)),
    "fewer outputs": fewer_outputs,
    "more taps": more_taps,
    "a forward": lambda model: vars(model[0]).update(forward=lambda x: x * 2),
    "a step": lambda model: vars(model[0]).update(_conv_forward=lambda x, *_: x * 2),
    "another layer": other_layer,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("below", ["", "layout"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_after_the_change_are_seen(name: str, below: str) -> None:
    """An edited twin that was never tuned gives the same, or the same error."""
    plain, model = nn.Sequential(layer(), nn.Tanh()), nn.Sequential(layer(), nn.Tanh())
    changes = []
    for stage in (*[ChannelsLastStage()] * bool(below), ShortConvolutionStage()):
        changes.append(stage.prepare(part_of(model)))
        changes[-1].on()
    assert 0 < error(run(plain), run(model)) < LIMIT

    def answer(each: Any) -> Any:
        try:
            return run(each, signal().to(getattr(each[0].weight, "dtype", torch.float32)))
        except (RuntimeError, AttributeError, ValueError, TypeError) as raised:
            return type(raised)

    for each in (plain, model):
        torch.manual_seed(3)
        EDITS[name](each)
    for _ in range(2):
        expected, found = answer(plain), answer(model)
        if isinstance(expected, torch.Tensor):
            assert isinstance(found, torch.Tensor), found
            assert error(expected, found) < (0.02 if expected.dtype == torch.bfloat16 else LIMIT)
        else:
            assert found is expected
    for change in reversed(changes):
        change.off()
    expected, found = answer(plain), answer(model)
    assert torch.equal(expected, found) if isinstance(expected, torch.Tensor) else found is expected


def test_a_weight_norm_that_is_trained_on(calls: list[torch.Size]) -> None:
    """The old one computes the weight by a hook at each call; it is turned anew only where it was written."""
    for norm in (nn.utils.weight_norm, parametrizations.weight_norm):
        plain, model = (quiet(lambda norm=norm: norm(layer())) for _ in range(2))
        with torch.no_grad():
            changed(model)
            for factor in (1.0, 2.0, 1.0, -1.0):
                for each in (plain, model):
                    first = next(each.parameters())
                    first.mul_(factor)
                    next(reversed(list(each.parameters()))).add_(0.1)
                assert 0 < error(plain(signal()), model(signal())) < LIMIT
    assert len(calls) == 8


def test_weights_are_turned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    own = Packed.of
    monkeypatch.setattr(Packed, "of", lambda *weights: made.append(weights) or own(*weights))
    for model in (layer(), quiet(lambda: nn.utils.weight_norm(layer()))):
        made.clear()
        with torch.no_grad():
            changed(model)
            for _ in range(3):
                model(signal())
        assert len(made) == 1


# --- copies, threads ----------------------------------------------------------------------------------------------


def test_copies_and_pickles_are_of_the_plain_class() -> None:
    model = nn.Sequential(layer(), nn.Tanh())
    expected, keys = run(model), list(model.state_dict())
    changed(model)
    run(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model)),
                  torch.load(stored, weights_only=False)):  # fmt: skip
        if other[0] is not model[0]:
            assert type(other[0]) is nn.Conv1d
            assert not [name for name in vars(other[0]) if name.startswith("_accelerate")]
            assert torch.equal(run(other), expected)
    assert list(model.state_dict()) == keys
    assert 0 < error(expected, run(model)) < LIMIT


def test_many_threads_at_once_and_one_that_switches_it_off() -> None:
    model, x = nn.Sequential(layer(), layer(3, CHANNELS + 4)), signal()
    expected = run(model, x)
    change = ShortConvolutionStage().prepare(part_of(model))
    wrong: list[Any] = []
    stop = threading.Event()

    def speak() -> None:
        while not stop.is_set():
            try:
                far = error(expected, run(model, x))
                if not far < LIMIT:
                    wrong.append(far)
            except Exception as raised:
                wrong.append(raised)

    speakers = [threading.Thread(target=speak) for _ in range(3)]
    for speaker in speakers:
        speaker.start()
    for _ in range(30):
        change.on()
        run(model, x)
        change.off()
    stop.set()
    for speaker in speakers:
        speaker.join()
    assert not wrong


@pytest.mark.parametrize("number", [1, 2, 3])
def test_numbers_of_threads(number: int) -> None:
    model, x = layer(7, padding=3), signal(1, CHANNELS, 3000)
    expected = run(model, x)
    changed(model)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        assert 0 < error(expected, run(model, x)) < LIMIT
    finally:
        torch.set_num_threads(before)


def test_numbers_that_are_not_finite_are_seen() -> None:
    """They reach a few frames more than upstream's, as the stage says, and no other sequence."""
    model, x = layer(dilation=2), signal()
    x[1, 3, 40] = torch.inf
    expected = run(model, x)
    changed(model)
    found = run(model, x)
    assert error(expected[0], found[0]) < LIMIT
    lost = (~found[1].isfinite()).any(0).nonzero().flatten()
    upstreams = (~expected[1].isfinite()).any(0).nonzero().flatten()
    assert {*upstreams.tolist()} <= {*lost.tolist()}
    assert upstreams.min() - lost.min() <= 12
    assert lost.max() - upstreams.max() <= 12


# --- compilers and exporters ------------------------------------------------------------------------------------------


class Compiled:
    """The graphs that torch.compile made, run as dynamo traced them."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> list[str]:
        return [str(node.target) for graph in self.graphs for node in graph.graph.nodes]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Other tests may have had it give up the code of `nn.Sequential`."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ours(fresh_dynamo: None) -> Iterator[None]:
    """Compiled by the package, whose graphs are guarded on weights, and not by a user."""
    from accelerate_tts.inspection.tracing import compiles_itself

    token = compiles_itself.set(True)
    yield
    compiles_itself.reset(token)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("below", [(), (ChannelsLastStage,)], ids=["alone", "over channels-last"])
@pytest.mark.parametrize("ran", [True, False], ids=["ran before", "compiled first"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_graph_of_ours_calls_the_operator(below: Any, ran: bool, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(40, 40, 3, padding=1), nn.LeakyReLU(), nn.Conv1d(40, 48, 5, padding="same")).eval()
    signals = [signal(2, 40, length) for length in (60, 77, 130)]
    expected = [run(model, x) for x in signals]
    changed(model, *(stage() for stage in below))
    if ran:
        run(model, signals[0])
    make_copies(model)
    backend = Compiled()
    with options(None), torch.inference_mode():
        call = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
        for x, wanted in zip(signals, expected, strict=True):
            found = call(x)
            assert error(wanted, found) < LIMIT
            assert found.is_contiguous()
    graphs = len(backend.graphs)
    assert sum("short_convolution" in name for name in backend.operators()) == 2 * graphs
    assert graphs == 1 if dynamic else graphs <= 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_users_own_graph_is_upstreams() -> None:
    """It never checks that weights were written, so it gets none of our copies."""
    model, backend = nn.Sequential(layer()), Compiled()
    changed(model)
    run(model)
    with torch.no_grad():
        call = torch.compile(model, backend=backend, fullgraph=True)
        call(signal())
        model[0].weight.mul_(-2.0)
        expected = nn.functional.conv1d(signal(), model[0].weight, model[0].bias, padding=1)
        assert error(expected, call(signal())) < LIMIT
    assert not [name for name in backend.operators() if "accelerate" in name]


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_around_it() -> None:
    """The real compiler, with a length that changes."""
    pytest.importorskip("torch._inductor")
    from accelerate_tts.stages.compile.whole import CompileStage

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(40, 40, 3, padding=1), nn.LeakyReLU(), nn.Conv1d(40, 40, 7, padding=3)).eval()
    signals = [signal(1, 40, length) for length in (60, 61, 130)]
    expected = [run(model, x) for x in signals]
    change = changed(model, ChannelsLastStage())
    compiled: Any = CompileStage("default").prepare(part_of(model))
    compiled.on()
    for x, wanted in zip(signals, expected, strict=True):
        assert error(wanted, run(model, x)) < LIMIT
    assert compiled.graphs > 0
    with torch.no_grad():
        model[0].weight.mul_(-1.0)
        model[0].bias.mul_(-1.0)
    plain = copy.deepcopy(model)
    assert error(run(plain, signals[0]), run(model, signals[0])) < LIMIT
    compiled.off()
    change.off()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["trace", "export", "script", "fx", "functional", "vmap", "fake", "jvp", "meta"])
def test_tools_see_upstreams_own_operators(tool: str) -> None:
    plain, model, x = nn.Sequential(layer()), nn.Sequential(layer()), signal()
    changed(model)
    expected = run(model)
    with torch.no_grad():
        if tool == "trace":
            traced: Any = torch.jit.trace(model, (x,))
            assert "accelerate" not in str(traced.inlined_graph)
            assert error(plain(x), traced(x)) < LIMIT
        elif tool == "export":
            if Version(torch.__version__) < Version("2.7"):
                pytest.skip("before torch 2.7, nothing tells of an export")
            for strict in (False, True):
                program = torch.export.export(model, (x,), strict=strict)
                assert "accelerate" not in str(program.graph)
                assert error(plain(x), program.module()(x)) < LIMIT
        elif tool == "script":
            assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), plain(x))
        elif tool == "fx":
            assert error(plain(x), torch.fx.symbolic_trace(model)(x)) < LIMIT
        elif tool == "functional":
            halved = {name: value / 2 for name, value in model.named_parameters()}
            assert error(plain(x) / 2, torch.func.functional_call(model, halved, (x,))) < LIMIT
        elif tool == "vmap":
            assert error(torch.stack([plain(x), plain(-x)]), torch.func.vmap(model)(torch.stack([x, -x]))) < LIMIT
        elif tool == "jvp":
            value, tangent = torch.func.jvp(model, (x,), (x,))
            assert error(plain(x), value) < LIMIT
            assert error(plain(x) - plain(torch.zeros_like(x)), tangent) < LIMIT
        elif tool == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert model(mode.from_tensor(x)).shape == expected.shape
        else:
            assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == expected.shape
    assert torch.equal(run(model), expected), "and afterwards it computes as before"


# --- on top of others -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    actions=st.lists(
        st.sampled_from(["fold", "layout", "layers", "part", "short", "undo", "load", "copy"]), max_size=8
    ),
    old=st.booleans(),
)
def test_any_sequence_with_other_stages(actions: list[str], old: bool) -> None:
    """Changes are undone in the reverse order, as the engine does; outputs stay those of an untouched model."""
    norm: Any = nn.utils.weight_norm if old else parametrizations.weight_norm

    def build() -> Any:
        return quiet(lambda: nn.Sequential(
            norm(nn.Conv1d(40, 48, 3)), nn.LeakyReLU(), norm(nn.ConvTranspose1d(48, 40, 4)), norm(nn.Conv1d(40, 40, 5)),
        ))  # fmt: skip

    stages: dict[str, Any] = {
        "fold": FoldStage(), "layout": ChannelsLastStage(), "short": ShortConvolutionStage(),
        "layers": HalfStage(torch.bfloat16, carried=False), "part": HalfStage(torch.bfloat16, carried=True),
    }  # fmt: skip
    model, reference, x = build(), build(), signal(1, 40, 60)
    for each in (model, reference):
        with torch.no_grad():
            each(x)
    classes = [type(module) for module in model]
    changes: list[Any] = []
    kept: list[str] = []
    for action in actions:
        if action in stages and action not in kept and stages[action].applies(part_of(model)) is None:
            changes.append(stages[action].prepare(part_of(model)))
            changes[-1].on()
            kept.append(action)
        elif action == "undo" and changes:
            changes.pop().off()
            kept.pop()
        elif action == "load":
            state = {key: value * 1.1 for key, value in reference.state_dict().items()}
            model.load_state_dict(state)
            reference.load_state_dict(state)
        elif action == "copy":
            with torch.no_grad():
                assert error(reference(x), copy.deepcopy(model)(x)) < LIMIT
        limit = 0.03 if {"layers", "part"} & {*kept} else LIMIT
        assert error(run(reference, x), run(model, x)) < limit
    while changes:
        changes.pop().off()
    assert torch.equal(run(model, x), run(reference, x))
    assert [type(module) for module in model] == classes


def test_events_are_none(seen: list[Event]) -> None:
    model = layer()
    change = changed(model)
    for x in (signal(), signal(1, CHANNELS, 5), signal().double().float()):
        run(model, x)
    change.off()
    assert not seen
