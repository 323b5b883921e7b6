"""Make an existing PyTorch text-to-speech backend start warm, run faster and stay correct.

The whole public surface is listed in `__all__`. Every name is loaded when it is first used, so that importing
this package costs a few milliseconds and never imports torch.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate_tts._version import __version__
    from accelerate_tts.context import fast_inference
    from accelerate_tts.decorators import inference, optimized_model
    from accelerate_tts.errors import (
        AccelerateTTSError,
        ConcurrencyError,
        InferenceContextError,
        MissingExtraError,
        ModelError,
        SettingsError,
        WarmupError,
    )
    from accelerate_tts.events import Event, EventHook, add_hook
    from accelerate_tts.optimizer import (
        PerformanceOptimizer,
        create_inference_context,
        get_performance_optimizer,
        receipt_of,
    )
    from accelerate_tts.receipts.receipt import Receipt, StageResult
    from accelerate_tts.runtime.batching import batched
    from accelerate_tts.runtime.inference_mode import carry_mode
    from accelerate_tts.settings import Settings, is_active, is_testing, set_active, testing
    from accelerate_tts.voices.decorator import cached_embedding

__all__ = [
    "AccelerateTTSError",
    "ConcurrencyError",
    "Event",
    "EventHook",
    "InferenceContextError",
    "MissingExtraError",
    "ModelError",
    "PerformanceOptimizer",
    "Receipt",
    "Settings",
    "SettingsError",
    "StageResult",
    "WarmupError",
    "__version__",
    "add_hook",
    "batched",
    "cached_embedding",
    "carry_mode",
    "create_inference_context",
    "fast_inference",
    "get_performance_optimizer",
    "inference",
    "is_active",
    "is_testing",
    "optimized_model",
    "receipt_of",
    "set_active",
    "testing",
]

_HOME = {
    "__version__": "_version",
    "fast_inference": "context",
    "inference": "decorators",
    "optimized_model": "decorators",
    "Receipt": "receipts.receipt",
    "StageResult": "receipts.receipt",
    "AccelerateTTSError": "errors",
    "ConcurrencyError": "errors",
    "InferenceContextError": "errors",
    "MissingExtraError": "errors",
    "ModelError": "errors",
    "SettingsError": "errors",
    "WarmupError": "errors",
    "Event": "events",
    "EventHook": "events",
    "add_hook": "events",
    "PerformanceOptimizer": "optimizer",
    "create_inference_context": "optimizer",
    "get_performance_optimizer": "optimizer",
    "receipt_of": "optimizer",
    "batched": "runtime.batching",
    "carry_mode": "runtime.inference_mode",
    "Settings": "settings",
    "is_active": "settings",
    "is_testing": "settings",
    "set_active": "settings",
    "testing": "settings",
    "cached_embedding": "voices.decorator",
}

# The one side effect: torch reads PYTORCH_ENABLE_MPS_FALLBACK while it is being imported, so on a Mac this is
# the last moment at which setting it does anything. A value that the user has set stays.
if sys.platform == "darwin" and "torch" not in sys.modules:  # macOS only
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
