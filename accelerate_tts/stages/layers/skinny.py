"""Linear layers with few rows on a CPU, by the kernel skinny_gemm.cpp, which reads weights at full memory bandwidth.

A decode step multiplies each weight matrix with one or two rows (a sequence, classifier-free guidance), so reading the
weights dominates its time. `F.linear` uses kernels for many rows, which reach a third of the memory bandwidth
(docs/decisions/0006-few-rows.md has the figures). In fp32 the kernel reads the module's own weights and is exact to
rounding. The level `balanced` may store them in bf16, `fast` in int8 with a scale for each output. Sums stay in fp32,
and inputs with more rows use the fp32 weights as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.inspection.classes import beneath_swaps, class_of, is_bias, is_torchs_linear, plain_class
from accelerate_tts.inspection.routers import routers
from accelerate_tts.inspection.tracing import is_plain, is_watched
from accelerate_tts.kernels.calls import skinny_linear
from accelerate_tts.kernels.library import missing
from accelerate_tts.kernels.weight_formats import MOST_ROWS, WeightFormat, in_bf16, in_int8, is_transposed
from accelerate_tts.patching.class_swap import (
    COPY,
    CarryingSwap,
    ClassSwap,
    call_patched,
    open_modules,
    per_class,
    subclass_with,
)
from accelerate_tts.patching.derived import Derived
from accelerate_tts.stages.base import LEAST_FEW_ROWS, FormatStage
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from accelerate_tts.plan import Part

# Smaller weights are read from the cores' caches, where neither the kernel nor an int8 copy gains anything.
_LEAST_WEIGHTS = 16_384


@register_stage
class SkinnyStage(FormatStage):
    """Computes linear layers (and transformers' Conv1D) by a kernel for inputs of up to eight rows. For CPUs."""

    name = "skinny linear layers"
    group = "linear layers"
    devices = ("cpu",)
    after = ("half precision",)

    def applies(self, part: Part) -> str | None:
        if part.few_rows < LEAST_FEW_ROWS:
            return "next to nothing of its linear work has few rows"
        if (reason := missing()) is not None:
            return reason
        return None if self._layers(part) else "no large linear layer in fp32 (or bf16) in it"

    def _layers(self, part: Part) -> list[nn.Module]:
        return _layers(part.module, own=self._weights == "fp32")

    def prepare(self, part: Part) -> ClassSwap:
        skinny_linear()
        layers = self._layers(part)
        if self._weights == "fp32":
            return ClassSwap(layers, lambda module: _exact_class(class_of(module), is_transposed(module)))
        copies = {layer: Derived(layer, _MAKERS[self._weights]) for layer in layers}
        return CarryingSwap(
            layers, lambda module: _copied_class(class_of(module), is_transposed(module), self._weights), COPY, copies
        )  # fmt: skip


def _layers(module: nn.Module, *, own: bool = False) -> list[nn.Module]:
    """Return the layers that the kernel supports.

    With `own`, which uses the module's own weights, also bf16 ones, and the routers of experts.
    """
    choosing = set() if own else routers(module)
    return [
        inner
        for inner in open_modules(module)
        if (is_transposed(inner) or is_torchs_linear(plain_class(inner)))
        and inner not in choosing
        and is_plain(inner.weight)
        and inner.weight.numel() >= _LEAST_WEIGHTS  # type: ignore[operator]
        and (
            inner.weight.dtype == torch.float32
            or (own and inner.weight.dtype == torch.bfloat16 and not is_transposed(inner))
        )
        and inner.weight.device.type == "cpu"
    ]


def _takes(x: Any, inputs: int, dtype: Any = None) -> bool:
    """Check that the kernel supports an input. All others, wrong ones included, get torch's own result or error."""
    return bool(
        is_plain(x)
        and x.dtype == (dtype or torch.float32)
        and x.dim() > 0
        and x.shape[-1] == inputs
        and 0 < x.numel() <= MOST_ROWS * inputs
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_watched()
    )


def _call(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool) -> Any:
    inputs = weight.shape[0 if transposed else 1]
    rows = x.reshape(-1, inputs).contiguous()
    compiling = torch.compiler.is_compiling()
    run: Any = torch.ops.accelerate_tts.skinny_linear if compiling else skinny_linear()
    y = run(rows, weight, scale, bias, transposed)
    return y.view(*x.shape[:-1], y.shape[1])


@per_class
def _exact_class(plain: Any, transposed: bool) -> type:
    own, base = plain.forward, beneath_swaps(plain)
    torchs = base.forward

    def computed(self: Any, x: Any) -> Any:
        if plain.forward is not own:
            return call_patched(plain, self, x)
        weight, bias = self.weight, self.bias
        # A class swap in between knows of a patch beneath it, and says so. Without a weight upstream raises its error.
        if base.forward is not torchs or weight is None or (transposed and bias is None):
            return plain.forward(self, x)
        inputs = weight.shape[0 if transposed else 1]
        outputs = weight.shape[1 if transposed else 0]
        if not is_bias(bias, outputs):
            return plain.forward(self, x)
        if weight.dtype == torch.bfloat16 and _takes(x, inputs, weight.dtype) and _fits(weight, weight.dtype):
            # Sums in fp32, rounded once at the end, as bf16 hardware does.
            wide = None if bias is None else bias.float()
            return _call(x.float(), weight, None, wide, False).to(x.dtype)
        if not _takes(x, inputs) or not (_fits(weight) and _fits(bias)):
            return plain.forward(self, x)
        return _call(x, weight, None, bias, transposed)

    return subclass_with(plain, _with_torchs_name(computed, transposed))


def _fits(tensor: Any, dtype: Any = None) -> bool:
    return tensor is None or bool(
        is_plain(tensor)
        and tensor.dtype == (dtype or torch.float32)
        and tensor.is_contiguous()
        and tensor.device.type == "cpu"
    )


@per_class
def _copied_class(plain: Any, transposed: bool, weights: WeightFormat) -> type:
    own, base = plain.forward, beneath_swaps(plain)
    torchs = base.forward

    def computed(self: Any, x: Any) -> Any:
        if plain.forward is not own:
            return call_patched(plain, self, x)
        bias = self.bias
        if base.forward is not torchs or self.weight is None or (transposed and bias is None):  # as above
            return plain.forward(self, x)
        outputs, inputs = self.weight.shape[::-1] if transposed else self.weight.shape
        if not _takes(x, inputs) or not (is_plain(self.weight) and _fits(bias) and is_bias(bias, outputs)):
            return plain.forward(self, x)
        copy = getattr(self, COPY, None)  # another thread may have switched the change off
        if copy is None:
            return plain.forward(self, x)
        weight, scale = copy.get()
        return _call(x, weight, scale, bias, False)

    return subclass_with(plain, _with_torchs_name(computed, transposed), copies=weights)


def _with_torchs_name(computed: Callable[[Any, Any], Any], transposed: bool) -> Callable[[Any, Any], Any]:
    """Return a forward with the parameter's name of the replaced one, for callers that give it by keyword."""
    if transposed:
        return computed

    def forward(self: Any, input: Any) -> Any:  # noqa: A002 - torch's own name
        return computed(self, input)

    return forward


_MAKERS = {"bf16": in_bf16, "int8": in_int8}
