"""Changes inside a block that one kernel serves: upstream's forward runs, with one event, until they are undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.llama import modeling_llama as llama

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.kernels.weight_formats import WeightFormat
from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage


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
    yield
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
