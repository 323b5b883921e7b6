"""The engine keeps what is faster and right, drops the rest, and never leaves a worse model behind."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event, Receipt
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import FellBack, Trying, Tuned, WarmupFailed, add_hook
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.plan import PROCESS, Decision, ModelPlan, Part
from accelerate_tts.tuning.findings import Tuning
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.timing import Timing
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import Stage, pays_off, tune

pytestmark = pytest.mark.usefixtures("steady_clock")

CPU = DeviceInfo("cpu", "test")
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """Waits as long as it is told: a part whose speed a stage can really change."""

    def __init__(self, seconds: float = 0.02) -> None:
        super().__init__()
        self.eval()
        self.linear = nn.Linear(32, 32)
        self.seconds = seconds
        self.offset = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.linear(x) + self.offset


def run(model: nn.Module, *stages: Stage, budget: float = 60.0, warmup: Any = X) -> Tuning:
    modules = find_modules(model)
    plan = ModelPlan("model", tuple(modules.values()), (Part("slow", "model", model),))
    return tune(plan, warmup_calls(warmup, Loaded(model), "inference"), stages, CPU, Limits(budget))


def test_a_faster_and_right_stage_is_kept_and_can_be_undone() -> None:
    model = Slow()
    tuning = run(model, stage := Stage(seconds=0.0))
    assert model.seconds == 0.0
    (result,) = tuning.receipt.stages
    assert result.kept
    assert result.error == 0.0
    assert result.ratio is not None
    assert result.low is not None
    assert result.ratio >= result.low > 1.0
    assert stage.sealed
    assert tuning.receipt.ratio > 1.0
    tuning.undo()
    assert model.seconds == 0.02


@pytest.mark.parametrize("kind", ["iterator", "asynchronous", "at once"])
def test_the_receipt_has_first_audio_of_what_speaks_in_pieces(kind: str) -> None:
    pieces: list[int] = []  # of each call

    def speak(model: nn.Module) -> Iterator[torch.Tensor]:
        pieces.append(0)
        for _ in range(3):
            pieces[-1] += 1
            yield model(X)

    async def later(model: nn.Module) -> AsyncIterator[torch.Tensor]:
        for piece in speak(model):
            yield piece

    warmup = {"iterator": speak, "asynchronous": later, "at once": lambda model: list(speak(model))}[kind]
    receipt = run(Slow(0.002), Stage(seconds=0.0), warmup=warmup).receipt
    assert (receipt.first_audio is not None) is (kind != "at once")
    assert ("first audio after" in str(receipt)) is (kind != "at once")
    assert Receipt.from_json(receipt.to_json()).first_audio == receipt.first_audio
    assert pieces[-3:] == ([3, 3, 3] if kind == "at once" else [1, 1, 1]), "what is left computes no more"


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (Stage(seconds=0.05), "slower"),
        (Stage(), "rejected: no certain gain, "),
        (Stage(seconds=0.0, offset=0.5), "rejected: error "),
        (Stage(seconds=0.0, offset=float("nan")), "rejected: values that are not finite"),
        (Stage(seconds=0.0, graphs=0), "compiled no graph"),
    ],
    ids=["slower", "the same", "wrong", "nan", "no graph"],
)
def test_everything_else_is_dropped_and_undone(stage: Stage, reason: str) -> None:
    model = Slow()
    receipt = run(model, stage).receipt
    (result,) = receipt.stages
    assert not result.kept
    assert reason in result.verdict
    assert (model.seconds, model.offset) == (0.02, 0.0)
    assert not stage.sealed
    assert receipt.ratio == 1.0


def alternative(**attributes: Any) -> Stage:
    """One of several ways to the same end."""
    return Stage(group="test", **attributes)


def test_a_disturbed_look_at_microseconds_decides_nothing(decide: Any) -> None:
    looks = iter([1e-5, 0.009, 0.009])  # untouched; and twice with the change, while a neighbour is at work
    decide(look=lambda *_args: next(looks), compare=lambda *_args, **_kwargs: Timing(2e-5, 1e-5, 2.0, 1.9, 2.1, 25))
    (result,) = run(Slow(), Stage(seconds=0.0)).receipt.stages
    assert result.kept


def test_an_alternative_that_is_far_behind_is_not_timed_in_pairs() -> None:
    model = Slow()
    first, second = alternative(seconds=0.0), alternative(seconds=0.015)
    first.name, second.name = "first", "second"
    kept, dropped = run(model, first, second).receipt.stages
    assert kept.kept
    assert dropped.reason == "slower than first at the first look"
    assert dropped.ratio is None
    assert model.seconds == 0.0


@pytest.mark.parametrize(("seconds", "pairs"), [(0.475, 0), (0.35, 1)])
def test_a_change_of_the_process_that_gains_little_in_a_look_is_not_timed_in_pairs(
    seconds: float, pairs: int, decide: Any
) -> None:
    """Pairs of a change of the process are whole passes."""
    timed: list[Timing] = []

    def compare(*_args: Any, **_kwargs: Any) -> Timing:
        timed.append(Timing(0.5, seconds, 0.5 / seconds, 0.5 / seconds, 0.5 / seconds, 5))
        return timed[-1]

    decide(compare=compare)
    stage = Stage(seconds=seconds)
    stage.process = True
    (result,) = run(Slow(0.5), stage).receipt.stages
    assert result.part == PROCESS
    assert len(timed) == 2 * pairs, "of the change, and of the whole if it was kept"
    assert result.kept is bool(pairs)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_what_the_same_does_from_fewer_bytes_spares_a_large_part_the_other_copies(
    large: bool, kept: bool, decide: Any
) -> None:
    """Competing bf16 and int8 copies of a decoder would take memory at the same time."""
    decide(from_memory=1 if large else 2**30)
    fewer, more = alternative(seconds=0.0), alternative(seconds=0.0 if kept else 0.001)
    fewer.name, more.name, more.superseded_by = "int8", "bf16", ("int8",)
    if not kept:
        fewer.attributes = {"offset": 1.0}  # wrong
    first, second = run(Slow(), fewer, more).receipt.stages
    assert first.kept is kept
    spared = large and kept
    assert len(more.prepared) == (0 if spared else 1)
    assert second.reason.startswith("not tried: int8 does the same") is spared
    assert second.kept is not kept


def test_a_long_part_that_gains_nothing_is_not_timed_in_pairs(decide: Any) -> None:
    decide(long_replay=0.03)
    model = Slow(0.04)
    first, second, third = Stage(seconds=0.032), Stage(seconds=0.036), Stage(seconds=0.0)
    first.name, second.name, third.name = "first", "second", "third"
    kept, dropped, faster = run(model, first, second, third).receipt.stages
    assert kept.kept
    assert dropped.reason == "no gain at the first look"
    assert dropped.ratio is None
    assert faster.kept, "what gains is timed"


@pytest.mark.parametrize("large", [True, False])
def test_the_first_run_of_a_large_part_may_make_copies_of_its_weights(large: bool, decide: Any) -> None:
    """Int8 weights of XTTS's GPT took 2.2 s to make, of a replay that took 0.2 s untouched, and were dropped for it."""
    if large:
        decide(copied_a_second=1.0)  # so that 4 kB of weights take over an hour

    class Copying(Stage):
        made = False

        def prepare(self, part: Part) -> Any:
            change = super().prepare(part)
            plain = part.module.forward

            def forward(x: torch.Tensor) -> torch.Tensor:
                if not self.made and part.module.seconds == 0.0:
                    self.made = True
                    time.sleep(1.2)
                return plain(x)  # type: ignore[no-any-return]

            part.module.forward = forward  # type: ignore[method-assign]
            return change

    (result,) = run(Slow(), Copying(seconds=0.0)).receipt.stages
    assert result.kept is large
    assert (result.reason == "far slower at the first look") is not large


