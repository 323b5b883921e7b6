"""The guard notices faulty output, makes the call again on the untouched model, and after some of them puts it back."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threaded import LONG, until, until_later
from torch import nn

from accelerate_tts import Settings, inference, optimized_model, optimizer, receipt_of, set_active
from accelerate_tts.errors import SettingsError
from accelerate_tts.events import Event, FellBack, Guarded, emit
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.plan import Part
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.runtime.guard.checks import AudioStats, Expectation, Units, audio_stats, fault_of, size_of, units_of
from accelerate_tts.runtime.guard.gate import Gate, Step
from accelerate_tts.stages import catalogue
from accelerate_tts.stages.layers.weight_norm import FoldStage, has_folds
from accelerate_tts.streaming import Stream
from accelerate_tts.tuning.findings import Tuning
from doubles import Stage, begin_process

SAMPLES = 400  # of a character
PIECE = 1200
TEXT = "Good morning, everybody."
Fault = Callable[[torch.Tensor], torch.Tensor]


def nan(wave: torch.Tensor) -> torch.Tensor:
    wave = wave.clone()
    wave[..., wave.shape[-1] // 2] = float("nan")
    return wave


FAULTS: dict[str, Fault] = {
    "NaN or Inf": nan,
    "silent": torch.zeros_like,
    "clipped flat": lambda wave: (wave * 1e4).clamp(-1, 1),
    "too long": lambda wave: wave.repeat(1, 30),
}


class Voice(nn.Module):
    """Speaks noise, as long as its text: what it says hangs on torch's, Python's and NumPy's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.loudness = nn.Parameter(torch.tensor(0.1))
        self.fault: Fault | None = None
        self.own: Fault | None = None
        self.faulty_from = 0
        self.passes: list[bool] = []
        self.seconds = 0.0

    def forward(self, samples: int, piece: int = 0) -> torch.Tensor:
        self.passes.append(self.fault is not None)
        time.sleep(self.seconds)
        wave = torch.randn(1, samples) * self.loudness + random.random() * 0.01 + np.random.rand() * 0.01  # noqa: NPY002
        for fault in (self.own, self.fault if piece >= self.faulty_from else None):
            wave = wave if fault is None else fault(wave)
        return wave


class Change(BaseChange):
    """Makes a voice faulty while it is on."""

    def __init__(self, voice: Voice, fault: Fault) -> None:
        self.voice, self.fault = voice, fault

    def on(self) -> None:
        self.voice.fault = self.fault

    def off(self) -> None:
        self.voice.fault = None


class Backend:
    def __init__(self, fault: Fault) -> None:
        self.voice = Voice()
        self.tuning = Tuning(Receipt("Voice", "cpu", {}), (Change(self.voice, fault),))
        self.tuning.on()

    @inference
    def speak(self, text: str) -> torch.Tensor:
        return self.voice(SAMPLES * len(text))

    @inference
    async def speak_later(self, text: str) -> torch.Tensor:
        await asyncio.sleep(0)
        return await asyncio.to_thread(self.voice, SAMPLES * len(text))

    @inference
    def stream(self, text: str) -> Iterator[torch.Tensor]:
        for number in range(len(text) * SAMPLES // PIECE):
            yield self.voice(PIECE, number)

    @inference
    async def stream_later(self, text: str) -> AsyncIterator[torch.Tensor]:
        for number in range(len(text) * SAMPLES // PIECE):
            await asyncio.sleep(0)
            yield self.voice(PIECE, number)

    @inference
    def spoken_of(self, words: Iterator[str]) -> torch.Tensor:
        return self.voice(SAMPLES * len("".join(words)))


def call(backend: Backend, kind: str, text: str = TEXT) -> torch.Tensor:
    """The whole wave, whatever the kind of function."""
    if kind == "speak":
        return backend.speak(text)
    if kind == "speak_later":
        return asyncio.run(backend.speak_later(text))
    if kind == "stream":
        return torch.cat(list(backend.stream(text)), -1)

    async def collect() -> list[torch.Tensor]:
        return [piece async for piece in backend.stream_later(text)]

    return torch.cat(asyncio.run(collect()), -1)


KINDS = ["speak", "speak_later", "stream", "stream_later"]


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the old state is what libraries draw from


def untouched(kind: str, text: str = TEXT, own: Fault | None = None) -> torch.Tensor:
    backend = Backend(torch.zeros_like)
    backend.tuning.off()
    backend.voice.own = own
    seed()
    return call(backend, kind, text)


def expected_of(text: str = TEXT) -> dict[str, Expectation]:
    """Expectation from the untouched model's output."""
    listener = guards.Listener()
    for kind in KINDS:
        listener.judge(f"Backend.{kind}", units_of((text,), {}), audio_stats(untouched("speak", text)), whole=True)
    return listener.expected


@pytest.fixture
def guarded() -> Iterator[Callable[..., Backend]]:
    alive = []

    def make(fault: Fault = nan, limit: int = 3, faulty_from: int = 0) -> Backend:
        backend = Backend(fault)
        backend.voice.faulty_from = faulty_from
        guard = guards.Guard("Voice", backend.tuning, expected_of(), limit)
        for item in (backend.voice, backend.tuning):
            guards.protect(item, guard)
        alive.append(backend)
        return backend

    yield make
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert guards.is_watched() or not alive, "it left guards switched off"


def told(seen: list[Event]) -> list[Guarded]:
    return [event for event in seen if isinstance(event, Guarded)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_call_gives_what_the_untouched_model_gives(
    kind: str, fault: str, guarded: Any, seen: list[Event]
) -> None:
    if fault in {"silent", "too long"} and kind.startswith("stream"):
        return  # judged on the whole stream, below
    backend = guarded(FAULTS[fault])
    seed()
    wave = call(backend, kind)
    assert torch.equal(wave, untouched(kind))
    (event,) = told(seen)
    assert (event.what, event.fault, event.count) == ("Voice", fault, 1)
    assert kind in event.function
    assert "made again on the untouched model" in event.outcome
    assert backend.voice.fault is not None, "the changes are in force again"
    following = torch.randn(3)
    untouched(kind)
    assert torch.equal(following, torch.randn(3)), "the random numbers go on as after one untouched call"


def test_an_object_with_slots_is_guarded_by_what_is_in_them(guarded: Any, seen: list[Event]) -> None:
    class Slotted:
        __slots__ = ("unset", "voice")

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name) if name.startswith("__") else RuntimeError(name)

        @inference
        def speak(self, text: str) -> torch.Tensor:
            return self.voice(SAMPLES * len(text))

    slotted = Slotted()
    slotted.voice = (backend := guarded(nan)).voice
    seed()
    assert torch.equal(slotted.speak(TEXT), untouched("speak"))
    assert [event.count for event in told(seen)] == [1]
    assert backend.voice.fault is not None


@pytest.mark.parametrize("kind", ["stream", "stream_later"])
@pytest.mark.parametrize("faulty_from", [1, 3])
def test_a_stream_that_turns_bad_goes_on_where_it_was(
    kind: str, faulty_from: int, guarded: Any, seen: list[Event]
) -> None:
    backend = guarded(nan, faulty_from=faulty_from)
    seed()
    assert torch.equal(call(backend, kind), untouched(kind))
    assert len(told(seen)) == 1
    assert backend.voice.passes[: faulty_from + 1] == [True] * (faulty_from + 1)
    assert not any(backend.voice.passes[faulty_from + 1 :])


def test_a_second_attempt_of_a_stream_is_untouched_until_it_ends(guarded: Any) -> None:
    """A body in the middle of a sentence must not change models: half with the changes is the output of neither."""
    backend = guarded(nan)
    other = [backend.voice.fault is None for _ in backend.stream(TEXT)]
    assert len(other) == len(TEXT) * SAMPLES // PIECE
    assert all(other)
    assert backend.voice.fault is not None


@pytest.mark.parametrize("kind", ["stream", "stream_later"])
def test_a_runaway_stream_is_broken_off(kind: str, guarded: Any, seen: list[Event]) -> None:
    backend = guarded(FAULTS["too long"])
    seed()
    wave = call(backend, kind)
    assert told(seen)[0].fault == "too long"
    assert wave.shape[-1] <= 11 * SAMPLES * len(TEXT)
    assert not backend.voice.passes[-1]


@pytest.mark.parametrize("kind", ["stream", "stream_later"])
def test_a_silent_stream_is_told_when_all_of_it_was_delivered(kind: str, guarded: Any, seen: list[Event]) -> None:
    backend = guarded(torch.zeros_like)
    assert not call(backend, kind).any()
    (event,) = told(seen)
    assert (event.fault, event.count) == ("silent", 1)
    assert "delivered" in event.outcome
    # A silent piece is a pause.
    backend = guarded(torch.zeros_like, faulty_from=4)
    call(backend, kind)
    assert len(told(seen)) == 1


@pytest.mark.parametrize("kind", ["stream", "stream_later"])
def test_a_stream_without_a_piece_is_made_again(kind: str, guarded: Any, seen: list[Event]) -> None:
    class Mute(Backend):
        def length(self, text: str) -> int:
            return 0 if self.voice.fault else len(text) * SAMPLES // PIECE

        @inference
        def stream(self, text: str) -> Iterator[torch.Tensor]:
            for number in range(self.length(text)):
                yield self.voice(PIECE, number)

        @inference
        async def stream_later(self, text: str) -> AsyncIterator[torch.Tensor]:
            for number in range(self.length(text)):
                yield self.voice(PIECE, number)

    backend = Mute(nan)
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 3))
    seed()
    assert torch.equal(call(backend, kind), untouched(kind))
    assert [(event.fault, event.count) for event in told(seen)] == [("silent", 1)]


