"""Settings that torch keeps for each thread, carried from a caller to the thread that computes for it.

They are autocast, the default device, and the device and stream of a GPU. The inference mode and random numbers of a
caller's own are carried by `carry_mode`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import overrides
from torch.utils._device import DeviceContext

from accelerate_tts.device.detect import current_devices

_KINDS = ("cpu", "cuda", "xpu", "mps")


class CallerSettings:
    """Settings of the thread that makes this object."""

    def __init__(self) -> None:
        modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._devices = [mode for mode in modes if isinstance(mode, DeviceContext)]
        kinds = [kind for kind in _KINDS if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]
        self._keeps_casts = torch.is_autocast_cache_enabled()
        modules = [(getattr(torch, device.type), device) for device in current_devices()]
        self._streams = [(module, device, module.current_stream(device)) for module, device in modules]

    @contextmanager
    def entered(self) -> Generator[None, None, None]:
        """Scope of another thread, which has none of its own."""
        with ExitStack() as scope:
            for module, device, stream in self._streams:
                scope.enter_context(module.device(device))
                scope.enter_context(module.stream(stream))
            # Not entered: that would also set a variable of the process, which is its owner's to put back.
            for mode in self._devices:
                overrides._push_mode(mode)  # type: ignore[no-untyped-call]
                scope.callback(overrides._pop_mode)
            for kind, dtype in self._autocast:
                scope.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._keeps_casts))
            yield
