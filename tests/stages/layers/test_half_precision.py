"""Half-precision layers: nearly the same numbers in the same dtype, and a module that is itself in every other way.

This processor may have no bf16 units: bf16 is then emulated, slowly and right, which is all that these tests need.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune, rnn
from transformers import LlamaConfig, LlamaModel, VitsConfig, VitsModel

from accelerate_tts import Event
from accelerate_tts.device.half_dtypes import half_dtypes
from accelerate_tts.device.setup import unsafe_compiler
from accelerate_tts.events import FellBack
from accelerate_tts.patching.class_swap import ClassSwap, make_copies
from accelerate_tts.patching.derived import Derived
from accelerate_tts.plan import Part
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompiledCall, CompileStage
from accelerate_tts.stages.layers import half_precision as stage_module
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeRecurrentStage, QuantizeStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.compare import compare

NEAR = 0.03
X = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    OLD: Callable[..., nn.Module] = nn.utils.weight_norm
NEW: Callable[..., nn.Module] = nn.utils.parametrizations.weight_norm


pytestmark = pytest.mark.usefixtures("one_thread")


class Recurrent(nn.Module):
    """A convolution, norms, an LSTM and a GRU in between, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.act = nn.PReLU(8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 12, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.act(self.group(self.conv(x))).transpose(1, 2))
        y, _ = self.gru(y)
        return self.out(self.norm(y))


class Packed(Recurrent):
    """An LSTM that is given a packed sequence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = rnn.pack_padded_sequence(self.conv(x).transpose(1, 2), [24, 17], batch_first=True)
        y, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(self.norm(y))


class Fourier(nn.Module):
    """The end of Vocos and iSTFTNet: a magnitude by exp, a phase by sin, and the inverse transform."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 18, 3, padding=1)
        self.window = torch.hann_window(16)  # no buffer: what has weights of its own is given fp32 by its layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitude, phase = self.conv(x).chunk(2, 1)
        return self.inverse(torch.exp(magnitude) * torch.exp(1j * torch.sin(phase)))

    def inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        return torch.istft(spectrum, 16, 4, window=self.window)


class FourierByMethods(Fourier):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitude, phase = self.conv(x).chunk(2, 1)
        spectrum = torch.stack([phase.cos(), phase.sin()], -1) * magnitude.exp().unsqueeze(-1)
        return self.inverse(torch.view_as_complex(spectrum.contiguous()))


class FourierOfHalf(Fourier):
    """Complex numbers directly from a layer, a transform and its inverse, and powers beyond the range of fp16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitude, phase = self.conv(x).chunk(2, 1)
        spectrum = torch.view_as_complex(torch.stack([magnitude, phase], -1)) + torch.complex(magnitude, phase)
        wave = self.inverse(spectrum + torch.polar(magnitude.abs(), phase) + torch.exp(1j * phase))
        back = torch.fft.irfft(torch.fft.rfft(self.conv(x).mean(1)))
        level = torch.stft(back, 16, 4, window=self.window, return_complex=True).abs().mean()
        powers = torch.cat([10 ** (5 + 0 * magnitude), (300 + 0 * magnitude) ** 2, (300 + 0 * phase).pow(2)], 1)
        return torch.cat([wave, back + level * powers.mean() / powers.mean().log()], 1)


class InPlace(Fourier):
    """An in-place write must not go into a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y.exp_()
        y.log_()
        y.add_(1.0)
        torch.exp(y, out=y)
        return y


class Attention(nn.Module):
    """Modules that have weights of their own beside their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.relative = Relative()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.relative(y + self.attention(y, y, y)[0])


class Relative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 24)
        self.positions = nn.Parameter(torch.randn(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.query(x), self.positions)


class Outputs(nn.Module):
    """Many kinds of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return {"a": y, "b": [y.mean(), (y > 0, y.argmax(-1))], "c": None, "d": 3, "e": y.double()}


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.out = nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 4, 4, stride=2), nn.Linear(46, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(input=self.up(input=self.conv(input=x), output_size=[46]))


def normed(norm: Callable[..., nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            norm(nn.Conv1d(8, 16, 3)), nn.LeakyReLU(0.1), norm(nn.ConvTranspose1d(16, 8, 4, stride=2)),
            nn.Conv1d(8, 1, 3), nn.Tanh(),
        )  # fmt: skip


def batch_normed() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3))
    model(X)  # running statistics that are not 0 and 1
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(8, 16, 3, padding="same"), nn.ELU(), nn.Conv1d(16, 8, 3, padding=1, padding_mode="reflect", groups=4)
    ),
    "2-D": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, bias=False)
    ),
    "weight norm, hook": lambda: normed(OLD),
    "weight norm, parametrization": lambda: normed(NEW),
    "batch norm": batch_normed,
    "linear": lambda: nn.Linear(24, 3),
    "linears": lambda: nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 3, bias=False)),
    "recurrent": Recurrent,
    "packed": Packed,
    "fourier": Fourier,
    "fourier by methods": FourierByMethods,
    "fourier of half": FourierOfHalf,
    "in place": InPlace,
    "attention": Attention,
    "by keyword": ByKeyword,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def run(model: nn.Module, x: torch.Tensor = X) -> Any:
    with torch.no_grad():
        return model(x)


