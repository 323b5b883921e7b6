"""dynamo's settings apply to our calls only: not to other threads, nor to the user's own `torch.compile`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event
from accelerate_tts.events import FellBack, Recompiled
from accelerate_tts.stages.compile import inductor
from accelerate_tts.stages.compile.whole import CompiledCall
from doubles import Repeats

NAMES = [name for name in ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit", "error_on_recompile")
         if hasattr(torch._dynamo.config, name)]  # fmt: skip


@pytest.fixture(params=["this release", "settings of the process"])
def model(request: pytest.FixtureRequest, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> Repeats:
    """A module that dynamo alone compiles; also as releases need it whose settings are the process's."""
    if request.param == "settings of the process":
        monkeypatch.setattr(inductor, "settings_are_the_threads", lambda: False)
    torch.manual_seed(0)
    return Repeats().eval()


@pytest.fixture
def call(model: Repeats) -> CompiledCall:
    made = CompiledCall(model, "steps", "default")
    made.on()
    return made


def settings() -> list[Any]:
    return [getattr(torch._dynamo.config, name) for name in NAMES]


def elsewhere() -> list[Any]:
    """The settings as another thread sees them."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(settings()))
    thread.start()
    thread.join()
    return found


@torch.no_grad()
def test_no_other_thread_is_told(model: Repeats) -> None:
    before, during = settings(), []

    def compiler(*given: Any) -> Any:
        run = inductor.compile_function(*given)
        return lambda *args, **kwargs: during.append(elsewhere()) or run(*args, **kwargs)

    call = CompiledCall(model, "steps", "default", compiler=compiler)
    call.on()
    call(torch.ones(2, 4), 1)
    call.end_warmup()
    call(torch.ones(2, 4), 1)
    call(torch.ones(2, 4), 2)
    assert len(during) == 4, "the new number of steps is asked for twice: strictly, and then to be compiled"
    assert all(seen == before for seen in during)
    assert settings() == before


@torch.no_grad()
def test_a_sealed_call_is_never_compiled_without_a_word(model: Repeats, call: CompiledCall, seen: list[Event]) -> None:
    plain = Repeats().eval()
    plain.load_state_dict(model.state_dict())
    inputs = torch.ones(2, 4)
    call(inputs, 1)
    call.end_warmup()
    for steps in (1, 2, 2, 1, 3):
        torch.testing.assert_close(model(inputs, steps), plain(inputs, steps))
    assert call.graphs == 3
    assert [event.graphs for event in seen if isinstance(event, Recompiled)] == [2, 3]
    assert not [event for event in seen if isinstance(event, FellBack)]


@torch.no_grad()
def test_at_the_limit_it_is_said(model: Repeats, call: CompiledCall, seen: list[Event]) -> None:
    inputs = torch.ones(2, 4)
    for steps in range(1, 12):
        model(inputs, steps)
    limit = getattr(torch._dynamo.config, "recompile_limit", None) or torch._dynamo.config.cache_size_limit
    assert call.graphs == limit
    (said,) = [event for event in seen if isinstance(event, FellBack)]
    assert "at further lengths" in said.stage


class Broken(nn.Module):
    """dynamo leaves it out, and compiles what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.inner(x)


@torch.no_grad()
def test_what_dynamo_leaves_out_is_no_miss(
    call: CompiledCall, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    del call
    module = Broken().eval()
    broken = CompiledCall(module, "broken", "default")
    inputs = torch.ones(2, 4)
    expected = module(inputs)
    broken.on()
    broken(inputs)
    broken.end_warmup()
    graphs = broken.graphs
    for _ in range(3):
        torch.testing.assert_close(module(inputs), expected)
    assert broken.graphs == graphs
    assert not [event for event in seen if isinstance(event, (FellBack, Recompiled))]
