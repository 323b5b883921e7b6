"""Chatterbox's blocks of a flow at small size, each alone in a part, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn


class Estimator(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def sequence_block() -> nn.Module:
    module = pytest.importorskip("chatterbox.models.s3gen.matcha.transformer")
    return Estimator(module.BasicTransformerBlock(64, 1, 64, activation_fn="gelu"))


def residual_block() -> nn.Module:
    module = pytest.importorskip("chatterbox.models.s3gen.decoder")
    return Estimator(module.CausalResnetBlock1D(64, 64, 32))
