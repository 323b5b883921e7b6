"""Stages of all kinds, applied and undone in any order: once all are off, a module is bit for bit what it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts.engine.plan import Part
from accelerate_tts.engine.stages import Change, Stage, blocks, inductor, prompts
from accelerate_tts.engine.stages import compile as compile_stages
from accelerate_tts.engine.stages.blocks import CompiledBlocksStage
from accelerate_tts.engine.stages.compile import CompileStage, FrozenCompileStage
from accelerate_tts.engine.stages.decode import GrowingCacheStage
from accelerate_tts.engine.stages.fold import FoldStage
from accelerate_tts.engine.stages.fused import FusedBlocksStage
from accelerate_tts.engine.stages.layout import ChannelsLastStage
from accelerate_tts.engine.stages.linear import FewRowsStage
from accelerate_tts.engine.stages.precision import HalfStage
from accelerate_tts.engine.stages.prompts import PromptStage
from accelerate_tts.engine.stages.quantize import quantize_stages
from accelerate_tts.engine.stages.skinny import SkinnyStage

STAGES: tuple[Stage, ...] = (
    FoldStage(), GrowingCacheStage(), ChannelsLastStage(), FusedBlocksStage("fp32"), FusedBlocksStage("bf16"),
    FusedBlocksStage("int8"), PromptStage(), HalfStage(torch.bfloat16, carried=False),
    HalfStage(torch.bfloat16, carried=True), SkinnyStage("fp32"), SkinnyStage("bf16"), SkinnyStage("int8"),
    FewRowsStage(), *quantize_stages(), FrozenCompileStage(), CompiledBlocksStage("default"), CompileStage("default"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is traced; prompts are in bf16 where the processor has no units for it, too."""

    def direct(function: Any, _mode: str, counter: Any, **_options: Any) -> Any:
        counter.count("")
        return function

    for module in (compile_stages, blocks):
        monkeypatch.setattr(module, "compile_function", direct)
    monkeypatch.setattr(prompts, "half_dtypes", lambda _device: (torch.bfloat16,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tower(nn.Module):
    """Something for every stage that is not about decoders."""

    def __init__(self, norm: Callable[..., Any], bias: bool, recurrent: type[nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(16, 128, 3, padding=1, bias=bias))
        self.up = norm(nn.ConvTranspose1d(128, 128, 4, stride=2, bias=bias))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128, bias=bias), nn.Tanh()) for _ in range(2)
        )
        self.memory: Any = recurrent(128, 128, batch_first=True)
        self.last = norm(nn.Conv1d(128, 4, 1))
        self.register_buffer("scale", torch.ones(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.first(x)).transpose(1, 2) * self.scale
        for block in self.blocks:
            y = y + block(y)
        found: torch.Tensor = self.last(self.memory(y)[0].transpose(1, 2))
        return found


def tower(old: bool, bias: bool, recurrent: type[nn.Module]) -> nn.Module:
    norm: Any = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tower(norm, bias, recurrent).eval()


def decoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if name == "GPT2":
        sizes = {"n_embd": 128, "n_inner": 128, "n_layer": 2, "n_head": 4}
    else:
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vocab_size=20, **sizes, **options)
    return getattr(transformers, f"{name}Model")(config).eval()


def spoken(model: Any) -> list[torch.Tensor]:
    """What a module computes: of a decoder, for a prompt and the tokens after it."""
    generator = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        if isinstance(model, Tower):
            return [model(torch.randn(1, 16, length, generator=generator)) for length in (2, 9)]
        past = None
        for positions in (6, 1, 1):
            x = torch.randn(2, positions, 128, generator=generator)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.last_hidden_state.clone())
    return found


class Before:
    """All of a module that a stage could leave changed, and what the module computes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs = spoken(model)
        self.found = self.look()
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def look(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for path, module in self.model.named_modules():
            found.append((f"{path}: class", type(module)))
            for name, value in vars(module).items():
                found.append((f"{path}.{name}", None if isinstance(value, torch.Tensor) else value))
                if isinstance(value, dict):
                    found += [(f"{path}.{name}[{key}]", item) for key, item in value.items()]
                elif isinstance(value, (set, list)):
                    found.append((f"{path}.{name}", tuple(value)))
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            found.append((name, (tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.requires_grad)))
            found.append((name, (tensor.dtype, tensor.stride(), tensor._version)))
        return found

    def assert_untouched(self) -> None:
        now = self.look()
        assert [name for name, _ in now] == [name for name, _ in self.found]
        for (name, then), (_, value) in zip(self.found, now, strict=True):
            assert value is then or (isinstance(then, tuple) and value == then), name
        state = self.model.state_dict()
        assert list(state) == list(self.values)
        assert all(torch.equal(state[name], value) for name, value in self.values.items())
        assert all(torch.equal(a, b) for a, b in zip(spoken(self.model), self.outputs, strict=True))


MODELS: dict[str, Callable[[], Any]] = {
    "convolutions, old norm, LSTM": lambda: tower(True, True, nn.LSTM),
    "convolutions, new norm, GRU": lambda: tower(False, False, nn.GRU),
    "Llama": lambda: decoder("Llama"),
    "GPT2": lambda: decoder("GPT2"),
}
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.sampled_from(STAGES)),
        st.tuples(st.just("apply"), st.sampled_from(STAGES)),
        st.tuples(st.sampled_from(["undo", "all off", "run"]), st.none()),
        st.tuples(st.just("drop"), st.integers(0, 3)),
    ),
    min_size=3,
    max_size=9,
)


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_applying_and_undoing(name: str) -> None:
    model = MODELS[name]()
    before = Before(model)
    part = Part("part", "decoder", model, cached=not isinstance(model, Tower))
    tried: set[str] = set()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(actions=ACTIONS)
    @example([*(("apply", stage) for stage in STAGES), ("run", None), ("all off", None), ("run", None), ("drop", 0)])
    @example([*(("apply", stage) for stage in reversed(STAGES)), ("run", None), ("drop", 1), ("run", None)])
    def check(actions: list[tuple[str, Any]]) -> None:
        changes: list[Change] = []

        def off() -> None:
            for change in reversed(changes):
                change.off()

        for action, what in actions:
            if action == "apply" and what.applies(part) is None:
                tried.add(what.name)
                changes.append(what.prepare(part))
                changes[-1].on()
            elif action == "undo" and changes:
                changes.pop().off()
            elif action == "run":
                assert all(bool(tensor.isfinite().all()) for tensor in spoken(model))
            elif action in {"all off", "drop"}:
                off()
                before.assert_untouched()
                if action == "drop" and changes:  # as the check of the whole gives up one of several
                    changes.pop(what % len(changes))
                for change in changes:
                    change.on()
        off()
        before.assert_untouched()

    check()
    assert tried >= {stage.name for stage in STAGES if stage.applies(part) is None}


@pytest.mark.parametrize("stage", [CompileStage("default"), CompiledBlocksStage("default")], ids=lambda s: s.name)
def test_what_dynamo_has_traced_is_untouched_again(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, by way of torch.compile; its backend is the cheapest."""
    for module in (compile_stages, blocks):
        monkeypatch.setattr(module, "compile_function", inductor.compile_function)
    monkeypatch.setattr(inductor, "_inductor", lambda: lambda graph, _inputs, **_options: graph.forward)
    model = tower(False, True, nn.GRU)
    before = Before(model)
    change = stage.prepare(Part("part", "model", model))
    for _ in range(2):
        change.on()
        spoken(model)
        assert change.graphs > 0
        change.off()
        before.assert_untouched()
