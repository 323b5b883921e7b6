"""Seeded scopes: equal random numbers for two runs, without changing the user's random state."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["loading_again", "seeded", "warming"]

warming: ContextVar[bool] = ContextVar("warming", default=False)
"""True during a warm-up pass. Caches of results must then compute calls, since they are timed."""

loading_again: ContextVar[bool] = ContextVar("loading_again", default=False)
"""True while a load function runs again to reload weights. Objects loaded inside it are discarded, and not tuned."""


@contextmanager
def seeded(device_type: str, seed: int = 0) -> Generator[None, None, None]:
    """Seed torch (CPU and device), Python and, if loaded, NumPy; restore their states at the end.

    NumPy is included since models use it at inference, too: transformers' VITS draws its layer drop from it.
    """
    import torch

    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    python_state = random.getstate()
    devices = range(torch.cuda.device_count()) if device_type == "cuda" else ()
    mps_state = torch.mps.get_rng_state() if device_type == "mps" else None
    xpu_states = torch.xpu.get_rng_state_all() if device_type == "xpu" else None
    told = warming.set(True)
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
            yield
        finally:
            warming.reset(told)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
            if xpu_states is not None:
                torch.xpu.set_rng_state_all(xpu_states)
