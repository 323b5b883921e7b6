"""Events: a degradation is logged once at WARNING, hooks get every event, and no hook can break speech."""

from __future__ import annotations

import dataclasses
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from accelerate_tts import add_hook, events
from accelerate_tts.events import (
    BackedOff,
    BudgetTooSmall,
    DecodePasses,
    Event,
    FellBack,
    FirstAudio,
    Guarded,
    NotApplied,
    PackIgnored,
    Prepared,
    Recompiled,
    Restored,
    Retuned,
    Tidied,
    Trying,
    Tuned,
    TunedUnderLoad,
    Undone,
    Warmed,
    WarmupFailed,
    emit,
)

# One of each, and the pieces that its line must hold.
SAMPLES: list[tuple[Event, list[str]]] = [
    (Prepared("cpu (AMD)", ("CPU threads", "OMP_NUM_THREADS")), ["cpu (AMD)", "CPU threads, OMP_NUM_THREADS"]),
    (Prepared("cpu (AMD)", ()), ["cpu (AMD)", "nothing to set"]),
    (Warmed("Vits", 1.234), ["Vits", "1.23 s"]),
    (Trying("Vits.decoder", "torch.compile"), ["Vits.decoder", "torch.compile"]),
    (Tuned("Vits", 2, 5, 1.376, 41.26), ["Vits", "2 of 5", "1.38x", "41.3 s"]),
    (Undone("Vits"), ["Vits", "untouched"]),
    (Restored("Vits", 3, 2.34), ["Vits", "3 optimisations", "warm pack", "2.3 s"]),
    (BudgetTooSmall("Vits: flow", "fold", 20.0, 45.0), ["Vits: flow", "fold needs", "about 45", "had 20"]),
    (Retuned("Vits", 4, 1, 1.0, 2.345), ["Vits", "4 verdicts", "1 are still uncertain", "1.00x before, 2.35x now"]),
    (Retuned("Vits", 4, 0, 1.0, 2.345), ["Vits", "tried again; 1.00x before"]),
    (TunedUnderLoad("Vits", "others worked", 3, 5), ["Vits", "3 of 5 verdicts are uncertain", "others worked"]),
    (PackIgnored("a1b2c3", "it is truncated"), ["a1b2c3", "truncated"]),
    (Recompiled("Vits.decoder", 3, "(1, 80, 512)"), ["Vits.decoder", "recompiled", "(1, 80, 512)", "graph 3", "warm"]),
    (FellBack("Vits", "torch.compile", "no g++"), ["Vits", "torch.compile is off", "no g++"]),
    (Guarded("Vits", "B.speak", "silent", "made again", 2), ["Vits", "B.speak was silent", "fault 2", "made again"]),
    (Guarded("Vits", "B.speak", "silent", "given"), ["Vits", "B.speak was silent; given"]),
    (BackedOff("Vits.speak", 8, 4), ["Vits.speak", "batch of 8", "out of memory", "with 4"]),
    (Tidied("LlamaModel", "hooks of earlier requests"), ["LlamaModel", "at each request", "hooks of earlier requests"]),
    (WarmupFailed("Vits", "ValueError: x"), ["Vits", "warm-up failed", "ValueError: x"]),
    (NotApplied("TF32", "no GPU"), ["TF32", "not applied", "no GPU"]),
    (FirstAudio("Xtts", 0.123, 2400), ["Xtts", "first audio after 0.12 s", "2400 samples"]),
    (DecodePasses("T3", 40, 90, 100), ["T3", "90 decode steps in 40 passes", "2.50 rows"]),
]
DEGRADED = {
    BackedOff,
    BudgetTooSmall,
    FellBack,
    Guarded,
    NotApplied,
    PackIgnored,
    Recompiled,
    TunedUnderLoad,
    WarmupFailed,
}


@pytest.fixture
def levels(caplog: pytest.LogCaptureFixture) -> Any:
    """The levels logged so far, each with its line."""
    caplog.set_level(logging.DEBUG, logger="accelerate_tts")
    return lambda: [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_samples_are_all_the_events_there_are() -> None:
    classes = {kind for kind in Event.__subclasses__() if kind.__module__ == events.__name__}
    assert {type(event) for event, _ in SAMPLES} == classes
    assert {kind for kind in classes if kind.degraded} == DEGRADED


@pytest.mark.parametrize(("event", "pieces"), SAMPLES, ids=lambda value: type(value).__name__)
def test_each_event_is_one_readable_line(event: Event, pieces: list[str]) -> None:
    line = str(event)
    for piece in pieces:
        assert piece in line
    assert "\n" not in line
    assert not line.startswith(type(event).__name__), "a line for people, not a repr"


@pytest.mark.parametrize(("event", "pieces"), SAMPLES, ids=lambda value: type(value).__name__)
def test_each_event_is_frozen_and_hashable(event: Event, pieces: list[str]) -> None:
    field = dataclasses.fields(event)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, field, "other")
    assert len({event, dataclasses.replace(event)}) == 1