def test_pieces_cut_elsewhere_are_skipped_by_samples(seen: list[Event]) -> None:
    class Cutting(Backend):
        @inference
        def stream(self, text: str) -> Iterator[torch.Tensor]:
            size = 100 if self.voice.fault else 70
            for start in range(0, 1000, size):
                piece = torch.arange(start, min(start + size, 1000)).float()
                yield torch.zeros(0)
                yield nan(piece) if self.voice.fault and start >= 300 else piece

    backend = Cutting(nan)
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 3))
    assert torch.equal(torch.cat(list(backend.stream(TEXT))), torch.arange(1000).float())
    assert len(told(seen)) == 1


def test_a_runaway_stream_of_bytes_is_cut_where_it_was_broken_off(seen: list[Event]) -> None:
    class Telephone(Backend):
        @inference
        def stream(self, text: str) -> Iterator[bytes]:
            for _ in range(1000):
                yield bytes([1]) * (700 if self.voice.fault else 300)

    backend = Telephone(nan)
    expected = {f"{Telephone.__qualname__}.stream": Expectation(longest=3000, rate=100.0)}
    guards.protect(backend, guards.Guard("Voice", backend.tuning, expected, 3))
    # The untouched one runs away, too, and is given to its end.
    assert b"".join(backend.stream(TEXT)) == bytes([1]) * 300_000
    assert [event.count for event in told(seen)] == [0]


def test_pieces_that_are_no_waves_are_skipped_one_by_one(seen: list[Event]) -> None:
    class Pairs(Backend):
        @inference
        def stream(self, text: str) -> Iterator[Any]:
            for number in range(5):
                yield number, self.voice(PIECE, number)
            return "the end"

    backend = Pairs(nan)
    backend.voice.faulty_from = 2
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 3))

    def through() -> Iterator[Any]:
        ends.append((yield from backend.stream(TEXT)))

    ends: list[str] = []
    got = list(through())
    assert [number for number, _ in got] == list(range(5))
    assert ends == ["the end"]
    assert all(wave.isfinite().all() for _, wave in got)
    assert len(told(seen)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_models_own_is_given_and_not_counted(kind: str, guarded: Any, seen: list[Event]) -> None:
    backend = guarded(lambda wave: wave, limit=2)
    backend.voice.own = nan
    for _ in range(4):
        seed()
        torch.testing.assert_close(call(backend, kind), untouched(kind, own=nan), rtol=0, atol=0, equal_nan=True)
    assert [event.count for event in told(seen)] == [0, 0], "after that nobody asks any more"
    assert "the untouched model's output has the same fault" in told(seen)[0].outcome
    assert not any(isinstance(event, FellBack) for event in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_after_some_faults_the_untouched_model_is_back_for_good(kind: str, guarded: Any, seen: list[Event]) -> None:
    backend = guarded(nan, limit=2)
    for _ in range(4):
        assert call(backend, kind).isfinite().all()
    assert [event.count for event in told(seen)] == [1, 2]
    (fell,) = [event for event in seen if isinstance(event, FellBack)]
    assert "faulty output 2 times" in str(fell)
    assert backend.voice.fault is None


def test_a_good_call_is_made_once_and_told_nobody(guarded: Any, seen: list[Event]) -> None:
    backend = guarded(lambda wave: wave)
    for kind in KINDS:
        backend.voice.passes.clear()
        seed()
        assert torch.equal(call(backend, kind), untouched(kind))
        assert len(backend.voice.passes) == (1 if "speak" in kind else len(TEXT) * SAMPLES // PIECE)
        for text in ("", ".", "Hm"):  # nothing, or next to nothing, to say
            backend.speak(text)
    assert seen == []


def test_threads_at_once(guarded: Any, seen: list[Event]) -> None:
    backend = guarded(nan, limit=1000)
    backend.voice.seconds = 0.002
    barrier = threading.Barrier(8)

    def work(kind: str) -> bool:
        barrier.wait()
        return all(bool(call(backend, kind).isfinite().all()) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, ["speak", "stream"] * 4))
    assert backend.voice.fault is not None
    guard = guards.guard_of(backend.voice)
    assert guard is not None
    assert guard.held == 0


def test_undone_while_a_retry_runs_it_stays_undone(guarded: Any) -> None:
    backend = guarded(nan)
    stream = backend.stream(TEXT)
    next(stream)  # from the second attempt
    guard = guards.guard_of(backend.voice)
    assert guard is not None
    with guard.untouched():
        guard.retire()
    assert all(piece.isfinite().all() for piece in stream)
    assert backend.voice.fault is None


def test_what_can_be_read_once_is_not_made_again(guarded: Any, seen: list[Event]) -> None:
    backend = guarded(nan)
    assert backend.spoken_of(iter(["Good", "morning"])).isnan().any()
    (event,) = told(seen)
    assert "read once" in event.outcome
    assert event.count == 1


@dataclasses.dataclass
class Spoken:
    words: Iterator[str]


@pytest.mark.parametrize("given", [lambda words: [words], lambda words: {"a": (words,)}, Spoken])
def test_what_holds_something_that_can_be_read_once_is_not_made_again(
    given: Callable[[Iterator[str]], Any], guarded: Any, seen: list[Event]
) -> None:
    class Reader(Backend):
        @inference
        def spoken_of(self, request: Any) -> torch.Tensor:
            if isinstance(request, Spoken):
                return self.voice(SAMPLES * len("".join(request.words)))
            (words,) = request["a"] if isinstance(request, dict) else request
            return self.voice(SAMPLES * len("".join(words)))

    reader = Reader.__new__(Reader)
    reader.__dict__.update(vars(guarded()))
    assert reader.spoken_of(given(iter(["Good", "morning"]))).isnan().any()
    assert "can be read once" in told(seen)[0].outcome


def test_a_stream_that_was_sent_values_is_not_made_again(seen: list[Event]) -> None:
    class Asking(Backend):
        @inference
        def stream(self, text: str) -> Iterator[torch.Tensor]:
            for number in range(3):
                yield self.voice(PIECE, number)

    backend = Asking(nan)
    backend.voice.faulty_from = 1
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 3))
    stream: Any = backend.stream(TEXT)
    next(stream)
    assert stream.send("louder").isnan().any()
    assert next(stream).isnan().any()
    (event,) = told(seen)
    assert "sent into" in event.outcome


