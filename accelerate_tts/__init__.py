"""Make an existing PyTorch text-to-speech backend start warm, run faster and stay correct.

Two decorators on a backend that exists already, and a context manager for scripts::

    from accelerate_tts import fast_inference, inference, optimized_model, receipt_of

    class Backend:
        @optimized_model(warmup="Hello there.")  # tries each optimisation, keeps what is faster and right, warms up
        def load(self):
            self.model = load_your_model()

        @inference  # no autograd; sync, async, generator or async generator
        def synthesize(self, text):
            return self.model.generate(text)

    backend = Backend()
    backend.load()
    audio = backend.synthesize("Good morning.")
    print(receipt_of(backend))  # what was kept, what was rejected, and why

    with fast_inference():  # no autograd in a block of a script
        audio = backend.model.generate("Good evening.")

By default everything stays exact to rounding. `Settings` or `optimized_model(precision="balanced")` allow more. To
switch it off: `ACCELERATE_TTS_DISABLE=1`, `set_active(False)`, or `with testing():`. To see what happens in service:
`add_hook(function)`. The command `accelerate-tts doctor` looks at the machine.

Importing this package costs a few milliseconds and never imports torch: each name is loaded when it is first used.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

# The public names, by the module that each is defined in. Type checkers read __init__.pyi, which a test compares.
_PUBLIC = {
    "decorators": ("optimized_model", "inference"),
    "context": ("fast_inference",),
    "voices.decorator": ("cached_embedding",),
    "optimizer": ("receipt_of", "PerformanceOptimizer", "get_performance_optimizer", "create_inference_context"),
    "settings": ("Settings", "set_active", "testing"),
    "events": ("add_hook",),
    "errors": (
        "AccelerateTTSError", "ConcurrencyError", "InferenceContextError", "ModelError", "PackError", "ReloadError",
        "SettingsError", "WarmupError",
    ),
}  # fmt: skip
# Public as well, for those who look for them.
_FURTHER = {
    "context": ("own_random",),
    "_version": ("__version__",),
    "settings": ("is_active", "is_testing"),
    "events": ("Event", "EventHook"),
    "metrics": ("Measurement", "measurements"),
    "receipts.receipt": ("Receipt", "StageResult"),
    "runtime.batching": ("batched",),
    "runtime.inference_mode": ("carry_mode",),
    "streaming": ("StreamOptions", "stream"),
    "errors": ("MissingExtraError", "TimeLimitError"),
}
_HOMES = {name: home for homes in (_PUBLIC, _FURTHER) for home, names in homes.items() for name in names}

__all__ = [name for names in _PUBLIC.values() for name in names]  # pyright: ignore[reportUnsupportedDunderAll]

# The one side effect: torch reads PYTORCH_ENABLE_MPS_FALLBACK while it is being imported, so on a Mac this is
# the last moment at which setting it does anything. A value that the user has set stays.
if sys.platform == "darwin" and "torch" not in sys.modules:  # macOS only
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
