"""The guard notices faulty output, makes the call again on the untouched model, and after some of them puts it back."""

from __future__ import annotations

import asyncio
import dataclasses
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
from torch import nn

from accelerate_tts import Settings, inference, optimized_model, optimizer, receipt_of, set_active
from accelerate_tts.engine import stages
from accelerate_tts.engine.plan import Part
from accelerate_tts.engine.receipt import Receipt
from accelerate_tts.engine.stages.base import BaseChange, BaseStage
from accelerate_tts.engine.stages.fold import FoldStage
from accelerate_tts.engine.tune import Tuning
from accelerate_tts.events import Event, FellBack, Guarded, emit
from accelerate_tts.runtime import retry
from accelerate_tts.runtime.guard import Expectation, Heard, Units, fault_of, hear, size_of, units_of

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
    """What the untouched model leads one to expect."""
    listener = retry.Listener()
    for kind in KINDS:
        listener.judge(f"Backend.{kind}", units_of((text,), {}), hear(untouched("speak", text)), whole=True)
    return listener.expected


@pytest.fixture
def guarded() -> Iterator[Callable[..., Backend]]:
    alive = []

    def make(fault: Fault = nan, limit: int = 3, faulty_from: int = 0) -> Backend:
        backend = Backend(fault)
        backend.voice.faulty_from = faulty_from
        guard = retry.Guard("Voice", backend.tuning, expected_of(), limit)
        for item in (backend.voice, backend.tuning):
            retry.protect(item, guard)
        alive.append(backend)
        return backend

    yield make
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not retry._retrying.get()


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


def test_changes_are_in_force_while_the_consumer_has_a_piece(guarded: Any) -> None:
    backend = guarded(nan)
    other = [backend.voice.fault is not None for _ in backend.stream(TEXT)]
    assert len(other) == len(TEXT) * SAMPLES // PIECE
    assert all(other)


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
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 3))
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
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 3))
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
    retry.protect(backend, retry.Guard("Voice", backend.tuning, expected, 3))
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
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 3))

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
    assert "the untouched model gives the same" in told(seen)[0].outcome
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
    guard = retry.guard_of(backend.voice)
    assert guard is not None
    assert guard._held == 0


def test_undone_while_a_retry_runs_it_stays_undone(guarded: Any) -> None:
    backend = guarded(nan)
    stream = backend.stream(TEXT)
    next(stream)  # from the second attempt
    guard = retry.guard_of(backend.voice)
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


def test_a_stream_that_was_sent_values_is_not_made_again(seen: list[Event]) -> None:
    class Asking(Backend):
        @inference
        def stream(self, text: str) -> Iterator[torch.Tensor]:
            for number in range(3):
                yield self.voice(PIECE, number)

    backend = Asking(nan)
    backend.voice.faulty_from = 1
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 3))
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
    backend.voice.seconds = 0.05
    task = asyncio.create_task(backend.speak_later(TEXT))
    while backend.voice.fault is not None:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.voice.fault is not None
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
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 3))
    wave = backend.speak(TEXT, generator=torch.Generator().manual_seed(5))
    assert torch.equal(wave, torch.randn(5000, generator=torch.Generator().manual_seed(5)))


def test_decorated_functions_inside_a_second_attempt_are_left_alone(seen: list[Event]) -> None:
    class Nested(Backend):
        @inference
        def outer(self, text: str) -> torch.Tensor:
            return nan(self.speak(text)) if self.voice.fault else self.speak(text)

    backend = Nested(lambda wave: wave)
    backend.voice.own = nan
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 10))
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
    before = set(retry._guards)
    backend = Backend(nan)
    retry.protect(backend, retry.Guard("Voice", backend.tuning, {}, 3))
    backend.speak(TEXT)
    gone = weakref.ref(backend.voice)
    del backend
    gc.collect()
    assert gone() is None
    assert set(retry._guards) <= before


