"""Changes inside a block that one kernel serves: upstream's forward runs, with one event, until they are undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from s3gen_blocks import residual_block, sequence_block
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.llama import modeling_llama as llama
from transformers.models.vits import modeling_vits
from transformers.models.vits.modeling_vits import VitsHifiGan, VitsResidualCouplingBlock

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.kernels.packed import Kernel
from accelerate_tts.kernels.residual_block import RESIDUAL
from accelerate_tts.kernels.transformer_block import TRANSFORMER
from accelerate_tts.kernels.weight_formats import WeightFormat
from accelerate_tts.models import describe
from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.layers import fused_sequence
from accelerate_tts.stages.layers.fused_sequence import FusedSequenceStage
from accelerate_tts.stages.vocoder.checked_lengths import CheckedStage
from accelerate_tts.stages.vocoder.fewer_operators import FewerOperatorsStage
from accelerate_tts.stages.vocoder.hifigan import hifigan
from accelerate_tts.stages.vocoder.vits import DURATIONS, FLOW, TEXT


def build() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        num_hidden_layers=2,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)  # as large as those of a trained model
    return model


def loop(model: Any, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    past, states = None, []
    with torch.inference_mode():
        for number in range(count):
            x = torch.randn(2, 1 if number else 6, 32, generator=generator)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
            past = out.past_key_values
            states.append(out.last_hidden_state[:, -1:])
    return torch.cat(states, 1)


@contextmanager
def attribute(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        return (result[0] * 2, *result[1:]) if isinstance(result, tuple) else result * 2

    return other


@contextmanager
def global_hook(_model: Any) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, _given, made: made * 2 if type(module) is nn.Linear else None)
    yield
    handle.remove()


@contextmanager
def global_pre_hook(_model: Any) -> Iterator[None]:
    def double(module: Any, given: Any) -> Any:
        return (given[0] * 2,) if type(module) is nn.Linear else None

    handle = register_module_forward_pre_hook(double)
    yield
    handle.remove()


def class_forward(of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(model: Any) -> Any:
        cls = next(
            c
            for c in type(of(model)).__mro__
            if "forward" in vars(c) and c.__module__.startswith(("transformers", "torch"))
        )
        return attribute(cls, "forward", doubled(cls.forward))

    return changed


@contextmanager
def other_class(model: Any) -> Iterator[None]:
    layer = model.layers[0].mlp.up_proj
    before = type(layer)
    layer.__class__ = type("Other", (nn.Linear,), {"forward": doubled(nn.Linear.forward)})
    yield
    layer.__class__ = before


def class_function(module: Any, name: str) -> Callable[[Any], Any]:
    def halved(*args: Any, **kwargs: Any) -> Any:
        made = before(*args, **kwargs)
        return tuple(each / 2 for each in made) if isinstance(made, tuple) else made / 2

    before = getattr(module, name)
    return lambda _model: attribute(module, name, halved)


@contextmanager
def registered(_model: Any) -> Iterator[None]:
    known = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = known["sdpa"]

    def halved(*args: Any, **kwargs: Any) -> Any:
        made, weights = before(*args, **kwargs)
        return made / 2, weights

    known["sdpa"] = halved
    yield
    if isinstance(known, dict):
        known["sdpa"] = before
    else:
        del known["sdpa"]


def of_layers(call: Callable[..., Any]) -> Callable[..., Any]:
    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        return result * 2 if isinstance(self, nn.Linear) else result

    return other


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling": lambda model: attribute(model.layers[0].self_attn, "scaling", model.layers[0].self_attn.scaling * 3),
    "epsilon": lambda model: attribute(model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "an epsilon for each number": lambda model: attribute(
        model.layers[1].input_layernorm, "variance_epsilon", torch.linspace(0.1, 0.9, model.config.hidden_size)
    ),
    "activation": lambda model: attribute(model.layers[0].mlp, "act_fn", nn.Tanh()),
    "global hook": global_hook,
    "global pre-hook": global_pre_hook,
    "forward of a class": class_forward(lambda model: model.layers[0].mlp),
    "forward of nn.Linear": class_forward(lambda model: model.layers[0].mlp.up_proj),
    "another class": other_class,
    "a function of the model's module": class_function(llama, "apply_rotary_pos_emb"),
    "torch's attention": class_function(nn.functional, "scaled_dot_product_attention"),
    "torch's product": class_function(nn.functional, "linear"),
    "the registry of attention functions": registered,
    "the call of all modules": lambda _model: attribute(nn.Module, "__call__", of_layers(nn.Module.__call__)),
    "a bias that is broadcast": lambda model: attribute(
        model.layers[0].mlp.up_proj, "bias", nn.Parameter(torch.tensor([0.25]))
    ),
}  # fmt: skip


FOR_ALL = ("global", "forward", "a function", "torch's", "the ")
"""Beginnings of the names of changes that are for all models."""


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("name", CHANGES)
def test_one_event_and_upstreams_path_while_it_is_so(name: str, weights: WeightFormat, seen: list[Event]) -> None:
    model = build()
    if name == "scaling" and Version(transformers.__version__) < Version("4.48"):
        pytest.skip("attention has no scaling to change before transformers 4.48")
    if CHANGES[name] is registered and Version(transformers.__version__) < Version("4.48"):
        pytest.skip("there is no registry of attention functions before transformers 4.48")
    plain = copy.deepcopy(model)
    change = FusedBlocksStage(weights).prepare(Part("model", "decoder", model))
    change.on()
    before = loop(model)
    assert not seen
    with CHANGES[name](model), CHANGES[name](plain) if not name.startswith(FOR_ALL) else no_change():
        expected, found = loop(plain), loop(model)
        assert not torch.allclose(expected, before, rtol=0.1)
        tolerance = 1e-4 if weights == "fp32" else 0.05
        assert float((expected - found).norm() / expected.norm()) < tolerance
        loop(model)
    told = [event for event in seen if isinstance(event, NotApplied)]
    assert len(told) == 1, told
    assert torch.equal(loop(model), before)
    assert len(seen) == len(told)
    change.off()
    assert torch.equal(loop(model), loop(build()))


@contextmanager
def no_change() -> Iterator[None]:
    yield


class Vocoder(nn.Module):
    """Reads an option of its configuration, and calls a function of torch in a method."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.VitsConfig()
        self.layer = nn.Conv1d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.shaped(x))  # type: ignore[no-any-return]

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(x, self.config.leaky_relu_slope).to(x.dtype)