@pytest.mark.parametrize("then", ["faster", "no gain", "no time"])
def test_what_looked_much_faster_and_was_not_sure_is_tried_again(then: str, decide: Any, steady_clock: Any) -> None:
    """On a busy machine: a change that everything later would be built on."""
    unsure, sure = Timing(2.0, 1.5, 1.3, 0.9, 1.6, 13), Timing(2.0, 1.0, 2.0, 1.5, 2.5, 5)
    nothing = Timing(2.0, 2.0, 1.0, 0.9, 1.1, 5)
    answers = {"first": [unsure, sure if then == "faster" else unsure], "second": [sure], "third": [nothing]}
    tried: list[str] = []
    stages = [Stage(seconds=0.0), Stage(seconds=0.0), Stage(seconds=0.0)]
    for stage, name in zip(stages, answers, strict=True):
        stage.name = name

    def begun(event: Event) -> None:
        if isinstance(event, Trying):
            tried.append(event.stage)
            if then == "no time" and len(tried) == 4:  # the rest of the budget is spent meanwhile
                steady_clock.now += 1000.0

    def compare(*_args: Any, **_kwargs: Any) -> Timing:
        return answers[tried[-1]].pop(0) if answers[tried[-1]] else sure  # and of the whole

    decide(compare=compare)
    model = Slow()
    remove = add_hook(begun)
    receipt = run(model, *stages).receipt
    remove()
    kept = {stage.stage for stage in receipt.stages if stage.kept}
    assert sorted(stage.stage for stage in receipt.stages) == ["first", "second", "third"], "one line each"
    if then == "no time":
        assert tried == ["first", "second", "third", "first"]
        first = next(stage for stage in receipt.stages if stage.stage == "first")
        assert first.ratio == 1.3
        assert first.reason.startswith("no certain gain, ")
    else:
        assert tried == ["first", "second", "third", "first"], "and what gained nothing is not"
        assert kept == ({"first", "second"} if then == "faster" else {"second"})


