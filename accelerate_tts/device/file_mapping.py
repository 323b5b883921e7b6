"""Memory mapped from a file, whose pages the system may drop and read again on access. For Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from accelerate_tts.storage.files import named_by

_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20  # mmap(2), Linux; Python's mmap does not place a mapping
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2  # mremap(2)
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_FAILED = ctypes.c_void_p(-1).value
# If a page cannot be read again, since a server or a helper process is gone, SIGBUS ends this process.
_REMOTE = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "pvfs2", "smb3", "smbfs", "vboxsf", "vmhgfs", "wekafs",
}  # fmt: skip


def move_to_file(regions: Iterable[tuple[int, int]], folder: Path) -> int:
    """Write memory regions to a file, and map the file at their addresses. Addresses and content do not change.

    The mapping is private: a write copies its page to memory, and does not change the file. The file has no name, and
    is freed with its last mapped page. Only whole pages are moved.

    Args:
        regions: Address and bytes of each region. They must not be written meanwhile.
        folder: A folder on a local disk.

    Returns:
        Bytes moved.

    Raises:
        OSError: The system is not Linux, the folder is in memory or on a remote file system, or the disk is full.
            Nothing is moved then.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"memory cannot be mapped in place on {sys.platform}")
    kind = file_system(folder)
    if kind in _IN_MEMORY:
        raise OSError(f"{folder} lies in memory itself ({kind})")
    if kind in _REMOTE or kind.startswith("fuse"):
        raise OSError(
            f"{folder} is on a file system ({kind}) that may be away when a weight is read, which would end the"
            " process; set ACCELERATE_TTS_PACK_FOLDER to a folder on a disk of this machine"
        )
    pages = [pair for pair in (_whole_pages(*region) for region in regions) if pair[1] > 0]
    with named_by(folder):
        made = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    with made as file:
        offsets = [_write(file.fileno(), start, size) for start, size in pages]  # all regions before any is mapped
        for (start, size), offset in zip(pages, offsets, strict=True):
            _map(file.fileno(), start, size, offset)
    return sum(size for _, size in pages)


def _whole_pages(address: int, size: int) -> tuple[int, int]:
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start


def _write(file: int, start: int, size: int) -> int:
    """Append a region to the file; return its offset."""
    offset = os.lseek(file, 0, os.SEEK_END)
    rest = memoryview((ctypes.c_char * size).from_address(start)).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]
    return offset


def _map(file: int, start: int, size: int, offset: int) -> None:
    if _mapped(start, size, mmap.MAP_PRIVATE | _MAP_FIXED, file, offset) != start:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mapped(start: int | None, size: int, flags: int, file: int, offset: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
    found: int = libc.mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset)
    return found


def move_to_memory(region: tuple[int, int], *, content: bool) -> None:
    """Map memory at the address of a region whose pages are mapped from a file. The file is freed with its last page.

    An allocator has pages that it does not need dropped (`madvise`), and jemalloc then takes them for zeros. Pages of a
    file would be read again instead, so this must be done before their memory is freed.

    Args:
        region: Address and bytes.
        content: Keep the content. Otherwise the pages are zeros, and take no memory.

    Raises:
        OSError: There are too many mappings. Nothing is changed then.
    """
    start, size = _whole_pages(*region)
    if size <= 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
    fresh = _mapped(None, size, mmap.MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if fresh == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if content:
        ctypes.memmove(fresh, start, size)
    # In one step, so that a thread that reads it meanwhile finds the one or the other.
    if libc.mremap(fresh, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, start) != start:
        number = ctypes.get_errno()
        libc.munmap(ctypes.c_void_p(fresh), ctypes.c_size_t(size))
        raise OSError(number, os.strerror(number))


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system from the kernel's list of mounts; "" if it is not listed."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""
