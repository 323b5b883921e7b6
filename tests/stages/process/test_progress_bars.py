"""Progress bars of upstream's loops: on a terminal as ever, in a service not at all."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import tqdm
from torch import nn

from accelerate_tts import get_performance_optimizer, optimized_model, receipt_of
from accelerate_tts.stages.process.progress_bars import QuietBars

SOURCE = """
import torch
from torch import nn
from tqdm import tqdm

class Loop(nn.Linear):
    def forward(self, x, file=None, **options):
        for _ in tqdm(range(3), desc="Sampling", file=file, **options):
            x = super().forward(x)
        return x
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def upstream() -> Iterator[Any]:
    module = types.ModuleType("an_upstream_with_bars")
    sys.modules[module.__name__] = module
    exec(SOURCE, vars(module))  # noqa: S102 - a package of its own, of which nothing is left
    yield module
    del sys.modules[module.__name__]


def drawn(model: nn.Module, stream: io.StringIO | None = None, **options: Any) -> str:
    stream = stream or io.StringIO()
    model(torch.ones(1, 2), file=stream, **options)
    return stream.getvalue()


def test_a_service_has_no_bars_and_a_terminal_has(upstream: Any) -> None:
    model = upstream.Loop(2, 2)
    assert "Sampling" in drawn(model), "upstream draws it into a log"
    change = QuietBars([nn.Sequential(model)])
    assert change.modules == [upstream.__name__]
    change.on()
    assert not drawn(model)
    assert "Sampling" in drawn(model, Terminal())
    assert "Sampling" in drawn(model, disable=False), "somebody asked for it"
    assert isinstance(upstream.tqdm(range(3), file=io.StringIO()), tqdm.tqdm)
    change.off()
    assert upstream.tqdm is tqdm.tqdm


def test_the_last_of_two_gives_them_back(upstream: Any) -> None:
    one, other = (QuietBars([upstream.Loop(2, 2)]) for _ in range(2))
    for change in (one, one, other):
        change.on()
    one.off()
    one.off()
    assert upstream.tqdm is not tqdm.tqdm
    other.off()
    assert upstream.tqdm is tqdm.tqdm


def test_a_tuned_model_is_quiet_until_it_is_undone(upstream: Any) -> None:
    @optimized_model(warmup=lambda model: model(torch.ones(1, 2), file=io.StringIO()))
    def load() -> nn.Module:
        return upstream.Loop(2, 2).eval()  # type: ignore[no-any-return]

    model = load()
    assert not drawn(model)
    receipt = receipt_of(model)
    assert receipt is not None
    assert f"progress bars of {upstream.__name__} are drawn on terminals only" in receipt.notes
    get_performance_optimizer().undo(model)
    assert "Sampling" in drawn(model)


def test_other_code_is_left_alone() -> None:
    assert QuietBars([nn.Linear(1, 1)]).modules == []