def test_changes_of_the_librarys_own_are_switched(seen: list[Event]) -> None:
    """A folded weight norm: other classes on the same modules, and back."""
    folded: list[bool] = []

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 1, 3, padding=1))

        def forward(self, samples: int) -> torch.Tensor:
            folded.append(type(self.conv) is not self.plain)
            wave = self.conv(torch.randn(1, 1, samples))
            return nan(wave) if folded[-1] else wave

    class Speaker:
        def __init__(self) -> None:
            self.vocoder = Vocoder().eval()
            self.vocoder.plain = type(self.vocoder.conv)

        @inference
        def speak(self, samples: int) -> torch.Tensor:
            return self.vocoder(samples)

    speaker = Speaker()
    change = FoldStage().prepare(Part("vocoder", "model", speaker.vocoder))
    seed()
    reference = speaker.speak(5000)
    tuning = Tuning(Receipt("Vocoder", "cpu", {}), (change,))
    tuning.on()
    retry.protect(speaker, retry.Guard("Vocoder", tuning, {}, 3))
    seed()
    assert torch.equal(speaker.speak(5000), reference)
    assert folded == [False, True, False]
    assert type(speaker.vocoder.conv) is not speaker.vocoder.plain
    assert len(told(seen)) == 1


# --- loaded and tuned ---------------------------------------------------------------------------------------


class Faster(BaseStage):
    """Takes the voice's delay away, and makes it faulty once it is told to."""

    name = "faster"
    least_share = 0.0

    def __init__(self) -> None:
        self.in_service: Fault | None = None

    def applies(self, part: Any) -> str | None:
        return None

    def prepare(self, part: Any) -> Any:
        stage, voice = self, part.module

        class Quick(BaseChange):
            def on(self) -> None:
                voice.seconds, voice.fault = 0.0, stage.in_service

            def off(self) -> None:
                voice.seconds, voice.fault = 0.02, None

        return Quick()


class Service:
    @optimized_model(warmup=TEXT)
    def load(self) -> None:
        self.voice = Voice().eval()
        self.voice.seconds = 0.02

    @inference
    def speak(self, text: str) -> torch.Tensor:
        return self.voice(SAMPLES * len(text))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Faster:
    made = Faster()
    monkeypatch.setattr(stages, "default_stages", lambda *_args: [made])
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tuned_backend_is_guarded(fault: str, stage: Faster, seen: list[Event]) -> None:
    service = Service()
    service.load()
    receipt = receipt_of(service)
    assert receipt is not None
    assert receipt.kept
    assert sum(note.startswith("guard: on") and "0 bytes" in note for note in receipt.notes) == 1
    service.speak(TEXT)
    assert told(seen) == []

    stage.in_service = service.voice.fault = FAULTS[fault]
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
    assert "put back by the guard" in str(after)
    assert optimizer.get_performance_optimizer().undo(service)


def test_silence_and_length_of_the_warm_up_are_what_is_expected(
    stage: Faster, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Voice, "forward", _silence)
    service = Service()
    service.load()
    assert not service.speak(TEXT).any()
    assert told(seen) == []


def _silence(voice: Voice, samples: int) -> torch.Tensor:
    time.sleep(voice.seconds)
    return torch.zeros(1, samples)