@pytest.mark.parametrize("kind", KINDS)
def test_exceptions_of_either_attempt_are_the_users(kind: str, guarded: Any, seen: list[Event]) -> None:
    class OutError(Exception):
        pass

    def fails(_wave: torch.Tensor) -> torch.Tensor:
        raise OutError

    backend = guarded(fails)
    with pytest.raises(OutError):
        call(backend, kind)
    backend = guarded(nan)
    original = backend.voice.forward

    def forward(samples: int, piece: int = 0) -> torch.Tensor:
        if backend.voice.fault is None:
            raise OutError
        return original(samples, piece)

    backend.voice.forward = forward
    with pytest.raises(OutError):
        call(backend, kind)
    assert backend.voice.fault is not None
    assert told(seen) == []


async def test_cancelling_and_closing_a_second_attempt_switches_the_changes_on(guarded: Any) -> None:
    backend = guarded(nan)
    inside, go_on = threading.Event(), threading.Event()

    def lasting(wave: torch.Tensor) -> torch.Tensor:
        if backend.voice.fault is None:
            inside.set()
            assert go_on.wait(LONG)  # so that the second attempt is under way when it is cancelled
        return wave

    backend.voice.own = lasting
    task = asyncio.create_task(backend.speak_later(TEXT))
    await until_later(inside.is_set)
    assert backend.voice.fault is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.voice.fault is not None
    go_on.set()
    stream = backend.stream_later(TEXT)
    await stream.__anext__()
    await stream.aclose()
    assert backend.voice.fault is not None
    short = backend.stream(TEXT)
    next(short)
    short.close()
    assert backend.voice.fault is not None


def test_a_generator_given_as_an_argument_has_its_state_back(guarded: Any) -> None:
    class Seeded(Backend):
        @inference
        def speak(self, text: str, generator: torch.Generator | None = None) -> torch.Tensor:
            wave = torch.randn(5000, generator=generator)
            return nan(wave) if self.voice.fault else wave

    backend = Seeded(nan)
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 3))
    wave = backend.speak(TEXT, generator=torch.Generator().manual_seed(5))
    assert torch.equal(wave, torch.randn(5000, generator=torch.Generator().manual_seed(5)))


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(5),
    "NumPy": lambda: np.random.default_rng(5),
    "NumPy's old": lambda: np.random.RandomState(5),
    "Python": lambda: random.Random(5),
}


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
@pytest.mark.parametrize("place", ["attribute", "of an attribute", "in a list", "of a module", "argument"])
def test_a_generator_that_is_kept_has_its_state_back(place: str, make: Any, seen: list[Event]) -> None:
    def drawn(generator: Any) -> list[float]:
        if isinstance(generator, torch.Generator):
            return torch.rand(5000, generator=generator).tolist()
        return [generator.random() if hasattr(generator, "random") else generator.random_sample() for _ in range(5000)]

    class Sampler:
        def __init__(self) -> None:
            self.generator = make()

    class Seeded(Backend):
        @inference
        def speak(self, text: str, sampler: Any = None) -> torch.Tensor:
            found: Any = {
                "attribute": lambda: self.sampler,
                "of an attribute": lambda: self.sampler.generator,
                "in a list": lambda: self.sampler[0],
                "of a module": lambda: self.voice.generator,
                "argument": lambda: sampler["generator"],
            }[place]()
            wave = torch.tensor(drawn(found))
            return nan(wave) if self.voice.fault else wave

    backend = Seeded(nan)
    backend.sampler = {"attribute": make, "in a list": lambda: [make()]}.get(place, Sampler)()  # type: ignore[attr-defined]
    backend.voice.generator = make()
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 3))
    wave = backend.speak(TEXT, sampler={"generator": make()})
    assert wave.tolist() == torch.tensor(drawn(make())).tolist()
    assert len(told(seen)) == 1


@pytest.mark.parametrize("which", GENERATORS)
def test_a_generator_that_another_thread_draws_from_is_left_alone(which: str, guarded: Any) -> None:
    """It must not be given numbers twice. The other generators are put back all the same."""
    backend, own = guarded(), GENERATORS[which]()
    backend.sessions = {"somebody else": own}
    shared: dict[str, Any] = {"torch": torch.default_generator, "NumPy's old": np.random.mtrand._rand, "Python": random}
    for generator in (own, shared.get(which)):
        if generator is None:  # NumPy has no new generator for all
            continue
        drawn: list[float] = []
        done = threading.Event()

        def draw(generator: Any = generator, drawn: list[float] = drawn, done: threading.Event = done) -> None:
            while not done.is_set():
                if isinstance(generator, torch.Generator):
                    drawn.append(float(torch.rand((), generator=generator, dtype=torch.float64)))
                else:
                    drawn.append(float(getattr(generator, "random_sample", generator.random)()))
                time.sleep(0)

        def beside(wave: torch.Tensor, drawn: list[float] = drawn) -> torch.Tensor:
            enough = len(drawn) + 6
            until(lambda: len(drawn) >= enough, "the other thread does not draw during each attempt")
            return wave

        backend.voice.own = beside
        thread = threading.Thread(target=draw)
        thread.start()
        try:
            for _ in range(2):
                assert backend.speak(TEXT).isfinite().all(), "it is made again"
        finally:
            done.set()
            thread.join()
        assert len(drawn) > 20
        assert len(set(drawn)) == len(drawn)


def test_decorated_functions_inside_a_second_attempt_are_left_alone(seen: list[Event]) -> None:
    class Nested(Backend):
        @inference
        def outer(self, text: str) -> torch.Tensor:
            return nan(self.speak(text)) if self.voice.fault else self.speak(text)

    backend = Nested(lambda wave: wave)
    backend.voice.own = nan
    guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 10))
    backend.outer(TEXT)
    # The inner one, its second attempt, and the inner one in the outer's second attempt.
    assert len(backend.voice.passes) == 3


def test_functions_that_are_given_the_model_are_guarded_too(guarded: Any, seen: list[Event]) -> None:
    @inference
    def speak(model: Any) -> torch.Tensor:
        return model(5000)

    voice = guarded(nan).voice
    assert speak(voice).isfinite().all()
    assert speak(model=voice).isfinite().all()
    assert len(told(seen)) == 2


def test_switched_off_nothing_is_looked_at(guarded: Any, seen: list[Event]) -> None:
    backend = guarded(nan)
    set_active(False)
    assert backend.speak(TEXT).isnan().any()
    assert seen == []


