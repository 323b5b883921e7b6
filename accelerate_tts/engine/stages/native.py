"""Our own C++ kernels: built with the compiler that torch.compile uses.

`torch.ops.accelerate_tts.skinny_linear(x, weight, scale, bias, transposed)` (skinny.cpp) computes `x @ weight.T * scale
+ bias` for a few rows of fp32 `x` of shape (rows, inputs); `weight` is (outputs, inputs) in fp32, bf16 or int8, or
(inputs, outputs) in fp32 if `transposed`. All tensors are contiguous and on the CPU; the callers see to it.
`decoder_blocks` (block.cpp) is one token through blocks of a decoder; block_kernel.py describes them to it.
`transformer_block` (transformer.cpp) and `residual_block` (residual.cpp) are a whole sequence through a block without a
cache; transformer_kernel.py and residual_kernel.py describe them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "decoder_blocks",
    "library_files",
    "multiplies_in_bf16",
    "residual_block",
    "skinny_linear",
    "transformer_block",
]

_TOKENS = ("skinny.cpp", "block.cpp")
# In a library of their own: they need a header of torch's inside, which some releases ship without what it includes.
_SEQUENCES = (*_TOKENS, "tiles.cpp", "transformer.cpp", "residual.cpp")
_loaded: dict[tuple[str, ...], Any] = {}


@cache
def _library(sources: tuple[str, ...] = _TOKENS) -> Any:
    from torch._inductor.codecache import CppCodeCache

    # inductor knows the compiler, the flags for this processor and which OpenMP torch itself has loaded: a second one
    # would have threads of its own, spinning on the same cores. It keeps what is built in its cache folder.
    here = Path(__file__).parent
    code = "\n".join((here / name).read_text(encoding="utf-8") for name in sources)
    library = CppCodeCache.load(code, extra_flags=_flags())
    _loaded[sources] = library
    return library


def _flags() -> tuple[str, ...]:
    from torch._inductor import cpp_builder

    # inductor (2.6 to 2.14) forbids GCC to vectorise loops, those marked `omp simd` too, and to fuse products and sums.
    is_gcc = getattr(cpp_builder, "is_gcc", lambda: False)
    return ("-ftree-loop-vectorize", "-ffp-contract=fast") if is_gcc() else ()


def library_files() -> list[Path]:
    """Where what was built lies, of what this process has loaded."""
    return [Path(library._name) for library in _loaded.values()]


@cache
def decoder_blocks() -> Callable[..., None]:
    """The kernel for one token through blocks: `(blocks, tokens, count, threads)`, see block_kernel.py.

    Raises:
        Exception: What inductor raises without a working compiler; callers let it become the stage's failure.
    """
    import ctypes

    kernel: Any = _library().decoder_blocks
    kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    kernel.restype = None
    return kernel  # type: ignore[no-any-return]


@cache
def transformer_block() -> Callable[..., None]:
    """The kernel for a sequence through a transformer's block: `(block, call, threads)`, see transformer_kernel.py.

    Raises:
        Exception: What inductor raises without a working compiler; callers let it become the stage's failure.
    """
    return _of_block_and_call(_library(_SEQUENCES).transformer_block)


@cache
def residual_block() -> Callable[..., None]:
    """The kernel for a sequence through a residual block: `(block, call, threads)`, see residual_kernel.py.

    Raises:
        Exception: As for `transformer_block`.
    """
    return _of_block_and_call(_library(_SEQUENCES).residual_block)


def _of_block_and_call(kernel: Any) -> Callable[..., None]:
    import ctypes

    kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    kernel.restype = None
    return kernel  # type: ignore[no-any-return]


def multiplies_in_bf16() -> bool:
    """Whether `transformer_block` and `residual_block` multiply by AMX; without, they are right and slow.

    Raises:
        Exception: As for `transformer_block`.
    """
    return bool(_library(_SEQUENCES).multiplies_in_bf16())


@cache
def skinny_linear() -> Callable[..., Any]:
    """The kernel as a Python function of the operator's arguments; built when first asked for, some seconds.

    For eager code: it saves the dispatcher's way. Traced code calls the operator, which is registered here too.

    Raises:
        Exception: What inductor raises without a working compiler; callers let it become the stage's failure.
    """
    import ctypes

    import torch

    library = _library()
    pointers, sizes = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 3
    kernels: dict[tuple[Any, bool], Any] = {
        (torch.float32, False): library.skinny_f32,
        (torch.bfloat16, False): library.skinny_bf16,
        (torch.int8, False): library.skinny_i8,
        (torch.float32, True): library.skinny_f32_transposed,
    }
    for kernel in kernels.values():
        kernel.argtypes = [*pointers, *sizes, ctypes.c_int]
        kernel.restype = None

    def run(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        y = torch.empty(x.shape[0], outputs, dtype=torch.float32, device="cpu")  # whatever the user's defaults are
        kernels[weight.dtype, transposed](
            x.data_ptr(), weight.data_ptr(), None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), x.shape[0], outputs, inputs,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    _operator()
    return run


@cache
def _operator() -> Any:
    """Register the operator, once for the process: whatever became of the kernel, torch takes no second one."""
    import torch

    def run(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
        return skinny_linear()(x, weight, scale, bias, transposed)

    def fake(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
        del scale, bias
        return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])

    library: Any = torch.library.Library("accelerate_tts", "DEF")  # type: ignore[no-untyped-call]
    library.define("skinny_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool transposed) -> Tensor")
    library.impl("skinny_linear", run, "CPU")
    torch.library.register_fake("accelerate_tts::skinny_linear", fake, lib=library)
    return library  # and kept: an operator goes with its library
