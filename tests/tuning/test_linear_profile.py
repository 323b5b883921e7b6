"""Share of a part's linear work with few rows, by which stages for few rows are tried."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.stages.base import LEAST_FEW_ROWS
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.linear_profile import linear_work
from accelerate_tts.tuning.tune import find
from accelerate_tts.tuning.warmup import Loaded, warmup_calls


class Estimator(nn.Module):
    """Model like a flow estimator: the embedding of a step has one or two rows, everything else hundreds."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(64, 64)
        self.wide = nn.Linear(64, 256)
        self.back = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.wide(x)) + self.time(x[:1, :1])


@pytest.mark.parametrize(("rows", "expected"), [(1, 1.0), (8, 1.0), (16, 1 / 3), (800, 1 / 101)])
def test_the_share(rows: int, expected: float) -> None:
    """Work counts in readings of a weight, and a weight by its size: (2 x 64 x 256) to (64 x 64)."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with linear_work((model,)) as work, torch.no_grad():
        model[0](torch.ones(1, 64))
        model[1](torch.ones(rows, 64))
    assert work.share_of_few(model) == pytest.approx(expected)
    assert work.share_of_few(model[0]) == 1.0
    assert not model[0]._forward_pre_hooks


def test_what_was_never_seen_may_be_tried() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    with linear_work((model,)) as work:
        model[1](torch.tensor([1]))
    assert work.share_of_few(model) == 1.0


@pytest.mark.parametrize(("rows", "tried"), [(2, True), (4000, False)])
def test_stages_for_few_rows_are_tried_where_there_are_some(rows: int, tried: bool) -> None:
    model = Estimator().eval()
    x = torch.ones(1, rows, 64)
    plan = ModelPlan("estimator", (model,), (Part("estimator", "estimator", model),))
    findings = find(
        plan, warmup_calls(x, Loaded(model), "inference"), [FewRowsStage()], DeviceInfo("cpu", "test"), Limits(20.0)
    )
    assert bool(findings.receipt().stages) == tried
    (part,) = findings.parts
    assert (part.few_rows >= LEAST_FEW_ROWS) == tried
    assert (SkinnyStage("fp32").applies(part) is None) == tried
