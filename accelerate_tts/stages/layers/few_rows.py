"""Linear layers with few rows on a CPU, computed as the transposed product. Exact to rounding.

A decode step multiplies each weight matrix with two to eight rows (classifier-free guidance, a small batch). `F.linear`
uses a kernel for many rows, which reads the weights at a half to a third of the memory bandwidth. `W @ x.T` reads them
at full bandwidth (docs/decisions/0006-few-rows.md has the figures). One row is a matrix-vector product either way, and
from about ten rows on `F.linear` is faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accelerate_tts.inspection.classes import class_of, is_bias, is_torchs_linear
from accelerate_tts.inspection.tracing import is_plain, is_watched
from accelerate_tts.patching.class_swap import ClassSwap, call_patched, open_modules, per_class, subclass_with
from accelerate_tts.stages.base import LEAST_FEW_ROWS, BaseStage
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part

FEW_ROWS = range(2, 9)
"""Numbers of rows for which the transposed product is computed."""


@register_stage
class FewRowsStage(BaseStage):
    """Computes `W @ x.T` in a part's linear layers for inputs of two to eight rows. For CPUs."""

    name = "few-row linear layers"
    group = "linear layers"
    devices = ("cpu",)
    after = ("skinny linear layers",)

    def applies(self, part: Part) -> str | None:
        if part.few_rows < LEAST_FEW_ROWS:
            return "next to nothing of its linear work has few rows"
        return None if _linears(part.module) else "no linear layer in it"

    def prepare(self, part: Part) -> ClassSwap:
        return ClassSwap(_linears(part.module), lambda module: _few_rows_class(class_of(module)))


def _linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in open_modules(module) if is_torchs_linear(type(m))]


@per_class
def _few_rows_class(plain: Any) -> type:
    own = plain.forward

    def forward(self: Any, input: Any) -> Any:  # noqa: A002 - torch's own name
        if plain.forward is not own:
            return call_patched(plain, self, input)
        if is_watched(input):
            return plain.forward(self, input)
        weight, bias = self.weight, self.bias
        if not is_plain(weight) or not (bias is None or is_plain(bias)):
            return functional.linear(input, weight, bias)  # a class of its own (quantised, sharded) may know this alone
        outputs, features = weight.shape
        rows = input.numel() // max(1, features)
        # A wrong input gets torch's own error, and a bias that is broadcast torch's own sum.
        if rows not in FEW_ROWS or input.shape[-1] != features or not is_bias(bias, outputs):
            return functional.linear(input, weight, bias)
        columns = input.reshape(rows, features).t()
        product = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
        # Contiguous, as the result of `F.linear`: callers may use .view() on it.
        return product.t().contiguous().view(*input.shape[:-1], outputs)

    return subclass_with(plain, forward)