class Aloud(nn.Module):
    """Two parts that lead to a decision: the first one takes more of the time, the last one decides."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()
        self.text, self.durations = Slow(0.02), Slow(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.durations(self.text(x))
        return value


class Checked(Stage):
    """Applies to a part that leads to a decision once the deciding part is changed."""

    def applies(self, part: Part) -> str | None:
        assert part.decision is not None
        last = part.decision.last
        return None if part.module is last or last.seconds == 0.0 else "the decision is not checked"

    def prepare(self, part: Part) -> Any:
        return Stage(seconds=0.0).prepare(part)


def speak(model: Aloud) -> Tuning:
    decision = Decision(model, ("text", "durations"), lambda _owner, _named, value: value, lambda _owner, _number: {})
    parts = [Part(name, "model", getattr(model, name), decides=True, decision=decision) for name in decision.parts]
    plan = ModelPlan("aloud", (model,), tuple(parts))
    return tune(plan, warmup_calls(X, Loaded(model), "inference"), [Checked()], CPU, Limits(60.0))


def test_the_part_that_decides_comes_before_those_that_lead_to_it() -> None:
    model = Aloud()
    kept = [(result.part, result.kept) for result in speak(model).receipt.stages]
    assert kept == [("text", True), ("durations", True)]
    assert model.text.seconds == model.durations.seconds == 0.0


def test_what_applies_only_after_a_second_look_is_tried_then(decide: Any) -> None:
    answers = [UNSURE]  # the deciding part's first look; the second look at it, the text's and the whole are sure
    decide(compare=lambda *_args, **_kwargs: answers.pop() if answers else SURE)
    kept = [(result.part, result.kept) for result in speak(Aloud()).receipt.stages]
    assert kept == [("text", True), ("durations", True)]


@pytest.mark.parametrize("decides", [False, True])
def test_what_decides_lengths_must_be_bit_exact(decides: bool) -> None:
    model, stage = Slow(), Stage(seconds=0.0, offset=1e-7)  # rounding
    plan = ModelPlan("model", (model,), (Part("slow", "model", model, decides=decides),))
    tuning = tune(plan, warmup_calls(X, Loaded(model), "inference"), [stage], CPU, Limits(60.0))
    (result,) = tuning.receipt.stages
    assert result.kept is not decides
    assert ("must be bit-exact" in result.reason) is decides


SURE, UNSURE = Timing(2.0, 1.0, 2.0, 1.5, 2.5, 5), Timing(2.0, 1.5, 1.3, 0.9, 1.6, 13)


@pytest.mark.parametrize("graphs", [None, 1])
def test_what_is_compiled_is_not_compiled_again_for_a_doubt(graphs: int | None, decide: Any) -> None:
    decide(compare=lambda *_args, **_kwargs: UNSURE, looks=False)
    stage = Stage(seconds=0.01, graphs=graphs)
    (result,) = run(Slow(), stage).receipt.stages
    assert not result.kept
    assert len(stage.prepared) == (2 if graphs is None else 1)


@pytest.mark.parametrize("graphs", [None, 1])
def test_nothing_is_tried_again_above_a_compilation(graphs: int | None, decide: Any) -> None:
    answers = [SURE, UNSURE]
    decide(compare=lambda *_args, **_kwargs: answers.pop(0) if answers else SURE, looks=False)
    other = Stage("other", seconds=0.0)
    run(Slow(), Stage("kept", seconds=0.01, graphs=graphs), other)
    assert len(other.prepared) == (2 if graphs is None else 1)


class Speaking(nn.Module):
    """A decoder's part in a loop: slow for prompts, and for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()
        self.linear = nn.Linear(32, 32)
        self.prompt = self.token = 0.004

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.prompt if x.shape[0] > 1 else self.token)
        result: torch.Tensor = self.linear(x)
        return result