@pytest.mark.parametrize("event", [event for event, _ in SAMPLES if event.degraded], ids=lambda e: type(e).__name__)
def test_a_degradation_warns_once_and_is_then_debug(event: Event, levels: Any) -> None:
    for _ in range(3):
        emit(dataclasses.replace(event))  # an equal event, not the same object
    assert levels() == [(logging.WARNING, str(event)), (logging.DEBUG, str(event)), (logging.DEBUG, str(event))]


@pytest.mark.parametrize("event", [e for e, _ in SAMPLES if not e.degraded], ids=lambda e: type(e).__name__)
def test_what_is_no_degradation_is_info_each_time(event: Event, levels: Any) -> None:
    emit(event)
    emit(event)
    assert levels() == [(logging.INFO, str(event))] * 2


def test_each_different_degradation_warns(levels: Any) -> None:
    emit(NotApplied("a", "b"))
    emit(NotApplied("a", "c"))
    emit(WarmupFailed("a", "b"))
    assert [level for level, _ in levels()] == [logging.WARNING] * 3


def test_sixteen_threads_warn_once(levels: Any, seen: list[Event]) -> None:
    barrier = threading.Barrier(16)

    def work() -> None:
        barrier.wait(30)
        emit(NotApplied("x", "y"))

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work) for _ in range(16)]:
            future.result(30)
    assert sorted(level for level, _ in levels()) == [logging.DEBUG] * 15 + [logging.WARNING]
    assert len(seen) == 16


def test_percent_signs_and_braces_are_only_text(levels: Any) -> None:
    emit(NotApplied("100%s %d {x}", "50%"))
    assert levels() == [(logging.WARNING, "100%s %d {x} was not applied: 50%")]


def test_the_memory_of_what_was_logged_is_bounded(levels: Any) -> None:
    for number in range(3000):
        emit(NotApplied("x", str(number)))
    emit(NotApplied("x", "2999"))
    emit(NotApplied("x", "0"))  # so long ago that it is forgotten
    assert [level for level, _ in levels()] == [logging.WARNING] * 3000 + [logging.DEBUG, logging.WARNING]


def test_good_news_does_not_make_an_old_warning_new(levels: Any) -> None:
    emit(NotApplied("x", "y"))
    for number in range(600):
        emit(Warmed("request", float(number)))
    emit(NotApplied("x", "y"))
    assert [level for level, _ in levels() if level != logging.INFO] == [logging.WARNING, logging.DEBUG]


def test_hooks_get_every_event_in_order_in_the_emitting_thread() -> None:
    found: list[tuple[Event, int]] = []
    add_hook(lambda event: found.append((event, threading.get_ident())))
    for event, _ in SAMPLES * 2:
        emit(event)
    assert found == [(event, threading.get_ident()) for event, _ in SAMPLES * 2]


def test_a_raising_hook_stops_nothing(levels: Any, caplog: pytest.LogCaptureFixture) -> None:
    before: list[Event] = []
    after: list[Event] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError("metrics are down")

    add_hook(before.append)
    add_hook(broken)
    add_hook(after.append)
    emit(Undone("Vits"))
    emit(Undone("Other"))
    assert before == after == [Undone("Vits"), Undone("Other")]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert str(Undone("Vits")) in errors[0].getMessage()
    assert errors[0].exc_info is not None
    assert errors[0].exc_info[0] is ZeroDivisionError


def test_remove_ends_it_and_twice_is_harmless() -> None:
    first: list[Event] = []
    second: list[Event] = []
    remove_first = add_hook(first.append)
    add_hook(second.append)
    emit(Undone("a"))
    remove_first()
    remove_first()
    emit(Undone("b"))
    assert first == [Undone("a")]
    assert second == [Undone("a"), Undone("b")]


def test_the_same_hook_twice_is_called_twice_and_removed_once() -> None:
    found: list[Event] = []
    hook = found.append
    remove = add_hook(hook)
    add_hook(hook)
    emit(Undone("a"))
    assert len(found) == 2
    remove()
    remove()
    emit(Undone("b"))
    assert found[2:] == [Undone("b")]


def test_a_hook_may_add_remove_and_emit() -> None:
    found: list[Event] = []

    def hook(event: Event) -> None:
        found.append(event)
        remove()
        add_hook(found.append)
        emit(Undone("inner"))

    remove = add_hook(hook)
    emit(Undone("outer"))
    assert found == [Undone("outer"), Undone("inner")]


@pytest.mark.parametrize("hook", [None, 3, "print", [print]])
def test_what_is_not_callable_is_refused_and_shown(hook: Any) -> None:
    with pytest.raises(TypeError) as caught:
        add_hook(hook)
    assert repr(hook) in str(caught.value)
    emit(Undone("nobody is called"))


def test_a_filter_of_the_log_that_raises() -> None:
    class Raises(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError(record)

    logger, raises, told = logging.getLogger("accelerate_tts"), Raises(), []
    remove = add_hook(told.append)
    logger.addFilter(raises)
    try:
        emit(NotApplied("a", "b"))
    finally:
        logger.removeFilter(raises)
        remove()
    assert told == [NotApplied("a", "b")]
