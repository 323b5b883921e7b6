"""The thread that owns CUDA graphs: one thread, the caller's modes, the caller's errors, nothing kept alive."""

from __future__ import annotations

import contextvars
import gc
import multiprocessing
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from accelerate_tts.runtime.graph_thread import OwnerThread, graph_owner

number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)


def test_all_calls_run_on_one_thread_that_is_not_the_callers() -> None:
    owner = OwnerThread("owner")
    with ThreadPoolExecutor(8) as pool:
        threads = set(pool.map(lambda _: owner.call(threading.get_ident), range(200)))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_one_call_at_a_time() -> None:
    owner, running, most = OwnerThread("owner"), [0], [0]

    def work() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        torch.randn(64, 64).sum()
        running[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: owner.call(work), range(200)))
    assert most == [1]


@pytest.mark.parametrize("mode", ["inference", "no_grad", "grad"])
def test_the_callers_autograd_mode_is_carried_there_and_left_there(mode: str) -> None:
    owner = OwnerThread("owner")

    def modes() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}[mode]
    with context():
        assert owner.call(modes) == modes()
    assert owner.call(modes) == (False, True)


def test_context_variables_are_carried_there() -> None:
    owner = OwnerThread("owner")
    token = number.set(7)
    try:
        assert owner.call(number.get) == 7
    finally:
        number.reset(token)
    assert owner.call(number.get) == 0


def test_a_call_within_a_call_runs_at_once() -> None:
    owner = OwnerThread("owner")
    assert owner.call(lambda: owner.call(lambda: 3)) == 3


class Broken(Exception):  # noqa: N818 - a test's own
    pass


def test_what_is_raised_is_the_callers_and_the_thread_goes_on() -> None:
    owner = OwnerThread("owner")

    def fail() -> None:
        raise Broken("here")

    for _ in range(3):
        with pytest.raises(Broken, match="here"):
            owner.call(fail)
    assert owner.call(lambda: 1) == 1


def test_no_result_and_no_error_keeps_tensors_alive() -> None:
    owner = OwnerThread("owner")
    result = owner.call(lambda: torch.ones(3))
    gone = [weakref.ref(result)]

    def fail() -> None:
        tensor = torch.ones(3)
        gone.append(weakref.ref(tensor))
        raise Broken

    with pytest.raises(Broken):
        owner.call(fail)
    del result
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def _in_child(connection: object) -> None:
    connection.send(graph_owner().call(lambda: 5))  # type: ignore[attr-defined]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    assert graph_owner().call(lambda: 1) == 1
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(there,))
    child.start()
    assert here.poll(30)
    assert here.recv() == 5
    child.join(30)
    assert child.exitcode == 0


def test_the_thread_has_the_callers_autocast_and_default_device() -> None:
    owner = OwnerThread("accelerate_tts test")

    def look() -> tuple[bool, str]:
        return torch.is_autocast_enabled("cpu"), torch.empty(1).device.type

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert owner.call(look) == (True, "meta")
    assert owner.call(look) == (False, "cpu")
