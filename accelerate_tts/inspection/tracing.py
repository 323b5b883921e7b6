"""Detection of tracers, exporters and transforms, which must see upstream's own operators."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_compiler: Any = torch.compiler
_core: Any = torch._C
_tracing, _modes = _core._get_tracing_state, _core._len_torch_dispatch_stack
_transform = _core._functorch.peek_interpreter_stack
_forward_mode: Any = forward_ad
_overrides, _override_at = _core._len_torch_function_stack, _core._get_function_stack_at

compiles_itself: ContextVar[bool] = ContextVar("compiles_itself", default=False)
"""True inside calls of what this package compiles."""

KEEPS_KERNELS = "accelerate_tts_keeps_kernels"
"""Attribute of a `TorchFunctionMode` that replaces nothing that kernels compute."""


def is_traced(*inputs: Any) -> bool:
    """Check that a call is traced by `torch.compile`, or is watched; see `is_watched`.

    Args:
        inputs: See `is_watched`.
    """
    return torch.compiler.is_compiling() or is_watched(*inputs)


def _is_others_graph() -> bool:
    # `is_exporting()` itself is folded to True in all graphs by dynamo of torch 2.10. The flag is of torch 2.7.
    return not compiles_itself.get() or bool(getattr(_compiler, "_is_exporting_flag", False))


# dynamo calls it while it traces, and its result is a constant of the graph (`torch.compiler.assume_constant_result`,
# which imports dynamo).
_is_others_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_watched(*inputs: Any) -> bool:
    """Check for an active tracer, exporter or transform on this thread.

    A graph of a user's own `torch.compile` never checks whether weights were written, so it gets no copies of them.
    `torch.jit.trace` and ONNX's older exporter run a module with real tensors and record operators. `torch.export` uses
    tensors without memory, or traces the code. `torch.fx` passes proxies, and `torch.func` wraps inputs. Forward-mode
    differentiation (`torch.autograd.forward_ad`) needs tangents, also under `no_grad`. A user's `TorchFunctionMode` may
    replace any function. A kernel would read memory that does not exist, or be missing in the record.

    Args:
        inputs: Inputs of the call. Objects that are not plain tensors (`is_plain`) count as watched.
    """
    if torch.compiler.is_compiling():  # the package's operators may be in its own graphs, but in no exported one
        return _is_others_graph()
    for given in inputs:
        if not is_plain(given):
            return True
    # Called for each layer of each token.
    return bool(
        _tracing() is not None or _transform() is not None or _modes() or _forward_mode._current_level >= 0
        or (_overrides() and _is_overridden())
    )  # fmt: skip


def is_plain(value: Any) -> bool:
    """Check for a tensor or parameter whose memory holds its numbers as they are.

    Kernels read memory. Subclasses, sparse, MKL-DNN and nested tensors have none of their own, nor do tensors of zeros
    that torch never writes. The memory of a negative view (`z.conj().imag`) has the other sign, which torch changes
    when an operator reads it.
    """
    kind = type(value)
    return bool(
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and (torch.compiler.is_compiling() or (  # a compiler has no such tensors in its graphs, and cannot trace this
            value.layout is torch.strided and not value.is_nested
            and not (value.is_neg() or value.is_conj() or value._is_zerotensor())
        ))
    )  # fmt: skip


def _is_overridden() -> bool:
    """Check for a `TorchFunctionMode` beside `torch.device(...)`, `torch.set_default_device` and our own."""
    modes = (_override_at(place) for place in range(_overrides()))
    return any(type(mode) is not DeviceContext and not hasattr(mode, KEEPS_KERNELS) for mode in modes)
