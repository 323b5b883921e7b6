"""Flags: after the last release, every switch of torch and the environment is exactly as it was."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from accelerate_tts.device import flags
from accelerate_tts.device.flags import Flag, environment, hold

BACKENDS = torch.backends
# Where torch has the newer per-operator interface (2.9 on); empty before.
NEW_STYLE: dict[str, Any] = {
    name: backend
    for name, backend in {
        "all": BACKENDS,
        "cuda.matmul": BACKENDS.cuda.matmul,
        "cudnn": BACKENDS.cudnn,
        "cudnn.conv": getattr(BACKENDS.cudnn, "conv", None),
        "cudnn.rnn": getattr(BACKENDS.cudnn, "rnn", None),
        "mkldnn": BACKENDS.mkldnn,
        "mkldnn.matmul": getattr(BACKENDS.mkldnn, "matmul", None),
        "mkldnn.conv": getattr(BACKENDS.mkldnn, "conv", None),
        "mkldnn.rnn": getattr(BACKENDS.mkldnn, "rnn", None),
    }.items()
    if hasattr(backend, "fp32_precision")
}


def read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:  # torch >= 2.9 where the older and the newer interface disagree: a state of its own
        return "raises"


def snapshot() -> dict[str, Any]:
    """The complete state that the flags may touch, and some that they must not."""
    return {
        "matmul precision": read(torch.get_float32_matmul_precision),
        "matmul allow_tf32": read(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "cudnn allow_tf32": read(lambda: BACKENDS.cudnn.allow_tf32),
        "cudnn benchmark": BACKENDS.cudnn.benchmark,
        "cudnn enabled": BACKENDS.cudnn.enabled,
        "cudnn deterministic": BACKENDS.cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        **{name: backend.fp32_precision for name, backend in NEW_STYLE.items()},
    }


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[dict[str, Any]]:
    """The state before the test, which is put back after it whatever the test wrote."""
    before = snapshot()
    yield before
    BACKENDS.cudnn.enabled, BACKENDS.cudnn.benchmark = before["cudnn enabled"], before["cudnn benchmark"]
    torch.set_num_threads(before["threads"])
    torch.set_float32_matmul_precision(before["matmul precision"])
    BACKENDS.cudnn.allow_tf32 = before["cudnn allow_tf32"]
    for name, backend in NEW_STYLE.items():
        if backend.fp32_precision != before[name]:
            backend.fp32_precision = before[name]
    assert snapshot() == before


WAYS = [
    *[(flags.MATMUL_PRECISION, value, "matmul precision") for value in ("highest", "high", "medium")],
    *[(flags.CUDNN_TF32, value, "cudnn allow_tf32") for value in (True, False)],
    *[(flags.CUDNN_BENCHMARK, value, "cudnn benchmark") for value in (True, False)],
    *[(flags.TORCH_THREADS, value, "threads") for value in (1, 3)],
]


def test_every_flag_of_torch_is_tested() -> None:
    assert {flag for flag, _, _ in WAYS} == set(flags.TORCH_FLAGS)


@pytest.mark.parametrize(("flag", "value", "reads"), WAYS, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("start", [("highest", True, False), ("high", False, True), ("medium", False, False)])
def test_hold_and_release_leave_the_same_state(flag: Flag, value: Any, reads: str, start: tuple[Any, ...]) -> None:
    torch.set_float32_matmul_precision(start[0])
    BACKENDS.cudnn.allow_tf32, BACKENDS.cudnn.benchmark = start[1:]
    before = snapshot()
    held = hold([(flag, value)])
    inside = snapshot()
    assert inside[reads] == value
    for key in ("cudnn enabled", "cudnn deterministic", "deterministic"):
        assert inside[key] == before[key]
    held.release()
    assert snapshot() == before
    BACKENDS.cudnn.benchmark = not before["cudnn benchmark"]
    held.release()
    assert BACKENDS.cudnn.benchmark is not before["cudnn benchmark"], "a second release must do nothing"


def test_cudnn_stays_as_the_user_left_it() -> None:
    BACKENDS.cudnn.enabled = False
    with hold([(flags.CUDNN_BENCHMARK, True), (flags.CUDNN_TF32, False)]):
        assert BACKENDS.cudnn.enabled is False
    BACKENDS.cudnn.enabled = True
    with hold([(flags.CUDNN_BENCHMARK, True), (flags.CUDNN_TF32, False)]):
        assert BACKENDS.cudnn.enabled is True


def leaks(name: str, legacy: tuple[Any, ...], values: dict[str, tuple[str, ...]], write: Callable[[Any], None]) -> Any:
    """Hold every way of the flag `name` from each start that a user can write; yield what differs afterwards."""
    values = {key: texts for key, texts in values.items() if key in NEW_STYLE}
    for old, *texts in itertools.product(legacy, *values.values()):
        for flag, value, _ in WAYS:
            if flag.name != name:
                continue
            write(old)
            for key, text in zip(values, texts, strict=True):
                NEW_STYLE[key].fp32_precision = text
            before, where = snapshot(), (old, *texts, value)
            try:
                with hold([(flag, value)]):
                    pass
            except RuntimeError as error:
                yield where, f"hold() raised {str(error)[:60]}"
                continue
            after = snapshot()
            if after != before:
                yield where, {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def test_a_matmul_precision_that_the_user_wrote_the_new_way_comes_back() -> None:
    new = {"cuda.matmul": ("none", "ieee", "tf32"), "mkldnn.matmul": ("none", "ieee", "bf16")}
    old = ("highest", "high", "medium")
    assert list(leaks("TF32 matrix products", old, new, torch.set_float32_matmul_precision)) == []


def test_a_cudnn_precision_that_the_user_wrote_the_new_way_comes_back() -> None:
    def write(value: bool) -> None:
        BACKENDS.cudnn.allow_tf32 = value

    new = {"cudnn.conv": ("none", "ieee", "tf32"), "cudnn.rnn": ("none", "ieee", "tf32")}
    assert list(leaks("TF32 convolutions", (True, False), new, write)) == []


def test_an_exception_in_the_block_restores_and_goes_on(torch_state: dict[str, Any]) -> None:
    wanted = [(flags.MATMUL_PRECISION, "high"), (flags.CUDNN_BENCHMARK, True), (flags.TORCH_THREADS, 1)]

    def work() -> None:
        with hold(wanted):
            assert snapshot() != torch_state
            raise ZeroDivisionError("user")

    with pytest.raises(ZeroDivisionError, match="user"):
        work()
    assert snapshot() == torch_state


@pytest.mark.parametrize("wanted", [way[:2] for way in WAYS if way[0] is not flags.TORCH_THREADS])
def test_scopes_that_overlap_in_two_threads(wanted: tuple[Flag, Any], torch_state: dict[str, Any]) -> None:
    b_is_in, a_is_out = threading.Event(), threading.Event()

    def b() -> None:
        with hold([(flags.MATMUL_PRECISION, "medium"), wanted]):
            b_is_in.set()
            assert a_is_out.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with hold([wanted, (flags.CUDNN_BENCHMARK, True)]):
            future = pool.submit(b)
            assert b_is_in.wait(30)
        expected = "medium" if wanted[0] is not flags.MATMUL_PRECISION else wanted[1]
        assert torch.get_float32_matmul_precision() == expected, "B is still in"
        a_is_out.set()
        future.result(30)
    assert snapshot() == torch_state


def test_many_threads_at_once(torch_state: dict[str, Any]) -> None:
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait(30)
        for turn in range(50):
            with hold([(flags.MATMUL_PRECISION, ("high", "medium")[(number + turn) % 2]), (flags.CUDNN_TF32, False)]):
                assert BACKENDS.cudnn.allow_tf32 is False

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result(60)
    assert snapshot() == torch_state


# --- scopes in any order, against a model ----------------------------------------------------------------------------


class Box:
    """A switch in memory. Writing `bad` does half of the work and then raises."""

    def __init__(self, value: Any = "as it was") -> None:
        self.value = value
        self.flag = Flag("box", self.write, lambda: self.value, self.write)

    def write(self, value: Any) -> None:
        self.value = value
        if value == "bad":
            raise OSError("the driver refused")


VARIABLE = "ACCELERATE_TTS_TEST_FLAG"
_values = st.sampled_from([None, "", "1", "2"])


class HoldsInAnyOrder(RuleBasedStateMachine):
    """The newest live holder's value is in force; with no holder the state is as before the first one."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.box = Box()
        self.flags = (environment(VARIABLE), self.box.flag)
        self.live: list[tuple[flags.HeldFlags, dict[Flag, Any]]] = []
        self.original: dict[Flag, Any] = {}

    @initialize(value=_values)
    def begin(self, value: Any) -> None:
        os.environ.pop(VARIABLE, None)
        if value is not None:
            os.environ[VARIABLE] = value
        self.original = {self.flags[0]: value, self.flags[1]: "as it was"}

    @rule(target=holds, wanted=st.lists(st.tuples(st.integers(0, 1), _values), max_size=3))
    def enter(self, wanted: list[tuple[int, Any]]) -> flags.HeldFlags:
        pairs = [(self.flags[index], value) for index, value in wanted]
        held = hold(pairs)
        self.live.append((held, dict(pairs)))
        return held

    @rule(wanted=st.lists(st.tuples(st.integers(0, 1), _values), max_size=3))
    def fail_to_enter(self, wanted: list[tuple[int, Any]]) -> None:
        with pytest.raises(OSError, match="refused"):
            hold([*((self.flags[index], value) for index, value in wanted), (self.box.flag, "bad")])

    @rule(held=consumes(holds))
    def leave(self, held: flags.HeldFlags) -> None:
        held.release()
        self.live = [(other, values) for other, values in self.live if other is not held]

    @rule(target=holds, held=consumes(holds))
    def leave_twice(self, held: flags.HeldFlags) -> Any:
        self.leave(held)
        held.release()
        return multiple()

    @invariant()
    def newest_is_in_force(self) -> None:
        expected = dict(self.original)
        for _, values in self.live:
            expected.update(values)
        assert {flag: flag.save() for flag in self.original} == expected

    def teardown(self) -> None:
        for held, _ in self.live:
            held.release()
        assert {flag: flag.save() for flag in self.original} == self.original
        os.environ.pop(VARIABLE, None)


