"""Shares of torch's threads between the tokens of a stream and its sound."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from accelerate_tts import Event
from accelerate_tts.events import NotApplied
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.compile.whole import CompiledCall
from accelerate_tts.streaming import Stream, StreamOptions, stream
from accelerate_tts.streaming.shares import (
    MeasuredCosts,
    Shares,
    ThreadDivision,
    _measured,
    measured_of,
    set_threads,
    shares_of,
)
from accelerate_tts.tuning.compare import compare

T = TypeVar("T")


class Clock:
    """A clock that goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class OwnThread:
    """One thread, which torch keeps a number of threads for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(1)
        self.do(lambda: set_threads(threads))

    def do(self, work: Callable[[], T]) -> T:
        return self._pool.submit(work).result(10)

    @property
    def number(self) -> int:
        return self.do(torch.get_num_threads)

    def end(self) -> None:
        self._pool.shutdown()


def new_threads_number() -> int:
    """The number that a thread begins with which starts now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result(10)


def later_threads_have(number: int) -> bool:
    """Check the number of threads that start later. While a loop changes its own, it is another for a moment."""
    end = time.monotonic() + 5
    while new_threads_number() != number:
        if time.monotonic() > end:
            return False
    return True


# --- the number of one thread -----------------------------------------------------------------------------------------


@given(numbers=st.lists(st.integers(1, 9), max_size=6))
@settings(max_examples=20, deadline=None)
def test_a_number_is_that_of_one_thread(numbers: list[int]) -> None:
    """By itself, torch gives the number that was set last to all threads that start later."""
    before, others = torch.get_num_threads(), new_threads_number()
    thread = OwnThread(3)
    for number in numbers:
        thread.do(lambda number=number: set_threads(number))  # type: ignore[misc]
        assert thread.number == number
        assert (torch.get_num_threads(), new_threads_number()) == (before, others)
    thread.end()


# --- what is measured -------------------------------------------------------------------------------------------------


@given(threads=st.integers(1, 200), tokens=st.floats(1e-6, 1e6), sound=st.floats(1e-6, 1e6))
def test_each_side_has_a_thread_and_none_is_left(threads: int, tokens: float, sound: float) -> None:
    division = ThreadDivision.by(threads, tokens, sound)
    assert min(division) >= 1
    assert sum(division) == max(2, threads)
    if min(division) > 1:
        assert division.tokens / threads == pytest.approx(tokens / (tokens + sound), abs=0.501 / threads)


def measured(threads: int, clock: Clock | None = None) -> MeasuredCosts:
    made = MeasuredCosts("Voice", threads)
    made.clock = clock or Clock()
    return made


def add(known: MeasuredCosts, *, count: int = 20, **costs: float) -> None:
    """Add tokens and pieces of a second of speech each, by their seconds: `tokens_alone`, `sound_beside` and so on."""
    for name, seconds in costs.items():
        side, _, way = name.partition("_")
        threads = known.threads if way == "alone" else getattr(known.division, side)
        beside = 0.0 if way == "alone" else seconds
        for _ in range(count):
            known.add(side, seconds, threads, speech=1.0, computed=1.0, beside=beside)  # type: ignore[arg-type]


@pytest.mark.parametrize(("threads", "first"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (8, (4, 4))])
def test_nothing_measured_is_half_for_each(threads: int, first: tuple[int, int]) -> None:
    assert measured(threads).division == first


def test_threads_are_divided_by_what_a_second_of_speech_takes() -> None:
    known = measured(8)
    add(known, tokens_alone=0.3)
    assert known.division == (4, 4), "the sound's cost is not known"
    add(known, sound_alone=0.1)
    assert known.division == (6, 2)
    add(known, tokens_alone=0.1, sound_alone=0.5)
    assert known.division == (6, 2), "it is chosen once: kernels are prepared for it"


def test_what_is_computed_twice_counts_for_the_division() -> None:
    """A piece repeats its context: a second that is heard takes three to be computed."""
    known = measured(8)
    for _ in range(20):
        known.add("tokens", 0.1, 8, speech=1.0, computed=1.0, beside=0.0)
        known.add("sound", 0.3, 8, speech=1.0, computed=3.0, beside=0.0)
    assert known.division == (2, 6)


def test_one_long_token_is_no_measure() -> None:
    """The first ones prepare kernels, or compile."""
    known = measured(8)
    add(known, count=1, tokens_alone=1000.0, sound_alone=1000.0)
    add(known, tokens_alone=0.1, sound_alone=0.1)
    assert known.division == (4, 4)


