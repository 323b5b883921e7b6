"""Weights edited in every way that torch allows, on every stage, beside an untouched twin that is edited alike.

Each edit moves numbers about and changes their sign: a stage that keeps what it made of them before is far off then,
and yet weights stay as large as they were. After each edit both models compute the same to the precision of the stage,
or raise the same error. At the end the stage is undone, and both compute the same bits. `make fuzz` runs it for long.
"""

from __future__ import annotations

import copy
import ctypes
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3gen_blocks import residual_block, sequence_block
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.models.vits.modeling_vits import VitsHifiGan, VitsResidualCouplingBlock

from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.compile import regional, whole
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompileStage, FrozenCompileStage
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.recorded_prompts import RecordedPromptsStage
from accelerate_tts.stages.graphs.recorded_parts import RecordedPartsStage
from accelerate_tts.stages.graphs.recorded_pieces import RecordedPiecesStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import engines
from accelerate_tts.stages.protocol import Change, Stage
from reruns import Reruns

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0")) // 100
"""Sequences of edits for each stage that hypothesis makes up; `make test` has one of all edits alone."""


HAS_TORCHAO = find_spec("torchao") is not None
HAS_HIGGS = hasattr(transformers, "HiggsAudioV2Config")  # transformers 5.3 brought it


pytestmark = pytest.mark.usefixtures("one_thread")


# --- edits ----------------------------------------------------------------------------------------------------------

Layer = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Other numbers as large as these."""
    return -tensor.detach().roll(1, 0) if tensor.dim() else -tensor.detach()


def some(model: nn.Module, pick: int) -> list[nn.Parameter]:
    """All parameters, or one of them."""
    found = list(model.parameters())
    return found if pick % 2 else [found[pick % len(found)]]


def of_memory(model: nn.Module, pick: int) -> list[nn.Parameter]:
    """Those of `some` with memory of their own. torch 2.14 crashes where torchao's tensors are to share theirs."""
    return [parameter for parameter in some(model, pick) if parameter.data_ptr()]


def layer_of(model: nn.Module, pick: int) -> Any:
    found = [module for module in model.modules() if isinstance(module, Layer)]
    return found[pick % len(found)]


def owner_of(model: nn.Module, pick: int) -> Any:
    """Any module with parameters of its own: a layer, a norm, an LSTM, an embedding."""
    found = [module for module in model.modules() if any(value is not None for value in module._parameters.values())]
    return found[pick % len(found)]


def place_of(model: nn.Module, layer: nn.Module) -> tuple[Any, str]:
    return next((m, name) for m in model.modules() for name, inner in m.named_children() if inner is layer)


def in_place(model: nn.Module, pick: int) -> None:
    with torch.no_grad():
        for parameter in some(model, pick):
            parameter.copy_(other(parameter))


def in_inference_mode(model: nn.Module, pick: int) -> None:
    with torch.inference_mode():
        for parameter in some(model, pick):
            parameter.copy_(other(parameter))


def through_data(model: nn.Module, pick: int) -> None:
    for parameter in some(model, pick):
        parameter.data += other(parameter) - parameter.detach()


def new_data(model: nn.Module, pick: int) -> None:
    for parameter in some(model, pick):
        parameter.data = other(parameter)


def strides_of_their_own(model: nn.Module, pick: int) -> None:
    for parameter in some(model, pick):
        if parameter.dim() > 1:
            parameter.data = other(parameter).transpose(0, 1).contiguous().transpose(0, 1)


def set_(model: nn.Module, pick: int) -> None:
    with torch.no_grad():
        for parameter in some(model, pick):
            parameter.set_(other(parameter))


