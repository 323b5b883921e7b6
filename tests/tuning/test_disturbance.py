"""A busy machine: detection, verdicts on it, and the repetition of uncertain ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import Event, Receipt, optimized_model, receipt_of
from accelerate_tts.device import usage as usage_module
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.device.usage import Usage, usage, waited
from accelerate_tts.events import FellBack, Restored, Retuned, TunedUnderLoad
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore
from accelerate_tts.plan import PROCESS, ModelPlan, Part
from accelerate_tts.tuning.disturbance import QUIET, Machine, Watcher, between, one_thread
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.policy import current_policy
from accelerate_tts.tuning.timing import Timing, compare_speed
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, clock_of, tune

CPU = DeviceInfo("cpu", "test")
X = torch.ones(2, 4)


@dataclass
class Busy:
    """A machine of two processors, on which others are at work for as long as a test wants."""

    busy: bool = True
    now: float = 1000.0
    others: float = 0.0
    held: float = 0.0
    slept: list[float] = field(default_factory=list)
    quiet_after: float = float("inf")
    speed: float = 1.0

    def usage(self) -> Usage:
        self._pass(0.5)
        return Usage(self.now, self.now, self.others + self.now, 0.0, self.held, None, 2)

    def probe(self) -> float:
        return self.speed

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if sum(self.slept) >= self.quiet_after:
            self.busy = False

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        if self.busy:
            self.others += 1.5 * seconds
            self.held += 100.0 * seconds


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.fast = False
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def fast(name: str = "stage", **options: Any) -> Stage:
    return Stage(name, fast=True, **options)


FASTER, SAME = Timing(2.0, 1.0, 2.0, 1.9, 2.1, 5), Timing(2.0, 2.0, 1.0, 0.6, 1.4, 5)


@dataclass
class Compare:
    """Beside others' work two threads show nothing; one thread, a quiet machine and undisturbed pairs show it all."""

    machine: Busy
    clean: bool = False
    alone: list[int] = field(default_factory=list)

    def __call__(self, run: Any, before: Any, after: Any, *_: Any, **how: Any) -> Timing:
        for switch in (before, after):
            switch()
            run()
        if how.get("clock") is time.process_time:
            self.alone.append(torch.get_num_threads())
            return FASTER
        return replace(FASTER if self.clean or not self.machine.busy else SAME, clean=self.clean)


def run(
    machine: Busy, *stages: Stage, clean: bool = False, seconds: float = 60.0, **policies: Any
) -> tuple[Model, Receipt, Compare]:
    model = Model()
    compare = Compare(machine, clean)
    plan = ModelPlan("model", (model,), (Part("part", "model", model),))
    policy = replace(current_policy(), machine=lambda: machine, compare=compare, **policies)
    limits = Limits(seconds, policy=policy)
    tuning = tune(plan, warmup_calls(X, Loaded(model), "inference"), stages, CPU, limits)
    return model, tuning.receipt, compare


# --- how it is noticed -----------------------------------------------------------------------------------------------


def read(at: float, **counters: Any) -> Usage:
    return Usage(at, **{"own": 0.0, "processors": 2, **counters})


@pytest.mark.parametrize(
    ("team", "later", "quiet", "why"),
    [
        (2, {"own": 2.0, "busy": 2.0}, True, ""),
        (2, {"own": 1.0, "busy": 2.0}, False, "other processes used 1.0 of 2"),
        (1, {"own": 1.0, "busy": 2.0}, True, ""),  # there is one left
        (1, {"own": 0.5, "busy": 2.0}, False, "other processes used 1.5 of 2"),
        (2, {"own": 1.99, "busy": 2.0}, True, ""),  # a tick is none
        (2, {"own": 2.0, "busy": 2.0, "stolen": 0.5}, False, "the hypervisor took 0.5"),
        (2, {"own": 2.0, "busy": 2.0, "throttled": 0.3}, False, "a quota held it back for 30%"),
        (2, {"own": 1.8, "busy": 2.0, "waited": 0.6}, False, "other processes used 0.2"),
        (2, {"own": 1.96, "busy": 2.0, "waited": 0.9}, True, ""),  # so were most of these, beside a small service
        (2, {"own": 2.0, "busy": 2.0, "waited": 0.6}, True, ""),  # its own threads were in each other's way
        (2, {"own": 2.0}, True, ""),  # nobody tells
        (8, {"own": 1.0, "busy": 2.0}, False, "other processes"),  # a team that is larger than the machine
    ],
)
def test_what_others_took_is_told_from_what_was_ours(team: int, later: dict[str, float], quiet: bool, why: str) -> None:
    first = read(5.0, **dict.fromkeys(later, 0.0))
    found = between(first, read(6.0, **later), team)
    assert found.quiet is quiet
    assert found.why.startswith(why)
    assert bool(found.why) is not quiet