def part_of(model: nn.Module) -> Part:
    return Part("model", "vocoder", model)


def halved(model: nn.Module, *, carried: bool, dtype: torch.dtype = torch.bfloat16) -> ClassSwap:
    stage = HalfStage(dtype, carried=carried)
    assert stage.applies(part_of(model)) is None
    change = stage.prepare(part_of(model))
    change.on()
    return change


def error(expected: Any, found: Any) -> float:
    difference = compare(expected, found)
    assert not difference.reason, difference.reason
    return difference.error


both = pytest.mark.parametrize("carried", [False, True], ids=["layers", "part"])


@both
@pytest.mark.parametrize("name", MODELS)
def test_near_in_fp32_and_undone_exactly(name: str, carried: bool) -> None:
    model = build(name)
    reference = run(model)
    classes = [type(module) for module in model.modules()]
    keys = [sorted(vars(module)) for module in model.modules()]
    change = halved(model, carried=carried)
    assert [type(module) for module in model.modules()] != classes
    found = run(model)
    assert found.dtype == torch.float32
    assert 0.0 < error(reference, found) < NEAR, "0.0 would mean that nothing was computed in half precision"
    assert torch.equal(run(model), found)
    change.off()
    assert torch.equal(run(model), reference)
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(vars(module)) for module in model.modules()] == keys
    change.on()
    assert torch.equal(run(model), found)


@pytest.mark.parametrize("name", ["convolutions", "linear", "fourier", "fourier of half", "recurrent"])
def test_fp16_too(name: str) -> None:
    """fp16 times an imaginary number is a half-precision complex number, for which there are no kernels."""
    model = build(name)
    reference = run(model)
    halved(model, carried=True, dtype=torch.float16)
    assert 0.0 < error(reference, run(model)) < NEAR


@both
def test_hifi_gan_of_transformers(carried: bool) -> None:
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=38, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], wavenet_dilation_rate=1,
    )  # fmt: skip
    decoder = VitsModel(config).eval().decoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder.apply_weight_norm()
    spectrogram = torch.randn(1, 16, 20)
    reference = run(decoder, spectrogram)
    state = {key: value.clone() for key, value in decoder.state_dict().items()}
    changes: list[Any] = [stage.prepare(part_of(decoder)) for stage in (FoldStage(),)]
    changes[0].on()
    changes.append(ChannelsLastStage().prepare(part_of(decoder)))
    changes[1].on()
    changes.append(halved(decoder, carried=carried))
    assert 0.0 < error(reference, run(decoder, spectrogram)) < NEAR
    assert list(decoder.state_dict()) == list(state)
    assert all(torch.equal(decoder.state_dict()[key], value) for key, value in state.items())
    for change in reversed(changes):
        change.off()
    assert torch.equal(run(decoder, spectrogram), reference)


def test_activations_stay_in_half_precision_only_where_carried() -> None:
    def seen(carried: bool) -> list[torch.dtype]:
        model, dtypes = build("convolutions"), []
        halved(model, carried=carried)
        model[1].register_forward_pre_hook(lambda _module, args: dtypes.append(args[0].dtype))
        run(model)
        return dtypes

    assert seen(carried=False) == [torch.float32]
    assert seen(carried=True) == [torch.bfloat16]


def test_modules_with_weights_compute_in_fp32() -> None:
    model = build("recurrent")
    halved(model, carried=True)
    dtypes: dict[str, torch.dtype] = {}

    def noted(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: object, output: Any) -> None:
            dtypes[name] = (output[0] if isinstance(output, tuple) else output).dtype

        return note

    for name in ("conv", "group", "act", "lstm", "gru", "norm", "out"):
        getattr(model, name).register_forward_hook(noted(name))
    run(model)
    half = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert half == {"conv", "out"}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


@both
def test_outputs_of_every_kind_come_back_in_their_own_dtype(carried: bool) -> None:
    torch.manual_seed(0)
    model = Outputs().eval()
    reference = run(model)
    halved(model, carried=carried)
    found = run(model)
    assert list(found) == list(reference)
    assert (found["a"].dtype, found["b"][0].dtype, found["e"].dtype) == (torch.float32, torch.float32, torch.float64)
    assert found["b"][1][0].dtype == torch.bool
    assert found["b"][1][1].dtype == torch.int64
    assert (found["c"], found["d"]) == (None, 3)
    assert error(reference["a"], found["a"]) < NEAR


