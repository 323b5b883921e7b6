"""Streams of upstream's own classes at small size: what they say, and that they stop."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from clicks import clicks

from accelerate_tts import Event, inference, optimized_model, receipt_of
from accelerate_tts.errors import ModelError, SettingsError
from accelerate_tts.events import FirstAudio, NotApplied
from accelerate_tts.runtime.inference_mode import in_inference_mode
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.streaming import Stream, StreamOptions, stream
from accelerate_tts.streaming.shares import measured_of
from accelerate_tts.streaming.systems import chatterbox
from accelerate_tts.tuning.compare import compare, spectral_distance
from doubles import clock_of, is_faster

pytestmark = pytest.mark.usefixtures("one_thread")

EARLY = StreamOptions(first=0.1, growth=1.5, most=0.6)
IN_PIECES = StreamOptions(first=0.1, growth=1.5, most=0.6, left_context=2.0)
VARIANTS = ["english", "multilingual", "turbo"]


def seeded(make: Callable[[], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    with torch.inference_mode():
        return make()


def joined(pieces: Any, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.cat(list(pieces), dim=-1)[0]


def same(whole: torch.Tensor, other: torch.Tensor) -> None:
    assert other.shape == whole.shape
    assert compare(whole, other).error <= EXACT_TOLERANCE


# --- XTTS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xtts(example: Any) -> Any:
    torch.manual_seed(0)
    return example("xtts_backend").random(1.0, tiny=True)


def said_by_xtts(xtts: Any, text: str, options: StreamOptions = EARLY, **more: Any) -> Stream:
    return stream(xtts.model, text, "en", xtts.latents, xtts.speaker, options=options, **more)


@pytest.mark.parametrize("speed", [1.0, 1.3, 0.7])
def test_xtts_in_pieces_is_its_whole(xtts: Any, seen: list[Event], speed: float) -> None:
    whole = seeded(lambda: torch.cat(list(xtts.model.inference_stream(
        "Hello there.", "en", xtts.latents, xtts.speaker, stream_chunk_size=1000, speed=speed))))  # fmt: skip
    torch.manual_seed(3)
    pieces = list(said_by_xtts(xtts, "Hello there.", speed=speed))
    assert len(pieces) > 3
    same(whole, torch.cat(pieces, dim=-1)[0])
    (event,) = seen
    assert isinstance(event, FirstAudio)
    assert event.samples == pieces[0].shape[-1]


def test_xtts_with_its_tokens_ahead_is_its_whole(xtts: Any) -> None:
    text, ahead = "Hello there. How are you?", StreamOptions(first=0.1, overlap=True)
    same(joined(said_by_xtts(xtts, text)), joined(said_by_xtts(xtts, text, ahead)))


def test_many_streams_at_once_do_not_mix(xtts: Any) -> None:
    """Texts of different lengths: upstream keeps the prompt of the last one in the model."""
    texts = [f"{'Hello ' * count}there. Bye." for count in range(1, 7)]
    say = lambda text: torch.cat(list(said_by_xtts(xtts, text, top_k=1)), dim=-1)[0]  # noqa: E731
    alone = [say(text) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(say, texts))
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    streams = [said_by_xtts(xtts, text, top_k=1) for text in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while streams_left := [(i, s) for i, s in enumerate(streams) if s is not None]:
        for i, each in streams_left:
            piece = next(each, None)
            if piece is None:
                streams[i] = None  # type: ignore[call-overload]
            else:
                found[i].append(piece)
    for one, parts in zip(alone, found, strict=True):
        same(one, torch.cat(parts, dim=-1)[0])


def test_xtts_tuned_and_decorated(xtts: Any, decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(compare=is_faster, clock=clock_of([0.0]))

    class Service:
        @optimized_model(warmup=lambda service: list(service.speak("Hello.")), tune_seconds=3.0)
        def load(self) -> None:
            self.model = xtts.model

        @inference
        def speak(self, text: str) -> Iterator[torch.Tensor]:
            yield from said_by_xtts(xtts, text)

        @inference
        def at_once(self, text: str) -> Stream:
            return said_by_xtts(xtts, text)

    plain = joined(said_by_xtts(xtts, "Hello there."))
    service = Service()
    service.load()
    receipt = receipt_of(service)
    assert receipt is not None
    assert receipt.kept
    try:
        same(plain, joined(service.speak("Hello there.")))
        same(plain, joined(service.at_once("Hello there.")))
        assert not in_inference_mode()
    finally:
        from accelerate_tts import get_performance_optimizer

        get_performance_optimizer().undo(service)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"speed": 0.0}, "speed=0.0"), ({"stream_chunk_size": 20}, "stream_chunk_size= is upstream's")],
)
def test_wrong_arguments_are_named(xtts: Any, wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        said_by_xtts(xtts, "Hello.", **wrong)


def test_a_sentence_that_is_too_long_for_xtts_is_named(xtts: Any) -> None:
    with pytest.raises(SettingsError, match="fewer than 402 tokens"):
        list(said_by_xtts(xtts, "a" * 500, StreamOptions(split=None)))


@pytest.mark.parametrize("text", ["", " ", "...", "?!"])
def test_a_text_without_words_has_no_pieces(xtts: Any, text: str) -> None:
    assert list(said_by_xtts(xtts, text)) == []


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ModelError, match="does not know Linear; known are ChatterboxTTS"):
        stream(torch.nn.Linear(1, 1), "Hello.")


# --- VITS and Higgs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([1, 2], "takes a tensor"), (torch.ones(1).long(), "shape .1,."), (torch.ones(1, 1, 2).long(), "shape .1, 1, 2.")],
)
def test_what_is_no_text_for_vits_is_named(ids: Any, reason: str) -> None:
    from transformers import VitsModel

    with pytest.raises(SettingsError, match=reason):
        stream(object.__new__(VitsModel), ids)


def test_options_of_another_class_are_named() -> None:
    with pytest.raises(SettingsError, match="first"):
        stream(object(), options={"first": 0.1})  # type: ignore[arg-type]


def test_asking_for_a_piece_while_one_is_made_is_an_error() -> None:
    """On the same thread it would wait for itself, as from the hook of an event."""
    failed: list[str] = []

    def body(_left: threading.Event) -> Iterator[torch.Tensor]:
        with pytest.raises(ValueError, match="making a piece already") as error:
            next(pieces)
        failed.append(str(error.value))
        yield torch.ones(1, 3)

    pieces = Stream("it", body)
    assert len(list(pieces)) == len(failed) == 1


def test_an_exception_that_is_thrown_keeps_its_message() -> None:
    pieces = Stream("it", lambda _left: iter([torch.ones(1, 3)] * 2))
    next(pieces)
    with pytest.raises(KeyError, match="why"):
        pieces.throw(KeyError, "why")


def test_vits_in_pieces_is_its_whole(example: Any) -> None:
    torch.manual_seed(0)
    model, tokenize = example("mms_backend").random(tiny=True)
    ids = tokenize("The quick brown fox jumps over the lazy dog, and does so every day.")
    whole = seeded(lambda: model(ids).waveform[0])
    options = StreamOptions(first=0.03, most=0.05)
    torch.manual_seed(3)
    pieces = list(stream(model, ids, options=options))
    assert len(pieces) > 2
    same(whole, torch.cat(pieces, dim=-1)[0])
    pieces[0].mul_(0.5)  # as any tensor
    with pytest.raises(SettingsError, match="one text"):
        stream(model, ids.expand(2, -1))
    assert list(stream(model, ids[:, :0])) == []


def test_higgs_in_pieces_is_its_whole(example: Any) -> None:
    """The whole is what upstream's processor makes of all codes."""
    example("higgs_backend")
    processor = pytest.importorskip(
        "transformers.models.higgs_audio_v2.processing_higgs_audio_v2"
    ).HiggsAudioV2Processor
    torch.manual_seed(0)
    loaded = example("higgs_backend").random(tiny=True)
    inputs, config = loaded.prepare("Hello there."), loaded.model.config
    more = {"max_new_tokens": 40, "do_sample": True}
    codes = seeded(lambda: loaded.model.generate(**inputs, **more))
    reader = SimpleNamespace(
        audio_stream_bos_id=config.audio_stream_bos_id, audio_stream_eos_id=config.audio_stream_eos_id,
        audio_tokenizer=loaded.codec, revert_delay_pattern=lambda ids: processor.revert_delay_pattern(None, ids),
    )  # fmt: skip
    whole = seeded(lambda: processor.batch_decode(reader, codes)[0])
    torch.manual_seed(3)
    pieces = list(stream(loaded.model, inputs, loaded.codec, options=EARLY, **more))
    assert len(pieces) > 2
    same(whole, torch.cat(pieces, dim=-1)[0])
    same(whole, joined(stream(loaded.model, inputs, loaded.codec, options=StreamOptions(overlap=True), **more)))


