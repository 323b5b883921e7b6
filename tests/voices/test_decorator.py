"""A reference voice is embedded once: by its content, for these weights, from any thread or task, never a wrong one."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import accelerate_tts
from accelerate_tts import cached_embedding, events, inference, set_active
from accelerate_tts.errors import SettingsError
from accelerate_tts.patching import weight_versions
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.int8 import QuantizeStage, engines
from doubles import Encoder


class Service:
    """Counts what it really computes."""

    def __init__(self, seed: int = 0) -> None:
        self.encoder = Encoder(seed)
        self.calls = 0

    def compute(self, wave: torch.Tensor, scale: float) -> torch.Tensor:
        self.calls += 1
        return self.encoder(wave) * scale

    @cached_embedding
    def embed(self, wave: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Embed a wave."""
        return self.compute(wave, scale)


@pytest.fixture
def service() -> Service:
    Service.embed.cache_clear()
    return Service()


WAVE = torch.tensor([0.1, 0.2, -0.3, 0.4])


def not_applied(seen: list[events.Event]) -> list[str]:
    return [event.reason for event in seen if isinstance(event, events.NotApplied)]


# --- what is the same voice ----------------------------------------------------------------------------------------


def test_a_repeated_voice_is_embedded_once(service: Service) -> None:
    first = service.embed(WAVE)
    assert torch.equal(service.embed(WAVE.clone(), scale=1.0), first)
    assert torch.equal(service.embed(wave=WAVE), first)
    assert service.calls == 1
    assert service.embed.cache_info() == Service.embed.cache_info()
    info = service.embed.cache_info()
    assert (info.hits, info.misses, info.entries) == (2, 1, 1)
    assert info.bytes >= 12
    service.embed.cache_clear()
    assert service.embed.cache_info() == type(info)(0, 0, 0, 0)
    service.embed(WAVE)
    assert service.calls == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda s: s.embed(WAVE, 2.0),
        lambda s: s.embed(WAVE, 1),  # an int may compute otherwise than a float
        lambda s: s.embed(WAVE + 1e-7),
        lambda s: s.embed(WAVE[None]),
        lambda s: s.embed(-WAVE),
        lambda s: s.embed(WAVE.flip(0)),
    ],
)
def test_another_voice_is_another_one(service: Service, other: Callable[[Service], Any]) -> None:
    service.embed(WAVE)
    other(service)
    assert service.calls == 2


# --- the encoder ---------------------------------------------------------------------------------------------------


def replaced(encoder: Encoder) -> None:
    encoder.linear.weight = nn.Parameter(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.linear.bias.add_(1),
        lambda e: e.load_state_dict(Encoder(7).state_dict()),
        lambda e: e.double().float(),
        lambda e: setattr(e, "linear", nn.Linear(4, 3)),
        replaced,
    ],
    ids=["written", "loaded", "cast", "exchanged", "replaced"],
)
def test_a_change_of_the_weights_is_seen(service: Service, change: Callable[[Encoder], Any]) -> None:
    service.embed(WAVE)
    with torch.no_grad():
        change(service.encoder)
    torch.testing.assert_close(service.embed(WAVE), service.encoder(WAVE).detach())
    assert service.calls == 2


def wide() -> Service:
    service = Service()
    service.encoder.linear.weight = nn.Parameter(torch.linspace(-1, 1, 12 * 1000).reshape(3000, 4).contiguous())
    service.encoder.linear.bias = nn.Parameter(torch.zeros(3000))
    service.encoder.gain = 1.5  # type: ignore[assignment]
    service.encoder.sizes = [1, 2]  # type: ignore[assignment]
    service.encoder.hp = SimpleNamespace(gain=1.0)  # type: ignore[assignment]
    service.encoder.args = {"gain": 1.0}  # type: ignore[assignment]
    service.encoder.steps = nn.Sequential(nn.Identity(), nn.Identity())
    service.encoder.steps[1].sizes = [1, 2]  # type: ignore[assignment]
    return service


class Louder(Encoder):
    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return super().forward(wave) * 2


