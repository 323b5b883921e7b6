"""Tuned models of each family that are traced, exported or transformed: what upstream's gives, or upstream's error."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.vits.modeling_vits import VitsHifiGan, VitsResidualCouplingBlock

from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.bf16_prefill import PromptStage
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.stages.vocoder.fewer_operators import FewerOperatorsStage
from accelerate_tts.stages.vocoder.hifigan import hifigan
from accelerate_tts.stages.vocoder.vits import FLOW

WIDTH = 32


class Loop(nn.Module):
    """A prompt, and a token after it."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder: Any = decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = self.decoder(inputs_embeds=x[:, :-1], use_cache=True).past_key_values
        found: torch.Tensor = self.decoder(inputs_embeds=x[:, -1:], past_key_values=past, use_cache=True)[0]
        return found


class Flow(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(x, torch.ones_like(x[:, :1]), None, reverse=True)
        return found


def vits() -> Any:
    return transformers.VitsConfig(
        hidden_size=16, flow_size=16, upsample_initial_channel=16, upsample_rates=[4], upsample_kernel_sizes=[8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=1,
    )  # fmt: skip


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    return Loop(transformers.LlamaModel(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=WIDTH, n_inner=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return Loop(transformers.GPT2Model(config))


def convolutions() -> nn.Module:
    norm: Any = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Conv1d(16, 128, 3, padding=1)), nn.Tanh(), norm(nn.ConvTranspose1d(128, 8, 4)))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[Callable[[], Any]]]] = {
    "Llama": (llama, (1, 5, WIDTH), [lambda: FusedBlocksStage("fp32")]),
    "Llama in int8": (llama, (1, 5, WIDTH), [lambda: FusedBlocksStage("int8"), PromptStage]),
    "GPT-2": (gpt2, (1, 5, WIDTH), [lambda: FusedBlocksStage("fp32")]),
    "GPT-2 by layers": (gpt2, (1, 5, WIDTH), [lambda: SkinnyStage("fp32"), FewRowsStage]),
    "vocoder": (lambda: VitsHifiGan(vits()), (1, 16, 9), [lambda: FewerOperatorsStage((hifigan(),))]),
    "flow": (lambda: Flow(VitsResidualCouplingBlock(vits())), (1, 16, 9), [lambda: FewerOperatorsStage((FLOW,))]),
    "convolutions": (convolutions, (1, 16, 9), [FoldStage, ChannelsLastStage]),
    "convolutions in bf16": (convolutions, (1, 16, 9), [FoldStage, lambda: HalfStage(torch.bfloat16, carried=True)]),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """An untouched model, a tuned one that has run, and an input."""
    make, shape, stages = FAMILIES[name]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().eval())
    plain, model = models
    inner: Any = getattr(model, "decoder", getattr(model, "block", model))
    for stage in stages:
        part = Part("model", "decoder", inner, few_rows=1.0)
        made = stage()
        if made.applies(part) is None:
            made.prepare(part).on()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(x)
    return plain, model, x


def by_jit_trace(model: nn.Module, x: torch.Tensor) -> Any:
    traced = torch.jit.trace(model, (x,), check_trace=False)
    return traced(x), traced(x + 1)


def by_jit_script(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.jit.script(model)(x)


def by_fx(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.fx.symbolic_trace(model)(x)


def by_export(model: nn.Module, x: torch.Tensor) -> Any:
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("before torch 2.7, nothing tells of an export")
    program = torch.export.export(model, (x,), strict=False)
    assert "accelerate_tts" not in str(program.graph)
    return program.module()(x)


def by_onnx(model: nn.Module, x: torch.Tensor) -> Any:
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    return [node.op_type for node in graph.node]


def by_functional_call(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.func.functional_call(model, {name: value * 2 for name, value in model.named_parameters()}, (x,))


def by_vmap(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.func.vmap(model)(torch.stack([x, x + 1]))


def by_grad(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.func.grad(lambda given: model(given).sum())(x)


def by_fake_tensors(model: nn.Module, x: torch.Tensor) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return tuple(model(mode.from_tensor(x)).shape)


def by_meta_tensors(model: nn.Module, x: torch.Tensor) -> Any:
    return tuple(torch.func.functional_call(
        model, {name: value.to("meta") for name, value in model.state_dict().items()}, (x.to("meta"),)
    ).shape)  # fmt: skip


TOOLS = [
    by_jit_trace, by_jit_script, by_fx, by_export, by_onnx, by_functional_call, by_vmap, by_grad, by_fake_tensors,
    by_meta_tensors,
]  # fmt: skip


def outcome(tool: Any, model: nn.Module, x: torch.Tensor) -> Any:
    try:
        with torch.set_grad_enabled(tool is by_grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tool(model, x)
    except Exception as raised:  # whatever upstream raises
        return f"{type(raised).__name__}: {raised}"


def same(expected: Any, found: Any) -> bool:
    """The same operators for an exporter; otherwise the same values, to the precision of what a stage makes of them."""
    if isinstance(expected, torch.Tensor):
        return bool((found - expected).norm().detach() <= 0.03 * expected.norm().detach())
    if isinstance(expected, tuple) and isinstance(expected[0], torch.Tensor):
        return all(map(same, expected, found))
    return bool(expected == found)


SAME_CODE = {"Llama in int8", "GPT-2 by layers"}
"""Families that exporters, which take seconds, see as others."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "tool"),
    [(name, tool) for name in FAMILIES for tool in TOOLS if not (name in SAME_CODE and tool in {by_export, by_onnx})],
)
def test_a_tool(name: str, tool: Any) -> None:
    plain, model, x = built(name)
    expected, found = outcome(tool, plain, x), outcome(tool, model, x)
    if isinstance(expected, str):
        assert isinstance(found, str), f"upstream raises {expected[:200]}"
    else:
        assert not isinstance(found, str), found[:2000]
        assert same(expected, found)
    with torch.no_grad():
        after = outcome(lambda each, given: each(given), model, x)
        assert same(plain(x), after), "and it computes as before afterwards"
