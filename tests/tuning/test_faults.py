"""Faults of a stage at any point: the object works, untouched or better, and the receipt reports the fault."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from accelerate_tts import Event, Receipt
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import FellBack, Trying
from accelerate_tts.plan import PROCESS, ModelPlan, Part
from accelerate_tts.settings import Precision
from accelerate_tts.stages.compile.whole import CompileStage
from accelerate_tts.tuning.findings import Tuning
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, tune

pytestmark = pytest.mark.usefixtures("steady_clock")

CPU = DeviceInfo("cpu", "test")
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
SLOW = 0.02  # seconds of the steady clock


class Slow(nn.Module):
    """Waits as long as it is told, and computes what it is told."""

    def __init__(self, seconds: float = SLOW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)
        self.seconds = seconds
        self.then: Callable[[torch.Tensor], Any] | None = None
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        time.sleep(self.seconds)
        y = self.linear(x)
        return y if self.then is None else self.then(y)


@pytest.fixture(autouse=True)
def five_pairs(decide: Any) -> Iterator[None]:
    """Compare as little as the engine allows, on one thread: on a busy machine two threads wait for each other."""
    decide(comparison=0.05, total=0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(
    model: nn.Module, *stages: Any, budget: float = 60.0, precision: Precision = "exact", warmup: Any = X
) -> Tuning:
    plan = ModelPlan("model", (model,), (Part("slow", "model", model),))
    return tune(plan, warmup_calls(warmup, Loaded(model), "inference"), stages, CPU, Limits(budget, precision))


class Before:
    """State of a model, to be compared with a later one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.found = self.state()

    def state(self) -> Any:
        model = self.model
        with torch.no_grad():
            output = nn.functional.linear(X, model.linear.weight, model.linear.bias)
            assert torch.equal(model(X), output)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return type(model), model.seconds, model.then, model._compiled_call_impl, list(model._forward_hooks), weights

    def assert_untouched(self) -> None:
        *now, weights = self.state()
        *then, before = self.found
        assert now == then
        assert weights.keys() == before.keys()
        assert all(torch.equal(weights[name], before[name]) for name in weights)


def raising(error: BaseException, number: int = 0) -> Callable[[], None]:
    """A function that raises at its `number`-th call, and at all later ones."""
    calls = [0]

    def fault() -> None:
        calls[0] += 1
        if calls[0] > number:
            raise error

    return fault


def saved(tuning: Tuning) -> Receipt:
    """The receipt, which must be fit to be saved and shown."""
    receipt = tuning.receipt
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert str(receipt)
    return receipt


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found"),
    RecursionError("maximum recursion depth exceeded"),
    ValueError(""),
]
POINTS = ("applies", "prepare", "on", "run")


# --- exceptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_fault_costs_the_stage_and_nothing_else(error: Exception, seen: list[Event]) -> None:
    model = Slow()
    before = Before(model)
    bad = [Stage(f"bad: {point}", {point: raising(error)}, seconds=0.0) for point in POINTS]
    tuning = run(model, *bad, Stage("good", seconds=0.0))
    *failed, good = saved(tuning).stages
    assert [result.stage for result in failed] == [stage.name for stage in bad]
    assert all(result.reason.startswith(f"failed: {type(error).__name__}") for result in failed)
    assert good.kept
    assert [event.stage for event in seen if isinstance(event, FellBack)] == [stage.name for stage in bad]
    assert model.seconds == 0.0
    tuning.undo()
    before.assert_untouched()


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_a_fault_in_a_later_run_while_it_is_timed(number: int) -> None:
    """The first run is the comparison, the second the first look; the others are timed in pairs."""
    model = Slow()
    before = Before(model)
    receipt = saved(run(model, Stage(faults={"run": raising(MemoryError("late"), number)}, seconds=0.0)))
    assert receipt.stages[0].reason == "failed: MemoryError: late"
    assert not receipt.kept
    before.assert_untouched()


