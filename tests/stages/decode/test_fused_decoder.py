"""The kernel for one token through one block: the same as upstream's block, for every block that it knows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.kernels import decoder_block
from accelerate_tts.kernels.block_layout import block_layouts
from accelerate_tts.kernels.weight_formats import WeightFormat
from accelerate_tts.plan import Part
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.tuning.compare import TOLERANCES, compare

SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


def of(name: str, hidden: int = 32, inner: int = 56, heads: int = 4, kv_heads: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(
            n_embd=hidden,
            n_inner=inner,
            n_layer=2,
            n_head=heads,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=2,
            **options,
        )
        return larger(transformers.GPT2Model(config))
    config = getattr(transformers, f"{name}Config")(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        **SMALL, **options,
    )  # fmt: skip
    return larger(getattr(transformers, f"{name}Model")(config))


def larger(model: Any) -> Any:
    """Scale weights as in a trained model, whose blocks add about as much as they are given."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
            elif "bias" in name:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def loop(
    model: Any, count: int = 8, rows: int = 2, width: int = 32, mask: torch.Tensor | None = None, **asked: Any
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    past, states = None, []
    with torch.inference_mode():
        for number in range(count):
            x = torch.randn(rows, 1 if number else 6, width, generator=generator).to(next(model.parameters()).dtype)
            if mask is not None:
                asked["attention_mask"] = torch.cat([mask, torch.ones(rows, number, dtype=mask.dtype)], 1)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked)
            past = out.past_key_values
            states.append(out.last_hidden_state[:, -1:])
    return torch.cat(states, 1).float()