def test_the_half_copy_of_a_parametrized_layer_is_a_plain_one() -> None:
    """The parametrized class would look for parametrizations that the copy does not have."""
    for name in ("weight norm, parametrization", "weight norm, hook", "convolutions"):
        model = build(name)
        assert type(stage_module.half_copy(model[0], torch.bfloat16)) is nn.Conv1d
        assert stage_module.half_copy(model[0], torch.bfloat16).weight.dtype == torch.bfloat16


def test_nothing_to_halve_is_said() -> None:
    class Adapted(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.adapter = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.adapter(x)

    for model in (nn.LayerNorm(4), nn.Linear(4, 4).double(), nn.Linear(4, 4).bfloat16(), Adapted(4, 4), nn.Identity()):
        assert HalfStage(torch.bfloat16, carried=True).applies(part_of(model)) == "no layer that computes in fp32"


class Beside(nn.Module):
    """Many linear layers for torchao, and a convolution and an LSTM, which it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3)
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(15)))
        self.lstm = nn.LSTM(32, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lstm(self.layers(self.conv(x).transpose(1, 2)))[0]
        return found


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_weights_that_torchao_has_quantised_are_left_also_where_the_model_is_cast(carried: bool, late: bool) -> None:
    """A cast leaves their dtype as it was: they do not show that the part is upstream's again."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    plain, model = Beside().eval(), Beside().eval()
    model.load_state_dict(plain.state_dict())
    in_8_bits = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(plain, in_8_bits)
    assert HalfStage(torch.bfloat16, carried=carried).applies(part_of(plain.layers)) == "no layer that computes in fp32"
    if not late:
        torchao.quantize_(model, in_8_bits)
    halved(model, carried=carried)
    run(model)
    if late:
        torchao.quantize_(model, in_8_bits)
    assert error(run(plain), run(model)) < NEAR
    plain.bfloat16()
    model.bfloat16()
    assert torch.equal(run(plain, X.bfloat16()), run(model, X.bfloat16()))


@both
def test_a_wrong_input_gets_torchs_own_error_and_another_dtype_its_own_result(carried: bool) -> None:
    model = build("linears")
    x = torch.ones(2, 24, dtype=torch.int64)
    with pytest.raises(RuntimeError) as expected:
        run(model, x)
    change = halved(model, carried=carried)
    with pytest.raises(RuntimeError) as found:
        run(model, x)
    assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError):
        run(model, X.double())  # double meets float
    model.double()  # by the user, while it is on
    change.off()
    reference = run(model, X.double())
    change.on()
    assert torch.equal(run(model, X.double()), reference)


# --- what else a module is -----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["convolutions", "linear", "recurrent", "batch norm", "weight norm, hook"])
def test_state_names_copies_and_pickles_are_those_of_the_plain_module(name: str, carried: bool) -> None:
    model = build(name)
    reference = run(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [type(module).__qualname__ for module in model.modules()]
    plain = [type(module) for module in model.modules()]
    parameters = [id(parameter) for parameter in model.parameters()]
    text = repr(model)
    halved(model, carried=carried)
    run(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(value.dtype == state[key].dtype for key, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [type(module).__qualname__ for module in model.modules()] == names
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), plain, strict=True))
    assert repr(model) == text
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in clone.modules()] == plain
        assert torch.equal(run(clone), reference)


@both
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("linears", "convolutions", "recurrent", "weight norm, parametrization")
        for how in ("copy_", "load_state_dict", "assign", "new parameter")
        if (name, how) != ("weight norm, parametrization", "assign")  # torch refuses it
    ],
)
def test_a_written_weight_is_seen_at_the_next_call(name: str, how: str, carried: bool) -> None:
    model, other = build(name), build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    halved(model, carried=carried)
    first = run(model)
    if how == "copy_":
        with torch.no_grad():
            for mine, new in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(new)
    elif how == "new parameter":
        for (path, new), module in zip(other.named_parameters(), owners(model), strict=True):
            module._parameters[path.rpartition(".")[2]] = nn.Parameter(new.detach().clone())
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    else:
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=how == "assign")
    expected = run(other)
    assert error(first, run(model)) > 0.1
    assert error(expected, run(model)) < NEAR


def owners(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()]