def test_what_a_forward_reads_elsewhere() -> None:
    model = Vocoder()
    inside = Inside(model)
    model.config.dtype = "float32"  # as saving a model writes
    assert inside.altered() is None
    for holder, name, value in (
        (model.config, "leaky_relu_slope", 0.5), (nn.functional, "leaky_relu", nn.functional.relu),
        (nn.functional, "conv1d", nn.functional.linear),
    ):  # fmt: skip
        with attribute(holder, name, value):
            assert name in str(inside.altered())
        assert inside.altered() is None


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


EDITS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda block: attribute(block.input_layernorm, "variance_epsilon", 0.5),
    "module": lambda block: attribute(block.mlp, "act_fn", nn.Tanh()),
    "class": lambda block: attribute(block.mlp, "__class__", type("Other", (type(block.mlp),), {})),
    "forward": lambda block: attribute(block.mlp, "forward", lambda x: x),
    "hook": lambda block: hooked(block.mlp.up_proj),
    "configuration": lambda block: attribute(block.self_attn, "config", transformers.LlamaConfig()),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", EDITS)
def test_a_joined_watch_sees_what_each_sees(name: str, number: int) -> None:
    layers = build().layers
    each = [Inside(block, [(block.self_attn, "config")], read=block.self_attn) for block in layers]
    joined = Inside.joined(each)
    assert joined.altered() is None
    with EDITS[name](layers[number]):
        found = [inside.altered() for inside in each]
        assert found[number] is not None
        assert joined.altered() == found[number]
    layers[number].mlp.__dict__.pop("forward", None)
    assert joined.altered() is None


# --- parts and blocks of other kinds that are computed as a whole ----------------------------------------------------


