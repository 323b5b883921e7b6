"""The kernels for a whole sequence through a block without a cache: what upstream's own block computes, in bf16."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from chatterbox.models.s3gen.decoder import CausalResnetBlock1D, ConditionalDecoder
from chatterbox.models.s3gen.matcha.transformer import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.lora import LoRALinearLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.kernels import residual_block, transformer_block
from accelerate_tts.kernels.packed import Kernel
from accelerate_tts.kernels.residual_block import RESIDUAL
from accelerate_tts.kernels.transformer_block import TRANSFORMER
from accelerate_tts.patching.class_swap import is_fused
from accelerate_tts.plan import Part
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.layers import fused_sequence
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.fused_sequence import KERNELS, FusedSequenceStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeStage

LIMIT = 1e-2
"""Maximum relative error of what a block adds to its input. bf16 rounds at 4e-3; softmax and the products average."""
HIDDEN = -1.0e10
"""Value that upstream adds for a masked key."""


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AMX the kernel computes the same in plain loops, and is slow; it is only the stage that asks."""
    monkeypatch.setattr(fused_sequence, "has_matrix_unit", lambda: True)
    monkeypatch.setattr(fused_sequence, "multiplies_in_bf16", lambda: True)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each call that a kernel serves."""
    calls: list[str] = []
    for module, name in ((transformer_block, "transformer_block"), (residual_block, "residual_block")):
        monkeypatch.setattr(module, name, partial(counted, calls, name, getattr(module, name)()))
    return calls


def counted(calls: list[str], name: str, kernel: Any) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        calls.append(name)
        kernel(*arguments)

    return run


def block_of(hidden: int = 128, heads: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    block = BasicTransformerBlock(hidden, heads, 64, activation_fn="gelu", **options)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(2.0)  # scores of a trained size, which softmax tells apart
    return block.eval()


def given_to(block: Any, batch: int = 2, length: int = 70, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, block.norm1.weight.shape[0], generator=torch.Generator().manual_seed(seed))


def fuse(module: nn.Module, kernel: Kernel = TRANSFORMER) -> Any:
    stage, part = FusedSequenceStage(kernel), Part("estimator", "estimator", module)
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


@torch.inference_mode()
def run(block: Any, x: torch.Tensor, mask: torch.Tensor | None = None, **told: Any) -> torch.Tensor:
    result: torch.Tensor = block(hidden_states=x, attention_mask=mask, **told)
    return result


def error(expected: torch.Tensor, found: torch.Tensor, x: torch.Tensor) -> float:
    return float((expected - found).norm() / (expected - x).norm())


# --- the same --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.one_of(st.integers(1, 70), st.integers(250, 330), st.integers(505, 520)),
    heads=st.integers(1, 3),
    hidden=st.sampled_from([64, 128, 192]),
    hide=st.one_of(st.none(), st.integers(0, 40)),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_length_any_shape(
    batch: int, length: int, heads: int, hidden: int, hide: int | None, bias: bool, threads: int
) -> None:
    block = block_of(hidden, heads, attention_bias=bias)
    x, mask = given_to(block, batch, length), None
    if hide is not None:
        mask = torch.zeros(batch, 1, length)
        mask[-1, :, max(1, length - hide) :] = HIDDEN
    expected = run(block, x, mask)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fuse(block)
        found = run(block, x, mask)
    finally:
        torch.set_num_threads(before)
    assert error(expected, found, x) < LIMIT


def test_hidden_keys_are_not_seen(served: list[str]) -> None:
    block = block_of()
    fuse(block)
    x, mask = given_to(block, 2, 300), torch.zeros(2, 1, 300)
    mask[:, :, 260:] = HIDDEN
    other = x.clone()
    other[:, 260:] = 50.0 * torch.randn(2, 40, 128)
    assert torch.equal(run(block, x, mask)[:, :260], run(block, other, mask)[:, :260])
    mask[:, :, 260:] = -float("inf")
    assert torch.equal(run(block, x, mask)[:, :260], run(block, other, mask)[:, :260])
    assert served == ["transformer_block"] * 4


def test_one_call_after_another_leaves_nothing_behind() -> None:
    """Buffers are kept between calls: a short sequence must not see the long one before it."""
    block = block_of()
    fuse(block)
    short, long = given_to(block, 1, 33), given_to(block, 3, 400) * torch.tensor(float("nan"))
    before = run(block, short)
    assert run(block, long).isnan().all()
    assert torch.equal(run(block, short), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    block = block_of()
    x = given_to(block, 2, 80)
    x[1, 7, 3] = value
    expected = run(block, x)
    fuse(block)
    found = run(block, x)
    assert torch.equal(expected.isfinite().all(-1), found.isfinite().all(-1))
    assert found[0].isfinite().all()


def test_threads_have_their_own_buffers() -> None:
    block = block_of()
    fuse(block)
    alone = {length: run(block, given_to(block, 2, length)) for length in (10, 65, 200, 300)}
    found: dict[int, list[torch.Tensor]] = {length: [] for length in alone}

    def work(length: int) -> None:
        found[length].extend(run(block, given_to(block, 2, length)) for _ in range(20))

    threads = [threading.Thread(target=work, args=(length,)) for length in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, alone[length]) for length, results in found.items() for result in results)


@pytest.mark.parametrize("write", ["in place", "assign"])
def test_written_weights_are_used_at_once(write: str, served: list[str]) -> None:
    block, x = block_of(), given_to(block_of())
    fuse(block)
    run(block, x)
    other = {name: tensor * 1.1 for name, tensor in block.state_dict().items()}
    block.load_state_dict(other, assign=write == "assign")
    found = run(block, x)
    fresh = block_of()
    fresh.load_state_dict(other)
    assert error(run(fresh, x), found, x) < LIMIT
    assert len(served) == 2


def test_undone_copied_and_pickled_it_is_upstreams_own() -> None:
    block = block_of()
    x, state = given_to(block), {name: tensor.clone() for name, tensor in block.state_dict().items()}
    expected, attributes = run(block, x), dict(vars(block))
    change = fuse(block)
    assert isinstance(block, BasicTransformerBlock)
    assert not torch.equal(run(block, x), expected)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is BasicTransformerBlock
        assert torch.equal(run(twin, x), expected)
    change.off()
    assert type(block) is BasicTransformerBlock
    assert vars(block) == attributes
    assert block.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
    assert torch.equal(run(block, x), expected)


# --- upstream's business ---------------------------------------------------------------------------------------------


def hook(block: Any) -> None:
    block.attn1.to_q.register_forward_hook(lambda _module, _args, output: output * 2.0)


def processor(block: Any) -> None:
    block.attn1.set_processor(AttnProcessor())


def adapter(block: Any) -> None:
    block.ff.net[2].lora_layer = LoRALinearLayer(512, 128)
    nn.init.normal_(block.ff.net[2].lora_layer.up.weight)


def exchanged(block: Any) -> None:
    block.norm3 = nn.LayerNorm(128, elementwise_affine=False)


def one_number(block: Any) -> None:
    """A bias that torch broadcasts, and that the kernel would read past."""
    block.ff.net[2].bias = nn.Parameter(torch.tensor([0.25]))


@pytest.mark.parametrize("alter", [hook, processor, adapter, exchanged, one_number])
def test_what_comes_into_a_block_later_is_used(
    alter: Callable[[Any], None], served: list[str], seen: list[Event]
) -> None:
    torch.manual_seed(3)
    block, fresh = block_of(), block_of()
    x = given_to(block)
    fuse(block)
    run(block, x)
    assert len(served) == 1
    for each in (block, fresh):
        torch.manual_seed(4)
        alter(each)
    assert torch.equal(run(block, x), run(fresh, x))
    assert len(served) == 1
    assert [event for event in seen if isinstance(event, NotApplied)]


def chunked(x: torch.Tensor) -> dict[str, Any]:
    """Mask of upstream's streaming models: each row sees its own keys."""
    return {"attention_mask": torch.full((x.shape[0], x.shape[1], x.shape[1]), HIDDEN).triu(1)}