def test_a_loaded_state_reaches_a_folded_and_halved_module() -> None:
    model, other = build("weight norm, hook"), build("weight norm, hook")
    run(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    FoldStage().prepare(part_of(model)).on()
    halved(model, carried=True)
    run(model)
    model.load_state_dict(other.state_dict())
    assert error(run(other), run(model)) < NEAR


def test_the_half_copy_is_made_once() -> None:
    made: list[nn.Module] = []
    layer = nn.Linear(3, 3)
    derived = Derived(layer, lambda module: made.append(module) or len(made))
    assert [derived.get(), derived.get()] == [1, 1]
    with torch.no_grad():
        layer.bias.add_(1)
    assert [derived.get(), derived.get()] == [2, 2]
    assert made == [layer, layer]


@both
@pytest.mark.parametrize("hooked", [OLD, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.25)])
def test_copies_that_are_made_before_a_call_have_the_weight_of_that_call(hooked: Any, carried: bool) -> None:
    """As for a compiler or a recording. torch's hook computes the weight in the call, from what was written before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    with torch.no_grad():  # a hook's product can be copied then
        hooked(model[0])
    run(model)
    twin = copy.deepcopy(model)
    halved(model, carried=carried)
    run(model)
    for each in (model, twin):
        for parameter in each[0].parameters():
            parameter.data.neg_().mul_(0.5)
    make_copies(model)
    assert error(run(twin), run(model)) < NEAR


def test_a_weight_that_is_written_while_the_copy_is_made_is_seen_next_time() -> None:
    layer = nn.Linear(3, 3)

    def make(module: Any) -> torch.Tensor:
        copied = module.weight.detach().clone()
        if torch.equal(layer.weight, torch.ones(3, 3)):
            layer.weight.fill_(2.0)  # another thread's doing
        return copied

    with torch.no_grad():
        layer.weight.fill_(1.0)
    derived = Derived(layer, make)
    derived.get()
    assert torch.equal(derived.get(), layer.weight)


@both
def test_made_in_inference_mode_it_can_be_used_outside(carried: bool) -> None:
    model = build("linears")
    with torch.inference_mode():
        halved(model, carried=carried)
        model(X)
    x = X.clone().requires_grad_()
    model(x).sum().backward()  # an inference tensor as the weight would raise here
    assert x.grad is not None


@both
def test_two_threads_at_once(carried: bool) -> None:
    model, plain = build("fourier"), build("fourier")
    halved(model, carried=carried)
    inputs = [torch.randn(2, 8, 24) for _ in range(2)]
    references = [run(plain, x) for x in inputs]
    untouched = [build("fourier of half") for _ in inputs]  # in the same threads, and not changed
    barrier = threading.Barrier(2)
    found: list[list[tuple[float, bool]]] = [[], []]

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(10):
            near = error(references[number], run(model, inputs[number]))
            found[number].append((near, run(untouched[number]).dtype == torch.float32))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [len(seen) for seen in found] == [10, 10]
    assert all(near < NEAR and right for seen in found for near, right in seen)


def test_the_mode_ends_with_an_exception() -> None:
    class Failing(Fourier):
        def inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
            raise ValueError("no sound today")

    torch.manual_seed(0)
    model = Failing()
    halved(model, carried=True)
    with pytest.raises(ValueError, match="no sound"):
        run(model)
    assert torch.exp(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.skipif(unsafe_compiler() is not None, reason="dynamo of torch 2.6 crashes on Python 3.10")
@both
def test_a_compiled_graph_over_half_copies_is_given_up_when_the_weights_are_written(
    carried: bool, uncompiled: None, seen: list[Event]
) -> None:
    """A frozen graph holds the copies as its weights, and cannot see that they are outdated."""
    model, other = build("fourier"), build("fourier")
    change = halved(model, carried=carried)
    expected = run(model)
    call = CompiledCall(model, "model", "default")
    call.on()
    assert error(expected, run(model)) < 1e-3
    assert call.graphs
    with torch.no_grad():
        for both_weights in zip(model.parameters(), other.parameters(), strict=True):
            for weight in both_weights:
                weight.mul_(1.5)
    for _ in range(2):
        assert error(run(other), run(model)) < NEAR
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["torch.compile"]
    call.off()
    change.off()
    CompiledCall(model, "model", "default").on()  # over weights that are read at each call nothing is given up
    run(model)
    with torch.no_grad():
        model.conv.weight.mul_(2.0)
    run(model)
    assert model._compiled_call_impl is not None


# --- with other changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["fold", "layout", "both"])
@both
@pytest.mark.parametrize("name", ["weight norm, hook", "weight norm, parametrization"])
def test_on_top_of_folding_and_channels_last(name: str, carried: bool, below: str) -> None:
    model = build(name)
    reference = run(model)
    changes: list[Any] = []
    stages: list[Any] = {"fold": [FoldStage()], "layout": [ChannelsLastStage()]}.get(
        below, [FoldStage(), ChannelsLastStage()]
    )
    for stage in stages:
        changes.append(stage.prepare(part_of(model)))
        changes[-1].on()
    changes.append(halved(model, carried=carried))
    seen: list[bool] = []
    model[1].register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].unsqueeze(2).is_contiguous(memory_format=torch.channels_last))
    )
    assert 0.0 < error(reference, run(model)) < NEAR
    assert seen == [below != "fold"], "the order of channels-last convolutions is kept in half precision"
    for change in reversed(changes):
        change.off()
    assert torch.equal(run(model), reference)


class Mixed(nn.Module):
    """Something of each for every stage, of random sizes."""

    def __init__(self, norm: int, channels: int, width: int, *, recurrent: bool) -> None:
        super().__init__()
        wrap: Callable[..., nn.Module] = (lambda module: module, OLD, NEW)[norm]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv = wrap(nn.Conv1d(8, channels, 3))
            self.up = wrap(nn.ConvTranspose1d(channels, 8, 4, stride=2))
        self.norm = nn.LayerNorm(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True) if recurrent else None
        self.wide = nn.Linear(8, 128 * width)
        self.narrow = nn.Linear(128 * width, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.up(torch.relu(self.conv(x))).transpose(1, 2))
        if self.lstm is not None:
            y, _ = self.lstm(y)
        return self.narrow(torch.tanh(self.wide(y[:, :3].contiguous()))).exp()


STAGES: dict[str, Callable[[], Any]] = {
    "fold": FoldStage,
    "layout": ChannelsLastStage,
    "half layers": lambda: HalfStage(torch.bfloat16, carried=False),
    "half part": lambda: HalfStage(torch.bfloat16, carried=True),
    "few rows": FewRowsStage,
    "int8": lambda: QuantizeStage(torch.backends.quantized.engine),
    "int8 recurrent": QuantizeRecurrentStage,
    "skinny": lambda: SkinnyStage("fp32"),
    "skinny bf16": lambda: SkinnyStage("bf16"),
    "skinny int8": lambda: SkinnyStage("int8"),
}


def everything(model: nn.Module) -> list[object]:
    """All that undoing must bring back."""
    return [
        (
            name, type(module), list(vars(module)), list(module._parameters), list(module._buffers),
            list(module._modules), list(module._forward_pre_hooks), list(module._load_state_dict_post_hooks),
            [id(value) for value in module._parameters.values()],
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    norm=st.integers(0, 2), channels=st.integers(1, 9), width=st.integers(1, 2), recurrent=st.booleans(),
    actions=st.lists(
        st.one_of(
            st.tuples(st.sampled_from([*STAGES, "swap", "all off and on", "load", "copy"]), st.just(0)),
            st.tuples(st.just("drop"), st.integers(0, 5)),
            st.tuples(st.just("undo"), st.just(0)),
        ),
        max_size=10,
    ),
)  # fmt: skip
@example(norm=1, channels=1, width=1, recurrent=False, actions=[("layout", 0), ("fold", 0), ("drop", 0)])
@example(norm=1, channels=1, width=1, recurrent=False, actions=[("half part", 0), ("fold", 0), ("drop", 0)])
def test_any_sequence_of_changes_can_be_undone(  # noqa: PLR0912 - one branch an action
    norm: int, channels: int, width: int, recurrent: bool, actions: list[tuple[str, int]]
) -> None:
    """Switch changes as the engine does: the last one first, or any one while all are off."""
    torch.manual_seed(channels)
    model = Mixed(norm, channels, width, recurrent=recurrent).eval()
    small = X[:, :, :10]
    run(model, small)
    reference = copy.deepcopy(model)
    before = everything(model)
    changes: list[Any] = []
    for action, number in actions:
        part = part_of(model)
        if action in STAGES:
            stage = STAGES[action]()
            if stage.applies(part) is None:
                changes.append(stage.prepare(part))
                changes[-1].on()
                changes[-1].on()
        elif action == "undo" and changes:
            changes.pop().off()
        elif action == "swap" and changes:  # what timing does, A B B A
            for _ in range(2):
                changes[-1].off()
                run(model, small)
                changes[-1].on()
        elif action in {"drop", "all off and on"}:
            for change in reversed(changes):
                change.off()
                change.off()
            assert torch.equal(run(model, small), run(reference, small))
            assert everything(model) == before
            if action == "drop" and changes:
                changes.pop(number % len(changes))
            for change in changes:
                change.on()
        elif action == "load":
            state = {key: value * 0.9 for key, value in model.state_dict().items()}
            model.load_state_dict(state)
            reference.load_state_dict(state)
        elif action == "copy":
            clone = copy.deepcopy(model)
            assert torch.equal(run(clone, small), run(reference, small))
            assert [entry[:1] for entry in everything(clone)] == [entry[:1] for entry in before]
        found = run(model, small)
        assert found.dtype == torch.float32
        assert error(run(reference, small), found) < 2 * NEAR
    while changes:
        changes.pop().off()
    assert everything(model) == before
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model, small), run(reference, small))


# --- which dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "supported", "expected"),
    [
        ("cpu", True, (torch.bfloat16,)),
        ("cpu", False, ()),
        ("cuda", True, (torch.bfloat16,)),
        ("cuda", False, (torch.float16,)),
        ("mps", True, (torch.float16,)),
        ("xpu", False, (torch.bfloat16,)),
    ],
)
def test_the_dtypes_of_each_device(
    device: str, supported: bool, expected: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, bool]] = []

    class Operators:
        @staticmethod
        def _is_mkldnn_bf16_supported() -> bool:
            return supported

    def is_bf16_supported(**options: bool) -> bool:
        asked.append(options)
        return supported

    # Stand-ins: neither a processor with bf16 units nor a GPU is needed.
    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert half_dtypes(device) == expected
    if device == "cuda":
        assert asked == [{"including_emulation": False}], "an older GPU emulates bf16, slower than fp32"


def test_the_dtypes_of_this_machine() -> None:
    assert set(half_dtypes("cpu")) <= {torch.bfloat16}


def test_names_and_group() -> None:
    stages = [HalfStage(dtype, carried=carried) for dtype in (torch.bfloat16, torch.float16) for carried in (0, 1)]
    assert [stage.name for stage in stages] == ["bf16 layers", "bf16 part", "fp16 layers", "fp16 part"]
    assert {stage.group for stage in stages} == {"half precision"}


def test_no_delicate_function_writes_in_place() -> None:
    assert len(stage_module.delicate_functions()) > 40
    for function in stage_module.delicate_functions():
        name = function.__name__
        assert not name.endswith("_") or name.startswith("__"), name


class Causal(nn.Conv1d):
    """A convolution like Chatterbox's: it pads, and leaves the rest to the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


