"""Half-precision dtypes that a device multiplies in at full speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


__all__ = ["half_dtypes"]


def half_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """The half-precision dtypes that a device computes in, best first; none where they would only be emulated."""
    import torch

    if device_type == "cpu":
        # oneDNN takes bf16 on AVX-512 and up (natively with avx512_bf16 or AMX) and on ARM with its bf16 extension.
        return (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    if device_type == "cuda":
        return (torch.bfloat16,) if torch.cuda.is_bf16_supported(including_emulation=False) else (torch.float16,)
    return (torch.float16,) if device_type == "mps" else (torch.bfloat16,)