@pytest.mark.parametrize(
    "told",
    [
        chunked,
        lambda x: {"attention_mask": torch.zeros(x.shape[0], 1, x.shape[1]), "class_labels": torch.zeros(2)},
        lambda _x: {"cross_attention_kwargs": {}},
    ],
)
def test_a_call_of_another_kind_is_upstreams(told: Callable[[Any], dict[str, Any]], served: list[str]) -> None:
    block = block_of()
    x = given_to(block)
    asked = told(x)
    with torch.inference_mode():
        expected = block(x, **asked)
        fuse(block)
        assert torch.equal(block(x, **asked), expected)
    assert not served


def test_gradients_training_and_other_dtypes_are_upstreams(served: list[str]) -> None:
    block = block_of()
    fuse(block)
    x = given_to(block).requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        block.train()(x)
        block.eval()
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        with pytest.raises(RuntimeError):  # torch's own error
            block(x.double())
        block(x[:, :0])
        assert not served
        block(x)
    assert len(served) == 1


def test_blocks_of_other_kinds_are_left_alone() -> None:
    def refused(block: nn.Module) -> bool:
        return FusedSequenceStage(TRANSFORMER).applies(Part("estimator", "estimator", block)) is not None

    class Another(BasicTransformerBlock):
        pass

    assert not refused(block_of())
    assert refused(nn.TransformerEncoderLayer(128, 2))
    assert refused(Another(128, 2, 64, activation_fn="gelu"))
    assert refused(BasicTransformerBlock(128, 4, 32, activation_fn="gelu"))
    assert refused(BasicTransformerBlock(96, 2, 64, activation_fn="gelu"))
    assert refused(BasicTransformerBlock(128, 2, 64, activation_fn="gelu-approximate"))
    assert refused(BasicTransformerBlock(128, 2, 64, activation_fn="geglu"))
    assert refused(BasicTransformerBlock(128, 2, 64, activation_fn="snakebeta"))
    assert refused(BasicTransformerBlock(128, 2, 64, activation_fn="gelu", cross_attention_dim=64))
    assert refused(
        BasicTransformerBlock(128, 2, 64, activation_fn="gelu", num_embeds_ada_norm=10, norm_type="ada_norm")
    )
    assert refused(block_of().to(torch.bfloat16))
    chunks = block_of()
    chunks.set_chunk_feed_forward(4, 1)
    assert refused(chunks)
    parametrized = block_of()
    nn.utils.parametrizations.weight_norm(parametrized.attn1.to_q)
    assert refused(parametrized)