def a_view(model: nn.Module, pick: int) -> None:
    with torch.no_grad():
        for parameter in some(model, pick):
            if parameter.is_contiguous():
                parameter.view(-1)[: max(1, parameter.numel() // 2)].neg_()


def numpys_memory(model: nn.Module, pick: int) -> None:
    for parameter in of_memory(model, pick):
        array = parameter.detach().numpy()
        array[...] = other(parameter).numpy()


def shared_memory(model: nn.Module, pick: int) -> None:
    """Somebody else writes, who has the memory alone, and no tensor that we know."""
    for parameter in of_memory(model, pick):
        parameter.data = parameter.data.clone().share_memory_()
    arrays = [(parameter.detach().numpy(), other(parameter).numpy()) for parameter in of_memory(model, pick)]

    def write() -> None:
        for array, values in arrays:
            np.copyto(array, values)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


def other_parameter(model: nn.Module, pick: int) -> None:
    layer = layer_of(model, pick)
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            setattr(layer, name, nn.Parameter(other(parameter)))


def exchanged_parameters(model: nn.Module, pick: int) -> None:
    """Two layers exchange their weights, and a third shares one."""
    one = layer_of(model, pick)
    alike = [m for m in model.modules() if isinstance(m, Layer) and m.weight.shape == one.weight.shape and m is not one]
    if alike and "weight" in one._parameters and "weight" in alike[0]._parameters:
        one.weight, alike[0].weight = alike[0].weight, one.weight
        if len(alike) > 1 and "weight" in alike[1]._parameters:
            alike[1].weight = one.weight


def swapped_tensors(model: nn.Module, pick: int) -> None:
    for parameter in some(model, pick):
        torch.utils.swap_tensors(parameter, nn.Parameter(other(parameter)))


def other_module(model: nn.Module, pick: int) -> None:
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if found and not parametrize.is_parametrized(layer := found[pick % len(found)]):
        holder, name = place_of(model, layer)
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        holder._modules[name] = made.eval()


def adapter(model: nn.Module, pick: int) -> None:
    """Merges an adapter, as PEFT does, or takes it out."""
    layer = layer_of(model, pick)
    generator = torch.Generator().manual_seed(pick // 3)
    a, b = (torch.randn(size, 2, generator=generator) for size in (layer.weight.shape[0], layer.weight[0].numel()))
    delta = (a @ b.t()).view(layer.weight.shape).to(layer.weight.dtype) * layer.weight.detach().std()
    layer.weight.data += delta if pick % 3 else -delta


def averages(model: nn.Module, pick: int) -> None:
    for parameter, average in [(parameter, other(parameter)) for parameter in some(model, pick)]:
        parameter.data.copy_(average)


def state_dict_of(model: nn.Module, pick: int) -> dict[str, Any]:
    names = {name for name, _ in model.named_parameters()}
    state = {name: other(value) if name in names else value.clone() for name, value in model.state_dict().items()}
    return state if pick % 2 else dict(list(state.items())[pick % 3 :: 2])


def loaded(model: nn.Module, pick: int) -> None:
    model.load_state_dict(state_dict_of(model, pick), strict=bool(pick % 2))


def loaded_by_assignment(model: nn.Module, pick: int) -> None:
    model.load_state_dict(state_dict_of(model, pick), strict=bool(pick % 2), assign=True)


def a_vector(model: nn.Module, _pick: int) -> None:
    vector = torch.cat([other(parameter).flatten() for parameter in model.parameters()])
    nn.utils.vector_to_parameters(vector, model.parameters())


def there_and_back(model: nn.Module, pick: int) -> None:
    model.to(torch.float64 if pick % 2 else torch.bfloat16)
    through_data(model, pick)
    model.to(torch.float32)


def half(model: nn.Module, _pick: int) -> None:
    model.half()


def bfloats(model: nn.Module, _pick: int) -> None:
    model.bfloat16()


def floats(model: nn.Module, _pick: int) -> None:
    model.float()


def gradients(model: nn.Module, pick: int) -> None:
    model.requires_grad_(bool(pick % 2))
    in_place(model, pick)


def buffers(model: nn.Module, _pick: int) -> None:
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.25)


def biases(model: nn.Module, pick: int) -> None:
    layer = layer_of(model, pick)
    if "bias" in layer._parameters:
        layer.bias = None if pick % 2 else nn.Parameter(torch.randn(layer.weight.shape[0]))


class Other(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight.roll(1, 0)


def parametrized(model: nn.Module, pick: int) -> None:
    parametrize.register_parametrization(layer_of(model, pick), "weight", Other())


def no_longer_parametrized(model: nn.Module, pick: int) -> None:
    for layer in model.modules():
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=bool(pick % 2))


def normed(model: nn.Module, pick: int) -> None:
    layer = layer_of(model, pick)
    if "weight" in layer._parameters:
        (parametrizations.weight_norm if pick % 2 else nn.utils.weight_norm)(layer)


def no_longer_normed(model: nn.Module, _pick: int) -> None:
    for module in model.modules():
        if isinstance(module, Layer) and "weight_g" in module._parameters:
            nn.utils.remove_weight_norm(module)


def spectral(model: nn.Module, pick: int) -> None:
    layer = layer_of(model, pick)
    if "weight" in layer._parameters:
        parametrizations.spectral_norm(layer).eval()


def pruned(model: nn.Module, pick: int) -> None:
    layer = layer_of(model, pick)
    if "weight" in layer._parameters:
        prune.l1_unstructured(layer, "weight", amount=0.5)


def no_longer_pruned(model: nn.Module, _pick: int) -> None:
    for module in model.modules():
        if isinstance(module, Layer) and prune.is_pruned(module) and "weight_orig" in module._parameters:
            prune.remove(module, "weight")


def a_dictionarys_entry(model: nn.Module, pick: int) -> None:
    """As offloading hooks do: `nn.Module.__setattr__` is passed over."""
    owner = owner_of(model, pick)
    for name, parameter in list(owner._parameters.items()):
        if parameter is not None:
            owner._parameters[name] = nn.Parameter(other(parameter))


def registered_anew(model: nn.Module, pick: int) -> None:
    owner = owner_of(model, pick)
    for name, parameter in list(owner._parameters.items()):
        if parameter is not None:
            delattr(owner, name)
            owner.register_parameter(name, nn.Parameter(other(parameter)))


def foreach(model: nn.Module, pick: int) -> None:
    found = some(model, pick)
    with torch.no_grad():
        torch._foreach_copy_(found, [other(parameter) for parameter in found])


def a_step(model: nn.Module, pick: int) -> None:
    """One step of an optimizer: of a loop, of lists of tensors, and of one kernel."""
    found = some(model, pick)
    for parameter in found:
        parameter.grad = parameter.detach() - other(parameter)
    how: dict[str, bool] = [{"foreach": False}, {"foreach": True}, {"fused": True}][pick % 3]
    torch.optim.SGD(found, lr=1.0, **how).step()
    for parameter in found:
        parameter.grad = None


def a_fused_adam(model: nn.Module, pick: int) -> None:
    found = some(model, pick)
    for parameter in found:
        parameter.grad = other(parameter)
    torch.optim.AdamW(found, lr=0.1, fused=True).step()
    for parameter in found:
        parameter.grad = None


def through_dlpack(model: nn.Module, pick: int) -> None:
    for parameter in of_memory(model, pick):
        values = other(parameter)
        shared: Any = torch.from_dlpack(parameter.detach())
        shared.copy_(values)


def through_ctypes(model: nn.Module, pick: int) -> None:
    for parameter in of_memory(model, pick):
        if parameter.is_contiguous():
            values = other(parameter).contiguous()
            ctypes.memmove(parameter.data_ptr(), values.data_ptr(), parameter.nbytes)


def through_storage(model: nn.Module, pick: int) -> None:
    for parameter in of_memory(model, pick):
        if parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes:
            parameter.untyped_storage().copy_(other(parameter).contiguous().clone().untyped_storage())


def one_row(model: nn.Module, pick: int) -> None:
    with torch.no_grad():
        for parameter in some(model, pick):
            parameter[pick % len(parameter)].mul_(-2)


def one_row_of_data(model: nn.Module, pick: int) -> None:
    """No version says so, and most pieces of the weight are as before: it is seen when their turn comes (`LATE`)."""
    for parameter in some(model, pick):
        row = parameter.data[pick % len(parameter)]
        row += torch.randn(row.shape).to(row.dtype) * 4 * parameter.data.abs().mean()


def loaded_with_hooks(model: nn.Module, pick: int) -> None:
    """A hook changes what is loaded, and another one the weights that were loaded."""

    def before(state: dict[str, Any], *_given: Any) -> None:
        for name in names & state.keys():
            state[name] = other(state[name])

    def after(module: nn.Module, _keys: Any) -> None:
        through_data(module, pick)

    names = {name for name, _ in model.named_parameters()}
    handles = [model._register_load_state_dict_pre_hook(before), model.register_load_state_dict_post_hook(after)]
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=bool(pick % 2))
    for handle in handles:
        handle.remove()


def swapped_on_conversion(model: nn.Module, pick: int) -> None:
    """Conversion with torch's swap flags: it exchanges the tensors beneath the parameters, or the parameters."""
    flag: Any = ("swap_module_params_on_conversion", "overwrite_module_params_on_conversion")[pick % 2]
    getattr(torch.__future__, f"set_{flag}")(True)
    try:
        model.to(torch.float64)
        in_place(model, pick)
        model.to(torch.float32)
    finally:
        getattr(torch.__future__, f"set_{flag}")(False)


def emptied(model: nn.Module, _pick: int) -> None:
    state = {name: value.clone() for name, value in state_dict_of(model, 1).items()}
    beside = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for module, name, value in beside:  # those that are no part of the dictionary
        module._buffers[name] = value


def laid_out_anew(model: nn.Module, pick: int) -> None:
    model.to(memory_format=torch.channels_last if pick % 2 else torch.contiguous_format)
    in_place(model, pick)


def initialised(model: nn.Module, _pick: int) -> None:
    def initialise(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=float(parameter.detach().float().std()))

    model.apply(initialise)


def orthogonal(model: nn.Module, pick: int) -> None:
    layer = layer_of(model, pick)
    if "weight" in layer._parameters:
        parametrizations.orthogonal(layer)


class Negative(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


def parametrized_elsewhere(model: nn.Module, pick: int) -> None:
    """Any parameter of any module: a bias, a norm's, an embedding's, an LSTM's."""
    owner = owner_of(model, pick)
    names = [name for name, value in owner._parameters.items() if value is not None]
    parametrize.register_parametrization(owner, names[-1 - pick % len(names)], Negative())


def module_like(module: Any) -> nn.Module | None:
    """A new module in place of one, which computes something else."""
    if parametrize.is_parametrized(module) or "weight_g" in module._parameters or "weight_orig" in module._parameters:
        return None
    kinds = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.Conv2d, nn.LayerNorm, nn.Embedding, nn.LSTM, nn.GRU)
    if not any(type(module).forward is kind.forward or kind in type(module).__mro__ for kind in kinds):
        return None
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(other(parameter))
    return made


def any_other_module(model: nn.Module, pick: int) -> None:
    found = [module for module in model.modules() if module_like(module) is not None]
    if found:
        holder, name = place_of(model, found[pick % len(found)])
        holder._modules[name] = module_like(found[pick % len(found)])


def in_8_bits(model: Any, whole: bool = False) -> Any:
    """Quantise the linear layers by torchao, which puts tensors of a class of its own in the place of their weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    kind = Int8DynamicActivationInt8WeightConfig if whole else Int8WeightOnlyConfig
    quantize_(model, kind(set_inductor_config=False))
    return model


def quantised(model: nn.Module, _pick: int) -> None:
    in_8_bits(model)  # of quantised inputs a rounding error may be a whole step


def inside_the_quantised(model: nn.Module, _pick: int) -> None:
    """Write into the tensors within the weights, which have neither versions nor addresses of the weights."""
    for parameter in model.parameters():
        if hasattr(parameter, "qdata"):
            parameter.qdata.copy_(-parameter.qdata.roll(1, 0))


def no_longer_quantised(model: nn.Module, _pick: int) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if hasattr(parameter, "qdata"):
                module._parameters[name] = nn.Parameter(parameter.dequantize())  # type: ignore[union-attr, operator]


def nothing(_model: nn.Module, _pick: int) -> None:
    pass


LATE = frozenset({one_row_of_data})
"""Edits that are seen after as many calls as a weight has kilobytes."""
SWAPS = frozenset({swapped_tensors, swapped_on_conversion})
CONVERSIONS = frozenset({there_and_back, half, bfloats, floats, laid_out_anew, emptied})
"""Edits for which torch swaps tensors where the weights are of a class of their own."""

GROUPS: list[tuple[Callable[[Any, int], None], ...]] = [
    *((edit,) for edit in (
        nothing, in_place, in_inference_mode, through_data, new_data, set_, a_view, numpys_memory, shared_memory,
        other_parameter, exchanged_parameters, swapped_tensors, adapter, averages, loaded, loaded_by_assignment,
        a_vector, there_and_back, gradients, buffers, strides_of_their_own, biases, a_dictionarys_entry,
        registered_anew, foreach, a_step, a_fused_adam, loaded_with_hooks, through_dlpack, through_ctypes,
        through_storage, one_row, one_row_of_data, swapped_on_conversion, emptied, laid_out_anew, initialised,
    )),
    (parametrized, through_data, no_longer_parametrized), (normed, in_place, no_longer_normed, no_longer_parametrized),
    (pruned, through_data, no_longer_pruned), (spectral, in_place, no_longer_parametrized),
    (orthogonal, in_place, no_longer_parametrized), (parametrized_elsewhere, through_data, no_longer_parametrized),
    (other_module, in_place), (any_other_module, through_data), (bfloats, floats), (half, floats),
    *([(quantised, inside_the_quantised, no_longer_quantised)] if HAS_TORCHAO else ()),
]  # fmt: skip
"""Edits in the order in which they are played. Those of a group belong together."""
EDITS = list(dict.fromkeys(edit for group in GROUPS for edit in group))


# --- models ---------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Something for every stage that is not about decoders."""

    def __init__(self, norm: Callable[..., Any]) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(8, 32, 3, padding=1))
        self.up = norm(nn.ConvTranspose1d(32, 128, 4, stride=2))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128)) for _ in range(2)
        )
        self.memory = nn.LSTM(128, 32, batch_first=True)
        self.last = norm(nn.Conv1d(32, 4, 1))
        self.register_buffer("scale", torch.ones(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.first(x)).transpose(1, 2) * self.scale
        for block in self.blocks:
            y = y + block(y)
        found: torch.Tensor = self.last(self.memory(y)[0].transpose(1, 2))
        return found


def filled(module: nn.Module) -> Any:
    """With numbers of a trained size, all of them different."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            size = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + (parameter == 1.0))
    return module.eval()


def tower(norm: Any = lambda module: module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return filled(Tower(norm))


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


class Wide(nn.Module):
    """Convolutions of as many channels as the kernel for them is for, some of one shape."""

    def __init__(self, norm: Callable[..., Any]) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(64, 64, 3, padding=1))
        self.second = norm(nn.Conv1d(64, 64, 3, padding=2, dilation=2, bias=False))
        self.up = norm(nn.ConvTranspose1d(64, 64, 4, stride=2))
        self.third = norm(nn.Conv1d(64, 64, 7, padding="same"))
        self.last = norm(nn.Conv1d(64, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x))
        y = self.up(y + torch.tanh(self.second(y)))
        found: torch.Tensor = self.last(torch.tanh(self.third(y)))
        return found


def wide(norm: Any = lambda module: module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return filled(Wide(norm))


class Pictures(nn.Module):
    """Convolutions in two dimensions, the ones that a memory format is for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.ConvTranspose2d(16, 8, 4, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(self.first(x)).relu())
        return found


def convolved(model: Any) -> list[torch.Tensor]:
    return [model(noise(1, 8, length).to(dtype_of(model))) for length in (1, 5)]


def convolved_at_length(model: Any) -> list[torch.Tensor]:
    return [model(noise(batch, 64, length).to(dtype_of(model))) for batch, length in ((1, 30), (2, 5))]


def decoder(name: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip
    if name == "GPT2":
        sizes = {"n_embd": 128, "n_inner": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return filled(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(vocab_size=20, **sizes)))


def decoded(model: Any) -> list[torch.Tensor]:
    past, found = None, []
    for positions in (10, 1, 1):
        x = noise(1, positions, 128).to(dtype_of(model))
        out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.last_hidden_state)
    return found


def decoded_from_tokens(model: Any) -> list[torch.Tensor]:
    past, found = None, []
    for tokens in ([1, 5, 7, 3], [2], [9]):
        out = model(input_ids=torch.tensor([tokens]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.last_hidden_state)
    return found


def higgs() -> Any:
    """Blocks with two sets of norms and MLPs, one for tokens of text and one for tokens of sound."""
    return filled(transformers.HiggsAudioV2Model(transformers.HiggsAudioV2Config(
        vocab_size=20, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_codebooks=2, codebook_size=16, audio_token_id=18,
        audio_delay_token_id=19, audio_bos_token_id=17, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )))  # fmt: skip


def heard_and_read(model: Any) -> list[torch.Tensor]:
    """A prompt of text with sound in it, then tokens of sound, of text, and of sound again."""
    past, found = None, []
    for tokens, sounds in (([1, 5, 18, 3], [[4, 9]]), ([18], [[3, 1]]), ([7], None), (None, [[8, 2]])):
        ids = None if tokens is None else torch.tensor([tokens])
        sound = None if sounds is None else torch.tensor([sounds])
        out = model(input_ids=ids, audio_input_ids=sound, past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.last_hidden_state)
    return found


def vits(**sizes: Any) -> Any:
    small = {"vocab_size": 38, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32, "flow_size": 16,
             "spectrogram_bins": 17, "upsample_initial_channel": 16, "upsample_rates": [4],
             "upsample_kernel_sizes": [8], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
             "prior_encoder_num_flows": 2, "prior_encoder_num_wavenet_layers": 1,
             "duration_predictor_filter_channels": 16, "posterior_encoder_num_wavenet_layers": 1}  # fmt: skip
    return transformers.VitsConfig(**{**small, **sizes})


def voice() -> Any:
    torch.manual_seed(0)
    return transformers.VitsModel(vits()).eval()


def spoken(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that upstream draws from
    return [model(torch.arange(1, 13)[None]).waveform]


def through_block(model: Any) -> list[torch.Tensor]:
    dtype = dtype_of(model)
    if "Resnet" in type(model.block).__name__:
        return [model(noise(1, 64, 20).to(dtype), torch.ones(1, 1, 20, dtype=dtype), noise(1, 32).to(dtype))]
    return [model(hidden_states=noise(1, 20, 64).to(dtype))]


class Family(NamedTuple):
    """A model, how it is run, the stages that are tried on it, and the names of those that are put on before each."""

    build: Callable[[], Any]
    run: Callable[[Any], list[torch.Tensor]]
    stages: tuple[str, ...]
    first: tuple[str, ...] = ()


FOLD, NORMED = "fold weight norm", ("channels-last convolutions", "bf16 layers", "bf16 part")
SHORT = "convolutions in fewer products"
FUSED = tuple(f"fused decoder blocks ({weights})" for weights in ("fp32", "bf16", "int8"))
LINEAR = tuple(f"skinny linear layers ({weights})" for weights in ("fp32", "bf16", "int8"))
INT8 = tuple(f"int8 linear layers ({engine})" for engine in sorted(engines()))
CHECKED = tuple(f"{part} in fewer operators, checked by margin" for part in ("durations", "text encoder"))
COMPILED, FROZEN, BLOCKS = "torch.compile", "torch.compile, frozen", "compiled blocks"
STEP, RECORDED, PIECES = (tuple(f"{stage}{inside}" for inside in ("", ", bf16 part", ", fp16 part"))
                          for stage in ("captured decode step", "recorded by shape", "recorded in pieces"))  # fmt: skip
FAMILIES = {
    "plain": Family(
        tower,
        convolved,
        (
            *NORMED, *LINEAR, *INT8, "few-row linear layers", "int8 recurrent layers",
            COMPILED, FROZEN, BLOCKS, *RECORDED, "fp16 layers", "fp16 part",
        ),
    ),
    "plain, int8": Family(tower, convolved, (COMPILED, BLOCKS, RECORDED[0]), LINEAR[2:]),
    "pictures": Family(lambda: filled(Pictures()), lambda m: [m(noise(2, 1, 9, 12).to(dtype_of(m)))], NORMED[1:]),
    "old norm": Family(lambda: tower(nn.utils.weight_norm), convolved, (FOLD, *NORMED)),
    "old norm, folded": Family(
        lambda: tower(nn.utils.weight_norm), convolved, (*NORMED, COMPILED, RECORDED[0]), (FOLD,)
    ),
    "new norm": Family(lambda: tower(parametrizations.weight_norm), convolved, (FOLD, *NORMED)),
    "new norm, folded": Family(
        lambda: tower(parametrizations.weight_norm), convolved, (*NORMED, COMPILED, BLOCKS, RECORDED[0]), (FOLD,)
    ),
    "wide": Family(wide, convolved_at_length, (SHORT, "bf16 part", COMPILED, RECORDED[0])),
    "wide, old norm": Family(lambda: wide(nn.utils.weight_norm), convolved_at_length, (SHORT,)),
    "wide, new norm": Family(lambda: wide(parametrizations.weight_norm), convolved_at_length, (SHORT,)),
    "wide, in layout": Family(wide, convolved_at_length, (SHORT,), NORMED[:1]),
    "wide, folded": Family(lambda: wide(nn.utils.weight_norm), convolved_at_length, (SHORT,), (FOLD,)),
    "wide, in fewer products": Family(wide, convolved_at_length, (COMPILED, RECORDED[0], "bf16 layers"), (SHORT,)),
    "Llama": Family(
        lambda: decoder("Llama"),
        decoded,
        (*FUSED, "growing cache", *NORMED[1:], *LINEAR[::2], *INT8[:1], BLOCKS, *STEP),
    ),
    "Llama, recorded": Family(lambda: decoder("Llama"), decoded, ("recorded prompts",), STEP[:1]),
    "Llama, recorded in bf16": Family(lambda: decoder("Llama"), decoded, ("recorded prompts",), STEP[1:2]),
    "Llama, from tokens": Family(lambda: decoder("Llama"), decoded_from_tokens, (FUSED[0], BLOCKS, STEP[0])),
    "Llama, few rows": Family(lambda: decoder("Llama"), decoded, (BLOCKS, STEP[0]), LINEAR[1:2]),
    "Llama, bf16": Family(lambda: decoder("Llama"), decoded, ("bf16 prompts",), FUSED[1:2]),
    "Llama, int8": Family(lambda: decoder("Llama"), decoded, ("bf16 prompts",), FUSED[2:]),
    "GPT2": Family(lambda: decoder("GPT2"), decoded, (*FUSED, *LINEAR[1:])),
    "GPT2, int8": Family(lambda: decoder("GPT2"), decoded, ("bf16 prompts",), FUSED[2:]),
    "Higgs Audio": Family(
        higgs,
        heard_and_read,
        (*FUSED, "growing cache", *NORMED[1:], *LINEAR, *INT8[:1], BLOCKS, *STEP),
    ),
    "Higgs Audio, bf16": Family(higgs, heard_and_read, ("bf16 prompts",), FUSED[1:2]),
    "Higgs Audio, int8": Family(higgs, heard_and_read, ("bf16 prompts",), FUSED[2:]),
    "plain, torchao's weights": Family(
        lambda: in_8_bits(tower()),
        convolved,
        (*NORMED, "int8 recurrent layers", COMPILED, FROZEN, BLOCKS, *RECORDED),
    ),
    "plain, torchao's inputs, too": Family(lambda: in_8_bits(tower(), whole=True), convolved, (*NORMED, RECORDED[0])),
    "Llama, torchao's weights": Family(
        lambda: in_8_bits(decoder("Llama")), decoded, ("growing cache", BLOCKS, STEP[0])
    ),
    "vocoder": Family(
        lambda: filled(VitsHifiGan(vits())),
        lambda m: [m(noise(1, 16, 9).to(dtype_of(m)))],
        ("fewer operators", "fewer operators (bfloat16)", *NORMED, COMPILED, RECORDED[0], *PIECES),
    ),
    "wide vocoder": Family(
        lambda: filled(VitsHifiGan(vits(upsample_initial_channel=128))),
        lambda m: [m(noise(1, 16, 30).to(dtype_of(m)))],
        ("fewer operators", SHORT),
    ),
    "flow": Family(
        lambda: filled(VitsResidualCouplingBlock(vits())),
        lambda m: [m(noise(1, 16, 9).to(dtype_of(m)), torch.ones(1, 1, 9, dtype=dtype_of(m)), None, reverse=True)],
        (FOLD, "fewer operators", *NORMED, COMPILED, RECORDED[0]),
    ),
    "durations": Family(voice, spoken, CHECKED[:1]),
    "text": Family(voice, spoken, CHECKED[1:], CHECKED[:1]),
    "sequence": Family(
        lambda: filled(sequence_block()), through_block, ("fused transformer blocks (bf16)", "bf16 part")
    ),
    "residual": Family(lambda: filled(residual_block()), through_block, ("fused residual blocks (bf16)", *NORMED)),
}  # fmt: skip


def stages() -> dict[str, Stage]:
    """All stages of the catalogue that change a part, by name, and the recorded ones with a recorder for a CPU."""
    found: dict[str, Stage] = {}
    for precision in ("fast", "balanced", "exact"):
        for stage in default_stages("cpu", "default", precision):  # type: ignore[arg-type]
            if not stage.process:
                found.setdefault(stage.name, stage)
    for carried in (False, True):  # GPUs compute in fp16, too
        stage = HalfStage(torch.float16, carried=carried)
        found[stage.name] = stage
    halves = [HalfStage(dtype, carried=True) for dtype in (torch.bfloat16, torch.float16)]
    for kind in (CapturedStepStage, RecordedPartsStage, RecordedPiecesStage):
        # Where nothing of ours is inside, a replay fails that reads memory which no longer is a weight's.
        made = [kind(Reruns), *(kind(partial(Reruns, watched=False), inside) for inside in halves)]
        found |= {stage.name: stage for stage in made}
    prompts = RecordedPromptsStage(Reruns)
    return {**found, prompts.name: prompts}


class AsCompiled:
    """A stand-in for inductor: calls run as they are, and frozen ones with the weights of the first call."""

    def __init__(self, function: Any, _mode: str, counter: Any, **_options: Any) -> None:
        self._function = function
        counter.count("")
        self._constants: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch._inductor.config.freezing:
            return self._function(*args, **kwargs)
        if self._constants is None:
            self._constants = copy.deepcopy(self._function.__self__)
        return self._constants(*args, **kwargs)


@pytest.fixture(autouse=True)
def as_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "uncompiled" not in request.fixturenames:  # which traces
        for module in (whole, regional):
            monkeypatch.setattr(module, "compile_function", AsCompiled)


STAGES_BY_NAME = stages()


def part_of(model: nn.Module, name: str, stage: str) -> Part:
    if stage in CHECKED:
        known = {part.name: part for part in describe(model).parts}
        return known["duration_predictor" if stage == CHECKED[0] else "text_encoder"]
    is_decoder = name.startswith(("Llama", "GPT2", "Higgs"))
    return Part("model", "decoder" if is_decoder else "vocoder", model, few_rows=1.0, cached=is_decoder)


PAIRS = [
    (name, stage)
    for name, family in FAMILIES.items()
    for stage in family.stages
    if {stage, *family.first} <= STAGES_BY_NAME.keys()  # not every processor computes in bf16
    and (HAS_HIGGS or "Higgs" not in name)
    and (HAS_TORCHAO or "torchao" not in name)
]


def tolerance(name: str, stages: tuple[str, ...]) -> float:
    text = " ".join(stages)
    if "int8" in text:
        return 0.2
    if "inputs" in name and "bf" not in text:
        return 0.03  # a rounding error may be one of the steps to which inputs are quantised
    return 0.06 if "bf" in text or "fp16" in text else 1e-4


ROUNDINGS = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Differences of two orders of summation in a model of that dtype."""


def error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    assert [tensor.shape for tensor in expected] == [tensor.shape for tensor in found]
    one, two = (torch.cat([tensor.detach().double().flatten() for tensor in each]) for each in (expected, found))
    assert torch.equal(one.isnan(), two.isnan())
    return float((one - two).nan_to_num().norm() / one.nan_to_num().norm().clamp_min(1e-9))


def distance(expected: Any, found: Any) -> float:
    if isinstance(expected, str) or isinstance(found, str):
        return 0.0 if isinstance(expected, str) and isinstance(found, str) else float("inf")
    return error(expected, found)


def outcome(run: Callable[[], Any]) -> Any:
    """Return the result, or the error."""
    try:
        return run()
    except Exception as raised:  # whatever upstream raises
        return f"{type(raised).__name__}: {raised}"[:200]


def seeded(edit: Callable[[Any, int], None], model: nn.Module, pick: int) -> None:
    torch.manual_seed(pick)
    edit(model, pick)


def most_calls(model: nn.Module) -> int:
    """Calls after which each piece of a weight has been looked at."""
    return 1 + max(parameter.nbytes for parameter in model.parameters()) // 1024


def prepared(stage: str, part: Part) -> Change:
    """Return a stage's change. A processor may lack what the stage needs; it applies to its family otherwise."""
    obstacle = STAGES_BY_NAME[stage].applies(part)
    if obstacle is not None:
        assert "processor" in obstacle, obstacle
        pytest.skip(f"a stage that cannot be edited here: {obstacle}")
    return STAGES_BY_NAME[stage].prepare(part)


def play(name: str, stage: str, edits: list[tuple[Callable[[Any, int], None], int]]) -> list[str]:
    """Apply the edits one by one; return those after which the two differ."""
    family, wrong = FAMILIES[name], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, twin = family.build(), family.build()
        changes: list[Change] = []
        for each in (*family.first, stage):
            part = part_of(model, name, each)
            changes.append(prepared(each, part))
            changes[-1].on()
        most = tolerance(name, (*family.first, stage))
        with torch.no_grad():
            for each in (twin, model):  # both: a weight norm that never ran has its first weight's graph
                family.run(each)
        for change in changes:
            change.end_warmup()
        for number, (edit, pick) in enumerate(edits):
            is_off = pick % 5 == 4  # as while a faulty call is made again
            for change in reversed(changes) if is_off else ():
                change.off()
            same = [outcome(partial(seeded, edit, each, pick)) for each in (twin, model)]
            for change in changes if is_off else ():
                change.on()
            if type(same[0]) is not type(same[1]):
                wrong.append(f"{number} {edit.__name__}({pick}): {same[1]} for {same[0]}")
                break
            with torch.inference_mode(mode=bool(pick % 3)), torch.no_grad():
                for _ in range(most_calls(model) if edit in LATE else 0):
                    outcome(partial(family.run, model))
                expected, found = (outcome(partial(family.run, each)) for each in (twin, model))
            if (far := distance(expected, found)) > max(most, ROUNDINGS.get(dtype_of(model), 0.0)):
                wrong.append(f"{number} {edit.__name__}({pick}): {far:.2g} {found if isinstance(found, str) else ''}")
        for change in reversed(changes):
            change.off()
        with torch.no_grad():
            expected, found = (outcome(partial(family.run, each)) for each in (twin, model))
        if (far := distance(expected, found)) != 0.0:
            wrong.append(f"undone: {far:.2g} {found if isinstance(found, str) else ''}")
    return wrong


def numbered(groups: Iterable[tuple[Callable[[Any, int], None], ...]]) -> list[tuple[Callable[[Any, int], None], int]]:
    """The edits of some groups, each with its number."""
    return [(edit, 7 * number + 1) for number, edit in enumerate(edit for group in groups for edit in group)]


@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_every_edit_on_every_stage(name: str, stage: str) -> None:
    """In `make test` a third of the edits on each stage, by turns; in `make fuzz` all, and sequences of any."""
    at_once = [group for group in GROUPS if not LATE & {*group}]
    assert not play(name, stage, numbered(GROUPS if EXAMPLES else at_once[PAIRS.index((name, stage)) % 3 :: 3]))
    if EXAMPLES:
        sequences = st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 99)), min_size=1, max_size=12)

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(edits=sequences)
        def hunt(edits: list[tuple[Callable[[Any, int], None], int]]) -> None:
            assert not play(name, stage, edits)

        hunt()