def fuse(model: Any, weights: WeightFormat = "fp32") -> Any:
    stage, part = FusedBlocksStage(weights), Part("model", "decoder", model)
    assert stage.applies(part) is None
    return stage.prepare(part)


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.double() - found.double()).norm() / expected.double().norm())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each block that the kernel computes."""
    calls: list[int] = []
    kernel = decoder_block.decoder_blocks()

    def counted(blocks: Any, tokens: Any, count: int, threads: int) -> None:
        calls.extend([1] * count)
        kernel(blocks, tokens, count, threads)

    monkeypatch.setattr(decoder_block, "decoder_blocks", lambda: counted)
    return calls


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: of("Llama"),
    "Llama with biases": lambda: of("Llama", attention_bias=True, mlp_bias=True),
    "Llama by eager attention": lambda: of("Llama", attn_implementation="eager"),
    "Mistral": lambda: of("Mistral", sliding_window=None),
    "Qwen2": lambda: of("Qwen2"),
    "GPT2": lambda: of("GPT2"),
    "Llama with GELU": lambda: of("Llama", hidden_act="gelu_pytorch_tanh"),
}
# Maximum error of the stored weights alone, in these models of random weights.
LIMITS: dict[WeightFormat, float] = {"fp32": 1e-5, "bf16": 2e-2, "int8": 4e-2}


@pytest.mark.parametrize("weights", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_every_known_block_computes_the_same(name: str, weights: WeightFormat, served: list[int]) -> None:
    model = MODELS[name]()
    classes = [type(module) for module in model.modules()]
    for rows in (1, 2, 3, 8):
        expected = loop(model, rows=rows)
        change = fuse(model, weights)
        change.on()
        found = loop(model, rows=rows)
        change.off()
        assert error(expected, found) < LIMITS[weights]
        assert (weights == "fp32") == (error(expected, found) < 1e-5), "stored weights are used, and only those"
        assert torch.equal(loop(model, rows=rows), expected)
    assert len(served) == 4 * 7 * 2
    assert [type(module) for module in model.modules()] == classes


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 12), inner=st.integers(1, 70),
    rows=st.integers(1, 8), threads=st.integers(1, 5), weights=st.sampled_from(["fp32", "bf16", "int8"]),
)  # fmt: skip
def test_the_kernel_at_any_shape(
    heads: int, group: int, half: int, inner: int, rows: int, threads: int, weights: WeightFormat
) -> None:
    width = heads * group * 2 * half
    model = of("Llama", width, inner, heads * group, heads, head_dim=2 * half)
    expected = loop(model, 5, rows, width)
    change = fuse(model, weights)
    change.on()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = loop(model, 5, rows, width)
    finally:
        torch.set_num_threads(before)
        change.off()
    assert error(expected, found) < 2 * LIMITS[weights]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_left_padding_is_not_seen(name: str, served: list[int]) -> None:
    model = of(name)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    expected = loop(model, mask=mask)
    fuse(model).on()
    assert error(expected, loop(model, mask=mask)) < 1e-5
    assert served


def higgs(**options: Any) -> Any:
    torch.manual_seed(0)
    if not hasattr(transformers, "HiggsAudioV2Config"):
        pytest.skip(f"transformers {transformers.__version__} has no Higgs Audio v2; 5.3 brought it")
    config = transformers.HiggsAudioV2Config(
        hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_codebooks=2,
        codebook_size=16, audio_token_id=40, audio_delay_token_id=41, **{**SMALL, "pad_token_id": 0}, **options,
    )  # fmt: skip
    return larger(transformers.HiggsAudioV2Model(config))


@pytest.mark.parametrize("of_audio", [[True, True], [False, False], [True, False]], ids=str)
def test_higgs_tokens_of_audio_of_text_and_of_both(of_audio: list[bool], served: list[int]) -> None:
    block = higgs()
    x, mask = torch.randn(2, 1, 32), torch.tensor(of_audio).unsqueeze(1)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            past = block(inputs_embeds=torch.ones(2, 4, 32), use_cache=True).past_key_values
            rotation = block.rotary_emb(x, torch.tensor([[4]]))
            hidden = x
            for layer in block.layers:
                hidden = layer(hidden, rotation, audio_token_mask=mask, past_key_values=past)
            return hidden

    expected = run()
    fuse(block).on()
    assert error(expected, run()) < 1e-5
    assert len(served) == (2 if len(set(of_audio)) == 1 else 0)


def test_a_model_in_bf16_is_right_to_its_rounding(served: list[int]) -> None:
    truth = loop(of("Llama"))
    model = of("Llama").to(torch.bfloat16)
    upstream = error(truth, loop(model))
    change = fuse(model)
    change.on()
    ours = error(truth, loop(model))
    assert served
    assert ours <= 1.2 * upstream
    change.off()
    assert FusedBlocksStage("bf16").applies(Part("model", "decoder", model)) is not None, "they are already"
    change = fuse(model, "int8")
    change.on()
    assert error(truth, loop(model)) < LIMITS["int8"] + upstream
    assert len(served) == 28


@pytest.mark.parametrize(("layers", "of_its_error"), [(4, 0.4), (28, 0.75)])
def test_a_model_in_bf16_is_rounded_where_upstream_rounds(layers: int, of_its_error: float, served: list[int]) -> None:
    """The two differ by less than either errs: what is left is the order of the sums, which blocks carry on."""
    torch.manual_seed(0)
    sizes = SMALL | {"num_hidden_layers": layers}
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, **sizes
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval().to(torch.bfloat16)
    truth = copy.deepcopy(model).double()
    expected, upstream = loop(truth, width=256), loop(model, width=256)
    fuse(model).on()
    ours = loop(model, width=256)
    assert served
    apart = compare([upstream.bfloat16()], [ours.bfloat16()])
    assert apart.error < of_its_error * error(expected, upstream)
    assert error(expected, ours) < 1.1 * error(expected, upstream)
    assert not TOLERANCES["exact"].objection(apart, depth=layers)


def test_written_weights_are_used_at_once() -> None:
    for weights, limit in LIMITS.items():
        model, other = of("Llama"), of("Llama")
        fuse(model, weights).on()
        loop(model)
        with torch.no_grad():
            for parameter in (*model.parameters(), *other.parameters()):
                parameter.mul_(0.8)
        assert error(loop(other), loop(model)) < limit
        state = {name: tensor * 1.2 for name, tensor in other.state_dict().items()}
        other.load_state_dict(state, assign=True)
        model.load_state_dict(state, assign=True)
        assert error(loop(other), loop(model)) < limit


def test_a_hook_inside_a_block_is_not_skipped(served: list[int], seen: list[Event]) -> None:
    model = of("Llama")
    fuse(model).on()
    heard: list[int] = []
    handle = model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    loop(model)
    assert len(heard) == 8
    assert len(served) == 7, "the block without a hook is served"
    assert any(isinstance(event, NotApplied) and "hooks" in event.reason for event in seen)
    handle.remove()
    loop(model)
    assert len(served) == 7 + 14


@pytest.mark.usefixtures("layered_caches")
def test_what_it_does_not_know_is_upstreams_business(served: list[int], seen: list[Event]) -> None:
    model = of("Llama")
    expected = loop(model, rows=9)
    fuse(model).on()
    assert torch.equal(loop(model, rows=9), expected), "more rows than it is made for"
    with torch.autocast("cpu", torch.bfloat16):
        loop(model)
    loop(model.train())
    model.eval()
    assert not served
    loop(model, made_up=torch.ones(1))
    assert not served
    assert any(isinstance(event, NotApplied) and "called with made_up" in event.reason for event in seen)


@pytest.mark.skipif(Version(transformers.__version__) < Version("4.51"), reason="4.51 brought Qwen 3")
def test_blocks_of_other_kinds_are_left_alone() -> None:
    class LlamaDecoderLayer(nn.Module):
        """A class of another library with the same name."""

    def refused(model: nn.Module) -> bool:
        return FusedBlocksStage().applies(Part("model", "decoder", model)) is not None

    assert refused(nn.Sequential(LlamaDecoderLayer()))
    assert refused(of("Llama", hidden_act="relu"))
    assert refused(of("Qwen3", head_dim=8))  # norms of queries and keys
    adapted = of("Llama")
    for layer in adapted.layers:
        layer.self_attn.q_proj = type("Adapter", (nn.Linear,), {"forward": lambda self, x: x})(32, 32)
    assert refused(adapted)
    crossed = of("GPT2", add_cross_attention=True)
    assert refused(crossed)
    parametrized = of("Llama")
    for layer in parametrized.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    assert refused(parametrized)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weights", LIMITS)
def test_what_is_not_finite_stays_so_and_in_its_row(value: float, weights: WeightFormat) -> None:
    model = of("Llama")
    change = fuse(model, weights)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            past = model(inputs_embeds=torch.ones(2, 4, 32), use_cache=True).past_key_values
            x = torch.ones(2, 1, 32)
            x[1, 0, 3] = value
            return model(inputs_embeds=x, past_key_values=past, use_cache=True).last_hidden_state

    expected = run()
    change.on()
    found = run()
    assert torch.equal(expected.isfinite().all(-1), found.isfinite().all(-1))
    assert found[0].isfinite().all()
    assert error(expected[0], found[0]) < LIMITS[weights]


def test_two_threads_have_their_own_scratch() -> None:
    model = of("Llama", 64, 128, 4, 2)
    fuse(model).on()
    alone = {rows: loop(model, 30, rows, 64) for rows in (1, 2, 3, 5)}
    found: dict[int, torch.Tensor] = {}

    def work(rows: int) -> None:
        found[rows] = loop(model, 30, rows, 64)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[rows], alone[rows]) for rows in alone)


def test_what_is_inside_fused_blocks_is_not_tried_again() -> None:
    model, part = of("Llama", 128, 256), None
    part = Part("model", "decoder", model)
    half = HalfStage(torch.bfloat16, carried=False)
    others = [half, SkinnyStage("fp32"), FewRowsStage(), QuantizeStage("onednn"), CompiledBlocksStage("default")]
    assert [stage.applies(part) for stage in others] == [None] * 5
    change = fuse(model)
    change.on()
    assert all(stage.applies(part) is not None for stage in others)
    change.off()
    assert [stage.applies(part) for stage in others] == [None] * 5


def test_copies_are_made_only_where_they_were_asked_for() -> None:
    names = {
        precision: [stage.name for stage in default_stages("cpu", "default", precision) if "decoder" in stage.name]
        for precision in ("exact", "balanced", "fast")
    }
    fp32, bf16, int8 = (f"fused decoder blocks ({weights})" for weights in LIMITS)
    assert names == {"exact": [fp32], "balanced": [bf16, fp32], "fast": [int8, bf16, fp32]}, "the fewest bytes first"
    assert [fp32] == [stage.name for stage in default_stages("cpu", None) if "fused" in stage.name]  # no compiler
    assert LIMITS["fp32"] < EXACT_TOLERANCE


# --- what the kernel must not be given -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_the_users_default_dtype_is_not_the_kernels(dtype: torch.dtype, weights: WeightFormat) -> None:
    """The kernel writes fp32, and would write past the end of a buffer of a narrower dtype."""
    model = of("Llama")
    change = fuse(model, weights)
    torch.set_default_dtype(dtype)
    try:
        expected = loop(model)
        change.on()
        found = loop(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert error(expected, found) < LIMITS[weights]


class Adapter(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 2.0


def test_an_adapter_that_is_put_in_later_is_used(seen: list[Event], served: list[Any]) -> None:
    model = of("Llama")
    fuse(model, "fp32").on()
    loop(model)
    assert served
    served.clear()
    for layer in model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    found = loop(model)
    assert not served
    fresh = of("Llama")
    for layer in fresh.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    assert error(loop(fresh), found) < 1e-5
    assert any("exchanged" in str(event) for event in seen)


def test_a_forward_that_was_put_over_a_layer_is_used(served: list[Any]) -> None:
    model = of("Llama")
    fuse(model, "fp32").on()
    for layer in model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x, plain=plain: plain(x) * 2.0
    found = loop(model)
    assert not served
    fresh = of("Llama")
    for layer in fresh.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x, plain=plain: plain(x) * 2.0
    assert error(loop(fresh), found) < 1e-5


class Wrapped(torch.Tensor):
    """A tensor without its own memory, like a quantised or sharded weight."""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer.mlp.up_proj, "weight", nn.Parameter(torch.randn(40, 32))),
        lambda layer: setattr(layer.self_attn.k_proj, "weight", nn.Parameter(torch.randn(8, 32))),
        lambda layer: setattr(layer.self_attn.o_proj, "weight", nn.Parameter(torch.randn(32, 16))),
        lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(31))),
        lambda layer: setattr(layer.mlp.down_proj, "bias", nn.Parameter(torch.ones(7))),
        lambda layer: setattr(layer.mlp.down_proj, "bias", nn.Parameter(torch.tensor([0.25]))),
        lambda layer: setattr(layer.self_attn.k_proj, "bias", nn.Parameter(torch.tensor(0.25))),
        lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.tensor([0.5]))),
        lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(32, device="meta"))),
        lambda layer: layer.self_attn.q_proj._parameters.update(
            weight=layer.self_attn.q_proj.weight.detach().as_subclass(Wrapped)
        ),
    ],
    ids=[
        "inner",
        "keys",
        "attended",
        "norm",
        "bias",
        "a bias of one number",
        "a bias without a dimension",
        "a norm of one number",
        "a norm elsewhere",
        "subclass",
    ],
)
def test_shapes_that_do_not_fit_together_are_upstreams(spoil: Callable[[Any], Any]) -> None:
    block = of("Llama").layers[0]
    assert block_layouts(block, "fp32")
    spoil(block)
    assert not block_layouts(block, "fp32")


@pytest.mark.usefixtures("layered_caches")
def test_a_block_without_its_rotation_is_upstreams(served: list[Any]) -> None:
    model = of("Llama")
    fuse(model, "fp32").on()
    with torch.inference_mode():
        past = model(inputs_embeds=torch.ones(1, 4, 32), use_cache=True).past_key_values
        with pytest.raises(TypeError):
            model.layers[0](torch.ones(1, 1, 32), past_key_values=past, position_embeddings=None)
    assert not served


@pytest.mark.parametrize("spoil", ["bias", "norm"])
def test_what_is_put_in_later_and_can_be_broadcast_is_upstreams(spoil: str, served: list[Any]) -> None:
    """torch adds and multiplies whatever can be broadcast; the kernel would read past its end."""

    def altered(model: Any) -> Any:
        for block in model.layers:
            if spoil == "bias":
                block.mlp.down_proj.bias = nn.Parameter(torch.tensor([0.25]))
            else:
                block.input_layernorm.weight = nn.Parameter(torch.tensor([0.5]))
        return model

    model = of("Llama")
    fuse(model).on()
    loop(model)
    count = len(served)
    assert error(loop(altered(of("Llama"))), loop(altered(model))) < 1e-5
    assert len(served) == count


@pytest.mark.parametrize("wrong", ["rows", "room", "values", "dtype", "device", "stride"])
def test_a_cache_of_another_shape_is_not_written(wrong: str) -> None:
    keys, values = torch.zeros(2, 3, 8, 16), torch.zeros(2, 3, 8, 16)
    assert decoder_block.holds(keys, values, 2, 7)
    rows, length = (3, 7) if wrong == "rows" else (2, 8) if wrong == "room" else (2, 7)
    values = {
        "values": values[:, :, :7], "dtype": values.bfloat16(), "device": values.to("meta"),
        "stride": values.transpose(2, 3).contiguous().transpose(2, 3),
    }.get(wrong, values)  # fmt: skip
    assert not decoder_block.holds(keys, values, rows, length)


def test_more_rows_than_the_cache_has_are_upstreams_own_error(served: list[Any]) -> None:
    model = of("Llama")
    fuse(model).on()
    with torch.inference_mode():
        past = model(inputs_embeds=torch.randn(2, 4, 32), use_cache=True).past_key_values
        with pytest.raises(RuntimeError):
            model(inputs_embeds=torch.randn(3, 1, 32), past_key_values=past, use_cache=True)
    assert not served


@pytest.mark.parametrize(
    ("rotated", "mask"),
    [
        ((torch.ones(1, 1, 8), torch.ones(1, 1, 7)), None), ((torch.ones(3, 1, 8),) * 2, None),
        ((torch.ones(1, 2, 8),) * 2, None), ((torch.ones(1, 1, 8, device="meta"),) * 2, None),
        (None, torch.ones(2, 1, 1, 4)), (None, torch.ones(3, 1, 1, 5)), (None, torch.ones(2, 2, 1, 5)),
        (None, torch.ones(2, 1, 1, 5, device="meta")), (None, torch.ones(2, 5)),
    ],
)  # fmt: skip
def test_rotations_and_masks_of_another_shape_are_upstreams(rotated: Any, mask: Any) -> None:
    good = torch.ones(1, 1, 8), torch.ones(2, 1, 1, 5)
    assert decoder_block.shared((good[0], good[0]), good[1], 2, 8, 5) is not None
    assert decoder_block.shared(rotated, mask, 2, 8, 5) is None


def test_a_forward_that_somebody_keeps_is_upstreams_once_it_is_undone(served: list[int]) -> None:
    """accelerate's hooks call the forward that a block had when they were added."""
    model = of("Llama")
    expected = loop(model)
    change = fuse(model, "int8")
    change.on()
    for block in model.layers:
        block.forward = partial(lambda kept, *args, **kwargs: kept(*args, **kwargs), block.forward)
    assert error(expected, loop(model)) < LIMITS["int8"]
    assert served
    change.off()
    served.clear()
    assert torch.equal(loop(model), expected)
    assert not served


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_what_is_written_past_torch_is_seen_after_some_tokens(weights: WeightFormat, turned: bool) -> None:
    """Each check compares one piece of each weight, and the order in memory of all."""
    model = of("Llama")
    fused = copy.deepcopy(model)
    fuse(fused, weights).on()
    loop(fused)
    for each in (model, fused):
        weight = each.layers[1].self_attn.o_proj.weight
        if turned:
            weight.data = weight.data.t()  # at the same address
        else:
            weight.data[3] += 20.0
    for _ in range(1 if turned else 4):
        found = loop(fused)
    assert error(loop(model), found) < LIMITS[weights]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_row_that_sees_nothing_is_upstreams_too(name: str, served: list[int]) -> None:
    """An empty text in a batch: its row of the mask is zeros to the end."""
    model = of(name)
    fused = copy.deepcopy(model)
    fuse(fused).on()
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0] = 0

    def last(of_model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        past, seen = None, mask
        with torch.inference_mode():
            for number in range(3):
                x = torch.randn(2, 1 if number else 6, 32, generator=generator)
                out = of_model(inputs_embeds=x, past_key_values=past, use_cache=True, attention_mask=seen)
                past, seen = out.past_key_values, torch.cat([seen, seen[:, -1:]], 1)
        return out.last_hidden_state  # type: ignore[no-any-return]

    assert error(last(model), last(fused)) < 1e-5
    assert served


def test_inputs_of_the_other_sign_in_memory() -> None:
    plain = of("Llama")
    model = copy.deepcopy(plain)
    FusedBlocksStage("fp32").prepare(Part("model", "decoder", model)).on()

    def last(module: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        with torch.inference_mode():
            past = module(inputs_embeds=torch.randn(1, 5, 32, generator=generator), use_cache=True).past_key_values
            for _ in range(2):
                x = torch._neg_view(torch.randn(1, 1, 32, generator=generator))
                cos, sin = (torch._neg_view(torch.randn(1, 1, 8, generator=generator)) for _ in range(2))
                for block in module.layers:
                    x = block(x, position_embeddings=(cos, sin), past_key_values=past, use_cache=True)
                    x = torch._neg_view(-(x[0] if isinstance(x, tuple) else x))
        return x

    assert torch.allclose(last(model), last(plain), atol=1e-4)


@pytest.mark.parametrize("kind", ["bf16", "with gaps"])
def test_a_norm_that_the_kernel_copies_is_watched(kind: str, served: list[int]) -> None:
    """In fp32 the kernel reads weights where they are, except those that do not lie there as it needs them."""

    def altered(model: Any) -> Any:
        for block in model.layers:
            weight = block.input_layernorm.weight.detach()
            weight = weight.bfloat16() if kind == "bf16" else torch.stack([weight] * 2, 1)[:, 1]
            block.input_layernorm.weight = nn.Parameter(weight)
        return model

    model, fused = altered(of("Llama")), altered(of("Llama"))
    fuse(fused).on()
    assert error(loop(model), loop(fused)) < 1e-5
    assert served
    for each in (model, fused):
        each.layers[1].input_layernorm.weight.data.mul_(-2.0)  # counts no version
    assert error(loop(model), loop(fused)) < 1e-5


def test_a_norm_of_another_kind_is_not_known() -> None:
    model = of("Llama")
    model.layers[1].input_layernorm = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(32)  # 1 + weight
    assert not block_layouts(model.layers[1], "fp32")
    model.layers[0].self_attn.scaling = torch.full((4, 1, 1), 0.3)
    assert not block_layouts(model.layers[0], "fp32")


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bool", "double", "too long"])
def test_a_mask_of_the_users_own_is_what_upstream_makes_of_it(kind: str, how: str) -> None:
    """Eager attention adds bools as ones. torch's own refuses float64. Both refuse a mask longer than the cache."""
    model = of("Llama", attn_implementation=how)
    fused = copy.deepcopy(model)
    fuse(fused).on()

    def run(of_model: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        with torch.inference_mode():
            x = torch.randn(2, 7, 32, generator=generator)
            past = of_model(inputs_embeds=x[:, :6], use_cache=True).past_key_values
            mask = torch.zeros(2, 1, 1, 7 + 3 * (kind == "too long"))
            mask[..., 2] = -50.0
            mask = mask == 0 if kind == "bool" else mask.double() if kind == "double" else mask
            try:
                return of_model(inputs_embeds=x[:, 6:], past_key_values=past, attention_mask=mask).last_hidden_state
            except (RuntimeError, ValueError) as raised:
                return str(raised)

    expected, found = run(model), run(fused)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert error(expected, found) < 1e-5
