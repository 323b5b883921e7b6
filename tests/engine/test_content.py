"""What the same voice is: files, arrays and other arguments count by their content, or are not remembered at all."""

from __future__ import annotations

import copy
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accelerate_tts import cached_embedding, events
from accelerate_tts.engine import content, file_digests


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


def test_a_file_that_has_long_been_the_same_is_not_read_again(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(b"RIFFabcd")
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    service.embed_file(path)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("it was read again"))
    service.embed_file(path)
    monkeypatch.undo()
    assert service.calls == 1
    path.write_bytes(b"XXXXabcd")
    service.embed_file(path)
    assert service.calls == 2


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
    assert len(not_applied(seen)) == 2
    assert len(set(not_applied(seen))) == 1


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
        monkeypatch.setattr(content, "fastest", lambda algorithm=algorithm: algorithm)
        for found, durable in ((stored, True), (own, False)):
            digest = content.Digest(durable=durable)
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
        digest = content.Digest()
        digest.add(array)
        digests.add(str(digest))
    assert len(digests) == 1
    for odd in (np.float32(3.0), np.array(3.0), np.zeros((0, 3)), np.array(["a"]), np.array(["2026-01-01"], "M8[D]")):
        content.Digest().add(odd)
