"""Models that run compiled graphs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from accelerate_tts.stages.compile.regional import is_compiled

if TYPE_CHECKING:
    from torch import nn


def has_graphs(model: nn.Module) -> bool:
    """Check for compiled modules in a model, by a stage or by the user. Compiled functions are not seen."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # takes seconds to import, and is there if anything was compiled
    return dynamo is not None and any(
        module._compiled_call_impl is not None or isinstance(module, dynamo.OptimizedModule) or is_compiled(module)
        for module in model.modules()
    )