def test_a_guard_keeps_no_model_alive(guarded: Any) -> None:
    gc.collect()
    backend = Backend(nan)
    guard = guards.Guard("Voice", backend.tuning, {}, 3)
    guards.protect(backend, guard)
    backend.speak(TEXT)
    gone, forgotten = weakref.ref(backend.voice), weakref.ref(guard)
    del backend, guard
    gc.collect()
    assert gone() is None
    assert forgotten() is None, "the guard of an object that is gone is not kept either"


def test_changes_of_the_librarys_own_are_switched(seen: list[Event]) -> None:
    """A folded weight norm, and back."""
    folded: list[bool] = []

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 1, 3, padding=1))

        def forward(self, samples: int) -> torch.Tensor:
            folded.append(has_folds(self))
            wave = self.conv(torch.randn(1, 1, samples))
            return nan(wave) if folded[-1] else wave

    class Speaker:
        def __init__(self) -> None:
            self.vocoder = Vocoder().eval()

        @inference
        def speak(self, samples: int) -> torch.Tensor:
            return self.vocoder(samples)

    speaker = Speaker()
    change = FoldStage().prepare(Part("vocoder", "model", speaker.vocoder))
    seed()
    reference = speaker.speak(5000)
    tuning = Tuning(Receipt("Vocoder", "cpu", {}), (change,))
    tuning.on()
    guards.protect(speaker, guards.Guard("Vocoder", tuning, {}, 3))
    seed()
    assert torch.equal(speaker.speak(5000), reference)
    assert folded == [False, True, False]
    assert has_folds(speaker.vocoder)
    assert len(told(seen)) == 1


# --- loaded and tuned ---------------------------------------------------------------------------------------


class Service:
    @optimized_model(warmup=TEXT)
    def load(self) -> None:
        self.voice = Voice().eval()
        self.voice.seconds = 0.02

    @inference
    def speak(self, text: str) -> torch.Tensor:
        return self.voice(SAMPLES * len(text))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Takes the voice's delay away, and makes it faulty once it is told to."""
    made = Stage("faster", seconds=0.0, fault=None)
    monkeypatch.setattr(catalogue, "default_stages", lambda *_args: [made])
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tuned_backend_is_guarded(fault: str, stage: Stage, seen: list[Event]) -> None:
    service = Service()
    service.load()
    receipt = receipt_of(service)
    assert receipt is not None
    assert receipt.kept
    assert sum(note.startswith("guard: on") and "0 bytes" in note for note in receipt.notes) == 1
    service.speak(TEXT)
    assert told(seen) == []

    stage.attributes["fault"] = service.voice.fault = FAULTS[fault]
    for number in (1, 2, 3, 4):
        seed()
        wave = service.speak(TEXT)
        assert torch.equal(wave, untouched("speak"))
        assert len(told(seen)) == min(number, 3)
    assert {event.fault for event in told(seen)} == {fault}
    assert service.voice.seconds == 0.02
    after = receipt_of(service.voice)
    assert after is not None
    assert not after.kept
    assert "undone by the guard" in str(after)
    assert optimizer.get_performance_optimizer().undo(service)


def test_silence_and_length_of_the_warm_up_are_what_is_expected(
    stage: Stage, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Voice, "forward", _silence)
    service = Service()
    service.load()
    assert not service.speak(TEXT).any()
    assert told(seen) == []


def _silence(voice: Voice, samples: int) -> torch.Tensor:
    time.sleep(voice.seconds)
    return torch.zeros(1, samples)


def test_off_by_one_setting(stage: Stage, seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_GUARD", "0")
    service = Service()
    service.load()
    receipt = receipt_of(service)
    assert receipt is not None
    assert any(note.startswith("guard: off") for note in receipt.notes)
    service.voice.fault = nan
    assert service.speak(TEXT).isnan().any()
    assert told(seen) == []


def test_how_many_faults_are_borne_is_a_setting(stage: Stage, seen: list[Event]) -> None:
    begin_process(optimizer.PerformanceOptimizer(Settings(guard_limit=1)))
    service = Service()
    service.load()
    stage.attributes["fault"] = service.voice.fault = nan
    service.speak(TEXT)
    assert sum(isinstance(event, FellBack) for event in seen) == 1
    assert service.voice.fault is None


def test_a_returned_stream_is_guarded(guarded: Any, seen: list[Event]) -> None:
    class Streaming(Backend):
        @inference
        def pieces(self, text: str) -> Stream:
            return Stream("Voice", lambda _left: (self.voice(PIECE, number) for number in range(8)))

    streaming = Streaming.__new__(Streaming)
    streaming.__dict__.update(vars(guarded(faulty_from=3)))
    pieces = streaming.pieces(TEXT)
    assert isinstance(pieces, Stream)
    assert torch.isfinite(torch.cat(list(pieces), -1)).all()
    assert [event.fault for event in told(seen)] == ["NaN or Inf"]


async def test_a_call_after_a_long_chain_of_tasks_is_guarded(guarded: Any, seen: list[Event]) -> None:
    backend = guarded()
    calls = [0]

    class Prefetching(Backend):
        @inference
        async def speak_later(self, text: str) -> torch.Tensor:
            calls[0] += 1
            if calls[0] < 20:
                tasks.append(asyncio.create_task(self.after(text)))
            return torch.randn(5000) * 0.1 if calls[0] < 20 else self.voice(SAMPLES * len(text))

        async def after(self, text: str) -> torch.Tensor:
            await asyncio.sleep(0.001)
            return await self.speak_later(text)

    chained = Prefetching.__new__(Prefetching)
    chained.__dict__.update(vars(backend))
    tasks = [asyncio.create_task(chained.speak_later(TEXT))]
    while len(tasks) < 20:
        await tasks[-1]
    assert torch.isfinite(await tasks[-1]).all()
    assert len(told(seen)) == 1


def test_an_untuned_backend_is_not_guarded(seen: list[Event]) -> None:
    backend = Backend(nan)
    assert backend.speak(TEXT).isnan().any()
    assert seen == []


# --- looking ------------------------------------------------------------------------------------------------

WAVE = torch.sin(torch.arange(24_000) * 0.05) * torch.linspace(0.1, 0.5, 24_000)


@dataclasses.dataclass
class Speech:
    audio: Any
    rate: int = 24_000


class Plain:
    def __init__(self, audio: Any) -> None:
        self.audio = audio
        self.name = "x"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x[None, None],
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: list(x.numpy()),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.double().numpy(),
        lambda x: (24_000, x.numpy()),
        lambda x: {"wave": [x], "lengths": torch.tensor([24_000])},
        Speech,
        Plain,
        lambda x: Speech([Plain(x)]),
    ],
)  # fmt: skip
def test_each_fault_is_found_in_each_kind_of_output(wrap: Callable[[torch.Tensor], Any]) -> None:
    units = Units(24, 20)
    expected = Expectation.of([(units, audio_stats(wrap(WAVE)))])
    assert expected.sounds
    assert fault_of(audio_stats(wrap(WAVE)), units, expected) is None
    for fault, bad in {
        "NaN or Inf": nan(WAVE),
        "silent": torch.zeros_like(WAVE),
        "clipped flat": (WAVE * 1e4).clamp(-1, 1),
        "too long": WAVE.repeat(11),
    }.items():
        assert fault_of(audio_stats(wrap(bad)), units, expected) == fault
    for position in (0, 1, 12_345, 23_999):  # wherever it is
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = WAVE.clone()
            bad[position] = value
            assert not audio_stats(wrap(bad)).finite


