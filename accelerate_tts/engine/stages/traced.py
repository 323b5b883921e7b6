"""Whether a call is looked at rather than made: what watches or transforms it must see upstream's own operators."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["is_traced"]


def is_traced(*inputs: Any) -> bool:
    """Whether a tracer, an exporter or a transform is at work, so that a kernel that reads addresses must not be.

    `torch.jit.trace` and ONNX's older exporter run a module with tensors that hold numbers, and record operators;
    `torch.compile` and `torch.export` follow its Python code; `torch.fx` gives it proxies, `FakeTensorMode` tensors
    without memory, and `torch.func` wraps them. All of this thread; a module that is watched elsewhere is none of its
    business.

    Args:
        inputs: What the call is given; tensors of a class of their own count as watched.
    """
    import torch

    for given in inputs:
        if given is not None and type(given) is not torch.Tensor and not isinstance(given, torch.nn.Parameter):
            return True
    return torch.compiler.is_compiling() or _is_watched()()


@cache
def _is_watched() -> Callable[[], bool]:
    import torch

    core: Any = torch._C
    tracing, transform, modes = (
        core._get_tracing_state, core._functorch.peek_interpreter_stack, core._len_torch_dispatch_stack,
    )  # fmt: skip

    def is_watched() -> bool:  # asked at each layer of a token
        return bool(tracing() is not None or transform() is not None or modes())

    return is_watched
