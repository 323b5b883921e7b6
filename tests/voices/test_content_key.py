"""Keys of voices: files, arrays and other arguments count by their content, or are not cached at all."""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import io
import itertools
import os
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accelerate_tts import cached_embedding, events
from accelerate_tts.storage import file_digests
from accelerate_tts.voices import content_key


class Service:
    """Counts what it really computes."""

    calls = 0

    @cached_embedding
    def embed_file(self, path: Any) -> torch.Tensor:
        self.calls += 1
        content = path.read() if hasattr(path, "read") else Path(path).read_bytes()
        return torch.frombuffer(bytearray(content[:4]), dtype=torch.uint8).float()


@pytest.fixture
def service() -> Service:
    Service.embed_file.cache_clear()
    return Service()


def not_applied(seen: list[events.Event]) -> list[str]:
    return [event.reason for event in seen if isinstance(event, events.NotApplied)]


def test_a_file_counts_by_its_content(service: Service, tmp_path: Path) -> None:
    one, same = tmp_path / "one.wav", tmp_path / "upload-1234.wav"
    one.write_bytes(b"RIFFabcd")
    same.write_bytes(b"RIFFabcd")
    first = service.embed_file(one)
    assert torch.equal(service.embed_file(str(same)), first)
    assert service.calls == 1
    before = one.stat()
    one.write_bytes(b"ABCDabcd")  # the same size, and made to look as old
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not torch.equal(service.embed_file(one), first)
    assert torch.equal(service.embed_file(same), first)
    assert service.calls == 2


@pytest.mark.parametrize(("name", "calls"), [("VOICE.WAV", 1), ("voice.mp3", 2)])
def test_of_a_files_name_its_suffix_counts_however_it_is_written(
    name: str, calls: int, service: Service, tmp_path: Path
) -> None:
    for path in (tmp_path / "voice.wav", tmp_path / name):
        path.write_bytes(b"RIFFabcd")
        service.embed_file(path)
    assert service.calls == calls