class Public:
    """A warm-up that knows when it runs: parts by themselves are run without it, the whole is not."""

    def __init__(self, error: BaseException, number: int = 0) -> None:
        self.error = error
        self.left = number
        self.open = False

    def __call__(self, model: nn.Module) -> Any:
        self.open = True
        try:
            return model(X)
        finally:
            self.open = False

    def fault(self) -> None:
        """Raise in the passes of the whole but the first ones."""
        if self.open:
            self.left -= 1
            if self.left < 0:
                raise self.error


def test_an_exact_change_that_raises_in_the_whole_is_undone_alone(seen: list[Event]) -> None:
    model = Slow()
    public = Public(MemoryError("late"))
    stages = Stage("good", seconds=0.01), Stage("bad", {"run": public.fault}, seconds=0.0)
    receipt = saved(run(model, *stages, warmup=public))
    assert [result.reason for result in receipt.stages if not result.kept] == [
        "undone: the whole is wrong: MemoryError: late"
    ]
    assert [result.stage for result in receipt.kept] == ["good"]
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["bad of slow"]


@pytest.mark.parametrize("number", [1, 4])
def test_a_fault_in_a_pass_of_the_whole_undoes_everything(number: int, seen: list[Event]) -> None:
    model = Slow()
    before = Before(model)
    public = Public(MemoryError("late"), number)
    stages = Stage("good", seconds=0.01), Stage("bad", {"run": public.fault}, seconds=0.0)
    given_up(saved(run(model, *stages, warmup=public)), seen)
    before.assert_untouched()


def test_a_fault_in_sealing_undoes_everything(seen: list[Event]) -> None:
    model = Slow()
    before = Before(model)
    stages = Stage("good", seconds=0.01), Stage("bad", {"end_warmup": raising(MemoryError("late"))}, seconds=0.0)
    given_up(saved(run(model, *stages)), seen)
    before.assert_untouched()


def given_up(receipt: Receipt, seen: list[Event]) -> None:
    assert [result.reason for result in receipt.stages] == ["undone: MemoryError: late"] * 2
    assert receipt.notes == ("tuning was given up: MemoryError: late",)
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["everything"]


def once(error: BaseException, number: int = 0) -> Callable[[], None]:
    """A function that raises at its `number`-th call only."""
    calls = [0]

    def fault() -> None:
        calls[0] += 1
        if calls[0] == number + 1:
            raise error

    return fault


def test_a_fault_in_switching_off_is_not_the_end_of_it(seen: list[Event]) -> None:
    """A rejected change is switched off although that raises once, and earlier changes stay."""
    model = Slow()
    before = Before(model)
    bad = Stage("bad", {"off": once(MemoryError("late"))}, seconds=0.0, then=nan)
    tuning = run(model, Stage("good", seconds=0.0), bad)
    assert [(result.stage, result.kept) for result in saved(tuning).stages] == [("good", True), ("bad", False)]
    assert tuning.receipt.stages[1].reason == "failed: MemoryError: late"
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["bad"]
    assert (model.seconds, model.then) == (0.0, None)
    tuning.undo()
    before.assert_untouched()


def test_a_fault_in_undoing_is_raised_when_all_is_undone() -> None:
    model = Slow()
    before = Before(model)
    second = Stage("second", seconds=0.0)
    tuning = run(model, Stage("first", seconds=0.01), second)
    assert [kept.stage for kept in tuning.kept] == ["first", "second"]
    second.faults["off"] = once(error := MemoryError("late"))
    with pytest.raises(MemoryError) as caught:
        tuning.undo()
    assert caught.value is error
    before.assert_untouched()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    error=st.sampled_from(ERRORS),
    point=st.sampled_from([*POINTS, "end_warmup"]),
    number=st.integers(0, 30),
    first=st.booleans(),
)
def test_any_fault_at_any_call(error: Exception, point: str, number: int, first: bool) -> None:
    model = Slow(0.002)
    before = Before(model)
    bad, good = Stage("bad", {point: raising(error, number)}, seconds=0.0), Stage("good", seconds=0.001)
    tuning = run(model, *((bad, good) if first else (good, bad)))
    receipt = saved(tuning)
    kept = {result.stage for result in receipt.kept}
    assert (model.seconds < 0.002) == bool(kept)
    failed = [result for result in receipt.stages if type(error).__name__ in result.reason]
    assert not any(result.kept for result in failed)
    tuning.undo()
    before.assert_untouched()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(("point", "number"), [*((point, 0) for point in POINTS), ("run", 3), ("end_warmup", 0)])