def with_gaps(model: Any) -> Any:
    """With `None` at each place where torch keeps it: children, parameters, buffers, items of lists."""
    for module in list(model.modules()):
        module.register_parameter("absent_parameter", None)
        module.register_buffer("absent_buffer", None)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            module.register_module("absent_child", None)
    without, frozen, pair = nn.Linear(128, 128), nn.Linear(128, 128, bias=False), nn.Conv1d(8, 8, 3)
    without.weight = pair.weight = pair.bias = None  # type: ignore[assignment]
    values = frozen.weight.detach()
    del frozen.weight
    frozen.register_buffer("weight", values)
    bare = nn.LayerNorm(128, elementwise_affine=False)
    model.not_called = nn.ModuleList([without, None, frozen, pair, bare, nn.ModuleList([None]), None])  # type: ignore[list-item]
    model.no_modules = nn.ModuleDict({"there": None})  # type: ignore[dict-item]
    model.no_parameters = nn.ParameterList([torch.ones(2), None])
    return model


@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_gaps_in_every_list(name: str, stage: str) -> None:
    """Every stage reads a model with gaps, also one that cannot be applied to it, and this one serves it."""
    family = FAMILIES[name]
    model = with_gaps(family.build())
    for other_name, each in STAGES_BY_NAME.items():
        if other_name not in CHECKED:
            each.applies(part_of(model, name, other_name))
    with torch.no_grad():
        expected = family.run(model)
        for each in (*family.first, stage):
            part = part_of(model, name, each)
            prepared(each, part).on()
        assert distance(expected, family.run(model)) <= tolerance(name, (*family.first, stage))


