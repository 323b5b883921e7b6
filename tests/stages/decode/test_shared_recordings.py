"""Recorded steps of several threads in one replay: bit for bit what each has alone, as far as a CPU can show it.

What is recorded is run again, not replayed (`Reruns`), so nothing here says that a device computes the same. A CPU's
products differ in bits by the number of rows, as a device's may. So linear layers and attention compute row by row here.
The last tests leave upstream's operators as they are.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from accelerate_tts import Event
from accelerate_tts.events import DecodePasses, FellBack, NotApplied
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode import cuda_graph
from accelerate_tts.stages.decode.cuda_graph import Bounds, CapturedStepStage
from accelerate_tts.stages.decode.shared_steps import SharedSteps
from accelerate_tts.stages.decode.static_step import JoinedSlots, StaticStep
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("layered_caches", "one_thread")

WIDTH, LAYERS = 64, 2  # heads of 16 numbers: no vector of the CPU is in part of one row
LONG = 60.0  # seconds after which a thread counts as stuck
NUMBERS = (1, 2, 4)


def each_row(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compute each row as if it were alone, as a kernel for few rows may."""

    def by_rows(x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        rows = x.shape[0]

        def row(value: Any, number: int) -> Any:
            is_batch = isinstance(value, torch.Tensor) and value.dim() == x.dim() == 4 and value.shape[0] == rows
            return value[number : number + 1] if is_batch else value

        return torch.cat([
            function(x[at : at + 1], *(row(value, at) for value in others), **{n: row(v, at) for n, v in named.items()})
            for at in range(rows)
        ])  # fmt: skip

    return by_rows


@pytest.fixture(autouse=True)
def attention_by_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plain" not in request.keywords:
        monkeypatch.setattr(
            nn.functional, "scaled_dot_product_attention", each_row(nn.functional.scaled_dot_product_attention)
        )


class ByRows(nn.Module):
    """Members of a linear layer that computes each row by itself."""

    base: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return each_row(partial(self.base.forward, self))(x)


def by_rows(model: Any) -> Any:
    for inner in model.modules():
        base: Any = type(inner)
        if base.__name__ in {"Linear", "Conv1D"}:
            inner.__class__ = type("ByRows", (ByRows, base), {"base": base})
    return model


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=50, n_positions=40, **options)
    return transformers.GPT2Model(config).eval()


def reruns(device: torch.device) -> Reruns:
    return Reruns(device, watched=False)


class Shared(NamedTuple):
    """A model whose steps are recorded, and the meeting point of its callers."""

    model: Any
    change: Any
    steps: SharedSteps
    passes: list[int]
    """Number of callers of each pass of several."""

    def share(self, numbers: tuple[int, ...] = NUMBERS, rows: int = 1, **rules: Any) -> None:
        def counted(blocks: Any, calls: Any) -> Any:
            self.passes.append(len(calls))
            return self.steps.usual.together(blocks, calls)

        self.steps.usual.arrange(numbers, rows)
        most = max(numbers) * rows
        self.steps.rules = self.steps.usual._replace(
            **{"window": 100.0, "most_rows": most, "together": counted, **rules}
        )
        self.steps.is_on = True


def captured(model: Any, bounds: Bounds | None = None, recorder: Callable[[torch.device], Any] = reruns) -> Shared:
    change: Any = CapturedStepStage(recorder, bounds=bounds).prepare(Part("model", "decoder", model))
    change.on()
    (steps,) = change.steps
    return Shared(model, change, steps, [])


class Caller(NamedTuple):
    """One caller: its inputs, and what it does on the way."""

    seed: int = 0
    rows: int = 1
    prompt: int = 3
    count: int = 6
    padded: bool = False
    crops: tuple[int, ...] = ()
    """Tokens before which it takes one back."""
    reorders: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    leaves: int = 99
    """Token at which it goes, without another word."""
    pauses: tuple[int, ...] = ()


def speak(model: Any, caller: Caller, before: Callable[[int], object] = bool) -> list[torch.Tensor]:
    """One caller's whole loop. Returns all states and the cache."""
    generator = torch.Generator().manual_seed(caller.seed)
    past, found, length = None, [], 0
    asked: dict[str, Any] = {}
    with torch.inference_mode():
        for number in range(min(caller.count + 1, caller.leaves)):
            x = torch.randn(caller.rows, 1 if number else caller.prompt, WIDTH, generator=generator)
            before(number)
            if number in caller.pauses:
                time.sleep(0.002)
            if number and number in caller.crops and length > 1:
                past.crop(length - 1)
                length -= 1
            if number and number in caller.reorders:
                past.reorder_cache(torch.arange(caller.rows).flip(0))
            if number and number in caller.copies:
                past = copy.deepcopy(past)
            length += x.shape[1]
            if caller.padded:
                asked["attention_mask"] = torch.ones(caller.rows, length, dtype=torch.long)
                asked["attention_mask"][:1, :1] = 0
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True, **asked)
            past = out.past_key_values
            found.append(out.last_hidden_state)
    found += [tensor for layer in getattr(past, "layers", ()) for tensor in (layer.keys, layer.values)]
    return [tensor.clone() for tensor in found]


def equal(one: Any, other: Any) -> bool:
    if isinstance(other, BaseException):
        raise other
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own; return the results, or the exceptions."""
    found: list[Any] = [None] * len(works)

    def work(number: int) -> None:
        torch.set_num_threads(1)
        try:
            found[number] = works[number]()
        except BaseException as error:  # given to the test
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads), "a caller is stuck"
    return found


def together(shared: Shared, callers: list[Caller]) -> list[Any]:
    """Run callers that begin at the same time."""
    meet = threading.Barrier(len(callers))
    begin = lambda number: number or meet.wait(LONG)  # noqa: E731
    return at_once([partial(speak, shared.model, caller, begin) for caller in callers])


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: by_rows(llama()),
    "GPT-2": lambda: by_rows(gpt2()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 2])
def test_callers_together(name: str, rows: int, seen: list[Event]) -> None:
    model = MODELS[name]()
    callers = [Caller(seed, rows, 2 + 5 * seed, 8, padded=seed == 2) for seed in range(4)]
    plain = [speak(model, caller) for caller in callers]
    shared = captured(model)
    shared.share(rows=rows)
    alone = [speak(model, caller) for caller in callers]
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for one, other in zip(plain, alone, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    found = together(shared, callers)
    print([torch.allclose(a, b, atol=1e-4) for one, other in zip(plain, found) for a, b in zip(one, other)])
    print(shared.passes, [str(e) for e in seen])
    assert all(equal(one, other) for one, other in zip(alone, found, strict=True))
    assert shared.passes, "of 32 steps, some are shared"
    assert not [event for event in seen if event.degraded]
