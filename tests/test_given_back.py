"""Ctrl-C at every place of a scope that changes the process: it is given back."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from interrupting import Interrupting
from torch import nn

from accelerate_tts import events, fast_inference, settings
from accelerate_tts.device import flags
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.plan import Part
from accelerate_tts.registration import Registry
from accelerate_tts.runtime import time_limit
from accelerate_tts.runtime.concurrency import limiter
from accelerate_tts.runtime.drawing import drawing
from accelerate_tts.runtime.guard import gate, guard
from accelerate_tts.runtime.seeding import seeded, warming
from accelerate_tts.stages.compile import inductor
from accelerate_tts.stages.graphs.obstacles import unchanged_attributes
from accelerate_tts.stages.graphs.recorder import is_recording, recording
from accelerate_tts.tuning import capture, disturbance, linear_profile, policy
from accelerate_tts.tuning.fallbacks import fallbacks

FLAG = flags.environment("ACCELERATE_TTS_A_TEST")
MODEL = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
PART = Part("part", "other", MODEL)
ENTRIES: Registry[int] = Registry("accelerate_tts.device.kinds", "")
GATE = gate.Gate(lambda: None, lambda: None, 0.1, lambda _why: None)
SCOPES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "fast_inference": fast_inference,
    "fast_inference, no_grad": lambda: fast_inference(mode="no_grad"),
    "flags.holding": lambda: flags.holding([(FLAG, "1"), (flags.TORCH_THREADS, 1)]),
    "testing": settings.testing,
    "isolated events": events.isolated,
    "registry": lambda: ENTRIES.scope(two=2),
    "seeded": lambda: seeded("cpu", watched=True),
    "drawing": drawing,
    "watchdog_policy": lambda: time_limit.watchdog_policy(time_limit.WatchdogPolicy()),
    "time_limit": lambda: time_limit.time_limit(60.0, "a test"),
    "one_thread": disturbance.one_thread,
    "tuning_policy": lambda: policy.tuning_policy(policy.TuningPolicy()),
    "linear_work": lambda: linear_profile.linear_work((MODEL,)),
    "watch": lambda: capture.watch((PART,), "cpu"),
    "outputs of a method": lambda: capture.outputs_of(Part("part", "other", MODEL, method="forward")),
    "time_modules": lambda: capture.time_modules((MODEL,), "cpu"),
    "fallbacks": fallbacks,
    "unchanged_attributes": lambda: unchanged_attributes(MODEL),
    "recording": recording,
    "compiled_by": lambda: inductor.compiled_by(lambda graph, _inputs, **_options: graph),
    "retrying": guard.retrying,
    "listening": guard.listening,
    "inside_all": guard.inside_all,
    "a wait at a gate": GATE._waits,
}


def process() -> dict[str, Any]:
    """All that the scopes change."""
    limit = getattr(time_limit._here, "limit", None)
    return {
        "flags": sorted(flag.name for flag in flags.held()), "variable": FLAG.save(),
        "threads": torch.get_num_threads(), "inference mode": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(), "testing": settings.is_testing(), "hooks": len(events._hooks),
        "entries": ENTRIES.entries(), "warming": warming.get(), "functions": random.random,
        "seeds": (random.getstate(), torch.get_rng_state().sum()), "modes": torch._C._len_torch_dispatch_stack(),
        "watchdogs": len(time_limit._policies), "limit": None if limit is None else limit(),
        "policies": len(policy._policies), "before": [len(module._forward_pre_hooks) for module in MODEL.modules()],
        "after": [len(module._forward_hooks) for module in MODEL.modules()], "recording": is_recording(),
        "attributes": [sorted(vars(module)) for module in MODEL.modules()], "compilers": len(inductor._compilers),
        "retrying": guard._retrying.get(), "within": gate.WITHIN.get(), "listeners": len(guard._listeners.get()),
        "permits": limiter.INSIDE.get(), "waiting": len(GATE._waiting),
    }  # fmt: skip


def pass_through(make: Callable[[], AbstractContextManager[Any]], tracer: Interrupting | None) -> str:
    sys.settrace(tracer)
    try:
        with make():
            pass
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        sys.settrace(None)
    return "returned"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has other instructions for a call")
@pytest.mark.parametrize("name", SCOPES)
def test_ctrl_c_at_any_place_of_a_scope_gives_back_what_it_took(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = get_performance_optimizer()
    monkeypatch.setattr(optimizer, "call_flags", lambda: [(FLAG, "1"), (flags.TORCH_THREADS, 1)])
    make = SCOPES[name]
    pass_through(make, None)  # imports all
    whole = Interrupting()
    assert pass_through(make, whole) == "returned"
    faults, tried = [], 0
    for place, times in sorted(whole.places.items()):
        for number in {1, times}:
            before, tracer = process(), Interrupting((place, number))
            ended = pass_through(make, tracer)
            gc.collect()
            tried += bool(tracer.where)
            now = process()
            wrong = [f"{key}: {now[key]} after {value}" for key, value in before.items() if now[key] != value]
            if ended != ("interrupted" if tracer.where else "returned"):
                wrong.append("Ctrl-C was lost")
            faults += [f"{tracer.where}: {one}" for one in wrong]
    assert not faults, "\n".join(faults)
    assert tried >= 1