# --- residual blocks -------------------------------------------------------------------------------------------------


def residual_of(channels: int = 128, outputs: int = 64) -> Any:
    torch.manual_seed(0)
    block = CausalResnetBlock1D(channels, outputs, 96)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return block.eval()


def frames_of(
    block: Any, batch: int = 2, length: int = 70, hide: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, block.res_conv.in_channels, length, generator=generator)
    mask = torch.ones(batch, 1, length)
    mask[-1, :, length - hide :] = 0.0
    return x, mask, torch.randn(batch, 96, generator=generator)


@torch.inference_mode()
def resolve(block: Any, x: torch.Tensor, mask: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = block(x, mask, time)
    return result


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.one_of(st.integers(1, 70), st.integers(250, 330)),
    channels=st.sampled_from([64, 128, 320]),
    outputs=st.sampled_from([64, 128]),
    hide=st.integers(0, 40),
    threads=st.integers(1, 3),
)
def test_residual_blocks_of_any_length(
    batch: int, length: int, channels: int, outputs: int, hide: int, threads: int
) -> None:
    block = residual_of(channels, outputs)
    given_frames = frames_of(block, batch, length, min(hide, length - 1))
    expected = resolve(block, *given_frames)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fuse(block, RESIDUAL)
        found = resolve(block, *given_frames)
    finally:
        torch.set_num_threads(before)
    assert found.shape == expected.shape
    assert float((expected - found).norm() / expected.norm()) < LIMIT


def test_a_frame_sees_only_those_before_it(served: list[str]) -> None:
    block = residual_of()
    fuse(block, RESIDUAL)
    x, mask, time = frames_of(block, 2, 150)
    other = x.clone()
    other[:, :, 100:] = 7.0
    assert torch.equal(resolve(block, x, mask, time)[:, :, :100], resolve(block, other, mask, time)[:, :, :100])
    assert served == ["residual_block"] * 2
    nan = torch.full_like(frames_of(block, 3, 300)[0], float("nan"))
    before = resolve(block, x, mask, time)
    assert resolve(block, nan, torch.ones(3, 1, 300), torch.randn(3, 96)).isnan().all()
    assert torch.equal(resolve(block, x, mask, time), before), "nothing of the last call is left in the buffers"