def test_whole_numbers_that_are_audio_and_that_are_not() -> None:
    pcm = (WAVE * 32767).to(torch.int16)
    assert audio_stats(pcm).peak == pytest.approx(0.5, rel=0.01)
    assert audio_stats(pcm.numpy()).peak == pytest.approx(0.5, rel=0.01)
    assert fault_of(audio_stats(torch.zeros_like(pcm)), Units()) == "silent"
    assert fault_of(audio_stats((WAVE.sign() * 32767).to(torch.int16)), Units()) == "clipped flat"
    assert audio_stats(pcm.numpy().tobytes()).audio
    assert fault_of(audio_stats(bytes(48_000)), Units()) == "silent"
    for ids in (torch.arange(5000), list(range(5000)), np.arange(5000), True, 5, "text", None):
        assert audio_stats(ids) == AudioStats()


def test_channels_in_the_last_dimension_are_channels() -> None:
    stereo = torch.stack([WAVE, 0.5 * WAVE], -1)
    for wave in (stereo, WAVE[:, None], stereo.numpy(), stereo[None], (stereo * 32767).to(torch.int16)):
        stats = audio_stats(wave)
        assert stats.samples == len(WAVE)
        assert stats.peak == pytest.approx(0.5, rel=0.01)
        assert fault_of(stats, Units()) is None
        assert fault_of(audio_stats(0 * wave), Units()) == "silent"
    spectrum = torch.zeros(400, dtype=torch.complex64)
    for other in (torch.zeros(20, 400, 2), torch.zeros(400, 3), torch.zeros(8, 2), spectrum):
        assert audio_stats(other).samples != 400


def test_what_is_not_audio_is_judged_by_its_numbers_only() -> None:
    mel = torch.zeros(1, 80, 400)
    assert fault_of(audio_stats(mel), Units(20, 20)) is None
    mel[0, 3, 5] = float("inf")
    assert fault_of(audio_stats((mel, "x")), Units()) == "NaN or Inf"
    assert fault_of(audio_stats(float("nan")), Units()) == "NaN or Inf"
    assert fault_of(audio_stats(torch.tensor(float("nan"))), Units()) == "NaN or Inf"
    assert fault_of(audio_stats(torch.full((4,), complex(0, float("nan")))), Units()) == "NaN or Inf"
    assert fault_of(audio_stats(np.full(4, complex(0, float("nan")))), Units()) == "NaN or Inf"
    # A mask of logits: the reference has infinities, too.
    masked = Expectation.of([(Units(), audio_stats(mel))])
    assert fault_of(audio_stats(mel), Units(), masked) is None
    # Tensors beside the waveform are not the speech.
    assert fault_of(audio_stats((torch.zeros(24_000), torch.ones(256))), Units(20, 20)) == "silent"


def test_no_false_alarm() -> None:
    units, stats = Units(24, 20), audio_stats(WAVE)
    expected = Expectation.of([(units, stats)])
    silence, nothing = audio_stats(torch.zeros(24_000)), audio_stats(torch.zeros(0))
    for little in (Units(0, 0), Units(3, 0), Units(2, 2)):  # "", "...", "Hm"
        assert fault_of(silence, little, expected) is None
        assert fault_of(nothing, little, expected) is None
    assert fault_of(nothing, units, expected) == "silent"
    assert fault_of(silence, units, expected, whole=False) is None
    assert fault_of(audio_stats(WAVE * 0.01), units, expected) is None
    assert fault_of(audio_stats(WAVE.repeat(8)), units, expected) is None
    assert fault_of(audio_stats(WAVE.repeat(2)), Units(1, 1), expected) is None
    # The reference was silent, flat, or of no known text.
    assert fault_of(silence, units, Expectation.of([(units, silence)])) is None
    flat = audio_stats(torch.ones(24_000))
    assert fault_of(flat, units, Expectation.of([(units, flat)])) is None
    assert fault_of(audio_stats(WAVE.repeat(99)), units, Expectation.of([(Units(), stats)])) is None
    quiet_pause = audio_stats(torch.full((24_000,), 1e-3))
    assert fault_of(quiet_pause, units, expected, whole=False) is None


@pytest.mark.parametrize(
    ("args", "kwargs", "units"),
    [
        (("Hello there", "en"), {}, Units(11, 10)),
        ((), {"language": "en", "text": "Hi."}, Units(3, 2)),
        ((), {"voice": "a", "say": "Good morning"}, Units(12, 11)),
        ((["One.", "Two."],), {}, Units(8, 6)),
        ((3, torch.arange(9)[None]), {}, Units(9)),
        ((), {"input_ids": torch.arange(9)[None], "voice": torch.zeros(4)}, Units(9)),
        ((torch.zeros(4), 3, []), {}, Units()),
        ((), {}, Units()),
    ],
)
def test_how_much_there_is_to_say(args: Any, kwargs: Any, units: Units) -> None:
    assert units_of(args, kwargs) == units


@dataclasses.dataclass
class Request:
    language: str
    text: str


GOOD = "Good morning, everybody."
NAMED: dict[str, Callable[..., Any]] = {
    "a language first": lambda language, text: (language, text),
    "a path first": lambda ref_audio, gen_text: (ref_audio, gen_text),
    "a reference's text": lambda ref_wav_path, prompt_text, prompt_language, text, text_language: None,
    "cosy": lambda tts_text, prompt_text, prompt_speech: None,
    "names that say nothing": lambda a, b: None,
    "any": lambda *args: None,
    "a default": lambda text=None, voice="af_heart": None,
    "keywords only": lambda *, text, speaker: None,
}
LONG_PATH = "/srv/voices/of/somebody/whose/name/is/very/long/reference.wav"


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("a language first", ("en", GOOD), {}),
        ("a language first", (GOOD * 3,), {"text": GOOD}),
        ("a path first", (LONG_PATH, GOOD), {}),
        ("a path first", (), {"gen_text": GOOD, "ref_audio": LONG_PATH}),
        ("a reference's text", (LONG_PATH, GOOD * 4, "en", GOOD, "en"), {}),
        ("a reference's text", (LONG_PATH, GOOD * 4, "en"), {"text": GOOD, "text_language": "en"}),
        ("cosy", (GOOD, GOOD * 2, torch.zeros(16000)), {}),
        ("names that say nothing", ("en", GOOD), {}),
        ("names that say nothing", (GOOD, "en"), {}),
        ("names that say nothing", (LONG_PATH, GOOD), {}),
        ("names that say nothing", ("https://example.com/a/very/long/address/of/a/voice", GOOD), {}),
        ("any", ("en-us", "voice.wav", GOOD), {}),
        ("a default", (GOOD,), {"voice": "a-very-long-name-of-a-voice-that-is-no-text"}),
        ("keywords only", (), {"speaker": "a-very-long-name-of-a-speaker", "text": GOOD}),
        ("any", (Request("en", GOOD),), {}),
        ("any", ({"text": GOOD, "language": "en"},), {}),
    ],
)
def test_the_text_is_found_by_the_names_of_parameters(name: str, args: Any, kwargs: Any) -> None:
    function = NAMED[name]
    assert units_of(args, kwargs, function) == units_of((GOOD,), {})
    assert units_of(args, kwargs, functools.partial(function)) == units_of((GOOD,), {})


