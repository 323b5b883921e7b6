"""Memory mapped from a file, whose pages the system may drop and read again on access. For Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

_MAP_FIXED = 0x10  # mmap(2), Linux; Python's mmap does not place a mapping
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
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
    with tempfile.TemporaryFile(dir=folder) as file:
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
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    if libc.mmap(start, size, protection, flags, file, offset) != start:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system from the kernel's list of mounts; "" if it is not listed."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""