# --- Chatterbox -------------------------------------------------------------------------------------------------------


def made(example: Any, variant: str, seconds: float = 2.0) -> tuple[Any, dict[str, str]]:
    module = example("chatterbox_backend")
    pytest.importorskip(module.VARIANTS[variant][0], reason=f"this release of Chatterbox has no {variant} model")
    torch.manual_seed(0)
    return module.random(seconds=seconds, tiny=True, variant=variant), (
        {"language_id": "en"} if variant == "multilingual" else {}
    )


@pytest.fixture(scope="module")
def english(example: Any) -> Any:
    return made(example, "english")[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_chatterbox_by_sentences_is_upstreams(example: Any, variant: str) -> None:
    model, told = made(example, variant, 0.6)
    torch.manual_seed(3)
    whole = [model.generate(text, **told) for text in ("Hello there.", "How are you?")]
    torch.manual_seed(3)
    pieces = list(stream(model, "Hello there. How are you?", **told))
    assert len(pieces) == 2
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)
    # In pieces: as long, and without a click at any joint.
    torch.manual_seed(3)
    pieces = list(stream(model, "Hello there.", options=IN_PIECES, **told))
    assert len(pieces) >= 2
    together = torch.cat(pieces, dim=-1)
    assert together.shape == whole[0].shape
    assert clicks(together[0], list(accumulate(piece.shape[-1] for piece in pieces))[:-1]) == []