def test_a_method_is_asked_for_its_text_without_its_object(seen: list[Event]) -> None:
    class InAnyOrder(Backend):
        @inference
        def speak(self, language: str, text: str) -> torch.Tensor:  # type: ignore[override]
            return self.voice(SAMPLES * len(text))

    ways: list[Callable[[Any], torch.Tensor]] = [
        lambda b: b.speak("en", TEXT),
        lambda b: b.speak(text=TEXT, language="en"),
        lambda b: type(b).speak(b, "en", TEXT),
    ]
    for speak in ways:
        backend = InAnyOrder(torch.zeros_like)
        name = f"{InAnyOrder.__qualname__}.speak"
        expected = {name: Expectation.of([(Units(24, 20), audio_stats(untouched("speak")))])}
        guards.protect(backend, guards.Guard("Voice", backend.tuning, expected, 3))
        assert speak(backend).any(), "two letters of a language are nothing to say, so silence was right"
        assert told(seen)[-1].fault == "silent"
        backend = InAnyOrder(lambda wave: wave)
        guards.protect(backend, guards.Guard("Voice", backend.tuning, expected, 3))
        before = len(told(seen))
        backend.speak("en", TEXT * 20)
        assert len(told(seen)) == before, "good speech was too long for two letters"


def test_what_can_be_cut() -> None:
    assert size_of(torch.zeros(1, 7)) == 7
    assert size_of(np.zeros(7)) == 7
    assert size_of(b"1234567") == 7
    assert [size_of(x) for x in (torch.zeros(2, 7), torch.tensor(1.0), (torch.zeros(7),), None)] == [None] * 4


class Broken:
    """Raises at everything."""

    def __getattribute__(self, name: str) -> Any:
        if name != "__class__":  # which hypothesis asks for
            raise RuntimeError(name)
        return Broken


_leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(),
    st.builds(Broken),
    st.builds(object),
    st.sampled_from(["float32", "float64", "float16", "bfloat16", "int16", "int64", "bool", "complex64"]).flatmap(
        lambda name: st.lists(st.integers(0, 3), max_size=4).map(
            lambda shape: torch.ones(shape, dtype=getattr(torch, name))
        )
    ),
    st.sampled_from(["f4", "f8", "f2", "i2", "i8", "?", "c8", "O", "U3", "M8[s]"]).flatmap(
        lambda name: st.lists(st.integers(0, 3), max_size=4).map(lambda shape: np.zeros(shape, dtype=name))
    ),
    st.just(torch.ones(3, device="meta")),
    st.just(torch.eye(3).to_sparse()),
    st.just(torch.ones(3, requires_grad=True)),
    st.just(nn.Linear(2, 2)),
)
_outputs = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.builds(Speech, inner),
        st.builds(Plain, inner),
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(_outputs, st.booleans())
def test_no_output_makes_the_guard_raise(output: Any, whole: bool) -> None:
    stats, units = audio_stats(output), units_of((output,), {"text": output})
    fault_of(stats, units, whole=whole)
    fault_of(stats, units, Expectation.of([(units, stats)]), whole=whole)
    size_of(output)


def test_a_proxy_that_is_bound_to_nothing_costs_no_call(guarded: Any) -> None:
    backend = guarded(nan)
    backend.request = Broken()
    backend.requests = [{"a": Broken()}]
    assert backend.speak(TEXT).isfinite().all()


def test_an_output_that_holds_itself_is_looked_at_to_a_depth() -> None:
    ring: list[Any] = [nan(WAVE)]
    ring.append(ring)
    assert not audio_stats(ring).finite
    wide = {str(number): torch.zeros(4) for number in range(10_000)}
    assert audio_stats(wide).finite


def test_the_event_is_logged_with_its_fault(seen: list[Event]) -> None:
    emit(Guarded("Voice", "B.speak", "silent", "made again", 1))
    assert str(seen[0]) == "Voice: the output of B.speak was silent (fault 1); made again"


# --- several tuned objects, and calls beside a second attempt ------------------------------------------------------