def test_what_a_residual_block_is_given_else_is_upstreams(served: list[str], seen: list[Event]) -> None:
    block, fresh = residual_of(), residual_of()
    fuse(block, RESIDUAL)
    x, mask, time = frames_of(block)
    assert torch.equal(resolve(block, x, mask[:, :, :1], time), resolve(fresh, x, mask[:, :, :1], time))
    assert torch.equal(resolve(block, x, mask[:1], time), resolve(fresh, x, mask[:1], time))
    with pytest.raises(RuntimeError, match="channels"):  # torch's own error
        resolve(block, x[:, :50], mask, time)
    assert torch.equal(
        resolve(block.double(), *frames_in(torch.float64)), resolve(fresh.double(), *frames_in(torch.float64))
    )
    assert not served
    block.float(), fresh.float()
    for each in (block, fresh):
        each.mlp.register_forward_hook(lambda _module, _args, output: output + 1.0)
    assert torch.equal(resolve(block, x, mask, time), resolve(fresh, x, mask, time))
    assert not served
    assert [event for event in seen if isinstance(event, NotApplied)]


def frames_in(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in frames_of(residual_of()))


def test_residual_blocks_of_other_kinds_are_left_alone() -> None:
    def refused(block: nn.Module) -> bool:
        return FusedSequenceStage(RESIDUAL).applies(Part("estimator", "estimator", block)) is not None

    assert not refused(residual_of())
    assert refused(residual_of(128, 96))
    assert refused(residual_of(100, 64))
    for alter in (wider, dilated, grouped, silu, doubled):
        block = residual_of(64, 64)
        assert not refused(block)
        alter(block)
        assert refused(block), alter


def wider(block: Any) -> None:
    block.block1.block[0] = type(block.block1.block[0])(64, 64, 5)


def dilated(block: Any) -> None:
    block.block2.block[0] = type(block.block1.block[0])(64, 64, 3, dilation=2)


def grouped(block: Any) -> None:
    block.block1.block[0] = type(block.block1.block[0])(64, 64, 3, groups=2)


def silu(block: Any) -> None:
    block.block2.block[4] = nn.SiLU()


def doubled(block: Any) -> None:
    block.double()


def test_a_residual_block_undone_is_upstreams_own() -> None:
    block = residual_of()
    given_frames = frames_of(block)
    expected = resolve(block, *given_frames)
    change = fuse(block, RESIDUAL)
    assert not torch.equal(resolve(block, *given_frames), expected)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is CausalResnetBlock1D
        assert torch.equal(resolve(twin, *given_frames), expected)
    with torch.no_grad():
        block.res_conv.weight.mul_(3.0)
    written = resolve(block, *given_frames)
    change.off()
    assert float((resolve(block, *given_frames) - written).norm() / written.norm()) < LIMIT
    assert type(block) is CausalResnetBlock1D


# --- the stages ------------------------------------------------------------------------------------------------------


def test_it_is_tried_where_it_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {FusedSequenceStage(kernel).name for kernel in KERNELS}
    for device, precision, there in (
        ("cpu", "exact", False), ("cpu", "balanced", True), ("cpu", "fast", True), ("cuda", "fast", False),
    ):  # fmt: skip
        tried = {stage.name for stage in default_stages(device, "default", precision)}  # type: ignore[arg-type]
        assert tried & names == (names if there else set()), (device, precision)
    part = Part("estimator", "estimator", block_of())
    monkeypatch.setattr(fused_sequence, "has_matrix_unit", lambda: False)
    assert FusedSequenceStage(TRANSFORMER).applies(part) == "this processor has no AMX"
    monkeypatch.setattr(fused_sequence, "has_matrix_unit", lambda: True)
    monkeypatch.setattr(fused_sequence, "multiplies_in_bf16", lambda: False)
    with pytest.raises(RuntimeError, match="ACCELERATE_TTS_KERNELS"):
        FusedSequenceStage(TRANSFORMER).prepare(part)