def test_an_interrupt_goes_on_and_leaves_the_model_untouched(error: BaseException, point: str, number: int) -> None:
    model = Slow()
    before = Before(model)
    with pytest.raises(type(error)) as caught:
        run(model, Stage("good", seconds=0.01), Stage("bad", {point: raising(error, number)}, seconds=0.0))
    assert caught.value is error
    before.assert_untouched()


def test_an_interrupt_in_a_pass_of_the_whole() -> None:
    model = Slow()
    before = Before(model)
    public = Public(KeyboardInterrupt(), 2)
    with pytest.raises(KeyboardInterrupt):
        run(model, Stage("good", seconds=0.01), Stage("bad", {"run": public.fault}, seconds=0.0), warmup=public)
    before.assert_untouched()


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_missing_compiler_is_named_in_the_receipt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Event]
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Slow()
    model.then = torch.sin
    expected = model(X)
    with config.patch({"cpp.cxx": (None, "/nowhere/g++"), "compile_threads": 1}):
        receipt = saved(run(model, CompileStage("default"), Stage("good", seconds=0.0)))
    good, compiled = receipt.stages  # what takes long comes last
    assert (compiled.stage, compiled.kept, good.kept) == ("torch.compile", False, True)
    assert compiled.reason.startswith("failed: InvalidCxxCompiler")
    assert any(isinstance(event, FellBack) and "InvalidCxxCompiler" in event.reason for event in seen)
    assert model._compiled_call_impl is None
    assert torch.equal(model(X), expected)


# --- results -------------------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nan": (lambda y: y * float("nan"), "not finite"),
    "infinite": (lambda y: y.clone().index_fill_(0, torch.tensor([1]), float("inf")), "not finite"),
    "shorter": (lambda y: y[:, :-1], "shape (4, 31)"),
    "deeper": (lambda y: y.unsqueeze(0), "shape (1, 4, 32)"),
    "double": (lambda y: y.double(), "torch.float64"),
    "bf16": (lambda y: y.bfloat16(), "torch.bfloat16"),
    "twice": (lambda y: (y, y), "2 tensors instead of 1"),
    "nothing": (lambda _: None, "0 tensors instead of 1"),
    "another layout": (lambda y: y.t().contiguous().t(), "memory layout"),
    "off": (lambda y: y + 1e-3, "error "),
    "swapped": (lambda y: y[torch.tensor([1, 0, 2, 3])], "error "),
    "silent": (torch.zeros_like, "error 1.0e+00"),
}


def test_a_wrong_result_is_dropped_and_said() -> None:
    model = Slow()
    before = Before(model)
    bad = [Stage(name, then=then, seconds=0.0) for name, (then, _) in WRONG.items()]
    tuning = run(model, *bad, Stage("good", seconds=0.0))
    *dropped, good = saved(tuning).stages
    for result in dropped:
        assert result.verdict.startswith("rejected: ")
        assert result.before is None, "it was not timed"
        assert WRONG[result.stage][1] in result.reason
    assert good.kept
    assert tuning.receipt.error == 0.0
    tuning.undo()
    before.assert_untouched()