class Adaptable(nn.Linear):
    """A linear layer like diffusers', which may get an adapter."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.adapter: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.adapter is None else y + self.adapter(x)


@both
def test_a_layer_that_adds_nothing_to_its_kind_but_a_forward_is_halved(carried: bool) -> None:
    torch.manual_seed(0)
    for model, x in ((nn.Sequential(Causal(8, 8, 3)), X), (nn.Sequential(Adaptable(24, 8)), X)):
        with torch.no_grad():
            expected = model(x)
            change = HalfStage(torch.bfloat16, carried=carried).prepare(part_of(model))
            change.on()
            found = model(x)
            assert not torch.equal(found, expected)
            assert compare(expected, found).error < NEAR
            change.off()
            assert torch.equal(model(x), expected)


@both
def test_an_adapter_that_comes_later_is_served(carried: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adaptable(24, 8))
    HalfStage(torch.bfloat16, carried=carried).prepare(part_of(model)).on()
    with torch.no_grad():
        model(X)
        model[0].adapter = nn.Linear(24, 8)
        plain = nn.functional.linear(X, model[0].weight, model[0].bias)
        assert torch.allclose(model(X), plain + model[0].adapter(X), atol=1e-6)


class Optional(nn.Linear):
    """A linear layer that reads a parameter that it may not have, and an adapter that was taken out."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_parameter("scale", None)
        self.adapter: nn.Module | None = nn.Identity()
        self.adapter = None  # stays in `_modules`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y = y if self.scale is None else y * self.scale
        return y if self.adapter is None else y + self.adapter(x)


