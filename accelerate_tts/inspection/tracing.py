"""Whether a call is watched rather than made: what watches or transforms it must see upstream's own operators."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["is_traced", "is_watched"]


def is_traced(*inputs: Any) -> bool:
    """Whether a call is watched, or `torch.compile` follows its code.

    Args:
        inputs: See `is_watched`.
    """
    import torch

    return torch.compiler.is_compiling() or is_watched(*inputs)


def is_watched(*inputs: Any) -> bool:
    """Whether a tracer, an exporter or a transform is at work on this thread.

    `torch.jit.trace` and ONNX's older exporter run a module with tensors that hold numbers, and record operators;
    `torch.export` runs it with tensors without memory, or follows its code; `torch.fx` gives it proxies, and
    `torch.func` wraps what it is given. A kernel would read memory that is not there, or be left out of the record.

    Args:
        inputs: What the call is given. What is no tensor, or one of a class of its own, counts as watched.
    """
    import torch

    if torch.compiler.is_compiling():  # its operators are fit for a graph, and not for an exported one
        return _is_exporting()()
    for given in inputs:
        if type(given) is not torch.Tensor and type(given) is not torch.nn.Parameter:
            return True
    return _is_at_work()()


@cache
def _is_exporting() -> Callable[[], bool]:
    import torch

    known: Any = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
    return known or (lambda: False)


@cache
def _is_at_work() -> Callable[[], bool]:
    import torch

    core: Any = torch._C
    tracing, transform, modes = (
        core._get_tracing_state, core._functorch.peek_interpreter_stack, core._len_torch_dispatch_stack,
    )  # fmt: skip

    def is_at_work() -> bool:  # asked at each layer of a token
        return bool(tracing() is not None or transform() is not None or modes())

    return is_at_work