@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6), st.integers(1, 64), st.integers(1, 64))
def test_no_counters_raise_or_give_more_than_all(values: list[float], team: int, processors: int) -> None:
    """A clock that stands still, counters that go backwards (a thread has ended, a processor is gone)."""
    at, own, busy, stolen, held, throttled = values
    second = Usage(at, own, busy, stolen, held, throttled, processors)
    for first in (Usage(0.0, 9.0, 9.0, 9.0, 9.0, 9.0, processors), second):
        found = between(first, second, team)
        assert 0.0 <= found.share <= 1.0
        assert found.quiet or found.why


def test_this_machine_tells_of_itself() -> None:
    first = usage()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    second = usage()
    assert second.at > first.at
    assert second.own >= first.own + 0.03
    assert second.processors >= 1
    if second.busy is not None and first.busy is not None:
        assert second.busy >= first.busy
    machine = Machine()
    assert 0.0 < machine.probe() < 10.0
    assert second.waited == pytest.approx(waited(), abs=5.0)


def test_linux_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module.os, "sched_getaffinity", lambda _pid: {0, 2}, raising=False)
    monkeypatch.setattr(usage_module.os, "sysconf", lambda _name: 100, raising=False)
    files = {
        "proc/stat": "cpu 9 9\ncpu0 100 10 20 900 5 1 2 7 0 0\ncpu1 900 0 0 0 0 0 0 0 0 0\ncpu2 50 0 0 0 0 0 0 3 0 0\n",
        "proc/self/task/1/schedstat": "5 1500000000 3",
        "proc/self/task/2/schedstat": "5 500000000 3",
        "proc/self/cgroup": "0::/own\n",
        "sys/fs/cgroup/own/cpu.stat": "usage_usec 5\nthrottled_usec 250000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    found = usage(tmp_path)
    assert (found.busy, found.stolen, found.processors) == (1.83, 0.1, 2)
    assert (found.waited, found.throttled) == (2.0, 0.25)


def test_a_system_without_these_files_tells_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = usage(tmp_path)
    assert found.busy is not None, "psutil has it"
    assert (found.stolen, found.waited, found.throttled) == (None, None, None)
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    found = usage(tmp_path)
    assert found.busy is None
    assert between(found, usage(tmp_path), 2) == QUIET


def test_a_probe_that_got_slower_is_a_disturbance_that_no_counter_shows() -> None:
    machine = Busy(busy=False)
    watcher = Watcher(machine, 2)
    with watcher.window() as window:
        pass
    assert window.disturbance.quiet
    machine.speed = 3.0
    with watcher.window() as window:
        pass
    assert window.disturbance.why == "a probe of memory and arithmetic took 3.0x its time"
    assert watcher.worst == window.disturbance


def test_own_threads_that_spin_after_their_work_are_no_disturbance() -> None:
    """OpenBLAS's workers wait for more work on a processor, and slow down a probe that comes right behind a product."""

    class Spinning(Busy):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if seconds >= 0.025:
                self.speed = 1.0

    machine = Spinning(busy=False)
    watcher = Watcher(machine, 2)
    watcher.probe()
    machine.speed = 3.0
    with watcher.window() as window:
        machine.speed = 3.0
    assert window.disturbance.quiet


@pytest.mark.parametrize(
    ("seconds", "later", "clean"),
    [
        (0.1, {"own": 0.1, "busy": 0.1, "waited": 0.005}, True),
        (0.1, {"own": 0.1, "busy": 0.1, "waited": 0.1}, True),  # its own threads were in each other's way
        (0.1, {"own": 0.1, "busy": 0.2, "waited": 0.1}, False),
        (0.02, {"own": 0.02, "busy": 0.02, "waited": 0.02}, False),  # the counters cannot tell who it was
        (0.1, {"own": 0.1, "waited": 0.1}, False),
        (0.1, {"own": 0.1, "busy": 0.2}, True),  # nobody tells
    ],
)
def test_a_timing_is_not_clean_if_others_made_its_threads_wait(
    seconds: float, later: dict[str, float], clean: bool
) -> None:
    readings = [read(5.0, **dict.fromkeys(later, 0.0)), read(5.0 + seconds, **later)]

    class Told(Busy):
        def usage(self) -> Usage:
            return readings.pop(0)

    assert Watcher(Told(), 2).clean()() is clean


def test_the_watcher_waits_as_long_as_it_has_patience_in_all() -> None:
    machine = Busy()
    watcher = Watcher(machine, 2, patience=1.0)
    assert not watcher.wait()
    assert sum(machine.slept) == 1.0
    assert not watcher.wait()
    assert sum(machine.slept) == 1.25, "one look is always taken"
    machine.busy = False
    assert watcher.wait()


def test_one_thread_is_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# --- what is decided then --------------------------------------------------------------------------------------------


def test_pairs_of_which_one_half_was_disturbed_do_not_count() -> None:
    clock = {"now": 0.0, "state": "a", "number": 0}
    disturbed = {3, 4, 8, 9, 13}  # timings

    def work() -> None:
        clock["number"] += 1
        times = {"a": 0.2, "b": 0.1}
        clock["now"] += 3.0 if clock["number"] in disturbed else times[clock["state"]]

    def watched() -> Callable[[], bool]:
        return lambda: clock["number"] not in disturbed

    def to(state: str) -> Callable[[], object]:
        return lambda: clock.update(state=state)

    timing = compare_speed(work, to("a"), to("b"), "cpu", 3.0, clock=lambda: clock["now"], clean=watched)
    assert timing.clean
    assert (timing.low, timing.high) == (pytest.approx(2.0), pytest.approx(2.0))
    disturbed.update(range(1000))
    timing = compare_speed(work, to("a"), to("b"), "cpu", 3.0, clock=lambda: clock["now"], clean=watched)
    assert not timing.clean
    assert timing.low == pytest.approx(1.0)


def test_beside_others_work_one_threads_processor_time_decides_and_is_not_sure(seen: list[Event]) -> None:
    model, receipt, compare = run(Busy(), fast())
    (result,) = receipt.stages
    assert (result.kept, result.sure) == (True, False), result.reason
    assert result.reason.endswith(", processor time of one thread")
    assert set(compare.alone) == {1}
    assert model.fast
    assert receipt.ratio == 2.0
    (event,) = [event for event in seen if isinstance(event, TunedUnderLoad)]
    assert (event.unsure, event.tried) == (1, 1)
    assert "other processes used 1.5 of 2 processors" in event.reason
    said = "\n".join(receipt.notes)
    assert said.count("tuning was disturbed") == 1
    assert "s for a quiet machine" in said
    assert "(uncertain)" in str(receipt)


@pytest.mark.parametrize(("in_pairs", "kept"), [(FASTER, True), (SAME, False)])
def test_a_gain_in_pairs_that_shared_the_memory_with_others_counts_and_is_not_sure(
    in_pairs: Timing, kept: bool, decide: Any
) -> None:
    """Two threads together are bound by memory, one thread alone is not, so it shows no gain."""
    speeds = iter([1.0])  # slower after the first probe

    class Shared(Busy):
        def probe(self) -> float:
            return next(speeds, 3.0)

    def compare(run: Any, before: Any, after: Any, *_: Any, **how: Any) -> Timing:
        for switch in (before, after):
            switch()
            run()
        return SAME if how.get("clock") is time.process_time else in_pairs

    decide(machine=lambda: Shared(busy=False), compare=compare)
    model = Model()
    plan = ModelPlan("model", (model,), (Part("part", "model", model),))
    receipt = tune(plan, warmup_calls(X, Loaded(model), "inference"), [fast()], CPU, Limits(60.0)).receipt
    (result,) = receipt.stages
    assert (result.kept, result.sure) == (kept, False), result.reason
    assert ("one thread" in result.reason) is not kept


def test_it_waits_until_the_machine_is_quiet_and_is_sure_then(seen: list[Event]) -> None:
    _, receipt, compare = run(Busy(quiet_after=2.0), fast())
    (result,) = receipt.stages
    assert (result.kept, result.sure) == (True, True), result.reason
    assert not compare.alone
    assert "waited 2.0 s for a quiet machine" in receipt.notes
    assert not any(isinstance(event, TunedUnderLoad) for event in seen)


def test_undisturbed_pairs_are_believed_though_others_work() -> None:
    _, receipt, _ = run(Busy(), fast(), clean=True)
    assert (receipt.stages[0].kept, receipt.stages[0].sure) == (True, False)  # the look before was disturbed
    machine = Busy(busy=False)

    class Begins(Compare):
        def __call__(self, *given: Any, **how: Any) -> Timing:
            machine.busy = True  # after the first look
            return super().__call__(*given, **how)

    model = Model()
    plan = ModelPlan("model", (model,), (Part("part", "model", model),))
    policy = replace(current_policy(), machine=lambda: machine, compare=Begins(machine, clean=True))
    tuning = tune(plan, warmup_calls(X, Loaded(model), "inference"), [fast()], CPU, Limits(60.0, policy=policy))
    (result,) = tuning.receipt.stages
    assert (result.kept, result.sure) == (True, True)


def test_what_is_compiled_cannot_be_timed_alone_and_is_not_sure_either_way(seen: list[Event]) -> None:
    """dynamo would compile it anew for one thread; and a total that shows nothing undoes nothing."""
    model, receipt, compare = run(Busy(), fast(graphs=1))
    (result,) = receipt.stages
    assert (result.kept, result.sure) == (False, False)
    assert not compare.alone
    assert not model.fast


def test_what_threads_do_to_each_other_is_not_tried_beside_others_work() -> None:
    _, receipt, _ = run(Busy(), fast(process=True))
    (result,) = receipt.stages
    assert result.part == PROCESS
    assert (result.sure, result.reason) == (False, "not tried: other processes used 1.5 of 2 processors")


def test_what_threads_do_to_each_other_is_tried_on_a_machine_that_is_quiet_again() -> None:
    """One disturbed pass, of a tenth of a second perhaps, is not enough to leave it out."""
    _, receipt, _ = run(Busy(quiet_after=0.5), fast(process=True), looks=False)
    (result,) = receipt.stages
    assert (result.part, result.kept, result.sure) == (PROCESS, True, True), result.reason


def test_a_total_that_is_slower_beside_others_work_undoes_nothing(seen: list[Event]) -> None:
    machine = Busy(busy=False)

    class Slower(Compare):
        def __call__(self, *given: Any, **how: Any) -> Timing:
            if "fewest" not in how:
                return super().__call__(*given, **how)
            machine.busy = True
            return Timing(1.0, 2.0, 0.5, 0.4, 0.6, 5, clean=False)

    model = Model()
    plan = ModelPlan("model", (model,), (Part("part", "model", model),))
    policy = replace(current_policy(), machine=lambda: machine, compare=Slower(machine), patience=0.0)
    tuning = tune(plan, warmup_calls(X, Loaded(model), "inference"), [fast()], CPU, Limits(60.0, policy=policy))
    assert tuning.receipt.stages[0].kept
    assert model.fast
    assert not any(isinstance(event, FellBack) for event in seen)


@pytest.mark.parametrize("disturbed", [1, 2])
def test_no_single_look_drops_a_stage(disturbed: int, decide: Any) -> None:
    """The disturbance is one that no counter shows."""
    calls = iter([0.0, *[0.2] * disturbed])  # for its outputs, and the looks
    offset = [0.0]
    model = Model()
    decide(clock=clock_of(offset), compare=Compare(Busy(busy=False)))

    def forward(x: torch.Tensor) -> torch.Tensor:
        if model.fast:
            offset[0] += next(calls, 0.0)
        return x * model.weight

    model.forward = forward  # type: ignore[method-assign]
    plan = ModelPlan("model", (model,), (Part("part", "model", model),))
    tuning = tune(plan, warmup_calls(X, Loaded(model), "inference"), [fast()], CPU, Limits(60.0))
    assert tuning.receipt.stages[0].kept is (disturbed == 1), tuning.receipt.stages[0].reason


# --- and tried again -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(decide: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Busy, list[Stage]]]:
    made = Busy()
    first, second = fast("first"), fast("second", graphs=1)
    decide(machine=lambda: made, compare=Compare(made))
    monkeypatch.setattr("accelerate_tts.stages.catalogue.default_stages", lambda *_: (first, second))
    for name, value in {"PACK": "1", "RETUNE": "1", "PACK_FOLDER": str(tmp_path), "TUNE_PATIENCE": "1"}.items():
        monkeypatch.setenv(f"ACCELERATE_TTS_{name}", value)
    return made, [first, second]


def load() -> tuple[Any, Receipt]:
    model = optimized_model(warmup=X)(lambda: Model())()
    receipt = receipt_of(model)
    assert receipt is not None
    return model, receipt


def test_a_later_load_tries_again_what_was_not_sure_and_renews_the_pack(
    machine: tuple[Busy, list[Stage]], seen: list[Event]
) -> None:
    busy, (first, second) = machine
    _, receipt = load()
    assert {result.stage: (result.kept, result.sure) for result in receipt.stages} == {
        "first": (True, False), "second": (False, False),
    }  # fmt: skip
    seen.clear()
    _, receipt = load()  # still busy: what the pack says is in force
    assert [type(event) for event in seen if isinstance(event, (Restored, Retuned))] == [Restored]
    assert any("2 verdicts are uncertain" in note for note in receipt.notes)
    assert len(receipt.unsure) == 2
    busy.busy = False
    seen.clear()
    _, receipt = load()
    (event,) = [event for event in seen if isinstance(event, (Restored, Retuned))]
    assert isinstance(event, Retuned)
    assert (event.tried, event.unsure, event.ratio) == (2, 0, 2.0)
    assert {result.stage: (result.kept, result.sure) for result in receipt.stages} == {
        "first": (True, True), "second": (True, True),
    }  # fmt: skip
    tried = len(first.prepared), len(second.prepared)
    seen.clear()
    _, receipt = load()  # which is the new pack
    assert [type(event) for event in seen if isinstance(event, (Restored, Retuned))] == [Restored]
    assert not receipt.unsure
    assert (len(first.prepared), len(second.prepared)) == (tried[0] + 1, tried[1] + 1)


def test_retuning_can_be_switched_off(machine: tuple[Busy, list[Stage]], monkeypatch: pytest.MonkeyPatch) -> None:
    busy, _ = machine
    monkeypatch.setenv("ACCELERATE_TTS_RETUNE", "0")
    load()
    busy.busy = False
    _, receipt = load()
    assert len(receipt.unsure) == 2


@pytest.mark.parametrize(
    "reason", ["far slower, at the first look", "undone: slower in total (0.83x)", "wrong output: x"]
)
def test_what_an_older_pack_dropped_at_a_look_is_tried_again(
    reason: str, machine: tuple[Busy, list[Stage]], tmp_path: Path, seen: list[Event]
) -> None:
    """Verdicts of an older pack are not marked as certain or uncertain."""
    machine[0].busy = False
    load()
    store = PackStore(tmp_path, 2**30)
    (info,) = store.entries()
    pack = store.read(info.key)
    assert pack is not None
    receipt = Receipt.from_json(pack.decisions["receipt"])
    stages = tuple(result.dropped(reason) for result in receipt.stages)
    old = {"kept": [], "receipt": replace(receipt, stages=stages).to_json(), "tune_seconds": 180.0}
    store.write(Pack(info.key, old))
    seen.clear()
    _, receipt = load()
    again = not reason.startswith("wrong")
    assert [type(event) for event in seen if isinstance(event, (Restored, Retuned))] == [Retuned if again else Restored]
    assert bool(receipt.kept) is again


def test_what_was_sure_on_another_part_is_put_in_force_without_being_timed() -> None:
    """A stage that was rejected there is not even prepared."""
    machine = Busy(busy=False)
    model, other = Model(), Model()
    both = nn.ModuleList([model, other]).eval()
    calls = warmup_calls(lambda _loaded: (model(X), other(X)), Loaded(both), "inference")
    plan = ModelPlan("both", (both,), (Part("a", "model", model), Part("b", "model", other)))
    compare = Compare(machine)
    policy = replace(current_policy(), machine=lambda: machine, compare=compare)
    stages = [fast("good"), fast("bad")]
    first = tune(plan, calls, stages, CPU, Limits(60.0, policy=policy))
    known = [
        replace(result, kept=result.stage == "good", reason="of an earlier process")
        for result in first.receipt.stages if result.part == "a"
    ]  # fmt: skip
    first.undo()
    prepared = [len(stage.prepared) for stage in stages]
    second = tune(plan, calls, stages, CPU, Limits(60.0, policy=policy), known)
    of_a = [(result.stage, result.kept, result.reason) for result in second.receipt.stages if result.part == "a"]
    assert of_a == [("good", True, "of an earlier process"), ("bad", False, "of an earlier process")]
    assert [len(stage.prepared) for stage in stages] == [prepared[0] + 2, prepared[1] + 1]
    assert model.fast
