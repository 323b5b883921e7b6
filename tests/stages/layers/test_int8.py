"""8-bit layers: small errors by every family of kernels, nothing that the kernels cannot take, and a way back."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import rnn

from accelerate_tts import Event, optimized_model, receipt_of
from accelerate_tts.events import NotApplied
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.patching.class_swap import ClassSwap
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.int8 import QuantizeRecurrentStage, QuantizeStage, engines
from doubles import pays_off

ENGINES = engines()
# Seven or eight bits for weights and activations: of random numbers some 1.5 % of noise.
NEAR = 0.04


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def part_of(model: nn.Module) -> Part:
    return Part("model", "decoder", model)


def quantized(model: nn.Module, engine: str) -> ClassSwap:
    stage = QuantizeStage(engine)
    assert stage.applies(part_of(model)) is None
    change = stage.prepare(part_of(model))
    change.on()
    return change


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.is_contiguous() == expected.is_contiguous()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def linear(features: int = 256, out: int = 128, *, seed: int = 0, **options: Any) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(features, out, **options).eval()


# --- linear layers -------------------------------------------------------------------------------------------------


def test_this_machine_has_engines() -> None:
    assert ENGINES, "torch is built with a quantised engine on every processor that we know"
    assert len(set(ENGINES)) == len(ENGINES)
    assert set(ENGINES) <= {"x86", "fbgemm", "onednn", "qnnpack", "torchao"}
    assert QuantizeStage.group == "linear layers"
    assert not QuantizeRecurrentStage.group


@settings(max_examples=15, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3), features=st.sampled_from([128, 200, 257]),
    out=st.sampled_from([128, 130]), bias=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 50.0]),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.parametrize("name", ENGINES)
def test_every_shape(
    name: str, lead: list[int], features: int, out: int, bias: bool, scale: float, strided: bool, seed: int
) -> None:
    model = linear(features, out, seed=seed, bias=bias)
    x = scale * torch.randn(*lead, features)
    if strided and x.dim() > 1:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    expected = run(model, x)
    quantized(model, name)
    # Of one row of 128 numbers the rounding may fall badly.
    assert error(expected, run(model, x)) < 1.5 * NEAR


@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 0, 256)], ids=str)
def test_what_the_kernels_do_not_take_is_computed_untouched(shape: tuple[int, ...], engine: str) -> None:
    model = linear()
    x = torch.randn(*shape)
    expected = run(model, x)
    quantized(model, engine)
    found = run(model, x)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def test_wrong_inputs_are_errors_as_before(engine: str) -> None:
    model = linear()
    quantized(model, engine)
    for wrong in (torch.ones(2, 255), torch.ones(2, 256, dtype=torch.int64)):
        with pytest.raises(RuntimeError):
            run(model, wrong)
    with pytest.raises(TypeError):
        run(model)


def test_by_keyword_as_torch_names_it(engine: str) -> None:
    model = linear()
    x = torch.randn(3, 256)
    expected = run(model, input=x)
    quantized(model, engine)
    assert 0.0 < error(expected, run(model, input=x)) < NEAR


def test_constant_inputs_and_rows_of_zeros(engine: str) -> None:
    model = linear()
    with torch.no_grad():
        model.weight[3] = 0.0
        model.weight[5] = 1e-30
        model.weight[7, 0] = 5.0  # one large weight costs the rest of its own row only
    x = torch.randn(4, 256)
    expected = run(model, x)
    quantized(model, engine)
    found = run(model, x)
    assert torch.allclose(found[:, [3, 5]], expected[:, [3, 5]])
    others = [row for row in range(128) if row not in {3, 5, 7}]
    assert error(expected[:, others], found[:, others]) < NEAR
    for constant in (torch.zeros(2, 256), torch.full((2, 256), 3.0), torch.full((2, 256), -3.0)):
        reference = nn.functional.linear(constant, model.weight, model.bias)
        assert torch.allclose(run(model, constant), reference, atol=0.03 * float(reference.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_come_back_as_they_were(dtype: torch.dtype, engine: str) -> None:
    model = linear(dtype=dtype)
    x = torch.randn(3, 256).to(dtype)
    expected = run(model, x)
    change = quantized(model, engine)
    assert 0.0 < error(expected, run(model, x)) < NEAR
    change.off()
    assert torch.equal(run(model, x), expected)


def test_under_autocast_the_result_is_upstreams(engine: str) -> None:
    module, x = linear(), torch.randn(3, 256)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        quantized(module, engine)
        assert torch.equal(module(x), expected)
    assert expected.dtype == torch.bfloat16


def test_small_layers_and_adapters_are_left_alone() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    stage = QuantizeStage(ENGINES[0])
    for model in (nn.Linear(64, 64), Adapted(256, 256), nn.LSTM(64, 64), nn.Embedding(300, 300)):
        assert stage.applies(part_of(model)) == "no large linear layer in it"
    model = nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 128), Adapted(128, 128)).eval()
    quantized(model, ENGINES[0])
    assert [type(layer) is cls for layer, cls in zip(model, (nn.Linear, nn.Linear, Adapted), strict=True)] == [
        True, False, True,
    ]  # fmt: skip


def written(how: str, model: nn.Module, new: nn.Module) -> None:
    if how == "load":
        model.load_state_dict(new.state_dict())
    elif how == "assign":
        model.load_state_dict(copy.deepcopy(new.state_dict()), assign=True)
    else:
        with torch.no_grad():
            for mine, other in zip(model.parameters(), new.parameters(), strict=True):
                mine.copy_(other)


@pytest.mark.parametrize("how", ["copy_", "load", "assign"])
def test_a_written_weight_is_seen_at_the_next_call(how: str, engine: str) -> None:
    model, other = linear(), linear(seed=1)
    x = torch.randn(3, 256)
    quantized(model, engine)
    first = run(model, x)
    written(how, model, other)
    found = run(model, x)
    assert error(run(other, x), found) < NEAR
    assert error(first, found) > 0.5


@pytest.mark.parametrize("old", [True, False], ids=["hook", "parametrization"])
def test_a_weight_that_is_computed(old: bool, engine: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm: Callable[..., nn.Module] = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        model, other = norm(linear()), norm(linear(seed=1))
    x = torch.randn(3, 256)
    expected = run(model, x)
    quantized(model, engine)
    assert 0.0 < error(expected, run(model, x)) < NEAR
    written("copy_", model, other)
    assert error(run(other, x), run(model, x)) < NEAR


def test_undone_exactly_and_copied_as_the_plain_class(engine: str) -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(128, 128, bias=False))
    x = torch.randn(2, 3, 256)
    reference = run(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    keys = [sorted(vars(module)) for module in model.modules()]
    change = quantized(model, engine)
    found = run(model, x)
    assert error(reference, found) < 2 * NEAR
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert isinstance(model[0], nn.Linear)
    assert repr(model) == repr(copy.deepcopy(model))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(layer) for layer in clone] == [nn.Linear, nn.ReLU, nn.Linear]
        assert torch.equal(run(clone, x), reference)
    change.off()
    change.off()
    assert torch.equal(run(model, x), reference)
    assert [sorted(vars(module)) for module in model.modules()] == keys
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    change.on()
    assert torch.equal(run(model, x), found)


def test_torchs_engine_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.quantized.engine
    engines = [name for name in ENGINES if name != "torchao"]
    models = [(linear(), name) for name in engines * 4]
    barrier = threading.Barrier(len(models))
    x = torch.randn(3, 256)
    expected = run(models[0][0], x)
    errors: list[float] = []

    def work(model: nn.Module, name: str) -> None:
        quantized(model, name)
        barrier.wait()
        errors.append(error(expected, run(model, x)))  # packs here, in all threads at once

    workers = [threading.Thread(target=work, args=one) for one in models]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == len(models)
    assert max(errors) < NEAR
    assert torch.backends.quantized.engine == before


def test_torchao_leaves_the_settings_of_the_process() -> None:
    """They would apply to a user's own `torch.compile`, which tunes each kernel by coordinate descent then."""
    pytest.importorskip("torchao")
    inductor = pytest.importorskip("torch._inductor.config")
    before = inductor.save_config_portable(), torch.get_float32_matmul_precision()
    model = linear()
    quantized(model, "torchao")
    run(model, torch.randn(3, 256))
    assert (inductor.save_config_portable(), torch.get_float32_matmul_precision()) == before