def vits() -> Any:
    return transformers.VitsConfig(
        vocab_size=38, hidden_size=16, num_hidden_layers=1, ffn_dim=32, flow_size=16, spectrogram_bins=17,
        upsample_initial_channel=16, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=1,
        duration_predictor_filter_channels=16, posterior_encoder_num_wavenet_layers=1,
    )  # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


def spoken(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that upstream draws from
    states: torch.Tensor = model(torch.arange(1, 13)[None], output_hidden_states=False).waveform
    return states


class Whole(NamedTuple):
    """A model, how it is run, the stages that are put on it, and what is changed inside what the last one serves.

    Attributes:
        stages: Makes the stages, with the names of their parts; "" for all of the model.
        layer: Path of a layer in it.
        read: A module in it with the name and another value of an attribute that its forward reads.
        function: A function that upstream's code calls, by its module and name.
    """

    build: Callable[[], nn.Module]
    run: Callable[[Any], torch.Tensor]
    stages: Callable[[Callable[[Kernel], Kernel]], list[tuple[str, Any]]]
    layer: str
    read: tuple[str, str, Any]
    function: tuple[Any, str]


VOICE = (lambda: transformers.VitsModel(vits()), spoken)
WHOLES = {
    "vocoder": Whole(
        lambda: VitsHifiGan(vits()), lambda model: model(noise(1, 16, 9)),
        lambda counted: [("", FewerOperatorsStage((counted(hifigan()),)))], "resblocks.0.convs1.0",
        ("resblocks.0", "leaky_relu_slope", 0.9), (nn.functional, "leaky_relu"),
    ),
    "flow": Whole(
        lambda: VitsResidualCouplingBlock(vits()),
        lambda model: model(noise(1, 16, 9), torch.ones(1, 1, 9), None, reverse=True),
        lambda counted: [("", FewerOperatorsStage((counted(FLOW),)))], "flows.0.conv_pre",
        ("flows.0.wavenet", "num_layers", 0), (modeling_vits, "fused_add_tanh_sigmoid_multiply"),
    ),
    "durations": Whole(
        *VOICE, lambda counted: [("duration_predictor", CheckedStage(counted(DURATIONS)))],
        "duration_predictor.conv_pre", ("duration_predictor.flows.2", "tail_bound", 0.5),
        (nn.functional, "gelu"),
    ),
    "text encoder": Whole(
        *VOICE,
        lambda counted: [
            ("duration_predictor", CheckedStage(DURATIONS)), ("text_encoder", CheckedStage(counted(TEXT)))
        ],
        "text_encoder.encoder.layers.0.feed_forward.conv_1",
        ("text_encoder.encoder.layers.0.attention", "scaling", 3.0), (nn.functional, "softmax"),
    ),
    "transformer block": Whole(
        sequence_block, lambda model: model(hidden_states=noise(1, 20, 64)),
        lambda counted: [("", FusedSequenceStage(counted(TRANSFORMER)))], "block.attn1.to_q",
        ("block.norm1", "eps", 9.0), (nn.functional, "linear"),
    ),
    "residual block": Whole(
        residual_block, lambda model: model(noise(1, 64, 20), torch.ones(1, 1, 20), noise(1, 32)),
        lambda counted: [("", FusedSequenceStage(counted(RESIDUAL)))], "block.block1.block.0",
        ("block.block1.block.2", "eps", 9.0), (nn.functional, "conv1d"),
    ),
}  # fmt: skip


def half_as_much_more(call: Callable[..., Any]) -> Callable[..., Any]:
    def other(*args: Any, **kwargs: Any) -> Any:
        made = call(*args, **kwargs)
        return tuple(each * 1.5 for each in made) if isinstance(made, tuple) else made * 1.5

    return other


@contextmanager
def louder(module: nn.Module, _whole: Whole) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _given, made: made * 1.5)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def of_its_own(module: Any, _whole: Whole) -> Iterator[None]:
    module.forward = half_as_much_more(module.forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]