@both
def test_a_parameter_and_an_adapter_that_are_absent_come_and_go(carried: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Optional(24, 24))
    twin = copy.deepcopy(model)
    halved(model, carried=carried)

    def served() -> bool:
        expected, found = run(twin), run(model)
        assert error(expected, found) < NEAR
        return not torch.equal(expected, found)

    assert served()
    model[0].adapter = twin[0].adapter = nn.Linear(24, 24)
    assert not served()
    model[0].adapter = twin[0].adapter = None
    assert served()
    model[0].scale = twin[0].scale = nn.Parameter(torch.full((24,), 3.0))
    assert not served()
    model[0].scale = twin[0].scale = None
    assert served()


@both
def test_a_layer_without_parameters_is_halved(carried: bool) -> None:
    """Its weight is a buffer, as a frozen layer may keep it."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 8, bias=False))
    values = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", values)
    twin = copy.deepcopy(model)
    halved(model, carried=carried)
    assert 0 < error(run(twin), run(model)) < NEAR


class ByHand(nn.Linear):
    """A linear layer with an adapter written by hand: its tensors are no parameters, and may be set later."""

    down: torch.Tensor | None = None
    up: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.down is None else y + x @ self.down.to(x.dtype) @ self.up.to(x.dtype)


class Delta(nn.Module):
    def __init__(self, change: torch.Tensor) -> None:
        super().__init__()
        self.change = change

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.change


@both
def test_an_adapter_whose_tensors_are_no_parameters_comes_changes_and_goes(carried: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(ByHand(24, 8))
    twin = copy.deepcopy(model)
    halved(model, carried=carried)
    for rank in (0, 2, 4, 0, 4):
        model[0].down = twin[0].down = torch.randn(24, rank) if rank else None
        model[0].up = twin[0].up = torch.randn(rank, 8)
        assert error(run(twin), run(model)) < NEAR


@both
def test_a_parametrization_whose_tensor_is_no_parameter_gets_another_one(carried: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 8))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Delta(torch.randn(8, 24)))
    twin = copy.deepcopy(model)
    halved(model, carried=carried)
    for _ in range(3):
        change = torch.randn(8, 24)
        model[0].parametrizations.weight[0].change = twin[0].parametrizations.weight[0].change = change
        assert error(run(twin), run(model)) < NEAR


class Several(nn.Linear):
    """A linear layer that returns more than one tensor, as routers of transformers do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = super().forward(x)
        return y.softmax(-1), y


