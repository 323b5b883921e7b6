"""The token kernels are compiled for cards that are not here, to what those would load. They do not run.

Their results are shown in Triton's interpreter (tests/triton).
"""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from accelerate_tts.kernels.block_layout import triton_layouts
from accelerate_tts.kernels.triton import token_block
from accelerate_tts.kernels.triton.token_block import Token, copied, run

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.int64: "i64"}
HIDDEN, HEADS, INNER, CAPACITY = 1024, 16, 4096, 512  # T3's and XTTS's


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaModel(config).layers[0]


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=HIDDEN, n_layer=1, n_head=HEADS, vocab_size=5)
    return transformers.GPT2Model(config).h[0]


def launches(block: Any, weights: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the starts of a token: kernels, arguments and sizes."""
    found: list[Any] = []
    monkeypatch.setattr(token_block, "launch", lambda kernel, _, *given, **sizes: found.append((kernel, given, sizes)))
    layout = triton_layouts(block, weights)[True]
    dtype = layout.q.weight.dtype
    buffers = [torch.zeros(rows, layout.kv_heads, CAPACITY, layout.head_dim, dtype=dtype) for _ in range(2)]
    turned = (torch.zeros(1, 1, layout.head_dim), torch.zeros(1, 1, layout.head_dim))
    token = Token(
        torch.zeros(rows, 1, HIDDEN, dtype=dtype), turned if layout.k is not None else None,
        torch.zeros(rows, 1, 1, CAPACITY, dtype=dtype), torch.zeros(1, dtype=torch.long), *buffers,
    )  # fmt: skip
    assert token.fits(layout)
    run(layout, copied(layout, weights), token)
    return found


def compiled(kernel: Any, given: tuple[Any, ...], sizes: dict[str, Any], target: Any) -> Any:
    """The kernel as the launch would have it compiled: numbers of 1 and `None` are constants, as Triton makes them."""
    triton: Any = __import__("triton.compiler")
    signature, constants, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = sizes[name] if name in sizes else given[place]
        if name in sizes or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[place,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], divisible[place,] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                divisible[place,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=target, options={"num_warps": 4})


CASES = {
    "Llama, fp32": (llama, torch.float32, "fp32"),
    "Llama, bf16": (llama, torch.bfloat16, "fp32"),
    "Llama, int8": (llama, torch.float32, "int8"),
    "GPT-2, fp32": (gpt2, torch.float32, "fp32"),
}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_they_are_compiled_for_nvidias_cards_without_tensor_cores(
    case: str, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """For compute capability 8.0 (A100) and 9.0 (H100). Tensor cores would multiply fp32 as TF32."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    backends: Any = __import__("triton.backends.compiler").backends.compiler
    make, dtype, weights = CASES[case]
    with torch.no_grad():
        started = launches(make().to(dtype), weights, rows, monkeypatch)
    assert len(started) == 5
    for capability in (80, 90):
        for kernel, given, sizes in started:
            made = compiled(kernel, given, sizes, backends.GPUTarget("cuda", capability, 32))
            assert len(made.asm["cubin"]) > 0
            assert "mma" not in made.asm["ptx"]
            assert "ld.global.v4" in made.asm["ptx"], "weights are read by 16 bytes"


@pytest.mark.parametrize(("card", "wavefront"), [("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32), ("gfx1201", 32)])
def test_they_are_compiled_for_amds_cards(
    card: str, wavefront: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """MI200 and MI300, whose wavefronts are of 64 threads; RX 7900 and RX 9070, whose are of 32."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    backends: Any = __import__("triton.backends.compiler").backends.compiler
    with torch.no_grad():
        started = launches(llama(), "fp32", 2, monkeypatch)
    for kernel, given, sizes in started:
        made = compiled(kernel, given, sizes, backends.GPUTarget("hip", card, wavefront))
        assert len(made.asm["hsaco"]) > 0
        assert "mfma" not in made.asm["amdgcn"]
        assert "wmma" not in made.asm["amdgcn"]


XPU = {
    "max_work_group_size": 1024, "max_num_sub_groups": 64, "sub_group_sizes": [16, 32], "has_fp64": True,
    "has_subgroup_matrix_multiply_accumulate": True, "has_subgroup_matrix_multiply_accumulate_tensor_float32": True,
    "has_subgroup_2d_block_io": True, "has_bfloat16_conversions": True,
}  # fmt: skip
"""Properties of an Intel card with matrix units, as SYCL reports them to Triton."""


@pytest.mark.parametrize("case", CASES)
def test_they_are_compiled_for_intels_cards(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """To SPIR-V, which the driver of a card translates. The backend comes with torch's wheels for XPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: Any = __import__("triton.backends").backends
    if "intel" not in found.backends:
        pytest.skip("this Triton has no backend for XPU")
    # Its compiler builds a parser of cards' names with SYCL's headers first. Triton imports it under no name.
    inside = found.backends["intel"].compiler.__init__.__globals__
    parser = SimpleNamespace(parse_device_arch=lambda _: "")
    monkeypatch.setitem(inside, "compile_module_from_src", lambda *_: parser)
    make, dtype, weights = CASES[case]
    with torch.no_grad():
        started = launches(make().to(dtype), weights, 2, monkeypatch)
    for kernel, given, sizes in started:
        made = compiled(kernel, given, sizes, found.compiler.GPUTarget("xpu", XPU, 32))
        assert len(made.asm["spv"]) > 0
        assert "MatrixMultiplyAccumulate" not in made.asm["llir"], "its matrix units would multiply fp32 as TF32"
