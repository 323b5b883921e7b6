"""One token of a block by the kernels, against upstream's own block."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts.kernels.block_layout import triton_layouts
from accelerate_tts.kernels.triton import token_block
from accelerate_tts.kernels.triton.token_block import Token, copied, run

CAPACITY = 128


def llama(hidden: int = 20, inner: int = 28, heads: int = 4, kv_heads: int = 2, size: int = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=size, pad_token_id=None, **options,
    )  # fmt: skip
    return loud(transformers.LlamaModel(config))


def gpt2(hidden: int = 20, heads: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=hidden, n_layer=1, n_head=heads, vocab_size=5, n_inner=36)
    return loud(transformers.GPT2Model(config))


def loud(model: Any) -> Any:
    """With numbers everywhere, also in norms and biases, so that what is left out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            at_one = "norm" in name or "ln_" in name
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(at_one))
    return model.eval()


def block_of(model: Any) -> Any:
    return model.layers[0] if hasattr(model, "layers") else model.h[0]


class Case:
    """One token behind a sequence, in buffers whose other places hold no numbers."""

    def __init__(self, model: Any, rows: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model, self.block, self.length = model, block_of(model), length
        layout = triton_layouts(self.block, "fp32")[True]
        shape = (rows, layout.kv_heads, CAPACITY, layout.head_dim)
        self.keys, self.values = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
        for buffer in (self.keys, self.values):
            buffer[:, :, :length] = torch.randn((*shape[:2], length, shape[3]), generator=generator).to(dtype)
        self.hidden = torch.randn(rows, 1, layout.norm1.weight.shape[0], generator=generator).to(dtype)
        hidden = torch.rand(rows, 1, 1, CAPACITY, generator=generator) < 0.3
        hidden[..., length] = False
        self.mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        position = torch.full((1, 1), length)
        self.rotation = model.rotary_emb(self.hidden, position) if hasattr(model, "rotary_emb") else None

    def token(self) -> Token:
        position = torch.tensor([self.length])
        return Token(self.hidden, self.rotation, self.mask, position, self.keys, self.values)

    def upstream(self, block: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The block's result in fp32, and the keys and values behind it."""
        past = transformers.DynamicCache()
        before = [buffer[:, :, : self.length].float() for buffer in (self.keys, self.values)]
        past.update(*before, 0)
        rotation = None if self.rotation is None else tuple(each.float() for each in self.rotation)
        given = {} if rotation is None else {"position_embeddings": rotation}
        mask = self.mask[..., : self.length + 1].float()
        block = copy.deepcopy(self.block).float() if block is None else block
        with torch.no_grad():
            found = block(self.hidden.float(), attention_mask=mask, past_key_values=past, use_cache=True, **given)
        return found if isinstance(found, torch.Tensor) else found[0], past.layers[0].keys, past.layers[0].values

    def check(self, weights: Any = "fp32", block: Any = None, tolerance: float = 2e-5) -> None:
        expected, keys, values = self.upstream(block)
        layout = triton_layouts(self.block, weights)[True]
        token = self.token()
        assert token.fits(layout)
        with torch.no_grad():
            found = run(layout, copied(layout, weights), token)
        assert found.dtype == self.hidden.dtype
        assert torch.allclose(found.float(), expected, atol=tolerance, rtol=tolerance)
        for buffer, wanted in ((self.keys, keys), (self.values, values)):
            assert torch.allclose(buffer[:, :, : self.length + 1].float(), wanted, atol=tolerance, rtol=tolerance)
            assert buffer[:, :, self.length + 1 :].isnan().all()


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "each head its own keys": lambda: llama(heads=2, kv_heads=2, size=8),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "GELU": lambda: llama(hidden_act="gelu_pytorch_tanh"),
    "GPT-2": gpt2,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_token_is_upstreams(name: str) -> None:
    Case(MODELS[name](), rows=2, length=40).check()


@pytest.mark.parametrize("rows", range(1, 9))
def test_any_number_of_rows(rows: int) -> None:
    Case(llama(), rows, 5).check()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, CAPACITY - 1])
def test_any_length_is_attended_to_the_last_position_and_no_further(length: int) -> None:
    """Behind it lies what is no number, and would spread."""
    Case(llama(), 1, length).check()


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([1, 2, 17]), st.integers(1, 9), st.sampled_from([(1, 1), (4, 2), (5, 1)]),
    st.sampled_from([2, 6, 18]), st.integers(1, 3), st.integers(1, CAPACITY - 1),
)  # fmt: skip
def test_any_size(hidden: int, inner: int, heads: tuple[int, int], size: int, rows: int, length: int) -> None:
    Case(llama(hidden * heads[0], inner, *heads, size), rows, length, seed=length).check(tolerance=1e-4)