def test_a_stage_that_is_wrong_only_now_and_then() -> None:
    """A stage that is right in its own comparison and wrong later is undone by the check of the whole."""
    calls: list[int] = []

    def then(y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return y if len(calls) == 1 else y + 1.0

    model = Slow()
    before = Before(model)
    receipt = saved(run(model, Stage(then=then, seconds=0.0)))
    assert "undone: the whole is wrong: error" in receipt.stages[0].reason
    before.assert_untouched()


# --- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["prepare", "on", "run"])
def test_a_stage_that_hangs_over_the_budget_is_given_up(point: str) -> None:
    model = Slow()
    before = Before(model)
    hanging = Stage("hanging", {point: lambda: time.sleep(0.6)}, seconds=0.0)
    receipt = saved(run(model, hanging, after := Stage("after", seconds=0.0), budget=0.5))
    assert [result.reason for result in receipt.stages] == [
        "stopped: over the tuning budget",
        "not tried: the tuning budget is spent",
    ]
    assert not after.prepared
    before.assert_untouched()


@pytest.mark.parametrize("point", ["prepare", "run"])
def test_a_stage_that_never_comes_back_is_interrupted(point: str, decide: Any, seen: list[Event]) -> None:
    def never() -> None:
        while True:
            time.sleep(0.01)

    decide(hangs=0.1)
    model = Slow()
    before = Before(model)
    receipt = saved(run(model, Stage("endless", {point: never}, seconds=0.0), budget=0.5))
    assert receipt.stages[0].reason == "stopped: over the tuning budget, interrupted"
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["endless"]
    before.assert_untouched()


def test_a_stage_that_begins_to_hang_while_it_is_timed_is_slower() -> None:
    calls: list[int] = []

    def hang() -> None:
        calls.append(1)
        if len(calls) > 2:
            time.sleep(3 * SLOW)

    model = Slow()
    receipt = saved(run(model, Stage(faults={"run": hang}, seconds=0.0)))
    assert receipt.stages[0].reason.startswith("slower, ")
    assert model.seconds == SLOW


def test_what_was_kept_before_the_budget_ran_out_stays() -> None:
    model = Slow()
    hanging = Stage("hanging", {"on": lambda: time.sleep(1.6)}, seconds=0.0)
    receipt = saved(run(model, Stage("good", seconds=0.0), hanging, budget=1.5))
    assert [result.kept for result in receipt.stages] == [True, False]
    assert "over the tuning budget" in receipt.stages[1].reason
    assert model.seconds == 0.0


def test_the_check_of_the_whole_has_its_time_within_the_budget() -> None:
    """A third of what is left after the first passes at most: of 1.8 s, a stage that takes 1.4 s is not begun."""
    model, stage = Slow(0.3), Stage(seconds=0.0)
    stage.cost = 1.4
    receipt = saved(run(model, stage, budget=2.4))
    assert receipt.stages[0].reason.startswith("not tried: takes about 1 s, ")
    assert saved(run(Slow(0.01), stage, budget=2.4)).stages[0].kept


def test_a_stage_that_costs_more_than_is_left_is_not_begun(seen: list[Event]) -> None:
    costly, cheap = Stage("costly", seconds=0.0), Stage("cheap", seconds=0.0)
    costly.cost = 100.0
    receipt = saved(run(Slow(), costly, cheap, budget=60.0))
    assert receipt.stages[0].kept
    assert receipt.stages[1].reason.startswith("not tried: takes about 100 s, ")
    assert not costly.prepared
    # Perhaps twice: on a busy machine the first verdict may be unsure.
    assert {event.stage for event in seen if isinstance(event, Trying)} == {"cheap"}
    costly.cost = 30.0
    assert saved(run(Slow(), costly, budget=60.0)).stages[0].kept


def test_what_is_cheap_is_tried_on_every_part_before_anything_is_compiled(steady_clock: Any) -> None:
    """A budget that is just enough for it: the first compilation takes all that is left."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.estimator, self.vocoder = Slow(), Slow()

        def forward(self, x: torch.Tensor) -> Any:
            return self.vocoder(self.estimator(x))

    def spend() -> None:
        steady_clock.now += 1000.0

    model = Both().eval()
    parts = (Part("estimator", "estimator", model.estimator), Part("vocoder", "vocoder", model.vocoder))
    fold, layout = Stage("fold", seconds=0.01), Stage("layout", seconds=0.0)
    compilation = Stage("compilation", {"prepare": spend}, seconds=0.0)
    compilation.cost = 10.0
    calls = warmup_calls(X, Loaded(model), "inference")
    stages = [fold, layout, compilation]
    receipt = saved(tune(ModelPlan("model", (model,), parts), calls, stages, CPU, Limits(60.0)))
    assert [(result.part, result.stage, result.kept) for result in receipt.stages] == [
        (part, stage.name, stage is not compilation) for part in ("estimator", "vocoder") for stage in stages
    ]
    assert [result.reason for result in receipt.stages if not result.kept] == [
        "stopped: over the tuning budget",
        "not tried: the tuning budget is spent",
    ]


# --- alternatives --------------------------------------------------------------------------------------------------


def test_the_faster_of_a_group_takes_the_place_of_the_other() -> None:
    model = Slow(0.04)
    before = Before(model)
    first, second = Stage("first", group="g", seconds=0.02), Stage("second", group="g", seconds=0.0)
    tuning = run(model, first, second)
    one, two = saved(tuning).stages
    assert (one.kept, one.reason) == (False, "second is faster")
    assert two.kept
    assert " over first (95 %)" in two.reason
    assert two.before is not None
    assert two.before < 0.039  # timed against the other one, not against the untouched part
    assert second.prepared == [("slow", 0.04)]  # made of the untouched part
    assert [kept.stage for kept in tuning.kept] == ["second"]
    assert model.seconds == 0.0
    tuning.undo()
    before.assert_untouched()


def nan(y: torch.Tensor) -> torch.Tensor:
    return y * float("nan")


CHALLENGERS: list[tuple[Stage, str]] = [
    (Stage("slower", group="g", seconds=0.03), "slower than first, "),
    (Stage("hopeless", group="g", seconds=0.3), "slower at the first look"),
    (Stage("wrong", group="g", seconds=0.0, then=nan), "values that are not finite"),
    *(
        (Stage(f"failing: {point}", {point: raising(MemoryError())}, group="g", seconds=0.0), "failed: MemoryError")
        for point in POINTS
    ),
    (Stage("failing while timed", {"run": raising(MemoryError(), 4)}, group="g", seconds=0.0), "failed: MemoryError"),
]


def test_any_other_challenger_leaves_the_incumbent_on(decide: Any) -> None:
    decide(far_behind=float("inf"))  # what that drops is in test_tune

    class Look(Stage):
        """Tries nothing, and notes what the part is when its turn comes."""

        def applies(self, part: Part) -> str | None:
            self.prepared.append((part.module.seconds, part.module.then))
            return "it only looks"

    model, look = Slow(0.04), Look()
    before = Before(model)
    stages = [item for stage, _ in CHALLENGERS for item in (stage, look)]
    tuning = run(model, Stage("first", group="g", seconds=0.01), *stages)
    first, *others = saved(tuning).stages
    assert first.kept
    assert look.prepared == [(0.01, None)] * len(CHALLENGERS)
    for (stage, reason), result in zip(CHALLENGERS, others, strict=True):
        assert (result.stage, result.kept) == (stage.name, False)
        assert result.reason.startswith(reason)
    assert (model.seconds, model.then) == (0.01, None)
    tuning.undo()
    before.assert_untouched()


def test_an_interrupted_challenger_takes_the_incumbent_with_it() -> None:
    model = Slow()
    before = Before(model)
    bad = Stage("second", {"run": raising(KeyboardInterrupt(), 4)}, group="g", seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(model, Stage("first", group="g", seconds=0.01), bad)
    before.assert_untouched()


def test_three_of_a_group_and_one_without() -> None:
    model = Slow(0.04)
    names = ["a", "b", "c"]
    group = [Stage(name, group="g", seconds=s) for name, s in zip(names, [0.02, 0.0, 0.03], strict=True)]
    other = Stage("other", then=lambda y: y)
    tuning = run(model, other, *group)
    kept = {result.stage: result.kept for result in saved(tuning).stages}
    assert (kept["a"], kept["b"], kept["c"]) == (False, True, False)
    assert model.seconds == 0.0
    tuning.undo()
    assert (model.seconds, model.then) == (0.04, None)


def test_groups_of_two_parts_do_not_compete() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Slow(), Slow()

        def forward(self, x: torch.Tensor) -> Any:
            return self.two(self.one(x))

    model = Both().eval()
    parts = (Part("one", "model", model.one), Part("two", "model", model.two))
    calls = warmup_calls(X, Loaded(model), "inference")
    stage = Stage(group="g", seconds=0.0)
    tuning = tune(ModelPlan("model", (model,), parts), calls, [stage], CPU, Limits(60.0))
    assert [(result.part, result.kept) for result in saved(tuning).stages] == [("one", True), ("two", True)]
    tuning.undo()
    assert (model.one.seconds, model.two.seconds) == (SLOW, SLOW)


# --- the whole -----------------------------------------------------------------------------------------------------


class Amplified(Slow):
    """A small error of the part's output is a large error of the speech."""

    tolerant = False

    def speak(self) -> torch.Tensor:
        y = self(X)
        wrong = (y - nn.functional.linear(X, self.linear.weight, self.linear.bias)).abs().max()
        return y if self.tolerant else y + 100.0 * wrong


def test_what_is_not_exact_goes_first_when_the_whole_is_wrong(seen: list[Event]) -> None:
    model = Amplified(0.04)
    before = Before(model)
    exact, rough = Stage("exact", seconds=0.02), Stage("rough", seconds=0.0, then=lambda y: y * 1.005)
    tuning = run(model, exact, rough, precision="balanced", warmup=lambda loaded: loaded.speak())
    receipt = saved(tuning)
    assert [result.kept for result in receipt.stages] == [True, False]
    assert receipt.stages[1].reason.startswith("undone: the whole is wrong: error")
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["rough of slow"]
    assert (model.seconds, model.then) == (0.02, None)
    assert receipt.error == 0.0
    assert receipt.ratio > 1.0
    assert [kept.stage for kept in tuning.kept] == ["exact"]
    tuning.undo()
    before.assert_untouched()


def test_what_is_not_exact_goes_one_at_a_time_what_gains_least_first(seen: list[Event]) -> None:
    class Both(nn.Module):
        """The small error of one part is a large one of the speech; that of the other is none."""

        def __init__(self) -> None:
            super().__init__()
            self.flow, self.decoder = Slow(0.02), Slow(0.04)
            self.eval()

        def speak(self) -> torch.Tensor:
            plain = nn.functional.linear(X, self.flow.linear.weight, self.flow.linear.bias)
            amplified = plain + 100.0 * (self.flow(X) - plain)
            return self.decoder(amplified)

    model = Both()
    parts = (Part("flow", "flow", model.flow), Part("decoder", "vocoder", model.decoder))
    calls = warmup_calls(lambda loaded: loaded.speak(), Loaded(model), "inference")
    rough = Stage("rough", seconds=0.0, then=lambda y: y * 1.005)
    tuning = tune(ModelPlan("model", (model,), parts), calls, [rough], CPU, Limits(60.0, "balanced"))
    receipt = saved(tuning)
    assert [(result.part, result.kept) for result in receipt.stages] == [("flow", False), ("decoder", True)]
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["rough of flow"]
    assert receipt.error == pytest.approx(0.005, rel=0.1)
    tuning.undo()
    assert (model.flow.seconds, model.decoder.seconds) == (0.02, 0.04)


def test_what_is_not_exact_stays_when_the_whole_is_right(seen: list[Event]) -> None:
    model = Amplified(0.04)
    model.tolerant = True
    rough = Stage("rough", seconds=0.0, then=lambda y: y * 1.005)
    receipt = saved(run(model, rough, precision="balanced", warmup=lambda loaded: loaded.speak()))
    assert receipt.stages[0].kept
    assert receipt.error == pytest.approx(0.005, rel=0.1)
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_a_change_that_raises_in_the_whole_alone_costs_no_other_change(seen: list[Event]) -> None:
    class Strict(Slow):
        """Fails on an output of its part that was changed."""

        def speak(self) -> torch.Tensor:
            y = self(X)
            if not torch.equal(y, nn.functional.linear(X, self.linear.weight, self.linear.bias)):
                raise RuntimeError("expected scalar type Float but found BFloat16")
            return y

    model = Strict(0.04)
    exact, rough = Stage("exact", seconds=0.02), Stage("rough", seconds=0.0, then=lambda y: y * 1.005)
    receipt = saved(run(model, exact, rough, precision="balanced", warmup=lambda loaded: loaded.speak()))
    assert [result.kept for result in receipt.stages] == [True, False]
    assert "RuntimeError: expected scalar type" in receipt.stages[1].reason
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["rough of slow"]


def test_nothing_stays_when_the_exact_ones_are_to_blame_too(seen: list[Event]) -> None:
    class Telling(Amplified):
        def speak(self) -> torch.Tensor:
            return super().speak() + (self.seconds < 0.04)

    model = Telling(0.04)
    before = Before(model)
    exact, rough = Stage("exact", seconds=0.02), Stage("rough", seconds=0.0, then=lambda y: y * 1.005)
    receipt = saved(run(model, exact, rough, precision="balanced", warmup=lambda loaded: loaded.speak()))
    assert not receipt.kept
    assert all(result.reason.startswith("undone: the whole is wrong") for result in receipt.stages)
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["rough of slow", "everything"]
    before.assert_untouched()


def test_slower_in_total_undoes_everything(seen: list[Event]) -> None:
    class Paying(Slow):
        """The time that the part saves is spent twice outside of it."""

        def speak(self) -> Any:
            time.sleep(0.0 if self.seconds == SLOW else 3 * SLOW)
            return self(X)

    model = Paying()
    before = Before(model)
    receipt = saved(run(model, Stage(seconds=0.0), warmup=lambda loaded: loaded.speak()))
    assert receipt.stages[0].reason.startswith("undone: the whole is slower, ")
    assert receipt.ratio == 1.0
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["everything"]
    before.assert_untouched()


# --- the process ---------------------------------------------------------------------------------------------------


def test_stages_of_the_process_come_first_and_once() -> None:
    order: list[str] = []

    class Both(Slow):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Slow(0.0)

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(self.inner(x))

    model = Both()
    parts = (Part("inner", "model", model.inner), Part("outer", "model", model))
    stages = [Stage("part stage", {"prepare": lambda: order.append("part")}),
              Stage("process stage", {"prepare": lambda: order.append("process")}, seconds=0.0)]  # fmt: skip
    stages[1].process = True
    plan = ModelPlan("model", (model,), parts)
    receipt = saved(tune(plan, warmup_calls(X, Loaded(model), "inference"), stages, CPU, Limits(60.0)))
    assert order == ["process", "part", "part"]
    assert [(result.part, result.stage) for result in receipt.stages] == [
        (PROCESS, "process stage"), ("inner", "part stage"), ("outer", "part stage"),
    ]  # fmt: skip
    assert receipt.stages[0].kept


@pytest.mark.parametrize("point", POINTS)
def test_a_fault_in_a_stage_of_the_process(point: str) -> None:
    model = Slow()
    before = Before(model)
    bad = Stage("bad", {point: raising(MemoryError())}, seconds=0.0)
    bad.process = True
    tuning = run(model, Stage("good", seconds=0.0), bad)
    assert [(result.part, result.kept) for result in saved(tuning).stages] == [(PROCESS, False), ("slow", True)]
    tuning.undo()
    before.assert_untouched()