@contextmanager
def of_its_class(module: nn.Module, _whole: Whole) -> Iterator[None]:
    cls: Any = next(cls for cls in plain_class(module).__mro__ if "forward" in vars(cls))
    with attribute(cls, "forward", half_as_much_more(cls.forward)):
        yield


@contextmanager
def of_all_modules(module: nn.Module, _whole: Whole) -> Iterator[None]:
    kind = plain_class(module)
    handle = register_module_forward_hook(
        lambda each, _given, made: made * 1.5 if plain_class(each) is kind else None
    )  # fmt: skip
    try:
        yield
    finally:
        handle.remove()


def of_a_function(_module: nn.Module, whole: Whole) -> Any:
    holder, name = whole.function
    return attribute(holder, name, half_as_much_more(getattr(holder, name)))


ON_THE_MODEL = {"hook": louder, "forward": of_its_own}
FOR_ALL_MODELS = {"class": of_its_class, "global hook": of_all_modules, "function": of_a_function}


@contextmanager
def exchanged(model: nn.Module, whole: Whole) -> Iterator[None]:
    path, _, name = whole.layer.rpartition(".")
    holder = model.get_submodule(path)
    before = holder._modules[name]
    holder._modules[name] = nn.Sequential(before, nn.Tanh())
    try:
        yield
    finally:
        holder._modules[name] = before


@contextmanager
def altered(name: str, whole: Whole, *models: nn.Module) -> Iterator[None]:
    """Change all models in one way."""
    with ExitStack() as scopes:
        for model in models[:1] if name in FOR_ALL_MODELS else models:
            layer = model.get_submodule(whole.layer)
            if name == "attribute":
                path, attribute_name, value = whole.read
                scopes.enter_context(attribute(model.get_submodule(path), attribute_name, value))
            elif name == "module":
                scopes.enter_context(exchanged(model, whole))
            else:
                scopes.enter_context({**ON_THE_MODEL, **FOR_ALL_MODELS}[name](layer, whole))
        yield


@pytest.mark.parametrize("name", [*ON_THE_MODEL, *FOR_ALL_MODELS, "attribute", "module"])
@pytest.mark.parametrize("kind", WHOLES)
def test_of_every_kind_one_event_and_upstreams_path_and_back(
    kind: str, name: str, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_sequence, "has_matrix_unit", lambda: True)  # without AMX it computes in plain loops
    monkeypatch.setattr(fused_sequence, "multiplies_in_bf16", lambda: True)
    calls: list[bool] = []
    names: list[str] = []

    def counted(kernel: Kernel) -> Kernel:
        names.append(kernel.name)

        def serve(described: Any, named: dict[str, Any]) -> Any:
            result = kernel.serve(described, named)
            calls.append(result is not None)
            return result

        return replace(kernel, serve=serve)

    def run(each: nn.Module) -> tuple[torch.Tensor, bool]:
        calls.clear()
        with torch.no_grad():
            return whole.run(each), any(calls)

    whole = WHOLES[kind]
    torch.manual_seed(0)
    model = whole.build().eval()
    plain = copy.deepcopy(model)
    parts = {part.name: part for part in describe(model).parts}
    for name_of, stage in whole.stages(counted):
        part = parts.get(name_of, Part("model", "decoder", model))
        assert stage.applies(part) is None
        stage.prepare(part).on()
    before, is_served = run(model)
    assert is_served
    assert not seen
    for times in (1, 2):
        with altered(name, whole, model, plain):
            expected = run(plain)[0]
            # Durations are rounded up, so other ones may give the same sound.
            assert kind == "durations" or expected.shape != before.shape or not torch.allclose(expected, before)
            for _ in range(3):
                found, is_served = run(model)
                assert not is_served
                assert torch.equal(found, expected)
        # A change for all models may concern the other part of the model, too.
        told = [event for event in seen if isinstance(event, NotApplied) and names[-1] in event.what]
        assert len(told) == times, "one for each time"
        for _ in range(3):
            found, is_served = run(model)
            assert is_served, "the kernel serves again"
            assert torch.equal(found, before)
    assert {str(event) for event in seen} == {str(event) for event in seen[: len(seen) // 2]}