TestHoldsInAnyOrder = HoldsInAnyOrder.TestCase


def test_what_was_written_before_a_failing_write_is_put_back() -> None:
    first, second, third = Box(1), Box(2), Box(3)
    with pytest.raises(OSError, match="refused"):
        hold([(first.flag, "new"), (second.flag, "bad"), (third.flag, "new")])
    assert (first.value, second.value, third.value) == (1, 2, 3)
    first.value = 10  # nothing may be remembered of the failed attempt
    with hold([(first.flag, "new")]):
        assert first.value == "new"
    assert first.value == 10


def test_a_failing_save_puts_back_what_was_written() -> None:
    def save() -> Any:
        raise OSError("unreadable")

    box, broken = Box(1), Flag("broken", lambda _: None, save, lambda _: None)
    with pytest.raises(OSError, match="unreadable"):
        hold([(box.flag, "new"), (broken, 1)])
    assert box.value == 1


def let_go(held: dict[str, flags.HeldFlags], *names: str) -> None:
    for name in names:
        if name in held:
            held.pop(name).release()


@pytest.mark.parametrize("dropped", [("oldest",), ("newer",), ("newer", "oldest")], ids=" and ".join)
@pytest.mark.parametrize("work", ["hold", "release oldest", "release newer"])
def test_the_collector_may_release_at_any_line(work: str, dropped: tuple[str, ...]) -> None:
    """A tuned object that is dropped lets go of its flags wherever the garbage collector finds it."""
    state = ["before"]

    def write(value: Any) -> None:
        state[:] = [value]

    flag = Flag("a test's own", write, lambda: state[0], write)

    def lines_until(when: int) -> int:
        """Do the work, let the others go in its n-th line, and return the number of its lines."""
        held = {name: hold([(flag, name)]) for name in ("oldest", "newer")}
        lines = 0

        def trace(frame: Any, event: str, _argument: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != flags.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == when:
                    sys.settrace(None)
                    let_go(held, *dropped)
            return trace

        sys.settrace(trace)
        try:
            if work == "hold":
                held["newest"] = hold([(flag, "newest")])
            else:
                let_go(held, work.removeprefix("release "))
        finally:
            sys.settrace(None)
        assert state == [next(reversed(held), "before")], f"line {when}"
        let_go(held, *list(held))
        assert state == ["before"], f"line {when}"
        assert flag not in flags.held()
        return lines

    count = lines_until(0)
    assert count > 5
    for when in range(1, count + 1):
        lines_until(when)


def test_an_environment_flag_sets_deletes_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "user")
    with hold([(environment(VARIABLE), "1")]):
        assert os.environ[VARIABLE] == "1"
        with hold([(environment(VARIABLE), None)]):
            assert VARIABLE not in os.environ
        assert os.environ[VARIABLE] == "1"
    assert os.environ[VARIABLE] == "user"
    monkeypatch.delenv(VARIABLE)
    with hold([(environment(VARIABLE), "1")]):
        assert os.environ[VARIABLE] == "1"
    assert VARIABLE not in os.environ
