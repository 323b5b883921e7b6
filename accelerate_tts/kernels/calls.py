"""The C++ kernels as stages call them.

`torch.ops.accelerate_tts.skinny_linear(x, weight, scale, bias, transposed)` (skinny_gemm.cpp) computes
`x @ weight.T * scale + bias` for a few rows of fp32 `x` of shape (rows, inputs); `weight` is (outputs, inputs) in fp32,
bf16 or int8, or (inputs, outputs) in fp32 if `transposed`. All tensors are contiguous and on the CPU.
`decoder_blocks` (decoder_block.cpp) computes one token through a decoder's blocks; see decoder_block.py.
`transformer_block` and `residual_block` compute a whole sequence through a block without a cache; see
transformer_block.py and residual_block.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.kernels.library import kernels
from accelerate_tts.kernels.structs import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable


def decoder_blocks() -> Callable[..., None]:
    """Return the kernel for one token through blocks: `(blocks, tokens, count, threads)`, see decoder_block.py.

    Raises:
        KernelError: There are no kernels; `missing()` checks for that.
    """
    return kernels().decoder_blocks


def transformer_block() -> Callable[..., None]:
    """Return the kernel for a sequence through a transformer block: `(block, call, threads)`, see transformer_block.py.

    Raises:
        KernelError: As for `decoder_blocks`.
    """
    return kernels().transformer_block


def residual_block() -> Callable[..., None]:
    """Return the kernel for a sequence through a residual block: `(block, call, threads)`, see residual_block.py.

    Raises:
        KernelError: As for `decoder_blocks`.
    """
    return kernels().residual_block


def short_convolution() -> Callable[..., None]:
    """Return the kernel for a convolution along time in fewer products: `(layer, call, threads)`, see toom_cook.py.

    Raises:
        KernelError: As for `decoder_blocks`.
    """
    return kernels().short_convolution


def multiplies_in_bf16() -> bool:
    """Check that `transformer_block` and `residual_block` use AMX. Without it they are correct, but slow.

    Raises:
        KernelError: As for `decoder_blocks`.
    """
    return kernels().has_tiles


@cache
def skinny_linear() -> Callable[..., Any]:
    """Return the kernel as a Python function with the operator's arguments, and register the operator.

    Eager code calls the function, which saves the dispatcher's overhead. Traced code calls the operator.

    Raises:
        KernelError: As for `decoder_blocks`.
    """
    kernel = kernels().skinny_linear
    formats = {
        (torch.float32, False): FORMATS.index("fp32"),
        (torch.bfloat16, False): FORMATS.index("bf16"),
        (torch.int8, False): FORMATS.index("int8"),
        (torch.float32, True): FORMATS.index("transposed"),
    }

    def run(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        rows = x.shape[0]
        y = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")  # independent of the user's defaults
        kind = formats.get((weight.dtype, transposed))
        fits = _is_plain(x) and _is_plain(weight, weight.dtype) and x.shape == (rows, inputs)
        if kind is None or not (fits and _is_vector(scale, outputs) and _is_vector(bias, outputs)):
            raise ValueError(_misfit(x, weight, scale, bias, transposed))
        kernel(
            kind, x.data_ptr(), weight.data_ptr(), None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), rows, outputs, inputs, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _is_plain(tensor: Any, dtype: Any = torch.float32) -> bool:
        return bool(tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous())

    def _is_vector(tensor: Any, size: int) -> bool:
        return tensor is None or (tensor.shape == (size,) and _is_plain(tensor))

    _operator()
    return run


def _misfit(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> str:
    given = {"x": x, "weight": weight, "scale": scale, "bias": bias}
    said = [f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            for name, tensor in given.items() if tensor is not None]  # fmt: skip
    return (
        f"skinny_linear was given {'; '.join(said)}; transposed={transposed}. It takes contiguous tensors on the CPU:"
        " x (rows, inputs) in float32; weight (outputs, inputs) in float32, bfloat16 or int8, or (inputs, outputs) in"
        " float32 if transposed; scale and bias (outputs,) in float32 or None"
    )


@cache
def _operator() -> Any:
    """Register the operator, once a process, since torch accepts no second registration."""

    def run(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
        return skinny_linear()(x, weight, scale, bias, transposed)

    def fake(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
        del scale, bias
        return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])

    library: Any = torch.library.Library("accelerate_tts", "DEF")  # type: ignore[no-untyped-call]
    library.define("skinny_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool transposed) -> Tensor")
    library.impl("skinny_linear", run, "CPU")
    torch.library.register_fake("accelerate_tts::skinny_linear", fake, lib=library)
    return library  # kept alive by the cache: the operator disappears with its library
