"""What several tests of the engine have in common."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch

from accelerate_tts.engine import capture
from accelerate_tts.engine.measure import Timing, compare_speed
from accelerate_tts.engine.stages import precision


@pytest.fixture
def bf16_is_faster(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """A machine (a stand-in) that computes in bf16, and on which every stage pays off."""
    faster = Timing(before=2.0, after=1.0, ratio=2.0, low=2.0, high=2.0, pairs=5)
    decide(compare=lambda *_args, **_kwargs: faster, looks=False, unworthy=lambda *_given: None)
    monkeypatch.setattr(precision, "half_dtypes", lambda _device: (torch.bfloat16,))
    monkeypatch.setattr("accelerate_tts.engine.stages.half_dtypes", lambda _device: (torch.bfloat16,), raising=False)


class SteadyClock:
    """Stands in for the module `time`: it goes on when somebody sleeps, and by a microsecond when it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0)  # whoever interrupts it is another thread


@pytest.fixture
def steady_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, decide: Any) -> SteadyClock:
    """For the engine and for the test's module, only what sleeps takes time: neighbours' work decides no verdict."""
    clock = SteadyClock()
    decide(clock=clock.perf_counter, compare=partial(compare_speed, clock=clock.perf_counter))
    for module in (capture, request.module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="session")
def layered_caches() -> None:
    """Skips where caches have no layers: there the fused blocks grow them by themselves, which test_pairs.py shows."""
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "DynamicLayer"):
        pytest.skip("caches of this release have no layers (transformers before 4.54): these stages decline there")