def test_the_flow_in_pieces_is_as_near_as_another_draw(english: Any) -> None:
    """The stated difference of the opt-in: spectral distances of the same tokens.

    Upstream's flow and source draw noise, so two wholes of the same tokens differ, too.
    """
    tokens = torch.randint(6561, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    say = lambda: english.s3gen.inference(torch.tensor(tokens), ref_dict=dict(english.conds.gen))[0][0]  # noqa: E731
    one, other = seeded(say, 1), seeded(say, 2)

    def in_pieces() -> torch.Tensor:
        sound = chatterbox.SpokenSentence(english.s3gen, english.conds.gen, 50)
        cuts = [0, 20, 30, 45, 60]
        return torch.cat(
            [sound.push(tokens[: end + 3], begin, end, last=end == 60) for begin, end in pairwise(cuts)], dim=-1
        )[0]

    pieces = seeded(in_pieces)
    assert pieces.shape == one.shape
    between, off = spectral_distance(one, other), spectral_distance(one, pieces)
    assert off <= 1.1 * between
    # A stream of other tokens would be further away than that is wide.
    assert abs(float(pieces.std() / one.std()) - 1.0) < 0.1


def test_the_source_runs_on(english: Any) -> None:
    """Pieces of HiFT's source are the whole one's: the sines' phase does not begin again."""
    vocoder = english.s3gen.mel2wav
    pitch = 100.0 + 50.0 * torch.rand(1, 1, 40)
    pitch[..., 15:20] = 0.0  # unvoiced
    whole = chatterbox.SineSource(vocoder, seed=1)(pitch)
    other = chatterbox.SineSource(vocoder, seed=1)
    pieces = torch.cat([other(pitch[..., begin:end]) for begin, end in ((0, 1), (1, 17), (17, 17), (17, 40))], dim=-1)
    assert torch.allclose(pieces, whole, atol=1e-6)
    # The fundamental alone, without noise, is a sine of the pitch, as upstream's is.
    sines = vocoder.m_source.l_sin_gen
    mine, frequencies = whole[0, 0], vocoder.f0_upsamp(pitch).transpose(1, 2)
    upstreams = seeded(lambda: vocoder.m_source(frequencies)[0][0, :, 0])
    assert mine.shape == upstreams.shape
    voiced = slice(0, 15 * 480)
    assert float(mine[voiced].std() / upstreams[voiced].std()) == pytest.approx(1.0, abs=0.2)
    assert sines.harmonic_num == 8


def test_hift_in_pieces_is_its_whole(english: Any) -> None:
    """Given its source, the vocoder is convolutional."""
    from accelerate_tts.streaming import Pieces, field_of

    vocoder = english.s3gen.mel2wav
    mel, source = torch.randn(1, 80, 70), 0.1 * torch.randn(1, 1, 70 * 480)
    decode = partial(chatterbox.decode, vocoder)
    field = field_of(vocoder, chatterbox.decode, mel[..., :1], source[..., :480], method="decode")
    assert field is not None
    pieces, cuts = Pieces(decode, field), [0, 9, 30, 31, 70]
    with torch.inference_mode():
        sound = [pieces.push(mel[..., a:b], source[..., 480 * a : 480 * b], last=b == 70) for a, b in pairwise(cuts)]
        same(decode(mel, source)[0, 0], torch.cat(sound, dim=-1)[0, 0])


def test_the_voice_of_the_model_is_left_as_it_is(english: Any) -> None:
    before, emotion = english.conds, english.conds.t3
    list(stream(english, "Hello.", exaggeration=0.9))
    assert english.conds is before
    assert english.conds.t3 is emotion


def test_a_loop_that_is_not_heard_is_said(english: Any, seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody replaced T3's method on the object: the tokens come at its end."""
    monkeypatch.setitem(vars(english.t3), "inference", english.t3.inference)
    for _ in range(3):
        pieces = list(stream(english, "Hello there.", options=IN_PIECES))
        assert len(pieces) == 1
    (event,) = [event for event in seen if isinstance(event, NotApplied)]
    assert "was not heard" in event.reason


def test_pieces_are_marked_as_upstream_marks_the_whole(english: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[int] = []

    class Marker:
        def apply_watermark(self, wave: Any, sample_rate: int) -> Any:
            marked.append(len(wave))
            assert sample_rate == english.sr
            return wave

    monkeypatch.setattr(english, "watermarker", Marker(), raising=False)
    pieces = list(stream(english, "Hello there.", options=IN_PIECES))
    assert marked == [piece.shape[-1] for piece in pieces]


# --- left by its caller -----------------------------------------------------------------------------------------------


@pytest.fixture
def computed(english: Any) -> Iterator[list[int]]:
    """Counts the tokens that T3 computes."""
    count = [0]

    def counted(*_: Any) -> None:
        count[0] += 1
        if len(count) > 1:  # a test asks for something at each token
            count[1]()  # type: ignore[operator]

    hook = english.t3.speech_head.register_forward_hook(counted)
    yield count
    hook.remove()


WAYS = ["close", "collected", "cycle", "thrown", "thread ends", "with"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("decorated", [False, True], ids=["plain", "decorated"])
def test_a_stream_that_is_left_computes_no_more(english: Any, computed: list[int], way: str, decorated: bool) -> None:
    def say() -> Any:
        return stream(english, "Hello there.", options=IN_PIECES)

    speak = inference(lambda: (yield from say())) if decorated else say
    if way == "thread ends":
        thread = threading.Thread(target=lambda: next(speak()))
        thread.start()
        thread.join()
    else:
        speaking: Any = speak()
        assert computed[0] == 0
        next(speaking)
        if way == "close":
            speaking.close()
            assert list(speaking) == []
        elif way == "collected":
            del speaking
        elif way == "cycle":
            ring: list[Any] = [speaking]
            ring.append(ring)
            del speaking, ring
            gc.collect()
        elif way == "thrown":
            with pytest.raises(KeyError):
                speaking.throw(KeyError("of the caller"))
        else:
            with closing(speaking) if decorated else speaking:
                pass
    after = computed[0]
    assert 0 < after < 40
    assert not [thread for thread in threading.enumerate() if thread.name == "accelerate_tts-tokens"
                and not thread.join(10) and thread.is_alive()]  # fmt: skip
    assert computed[0] == after


def test_closing_from_elsewhere_stops_at_the_token_that_is_being_made(english: Any, computed: list[Any]) -> None:
    speaking = stream(english, "Hello there.")  # a sentence at once: the caller waits for all of it
    computed.append(lambda: speaking.close() if computed[0] == 3 else None)
    assert list(speaking) == []
    assert computed[0] == 3


def test_a_stream_that_is_being_closed_has_ended_for_another_thread() -> None:
    closing, go_on = threading.Event(), threading.Event()

    def body(_left: threading.Event) -> Iterator[torch.Tensor]:
        try:
            yield torch.zeros(1, 1)
            yield torch.zeros(1, 1)
        finally:
            closing.set()
            assert go_on.wait(10)

    speaking = Stream("a loop", body)
    next(speaking)
    with ThreadPoolExecutor(2) as pool:
        closed = pool.submit(speaking.close)
        assert closing.wait(10)
        rest = pool.submit(list, speaking)
        wait({rest}, timeout=0.1)
        go_on.set()
        assert (closed.result(10), rest.result(10)) == (None, [])


async def test_pieces_come_to_a_task_as_to_a_thread(english: Any) -> None:
    @inference
    async def speak() -> AsyncIterator[torch.Tensor]:
        async for piece in stream(english, "Hello there.", options=IN_PIECES):
            yield piece

    torch.manual_seed(3)
    pieces = [piece async for piece in speak()]
    assert len(pieces) > 1
    same(torch.cat(pieces, dim=-1)[0], joined(stream(english, "Hello there.", options=IN_PIECES)))
    assert not in_inference_mode()


def test_an_error_of_upstream_is_the_callers(english: Any) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        next(stream(english, "Hello.", no_such_option=1))


# --- the other systems, left by their callers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def higgs(example: Any) -> Any:
    torch.manual_seed(0)
    return example("higgs_backend").random(tiny=True)


class Talk(NamedTuple):
    """A system that speaks."""

    say: Callable[[StreamOptions], Stream]
    head: torch.nn.Module
    """Called once a token."""
    tokens: int


@pytest.fixture(params=["Chatterbox", "XTTS", "Higgs"])
def talk(request: pytest.FixtureRequest) -> Talk:
    if request.param == "Chatterbox":
        english = request.getfixturevalue("english")
        return Talk(lambda options: stream(english, "Hello there.", options=options), english.t3.speech_head, 50)
    if request.param == "XTTS":
        xtts = request.getfixturevalue("xtts")
        return Talk(lambda options: said_by_xtts(xtts, "Hello there.", options), xtts.model.gpt.mel_head, 17)
    model, codec, prepare, _ = request.getfixturevalue("higgs")
    inputs = prepare("Hello there.")
    return Talk(
        lambda options: stream(model, inputs, codec, options=options, max_new_tokens=40, do_sample=True),
        model.audio_lm_head, 40,
    )  # fmt: skip


@pytest.fixture
def at_token(talk: Talk) -> Iterator[dict[int, Callable[[], object]]]:
    """Functions to call while a token is computed, by its number. Number 0 returns the number of the present one."""
    count, do = [0], {0: lambda: count[0]}

    def counted(*_: Any) -> None:
        count[0] += 1
        do.get(count[0], lambda: None)()

    hook = talk.head.register_forward_hook(counted)
    yield do
    hook.remove()


def ends() -> None:
    """Wait until no loop of tokens runs any more."""
    for thread in threading.enumerate():
        if thread.name == "accelerate_tts-tokens":
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_each_system_stops_at_the_token_that_is_being_made(
    talk: Talk, at_token: dict[int, Callable[[], Any]], ahead: bool
) -> None:
    speaking = talk.say(StreamOptions(first=0.6, overlap=ahead))
    at_token[3] = speaking.close
    assert list(speaking) == []
    ends()
    assert at_token[0]() == 3
    assert len(list(talk.say(EARLY))) > 0, "another stream speaks"
    assert at_token[0]() >= 3 + talk.tokens - 1


async def test_each_system_stops_when_its_task_is_cancelled(talk: Talk, at_token: dict[int, Callable[[], Any]]) -> None:
    speaking = talk.say(StreamOptions(first=0.6))
    loop = asyncio.get_running_loop()

    async def listen() -> None:
        async for _ in speaking:
            pytest.fail("it was cancelled")

    task = asyncio.create_task(listen())

    def cancel() -> None:
        loop.call_soon_threadsafe(task.cancel)
        assert speaking.left.wait(10)

    at_token[3] = cancel
    with pytest.raises(asyncio.CancelledError):
        await task
    ends()
    assert at_token[0]() == 3


@pytest.mark.parametrize("way", ["close", "collected", "with"])
def test_each_system_computes_no_more_between_pieces(
    talk: Talk, at_token: dict[int, Callable[[], Any]], way: str
) -> None:
    speaking: Any = talk.say(IN_PIECES)
    next(speaking)
    if way == "close":
        speaking.close()
    elif way == "collected":
        del speaking
    else:
        with speaking:
            pass
    after = at_token[0]()
    assert 0 < after < talk.tokens
    ends()
    assert at_token[0]() == after


# --- ahead ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_the_next_sentence_is_begun_while_this_one_sounds(english: Any, computed: list[int], overlap: bool) -> None:
    measured_of(english.t3, 1, "pieces").clock = lambda: 0.0  # it is not judged if that is faster here
    options = StreamOptions(first=0.1, left_context=2.0, overlap=overlap)
    list(stream(english, "Hello there.", options=options))
    one, computed[0] = computed[0], 0
    speaking, samples = stream(english, "Hello there. How are you? Well.", options=options), 0
    while samples < 50 * 960:
        samples += next(speaking).shape[-1]
    assert samples == 50 * 960, "the last piece of the first sentence is out, and nothing was asked for since"
    end = time.monotonic() + 20
    while overlap and computed[0] <= one and time.monotonic() < end:
        time.sleep(0.01)
    assert (computed[0] > one) == overlap
    assert samples + sum(piece.shape[-1] for piece in speaking) == 3 * 50 * 960