@pytest.mark.parametrize(
    ("tokens", "sound", "overlaps"),
    [(1.5, 1.5, True), (1.9, 1.9, True), (2.0, 2.0, False), (2.5, 2.5, False), (1.2, 4.0, True), (4.0, 4.0, False)],
)
def test_what_is_no_faster_side_by_side_takes_turns(
    tokens: float, sound: float, overlaps: bool, seen: list[Event]
) -> None:
    """In turn a second of each takes two seconds; side by side, both together may take as long."""
    known = measured(2)
    add(known, tokens_alone=1.0, sound_alone=1.0, tokens_beside=tokens)
    assert known.overlaps, "the sound's cost side by side is not known"
    assert seen == []
    add(known, sound_beside=sound)
    assert known.overlaps is overlaps
    add(known, tokens_beside=1.0 if not overlaps else 9.0, sound_beside=1.0 if not overlaps else 9.0)
    assert known.overlaps is overlaps, "it is judged once"
    if overlaps:
        assert seen == []
    else:
        (event,) = seen
        assert isinstance(event, NotApplied)
        gain = 1.0 / tokens + 1.0 / sound
        assert f"take {2.0 / gain:.3g} s side by side and 2 s in turn" in event.reason


def test_what_was_side_by_side_in_part_is_no_comparison(seen: list[Event]) -> None:
    known = measured(2)
    add(known, tokens_alone=1.0, sound_alone=1.0)
    for _ in range(30):
        known.add("tokens", 9.0, 1, speech=1.0, computed=1.0, beside=5.0)
        known.add("sound", 9.0, 1, speech=1.0, computed=1.0, beside=5.0)
        known.add("tokens", 9.0, 2, speech=1.0, computed=1.0, beside=9.0)  # on all threads
        known.add("sound", 9.0, 2, speech=1.0, computed=1.0, beside=9.0)
    assert known.overlaps
    add(known, tokens_beside=1.5, sound_beside=1.5)
    assert known.overlaps
    assert seen == []


def test_a_clock_that_stands_still_says_nothing() -> None:
    known = measured(4)
    add(known, tokens_alone=0.0, sound_alone=0.0, tokens_beside=0.0, sound_beside=0.0)
    assert known.division == (2, 2)
    assert known.overlaps


def test_what_was_measured_is_remembered_with_the_model() -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    known = measured_of(model, 8)
    add(known, tokens_alone=0.3, sound_alone=0.1)
    assert measured_of(model, 8).division == (6, 2)
    assert measured_of(model, 4).division == (2, 2), "of another number of threads nothing is known"
    assert measured_of(model, 8, "another way").division == measured_of(other, 8).division == (4, 4)
    gone = weakref.ref(known)
    del model, known
    gc.collect()
    assert gone() is None


# --- threads of a stream ----------------------------------------------------------------------------------------------