def test_off_by_one_setting(stage: Faster, seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_GUARD", "0")
    service = Service()
    service.load()
    receipt = receipt_of(service)
    assert receipt is not None
    assert any(note.startswith("guard: off") for note in receipt.notes)
    service.voice.fault = nan
    assert service.speak(TEXT).isnan().any()
    assert told(seen) == []


def test_how_many_faults_are_borne_is_a_setting(
    stage: Faster, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "_optimizer", optimizer.PerformanceOptimizer(Settings(guard_limit=1)))
    service = Service()
    service.load()
    stage.in_service = service.voice.fault = nan
    service.speak(TEXT)
    assert sum(isinstance(event, FellBack) for event in seen) == 1
    assert service.voice.fault is None


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
    expected = Expectation.of([(units, hear(wrap(WAVE)))])
    assert expected.sounds
    assert fault_of(hear(wrap(WAVE)), units, expected) is None
    for fault, bad in {
        "NaN or Inf": nan(WAVE),
        "silent": torch.zeros_like(WAVE),
        "clipped flat": (WAVE * 1e4).clamp(-1, 1),
        "too long": WAVE.repeat(11),
    }.items():
        assert fault_of(hear(wrap(bad)), units, expected) == fault
    for position in (0, 1, 12_345, 23_999):  # wherever it is
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = WAVE.clone()
            bad[position] = value
            assert not hear(wrap(bad)).finite


def test_whole_numbers_that_are_audio_and_that_are_not() -> None:
    pcm = (WAVE * 32767).to(torch.int16)
    assert hear(pcm).peak == pytest.approx(0.5, rel=0.01)
    assert hear(pcm.numpy()).peak == pytest.approx(0.5, rel=0.01)
    assert fault_of(hear(torch.zeros_like(pcm)), Units()) == "silent"
    assert fault_of(hear((WAVE.sign() * 32767).to(torch.int16)), Units()) == "clipped flat"
    assert hear(pcm.numpy().tobytes()).audio
    assert fault_of(hear(bytes(48_000)), Units()) == "silent"
    for ids in (torch.arange(5000), list(range(5000)), np.arange(5000), True, 5, "text", None):
        assert hear(ids) == Heard()


def test_what_is_not_audio_is_judged_by_its_numbers_only() -> None:
    mel = torch.zeros(1, 80, 400)
    assert fault_of(hear(mel), Units(20, 20)) is None
    mel[0, 3, 5] = float("inf")
    assert fault_of(hear((mel, "x")), Units()) == "NaN or Inf"
    assert fault_of(hear(float("nan")), Units()) == "NaN or Inf"
    assert fault_of(hear(torch.tensor(float("nan"))), Units()) == "NaN or Inf"
    assert fault_of(hear(torch.full((4,), complex(0, float("nan")))), Units()) == "NaN or Inf"
    assert fault_of(hear(np.full(4, complex(0, float("nan")))), Units()) == "NaN or Inf"
    # A mask of logits: the reference has infinities, too.
    masked = Expectation.of([(Units(), hear(mel))])
    assert fault_of(hear(mel), Units(), masked) is None
    # What lies beside the waveform is not the speech.
    assert fault_of(hear((torch.zeros(24_000), torch.ones(256))), Units(20, 20)) == "silent"


def test_no_false_alarm() -> None:
    units, heard = Units(24, 20), hear(WAVE)
    expected = Expectation.of([(units, heard)])
    silence, nothing = hear(torch.zeros(24_000)), hear(torch.zeros(0))
    for little in (Units(0, 0), Units(3, 0), Units(2, 2)):  # "", "...", "Hm"
        assert fault_of(silence, little, expected) is None
        assert fault_of(nothing, little, expected) is None
    assert fault_of(nothing, units, expected) == "silent"
    assert fault_of(silence, units, expected, whole=False) is None
    assert fault_of(hear(WAVE * 0.01), units, expected) is None
    assert fault_of(hear(WAVE.repeat(8)), units, expected) is None
    assert fault_of(hear(WAVE.repeat(2)), Units(1, 1), expected) is None
    # The reference was silent, flat, or of no known text.
    assert fault_of(silence, units, Expectation.of([(units, silence)])) is None
    flat = hear(torch.ones(24_000))
    assert fault_of(flat, units, Expectation.of([(units, flat)])) is None
    assert fault_of(hear(WAVE.repeat(99)), units, Expectation.of([(Units(), heard)])) is None
    quiet_pause = hear(torch.full((24_000,), 1e-3))
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
    heard, units = hear(output), units_of((output,), {"text": output})
    fault_of(heard, units, whole=whole)
    fault_of(heard, units, Expectation.of([(units, heard)]), whole=whole)
    size_of(output)


def test_an_output_that_holds_itself_is_looked_at_to_a_depth() -> None:
    ring: list[Any] = [nan(WAVE)]
    ring.append(ring)
    assert not hear(ring).finite
    wide = {str(number): torch.zeros(4) for number in range(10_000)}
    assert hear(wide).finite


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
    guards = [
        retry.Guard(name, tuning, {}, 2) for name, tuning in (("Voice", backend.tuning), ("Vocoder", backend.second))
    ]
    for number in order:  # both loads remember the backend; the last one used to take it over
        retry.protect(backend, guards[number])
    for _ in range(2):
        assert bool(backend.speak(TEXT).isfinite().all())
    assert {event.what for event in told(seen)} == {"Voice", "Vocoder"}, "nobody knows whose fault it was"
    assert all(guard.retired for guard in guards)
    assert backend.voice.fault is None
    assert all(guard._held == 0 for guard in guards)
    assert bool(backend.speak(TEXT).isfinite().all())


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_within_which_anothers_retry_switched_is_made_again(
    kind: str, raises: bool, guarded: Any, seen: list[Event]
) -> None:
    """As half-precision activations meet a layer which has just been put back to fp32: it raises, or they are mixed."""
    backend = guarded(lambda wave: wave)
    guard = retry.guard_of(backend.voice)
    assert guard is not None
    calls = []
    when = 2 if kind.startswith("stream") else 1  # one piece has been delivered

    def own(wave: torch.Tensor) -> torch.Tensor:
        calls.append(backend.voice.fault is not None)
        if len(calls) == when:  # in the middle of it another thread's second attempt begins and ends
            with guard.untouched():
                pass
            if raises:
                raise RuntimeError("expected m1 and m2 to have the same dtype, but got: c10::BFloat16 != float")
            return wave.to(torch.bfloat16)
        return wave

    backend.voice.own = own
    seed()
    assert torch.equal(call(backend, kind), untouched(kind))
    assert calls[:when] == [True] * when
    assert calls[when:], "it was not made again"
    assert not any(calls[when:]), "it was made again, but not untouched"
    assert backend.voice.fault is not None
    assert guard._held == 0
    assert not [event for event in seen if isinstance(event, Guarded)], "it is nobody's fault"


def test_a_call_that_begins_in_the_middle_of_anothers_switching_is_made_again(
    guarded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the changes are off, and half are on: it may take both."""
    backend = guarded(lambda wave: wave)
    guard = retry.guard_of(backend.voice)
    assert guard is not None
    half, begun, off_now, ended = (threading.Event() for _ in range(4))
    off = Change.off

    def slowly(change: Change) -> None:
        if not half.is_set():
            half.set()
            assert begun.wait(20)
        off(change)

    calls = []

    def own(wave: torch.Tensor) -> torch.Tensor:
        calls.append(backend.voice.fault is not None)
        if len(calls) == 1:
            begun.set()
            assert off_now.wait(20)
        return wave

    def switch() -> None:
        with guard.untouched():
            off_now.set()
            assert ended.wait(20)

    monkeypatch.setattr(Change, "off", slowly)
    backend.voice.own = own
    switching = threading.Thread(target=switch)
    switching.start()
    assert half.wait(20)
    backend.speak(TEXT)
    ended.set()
    switching.join(20)
    assert calls == [True, False]


def test_a_stream_that_was_sent_values_is_not_made_again_for_anothers_retry(guarded: Any) -> None:
    backend = guarded(lambda wave: wave)
    guard = retry.guard_of(backend.voice)
    assert guard is not None
    stream = backend.stream(TEXT)
    next(stream)
    calls = []

    def own(wave: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        with guard.untouched():
            return wave

    backend.voice.own = own
    stream.send("louder")
    assert len(calls) == 1


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
    guard = retry.guard_of(backend.voice)
    assert guard is not None

    def fails(_change: Change) -> None:
        raise OSError

    with monkeypatch.context() as patched:
        patched.setattr(Change, "off", fails)
        with pytest.raises(OSError), guard.untouched():
            pass
    assert guard._held == 0
    with guard.untouched():
        assert backend.voice.fault is None
    assert backend.voice.fault is not None


def test_the_collector_may_close_a_stream_while_changes_are_switched(guarded: Any) -> None:
    """An abandoned stream in a cycle, closed on the thread that holds the guard's lock: it used to wait for itself."""
    backend = guarded(nan)
    stream = backend.stream(TEXT)
    next(stream)  # from the second attempt
    guard = retry.guard_of(backend.voice)
    assert guard is not None
    done = []

    def closes() -> None:
        with guard._lock:
            stream.close()
        done.append(1)

    thread = threading.Thread(target=closes, daemon=True)
    thread.start()
    thread.join(20)
    assert done
    assert guard._held == 0