def hook(_module: nn.Module, _given: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def global_hook(encoder: Encoder) -> Callable[[], None]:
    from torch.nn.modules.module import register_module_forward_hook

    return register_module_forward_hook(lambda module, _given, output: output + (module is encoder)).remove


def autocast(_encoder: Encoder) -> Callable[[], None]:
    scope = torch.autocast("cpu", torch.bfloat16)
    scope.__enter__()
    return lambda: scope.__exit__(None, None, None)


def default_dtype(_encoder: Encoder) -> Callable[[], None]:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def matmul_precision(_encoder: Encoder) -> Callable[[], None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision(before)


def attribute(name: str, value: Any) -> Callable[[Encoder], Callable[[], None]]:
    def change(encoder: Encoder) -> Callable[[], None]:
        had, before = name in vars(encoder), vars(encoder).get(name)
        vars(encoder)[name] = value
        return lambda: vars(encoder).update({name: before}) if had else vars(encoder).pop(name)

    return change


def training(encoder: Encoder) -> Callable[[], Any]:
    encoder.linear.eval()
    return encoder.linear.train


def in_place(encoder: Any) -> Callable[[], None]:
    encoder.sizes.append(3)
    return lambda: encoder.sizes.remove(3)


def in_place_in_the_second_of_a_class(encoder: Any) -> Callable[[], None]:
    return in_place(encoder.steps[1])


def option(encoder: Any) -> Callable[[], None]:
    encoder.hp.gain = 2.0
    return lambda: setattr(encoder.hp, "gain", 1.0)


def argument(encoder: Any) -> Callable[[], None]:
    encoder.args["gain"] = 2.0
    return lambda: encoder.args.update(gain=1.0)


def class_of_it(encoder: Encoder) -> Callable[[], None]:
    encoder.__class__ = Louder
    return lambda: setattr(encoder, "__class__", Encoder)


def forward_of_its_class(_encoder: Encoder) -> Callable[[], None]:
    before = Encoder.forward
    Encoder.forward = lambda self, wave: self.linear(wave).sigmoid()  # type: ignore[method-assign]
    return lambda: setattr(Encoder, "forward", before)


STATES: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "training": training,
    "hook": lambda encoder: encoder.linear.register_forward_hook(hook).remove,
    "pre-hook": lambda encoder: encoder.register_forward_pre_hook(lambda _, given: (given[0] * 2,)).remove,
    "global hook": global_hook,
    "autocast": autocast,
    "default dtype": default_dtype,
    "matmul precision": matmul_precision,
    "hyper-parameter": attribute("gain", 1.25),
    "private attribute": attribute("_gain", 1.25),
    "list": in_place,
    "list in the second of a class": in_place_in_the_second_of_a_class,
    "option of an object": option,
    "option of a dictionary": argument,
    "forward": attribute("forward", lambda wave: wave),
    "class": class_of_it,
    "forward of the class": forward_of_its_class,
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
@pytest.mark.parametrize("stored", [False, True])
def test_a_state_that_may_change_a_voice_has_a_voice_of_its_own(
    change: Callable[[Encoder], Callable[[], Any]], stored: bool, tmp_path: Path, seen: list[events.Event]
) -> None:
    service = wide()
    embed = cached_embedding(folder=tmp_path if stored else None)(service.compute)
    # Written once, torch tells more of it than before: what is put back below is then what was there.
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
    embed(WAVE, 1.0)
    back = change(service.encoder)
    try:
        wanted = service.encoder(WAVE).detach()
        assert torch.equal(embed(WAVE, 1.0), wanted)
        assert torch.equal(embed(WAVE, 1.0), wanted)
    finally:
        back()
    assert service.calls == 2
    assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE).detach())
    assert service.calls == 2, "the state is as it was, and so is the voice"
    assert not seen


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.add_(1),
        lambda weight: weight.data.copy_(torch.ones(3000, 4)),
        lambda weight: setattr(weight, "data", weight.data.clone().neg_()),
        lambda weight: setattr(weight, "data", weight.data.reshape(4, 3000).t()),
        lambda weight: weight.detach().numpy().__imul__(2),
        lambda weight: weight.detach().numpy()[1000:2001].fill(7),
    ],
)
def test_a_write_that_counts_no_version_is_seen(
    stored: bool, change: Callable[[torch.Tensor], Any], tmp_path: Path
) -> None:
    service = wide()
    embed = cached_embedding(folder=tmp_path if stored else None)(service.compute)
    embed(WAVE, 1.0)
    before = service.encoder.linear.weight._version
    change(service.encoder.linear.weight)
    assert service.encoder.linear.weight._version == before
    assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE).detach())
    assert service.calls == 2


