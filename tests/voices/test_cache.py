"""Threads and tasks share one computation, attributes stay with their object, and the next process finds it all."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import inspect
import json
import os
import signal
import stat
import threading
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from accelerate_tts import Event, cached_embedding, events
from accelerate_tts.inspection.signatures import foreign_hooks, global_hooks
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.voices.disk import EmbeddingFiles
from accelerate_tts.voices.encoder_state import numerics
from accelerate_tts.voices.memory import EmbeddingStore, StoredEmbedding
from doubles import Encoder


class Service:
    def __init__(self, seed: int = 0) -> None:
        self.encoder = Encoder(seed)
        self.calls = 0

    def compute(self, wave: torch.Tensor, scale: float) -> torch.Tensor:
        self.calls += 1
        return self.encoder(wave) * scale


WAVE = torch.tensor([0.1, 0.2, -0.3, 0.4])


def not_applied(seen: list[events.Event]) -> list[str]:
    return [event.reason for event in seen if isinstance(event, events.NotApplied)]


# --- threads and tasks ---------------------------------------------------------------------------------------------


def test_a_hundred_threads_embed_a_voice_once_and_other_voices_meanwhile() -> None:
    together = threading.Barrier(2, timeout=30)
    calls: list[float] = []

    @cached_embedding
    def embed(voice: float) -> torch.Tensor:
        calls.append(voice)
        together.wait()  # passes only if both voices are embedded at the same time
        return torch.full((3,), voice)

    gc.collect()  # models of other tests put flags of torch back when they are collected, and flags are a part of keys
    before = numerics(), foreign_hooks(global_hooks())
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda index: embed(float(index % 2)), range(100)))
    assert (numerics(), foreign_hooks(global_hooks())) == before
    assert sorted(calls) == [0.0, 1.0]
    assert all(torch.equal(answer, torch.full((3,), float(index % 2))) for index, answer in enumerate(answers))
    assert len({answer.data_ptr() for answer in answers}) == 100
    assert (embed.cache_info().hits, embed.cache_info().misses) == (98, 2)


def test_a_warm_up_is_computed_and_not_answered_from_the_cache() -> None:
    """Tuning would measure the cache."""
    service = Service()
    embed = cached_embedding(service.compute)
    with seeded("cpu"):
        embed(WAVE, 1.0)
        embed(WAVE, 1.0)
    assert (service.calls, embed.cache_info().misses) == (2, 0)
    embed(WAVE, 1.0)
    embed(WAVE, 1.0)
    assert (service.calls, embed.cache_info().hits) == (3, 1)


def test_who_waits_for_a_failure_tries_himself() -> None:
    calls: list[int] = []

    @cached_embedding
    def embed(voice: str) -> int:
        calls.append(1)
        if len(calls) <= 3:
            raise ValueError(len(calls))
        return 7

    def attempt(_: int) -> Any:
        try:
            return embed("a")
        except ValueError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attempt, range(8)))
    assert sum(answer == 7 for answer in answers) == 5
    assert len(calls) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sets", [(), ("voice",)])
def test_a_child_that_is_forked_in_the_middle_of_a_computation_computes_for_itself(sets: tuple[str, ...]) -> None:
    begun, end = threading.Event(), threading.Event()
    parent = os.getpid()

    class Speaker:
        voice = 0

        @cached_embedding(sets=sets)
        def embed(self, voice: str) -> int:
            if os.getpid() == parent:
                begun.set()
                end.wait(60)
            self.voice = 7
            return 7

    speaker = Speaker()
    thread = threading.Thread(target=speaker.embed, args=("a",))
    thread.start()
    assert begun.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for the parent's thread is ended
        os._exit(speaker.embed("a"))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end.set()
    thread.join(60)
    assert status == 7


async def test_a_coroutine_s_voice_counts_with_the_autocast_of_its_own_thread(
    tmp_path: Path, seen: list[events.Event]
) -> None:
    service = Service()

    @cached_embedding(folder=tmp_path, encoder=lambda: service.encoder)
    async def embed(wave: torch.Tensor) -> torch.Tensor:
        return service.compute(wave, 1.0)

    for _ in range(2):
        for kind in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                assert (await embed(WAVE[None])).dtype == kind
    assert service.calls == 2
    assert not seen


def test_a_call_within_its_own_call() -> None:
    @cached_embedding
    def embed(depth: list[int]) -> int:
        if len(calls) > 3:
            return 5
        calls.append(1)
        return embed(depth)

    calls: list[int] = []
    assert embed([1]) == 5


async def test_tasks_share_one_computation_and_survive_the_first_one_s_end() -> None:
    calls: list[int] = []
    go_on = asyncio.Event()

    class Async:
        def __init__(self) -> None:
            self.encoder = Encoder()

        @cached_embedding
        async def embed(self, wave: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            await go_on.wait()
            return self.encoder(wave)

    service = Async()
    assert inspect.iscoroutinefunction(service.embed)
    first = asyncio.create_task(service.embed(WAVE))
    await asyncio.sleep(0)
    others = [asyncio.create_task(service.embed(WAVE)) for _ in range(20)]
    await asyncio.sleep(0)
    first.cancel()
    others[5].cancel()
    go_on.set()
    answers = await asyncio.gather(first, *others, return_exceptions=True)
    assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 2
    wanted = service.encoder(WAVE).detach()
    assert all(torch.equal(a, wanted) for a in answers if isinstance(a, torch.Tensor))
    assert len(calls) == 2
    assert torch.equal(await service.embed(WAVE), wanted)
    assert len(calls) == 2


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "stopped"])
def test_a_loop_that_ends_in_the_middle_of_a_computation_leaves_it_to_others(closed: bool) -> None:
    """As `run_until_complete` and `close` do, which cancel no task. Others waited for its result for ever."""
    calls: list[int] = []

    class Async:
        def __init__(self) -> None:
            self.encoder = Encoder()

        @cached_embedding
        async def embed(self, wave: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 1:
                await asyncio.sleep(3600)
            return self.encoder(wave)

    service, loop = Async(), asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as pool:

        async def begin() -> Any:
            first = asyncio.create_task(service.embed(WAVE))
            while not calls:
                await asyncio.sleep(0)
            # One begins to wait while the loop still runs, in another thread with a loop of its own.
            waiting = pool.submit(asyncio.run, asyncio.wait_for(service.embed(WAVE), 10))
            await asyncio.sleep(0.05)
            return first, waiting

        first, waiting = loop.run_until_complete(begin())
        if closed:
            loop.close()
        wanted = service.encoder(WAVE).detach()
        assert torch.equal(waiting.result(20), wanted)
    assert torch.equal(asyncio.run(asyncio.wait_for(service.embed(WAVE), 10)), wanted)
    assert len(calls) == 2
    if not closed:
        first.cancel()
        loop.run_until_complete(asyncio.wait({first}))
        loop.close()
    first._log_destroy_pending = False  # that it is pending is the test


# --- attributes that are set ---------------------------------------------------------------------------------------


class Setting:
    def __init__(self) -> None:
        self.encoder = Encoder()
        self.calls = 0

    @cached_embedding(sets=("voice",))
    def prepare(self, number: float) -> None:
        self.calls += 1
        self.voice = {"number": number}
        time.sleep(0.001)

    @cached_embedding(sets=("voice",))
    async def prepare_async(self, number: float) -> None:
        self.voice = {"number": number}
        await asyncio.sleep(0.001)


def test_threads_that_set_the_attribute_of_one_object_keep_no_wrong_voice() -> None:
    service = Setting()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: service.prepare(index % 5), range(60)))
    for number in range(5):
        service.prepare(number)
        assert service.voice == {"number": number}
        service.voice["number"] = -1  # it is a copy
    assert service.calls == 5


async def test_tasks_that_set_the_attribute_of_one_object_keep_no_wrong_voice() -> None:
    service = Setting()
    await asyncio.gather(*(service.prepare_async(index % 5) for index in range(30)))
    for number in range(5):
        await service.prepare_async(number)
        assert service.voice == {"number": number}
    assert service.prepare_async.cache_info().misses == 5


# --- on disk -------------------------------------------------------------------------------------------------------


def with_folder(folder: Path, seed: int = 0) -> Any:
    """State of a new process: nothing in memory."""

    class Stored(Service):
        @cached_embedding(folder=folder, sets=("last",))
        def embed(self, wave: torch.Tensor, scale: float = 1.0) -> Any:
            self.last = [self.compute(wave, scale), None, "a", 1.5, b"x"]
            return {"latent": self.last[0], "array": self.last[0].detach().numpy(), 3: (True, [])}

    return Stored(seed)


def test_the_next_process_finds_the_embedding(tmp_path: Path, seen: list[events.Event]) -> None:
    folder = tmp_path / "voices"
    first, second, other = with_folder(folder), with_folder(folder), with_folder(folder, seed=1)
    one, two = first.embed(WAVE), second.embed(WAVE)
    assert (first.calls, second.calls) == (1, 0)
    assert torch.equal(one["latent"], two["latent"])
    assert np.array_equal(one["array"], two["array"])
    assert two[3] == (True, [])
    assert torch.equal(second.last[0], one["latent"])
    assert second.last[1:] == [None, "a", 1.5, b"x"]
    second.embed(WAVE)
    assert second.embed.cache_info().hits == 2
    assert not torch.equal(other.embed(WAVE)["latent"], one["latent"])
    assert not seen
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:-40] + b"\0" + b[-39:], lambda b: b * 2]
)
def test_a_damaged_file_is_computed_anew(
    tmp_path: Path, seen: list[events.Event], damage: Callable[[bytes], bytes]
) -> None:
    wanted = with_folder(tmp_path).embed(WAVE)["latent"]
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    service = with_folder(tmp_path)
    assert torch.equal(service.embed(WAVE)["latent"], wanted)
    assert service.calls == 1
    assert [type(event) for event in seen] == [events.PackIgnored]
    again = with_folder(tmp_path)
    again.embed(WAVE)
    assert again.calls == 0


def test_what_would_need_a_pickle_stays_in_memory(tmp_path: Path, seen: list[events.Event]) -> None:
    class Odd(Service):
        @cached_embedding(folder=tmp_path)
        def embed(self, wave: torch.Tensor, scale: float = 1.0) -> Any:
            return {"path": Path("a"), "latent": self.compute(wave, scale)}

    service = Odd()
    service.embed(WAVE)
    service.embed(WAVE)
    assert service.calls == 1
    assert list(tmp_path.iterdir()) == []
    assert len(not_applied(seen)) == 1


def test_the_folder_is_bounded_and_a_bad_one_costs_an_event(tmp_path: Path, seen: list[events.Event]) -> None:
    encoder = Encoder()

    @cached_embedding(folder=tmp_path, limit_mb=1, encoder=lambda: encoder)
    def embed(voice: float) -> torch.Tensor:
        return torch.full((80_000,), voice)

    for voice in range(6):
        embed(float(voice))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2**20
    assert len(list(tmp_path.iterdir())) == 3
    assert not seen

    (tmp_path / "file").write_bytes(b"")

    @cached_embedding(folder=tmp_path / "file", encoder=lambda: encoder)
    def nowhere(voice: float) -> float:
        return voice

    assert (nowhere(1.0), nowhere(1.0)) == (1.0, 1.0)
    assert events.PackIgnored in {type(event) for event in seen}


def test_a_folder_that_takes_nothing_is_one_event_for_all_voices(tmp_path: Path, seen: list[events.Event]) -> None:
    folder = tmp_path / "voices"
    folder.write_bytes(b"")  # a file where the folder should be

    @cached_embedding(folder=folder, encoder=Encoder)
    def embed(voice: float) -> float:
        return voice

    def told(voices: range) -> list[str]:
        before = len(seen)
        assert [embed(float(voice)) for voice in voices] == list(voices)
        return [str(event) for event in seen[before:] if "could not be kept" in str(event)]

    assert len(told(range(5))) == 1
    folder.unlink()
    assert not told(range(5, 8))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_bytes(b"")
    assert len(told(range(8, 12))) == 1, "it had worked in between"


async def test_an_async_function_with_a_folder(tmp_path: Path) -> None:
    encoder = Encoder()
    for calls in (1, 0):
        ran: list[int] = []

        @cached_embedding(folder=tmp_path)
        async def embed(wave: torch.Tensor, ran: str = "") -> torch.Tensor:
            log()
            return encoder(wave)

        def log(ran: list[int] = ran) -> None:
            ran.append(1)

        await asyncio.gather(*(embed(WAVE) for _ in range(5)))
        assert len(ran) == calls


# --- the store -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60)), max_size=60), st.integers(1, 800))
@example([("a", 10), ("b", 10)], 40)  # each fits, exactly
def test_the_limit_holds_and_no_wrong_value_comes_back(puts: list[tuple[str, int]], limit: int) -> None:
    store = EmbeddingStore(limit)
    wanted: OrderedDict[str, int] = OrderedDict()  # least recently used first
    for key, size in puts:
        kept, flight, leads = store.begin(key, None)
        if kept is not None:
            assert kept.copy().numel() == wanted[key]
            wanted.move_to_end(key)
            continue
        assert leads, "nobody computes it any more"
        assert key not in wanted
        store.end(key, flight, StoredEmbedding(torch.zeros(size)))
        if 4 * size <= limit:
            wanted[key] = size
        while 4 * sum(wanted.values()) > limit:
            wanted.popitem(last=False)
        assert store.info().bytes == 4 * sum(wanted.values())
        assert store.info().entries == len(wanted)


def test_what_is_cleared_meanwhile_is_not_kept() -> None:
    store = EmbeddingStore(1000)
    _, flight, _ = store.begin("a", None)
    store.clear()
    store.end("a", flight, StoredEmbedding(1))
    assert store.info().entries == 0
    assert flight.future.result().copy() == 1


def test_what_was_begun_before_it_was_cleared_ends_nothing_that_was_begun_since() -> None:
    store = EmbeddingStore(1000)
    _, before, _ = store.begin("a", None)
    store.clear()
    _, since, leads = store.begin("a", None)
    assert leads
    store.end("a", before, StoredEmbedding(1))
    assert store.begin("a", None) == (None, since, False)
    store.end("a", since, StoredEmbedding(2))
    kept, _, _ = store.begin("a", None)
    assert kept is not None
    assert kept.copy() == 2


@dataclass
class Voice:
    """A result class of a package that records when its code runs."""

    name: str
    vector: torch.Tensor
    ran: ClassVar[list[str]] = []

    def __post_init__(self) -> None:
        self.ran.append("__post_init__")


def test_a_dataclass_is_stored_field_by_field_and_runs_nothing(tmp_path: Path, seen: list[Event]) -> None:
    files = EmbeddingFiles(tmp_path, 10**6)
    here = Voice.__module__.partition(".")[0]
    voice = Voice("one", torch.arange(3.0))
    kept = StoredEmbedding(({"a": [voice]}, None))
    Voice.ran.clear()
    assert files.write("ab" * 16, kept, {here})
    stored = files.read("ab" * 16, {here})
    assert stored is not None
    found = stored.copy()[0]["a"][0]
    assert type(found) is Voice
    assert (found.name, found.vector.tolist()) == ("one", [0.0, 1.0, 2.0])
    assert not Voice.ran
    for packages in ((), {"collections"}):
        with pytest.raises(TypeError, match=r"Voice cannot be stored without a pickle"):
            files.write("cd" * 16, kept, packages)
    assert not seen


def planted(folder: Path, key: str, description: Any, blobs: bytes = b"") -> None:
    """Write a file as somebody else may: the checksum has no key."""
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    rest = b"%d\n%s%s" % (len(text), text, blobs)
    digest = hashlib.sha256(key.encode() + rest).hexdigest().encode()
    folder.mkdir(exist_ok=True)
    (folder / f"{key}.embedding").write_bytes(b"accelerate-tts embedding 3\n%s\n%s" % (digest, rest))


KEY = "ab" * 16


@pytest.mark.parametrize(
    "told",
    [
        ["fields", "subprocess", "Popen", ["args", ["str", 0]]],  # no dataclass
        ["fields", "json.decoder", "JSONDecoder"],
        ["fields", "not_imported", "Thing"],
        ["fields", "HERE", "Voice.ran"],
        ["fields", "HERE", "Voice", ["name", ["str", 0]]],  # of another release: a field is missing
        ["fields", "HERE", "Voice", ["name", ["str", 0]], ["vector", ["int", "1"]], ["more", ["int", "1"]]],
        ["fields", "HERE", "Copying", ["name", ["str", 0]]],
    ],
)
def test_a_file_names_no_class_but_a_dataclass_of_those_packages(
    tmp_path: Path, seen: list[Event], told: list[Any]
) -> None:
    """Foreign and older files may have such a description."""
    files = EmbeddingFiles(tmp_path, 10**6)
    packages = {"subprocess", "json", "not_imported", Voice.__module__.partition(".")[0]}
    planted(tmp_path, KEY, ["list", [Voice.__module__ if word == "HERE" else word for word in told]])
    assert files.read(KEY, packages) is None
    assert [type(event).__name__ for event in seen] == ["PackIgnored"]
    assert "is no dataclass of" in str(seen)


@dataclass
class Copying:
    """A class that defines how it is copied is not restored from a file, since callers get copies."""

    name: str

    def __deepcopy__(self, _memo: Any) -> Copying:
        raise AssertionError("code of the class ran")


@pytest.mark.parametrize(
    "description",
    [
        b"", b"[", b"null", b'"list"', b"{}", b"[]", b"3", b"[" * 100_000, b'["list",' * 1000 + b"0" + b"]" * 1000,
        ["plain"], ["plain", 3], ["plain", "a"], ["nothing"], [["list"]], ["int", "x"], ["float", []], ["str", -1],
        ["str", 5], ["bytes", True], ["bytes", "4"], ["dict", [["list"], ["plain", None]]], ["dict", ["plain"]],
        ["dict", [["tensor", "float32", [1], "cpu", 4], ["plain", None]]],
        ["tensor"], ["tensor", "float32", [1], "cpu", 8], ["tensor", "float32", [-1, -1], "cpu", 4],
        ["tensor", "float32", [2**40], "cpu", 4], ["tensor", "float32", [2**70, 0], "cpu", 0],
        ["tensor", "float32", [1.0], "cpu", 4], ["tensor", "float32", 1, "cpu", 4],
        ["tensor", "load", [4], "cpu", 4], ["tensor", "float32", [1], "meta", 4], ["tensor", "qint8", [4], "cpu", 4],
        ["tensor", "float32", [1], "cuda:999", 4], ["array", "|O", [1], 4], ["array", "<f4", [2], 4],
        ["array", "<f3", [1], 3], ["array", "<U1", [1], 4], ["array", "<f4", [[1]], 4], ["plain", None],
    ],
)  # fmt: skip
def test_a_file_that_says_anything_is_ignored_with_one_event(
    tmp_path: Path, seen: list[Event], description: Any
) -> None:
    planted(tmp_path, KEY, description, b"abcd")
    assert EmbeddingFiles(tmp_path, 10**6).read(KEY) is None
    assert [type(event).__name__ for event in seen] == ["PackIgnored"]
    assert len(str(seen[0])) < 400


told = st.recursive(
    st.sampled_from(["list", "tuple", "dict", "plain", "int", "float", "str", "bytes", "tensor", "array", "fields"])
    | st.sampled_from(["float32", "bool", "cpu", "<f4", "|b1", "0x1", "0x1p3", Voice.__module__, "Voice", "name"])
    | st.none()
    | st.integers(-2, 9)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@given(told, st.binary(max_size=16))
def test_whatever_a_file_says_reading_it_raises_nothing(
    tmp_path_factory: pytest.TempPathFactory, description: Any, blobs: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "told"
    planted(folder, KEY, description, blobs)
    Voice.ran.clear()
    kept = EmbeddingFiles(folder, 10**6).read(KEY, {Voice.__module__.partition(".")[0]})
    assert kept is None or kept.bytes <= 64 * (len(json.dumps(description)) + 1) + len(blobs)
    assert not Voice.ran


def exact(value: Any) -> Any:
    """Nested tuples that are equal only where two values are equal in type and in every bit."""
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes(), value.flags.writeable
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(exact, value)
    if isinstance(value, dict):
        return "dict", *((exact(key), exact(item)) for key, item in value.items())
    return type(value).__name__, repr(value)


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool, torch.uint16]
tensors = st.builds(
    lambda dtype, shape: torch.arange(float(np.prod(shape, dtype=int))).to(dtype).reshape(shape),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
)
arrays = st.builds(
    lambda dtype, shape: np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape),
    st.sampled_from(["<f4", ">f8", "<i2", "|b1", "<c8", "|u1"]),
    st.lists(st.integers(0, 3), max_size=3),
)
keys = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
values = st.recursive(
    keys | tensors | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys.filter(lambda key: not isinstance(key, float)), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_what_was_stored_comes_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    files = EmbeddingFiles(tmp_path_factory.getbasetemp() / "bits", 10**6)
    assert files.write(KEY, StoredEmbedding(value))
    kept = files.read(KEY)
    assert kept is not None
    assert exact(kept.copy()) == exact(value)


def test_what_cannot_be_stored_stays_in_memory() -> None:
    files = EmbeddingFiles(Path("nowhere"), 10**6)
    odd = (
        torch.zeros(2).to_sparse(), {(1, 2): 3}, np.array(["a"]), np.array(["2026"], "M8[s]"), {1}, 1j, [0] * 100_000,
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
    )  # fmt: skip
    for value in odd:
        with pytest.raises((TypeError, ValueError)):
            files.write(KEY, StoredEmbedding(value))
    assert not Path("nowhere").exists()


def stored_service(folder: Path, sets: tuple[str, ...] = ()) -> Any:
    class Stored(Service):
        hidden = "mine"

        @cached_embedding(folder=folder, sets=sets, limit_mb=4)
        def embed(self, wave: torch.Tensor) -> Any:
            self.voice = wave * 2
            return self.compute(wave, 1.0)

    return Stored()


TENSOR = ["tensor", "float32", [3], "cpu", 12]


@pytest.mark.parametrize("sets", [(), ("voice",)])
@pytest.mark.parametrize(
    "description",
    [
        TENSOR,
        ["tuple", TENSOR],
        ["list", TENSOR, ["dict"]],
        ["tuple", TENSOR, ["list"]],
        ["tuple", TENSOR, ["dict", [["str", 6], ["plain", None]]]],
        ["tuple", TENSOR, ["dict", [["str", 6], ["plain", None]], [["str", 5], ["plain", None]]]],
    ],
)
def test_a_file_sets_only_what_the_decorator_says(
    tmp_path: Path, seen: list[Event], sets: tuple[str, ...], description: Any
) -> None:
    wanted = stored_service(tmp_path, sets).embed(WAVE)
    (file,) = tmp_path.iterdir()
    names = b"hiddenvoice"[: (0, 6, 11)[str(description).count("str")]]
    planted(tmp_path, file.stem, description, bytes(12) + names)
    service = stored_service(tmp_path, sets)
    assert torch.equal(service.embed(WAVE), wanted)
    assert service.calls == 1
    assert service.hidden == "mine"
    assert [type(event).__name__ for event in seen] == ["PackIgnored"]
    again = stored_service(tmp_path, sets)
    again.embed(WAVE)
    assert again.calls == 0, "the damaged file was replaced"


def test_what_comes_out_of_a_file_is_bounded_by_the_limit(tmp_path: Path, seen: list[Event]) -> None:
    limit = 1 << 22
    files = EmbeddingFiles(tmp_path, limit)
    bombs = [
        (["list", *[["list"]] * 100_000], b""),
        (["tensor", "float32", [75_000_000], "cpu", 300_000_000], b""),
        (["tensor", "float32", [2**61], "cpu", 2**63], b""),
        (["str", 2], bytes(limit)),
    ]
    tracemalloc.start()
    for description, blobs in bombs:
        planted(tmp_path, KEY, description, blobs)
        tracemalloc.reset_peak()
        assert files.read(KEY) is None
        assert tracemalloc.get_traced_memory()[1] < 3 * limit
    tracemalloc.stop()
    assert len(seen) == len(bombs)


def test_a_folder_of_many_voices_is_not_looked_through_at_each_hit_or_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4096
    files = EmbeddingFiles(tmp_path, 2000 * size)
    looks: list[Any] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or scandir(path))
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("the folder was listed"))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk's time is not what this is about
    for number in range(1, 2000):
        (tmp_path / f"{number:032x}.embedding").write_bytes(bytes(size))
        os.utime(tmp_path / f"{number:032x}.embedding", ns=(number, number))
    for number in range(300):
        assert files.write(f"{2**70 + number:032x}", StoredEmbedding(torch.zeros(900)))
        assert files.read(f"{2**70 + number:032x}") is not None
    assert len(looks) <= 8
    monkeypatch.undo()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sum(sizes.values()) <= 2000 * size * 17 // 16
    assert all(f"{2**70 + number:032x}.embedding" in sizes for number in range(300)), "the oldest went"


def test_what_a_crashed_writer_left_goes(tmp_path: Path) -> None:
    left, fresh = tmp_path / ".tmp-left", tmp_path / ".tmp-fresh"
    for path in (left, fresh):
        path.write_bytes(b"half a voice")
    os.utime(left, (1, 1))
    assert EmbeddingFiles(tmp_path, 10**6).write(KEY, StoredEmbedding(1))
    assert not left.exists()
    assert fresh.exists()
