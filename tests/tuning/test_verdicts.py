"""Verdicts on close figures: within the budget, of the total, and after a single run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event, Receipt
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import FellBack
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.stages.compile.regional import CompiledBlocksStage, block_stacks, place_of
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.timing import Timing
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, clock_of, tune

X = torch.ones(2, 4)


class Model(nn.Module):
    """Scales its input, and runs a test's callback while it is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.then: Callable[[], object] = int
        self.on_call: Callable[[], object] = int
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.then()
        self.on_call()
        return x * self.weight


def run(stage: Stage, budget: float = 60.0, model: Model | None = None) -> tuple[Model, Receipt]:
    model = model or Model()
    plan = ModelPlan("model", (model,), (Part("part", "model", model),))
    tuning = tune(plan, warmup_calls(X, Loaded(model), "inference"), [stage], DeviceInfo("cpu", "x"), Limits(budget))
    return model, tuning.receipt


def said(timings: list[Timing]) -> Callable[..., Timing]:
    """Stand-in for `compare_speed`: what it finds, one after the other."""

    def compare_speed(run: Any, before: Any, after: Any, *_: Any, **__: Any) -> Timing:
        for switch in (before, after):
            switch()
            run()
        return timings.pop(0)

    return compare_speed


def timing(ratio: float, high: float, pairs: int = 5) -> Timing:
    return Timing(1.0, 1.0 / ratio, ratio, ratio - 0.01, high, pairs)


GOOD = Timing(2.0, 1.0, 2.0, 1.9, 2.1, 5)


@pytest.fixture(autouse=True)
def kept(decide: Any) -> None:
    """The stage is found right and twice as fast."""
    decide(compare=said([GOOD, GOOD]), hopeless=float("inf"))


# --- the total -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timings", "stays"),
    [
        ([timing(1.0, 1.1)], True),
        ([timing(0.99, 0.995)], False),  # beyond doubt, however little it is
        ([timing(0.9, 0.95)], False),
        ([timing(0.99, 1.05), timing(1.2, 1.3)], True),  # in doubt: once more, and that decides
        ([timing(0.99, 1.05), timing(0.99, 1.05)], False),
        ([timing(0.96, 1.05, pairs=1)], True),  # of fewer pairs it takes more
        ([timing(0.96, 0.97, pairs=3)], True),
        ([timing(0.94, 1.05, pairs=3)], False),
    ],
)
def test_a_total_below_one_is_undone(timings: list[Timing], stays: bool, decide: Any, seen: list[Event]) -> None:
    last = timings[-1]
    timings = [GOOD, *timings]
    decide(compare=said(timings))
    model, receipt = run(Stage("stage", then=str))
    (result,) = receipt.stages
    assert not timings, "each was asked for"
    assert (result.kept, model.then is str, receipt.ratio) == (stays, stays, last.ratio if stays else 1.0)
    assert any("pairs only" in note for note in receipt.notes) is (last.pairs < 5)
    fallen = [event.reason for event in seen if isinstance(event, FellBack)]
    assert fallen == ([] if stays else [f"the whole is slower, {last.ratio:.2f}x"])


@pytest.mark.parametrize(
    ("untouched", "tuned", "asked"),
    [(0.0, 0.0, 5), (7.0, 3.5, 3), (12.0, 6.0, None), (12.0, 12.5, 1), (1000.0, 500.0, None), (1000.0, 1100.0, 1)],
)
def test_the_total_is_timed_in_as_many_pairs_as_the_budget_allows(
    untouched: float, tuned: float, asked: int | None, decide: Any
) -> None:
    """The budget is 60 s; passes seem as long as given, and a pair is one pass of each state.

    Where there is time for one pair only, the passes that gave the outputs are that pair, unless the tuned object is
    slower in them.
    """
    pairs: list[int] = []

    offset = [0.0]

    def compare(*given: Any, fewest: int | None = None, **_: Any) -> Timing:
        if fewest is None:  # of the part: the two passes of the whole come next
            passes = iter([untouched, tuned])
            model.on_call = lambda: offset.__setitem__(0, offset[0] + next(passes, 0.0))
        else:
            pairs.append(fewest)
        return GOOD

    decide(compare=compare, clock=clock_of(offset))
    model = Model()
    _, receipt = run(Stage(then=str), model=model, budget=60.0)
    assert pairs == ([] if asked is None else [asked])
    assert model.then is str
    if asked is None:
        assert receipt.before == pytest.approx(untouched, rel=0.01)
        assert receipt.after == pytest.approx(tuned, rel=0.01)
        assert receipt.ratio == pytest.approx(untouched / tuned, rel=0.01)
        assert any("timed in 1 pairs only" in note for note in receipt.notes)


