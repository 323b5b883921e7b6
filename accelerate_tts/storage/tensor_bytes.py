"""Digest of a tensor's values."""

from __future__ import annotations

import ctypes
import hashlib

import torch


def content_digest(tensor: torch.Tensor) -> bytes:
    """Return the SHA-256 of a strided tensor's values; empty for other layouts, subclasses and meta tensors."""
    if type(tensor) not in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer} or tensor.layout is not torch.strided:
        return b""  # a sparse or otherwise special tensor; the modules' `repr` shows its type
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return b""
    plain = tensor.detach().cpu()
    if plain.is_quantized:
        plain = plain.dequantize()  # the integers alone do not include the scale
    plain = plain.contiguous()
    size = plain.numel() * plain.element_size()
    return hashlib.sha256((ctypes.c_char * size).from_address(plain.data_ptr())).digest()