class SharedThreads(RuleBasedStateMachine):
    """Tokens on one thread, sound on any of two, which have numbers of their own."""

    @initialize(threads=st.integers(1, 9), own=st.tuples(st.integers(1, 9), st.integers(1, 9)))
    def begin(self, threads: int, own: tuple[int, int]) -> None:
        self.clock = Clock()
        self.measured = measured(threads, self.clock)
        self.shares = Shares(self.measured, 1.0)
        self.others = new_threads_number()
        self.loop, self.callers = OwnThread(threads), [OwnThread(number) for number in own]
        self.tokens = self.sound = False  # have work
        self.speaking: Generator[torch.Tensor, None, None] | None = None
        self.do: Callable[[], None] = lambda: None
        self.seconds = {"tokens": 0.0, "sound": 0.0}

    def share(self, side: str, beside: bool) -> int:
        return getattr(self.measured.division, side) if beside else self.measured.threads

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(counts=st.booleans())
    def token(self, counts: bool) -> None:
        self.loop.do(lambda: self.shares.end_token(counts=counts))
        self.loop.do(lambda: self.shares.begin("tokens"))
        self.tokens = True
        assert self.loop.number == self.share("tokens", self.sound)

    @rule()
    def tokens_end(self) -> None:
        self.loop.do(lambda: self.shares.end_token(counts=False))
        self.tokens = False

    def pieces(self) -> Generator[torch.Tensor, None, None]:
        while True:
            self.do()
            yield torch.zeros(1, 1)

    def step(self, caller: int, work: Callable[[], None]) -> None:
        self.do = work
        if self.speaking is None:
            self.speaking = self.shares.lend(self.pieces())
        speaking = self.speaking
        self.callers[caller].do(lambda: next(speaking))
        self.sound = False

    def sounds(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.shares.begin("sound")
        assert torch.get_num_threads() == self.share("sound", self.tokens)
        self.sound = True
        meanwhile()

    @rule(caller=st.integers(0, 1), seconds=st.sampled_from([0.1, 2.0]), tokens=st.integers(0, 2), starts=st.booleans())
    def piece(self, caller: int, seconds: float, tokens: int, starts: bool) -> None:
        def meanwhile() -> None:
            if starts:  # the next sentence's, while this one sounds
                self.shares.expect_tokens()
                self.tokens = True
                assert torch.get_num_threads() == self.share("sound", True)
            for _ in range(tokens if self.tokens else 0):
                self.clock.now += seconds
                self.token(counts=True)
            self.clock.now += seconds
            self.shares.end_sound(1.0, 1.0)
            self.shares.end_sound()  # the sound waits

        self.step(caller, lambda: self.sounds(meanwhile))

    @rule(caller=st.integers(0, 1))
    def error(self, caller: int) -> None:
        def fails() -> None:
            self.sounds()
            raise KeyError("of the sound")

        with pytest.raises(KeyError, match="of the sound"):
            self.step(caller, fails)
        self.sound, self.speaking = False, None

    @precondition(lambda self: self.speaking is not None)
    @rule(caller=st.integers(0, 1), thrown=st.booleans())
    def leave(self, caller: int, thrown: bool) -> None:
        speaking, self.speaking = self.speaking, None
        assert speaking is not None
        if thrown:
            with pytest.raises(KeyError):
                self.callers[caller].do(lambda: speaking.throw(KeyError()))
        else:
            self.callers[caller].do(speaking.close)

    @invariant()
    def callers_have_their_own_number(self) -> None:
        assert [caller.number for caller in self.callers] == [caller.threads for caller in self.callers]

    @invariant()
    def other_threads_have_theirs(self) -> None:
        assert new_threads_number() == self.others

    @invariant()
    def each_side_has_a_thread(self) -> None:
        assert min(self.measured.division) >= 1
        assert sum(self.measured.division) == max(2, self.measured.threads)

    def teardown(self) -> None:
        for each in (self.loop, *self.callers) if hasattr(self, "loop") else ():
            each.end()


SharedThreads.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_callers_have_their_own_number_in_any_order = SharedThreads.TestCase


def test_thread_seconds_are_those_of_the_threads_that_worked() -> None:
    """Tokens alone on 8 threads, then beside the sound on their share."""
    clock = Clock()
    known = measured(8, clock)
    shares = Shares(known, 1.0)
    before = torch.get_num_threads()

    def piece() -> Generator[torch.Tensor, None, None]:
        for _ in range(4):
            shares.begin("tokens")
            for _ in range(20):
                clock.now += 0.1  # 0.8 thread-seconds
                shares.end_token(counts=True)
                shares.begin("tokens")
            shares.begin("sound")  # on 4 of 8
            clock.now += 0.6  # 2.4 thread-seconds
            shares.end_token(counts=False)
            shares.end_sound(1.0, 1.0)
            yield torch.zeros(1, 1)

    list(shares.lend(piece()))
    assert known.division == (2, 6)
    assert torch.get_num_threads() == before


def test_on_one_thread_there_is_nothing_to_divide(threads: Threads, seen: list[Event]) -> None:
    threads(1)
    model = nn.Linear(1, 1)
    model.compile(backend="eager")
    shares_of(model, token=0.04).begin("sound")
    assert torch.get_num_threads() == 1
    assert seen == []


# --- streams ----------------------------------------------------------------------------------------------------------

IN_PIECES = StreamOptions(first=0.1, growth=1.5, most=0.6, left_context=2.0, overlap=True)


class Voice(NamedTuple):
    """A system that speaks."""

    speak: Callable[[StreamOptions], Stream]
    model: nn.Module
    """With which costs are remembered."""
    head: nn.Module
    """Called once a token."""
    tokens: int
    sounding: nn.Module
    """Called for each piece of sound."""
    way: str = ""

    def say(self, options: StreamOptions) -> Stream:
        torch.manual_seed(3)
        return self.speak(options)


@pytest.fixture(scope="module", params=["Chatterbox", "XTTS", "Higgs"])
def speaker(request: pytest.FixtureRequest, example: Callable[[str], Any]) -> Voice:
    torch.manual_seed(0)
    if request.param == "Chatterbox":
        model = example("chatterbox_backend").random(seconds=0.8, tiny=True, variant="english")
        say = lambda options: stream(model, "Hello there.", options=options)  # noqa: E731
        made = Voice(say, model.t3, model.t3.speech_head, 20, model.s3gen.mel2wav.conv_pre, "pieces")
    elif request.param == "XTTS":
        xtts = example("xtts_backend").random(1.0, tiny=True)
        made = Voice(partial(said_by_xtts, xtts), xtts.model, xtts.model.gpt.mel_head, 17,
                     xtts.model.hifigan_decoder.waveform_decoder.conv_pre)  # fmt: skip
    else:
        higgs, codec, prepare, _ = example("higgs_backend").random(tiny=True)
        inputs = prepare("Hello there.")
        more = {"max_new_tokens": 40, "do_sample": True}
        say = lambda options: stream(higgs, inputs, codec, options=options, **more)  # noqa: E731
        made = Voice(say, higgs, higgs.audio_lm_head, 40, codec.acoustic_decoder)
    list(made.say(IN_PIECES))  # measures the fields
    return made


@pytest.fixture
def voice(speaker: Voice) -> Voice:
    """A system of which nothing is measured yet."""
    _measured.remove(speaker.model)
    return speaker


def said_by_xtts(xtts: Any, options: StreamOptions, text: str = "Hello there.") -> Stream:
    return stream(xtts.model, text, "en", xtts.latents, xtts.speaker, options=options)


Threads = Callable[[int], None]


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Sets torch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def hooked() -> Iterator[Callable[[nn.Module, Callable[[], object]], None]]:
    """Calls a function before each call of a module."""
    with ExitStack() as hooks:

        def hook(module: nn.Module, do: Callable[[], object]) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda *_: do() and None).remove)

        yield hook