class TwoStep(Backend):
    """An acoustic model and a vocoder that were loaded and tuned one after the other."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.vocoder = Voice()
        self.second = Tuning(Receipt("Vocoder", "cpu", {}), (Change(self.vocoder, lambda wave: wave),))
        self.second.on()

    @inference
    def speak(self, text: str) -> torch.Tensor:
        return self.voice(SAMPLES * len(text)) + 0.01 * self.vocoder(SAMPLES * len(text))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_tuned_objects_either_is_guarded(order: tuple[int, int], seen: list[Event]) -> None:
    backend = TwoStep(nan)
    both = [
        guards.Guard(name, tuning, {}, 2) for name, tuning in (("Voice", backend.tuning), ("Vocoder", backend.second))
    ]
    for number in order:  # both loads remember the backend; the last one used to take it over
        guards.protect(backend, both[number])
    for _ in range(2):
        assert bool(backend.speak(TEXT).isfinite().all())
    assert {event.what for event in told(seen)} == {"Voice", "Vocoder"}, "nobody knows whose fault it was"
    assert all(guard.retired for guard in both)
    assert backend.voice.fault is None
    assert all(guard.held == 0 for guard in both)
    assert bool(backend.speak(TEXT).isfinite().all())


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", ["speak", "stream_later"])
def test_a_healthy_call_is_not_made_again_for_anothers_fault(
    kind: str, other: str, guarded: Any, seen: list[Event]
) -> None:
    """The second attempt waits until the healthy call is out, which sees one model from its beginning to its end."""
    backend = guarded(lambda wave: wave)
    inside, seen_states = threading.Event(), []

    def own(wave: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            seen_states.append(backend.voice.fault is not None)
            inside.set()
            time.sleep(0.05)
            seen_states.append(backend.voice.fault is not None)
            return wave
        return nan(wave) if backend.voice.fault else wave

    backend.voice.own = own

    class Healthy(Backend):
        def __init__(self) -> None:
            self.voice, self.tuning = backend.voice, backend.tuning

        async def work(self) -> torch.Tensor:
            return self.voice(SAMPLES * len(TEXT))

        @inference
        async def speak_later(self, text: str) -> torch.Tensor:
            await asyncio.sleep(0)
            return await self.work()

    thread, results = in_thread(lambda: call(Healthy(), other))
    assert inside.wait(20)
    assert call(backend, kind).isfinite().all()
    thread.join(20)
    assert isinstance(results[0], torch.Tensor)
    assert len(seen_states) == (2 if "speak" in other else 2 * (len(TEXT) * SAMPLES // PIECE)), "it was made again"
    assert seen_states[::2] == seen_states[1::2], "it was switched under a call's feet"
    assert [event.count for event in told(seen)] == [1]
    assert backend.voice.fault is not None
    assert guards.guard_of(backend.voice).held == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_anothers_own_is_not_made_again(kind: str, guarded: Any) -> None:
    backend = guarded(lambda wave: wave)
    inside, calls = threading.Event(), []

    def own(wave: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name == "failing":
            calls.append(1)
            inside.set()
            time.sleep(0.05)
            raise ValueError("no such voice")
        return nan(wave) if backend.voice.fault else wave

    class Failing(Backend):
        @inference
        def speak(self, text: str) -> torch.Tensor:
            threading.current_thread().name = "failing"
            return self.voice(SAMPLES * len(text))

    failing = Failing(nan)
    failing.voice, failing.tuning = backend.voice, backend.tuning
    backend.voice.own = own
    thread, results = in_thread(lambda: failing.speak(TEXT))
    assert inside.wait(20)
    assert call(backend, kind).isfinite().all()
    thread.join(20)
    assert isinstance(results[0], ValueError)
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_where_there_is_no_gap_a_faulty_output_is_given_as_it_is(kind: str, seen: list[Event]) -> None:
    backend = Backend(nan)
    guard = guards.Guard("Voice", backend.tuning, {}, 10, patience=0.1)
    guards.protect(backend, guard)
    go_on, inside = threading.Event(), threading.Event()

    class Long(Backend):
        @inference
        def speak(self, text: str) -> torch.Tensor:
            inside.set()
            assert go_on.wait(20)
            return torch.ones(5000)

    long = Long(nan)
    guards.protect(long, guard)
    thread, _ = in_thread(lambda: long.speak(TEXT))
    assert inside.wait(20)
    assert call(backend, kind).isnan().any()
    (event,) = told(seen)
    assert "other calls of the object were under way" in event.outcome
    assert event.count == 1
    # A call that comes now is not kept waiting for long, either.
    go_on.set()
    thread.join(20)
    assert call(backend, kind).isfinite().all()


def test_calls_that_come_while_a_switch_waits_wait_at_the_door(guarded: Any) -> None:
    """Otherwise a busy service might never have a moment for the switch."""
    backend = guarded(lambda wave: wave, limit=1000)
    stop, passes, made = threading.Event(), [], [0, 0, 0]

    def own(wave: torch.Tensor) -> torch.Tensor:
        before = backend.voice.fault
        time.sleep(0.01)
        passes.append(before is backend.voice.fault)
        return nan(wave) if threading.current_thread() is threading.main_thread() and before else wave

    def busy(number: int) -> bool:
        while not stop.is_set():
            backend.speak(TEXT)
            made[number] += 1
        return True

    backend.voice.own = own
    threads = [in_thread(functools.partial(busy, number)) for number in range(3)]
    until(lambda: all(made), "all three are at work")
    for _ in range(2):
        assert backend.speak(TEXT).isfinite().all()
    before = list(made)
    until(lambda: all(now > then for now, then in zip(made, before, strict=True)), "and go on after a switch")
    stop.set()
    for thread, results in threads:
        thread.join(LONG)
        assert results == [True]
    assert all(passes)
    backend.speak(TEXT)
    assert backend.voice.fault is not None, "the changes are in force again once there is a gap"


def test_a_call_whose_loop_was_closed_is_inside_no_more() -> None:
    """It never goes on. Each faulty output was returned as it is, after ten seconds."""
    switched: list[str] = []
    gate = Gate(lambda: switched.append("on"), lambda: switched.append("off"), 30.0, lambda _why: None)
    loop = asyncio.new_event_loop()
    attempt = Voice()
    step = Step(attempt)
    step.loop = loop
    gate.enter(step, wait=True)
    loop.close()
    with gate.hold(None):
        assert switched == ["off"]
    assert switched == ["off", "on"]
    assert step.is_over


async def test_coroutines_of_one_loop_do_not_wait_for_each_other_for_ever(guarded: Any) -> None:
    backend = guarded(nan, limit=1000)
    waves = await asyncio.gather(*(backend.speak_later(TEXT) for _ in range(5)))
    assert all(bool(wave.isfinite().all()) for wave in waves)

    class Mixed(Backend):
        @inference
        async def slow(self, text: str) -> torch.Tensor:
            await asyncio.sleep(0.05)
            return torch.ones(5000)

    mixed = Mixed(nan)
    # It would be patient for longer than a test may take.
    guards.protect(mixed, guards.Guard("Voice", mixed.tuning, {}, 10, patience=10 * LONG))
    task = asyncio.create_task(mixed.slow(TEXT))
    await asyncio.sleep(0)
    start = time.monotonic()
    assert mixed.speak(TEXT).isnan().any()  # a plain call that blocks the loop on which the other one runs
    assert time.monotonic() - start < LONG, "it waited in vain"
    await task


def test_a_call_inside_another_may_be_made_again(guarded: Any, seen: list[Event]) -> None:
    class Nested(Backend):
        @inference
        def outer(self, text: str) -> torch.Tensor:
            return self.speak(text)

        @inference
        def stream(self, text: str) -> Iterator[torch.Tensor]:
            yield self.speak(text)

        @inference
        async def gathered(self, text: str) -> torch.Tensor:
            return torch.cat(await asyncio.gather(*(self.speak_later(text) for _ in range(3))), -1)

    for name in ("outer", "stream", "gathered"):
        backend = Nested(nan)
        guards.protect(backend, guards.Guard("Voice", backend.tuning, {}, 10))
        result = getattr(backend, name)(TEXT)
        wave = asyncio.run(result) if name == "gathered" else torch.cat(list(result), -1)
        assert wave.isfinite().all()
        assert backend.voice.fault is not None


# --- functions that do more than compute ----------------------------------------------------------------------------


class Charging(Backend):
    """Charges for each call."""

    def __init__(self, fault: Fault, limit: int = 10) -> None:
        super().__init__(fault)
        self.charged = 0
        self.guard = guards.Guard("Voice", self.tuning, {}, limit)
        guards.protect(self, self.guard)

    @inference(retry=False)
    def speak(self, text: str) -> torch.Tensor:
        self.charged += 1
        return self.voice(SAMPLES * len(text))

    @inference(retry=False)
    async def speak_later(self, text: str) -> torch.Tensor:
        self.charged += 1
        return await asyncio.to_thread(self.voice, SAMPLES * len(text))

    @inference(retry=False)
    def stream(self, text: str) -> Iterator[torch.Tensor]:
        self.charged += 1
        for number in range(len(text) * SAMPLES // PIECE):
            yield self.voice(PIECE, number)

    @inference(retry=False)
    async def stream_later(self, text: str) -> AsyncIterator[torch.Tensor]:
        self.charged += 1
        for number in range(len(text) * SAMPLES // PIECE):
            yield self.voice(PIECE, number)

    @inference
    def around(self, text: str) -> torch.Tensor:
        return self.speak(text) * 1.0

    @inference(retry=False)
    def beside(self, text: str) -> torch.Tensor:
        self.charged += 1
        return self.computed(text)

    @inference
    def computed(self, text: str) -> torch.Tensor:
        return self.voice(SAMPLES * len(text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_with_retry_off_is_never_made_again(kind: str, seen: list[Event]) -> None:
    backend = Charging(nan)
    assert call(backend, kind).isnan().any()
    assert backend.charged == 1
    (event,) = told(seen)
    assert (event.fault, event.count) == ("NaN or Inf", 1)
    assert "as it is: the function has retry=False" in event.outcome


def test_what_calls_it_is_not_made_again_either(seen: list[Event]) -> None:
    backend = Charging(nan)
    assert backend.around(TEXT).isnan().any()
    assert backend.charged == 1
    assert "which has retry=False" in told(seen)[-1].outcome
    seen.clear()
    assert backend.beside(TEXT).isfinite().all(), "what only computes inside it is made again"
    assert backend.charged == 2
    assert [event.count for event in told(seen)] == [3]


def test_after_some_faults_of_such_a_function_the_object_is_put_back(seen: list[Event]) -> None:
    backend = Charging(nan, limit=2)
    for _ in range(3):
        backend.speak(TEXT)
    assert backend.guard.retired
    assert backend.voice.fault is None
    assert backend.charged == 3


@pytest.mark.parametrize("value", [0, 1, None, "no"])
def test_a_retry_that_means_nothing(value: Any) -> None:
    with pytest.raises(SettingsError, match="retry=.* must be True or False"):
        inference(retry=value)


# --- interruptions ----------------------------------------------------------------------------------------------------


class Interrupted(BaseChange):
    """Ctrl-C comes in the middle of the n-th switch."""

    def __init__(self, switches: list[str], when: int) -> None:
        self.switches, self.when = switches, when
        self.is_on = False

    def _switch(self, way: str) -> None:
        self.switches.append(way)
        if len(self.switches) == self.when:
            raise KeyboardInterrupt

    def on(self) -> None:
        self._switch("on")
        self.is_on = True

    def off(self) -> None:
        self._switch("off")
        self.is_on = False


@pytest.mark.parametrize("when", range(1, 7))
@pytest.mark.parametrize("kind", ["speak", "stream"])
def test_an_interrupted_switch_is_not_left_half_done(kind: str, when: int) -> None:
    switches: list[str] = []
    changes = [Interrupted(switches, 0) for _ in range(3)]
    backend = Backend(nan)
    tuning = Tuning(Receipt("Voice", "cpu", {}), (*changes, *backend.tuning.changes))
    tuning.on()
    switches.clear()
    for change in changes:
        change.when = when
    guards.protect(backend, guards.Guard("Voice", tuning, {}, 10))
    with pytest.raises(KeyboardInterrupt):
        call(backend, kind)
    states: list[bool] = []

    def own(wave: torch.Tensor) -> torch.Tensor:
        states.append(all(change.is_on for change in changes))
        backend.voice.fault = None  # healthy from here on
        return wave

    backend.voice.own = own
    call(backend, kind)
    assert states[0]
    assert all(change.is_on for change in changes)
    assert guards.guard_of(backend).held == 0  # type: ignore[union-attr]


# --- calls, threads and faults in any order -------------------------------------------------------------------------


_plans = st.lists(
    st.tuples(
        st.sampled_from([*KINDS, "around", "beside", "closed", "retire"]),
        st.sampled_from(["healthy", "faulty", "raises"]),
    ),
    min_size=1,
    max_size=5,
)


class Watched(Charging):
    """Notices whether it is switched within one step, and counts how often each call's body is run."""

    def __init__(self) -> None:
        super().__init__(lambda wave: wave)
        self.behaviour = threading.local()
        self.mixed = 0
        self.voice.own = self.checked

    def checked(self, wave: torch.Tensor) -> torch.Tensor:
        before = self.voice.fault
        time.sleep(0.0005)
        self.mixed += before is not self.voice.fault
        kind = getattr(self.behaviour, "kind", "healthy")
        self.behaviour.bodies = getattr(self.behaviour, "bodies", 0) + 1
        if kind == "raises":
            raise LookupError
        return nan(wave) if kind == "faulty" and before is not None else wave

    @inference
    def speak(self, text: str) -> torch.Tensor:
        return self.voice(SAMPLES * len(text))

    @inference
    def stream(self, text: str) -> Iterator[torch.Tensor]:
        for number in range(3):
            yield self.voice(PIECE, number)

    @inference
    async def speak_later(self, text: str) -> torch.Tensor:
        await asyncio.sleep(0)
        return self.voice(SAMPLES * len(text))

    @inference
    async def stream_later(self, text: str) -> AsyncIterator[torch.Tensor]:
        for number in range(3):
            await asyncio.sleep(0)
            yield self.voice(PIECE, number)