@both
def test_a_layer_may_return_several_tensors(carried: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Several(24, 8))
    expected = run(model)
    change = halved(model, carried=carried)
    found = run(model)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2
    assert 0.0 < error(expected, found) < NEAR
    assert [tensor.dtype for tensor in model[0](X)] == [torch.float32] * 2  # not by a call of the part
    change.off()


class Streaming(nn.Conv1d):
    """A causal convolution that keeps the end of its input for the next piece of a stream."""

    rest: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.joined(x))

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (2, 0)) if self.rest is None else torch.cat([self.rest, x], -1)
        self.rest = x[..., -2:]
        return x


def test_a_layer_that_keeps_state_is_left_alone() -> None:
    model = nn.Sequential(Streaming(8, 8, 3), nn.Conv1d(8, 8, 3))
    change = halved(model, carried=False)
    assert type(model[0]) is Streaming
    assert type(model[1]) is not nn.Conv1d
    change.off()


def test_alike_layers_share_a_class_so_that_a_compiler_makes_one_graph_for_all() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    HalfStage(torch.bfloat16, carried=False).prepare(part_of(model)).on()
    assert type(model[0]) is type(model[1])
    assert copy.deepcopy(model)[0].__dict__.keys() == nn.Linear(8, 8).__dict__.keys()


def test_another_method_and_a_module_inside_give_fp32_too() -> None:
    # A tuned service may call what the warm-up did not: an encoder beside the speech.
    class Voice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).tanh()

        def embed(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) @ x.transpose(1, 2)

    voice = Voice().eval()
    with torch.inference_mode():
        expected = voice(X), voice.embed(X), voice.body[0](X)
        change = HalfStage(torch.bfloat16, carried=True).prepare(Part("voice", "model", voice))
        change.on()
        found = voice(X), voice.embed(X), voice.body[0](X)
    for mine, other in zip(expected, found, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, mine, rtol=NEAR, atol=3 * NEAR)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "attention", "weight norm, parametrization"])
def test_under_autocast_the_result_is_upstreams(name: str, carried: bool) -> None:
    model = build(name)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
        change = halved(model, carried=carried)
        found = model(X)
    change.off()
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("device", ["mps", "xpu"])  # without a card, torch switches it off for CUDA
def test_autocast_of_other_devices_is_seen(device: str, carried: bool) -> None:
    """The scope alone is of the device: on the CPU upstream's layers stay in fp32 in it, as if there were no copies."""
    model = build("batch norm")
    with torch.inference_mode():
        expected = model(X)
        change = halved(model, carried=carried)
        assert not torch.equal(model(X), expected)
        with torch.autocast(device):
            assert torch.equal(model(X), expected)
    change.off()


def test_a_part_that_is_run_by_a_method_has_its_islands_there() -> None:
    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(8, 18, 3, padding=1)

        def inference(self, x: torch.Tensor) -> torch.Tensor:
            real, imaginary = self.convolution(x).chunk(2, 1)
            window = torch.hann_window(16)
            return torch.istft(torch.complex(real, imaginary), 16, 4, 16, window)

    torch.manual_seed(0)
    vocoder = Vocoder().eval()
    part = Part("vocoder", "vocoder", vocoder, method="inference")
    with torch.no_grad():
        expected = vocoder.inference(X)
        change = HalfStage(torch.bfloat16, carried=True).prepare(part)
        change.on()
        found = vocoder.inference(X)
        assert found.dtype == torch.float32
        assert 0 < compare(expected, found).error < NEAR
        change.off()
        assert torch.equal(vocoder.inference(X), expected)


@both
@pytest.mark.parametrize("stage", ["blocks", "whole"])
def test_what_is_restored_compiles_at_its_first_call(carried: bool, stage: str) -> None:
    """Changes are switched on all at once, as by a warm pack, before any copy is made."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16))) for _ in range(2)]
    model = nn.Sequential(*blocks).eval()
    x = torch.randn(3, 16)
    with torch.inference_mode():
        expected = model(x)
        part = part_of(model)
        HalfStage(torch.bfloat16, carried=carried).prepare(part).on()
        change = (CompiledBlocksStage if stage == "blocks" else CompileStage)("default").prepare(part)
        change.on()
        found = model(x)
    assert change.graphs
    assert 0 < compare(expected, found).error < NEAR


class Rotating(nn.Module):
    """Attention whose queries and keys are rotated in fp32, and whose values are not."""

    def __init__(self, *, eager: bool) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.eager = eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 16).transpose(1, 2) for layer in list(self.projections)[:3])
        cosines = torch.cos(torch.arange(x.shape[1]))[:, None]
        q, k = q * cosines, k * cosines
        if self.eager:
            y = torch.softmax(q @ k.transpose(2, 3) / 4.0, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.projections[3](y.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


@pytest.mark.parametrize("eager", [False, True])
def test_products_of_mixed_dtypes_are_taken_in_fp32(eager: bool) -> None:
    """transformers before 4.54 gives its attention such tensors: every trial of bf16 ended in torch's error."""
    torch.manual_seed(0)
    model, x = Rotating(eager=eager).eval(), torch.randn(2, 7, 64)
    change = HalfStage(torch.bfloat16, carried=True).prepare(Part("model", "model", model))
    with torch.inference_mode():
        expected = model(x)
        change.on()
        found = model(x)
        change.off()
    assert found.dtype == torch.float32
    assert 0.0 < float((found - expected).norm() / expected.norm()) < 0.02