@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_every_weight_and_bias_that_is_taken_out(name: str, stage: str) -> None:
    """Results and errors of the stage are upstream's, without each of them."""
    family, wrong = FAMILIES[name], []
    model, twin = family.build(), family.build()
    for each in (*family.first, stage):
        part = part_of(model, name, each)
        prepared(each, part).on()
    seen = set()
    for path, module in twin.named_modules():
        for key in [key for key, parameter in module._parameters.items() if parameter is not None]:
            kind = re.sub(r"\d+", "", f"{path}.{key}")
            if kind in seen or (stage in CHECKED and not path.startswith(("text_encoder", "duration_predictor"))):
                continue
            seen.add(kind)
            holders = [each.get_submodule(path) for each in (twin, model)]
            before = [holder._parameters[key] for holder in holders]
            for holder in holders:
                setattr(holder, key, None)
            with torch.no_grad():
                expected, found = (outcome(partial(family.run, each)) for each in (twin, model))
            if (far := distance(expected, found)) > tolerance(name, (*family.first, stage)):
                wrong.append(f"{path}.{key}: {far:.2g} {found if isinstance(found, str) else ''}")
            for holder, parameter in zip(holders, before, strict=True):
                setattr(holder, key, parameter)
    assert not wrong


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "stage"), [pair for pair in PAIRS if pair[1] in {COMPILED, FROZEN, BLOCKS}])
def test_every_edit_on_what_dynamo_has_traced(name: str, stage: str) -> None:
    """Without swaps of tensors: torch refuses them where something refers weakly to one, as a trace may."""
    swaps = SWAPS | CONVERSIONS if "torchao" in name else SWAPS
    assert not play(name, stage, numbered(group for group in GROUPS if not swaps & {*group}))


def test_no_stage_is_left_out() -> None:
    tried = {stage for family in FAMILIES.values() for stage in (*family.stages, *family.first)}
    every = [stage for device in ("cpu", "cuda") for stage in default_stages(device, "default", "fast")]
    # Token kernels run in Triton's interpreter alone, a second a block: tests/triton has their changes of weights.
    played = {stage.name for stage in (*every, *STAGES_BY_NAME.values()) if not stage.process}
    assert not {name for name in played if "token kernels" not in name} - tried
    assert {type(stage) for stage in every} >= {CompileStage, FrozenCompileStage, CompiledBlocksStage}