def run_plan(backend: Watched, plan: list[tuple[str, str]]) -> list[str]:
    wrong = []
    for kind, behaviour in plan:
        backend.behaviour.kind, backend.behaviour.bodies = behaviour, 0
        most = {"stream": 3, "stream_later": 3, "closed": 1}.get(kind, 1)
        try:
            if kind == "retire":
                backend.guard.retire()
                continue
            if kind == "closed":
                stream = backend.stream(TEXT)
                next(stream)
                stream.close()
            elif kind in {"around", "beside"}:
                getattr(backend, kind)(TEXT)
            else:
                wave = call(backend, kind)
                if behaviour == "raises" or not wave.isfinite().all():
                    wrong.append(f"{kind} {behaviour}: {wave}")
        except LookupError:
            if behaviour != "raises" or backend.behaviour.bodies != 1:
                wrong.append(f"{kind} {behaviour} raised after {backend.behaviour.bodies} bodies")
            continue
        if backend.behaviour.bodies > (most if behaviour == "healthy" else 2 * most):
            wrong.append(f"{kind} {behaviour}: {backend.behaviour.bodies} bodies")
    return wrong


@settings(max_examples=25, deadline=None)
@given(st.lists(_plans, min_size=1, max_size=4))
def test_in_any_order_nothing_is_switched_under_a_calls_feet(plans: list[list[tuple[str, str]]]) -> None:
    backend = Watched()
    threads = [in_thread(lambda plan=plan: run_plan(backend, plan)) for plan in plans]  # type: ignore[misc]
    for thread, _ in threads:
        thread.join(30)
    assert [results for _, results in threads] == [[[]] for _ in plans]
    assert backend.mixed == 0
    assert backend.guard.held == 0
    backend.behaviour.kind = "healthy"
    backend.speak(TEXT)
    retired = any(kind == "retire" for plan in plans for kind, _ in plan) or backend.guard.retired
    assert (backend.voice.fault is None) == retired


@pytest.mark.parametrize("kind", ["speak", "speak_later"])
def test_a_users_own_exception_is_not_made_again(kind: str, guarded: Any) -> None:
    backend = guarded(lambda wave: wave)
    calls = []

    def own(_wave: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        raise ValueError("no such voice")

    backend.voice.own = own
    with pytest.raises(ValueError, match="no such voice"):
        call(backend, kind)
    assert len(calls) == 1


def test_a_switch_that_fails_holds_nothing(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = guarded(nan)
    guard = guards.guard_of(backend.voice)
    assert guard is not None

    def fails(_change: Change) -> None:
        raise OSError

    with monkeypatch.context() as patched:
        patched.setattr(Change, "off", fails)
        with pytest.raises(OSError), guard.untouched():
            pass
    assert guard.held == 0
    with guard.untouched():
        assert backend.voice.fault is None
    assert backend.voice.fault is not None


@pytest.mark.parametrize(("samples", "fault"), [(15_000, None), (25_000, "too long")])
def test_a_word_may_be_longer_than_its_letters_suggest(samples: int, fault: str | None) -> None:
    expected = Expectation(rate=100.0, longest=1000)
    stats = AudioStats(audio=True, samples=samples, swing=1.0, peak=1.0)
    assert fault_of(stats, Units(2, 2), expected) == fault


def test_what_is_off_already_waits_for_nobody() -> None:
    """A call that began meanwhile runs untouched, and need not end before another one is repeated."""
    log: list[str] = []
    gate = Gate(lambda: log.append("on"), lambda: log.append("off"), 0.05, log.append)
    first = gate.hold(None)
    inside = Step()
    gate.enter(inside, wait=False)
    second = gate.hold(None)
    first.release()
    second.release()
    assert log == ["off"]
    gate.leave(inside)
    assert log == ["off", "on"]


def test_the_collector_may_close_a_stream_while_changes_are_switched(guarded: Any) -> None:
    """An abandoned stream in a cycle, closed on the thread that holds the guard's lock: it used to wait for itself."""
    backend = guarded(nan)
    stream = backend.stream(TEXT)
    next(stream)  # from the second attempt
    guard = guards.guard_of(backend.voice)
    assert guard is not None
    done = []

    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:  # asked for while the guard holds its lock
            stream.close()
            return 1

    def closes() -> None:
        guard.own(Name("Backend.stream"), "silent")
        done.append(1)

    thread = threading.Thread(target=closes, daemon=True)
    thread.start()
    thread.join(20)
    assert done
    assert guard.held == 0