class Keeping(nn.Module):
    """Writes into memory of the caller, as a static cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        y, places = self.linear(x), torch.tensor([1, 3])
        kept.index_copy_(0, places, y)
        kept[torch.tensor([0, 2])] = y
        kept.index_add_(dim=0, index=places, source=y)
        return torch.zeros_like(y).index_copy_(0, torch.tensor([1, 0]), x) + y


@pytest.mark.parametrize("carried", [False, True])
def test_what_is_written_into_other_memory_gets_its_dtype(carried: bool) -> None:
    torch.manual_seed(0)
    model, x = Keeping().eval(), torch.randn(2, 24)
    expected, kept = torch.zeros(4, 24), torch.zeros(4, 24)
    with torch.inference_mode():
        wanted = model(x, expected)
        change = halved(model, carried=carried)
        found = model(x, kept)
    change.off()
    assert error(expected, kept) < 2e-2
    assert error(wanted, found) < 2e-2
    assert found.dtype == torch.float32


class Counting(nn.Module):
    """Counts in the dtype of its activations, as positional embeddings and masks are made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.layer(x)
        count = y.shape[1]
        mask = torch.ones(count, dtype=torch.bool).to(y.dtype)
        return (
            torch.arange(count, dtype=y.dtype), torch.arange(count).to(y), torch.arange(count).type_as(y),
            torch.arange(count).to(dtype=y.dtype), torch.linspace(0, count - 1, count, dtype=y.dtype), mask.sum(),
        )  # fmt: skip


def test_whole_numbers_are_whole_in_a_long_sequence() -> None:
    """bf16 has no 257. A short warm-up does not show it."""
    model = Counting().eval()
    HalfStage(torch.bfloat16, carried=True).prepare(Part("part", "model", model)).on()
    with torch.no_grad():
        *positions, length = model(torch.randn(1, 501, 8))
    assert all(torch.equal(each, torch.arange(501.0)) for each in positions)
    assert length == 501


class Refusing(nn.Module):
    """Calls functions that have no kernel for half precision, or take no two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.step: Callable[[torch.Tensor, torch.Tensor], Any] = torch.add

    def forward(self, x: torch.Tensor) -> Any:
        return self.step(self.layer(x), x)


def masked(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.masked_scatter(torch.ones_like(x, dtype=torch.bool), y)


def added_in_place(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    copied = x.clone()
    copied[0].lerp_(y[0], 0.5)
    return copied


STEPS: list[Callable[[torch.Tensor, torch.Tensor], Any]] = [
    torch.cdist, masked, added_in_place, lambda y, x: y.lerp(x, 0.3), lambda y, _: torch.quantile(y, 0.5, -1),
    lambda y, x: torch.scatter(x, 0, torch.zeros(1, 3, 8, dtype=torch.long), y), lambda y, _: torch.linalg.svdvals(y),
    lambda y, x: torch.searchsorted(x.sort().values, y).float(), lambda y, _: torch.from_numpy(y.numpy()),
]  # fmt: skip


@both
def test_a_decoder_that_is_cast_to_the_dtype_of_its_copies(carried: bool) -> None:
    """Rotary embeddings have no parameters that are cast, but a buffer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, plain = (LlamaModel(config).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 6, 64)
    change = halved(model, carried=carried)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        plain.to(dtype)
        with torch.no_grad():
            found, expected = (each(inputs_embeds=x.to(dtype)).last_hidden_state for each in (model, plain))
        assert found.dtype == dtype
        assert error(expected.float(), found.float()) < NEAR
    change.off()


def test_a_function_that_refuses_half_precision_is_called_in_fp32() -> None:
    """The warm-up may not have come by it."""
    model, plain = Refusing().eval(), Refusing().eval()
    plain.load_state_dict(model.state_dict())
    HalfStage(torch.bfloat16, carried=True).prepare(Part("part", "model", model)).on()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, step in enumerate(STEPS):
            model.step = plain.step = step
            found, expected = model(x), plain(x)
            assert found.dtype == torch.float32
            assert float((found - expected).norm() / expected.norm()) < NEAR, number
        model.step = plain.step = lambda y, x: torch.cdist(y, x[..., :5])
        with pytest.raises(RuntimeError) as own:
            plain(x)
        with pytest.raises(RuntimeError) as error:
            model(x)
        assert str(error.value) == str(own.value)
