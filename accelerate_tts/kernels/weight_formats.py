"""Storage formats of a linear layer's weights for the kernels: fp32, bf16, and int8 with a scale for each output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from accelerate_tts.inspection.classes import plain_class

if TYPE_CHECKING:
    from accelerate_tts.settings import Precision

WeightFormat = Literal["fp32", "bf16", "int8"]
FORMATS: tuple[WeightFormat, ...] = ("int8", "bf16", "fp32")
"""Storage formats, fewest bytes first."""
_PRECISIONS: tuple[Precision, ...] = ("fast", "balanced", "exact")
MOST_ROWS = 8
"""Maximum rows for which reading the weights dominates the time of a linear layer."""


def formats_under(precision: Precision) -> tuple[WeightFormat, ...]:
    """Return the formats that a precision allows, fewest bytes first."""
    return FORMATS[_PRECISIONS.index(precision) :]


def is_transposed(module: Any) -> bool:
    """Check for transformers' Conv1D, a linear layer with a weight of shape (inputs, outputs)."""
    cls: Any = plain_class(module)
    return bool(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils")


def _weight(module: Any) -> Any:
    weight = module.weight.detach()
    return weight.t() if is_transposed(module) else weight


def in_bf16(module: Any) -> tuple[Any, Any]:
    """Return a linear layer's weight, (outputs, inputs), in bf16, and `None` as its scale."""
    import torch

    return _weight(module).to(torch.bfloat16).contiguous(), None


def int8_scales(weight: Any) -> Any:
    """Return the scale of each output of an fp32 weight, (outputs, inputs): symmetric over -127 .. 127, no -128."""
    import torch

    return (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # the clamp serves rows of zeros


def in_int8(module: Any) -> tuple[Any, Any]:
    """Return a linear layer's weight, (outputs, inputs), in int8, and its fp32 scales, (outputs,)."""
    import torch

    weight = _weight(module).float()
    scale = int8_scales(weight)
    return (weight / scale.unsqueeze(1)).round().to(torch.int8).contiguous(), scale