# --- in an estimator -------------------------------------------------------------------------------------------------


class Estimator:
    """Chatterbox's own, small: its blocks, and the convolutions between them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = ConditionalDecoder(
            in_channels=320, channels=[128], n_blocks=2, num_mid_blocks=2, num_heads=2, attention_head_dim=64
        ).eval()
        self.part = Part("estimator", "estimator", self.module, method="forward")

    @torch.inference_mode()
    def step(self, frames: int = 90) -> torch.Tensor:
        generator = torch.Generator().manual_seed(frames)
        x, mu, condition = (torch.randn(2, 80, frames, generator=generator) for _ in range(3))
        mask = torch.ones(2, 1, frames)
        result: torch.Tensor = self.module.forward(
            x, mask, mu, torch.full((2,), 0.3), torch.randn(2, 80, generator=generator), condition
        )
        return result


@pytest.fixture
def estimator() -> Estimator:
    return Estimator()


def test_the_estimators_blocks_and_what_is_around_them(estimator: Estimator, served: list[str]) -> None:
    expected, plain = estimator.step(), [type(module) for module in estimator.module.modules()]
    changes = [fuse(estimator.module, kernel) for kernel in KERNELS]
    found = estimator.step()
    assert (served.count("transformer_block"), served.count("residual_block")) == (8, 4)
    assert float((expected - found).norm() / expected.norm()) < 2 * LIMIT
    fused = {block for block in estimator.module.modules() if is_fused(block)}
    inside = {inner: type(inner) for block in fused for inner in block.modules() if inner is not block}
    for carried in (False, True):
        half = HalfStage(torch.bfloat16, carried=carried)
        assert half.applies(estimator.part) is None
        change = half.prepare(estimator.part)
        served.clear()
        change.on()
        assert all(type(module) is cls for module, cls in inside.items())
        both = estimator.step()
        assert len(served) == 12, "what is carried in half precision is cast up for a block"
        assert both.dtype == torch.float32
        assert 1e-4 < float((found - both).norm() / found.norm()) < 2 * LIMIT
        change.off()
        assert torch.equal(estimator.step(), found)
    for change in reversed(changes):
        change.off()
    assert [type(module) for module in estimator.module.modules()] == plain
    assert torch.equal(estimator.step(), expected)


def test_the_little_that_is_left_is_not_tried() -> None:
    """A trial takes seconds, and a twentieth of the work would gain nothing."""
    module = nn.ModuleList(block_of(192, 3) for _ in range(8))
    module.append(nn.Linear(192, 128))
    part, plain = Part("blocks", "estimator", module), nn.ModuleList([module[-1]])
    others = [
        HalfStage(torch.bfloat16, carried=False),
        HalfStage(torch.bfloat16, carried=True),
        QuantizeStage("onednn"),
    ]
    assert [stage.applies(part) for stage in others] == [None] * 3
    fuse(module)
    assert [stage.applies(part) for stage in others] == ["next to nothing is left beside its fused blocks"] * 3
    assert [stage.applies(Part("layer", "estimator", plain)) for stage in others] == [None] * 3


def test_what_is_inside_is_not_tried_again() -> None:
    module = nn.ModuleList(block_of() for _ in range(2))
    others = [HalfStage(torch.bfloat16, carried=False), FewRowsStage(), QuantizeStage("onednn"),
              CompiledBlocksStage("default")]  # fmt: skip
    part = Part("blocks", "estimator", module, few_rows=1.0)
    assert [stage.applies(part) for stage in others] == [None] * 4
    change = fuse(module)
    assert None not in [stage.applies(part) for stage in others]
    change.off()
    assert [stage.applies(part) for stage in others] == [None] * 4


@pytest.mark.parametrize("place", ["first", "beside", "norm"])
def test_a_residual_blocks_bias_of_another_shape_is_upstreams(place: str) -> None:
    block = residual_of()
    assert RESIDUAL.parts_of(block) is not None
    parts = RESIDUAL.parts_of(block)
    layer = {"first": parts.first, "beside": parts.beside, "norm": parts.norm1}[place]
    layer.bias = nn.Parameter(torch.tensor([0.25]))
    assert RESIDUAL.parts_of(block) is None