@pytest.mark.parametrize("times", ["loop", "prefill", "end_to_end"])
@pytest.mark.parametrize("faster", ["prompt", "token"])
def test_a_stage_says_in_which_calls_of_a_loop_its_gain_is_looked_for(times: Any, faster: str) -> None:
    model = Speaking()
    stage = Stage(**{faster: 0.0})
    stage.times = times

    def speak(loaded: Any) -> None:
        loaded(torch.ones(4, 32))
        for _ in range(10):
            loaded(torch.ones(1, 32))

    (result,) = run(model, stage, warmup=speak).receipt.stages
    assert result.kept is ((times, faster) in {("loop", "token"), ("prefill", "prompt"), *pass_of(times)})


def pass_of(times: str) -> set[tuple[str, str]]:
    return {(times, "token"), (times, "prompt")} if times == "end_to_end" else set()


class Remembering(Speaking):
    """Slow for a sequence other than the last one, once remembering is on."""

    def __init__(self) -> None:
        super().__init__()
        self.moving = 0.0
        self.last: Any = None

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        if past is not self.last:
            time.sleep(self.moving)
        self.last = past if past is not None else [0]
        return super().forward(x), self.last


def test_what_holds_one_loops_sequence_is_not_judged_by_calls_that_bring_another_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replayed call copies its sequence, which the loop already has in place."""

    def speak(loaded: Any) -> torch.Tensor:
        state, past = loaded(torch.ones(4, 32))
        for _ in range(10):
            state, past = loaded(torch.ones(1, 32), past)
        return state  # type: ignore[no-any-return]

    verdicts = {}
    for times in ("loop", "end_to_end"):
        first, rival = alternative(token=0.0, moving=0.008), alternative(token=0.003, moving=0.0)
        first.name, rival.name, first.times = "remembers", "rival", times
        stages = run(Remembering(), first, rival, warmup=speak).receipt.stages
        verdicts[times] = {stage.stage for stage in stages if stage.kept}
    assert verdicts == {"loop": {"rival"}, "end_to_end": {"remembers"}}, "and so is an alternative to it"


def test_what_the_warm_up_never_calls_is_not_tried() -> None:
    """A second root, such as a voice encoder beside a pipeline whose warm-up has a voice already."""
    used, idle = Slow(), Slow()
    plan = ModelPlan("model", (used, idle), (Part("used", "model", used), Part("idle", "model", idle)))
    stage = Stage(seconds=0.0)
    receipt = tune(plan, warmup_calls(lambda _: used(X), Loaded(used), "inference"), [stage], CPU, Limits(60)).receipt
    assert [(result.part, result.kept) for result in receipt.stages] == [("used", True), ("idle", False)]
    assert receipt.stages[1].reason == "not tried: the warm-up never called it"
    assert len(stage.prepared) == 1


def test_a_root_that_is_driven_by_another_method_is_tried_on_whole_passes() -> None:
    class Driven(Slow):
        def generate(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = Driven()
    (result,) = run(model, Stage(seconds=0.0), warmup=lambda model: model.generate(X)).receipt.stages
    assert result.kept


def fail(error: BaseException) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no compiler"), MemoryError(), OSError(28, "No space left on device"), torch.OutOfMemoryError("oom")],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_inside_a_stage_costs_nothing(error: Exception, seen: list[Event]) -> None:
    model = Slow()
    good = Stage(seconds=0.0)
    receipt = run(model, Stage(faults={"on": fail(error)}), good).receipt
    assert [result.kept for result in receipt.stages] == [False, True]
    assert type(error).__name__ in receipt.stages[0].reason
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["test stage"]
    assert model.seconds == 0.0


def test_an_interrupt_leaves_no_half_tuned_model() -> None:
    model = Slow()
    with pytest.raises(KeyboardInterrupt):
        run(model, Stage(seconds=0.0), Stage(faults={"on": fail(KeyboardInterrupt())}))
    assert model.seconds == 0.02


def test_the_budget_is_respected() -> None:
    model = Slow()
    receipt = run(model, stage := Stage(seconds=0.0), budget=0.0).receipt
    assert not stage.prepared
    assert receipt.stages[0].reason == "not tried: the tuning budget is spent"
    assert model.seconds == 0.02


def test_a_failing_warmup_leaves_the_model_alone(seen: list[Event]) -> None:
    model = Slow()
    receipt = run(model, stage := Stage(seconds=0.0), warmup=torch.zeros(1, 5)).receipt
    assert not stage.prepared
    assert "warm-up failed: RuntimeError" in receipt.notes[0]
    assert [type(event) for event in seen] == [WarmupFailed]


def test_a_model_that_does_not_repeat_itself_cannot_be_verified() -> None:
    class Restless(Slow):
        count = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1.0
            return super().forward(x) * self.count

    receipt = run(Restless(), Stage(seconds=0.0)).receipt
    assert "does not repeat" in receipt.stages[0].reason
    assert not receipt.kept


def test_the_same_random_numbers_for_both() -> None:
    class Noisy(Slow):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.randn_like(x)

    receipt = run(Noisy(), Stage(seconds=0.0)).receipt
    assert receipt.stages[0].kept
    assert receipt.error == 0.0


def test_wrong_in_total_undoes_everything(seen: list[Event]) -> None:
    """A change that is right for the part's captured calls and wrong on the public path."""

    class TwoFaced(Slow):
        calls = 0

        def forward(self, x: torch.Tensor, *, public: bool = False) -> torch.Tensor:
            return super().forward(x) + (1.0 if public and self.seconds == 0.0 else 0.0)

        def speak(self) -> torch.Tensor:
            return self.forward(X, public=True) + 0.0 * self(X)

    model = TwoFaced()
    receipt = run(model, Stage(seconds=0.0), warmup=lambda loaded: loaded.speak()).receipt
    assert not receipt.kept
    assert "undone: the whole is wrong: " in receipt.stages[0].reason
    assert model.seconds == 0.02
    assert any(isinstance(event, FellBack) and event.stage == "everything" for event in seen)