@pytest.mark.parametrize("native", [True, False])
def test_a_row_that_is_written_by_data_is_seen_when_its_turn_comes(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:  # as on a GPU: some elements are compared, and looks may take a hundredth of the time
        monkeypatch.setattr(weight_versions, "missing", lambda: "there are none")
    service = wide()
    embed = cached_embedding(service.compute)
    embed(WAVE, 1.0)
    service.encoder.linear.weight.data[1234 if native else slice(0, 900)] += 1
    calls = 10 if native else 100_000  # five of 47 kilobytes at each
    assert any(service.calls == 2 for _ in range(calls) if embed(WAVE, 1.0) is not None)
    assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE).detach())


def test_weights_made_in_inference_mode_are_sampled_too() -> None:
    with torch.inference_mode():
        service = wide()
        embed = cached_embedding(service.compute)
        embed(WAVE, 1.0)
        service.encoder.linear.weight.mul_(2)
        assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE))
    assert service.calls == 2


def quantised(seed: int) -> Any:
    torch.manual_seed(seed)
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})


@pytest.mark.skipif(not engines(), reason="this build of torch has no 8-bit kernels")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_weights_are_weights(tmp_path: Path, seen: list[events.Event]) -> None:
    service = Service()
    embed = cached_embedding(service.compute)
    service.encoder = quantised(0)
    for seed in range(6):  # more than two: their addresses are used again
        other = quantised(seed)[0]
        service.encoder[0].set_weight_bias(other.weight(), other.bias())  # type: ignore[index]
        for _ in range(2):
            assert torch.equal(embed(WAVE[None], 1.0), service.encoder(WAVE[None]))
    assert service.calls == 6
    assert not seen
    for seed in range(2):  # as in two processes
        service.encoder = quantised(seed)
        embed = cached_embedding(folder=tmp_path)(service.compute)
        assert torch.equal(embed(WAVE[None], 1.0), service.encoder(WAVE[None]))
    assert "another process cannot tell" in not_applied(seen)[0]
    assert not list(tmp_path.iterdir())


class Centred(Encoder):
    """An encoder with a mean that is no parameter."""

    def __init__(self, mean: Any) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return super().forward(wave - torch.as_tensor(self.mean))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("make", [torch.full, lambda *given: np.full(*given, dtype=np.float32)])
def test_a_tensor_or_an_array_that_is_no_parameter_is_a_weight(make: Any, stored: bool, tmp_path: Path) -> None:
    service = Service()
    embed = cached_embedding(folder=tmp_path if stored else None)(service.compute)
    encoder = service.encoder = Centred(make((4,), 0.0))
    for number in range(4):
        encoder.mean = make((4,), float(number))
        for _ in range(2):
            assert torch.equal(embed(WAVE, 1.0), encoder(WAVE).detach())
    assert service.calls == 4
    if stored:  # as in another process
        embed = cached_embedding(folder=tmp_path)(service.compute)
        for number in (5, 1):
            service.encoder = Centred(make((4,), float(number)))
            assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE).detach())
        assert service.calls == 5


def test_tensors_that_calls_set_are_no_state_of_the_encoder() -> None:
    class Remembers(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.zeros(1)

        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            self.last = super().forward(wave)
            return self.last

    service = Service()
    service.encoder = Remembers()
    embed = cached_embedding(service.compute)
    for _ in range(3):
        embed(WAVE, 1.0)
        service.encoder(torch.rand(4))  # as speech does, with what is embedded
    assert service.calls == 1


def test_a_hook_that_nothing_can_be_said_of_costs_the_cache(seen: list[events.Event]) -> None:
    class Slots:
        __slots__ = ()

        def __call__(self, *_args: Any) -> None:
            return None

    service = wide()
    embed = cached_embedding(service.compute)
    handle = service.encoder.register_forward_hook(Slots())
    embed(WAVE, 1.0)
    embed(WAVE, 1.0)
    assert service.calls == 2
    assert "allows no weak references" in not_applied(seen)[0]
    handle.remove()
    embed(WAVE, 1.0)
    embed(WAVE, 1.0)
    assert service.calls == 3


def test_hooks_with_the_same_code_and_another_constant(tmp_path: Path) -> None:
    def hook_of(gain: float) -> Any:
        return lambda _module, _given, output: output * gain

    service = wide()
    embed = cached_embedding(folder=tmp_path)(service.compute)
    for gain in (2.0, 3.0, 2.0):
        handle = service.encoder.register_forward_hook(hook_of(gain))
        assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE).detach())
        handle.remove()
    assert service.calls == 2