@pytest.mark.parametrize("way", ["whole", "close", "error"])
def test_the_caller_has_its_own_number_at_each_piece(voice: Voice, threads: Threads, way: str, hooked: Any) -> None:
    threads(2)
    seen_by_sound: list[int] = []
    hooked(voice.sounding, lambda: seen_by_sound.append(torch.get_num_threads()))
    if way == "error":

        def fail() -> None:
            if len(seen_by_sound) > 2:
                raise KeyError("of the sound")

        hooked(voice.sounding, fail)
    speaking, count = voice.say(IN_PIECES), 0
    with pytest.raises(KeyError) if way == "error" else nullcontext():
        for _ in speaking:
            count += 1
            assert torch.get_num_threads() == 2
            assert later_threads_have(2)
            if way == "close" and count == 2:
                speaking.close()
    assert count >= 2
    assert torch.get_num_threads() == 2
    assert later_threads_have(2)
    assert set(seen_by_sound) <= {1, 2}


async def test_threads_of_a_task_have_their_own_number_at_each_piece(voice: Voice, threads: Threads) -> None:
    """Each piece is made in some thread of a pool, and each of these had a number of its own before."""
    threads(2)
    pool = ThreadPoolExecutor(3)
    asyncio.get_running_loop().set_default_executor(pool)
    gate = threading.Barrier(3)

    def begin(number: int) -> None:
        set_threads(number)
        gate.wait(10)

    own = dict[int, int]()

    def number() -> None:
        own.setdefault(threading.get_ident(), torch.get_num_threads())
        assert own[threading.get_ident()] == torch.get_num_threads()
        gate.wait(10)

    wait([pool.submit(begin, each) for each in (1, 2, 3)])
    for done in [pool.submit(number) for _ in range(3)]:
        done.result(10)
    assert sorted(own.values()) == [1, 2, 3]
    async for _ in voice.say(IN_PIECES):
        for done in [pool.submit(number) for _ in range(3)]:
            done.result(10)
        assert torch.get_num_threads() == 2
        assert later_threads_have(2)


def test_who_has_work_alone_has_all_threads(voice: Voice, threads: Threads, hooked: Any) -> None:
    threads(2)
    tokens: list[int] = []
    sound: list[int] = []
    sounds = threading.Event()
    more = threading.Condition()

    def token() -> None:
        with more:
            tokens.append(torch.get_num_threads())
            more.notify_all()
        if len(tokens) == voice.tokens - 2:
            assert sounds.wait(20)

    def piece() -> None:
        sound.append(torch.get_num_threads())
        sounds.set()
        with more:
            assert more.wait_for(lambda: len(tokens) >= voice.tokens - 1, 20)

    hooked(voice.head, token)
    hooked(voice.sounding, piece)
    list(voice.say(IN_PIECES))
    assert tokens[0] == 2, "the sound waits for tokens"
    assert tokens[voice.tokens - 2] == 1, "it was begun while a piece was made"
    assert sound[0] == 1
    assert sound[-1] == 2, "all tokens were there"