def test_the_slower_alternative_is_back_where_the_faster_one_is_wrong_in_the_whole(seen: list[Event]) -> None:
    """A vocoder in half precision as a part is faster than by layers, and may err too much for the whole alone."""

    class Louder(Slow):
        def speak(self) -> torch.Tensor:
            return 4 * self(X) - 3 * self.linear(X)  # four times the error of the part

    model = Louder()
    slower = Stage("slower", group="half", seconds=0.01, offset=0.001)
    faster = Stage("faster", group="half", seconds=0.0, offset=0.005)
    plan = ModelPlan("model", (model,), (Part("slow", "model", model),))
    calls = warmup_calls(lambda loaded: loaded.speak(), Loaded(model), "inference")
    tuning = tune(plan, calls, [slower, faster], CPU, Limits(60.0, "balanced"))
    first, second = tuning.receipt.stages
    assert first.kept
    assert first.reason.startswith("at least")
    assert second.reason.startswith("undone: the whole is wrong")
    assert (model.seconds, model.offset) == (0.01, 0.001)
    assert [event.stage for event in seen if isinstance(event, FellBack)] == ["faster of slow"]
    tuning.undo()
    assert (model.seconds, model.offset) == (0.02, 0.0)


def test_inputs_that_a_part_changes_in_place_are_restored_for_each_run() -> None:
    class InPlace(Slow):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(self.seconds)
            return x.add_(1.0)

    receipt = run(InPlace(), Stage(seconds=0.0), warmup=lambda model: model(X.clone())).receipt
    assert receipt.stages[0].kept


