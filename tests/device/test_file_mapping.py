"""Memory moved into a file in place: same addresses and numbers, less memory, and nothing moved where that fails."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts.device import file_mapping
from accelerate_tts.device.file_mapping import move_to_file, move_to_memory

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mapped in place on Linux only")
SIZE = 32 << 20


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Where the tests' own folder lies in memory, all but the saving is as on a disk.
    monkeypatch.setattr(file_mapping, "file_system", lambda _folder: "ext4")
    return tmp_path


def region(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def anonymous() -> int:
    """Bytes of this process's memory that lie in no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


@linux
def test_content_and_address_stay_and_memory_is_given_back(disk: Path) -> None:
    tensor = torch.arange(SIZE // 4, dtype=torch.float32)
    expected, address, before = tensor.sum(), tensor.data_ptr(), anonymous()
    moved = move_to_file([region(tensor)], disk)
    assert moved > 0.99 * SIZE
    assert before - anonymous() > 0.9 * SIZE
    assert tensor.data_ptr() == address
    assert torch.equal(tensor.sum(), expected)
    assert before - anonymous() > 0.9 * SIZE, "reading takes no memory of this process's own"
    assert not list(disk.iterdir()), "the file has no name"


@linux
def test_it_can_be_written_to_and_freed(disk: Path) -> None:
    for _ in range(3):
        tensor = torch.zeros(SIZE // 4)
        move_to_file([region(tensor)], disk)
        tensor += 1
        assert float(tensor.sum()) == tensor.numel()
        copy = tensor.clone()
        del tensor
        assert torch.equal(copy, torch.ones(SIZE // 4))


@linux
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=6), st.integers(0, 5000))
def test_regions_of_any_size_and_alignment_keep_their_content(sizes: list[int], shift: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_mapping, "file_system", lambda _folder: "ext4")
        whole = torch.randint(0, 255, (sum(sizes) + shift,), dtype=torch.uint8)
        expected = whole.clone()
        regions, start = [], whole.data_ptr() + shift
        for size in sizes:
            regions.append((start, size))
            start += size
        assert move_to_file(regions, Path.cwd()) % file_mapping.mmap.PAGESIZE == 0
        assert torch.equal(whole, expected)


@linux
@pytest.mark.parametrize("content", [True, False])
def test_memory_takes_the_files_place_again_and_dropped_pages_are_zeros(disk: Path, content: bool) -> None:
    with mmap.mmap(-1, 1 << 20) as memory:
        memory[:] = full = b"7" * len(memory)
        held = ctypes.c_char.from_buffer(memory)
        whole = ctypes.addressof(held), len(memory)
        del held
        assert move_to_file([whole], disk) == len(memory)
        memory.madvise(mmap.MADV_DONTNEED)  # as allocators do with what was freed
        assert memory[:] == full, "the pages came back from the file"
        move_to_memory(whole, content=content)
        assert memory[:] == (full if content else bytes(len(memory)))
        assert str(disk) not in Path("/proc/self/maps").read_text()
        memory.madvise(mmap.MADV_DONTNEED)
        assert memory[:] == bytes(len(memory))


@linux
def test_a_full_disk_moves_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.rand(SIZE // 8) for _ in range(2)]
    expected, before = [tensor.clone() for tensor in tensors], anonymous()
    write, calls = os.write, [0]

    def full(file: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(file_mapping.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        move_to_file(map(region, tensors), disk)
    assert all(torch.equal(tensor, same) for tensor, same in zip(tensors, expected, strict=True))
    assert before - anonymous() < SIZE // 8


@linux
def test_a_folder_that_lies_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_mapping, "file_system", lambda _folder: "tmpfs")
    with pytest.raises(OSError, match=r"lies in memory itself \(tmpfs\)"):
        move_to_file([region(torch.rand(SIZE // 4))], tmp_path)


@linux
def test_the_kind_of_file_system_is_the_kernels() -> None:
    assert file_mapping.file_system(Path("/proc/self").parent) == "proc"


def test_elsewhere_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_mapping.sys, "platform", "darwin")
    with pytest.raises(OSError, match="darwin"):
        move_to_file([], tmp_path)


@linux
@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs", "fuse", "9p", "lustre"])
def test_a_file_system_that_may_go_away_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A mapped page that cannot be read again ends the process by SIGBUS."""
    monkeypatch.setattr(file_mapping, "file_system", lambda _folder: kind)
    tensor = torch.zeros(1 << 20)
    with pytest.raises(OSError, match="ACCELERATE_TTS_PACK_FOLDER"):
        move_to_file([region(tensor)], tmp_path)
    assert not list(tmp_path.iterdir())