ENCODER = Encoder(3)
GAIN = 2.0


def helper(wave: torch.Tensor) -> torch.Tensor:
    return ENCODER(wave) * GAIN


def test_an_encoder_that_a_helper_or_a_method_finds_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Outside:
        @cached_embedding
        def embed(self, wave: torch.Tensor) -> torch.Tensor:
            return ENCODER(wave) * GAIN

    @cached_embedding
    def embed(wave: torch.Tensor) -> torch.Tensor:
        (answer,) = (helper(each) for each in (wave,))
        return answer

    for call in (embed, Outside().embed):
        for change in (
            lambda: None,
            lambda: ENCODER.linear.bias.data.add_(1),
            lambda: monkeypatch.setitem(helper.__globals__, "GAIN", GAIN + 1),
        ):
            change()
            wanted = (ENCODER(WAVE) * GAIN).detach()
            assert torch.equal(call(WAVE), wanted)
            assert torch.equal(call(WAVE), wanted)
        assert call.cache_info().misses == 3


def test_constants_around_a_function_count_and_counters_do_not(tmp_path: Path) -> None:
    def made(gain: float) -> Any:
        count = 0

        @cached_embedding(folder=tmp_path, encoder=lambda: 1)
        def embed(wave: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return wave * gain

        return embed

    for gain in (2.0, 3.0):
        embed = made(gain)
        for _ in range(3):
            assert torch.equal(embed(WAVE), WAVE * gain)
        assert embed.cache_info().misses == 1


def test_a_scripted_encoder(seen: list[events.Event]) -> None:
    service = Service()
    service.encoder = torch.jit.script(service.encoder)  # type: ignore[assignment]
    embed = cached_embedding(service.compute)
    embed(WAVE, 1.0)
    embed(WAVE, 1.0)
    assert service.calls == 1
    with torch.no_grad():
        service.encoder.linear.weight.add_(1)
    assert torch.equal(embed(WAVE, 1.0), service.encoder(WAVE).detach())
    assert not seen


def test_each_encoder_has_its_own_embeddings_even_where_memory_is_used_again() -> None:
    Service.embed.cache_clear()
    for seed in range(20):
        service = Service(seed)
        torch.testing.assert_close(service.embed(WAVE), service.encoder(WAVE).detach())
        del service


def test_an_encoder_beside_self(seen: list[events.Event]) -> None:
    encoder = Encoder()

    @cached_embedding
    def embed(wave: torch.Tensor) -> torch.Tensor:
        return encoder(wave)

    first = embed(WAVE)
    with torch.no_grad():
        encoder.linear.bias.add_(1)
    assert not torch.equal(embed(WAVE), first)

    class OfTheClass:
        shared = encoder

        @cached_embedding
        def embed(self, wave: torch.Tensor) -> torch.Tensor:
            return self.shared(wave)

    class ItsMethod:
        def __init__(self) -> None:
            self.method = encoder.forward

        @cached_embedding
        def embed(self, wave: torch.Tensor) -> torch.Tensor:
            return self.method(wave)

    for one in (OfTheClass(), ItsMethod()):
        first = one.embed(WAVE)
        with torch.no_grad():
            encoder.linear.bias.add_(1)
        assert not torch.equal(one.embed(WAVE), first)

    class Versioned:
        version = 1

        @cached_embedding(encoder=lambda self: (self.version, encoder))
        def embed(self, wave: torch.Tensor) -> int:
            return self.version

    service = Versioned()
    assert (service.embed(WAVE), Versioned().embed(WAVE)) == (1, 1)
    service.version = 2
    assert service.embed(WAVE) == 2
    assert service.embed.cache_info().misses == 2
    assert not seen


def test_an_encoder_that_is_loaded_by_the_first_call(seen: list[events.Event]) -> None:
    class Lazy:
        encoder: nn.Module | None = None

        def __init__(self, seed: int) -> None:
            self.seed = seed

        @cached_embedding
        def embed(self, wave: torch.Tensor) -> torch.Tensor:
            self.encoder = self.encoder or Encoder(self.seed)
            return self.encoder(wave)

    one, two = Lazy(1), Lazy(2)
    assert not torch.equal(one.embed(WAVE), two.embed(WAVE))
    assert torch.equal(one.embed(WAVE), one.embed(WAVE))
    assert one.embed.cache_info().hits == 1
    assert "changed by the call itself" in not_applied(seen)[0]


# --- what is handed out --------------------------------------------------------------------------------------------


def test_nobody_can_write_to_what_is_kept(service: Service) -> None:
    first = service.embed(WAVE)
    wanted = first.clone()
    first.zero_()
    second = service.embed(WAVE)
    assert torch.equal(second, wanted)
    second.zero_()
    assert torch.equal(service.embed(WAVE), wanted)


def test_what_is_kept_in_inference_mode_serves_outside_of_it(service: Service) -> None:
    embed = inference(service.embed)
    for answer in (embed(WAVE), embed(WAVE), service.embed(WAVE)):
        assert not answer.is_inference()
        assert not answer.requires_grad
        (answer * nn.Parameter(torch.ones(3))).sum().backward()
    assert service.calls == 1


def test_a_result_that_cannot_be_copied_is_passed_on(seen: list[events.Event]) -> None:
    made = [threading.Lock(), (number for number in "ab"), nn.Linear(1, 1)]

    @cached_embedding
    def embed(which: int) -> Any:
        return made[which]

    for number, value in enumerate(made):
        assert embed(number) is value
        assert embed(number) is value
    assert embed.cache_info().hits == 0
    assert len(not_applied(seen)) == 3


def test_an_exception_is_not_kept(service: Service) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            service.embed(torch.ones(5))
    assert service.calls == 2
    with pytest.raises(TypeError, match="missing"):
        service.embed()  # type: ignore[call-arg]


def test_the_least_recently_used_goes_first() -> None:
    calls: list[float] = []

    @cached_embedding(limit_mb=1)
    def embed(voice: float) -> torch.Tensor:
        calls.append(voice)
        return torch.full((80_000,), voice)

    for voice in (1.0, 2.0, 3.0, 1.0, 4.0, 1.0, 2.0):
        assert embed(voice)[0] == voice
    assert calls == [1.0, 2.0, 3.0, 4.0, 2.0]
    assert embed.cache_info().entries == 3
    assert embed.cache_info().bytes <= 2**20

    @cached_embedding(limit_mb=0.001)
    def large() -> torch.Tensor:
        return torch.ones(1000)

    large()
    assert large.cache_info().entries == 0


@cached_embedding
def at_the_top(voice: float) -> float:
    return voice


# --- the decorator -------------------------------------------------------------------------------------------------


def test_the_signature_is_kept_and_copies_and_pickles_work(service: Service) -> None:
    assert str(inspect.signature(Service.embed)) == (
        "(self, wave: 'torch.Tensor', scale: 'float' = 1.0) -> 'torch.Tensor'"
    )
    assert Service.embed.__doc__ == "Embed a wave."
    first = service.embed(WAVE)
    for twin in (pickle.loads(pickle.dumps(service.embed)), copy.deepcopy(service.embed)):
        assert torch.equal(twin(WAVE), first)
    assert pickle.loads(pickle.dumps(at_the_top)) is at_the_top
    service.held = cached_embedding(sets=["calls"])(service.compute)  # type: ignore[attr-defined]
    twin = copy.deepcopy(service)
    assert torch.equal(pickle.loads(pickle.dumps(twin)).held(WAVE, 1.0), first)  # type: ignore[attr-defined]


def test_class_and_static_methods() -> None:
    calls: list[int] = []

    class Kinds:
        encoder = Encoder()

        @classmethod
        @cached_embedding
        def of_class(cls, wave: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return cls.encoder(wave)

        @cached_embedding
        @staticmethod
        def static(wave: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return wave * 2

    for _ in range(2):
        assert torch.equal(Kinds.of_class(WAVE), Kinds.encoder(WAVE))
        assert torch.equal(Kinds().static(WAVE), WAVE * 2)
    assert len(calls) == 2


def test_switched_off_it_is_not_there(service: Service) -> None:
    set_active(False)
    assert service.embed(WAVE).requires_grad
    service.embed(WAVE)
    with accelerate_tts.testing():
        service.embed(WAVE)
    assert service.calls == 3


@pytest.mark.parametrize(
    "options",
    [
        {"limit_mb": 0},
        {"limit_mb": "1"},
        {"limit_mb": float("inf")},
        {"sets": "conds"},
        {"sets": ("a b",)},
        {"encoder": 3},
    ],
)
def test_options_that_mean_nothing(options: Any) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        cached_embedding(**options)


def test_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="@cached_embedding decorates a function"):
        cached_embedding(Service)


def test_an_object_without_weak_references(seen: list[events.Event]) -> None:
    class Slots:
        __slots__ = ("seed", "voice")

        @cached_embedding(sets=("voice",))
        def prepare(self, wave: torch.Tensor) -> None:
            self.voice = wave * self.seed

    one = Slots()
    one.seed = 2
    one.prepare(WAVE)
    one.seed = 3
    one.prepare(WAVE)
    assert torch.equal(one.voice, WAVE * 3)
    assert "encoder=" in not_applied(seen)[0]


# --- what else makes another embedding -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda wave: float(wave.sum()) * 16_000,
        lambda: lambda wave: float(wave.sum()) * 22_050,  # the same instructions, another constant
        lambda: lambda wave: float(wave.amax()) * 16_000,  # another name
        lambda: lambda wave: sum(float(wave.sum()) * 24_000 for _ in (0,)),  # inside another function
        lambda: lambda wave: sum(float(wave.sum()) * 8_000 for _ in (0,)),
    ],
)
def test_code_that_was_edited_computes_anew(tmp_path: Path, make: Callable[[], Callable[..., float]]) -> None:
    """Files of an earlier release of a service are not used for what this one computes."""

    def decorated(function: Callable[..., float]) -> Any:
        function.__qualname__ = "embed"
        return cached_embedding(folder=tmp_path, encoder=lambda: 1)(function)

    earlier = decorated(lambda wave: float(wave.mean()) * 16_000)
    earlier(WAVE)
    function = make()
    found = decorated(function)
    assert found(WAVE) == function(WAVE)
    assert found.cache_info().misses == 1
    again = decorated(make())
    assert again(WAVE) == function(WAVE)
    assert again.cache_info().misses == 0, "from the folder"