def test_a_part_with_inputs_that_cannot_be_copied_is_timed_as_a_whole() -> None:
    class Cache:
        pass

    class Cached(Slow):
        def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
            return super().forward(x)

    receipt = run(Cached(), Stage(seconds=0.0), warmup=lambda model: model(X, Cache())).receipt
    assert receipt.stages[0].kept


def test_the_receipt_tells_and_keeps_everything(seen: list[Event], tmp_path: Any) -> None:
    receipt = run(Slow(), Stage(seconds=0.0), Stage(offset=1.0)).receipt
    assert isinstance(seen[-1], Tuned)
    assert seen[-1].kept == 1
    text = str(receipt)
    assert "kept, at least" in text
    assert "rejected: error " in text
    assert "0 recompiles" in text
    receipt.save(tmp_path / "receipt.json")
    loaded = Receipt.from_json((tmp_path / "receipt.json").read_text())
    assert loaded == receipt
    assert str(loaded) == text
    for broken in ("", "{}", "[]", '{"format": 99, "stages": []}', '{"format": 1}'):
        with pytest.raises(ValueError, match="receipt|Expecting"):
            Receipt.from_json(broken)


def test_what_cannot_be_compared_does_not_count_as_right() -> None:
    """Inputs that cannot be copied, and a warm-up that returns nothing: the part's outputs are compared instead."""

    class Cache:
        pass

    class Cached(Slow):
        def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
            return super().forward(x)

    def silent(model: nn.Module) -> None:
        model(X, Cache())

    receipt = run(Cached(), Stage(seconds=0.0, offset=9.0), Stage(seconds=0.0), warmup=silent).receipt
    assert [result.kept for result in receipt.stages] == [False, True]
    assert receipt.stages[0].verdict.startswith("rejected: error ")
    assert receipt.error is None
    assert "nothing in the result can be compared" in receipt.notes[0]

    class Mute(Slow):
        def forward(self, x: torch.Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    receipt = run(Mute(), Stage(seconds=0.0)).receipt
    assert "nothing in the result can be compared" in receipt.stages[0].reason
    assert not receipt.kept


def test_an_error_in_a_late_pass_undoes_everything(seen: list[Event]) -> None:
    model = Slow()
    calls = []

    def flaky(loaded: nn.Module) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise ConnectionError("gone")
        return loaded(X)

    receipt = run(model, Stage(seconds=0.0), warmup=flaky).receipt
    assert not receipt.kept
    assert "given up: ConnectionError" in receipt.notes[0]
    assert model.seconds == 0.02
    assert any(isinstance(event, FellBack) and event.stage == "everything" for event in seen)


def test_a_cancelled_load_is_undone() -> None:
    model = Slow()
    plan = ModelPlan("model", (model,), (Part("slow", "model", model),))
    first, second = Stage(seconds=0.0), Stage(seconds=0.0)
    calls = warmup_calls(X, Loaded(model), "inference")
    tuning = tune(plan, calls, [first, second], CPU, Limits(60.0, stopped=lambda: bool(first.prepared)))
    assert not second.prepared
    assert not tuning.complete
    assert "cancelled" in tuning.receipt.notes[0]
    assert model.seconds == 0.02


def test_train_mode_is_said_where_it_matters(seen: list[Event]) -> None:
    assert not any("train mode" in note for note in run(Slow().train()).receipt.notes)
    model = Slow()
    model.drop = nn.Dropout(0.1)
    assert any("train mode" in note for note in run(model.train()).receipt.notes)
    assert not run(Slow().eval()).receipt.notes


def test_a_kept_receipt_keeps_no_weights() -> None:
    import gc
    import weakref

    model = Slow()
    receipt = run(model, Stage(seconds=0.0, graphs=1)).receipt
    assert receipt.kept
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert receipt.recompiles == 0


def test_modules_are_found_inside_what_is_no_module() -> None:
    a, b, c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    class Holder:
        def __init__(self) -> None:
            self.a = a
            self.deep = {"b": [b]}
            self.again = a
            self.me = self
            self.module = torch
            self.text = "x"

    assert find_modules(Holder()) == {"a": a, "deep.b.0": b}
    assert find_modules((a, {"c": c}, 3)) == {"0": a, "1.c": c}
    assert find_modules(a) == {"": a}
    assert find_modules(None) == {}

    class Slotted:
        __slots__ = ("inner", "unset")

        def __init__(self) -> None:
            self.inner = a

    assert find_modules(Slotted()) == {"inner": a}
    outer = nn.Sequential(a, b)
    assert find_modules({"alias": outer[0], "whole": outer}) == {"whole": outer}

    class OnClass:
        model = c

    assert find_modules(OnClass) == {"model": c}


@pytest.mark.parametrize("is_set_up", [True, False])
def test_what_a_first_pass_sets_up_is_no_measure_of_later_ones(is_set_up: bool, decide: Any) -> None:
    """Imports, and functions that are compiled at their first call, as numba's in a voice clone."""
    decide(compare=pays_off)
    calls, model = count(), Slow(0.1)

    def spend(seconds: float) -> None:
        time.sleep(seconds if next(calls) == 0 else model.seconds)

    def speak(held: nn.Module) -> torch.Tensor:
        if is_set_up:
            spend(40.0)
        return held(X)  # type: ignore[no-any-return]

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not is_set_up:
            spend(40.0)
        return model.linear(x)  # type: ignore[no-any-return]

    model.forward = forward  # type: ignore[method-assign]
    (result,) = (receipt := run(model, Stage(process=True, seconds=0.0), budget=100.0, warmup=speak).receipt).stages
    assert result.kept is is_set_up, result.reason
    no_other = "outputs are compared with those of the first pass: the tuning budget allows no other"
    assert (no_other in str(receipt)) is not is_set_up