# --- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "slack", "tried"), [(0.0, 2.0, True), (6.0, 2.0, False), (6.0, 60.0, True)])
def test_no_verdict_is_begun_that_the_budget_does_not_allow(
    seconds: float, slack: float, tried: bool, decide: Any
) -> None:
    """Five pairs of two such replays must fit into a budget of 60 s and the slack."""
    offset = [0.0]

    def slow() -> None:
        offset[0] += seconds

    decide(slack=slack, clock=clock_of(offset), not_twice=float("inf"))
    model, receipt = run(Stage(then=slow))
    (result,) = receipt.stages
    assert (result.kept, result.ratio is None) == (tried, not tried)
    if not tried:
        assert result.reason.startswith("not timed: takes 60 s, 4")
        assert result.reason.endswith("s of the tuning budget left")
        assert result.before is not None
        assert result.after is not None
        assert model.then is int


# --- not twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [None, 1])
def test_what_takes_ten_times_as_long_is_not_run_twice(graphs: int | None, decide: Any) -> None:
    """A run that also compiled does not count, since its time says nothing."""
    calls: list[int] = []
    clock = [0.0]

    def slow() -> None:
        calls.append(1)
        clock[0] += 11.0

    decide(clock=clock_of(clock))  # a run of the changed part seems to take 11 s
    _, receipt = run(Stage(then=slow, graphs=graphs), budget=1000.0)
    (result,) = receipt.stages
    if graphs is None:
        assert (result.kept, result.reason) == (False, "far slower at the first look")
        assert len(calls) == 1
        assert result.after == pytest.approx(11.0, abs=1.0)
    else:
        assert result.kept, result.reason


# --- half precision beside a recurrent net -------------------------------------------------------------------------


@pytest.mark.parametrize("carried", [False, True], ids=["layers", "part"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_net_beside_layers_in_bf16_stays_in_fp32(kind: Any, carried: bool) -> None:
    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.memory, self.after = nn.Linear(16, 16), kind(16, 16, batch_first=True), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
            y, state = self.memory(self.before(x))
            return self.after(y), state

    torch.manual_seed(0)
    model = Speaker().eval()
    x = torch.randn(1, 40, 16)
    seen: list[Any] = []
    model.memory.register_forward_hook(lambda _m, given, output: seen.append((given[0].dtype, output[0].dtype)))
    with torch.inference_mode():
        expected, state = model(x)
        change = HalfStage(torch.bfloat16, carried=carried).prepare(Part("part", "encoder", model))
        change.on()
        found, half = model(x)
        rounded = model.before(x)
        change.off()
    assert all(weight.dtype == torch.float32 for weight in model.memory.parameters())
    assert seen[-1][1] == torch.float32
    assert found.dtype == torch.float32
    assert not torch.equal(rounded, model.before(x)), "the layer itself is in bf16"
    states = zip(state, half, strict=True) if isinstance(state, tuple) else [(state, half)]
    for a, b in (*states, (expected, found)):
        assert b.dtype == torch.float32
        assert float((a - b).norm() / a.norm()) < 0.02
    with torch.inference_mode():
        assert torch.equal(model(x)[0], expected)


# --- places in a cache ---------------------------------------------------------------------------------------------


def test_a_block_is_served_at_the_place_that_its_attention_names() -> None:
    """Blocks of another kind lie between those of a row, as in models that mix attention with something else."""

    class Attention(nn.Module):
        def __init__(self, place: int | None) -> None:
            super().__init__()
            self.layer_idx = place

    class Block(nn.Module):
        def __init__(self, place: int | None, name: str) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            if name:
                setattr(self, name, Attention(place))

        def forward(self, hidden_states: Any, past_key_values: Any = None) -> Any:
            return hidden_states

    class Other(Block):
        pass

    blocks = nn.ModuleList([Block(0, "self_attn"), Other(1, "self_attn"), Block(2, "self_attn"), Other(3, "self_attn")])
    model = nn.ModuleDict({"layers": blocks})
    assert CompiledBlocksStage("default").applies(Part("part", "decoder", model)) is None
    assert sorted([place_of(block, number) for number, block in enumerate(row)] for row in block_stacks(model)) == [
        [0, 2], [1, 3],
    ]  # fmt: skip
    assert place_of(Block(7, "attn"), 1) == 7  # as GPT-2 calls it
    assert place_of(Block(None, "attn"), 1) == 1
    assert place_of(Block(0, ""), 1) == 1