def test_made_in_inference_mode_it_can_be_used_outside(engine: str) -> None:
    model = linear()
    x = torch.randn(3, 256)
    expected = run(model, x)
    with torch.inference_mode():
        quantized(model, engine)
        model(x)
    assert error(expected, model(x).detach()) < NEAR


def test_torchao_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate_tts.stages.layers import int8

    monkeypatch.setattr(int8, "find_spec", lambda _name: None)
    assert "torchao" not in engines()
    monkeypatch.setattr(int8, "find_spec", lambda name: name)
    assert "torchao" in engines()


# --- recurrent layers ----------------------------------------------------------------------------------------------

RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(40, 32, 2, batch_first=True, bidirectional=True),
    "LSTM of time first": lambda: nn.LSTM(40, 32),
    "GRU": lambda: nn.GRU(40, 32, batch_first=True),
    "GRU both ways": lambda: nn.GRU(40, 32, 2, bidirectional=True),
}
SEQUENCE = torch.randn(3, 11, 40, generator=torch.Generator().manual_seed(0))


def recurrent(name: str) -> tuple[nn.RNNBase, ClassSwap]:
    torch.manual_seed(0)
    model = RECURRENT[name]()
    stage = QuantizeRecurrentStage()
    assert stage.applies(part_of(model)) is None
    return model, stage.prepare(part_of(model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str, training: bool) -> None:
    model, change = recurrent(name)
    model.train(training)
    reference, state = run(model, SEQUENCE)
    holder = nn.ModuleList([model])
    keys = sorted(vars(model))
    change.on()
    found, found_state = run(model, SEQUENCE)
    assert 0.0 < error(reference, found) < NEAR
    states = [(state, found_state)] if isinstance(state, torch.Tensor) else list(zip(state, found_state, strict=True))
    assert all(error(old, new) < NEAR for old, new in states)
    assert model.training is training, "converting must not put the user's own module into eval"
    assert holder[0] is model
    assert isinstance(model, RECURRENT[name]().__class__)
    again, _ = run(model, SEQUENCE, state)  # with a state, and by keyword
    by_keyword, _ = run(model, input=SEQUENCE, hx=state)
    assert torch.equal(again, by_keyword)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(clone) is type(RECURRENT[name]())
        assert torch.equal(run(clone, SEQUENCE)[0], reference)
    change.off()
    assert torch.equal(run(model, SEQUENCE)[0], reference)
    assert sorted(vars(model)) == keys
    assert type(model) is type(RECURRENT[name]())


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_packed_sequences_and_what_the_kernels_do_not_take(name: str) -> None:
    model, change = recurrent(name)
    packed = rnn.pack_padded_sequence(SEQUENCE, [11, 7, 2], batch_first=True)
    reference, unbatched = run(model, packed)[0], run(model, SEQUENCE[0])[0]
    change.on()
    found = run(model, packed)[0]
    assert isinstance(found, rnn.PackedSequence)
    assert torch.equal(found.batch_sizes, reference.batch_sizes)
    assert 0.0 < error(reference.data, found.data) < NEAR
    assert torch.equal(run(model, SEQUENCE[0])[0], unbatched)  # untouched
    with pytest.raises(RuntimeError):
        run(model, SEQUENCE[..., :5])


@pytest.mark.parametrize("how", ["copy_", "load"])
def test_a_written_recurrent_weight_is_seen(how: str) -> None:
    model, change = recurrent("LSTM")
    torch.manual_seed(1)
    other = RECURRENT["LSTM"]()
    change.on()
    run(model, SEQUENCE)
    written(how, model, other)
    assert error(run(other, SEQUENCE)[0], run(model, SEQUENCE)[0]) < NEAR


def test_other_recurrent_layers_are_left_alone() -> None:
    class Own(nn.LSTM):
        pass

    for model in (
        nn.RNN(4, 4),
        nn.LSTM(4, 4, proj_size=2),
        Own(4, 4),
        nn.LSTM(4, 4).double(),
        nn.GRU(4, 4, bias=False),
    ):
        assert QuantizeRecurrentStage().applies(part_of(model)) == "no recurrent layer in it"


# --- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:pkg_resources is deprecated")  # at their import
def test_a_real_speaker_encoder_keeps_its_embeddings(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """The 8-bit LSTM of resemblyzer is too inaccurate and is rejected, however fast it is."""
    resemblyzer = pytest.importorskip("resemblyzer", exc_type=ImportError)
    s3tokenizer = pytest.importorskip("s3tokenizer", exc_type=ImportError)
    files = sorted((Path(s3tokenizer.__file__).parent / "assets").glob("*.wav"))
    if len(files) < 2:
        pytest.skip("this release of s3tokenizer ships no speech")
    waves = [resemblyzer.preprocess_wav(file) for file in files]
    plain = resemblyzer.VoiceEncoder("cpu", verbose=False)
    expected = [plain.embed_utterance(wave) for wave in waves]

    decide(compare=pays_off, hopeless=float("inf"))
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    # Where there are bf16 units the LSTM is in bf16 by then, and nobody asks for it in 8 bits.
    monkeypatch.setattr("accelerate_tts.device.half_dtypes.half_dtypes", lambda _device: ())

    @optimized_model(warmup=lambda encoder: encoder.embed_utterance(waves[0]), precision="fast")
    def load() -> Any:
        return resemblyzer.VoiceEncoder("cpu", verbose=False)

    encoder = load()
    receipt = receipt_of(encoder)
    assert receipt is not None
    tried = [stage for stage in receipt.stages if stage.stage == QuantizeRecurrentStage.name]
    assert tried, str(receipt)
    assert not any(stage.kept for stage in tried), str(receipt)
    assert all(stage.verdict.startswith("rejected: error ") for stage in tried), str(receipt)
    assert any(stage.kept and "int8 linear" in stage.stage for stage in receipt.stages), str(receipt)
    for wave, embedding in zip(waves, expected, strict=True):  # the second one is of a speech that was not tuned on
        found = encoder.embed_utterance(wave)
        assert found.dtype == embedding.dtype
        assert np.dot(found, embedding) / np.linalg.norm(found) / np.linalg.norm(embedding) >= 0.999
    assert get_performance_optimizer().undo(encoder)
    assert np.array_equal(encoder.embed_utterance(waves[0]), expected[0])


def test_nan_comes_out_as_nan(engine: str, seen: list[Event]) -> None:
    """The kernels refuse NaN by an error, which the untouched model does not raise."""
    model: Any = nn.Sequential(nn.Linear(128, 128)).eval()
    quantized(model, engine)
    assert run(model, torch.full((2, 128), float("nan"))).isnan().all()
    assert [type(event) for event in seen] in ([], [NotApplied])  # torchao's do not refuse it
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(model, torch.zeros(2, 127))


def test_a_hundred_refused_tokens_are_one_event_and_one_more_after_served_ones(engine: str, seen: list[Event]) -> None:
    """Not one for each layer of each token."""
    model: Any = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128)).eval()
    quantized(model, engine)
    refused, served = torch.full((2, 128), float("nan")), torch.zeros(2, 128)
    for _ in range(100):
        run(model, refused)
    told = len(seen)
    assert told == (0 if engine == "torchao" else 1)  # torchao's do not refuse it
    for _ in range(3):
        run(model, served)
    for _ in range(100):
        run(model, refused)
    assert len(seen) == 2 * told
    assert all(event.what == "int8 of model" for event in seen if isinstance(event, NotApplied))
