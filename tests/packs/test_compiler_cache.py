"""The compiler's files as one archive: what came since comes back, byte for byte, and nothing leaves its folder."""

from __future__ import annotations

import ctypes
import getpass
import io
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest

from accelerate_tts.packs import compiler_cache

FILES = {"ab/cd.cpp": b"int main() {}", "ab/cd.main.so": bytes(range(256)) * 100, "fxgraph/x/y/z": b"", "top": b"1"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler's folder, which is not there yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "inductor"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def archive(*entries: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # type: ignore[call-overload]
        for entry in entries:
            entry.size = 4 if entry.isfile() else 0
            file.addfile(entry, io.BytesIO(b"evil") if entry.isfile() else None)
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def test_what_came_since_comes_back(cache: Path) -> None:
    write(cache, {"old/one": b"was there"})
    before = compiler_cache.snapshot()
    write(cache, FILES)
    packed = compiler_cache.pack(before)
    assert packed is not None
    for path in sorted(cache.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    cache.rmdir()
    assert compiler_cache.unpack(packed) == len(FILES)
    assert content(cache) == FILES
    assert compiler_cache.unpack(packed) == 0


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_compiled_code_is_for_its_user_alone(cache: Path) -> None:
    before = os.umask(0)
    try:
        assert compiler_cache.unpack(archive(entry("ab/code.py"), entry("top"))) == 2
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in cache.rglob("*") if path.is_file()}
    assert modes == {"code.py": 0o600, "top": 0o600}


def test_a_file_that_is_there_stays(cache: Path) -> None:
    write(cache, FILES)
    packed = compiler_cache.pack(frozenset())
    assert packed is not None
    write(cache, {"top": b"mine"})
    (cache / "ab/cd.cpp").unlink()
    assert compiler_cache.unpack(packed) == 1
    assert content(cache) == {**FILES, "top": b"mine"}


def test_what_was_there_and_is_used_comes_too(cache: Path) -> None:
    """A file that is opened, and what belongs to a lock that is taken: a library that is there nobody opens for it."""
    library, graph = {"ab/cd.main.so": b"1", "ab/cd.cpp": b"2"}, {"fxgraph/x/y/z": b"3"}
    write(cache, {**library, **graph, "locks/cd.lock": b"", "ab/other.so": b"4", "top": b"5"})
    before = compiler_cache.snapshot()
    (cache / "locks/cd.lock").open("a").close()
    (cache / "fxgraph/x/y/z").read_bytes()
    packed = compiler_cache.pack(before)
    earlier = compiler_cache.pack(compiler_cache.snapshot())
    assert packed is not None
    for path in content(cache):
        (cache / path).unlink()
    assert compiler_cache.unpack(packed) == 3
    assert content(cache) == {**library, **graph}
    assert earlier is None


def test_what_is_opened_is_noted_for_those_alone_who_ask(cache: Path, tmp_path: Path) -> None:
    write(cache, FILES)
    first = compiler_cache.snapshot()
    (cache / "top").read_bytes()
    second = compiler_cache.snapshot()
    (tmp_path / "elsewhere").write_bytes(b"")
    (cache / "ab/cd.cpp").read_bytes()
    with pytest.raises(OSError, match="invalid ELF header|file too short"):
        ctypes.CDLL(str(cache / "ab/cd.main.so"))
    assert first.opened == {"top", "ab/cd.cpp", "ab/cd.main.so"}
    assert second.opened == {"ab/cd.cpp", "ab/cd.main.so"}
    gone = weakref.ref(first)
    del first
    compiler_cache.snapshot()
    assert gone() is None
    # Others may be held by tunings of the same process that other tests have left to the garbage collector.
    assert [prefix for _, prefix in compiler_cache.watched].count(f"{cache}{os.sep}") == 2


def test_locks_and_half_written_files_stay_behind(cache: Path) -> None:
    write(cache, {"locks/a.lock": b"", "b.tmp": b"half"})
    assert compiler_cache.pack(frozenset()) is None
    write(cache, {"c": b"whole"})
    packed = compiler_cache.pack(frozenset())
    assert packed is not None
    (cache / "c").unlink()
    assert compiler_cache.unpack(packed) == 1


def test_nothing_new_no_folder_and_too_much(cache: Path) -> None:
    assert compiler_cache.snapshot() == frozenset()
    assert compiler_cache.pack(frozenset()) is None
    assert not cache.exists()
    write(cache, FILES)
    assert compiler_cache.pack(compiler_cache.snapshot()) is None
    size = sum(map(len, FILES.values()))
    assert compiler_cache.pack(frozenset(), most=size) is not None
    assert compiler_cache.pack(frozenset(), most=size - 1) is None


def test_a_file_that_another_process_removes_meanwhile_is_left_out(cache: Path) -> None:
    """A link to nowhere is listed, and cannot be read, as what is removed in between."""
    write(cache, FILES)
    (cache / "top").unlink()
    (cache / "top").symlink_to("removed")
    packed = compiler_cache.pack(frozenset())
    assert packed is not None
    assert compiler_cache.unpack(packed) == 0
    assert "top" not in content(cache)


@pytest.mark.parametrize(
    "bad",
    [
        entry("../evil"),
        entry("ab/../../evil"),
        entry("link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("link", tarfile.LNKTYPE, "good"),
        entry("pipe", tarfile.FIFOTYPE),
        entry("device", tarfile.CHRTYPE),
        entry("folder", tarfile.DIRTYPE),
    ],
    ids=["parent", "parent inside", "symlink", "hard link", "pipe", "device", "folder"],
)
def test_an_entry_that_is_no_plain_file_in_the_folder(cache: Path, bad: tarfile.TarInfo) -> None:
    with pytest.raises(ValueError, match="no plain file"):
        compiler_cache.unpack(archive(entry("good"), bad))
    assert set(content(cache)) == {"good"}
    assert not (cache.parent / "evil").exists()


@pytest.mark.parametrize("name", ["good", "../evil"])
def test_an_absolute_name_is_refused_wherever_it_leads(cache: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no plain file"):
        compiler_cache.unpack(archive(entry(str(cache / name))))
    assert not list(cache.parent.iterdir())


@pytest.mark.parametrize(
    "bad",
    [b"", b"no archive", archive(entry("good"))[:-20], archive(entry("good"), mode="w")],
    ids=["empty", "text", "cut off", "not compressed"],
)
def test_what_is_no_archive(cache: Path, bad: bytes) -> None:
    with pytest.raises((tarfile.TarError, EOFError, OSError)):
        compiler_cache.unpack(bad)
    assert content(cache) in ({}, {"good": b"evil"})


def test_a_folder_that_cannot_be_written_leaves_nothing_half_done(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Path, _target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        compiler_cache.unpack(archive(entry("ab/good")))
    assert content(cache) == {}


@pytest.mark.parametrize("name", ["a/b:c", None], ids=["a name that no file can have", "no name"])
def test_the_folder_is_the_one_that_inductor_takes(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    def user() -> str:
        if name is None:
            raise KeyError("getpwuid(): uid not found")
        return name

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(getpass, "getuser", user)
    try:
        expected = default_cache_dir()
    except KeyError:  # inductor of torch 2.6 fails without a name; ours is the folder of later releases
        expected = f"{tempfile.gettempdir()}/torchinductor_uid_{os.getuid()}"
    assert os.fspath(compiler_cache.cache_folder()) == expected


def test_files_that_other_threads_open_meanwhile_disturb_no_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = compiler_cache.snapshot()

    class Growing(str):
        """A name at which another thread opens the next file."""

        __slots__ = ()

        def rsplit(self, *args: Any, **kwargs: Any) -> list[str]:
            before.opened.add(f"{len(before.opened)}.so")
            return super().rsplit(*args, **kwargs)

    before.opened.update(Growing(f"{number}.so") for number in range(100))
    assert compiler_cache.pack(before) is None
    assert len(before.opened) > 100


EXIT = """
import builtins, os
from accelerate_tts.packs import compiler_cache

class Late:
    def __del__(self, open=open, path=os.devnull):
        open(path).close()

builtins.left = os, compiler_cache
os.late = Late()
before = compiler_cache.snapshot()
"""


def test_files_that_an_exiting_interpreter_opens_disturb_nothing() -> None:
    """Modules that are left are emptied, those that were imported last first."""
    ended = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