def test_matrices_that_are_wider_than_a_tile() -> None:
    Case(llama(hidden=1100, inner=12, heads=1, kv_heads=1, size=8), 1, 3).check(tolerance=1e-4)


@pytest.mark.parametrize("name", ["Llama", "biases", "GPT-2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_a_model_in_half_precision_is_rounded_at_its_end_and_in_its_cache(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    Case(MODELS[name]().to(dtype), 2, 20, dtype).check(tolerance=tolerance)


@pytest.mark.parametrize("name", ["Llama", "biases", "GPT-2"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_copies_of_weights_in_fewer_bytes(name: str, weights: Any) -> None:
    case = Case(MODELS[name](), 3, 20)
    rounded = copy.deepcopy(case.block)
    layout = triton_layouts(rounded, weights)[True]
    with torch.no_grad():
        for layer, (weight, scale) in copied(layout, weights).items():
            plain = weight.float() if scale is None else weight.float() * scale[:, None]
            owner: Any = layer
            owner.weight.copy_(plain.t() if layer.weight.shape != plain.shape or name == "GPT-2" else plain)
    case.check(weights, rounded)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_five_launches_a_block_and_none_depends_on_the_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, launch = MODELS[name](), token_block.launch
    seen: list[Any] = []

    def noted(kernel: Any, programs: tuple[int, ...], *given: Any, **sizes: Any) -> None:
        numbers = [tuple(each.shape) if isinstance(each, torch.Tensor) else each for each in given]
        seen.append((kernel.__name__, programs, numbers, sizes))
        launch(kernel, programs, *given, **sizes)

    monkeypatch.setattr(token_block, "launch", noted)
    for length in (1, 70, CAPACITY - 1):
        Case(model, 2, length).check()
    assert len(seen) == 3 * 5
    assert seen[:5] == seen[5:10] == seen[10:]


def test_what_the_kernels_would_read_wrongly_does_not_fit() -> None:
    case = Case(llama(), 2, 5)
    layout, token = triton_layouts(case.block, "fp32")[True], case.token()
    assert token.rotation is not None
    wrong = [
        token._replace(hidden=token.hidden[..., :-1]),
        token._replace(hidden=token.hidden.expand(-1, 2, -1)),
        token._replace(hidden=token.hidden[:1]),
        token._replace(keys=token.keys[:, :, ::2]),
        token._replace(values=token.values[..., :-2]),
        token._replace(mask=token.mask[..., :-1]),
        token._replace(mask=token.mask == 0),
        token._replace(mask=token.mask[:, 0]),
        token._replace(rotation=(token.rotation[0], token.rotation[1][..., :-1])),
        token._replace(rotation=(token.rotation[0], token.rotation[1].expand(2, -1, -1))),
    ]
    assert [each.fits(layout) for each in wrong] == [False] * len(wrong)
    assert token.fits(layout)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_row_among_others_is_bit_for_bit_what_it_is_alone(name: str, weights: Any) -> None:
    """Sequences of different lengths, and one that is absent: it is written to the last place, which others leave."""
    model = MODELS[name]()
    cases = [Case(model, 1, length, seed=length) for length in (0, 7, 70)]
    layout = triton_layouts(cases[0].block, weights)[True]
    copies = copied(layout, weights)
    hidden, mask = (torch.cat([getattr(case, what) for case in cases]) for what in ("hidden", "mask"))
    keys, values = (torch.cat([getattr(case, what) for case in cases]) for what in ("keys", "values"))
    rotation = None
    if cases[0].rotation is not None:
        rotation = tuple(torch.cat([case.rotation[which] for case in cases]) for which in (0, 1))
    absent = cases[1].keys.clone()
    with torch.no_grad():
        alone = [run(layout, copies, case.token()._replace(any_rows=True)) for case in cases]
        positions = torch.tensor([0, -1, 70])
        token = Token(hidden, rotation, mask, positions, keys, values, any_rows=True)  # type: ignore[arg-type]
        assert token.fits(layout)
        together = run(layout, copies, token)
    for row in (0, 2):
        assert torch.equal(together[row], alone[row][0])
        assert torch.equal(keys[row, :, : cases[row].length + 1], cases[row].keys[0, :, : cases[row].length + 1])
    assert torch.equal(keys[1, :, : CAPACITY - 1].nan_to_num(), absent[0, :, : CAPACITY - 1].nan_to_num())
    assert torch.isfinite(keys[1, :, CAPACITY - 1]).all()
    assert torch.isfinite(together[1]).all()