def test_a_later_stream_begins_with_what_was_measured(voice: Voice, threads: Threads, hooked: Any) -> None:
    threads(4)
    known = measured_of(voice.model, 4, voice.way)
    add(known, tokens_alone=0.3, sound_alone=0.1)
    assert known.division == (3, 1)
    tokens: list[int] = []
    sound: list[int] = []
    hooked(voice.head, lambda: tokens.append(torch.get_num_threads()))
    hooked(voice.sounding, lambda: sound.append(torch.get_num_threads()))
    list(voice.say(IN_PIECES))
    assert set(tokens) <= {3, 4}
    assert set(sound) <= {1, 4}


@pytest.mark.parametrize(("token", "piece", "division"), [(10.0, 0.001, (2, 1)), (0.001, 10.0, (1, 2))])
def test_streams_measure_by_the_clock(
    voice: Voice, threads: Threads, hooked: Any, token: float, piece: float, division: tuple[int, int]
) -> None:
    threads(3)
    clock = Clock()
    known = measured_of(voice.model, 3, voice.way)
    known.clock = clock

    tokens = [0]

    def at_token() -> None:
        clock.now += token
        tokens[0] += 1

    def at_piece() -> None:
        end = time.monotonic() + 20
        while tokens[0] < voice.tokens - 1 and time.monotonic() < end:  # so that few tokens are made beside the sound
            time.sleep(0.001)
        clock.now += piece

    hooked(voice.head, at_token)
    hooked(voice.sounding, at_piece)
    for _ in range(4):
        tokens[0] = 0
        list(voice.say(IN_PIECES))
    assert known.division == division


def test_a_model_that_is_no_faster_side_by_side_takes_turns(
    voice: Voice, threads: Threads, hooked: Any, seen: list[Event]
) -> None:
    threads(3)
    known = measured_of(voice.model, 3, voice.way)
    add(known, tokens_alone=1.0, sound_alone=1.0)
    add(known, tokens_beside=2.0, sound_beside=2.0)
    computed = [0]

    def token() -> None:
        computed[0] += 1

    hooked(voice.head, token)
    for _ in range(2):
        computed[0] = 0
        speaking = voice.say(IN_PIECES)
        next(speaking)
        after = computed[0]
        time.sleep(0.1)
        assert computed[0] == after < voice.tokens, "no token is made before it is asked for"
        list(speaking)
    (event,) = [event for event in seen if isinstance(event, NotApplied)]
    assert "2 s side by side and 2 s in turn" in event.reason


@pytest.mark.parametrize("number", [1, 2, 3])
def test_pieces_are_those_that_are_made_in_turn(example: Callable[[str], Any], threads: Threads, number: int) -> None:
    torch.manual_seed(0)
    xtts = example("xtts_backend").random(1.0, tiny=True)
    threads(number)
    found = []
    for overlap in (False, True, True):
        torch.manual_seed(3)
        options = StreamOptions(first=0.1, overlap=overlap)
        found.append(torch.cat(list(said_by_xtts(xtts, options, "Hello there. How are you?")), dim=-1)[0])
    for other in found[1:]:
        assert other.shape == found[0].shape
        assert compare(found[0], other).error <= EXACT_TOLERANCE


@pytest.mark.usefixtures("uncompiled")
def test_compiled_graphs_keep_their_number_of_threads(voice: Voice, threads: Threads, seen: list[Event]) -> None:
    """dynamo guards a graph on it: it would be compiled for each number, or the untouched model would be called."""
    threads(2)
    change = CompiledCall(voice.head, "head", "default")
    change.on()
    try:
        for _ in range(2):
            list(voice.say(replace(IN_PIECES, overlap=False)))
        graphs = change.graphs
        assert graphs
        change.end_warmup()
        for _ in range(2):
            list(voice.say(IN_PIECES))
        assert change.graphs == graphs
    finally:
        change.off()
    degraded = [event for event in seen if isinstance(event, NotApplied)]
    assert degraded == [event for event in seen if event.degraded]
    # If side by side is worth it is judged by the machine's clock, and says so if not.
    (event,) = [event for event in degraded if not event.what.startswith("overlap of ")]
    assert event.what == f"shares of threads of {type(voice.model).__name__}"
    assert "compiled graphs hold for one number" in event.reason