def test_a_file_that_has_long_been_the_same_is_not_read_again(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(b"RIFFabcd" * 10_000)
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    service.embed_file(path)
    monkeypatch.setattr(file_digests, "read_into", lambda *_: pytest.fail("it is read again"))
    service.embed_file(path)
    monkeypatch.undo()
    assert service.calls == 1
    path.write_bytes(b"XXXXabcd" * 10_000)
    service.embed_file(path)
    assert service.calls == 2


def test_a_file_that_is_written_without_a_sign_in_its_times(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes without a new time, as through a mapping on a file system in memory."""
    path = tmp_path / "voice.wav"
    path.write_bytes(b"RIFFabcd" * 10_000)
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    monkeypatch.setattr(file_digests, "identity", lambda path, _about: (path,))
    service.embed_file(path)
    path.write_bytes(b"XXXXabcd" * 10_000)
    assert service.embed_file(path)[0] == ord("X")


@pytest.mark.parametrize("kind", [str, os.fsencode, np.str_, np.bytes_, Path, lambda p: np.array([p]), lambda p: [p]])
def test_a_path_of_any_kind_counts_with_its_file(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    calls: list[Any] = []

    @cached_embedding
    def embed(path: Any) -> int:
        calls.append(path)
        return len(calls)

    file = tmp_path / "voice.wav"
    for written in ("~/voice.wav", "$HOME/voice.wav", str(file)):
        file.write_bytes(b"RIFFone!")
        given = kind(written) if kind not in {os.fsencode, np.bytes_} else kind(os.fsencode(written))
        first = embed(given)
        assert embed(given) == first
        about = file.stat()
        file.write_bytes(b"RIFFtwo!")
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert embed(given) != first


def test_a_file_that_is_written_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "voice.wav"

    @cached_embedding
    def embed(path: Path, encoder: nn.Module) -> bytes:
        path.write_bytes(b"new!")
        return path.read_bytes()

    path.write_bytes(b"old!")
    embed(path, nn.Linear(1, 1))
    assert embed.cache_info().entries == 0


def test_file_objects_arrays_lists_and_bytes(service: Service, tmp_path: Path) -> None:
    buffer = io.BytesIO(b"RIFFabcd")
    service.embed_file(buffer)
    assert buffer.tell() == 8
    buffer.seek(0)
    service.embed_file(buffer)  # a hit leaves it as it is
    assert service.calls == 1
    assert buffer.tell() == 0

    calls: list[Any] = []

    @cached_embedding
    def embed(*voices: Any, **more: Any) -> int:
        calls.append(voices)
        return len(calls)

    array = np.arange(6, dtype=np.float32)
    different = [
        array, array.reshape(2, 3), array.astype(np.float64), array.view(np.int32), [array], (array,), [array, array],
        b"abc", "abc", bytearray(b"abd"), None, 0, 0.0, False, {"a": 1}, {"a": 2}, {"b": 1}, np.float32(1),
        torch.zeros(2), torch.zeros(2).double(), torch.zeros(2).long(), torch.zeros(1, 2), torch.float32,
        ["ab", "c"], ["a", "bc"], [["a"], "b"], [["a", "b"]], float("nan"), 1j, {"a": [1]}, Path("a/b"),
    ]  # fmt: skip
    answers = [embed(value) for value in different]
    assert answers == list(range(1, len(different) + 1))
    assert [embed(copy.deepcopy(value)) for value in different] == answers
    assert embed(array[::-1].copy()[::-1]) == 1  # the order in memory is no part of the value
    assert embed(array, key=1) != embed(array, key=2)


@pytest.mark.parametrize("odd", [object(), lambda: 1, {1, 2}, iter([1]), "https://example.org/a.wav", np.array([None])])
def test_what_cannot_be_told_is_computed_each_time(odd: Any, seen: list[events.Event]) -> None:
    calls: list[Any] = []

    @cached_embedding
    def embed(voice: Any) -> int:
        calls.append(voice)
        return len(calls)

    assert [embed(odd), embed(odd)] == [1, 2]
    assert len(not_applied(seen)) == 1


class AsyncFile:
    """A file as aiofiles opens it."""

    async def read(self, size: int = -1) -> bytes:
        return b"RIFF"[:size]

    async def seek(self, place: int) -> int:
        return place

    async def tell(self) -> int:
        return 0


@pytest.mark.filterwarnings("error")
def test_a_file_that_is_read_asynchronously_is_named(seen: list[events.Event]) -> None:
    """Its coroutines were made, and never awaited."""
    embed = cached_embedding(lambda voice: 1)
    assert [embed(AsyncFile()), embed(AsyncFile())] == [1, 1]
    gc.collect()
    (reason,) = not_applied(seen)
    assert reason.endswith("AsyncFile is read asynchronously; give its bytes")


def test_a_folder_and_a_short_text_that_is_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("en", "de"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "language").mkdir()
    calls: list[str] = []

    @cached_embedding
    def embed(language: str) -> int:
        calls.append(language)
        return len(calls)

    assert [embed("en"), embed("de"), embed("en")] == [1, 2, 1]
    assert [embed(str(tmp_path)), embed(str(tmp_path))] == [3, 4]


def test_what_other_processes_read_is_digested_alike_whichever_is_the_fastest_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(b"RIFFabcd")
    stored, own = set(), set()
    for algorithm in ("sha256", "blake2b"):
        monkeypatch.setattr(content_key, "fastest", lambda algorithm=algorithm: algorithm)
        for found, durable in ((stored, True), (own, False)):
            digest = content_key.Digest(durable=durable)
            digest.add([np.arange(7, dtype=np.float32), path, 1.0])
            assert digest.same_files()
            found.add(str(digest))
    assert len(stored) == 1
    assert len(own) == 2


def test_the_fastest_is_found_by_trying() -> None:
    assert file_digests.fastest.__wrapped__() in {"sha256", "blake2b"}


def test_an_array_counts_by_its_content_whatever_its_layout() -> None:
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = [wide[:, ::2], np.ascontiguousarray(wide[:, ::2]), np.asfortranarray(wide[:, ::2])]
    digests = set()
    for array in arrays:
        digest = content_key.Digest()
        digest.add(array)
        digests.add(str(digest))
    assert len(digests) == 1
    for odd in (np.float32(3.0), np.array(3.0), np.zeros((0, 3)), np.array(["a"]), np.array(["2026-01-01"], "M8[D]")):
        content_key.Digest().add(odd)


class Mode(enum.Flag):
    WARM = 1
    LOUD = 2


@dataclasses.dataclass
class Reference:
    wave: Any
    rate: Any = 16_000


@dataclasses.dataclass
class Mapped(dict[str, Any]):
    rate: int = 16_000


@dataclasses.dataclass
class Listed(list[Any]):
    rate: int = 16_000


class Named(str):
    __slots__ = ()


class Tagged(str):  # noqa: SLOT000 - it has room for attributes
    pass


class Point(NamedTuple):
    x: Any
    y: Any


class MorePoint(Point):
    pass


def unset() -> Reference:
    reference = Reference(b"a")
    del reference.wave
    return reference


def with_items(kind: Any, *items: Any) -> Any:
    made = kind()
    made.update(*items) if isinstance(made, dict) else made.extend(items)
    return made


def answers(*values: Any) -> list[int]:
    """Return the answers to these values, by a function that returns a new number at each run."""
    count = itertools.count()

    @cached_embedding
    def embed(value: Any) -> int:
        return next(count)

    return [embed(value) for value in values]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mode(0),
        lambda: Mode.WARM,
        lambda: Mode.WARM | Mode.LOUD,
        unset,
        lambda: Reference("x", rate=None),
        lambda: with_items(Mapped, {"a": 1}),
        lambda: 10**5000,
        lambda: -(10**5000),
        lambda: Named("x"),
        lambda: Point(1, 2),
        lambda: memoryview(b"abc"),
        lambda: np.array(["a", "b"]),
        lambda: io.BytesIO(b"abc"),
    ],
)
def test_every_content_that_can_be_told_is_told(make: Any, seen: list[events.Event]) -> None:
    one, again = answers(make(), make())
    assert one == again
    assert not seen


def test_contents_that_differ_in_anything() -> None:
    values = [
        Mode(0), Mode.WARM, Mode.WARM | Mode.LOUD, 0, 1, 3, True, False, 10**5000, 10**5000 + 1, -(10**5000), 0.0, -0.0,
        unset(), Reference(b"a"), Reference("a"), Reference(b"a", 1), with_items(Mapped, {"a": 1}),
        with_items(Mapped, {"a": 2}), Mapped(), "x", Named("x"), b"x", bytearray(b"x"), memoryview(b"x"),
        memoryview(b"xx").cast("H"), Point(1, 2), (1, 2), [1, 2], np.array(["a"]), np.array(["b"]), np.array([b"a"]),
        np.str_("y"), np.float64(1.0), 1.0, np.int64(1), io.BytesIO(b"x"), {}, None,
    ]  # fmt: skip
    assert answers(*values) == list(range(len(values)))


class Raises:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __fspath__(self) -> str:
        raise RuntimeError("no path")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not equal to anything")

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


class NoMessageError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this")


class Odd:
    def read(self) -> bytes:
        raise NoMessageError

    seek = tell = read


def recursive() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep() -> Any:
    found: Any = []
    for _ in range(100_000):
        found = [found]
    return found


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


def closed() -> io.BytesIO:
    file = io.BytesIO(b"a")
    file.close()
    return file


def tagged() -> Tagged:
    text = Tagged("x")
    text.tag = 1  # type: ignore[attr-defined]
    return text


def more_point() -> MorePoint:
    point = MorePoint(1, 2)
    point.tag = 1  # type: ignore[attr-defined]
    return point


@pytest.mark.parametrize(
    "make",
    [
        Raises,
        Odd,
        recursive,
        deep,
        released,
        closed,
        tagged,
        more_point,
        lambda: with_items(Listed, 1),
        lambda: "file:/tmp/a.wav",
        lambda: {Raises: 1},
        lambda: np.zeros(2, dtype=[("a", "f4")]),
        lambda: Mock(spec=Path),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(2).to_sparse(),
        lambda: weakref.ref(Service),
    ],
)
def test_no_argument_raises_out_of_the_call(make: Any, seen: list[events.Event]) -> None:
    value = make()
    assert answers(value, value) == [0, 1]
    assert len(not_applied(seen)) == 1
    assert len(not_applied(seen)[0]) < 400


def test_an_encoder_option_that_raises_costs_the_cache_and_not_the_call(seen: list[events.Event]) -> None:
    @cached_embedding(encoder=lambda: nowhere)  # type: ignore[name-defined]  # noqa: F821
    def embed(voice: int) -> int:
        return voice

    assert embed(1) == 1
    assert "nowhere" in not_applied(seen)[0]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6).filter(lambda text: not {".", os.sep} & set(text))  # such a text may be a folder
    | st.binary(max_size=6).filter(lambda content: not set(b"./") & set(content)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(Reference, inner, inner)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=8,
)


def exact(value: Any) -> Any:
    """A text that is the same for values of the same types and content, and for no others."""
    if dataclasses.is_dataclass(value):
        return "R" + exact((value.wave, value.rate))
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(exact, value))})"
    if isinstance(value, dict):
        return f"d({','.join(exact(pair) for pair in value.items())})"
    return f"{type(value).__name__}:{value!r}"


@given(plain, plain)
def test_digests_are_equal_exactly_where_contents_are(one: Any, two: Any) -> None:
    digests = []
    for value in (one, two, copy.deepcopy(one)):
        digest = content_key.Digest()
        digest.add(value)
        digests.append(str(digest))
    assert digests[0] == digests[2]
    assert (digests[0] == digests[1]) == (exact(one) == exact(two))