def test_fewer_bits_give_another_embedding(service: Service) -> None:
    """An embedding from int8 weights is not returned after the tuning is undone, nor the reverse."""
    service.encoder.linear = nn.Linear(4, 8192)
    stage = QuantizeStage(torch.backends.quantized.engine)
    change = stage.prepare(Part("encoder", "encoder", service.encoder))
    wave = WAVE[None]  # the kernel takes rows
    with torch.inference_mode():
        plain = service.embed(wave)
        change.on()
        coarse = service.embed(wave)
        assert not torch.equal(coarse, plain)
        assert torch.equal(service.embed(wave), coarse)
        change.off()
        assert torch.equal(service.embed(wave), plain)
    assert service.calls == 2


def test_what_is_not_finite_is_not_kept(service: Service, seen: list[events.Event]) -> None:
    """The guard makes such a call again: it must not meet the same embedding."""
    assert bool(service.embed(WAVE, scale=float("nan")).isnan().all())
    assert service.embed.cache_info().entries == 0
    assert "not finite" in not_applied(seen)[-1]
    service.embed(WAVE, scale=float("nan"))
    assert service.calls == 2


@pytest.mark.parametrize("bad", [[0.5, math.nan], (1, -math.inf), {"a": [None, math.nan]}, complex(0.0, math.inf)])
def test_numbers_that_are_not_finite_are_not_kept(bad: Any, seen: list[events.Event]) -> None:
    """An embedding may be a list, as `.tolist()` gives it."""

    @cached_embedding(encoder=lambda: 1)
    def embed(wave: torch.Tensor) -> Any:
        return bad

    embed(WAVE)
    assert embed.cache_info().entries == 0
    assert "not finite" in not_applied(seen)[-1]


def test_float8_is_kept() -> None:
    @cached_embedding(encoder=lambda: 1)
    def embed(wave: torch.Tensor) -> torch.Tensor:
        return wave.to(torch.float8_e4m3fn)

    embed(WAVE)
    assert embed(WAVE).dtype is torch.float8_e4m3fn
    assert embed.cache_info().entries == embed.cache_info().hits == 1
