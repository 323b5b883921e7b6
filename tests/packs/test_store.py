"""Warm packs on disk: what comes back is what was written, compiled code only under the right secret, faults cost an
event, and any number of processes may share the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import accelerate_tts
from accelerate_tts.errors import AccelerateTTSError, PackError
from accelerate_tts.events import Event, PackIgnored, add_hook
from accelerate_tts.packs import format as pack_format
from accelerate_tts.packs import store as pack_store
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore
from accelerate_tts.storage import files

KEY = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
SHARED = b"the same on both machines"
MEGABYTE = 1 << 20
DECISIONS: dict[str, Any] = {"decoder": ["channels_last"], "ratio": 1.36, "text": "é\ud800", "none": None, "on": True}
ARTIFACTS = b"\x80\x04 opaque \x00\n code"
PACK = Pack(KEY, DECISIONS, ARTIFACTS)
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")


def key(number: int) -> str:
    return f"{number:032x}"


def file_of(folder: Path, name: str = KEY) -> Path:
    return folder / f"{name}.pack"


def forged(pack: Pack, secret: bytes) -> bytes:
    """A well-formed file of this pack, signed with `secret`."""
    text = json.dumps(pack.decisions).encode()
    return b"".join(pack_format.sealed(pack.key, text, pack.artifacts, secret))


def ignored(seen: list[Event]) -> list[str]:
    """The events so far, as lines; they are forgotten."""
    assert all(isinstance(event, PackIgnored) and event.degraded for event in seen)
    lines = [str(event) for event in seen]
    seen.clear()
    return lines


def one(seen: list[Event], *pieces: str) -> None:
    lines = ignored(seen)
    assert len(lines) == 1, lines
    for piece in pieces:
        assert piece in lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "packs"


@pytest.fixture
def store(folder: Path) -> PackStore:
    return PackStore(folder, MEGABYTE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each touch is a second after the last one, whatever the file system's resolution is."""
    ticks = iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr(files, "time", SimpleNamespace(time=time.time, time_ns=lambda: next(ticks) * 10**9))


class TestRoundTrip:
    def test_what_is_written_is_read(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        assert store.read(KEY) is None
        assert store.write(PACK)
        assert PackStore(folder, MEGABYTE).read(KEY) == PACK
        assert store.read(OTHER) is None
        assert seen == []

    def test_reading_creates_nothing(self, store: PackStore, folder: Path) -> None:
        assert store.read(KEY) is None
        assert store.entries() == []
        assert not folder.exists()

    @pytest.mark.parametrize("artifacts", [None, b"", b"\n", bytes(100_000)])
    def test_no_artifacts_and_empty_ones_differ(self, store: PackStore, artifacts: bytes | None) -> None:
        assert store.write(Pack(KEY, {}, artifacts))
        assert store.read(KEY) == Pack(KEY, {}, artifacts)

    def test_the_newer_pack_of_a_key_takes_the_place_of_the_older(self, store: PackStore, folder: Path) -> None:
        store.write(PACK)
        assert store.write(Pack(KEY, {"new": 1}))
        assert store.read(KEY) == Pack(KEY, {"new": 1})
        assert sorted(path.name for path in folder.iterdir()) == sorted([f"{KEY}.pack", "secret"])

    @settings(max_examples=30, deadline=None)
    @given(
        decisions=st.dictionaries(
            st.text(),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=10,
            ),
        ),
        artifacts=st.none() | st.binary(max_size=300),
    )
    def test_anything_that_json_can_say(self, decisions: Any, artifacts: bytes | None) -> None:
        with tempfile.TemporaryDirectory() as place:
            store = PackStore(Path(place), MEGABYTE, SHARED)
            assert store.write(Pack(KEY, decisions, artifacts))
            assert store.read(KEY) == Pack(KEY, decisions, artifacts)

    def test_the_file_is_text_up_to_the_payloads_and_the_checksums_are_of_these(
        self, store: PackStore, folder: Path
    ) -> None:
        store.write(PACK)
        magic, header, rest = file_of(folder).read_bytes().split(b"\n", 2)
        assert magic == b"accelerate-tts pack 1"
        text = json.dumps(DECISIONS).encode()
        assert json.loads(header) == {
            "key": KEY,
            "decisions": [len(text), hashlib.sha256(text).hexdigest()],
            "artifacts": [len(ARTIFACTS), hashlib.sha256(ARTIFACTS).hexdigest()],
        }
        assert rest[:-32] == text + ARTIFACTS

    def test_artifacts_are_not_printed(self) -> None:
        assert "opaque" not in repr(PACK)


class TestRefusedInput:
    @pytest.mark.parametrize(
        "bad",
        [
            "",
            "abc",
            "0" * 15,
            "0" * 129,
            "A" * 32,
            "../" + "0" * 32,
            "0" * 31 + "/",
            "0" * 32 + "\n",
            "g" * 32,
            "٠" * 32,
        ],
    )
    def test_a_key_that_is_none(self, store: PackStore, folder: Path, tmp_path: Path, bad: str) -> None:
        for use in (
            lambda: store.read(bad),
            lambda: store.write(Pack(bad, {})),
            lambda: store.export([bad], tmp_path / "out"),
        ):
            with pytest.raises(ValueError, match="hex digits"):
                use()
        assert not folder.exists()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("good", ["0" * 16, "f" * 128])
    def test_the_shortest_and_the_longest_key(self, store: PackStore, good: str) -> None:
        assert store.write(Pack(good, {}, b"x"))
        assert store.read(good) == Pack(good, {}, b"x")
        assert [info.key for info in store.entries()] == [good]

    @pytest.mark.parametrize(
        "value",
        [float("nan"), float("inf"), -float("inf"), b"bytes", {1, 2}, object(), 10**5000],
        ids=lambda value: type(value).__name__,
    )
    def test_decisions_that_json_cannot_say(self, store: PackStore, folder: Path, value: Any) -> None:
        with pytest.raises(PackError, match="0123456789ab"):
            store.write(Pack(KEY, {"nested": [value]}))
        assert not folder.exists()

    def test_decisions_without_an_end(self, store: PackStore) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        circle: dict[str, Any] = {}
        circle["itself"] = circle
        for decisions in ({"deep": deep}, circle):
            with pytest.raises(PackError):
                store.write(Pack(KEY, decisions))
        while deep:  # or its own end would overflow the stack
            deep = deep[0]

    def test_the_error_is_of_this_library_and_a_value_error(self) -> None:
        assert issubclass(PackError, AccelerateTTSError)
        assert issubclass(PackError, ValueError)


class TestDamage:
    @pytest.fixture
    def content(self, folder: Path) -> bytes:
        small = Pack(key(1), {"a": 1}, b"code")
        assert PackStore(folder, MEGABYTE).write(small)
        return file_of(folder, key(1)).read_bytes()

    def check(self, store: PackStore, folder: Path, content: bytes, seen: list[Event]) -> Pack | None:
        file_of(folder, key(1)).write_bytes(content)
        found = store.read(key(1))
        assert found in (None, Pack(key(1), {"a": 1}, None))
        assert len(ignored(seen)) == 1
        return found

    @pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
    def test_any_byte_changed(
        self, store: PackStore, folder: Path, content: bytes, flip: int, seen: list[Event]
    ) -> None:
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= flip
            found = self.check(store, folder, bytes(changed), seen)
            # The signature is the one part whose damage leaves something that can be checked.
            assert (found is not None) == (place >= len(content) - 32)

    def test_any_truncation(self, store: PackStore, folder: Path, content: bytes, seen: list[Event]) -> None:
        for length in range(len(content)):
            assert self.check(store, folder, content[:length], seen) is None

    @pytest.mark.parametrize("more", [b"\0", b"\n", bytes(32), b"x" * 1000])
    def test_anything_added(
        self, store: PackStore, folder: Path, content: bytes, more: bytes, seen: list[Event]
    ) -> None:
        assert self.check(store, folder, content + more, seen) is None
        assert self.check(store, folder, more + content, seen) is None

    @settings(max_examples=100, deadline=None)
    @given(
        content=st.binary(max_size=300), after=st.sampled_from([b"", pack_format.MAGIC, pack_format.MAGIC + b"{}\n"])
    )
    def test_anything_at_all(self, content: bytes, after: bytes) -> None:
        with tempfile.TemporaryDirectory() as place:
            file_of(Path(place)).write_bytes(after + content)
            assert PackStore(Path(place), MEGABYTE, SHARED).read(KEY) is None

    @settings(max_examples=100, deadline=None)
    @given(
        header=st.fixed_dictionaries(
            {},
            optional={
                "key": st.sampled_from([KEY, OTHER, None, 1]),
                "decisions": (
                    size := st.none() | st.integers() | st.lists(st.integers() | st.text() | st.none(), max_size=3)
                ),
                "artifacts": size,
            },
        )
    )
    def test_any_header_over_a_right_signature(self, header: dict[str, Any]) -> None:
        body = pack_format.MAGIC + json.dumps(header).encode() + b"\n" + b'{"a":1}'
        with tempfile.TemporaryDirectory() as place:
            file_of(Path(place)).write_bytes(body + pack_format.mac(SHARED, body))
            assert PackStore(Path(place), MEGABYTE, SHARED).read(KEY) is None

    @pytest.mark.parametrize(
        "text",
        [
            b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"a": NaN}',
            b'{"a": -Infinity}',
            b'{"a": 1e999}',
            b'{"a": ' + b"9" * 5000 + b"}",
            b"[]",
            b"1",
            b"",
            b"\xff",
            '{"a": 1}'.encode("utf-16"),
        ],
        ids=lambda text: repr(text[:20]),
    )
    def test_decisions_that_are_no_object_of_json(self, folder: Path, text: bytes, seen: list[Event]) -> None:
        folder.mkdir(parents=True)
        file_of(folder).write_bytes(b"".join(pack_format.sealed(KEY, text, None, SHARED)))
        assert PackStore(folder, MEGABYTE, SHARED).read(KEY) is None
        one(seen, "warm pack 0123456789ab", "JSON")

    def test_a_header_that_nests_too_deep(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        folder.mkdir(parents=True)
        for depth in (400, 100_000):  # within the header's limit, and far beyond
            file_of(folder).write_bytes(pack_format.MAGIC + b"[" * depth + b"]" * depth + b"\n" + bytes(64))
            assert store.read(KEY) is None
            one(seen, "warm pack 0123456789ab")

    def test_another_format_version(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        store.write(PACK)
        content = file_of(folder).read_bytes()
        file_of(folder).write_bytes(content.replace(b"pack 1\n", b"pack 2\n", 1))
        assert store.read(KEY) is None
        one(seen, "format version")

    def test_a_signed_pack_under_another_name(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        store.write(PACK)
        file_of(folder).rename(file_of(folder, OTHER))
        assert store.read(OTHER) is None
        one(seen, "fedcba987654", "another key")

    def test_a_claim_of_more_than_the_file_holds(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        store.write(PACK)
        content = file_of(folder).read_bytes()
        size = b"[%d, " % len(ARTIFACTS)
        for claim in (b"[999999999999, ", b"[-1, ", b"[1.5, ", b'["9", '):
            file_of(folder).write_bytes(content.replace(size, claim))
            assert store.read(KEY) is None
            one(seen, "claims")

    def test_a_file_over_the_limit_is_not_read_into_memory(
        self, store: PackStore, folder: Path, seen: list[Event]
    ) -> None:
        folder.mkdir(parents=True)
        with file_of(folder).open("wb") as file:
            file.truncate(1 << 42)  # sparse: to read it would be a MemoryError
        assert store.read(KEY) is None
        one(seen, str(MEGABYTE))


class TestTrust:
    def test_a_foreign_pack_gives_its_decisions_only(self, folder: Path, store: PackStore, seen: list[Event]) -> None:
        store.write(Pack(OTHER, {}))  # there is a secret here
        file_of(folder).write_bytes(forged(PACK, b"theirs"))
        assert store.read(KEY) == Pack(KEY, DECISIONS, None)
        one(seen, "compiled code", "0123456789ab", "ACCELERATE_TTS_PACK_KEY", "both machines")

    def test_with_no_secret_here_everything_is_foreign(self, folder: Path, store: PackStore, seen: list[Event]) -> None:
        folder.mkdir(parents=True)
        for secret in (b"theirs", b"\0"):
            file_of(folder).write_bytes(forged(PACK, secret))
            assert store.read(KEY) == Pack(KEY, DECISIONS, None)
            one(seen, "ACCELERATE_TTS_PACK_KEY")
        assert not (folder / "secret").exists()

    def test_an_empty_secret_is_none(self, folder: Path, seen: list[Event]) -> None:
        folder.mkdir(parents=True)
        file_of(folder).write_bytes(b"".join(pack_format.sealed(KEY, b"{}", b"code", b"")))
        assert PackStore(folder, MEGABYTE, b"").read(KEY) == Pack(KEY, {}, None)
        one(seen, "ACCELERATE_TTS_PACK_KEY")

    def test_a_shared_secret_gives_the_code(self, folder: Path, seen: list[Event]) -> None:
        assert PackStore(folder, MEGABYTE, SHARED).write(PACK)
        assert not (folder / "secret").exists()
        assert PackStore(folder, MEGABYTE, SHARED).read(KEY) == PACK
        assert seen == []
        for wrong in (None, b"", SHARED + b".", SHARED[:-1], bytes(32)):
            assert PackStore(folder, MEGABYTE, wrong).read(KEY) == Pack(KEY, DECISIONS, None)
            one(seen, "compiled code")

    def test_tampered_decisions_are_refused(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        store.write(PACK)
        content = file_of(folder).read_bytes()
        file_of(folder).write_bytes(content.replace(b"channels_last", b"channels_lost"))
        assert store.read(KEY) is None
        one(seen, "checksum of its decisions")

    @pytest.mark.parametrize(
        "change", [Pack(KEY, {}, ARTIFACTS), Pack(KEY, DECISIONS, b"import os"), Pack(KEY, {"own": 1}, b"")]
    )
    def test_a_change_with_checksums_to_match_never_gives_code(
        self, store: PackStore, folder: Path, seen: list[Event], change: Pack
    ) -> None:
        store.write(PACK)
        signature = file_of(folder).read_bytes()[-32:]
        for end in (signature, bytes(32)):
            file_of(folder).write_bytes(forged(change, b"guess")[:-32] + end)
            assert store.read(KEY) == Pack(KEY, change.decisions, None)
            one(seen, "compiled code")

    def test_code_of_one_pack_in_another(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        store.write(PACK)
        store.write(Pack(OTHER, {}, b"code"))
        ours, other = (file_of(folder, name).read_bytes() for name in (KEY, OTHER))
        file_of(folder).write_bytes(other.replace(OTHER.encode(), KEY.encode()))
        assert store.read(KEY) == Pack(KEY, {}, None)
        one(seen, "compiled code")
        file_of(folder).write_bytes(ours)
        assert store.read(KEY) == PACK


class TestSecret:
    @posix
    def test_packs_and_exports_are_for_their_user_alone(self, store: PackStore, folder: Path) -> None:
        before = os.umask(0)
        try:
            store.write(PACK)
            store.export(None, folder.parent / "out")
        finally:
            os.umask(before)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*folder.iterdir(), folder.parent / "out")}
        assert modes == {f"{KEY}.pack": 0o600, "secret": 0o600, "out": 0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    @posix
    def test_a_folder_that_exists_keeps_its_mode(self, store: PackStore, folder: Path) -> None:
        folder.mkdir(parents=True)
        folder.chmod(0o750)
        store.write(PACK)
        store.read(KEY)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750

    def test_it_is_random_and_stays(self, tmp_path: Path) -> None:
        found = set()
        for place in ("a", "b"):
            PackStore(tmp_path / place, MEGABYTE).write(PACK)
            first = (tmp_path / place / "secret").read_bytes()
            PackStore(tmp_path / place, MEGABYTE).write(Pack(OTHER, {}))
            assert (tmp_path / place / "secret").read_bytes() == first
            assert len(first) == 32
            found.add(first)
        assert len(found) == 2

    def spoil(self, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / "secret"
        if how == "link":
            path.rename(folder / "elsewhere")
            path.symlink_to(folder / "elsewhere")
        elif how == "owner":
            real = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: real + 1)
        elif how == "short":
            path.write_bytes(path.read_bytes()[:31])
        elif how == "long":
            path.write_bytes(path.read_bytes() + b"x")
        elif how == "pipe":
            path.unlink()
            os.mkfifo(path, 0o600)
        else:
            path.chmod(int(how, 8))

    @posix
    @pytest.mark.parametrize("how", ["link", "owner", "short", "long", "pipe", "0640", "0620", "0604", "0601", "0200"])
    def test_one_that_others_may_know_or_have_set_is_replaced(
        self, store: PackStore, folder: Path, how: str, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(PACK)
        first = (folder / "secret").read_bytes()
        user = os.geteuid
        self.spoil(folder, how, monkeypatch)
        assert store.read(KEY) == Pack(KEY, DECISIONS, None)
        refused, foreign = ignored(seen)
        assert "the secret" in refused
        assert "fresh" in refused
        assert "compiled code" in foreign

        assert store.write(Pack(OTHER, {}, b"code"))
        one(seen, "the secret")
        if how == "owner":  # the fresh one belongs to whoever runs this, as the refused one did
            monkeypatch.setattr(os, "geteuid", user)
        about = (folder / "secret").lstat()
        assert stat.S_ISREG(about.st_mode)
        assert stat.S_IMODE(about.st_mode) == 0o600
        assert (folder / "secret").read_bytes() != first
        assert store.read(OTHER) == Pack(OTHER, {}, b"code")
        assert store.read(KEY) == Pack(KEY, DECISIONS, None), "signed with the refused one"
        one(seen, "compiled code")
        if how == "link":
            assert (folder / "elsewhere").read_bytes() == first

    @posix
    def test_a_good_one_is_not_lost_to_a_passing_fault(
        self, store: PackStore, folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(PACK)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing(os.open, errno.EMFILE))
            assert not store.write(Pack(OTHER, {}))
            one(seen, "could not be written")
        assert store.read(KEY) == PACK

    def test_where_there_are_no_hard_links(
        self, store: PackStore, folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))
        assert store.write(PACK)
        assert store.read(KEY) == PACK
        assert sorted(path.name for path in folder.iterdir()) == sorted([f"{KEY}.pack", "secret"])
        assert seen == []

    @pytest.mark.parametrize("lock", [True, False])
    def test_threads_that_race_for_it_end_up_with_one(
        self, tmp_path: Path, seen: list[Event], lock: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not lock:  # a network folder may have none; the name alone must decide then
            monkeypatch.setattr(pack_store, "alone", lambda _folder: contextlib.nullcontext())
        monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
        for turn in range(20):
            folder = tmp_path / str(turn)
            gate = threading.Barrier(4)

            def write(number: int, folder: Path = folder, gate: threading.Barrier = gate) -> None:
                gate.wait()
                PackStore(folder, MEGABYTE).write(Pack(key(number), {}, b"code"))

            together(write, 4)
            for number in range(4):
                assert PackStore(folder, MEGABYTE).read(key(number)) == Pack(key(number), {}, b"code")
        assert seen == []

    @posix
    def test_two_that_replace_a_refused_one_do_so_once(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder.mkdir(parents=True)
        (folder / "secret").write_bytes(b"x" * 32)
        (folder / "secret").chmod(0o644)
        remove, both, removals = Path.unlink, threading.Barrier(2), []

        def slow(path: Path, missing_ok: bool = False) -> None:
            if path.name == "secret":  # each has judged it by now; without the lock, both arrive here
                removals.append(path)
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(timeout=0.3)
            remove(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", slow)
        together(lambda number: PackStore(folder, MEGABYTE).write(Pack(key(number), {}, b"code")), 2)
        assert len(removals) == 1
        for number in range(2):
            assert PackStore(folder, MEGABYTE).read(key(number)) == Pack(key(number), {}, b"code")

    @posix
    def test_a_mode_that_changes_after_the_look(
        self, store: PackStore, folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(PACK)
        before = (folder / "secret").lstat()
        (folder / "secret").chmod(0o644)
        monkeypatch.setattr(Path, "lstat", lambda _path: before)
        assert store.read(KEY) == Pack(KEY, DECISIONS, None)
        assert "its mode is 0644" in ignored(seen)[0]

    @posix
    def test_processes_that_race_for_it_end_up_with_one(self, tmp_path: Path) -> None:
        # Two fresh interpreters, let go at the same line of each turn; every other turn begins with a refused secret.
        turns = 30
        for turn in range(0, turns, 2):
            folder = tmp_path / str(turn)
            folder.mkdir()
            (folder / "secret").write_bytes(b"x" * 32)
            (folder / "secret").chmod(0o644)
        script = (
            # Not PYTHONPATH: it goes before the standard library, and PyPI's `typing` 3.7 (of resemblyzer) hides its.
            "import sys, pathlib\n"
            "sys.path.append(sys.argv[2])\n"
            "from accelerate_tts.packs.store import Pack, PackStore\n"
            "print('torch' in sys.modules, flush=True)\n"
            "for line in sys.stdin:\n"
            "    kept = PackStore(pathlib.Path(line.strip()), 1 << 20).write(Pack(sys.argv[1], {}, b'code'))\n"
            "    print(kept, flush=True)\n"
        )
        home = str(Path(accelerate_tts.__file__).parents[1])
        children = [
            subprocess.Popen(
                [sys.executable, "-c", script, key(number), home],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        try:
            answers = [read_line(child) for child in children]
            assert answers == ["False", "False"], "the store must not cost an import of torch"
            for turn in range(turns):
                for child in children:
                    assert child.stdin is not None
                    child.stdin.write(f"{tmp_path / str(turn)}\n")
                    child.stdin.flush()
                assert [read_line(child) for child in children] == ["True", "True"]
                for number in range(2):
                    found = PackStore(tmp_path / str(turn), MEGABYTE).read(key(number))
                    assert found == Pack(key(number), {}, b"code")
        finally:
            for child in children:
                child.communicate(timeout=30)


def read_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def together(work: Callable[[int], object], count: int) -> None:
    """Run `work` in threads; an exception in one of them is raised here."""
    faults: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def failing(_real: Callable[..., Any], number: int) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


class TestFolder:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
    @pytest.mark.parametrize("call", ["open", "replace", "fsync", "mkdir"])
    def test_a_disk_that_refuses(
        self, folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch, call: str, number: int
    ) -> None:
        store = PackStore(folder, MEGABYTE)
        if call != "mkdir":
            assert store.write(PACK)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(getattr(os, call), number))
            if call in {"replace", "mkdir"}:  # Python 3.10's Path has taken its own reference
                patch.setattr(Path, call, failing(getattr(Path, call), number))
            assert store.write(Pack(OTHER, {"new": 1}, b"code")) is False
            one(seen, "warm pack fedcba987654", "could not be written", os.strerror(number))
            if call == "open":
                assert store.read(KEY) is None
                one(seen, "warm pack 0123456789ab", os.strerror(number))
                with pytest.raises(PackError, match="cannot be loaded"):
                    store.load(file_of(folder))
            if call != "mkdir":
                with pytest.raises(PackError, match="cannot be written"):
                    store.export(None, folder.parent / "out")
                seen.clear()
        if call != "mkdir":
            assert store.read(KEY) == PACK
            assert sorted(path.name for path in folder.iterdir()) == sorted([f"{KEY}.pack", "secret"])
            assert not (folder.parent / "out").exists()
        assert store.read(OTHER) is None
        assert seen == []

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM])
    def test_a_touch_or_an_eviction_that_is_refused(
        self, folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        store = PackStore(folder, 1000, SHARED)
        monkeypatch.setattr(os, "utime", failing(os.utime, number))
        assert store.write(Pack(KEY, {}, bytes(500)))
        assert store.read(KEY) == Pack(KEY, {}, bytes(500))
        assert seen == []
        monkeypatch.setattr(Path, "unlink", failing(Path.unlink, number))
        assert store.write(Pack(OTHER, {}, bytes(500)))
        one(seen, "the limit of the warm pack folder", os.strerror(number))

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes into any folder")
    def test_a_read_only_folder(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        store.write(PACK)
        folder.chmod(0o500)
        try:
            assert store.read(KEY) == PACK
            assert seen == []
            assert store.write(Pack(OTHER, {})) is False
            one(seen, "could not be written")
        finally:
            folder.chmod(0o700)

    @pytest.mark.parametrize("below", [".", "deeper/still"])
    def test_a_folder_that_is_a_file(self, tmp_path: Path, below: str, seen: list[Event]) -> None:
        (tmp_path / "file").write_text("mine")
        store = PackStore(tmp_path / "file" / below, MEGABYTE)
        assert store.write(PACK) is False
        one(seen, "could not be written")
        assert store.read(KEY) is None
        one(seen, "warm pack 0123456789ab")
        assert store.entries() == []
        one(seen, "the warm pack folder")
        assert (tmp_path / "file").read_text() == "mine"

    def test_leftovers_of_crashed_writers(self, store: PackStore, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, age in ((".tmp-old", 3700), (".tmp-new", 3500), ("mine-old", 9000)):
            (folder / name).write_text("half")
            os.utime(folder / name, (time.time() - age,) * 2)
        store.write(PACK)
        assert {path.name for path in folder.iterdir()} == {f"{KEY}.pack", "secret", ".tmp-new", "mine-old"}
        assert [info.key for info in store.entries()] == [KEY]

    def test_a_writer_that_crashes_leaves_the_old_pack(
        self, store: PackStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(PACK)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.write(Pack(KEY, {"new": 1}))
        assert store.read(KEY) == PACK
        assert sorted(path.name for path in folder.iterdir()) == sorted([f"{KEY}.pack", "secret"])

    def test_what_is_written_is_on_disk_before_it_gets_its_name(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log: list[str] = []
        sync, rename = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda descriptor: (log.append("sync"), sync(descriptor)))
        monkeypatch.setattr(Path, "replace", lambda path, to: (log.append(f"name {to.name}"), rename(path, to)))
        PackStore(folder, MEGABYTE, SHARED).write(PACK)
        assert log == ["sync", f"name {KEY}.pack"]

    def test_a_link_in_a_packs_place(self, store: PackStore, folder: Path, tmp_path: Path, seen: list[Event]) -> None:
        store.write(PACK)
        outside = tmp_path / "outside"
        file_of(folder).rename(outside)
        content = outside.read_bytes()
        file_of(folder).symlink_to(outside)
        before = outside.stat().st_mtime_ns
        assert store.read(KEY) is None
        one(seen, "no regular file")
        assert store.entries() == []
        assert outside.stat().st_mtime_ns == before
        assert store.write(Pack(KEY, {"new": 1}))
        assert not file_of(folder).is_symlink()
        assert outside.read_bytes() == content
        assert store.read(KEY) == Pack(KEY, {"new": 1})

    @pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="O_NOFOLLOW is what is tested")
    def test_a_link_that_takes_a_packs_place_after_the_look(
        self, store: PackStore, folder: Path, tmp_path: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(PACK)
        regular = file_of(folder).lstat()
        file_of(folder).rename(tmp_path / "outside")
        file_of(folder).symlink_to(tmp_path / "outside")
        monkeypatch.setattr(Path, "lstat", lambda _path: regular)
        assert store.read(KEY) is None
        one(seen, "warm pack 0123456789ab")

    @posix
    def test_a_pipe_that_takes_a_packs_place_after_the_look(
        self, store: PackStore, folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.write(PACK)
        regular = file_of(folder).lstat()
        file_of(folder).unlink()
        os.mkfifo(file_of(folder))
        monkeypatch.setattr(Path, "lstat", lambda _path: regular)
        assert store.read(KEY) is None  # and does not wait for a writer
        one(seen, "no regular file")

    def test_a_pack_that_goes_while_the_folder_is_listed(
        self, store: PackStore, folder: Path, tmp_path: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        look = Path.lstat
        names = [key(number) for number in range(5)]
        for name in names:
            store.write(Pack(name, {}))
        for gone in names:  # whichever the folder lists first

            def late(path: Path, gone: str = gone) -> os.stat_result:
                if path == file_of(folder, gone):
                    raise FileNotFoundError(path)
                return look(path)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "lstat", late)
                assert {info.key for info in store.entries()} == set(names) - {gone}
                assert store.export(None, tmp_path / "out") == 4
                assert store.write(PACK)
            file_of(folder).unlink()
        assert seen == []

    @posix
    def test_what_is_no_regular_file_is_skipped(self, store: PackStore, folder: Path, seen: list[Event]) -> None:
        folder.mkdir(parents=True)
        file_of(folder, key(1)).mkdir()
        os.mkfifo(file_of(folder, key(2)))
        for number in (1, 2):
            assert store.read(key(number)) is None  # and does not wait for a writer
            one(seen, "no regular file")
        assert store.entries() == []
        assert PackStore(folder, 500).write(Pack(KEY, {}, b"x")), "eviction leaves them alone, too"
        assert file_of(folder, key(1)).is_dir()

    def test_without_what_windows_lacks(
        self, store: PackStore, folder: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Event]
    ) -> None:
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "getuid", "geteuid"):
            monkeypatch.delattr(os, name, raising=False)
        monkeypatch.setattr(os, "supports_fd", set())
        assert store.write(PACK)
        (folder / "secret").chmod(0o666)  # what every file's mode looks like there
        assert store.read(KEY) == PACK
        assert seen == []
        file_of(folder).rename(folder / "outside")
        file_of(folder).symlink_to(folder / "outside")
        assert store.read(KEY) is None
        one(seen, "no regular file")


@pytest.mark.usefixtures("clock")
class TestEviction:
    def size(self, tmp_path: Path, pack: Pack) -> int:
        PackStore(tmp_path / "scale", MEGABYTE, SHARED).write(pack)
        return file_of(tmp_path / "scale", pack.key).stat().st_size

    def test_the_least_recently_used_goes_first(self, tmp_path: Path, folder: Path, seen: list[Event]) -> None:
        packs = [Pack(key(number), {}, bytes(100)) for number in range(4)]
        store = PackStore(folder, 3 * self.size(tmp_path, packs[0]), SHARED)
        for pack in packs[:3]:
            assert store.write(pack)
        assert store.read(key(0)) == packs[0]  # which makes 1 the oldest
        assert [info.key for info in store.entries()] == [key(0), key(2), key(1)]
        assert store.write(packs[3])
        assert [info.key for info in store.entries()] == [key(3), key(0), key(2)]
        assert store.read(key(1)) is None
        assert seen == []

    def test_a_big_pack_takes_the_place_of_several(self, tmp_path: Path, folder: Path) -> None:
        big = Pack(KEY, {}, bytes(1000))
        small = [Pack(key(number), {}) for number in range(5)]
        store = PackStore(folder, self.size(tmp_path, big) + self.size(tmp_path, small[0]), SHARED)
        for pack in (*small, big):
            assert store.write(pack)
        assert [info.key for info in store.entries()] == [KEY, key(4)]

    def test_an_exact_fit(self, tmp_path: Path, folder: Path, seen: list[Event]) -> None:
        size = self.size(tmp_path, PACK)
        assert PackStore(folder, size, SHARED).write(PACK)
        assert PackStore(folder, size, SHARED).read(KEY) == PACK
        assert seen == []
        assert not PackStore(folder, size - 1, SHARED).write(PACK)
        one(seen, "could not be written", str(size), str(size - 1))
        assert PackStore(folder, size, SHARED).read(KEY) == PACK

    def test_one_that_alone_exceeds_the_limit_evicts_nothing(self, folder: Path, seen: list[Event]) -> None:
        store = PackStore(folder, 1000, SHARED)
        store.write(PACK)
        assert store.write(Pack(OTHER, {}, bytes(1000))) is False
        one(seen, "fedcba987654", "1000")
        assert [info.key for info in store.entries()] == [KEY]

    def test_the_one_just_written_stays_even_if_others_are_from_the_future(self, folder: Path) -> None:
        store = PackStore(folder, 1000, SHARED)
        store.write(Pack(OTHER, {}, bytes(500)))
        os.utime(file_of(folder, OTHER), (4e9, 4e9))
        assert store.write(Pack(KEY, {}, bytes(500)))
        assert [info.key for info in store.entries()] == [KEY]

    def test_entries_say_size_and_time(self, store: PackStore, folder: Path) -> None:
        store.write(PACK)
        (folder / "note.txt").write_text("not a pack")
        (folder / "short.pack").write_text("not a pack")
        (info,) = store.entries()
        about = file_of(folder).stat()
        assert (info.key, info.bytes) == (KEY, about.st_size)
        assert abs(info.used - about.st_mtime) < 1e-3

    def test_a_damaged_pack_is_not_made_recent_by_reading_it(self, folder: Path) -> None:
        store = PackStore(folder, MEGABYTE, SHARED)
        for name in (KEY, OTHER):
            store.write(Pack(name, {}))
        about = file_of(folder).stat()
        file_of(folder).write_bytes(b"damage")
        os.utime(file_of(folder), ns=(about.st_mtime_ns, about.st_mtime_ns))
        assert store.read(KEY) is None
        assert [info.key for info in store.entries()] == [OTHER, KEY]


def test_threads_that_write_read_and_evict_at_once(
    folder: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    size = len(forged(Pack(key(0), {"writer": 0}, bytes(2000)), SHARED))
    limit = 5 * size + size // 2
    gate = threading.Barrier(8)
    kept: list[bool] = []
    found: list[int] = []

    def work(number: int) -> None:
        store = PackStore(folder, limit)
        gate.wait()
        for turn in range(30):
            name = key((number + turn) % 12)
            kept.append(store.write(Pack(name, {"writer": number}, bytes([number]) * 2000)))
            pack = store.read(key((number * 5 + turn) % 12))
            if pack is not None:  # whole, and of one writer
                assert pack.artifacts == bytes([pack.decisions["writer"]]) * 2000
                found.append(number)
            store.entries()

    together(work, 8)
    assert kept == [True] * 240
    assert len(found) > 10
    assert seen == []
    store = PackStore(folder, limit)
    assert store.write(Pack(KEY, {}))
    assert sum(info.bytes for info in store.entries()) <= limit
    assert not list(folder.glob(".tmp-*"))


class TestShipping:
    @pytest.fixture
    def parcel(self, tmp_path: Path) -> Path:
        return tmp_path / "packs.bin"

    def filled(self, folder: Path, secret: bytes | None) -> PackStore:
        store = PackStore(folder, MEGABYTE, secret)
        for number in range(3):
            assert store.write(Pack(key(number), {"number": number}, b"code" if number else None))
        return store

    def test_with_the_shared_secret(self, tmp_path: Path, parcel: Path, seen: list[Event]) -> None:
        there = self.filled(tmp_path / "there", SHARED)
        here = PackStore(tmp_path / "here", MEGABYTE, SHARED)
        assert there.export(None, parcel) == 3
        assert here.load(parcel) == 3
        for number in range(3):
            assert here.read(key(number)) == there.read(key(number))
            assert file_of(tmp_path / "here", key(number)).read_bytes() == (
                file_of(tmp_path / "there", key(number)).read_bytes()
            )
        assert SHARED not in parcel.read_bytes()
        assert seen == []

    def test_without_it_the_code_stays_behind_for_good(self, tmp_path: Path, parcel: Path, seen: list[Event]) -> None:
        there = self.filled(tmp_path / "there", None)
        here = self.filled(tmp_path / "here-before", None)  # any other user: a secret of its own
        here = PackStore(tmp_path / "here", MEGABYTE)
        assert here.write(PACK)
        assert there.export(None, parcel) == 3
        assert (tmp_path / "there" / "secret").read_bytes() not in parcel.read_bytes()
        assert here.load(parcel) == 3
        lines = ignored(seen)
        assert len(lines) == 3
        assert all("ACCELERATE_TTS_PACK_KEY" in line for line in lines)
        for number in range(3):
            assert here.read(key(number)) == Pack(key(number), {"number": number}, None)
            one(seen, "compiled code")  # not re-signed: nobody here vouches for it
            content = file_of(tmp_path / "here", key(number)).read_bytes()
            assert content.endswith(bytes(32))
            assert b"code" not in content
        assert here.read(KEY) == PACK

    def test_some_keys_in_order_and_once(self, tmp_path: Path, parcel: Path) -> None:
        there = self.filled(tmp_path / "there", SHARED)
        assert there.export((key(number) for number in (2, 0, 2)), parcel) == 2
        here = PackStore(tmp_path / "here", MEGABYTE, SHARED)
        assert here.load(parcel) == 2
        assert {info.key for info in here.entries()} == {key(0), key(2)}

    @pytest.mark.usefixtures("clock")
    def test_who_was_used_last_is_kept(self, tmp_path: Path, parcel: Path) -> None:
        there = self.filled(tmp_path / "there", SHARED)
        there.read(key(0))
        there.export(None, parcel)
        here = PackStore(tmp_path / "here", 2 * len(forged(Pack(key(1), {"number": 1}, b"code"), SHARED)), SHARED)
        assert here.load(parcel) == 3
        assert [info.key for info in here.entries()] == [key(0), key(2)]

    def test_an_unknown_key(self, tmp_path: Path, parcel: Path) -> None:
        there = self.filled(tmp_path / "there", SHARED)
        parcel.write_text("mine")
        with pytest.raises(PackError, match=OTHER):
            there.export([key(0), OTHER], parcel)
        assert parcel.read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_an_empty_folder(self, store: PackStore, parcel: Path, tmp_path: Path) -> None:
        assert store.export(None, parcel) == 0
        assert PackStore(tmp_path / "here", MEGABYTE).load(parcel) == 0

    def test_a_damaged_pack_is_not_shipped(self, tmp_path: Path, parcel: Path, seen: list[Event]) -> None:
        there = self.filled(tmp_path / "there", SHARED)
        file_of(tmp_path / "there", key(1)).write_bytes(b"damage")
        assert there.export(None, parcel) == 2
        one(seen, "warm pack 000000000000")
        assert PackStore(tmp_path / "here", MEGABYTE, SHARED).load(parcel) == 2

    def test_an_own_pack_is_not_replaced_by_a_foreign_one(
        self, tmp_path: Path, parcel: Path, seen: list[Event]
    ) -> None:
        self.filled(tmp_path / "there", b"theirs").export([key(1)], parcel)
        here = PackStore(tmp_path / "here", MEGABYTE, SHARED)
        mine = Pack(key(1), {"mine": True}, b"my code")
        assert here.write(mine)
        assert here.load(parcel) == 0
        one(seen, "another secret")
        assert here.read(key(1)) == mine
        file_of(tmp_path / "here", key(1)).write_bytes(b"damage")  # that one is no loss
        assert here.load(parcel) == 1
        ignored(seen)
        assert here.read(key(1)) == Pack(key(1), {"number": 1}, None)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\n", b"accelerate-tts packs 1", b"accelerate-tts packs 2\nend\n", b"PK\x03\x04", bytes(5000)],
    )
    def test_no_export_at_all(self, store: PackStore, folder: Path, parcel: Path, content: bytes) -> None:
        parcel.write_bytes(content)
        with pytest.raises(PackError, match=r"packs\.bin is no export"):
            store.load(parcel)
        assert not folder.exists()

    def test_a_single_pack_is_no_export(self, store: PackStore, folder: Path) -> None:
        store.write(PACK)
        with pytest.raises(PackError, match="no export"):
            store.load(file_of(folder))

    def test_no_such_file_or_a_folder(self, store: PackStore, parcel: Path, tmp_path: Path) -> None:
        for path in (parcel, tmp_path):
            with pytest.raises(PackError, match="cannot be loaded"):
                store.load(path)

    def test_a_place_that_cannot_be_written(self, store: PackStore, tmp_path: Path) -> None:
        store.write(PACK)
        with pytest.raises(PackError, match="cannot be written"):
            store.export(None, tmp_path / "no" / "such" / "folder")

    def test_a_link_that_the_user_names_is_followed(self, tmp_path: Path, parcel: Path) -> None:
        self.filled(tmp_path / "there", SHARED).export(None, parcel)
        (tmp_path / "link").symlink_to(parcel)
        assert PackStore(tmp_path / "here", MEGABYTE, SHARED).load(tmp_path / "link") == 3

    def test_bad_ones_inside_are_skipped(self, tmp_path: Path, parcel: Path, seen: list[Event]) -> None:
        good = forged(Pack(key(1), {"a": 1}, b"code"), SHARED)
        inside = [
            (key(2), b"damage"),
            (key(3), good),  # signed, but for another key
            (key(4), b"".join(pack_format.sealed(key(4), b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}", None, SHARED))),
            (key(5), forged(Pack(key(5), {}, bytes(30_000)), SHARED)),  # over the limit
            (key(1), good),
        ]
        content = b"".join(b"%s %d\n%s" % (name.encode(), len(blob), blob) for name, blob in inside)
        parcel.write_bytes(b"accelerate-tts packs 1\n" + content + b"end\n")
        here = PackStore(tmp_path / "here", 25_000, SHARED)
        assert here.load(parcel) == 1
        assert len(ignored(seen)) == 4
        assert here.read(key(1)) == Pack(key(1), {"a": 1}, b"code")
        assert [info.key for info in here.entries()] == [key(1)]

    def test_foreign_decisions_of_any_depth(self, tmp_path: Path, parcel: Path) -> None:
        here = PackStore(tmp_path / "here", MEGABYTE)
        for depth in range(100, 1500, 100):  # some can be read though they could not be written
            text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
            blob = b"".join(pack_format.sealed(KEY, text, None, b"theirs"))
            parcel.write_bytes(b"accelerate-tts packs 1\n%s %d\n%send\n" % (KEY.encode(), len(blob), blob))
            assert here.load(parcel) in (0, 1)

    def test_any_truncation_of_an_export(
        self, tmp_path: Path, parcel: Path, seen: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
        there = self.filled(tmp_path / "there", SHARED)
        there.export(None, parcel)
        content = parcel.read_bytes()
        start = content.index(b"\n") + 1
        here = PackStore(tmp_path / "here", MEGABYTE, SHARED)
        counts = set()
        for length in range(start, len(content), 3):
            parcel.write_bytes(content[:length])
            counts.add(here.load(parcel))
            assert ignored(seen)
            for info in here.entries():
                assert here.read(info.key) == there.read(info.key)
        assert counts == {0, 1, 2, 3}
        assert seen == []

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_damage_to_an_export(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as place, mock.patch.object(os, "fsync"):
            self.filled(Path(place) / "there", SHARED).export(None, Path(place) / "out")
            content = bytearray((Path(place) / "out").read_bytes())
            start = content.index(b"\n") + 1
            for spot in data.draw(st.lists(st.integers(start, len(content) - 1), min_size=1, max_size=3)):
                content[spot] ^= data.draw(st.integers(1, 255))
            (Path(place) / "out").write_bytes(content)
            here = PackStore(Path(place) / "here", MEGABYTE, SHARED)
            here.load(Path(place) / "out")
            for info in here.entries():
                pack = here.read(info.key)
                assert pack is not None
                number = int(pack.key, 16)
                assert pack.decisions == {"number": number}
                assert pack.artifacts in (None, b"code" if number else None)


class PackMachine(RuleBasedStateMachine):
    """The store against a dict in the order of use."""

    LIMIT = 1500
    keys = st.integers(0, 4).map(key)

    def __init__(self) -> None:
        super().__init__()
        ticks = iter(range(1_700_000_000, 1_800_000_000))
        self.stack = contextlib.ExitStack()
        stamp = SimpleNamespace(time=time.time, time_ns=lambda: next(ticks) * 10**9)
        self.stack.enter_context(mock.patch.object(files, "time", stamp))
        self.stack.enter_context(mock.patch.object(os, "fsync"))
        place = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.events: list[Event] = []
        self.stack.callback(add_hook(self.events.append))
        self.folder = place / "packs"
        self.store = PackStore(self.folder, self.LIMIT)
        self.scale = PackStore(place / "scale", MEGABYTE)
        self.foreign = PackStore(place / "foreign", MEGABYTE)
        self.parcel = place / "parcel"
        # Expected results of reading: the pack, `None` for a damaged one; and its size.
        self.model: dict[str, tuple[Pack | None, int]] = {}

    def teardown(self) -> None:
        self.stack.close()

    def used(self, name: str) -> None:
        self.model[name] = self.model.pop(name)

    def kept(self, pack: Pack, size: int) -> None:
        self.model.pop(pack.key, None)
        self.model[pack.key] = (pack, size)
        while sum(size for _, size in self.model.values()) > self.LIMIT:
            del self.model[next(iter(self.model))]

    def size_of(self, pack: Pack) -> int:
        assert self.scale.write(pack)
        return next(info.bytes for info in self.scale.entries() if info.key == pack.key)

    @rule(name=keys, value=st.integers() | st.text(max_size=5), artifacts=st.none() | st.integers(0, 1400).map(bytes))
    def write(self, name: str, value: object, artifacts: bytes | None) -> None:
        pack = Pack(name, {"value": value}, artifacts)
        size = self.size_of(pack)
        assert self.store.write(pack) == (size <= self.LIMIT)
        assert len(self.events) == (size > self.LIMIT)
        if size <= self.LIMIT:
            self.kept(pack, size)

    @rule(name=keys)
    def read(self, name: str) -> None:
        expected, _ = self.model.get(name, (None, 0))
        assert self.store.read(name) == expected
        if expected is not None:
            self.used(name)
        whole = name not in self.model or file_of(self.folder, name).read_bytes()[-32:] != bytes(32)
        assert len(self.events) == (name in self.model and (expected is None or not whole))

    @precondition(lambda self: any(pack for pack, _ in self.model.values()))
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, (pack, _) in self.model.items() if pack)))
        path = file_of(self.folder, name)
        content, about = bytearray(path.read_bytes()), path.stat()
        spot = data.draw(st.integers(0, len(content) - 33))
        if data.draw(st.booleans()):
            content = content[:spot]
        else:
            content[spot] ^= 0xFF if content[spot] != 0xFF else 0x0F
        path.write_bytes(content)
        os.utime(path, ns=(about.st_mtime_ns, about.st_mtime_ns))
        self.model[name] = (None, len(content))
        assert self.store.read(name) is None

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        file_of(self.folder, name).unlink()
        del self.model[name]

    @rule(name=keys, value=st.integers())
    def load_foreign(self, name: str, value: int) -> None:
        assert self.foreign.write(Pack(name, {"value": value}, b"foreign code"))
        assert self.foreign.export([name], self.parcel) == 1
        own, _ = self.model.get(name, (None, 0))
        signed = own is not None and file_of(self.folder, name).read_bytes()[-32:] != bytes(32)
        assert self.store.load(self.parcel) == (not signed)
        assert len(self.events) == 1
        if not signed:
            self.kept(pack := Pack(name, {"value": value}), self.size_of(pack))

    @rule()
    def ship_and_take_back(self) -> None:
        whole = {name: pack for name, (pack, _) in self.model.items() if pack is not None}
        assert self.store.export(None, self.parcel) == len(whole)
        for name in list(self.model):  # in the order of use
            if name in whole:
                self.used(name)
        self.events.clear()
        assert self.store.load(self.parcel) == len(whole)

    @invariant()
    def the_folder_is_as_the_model(self) -> None:
        self.events.clear()
        found = self.store.entries()
        assert [(info.key, info.bytes) for info in reversed(found)] == [
            (name, size) for name, (_, size) in self.model.items()
        ]
        assert sum(info.bytes for info in found) <= self.LIMIT


TestAgainstAModel = PackMachine.TestCase
TestAgainstAModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


_TORCHS = {"subproc_worker_timer"}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No test here may leave a thread behind, of which one may be about to end."""
    before = set(threading.enumerate())
    yield
    # inductor's timer, which torch 2.14 starts some time after a test of another file has compiled, is not of these.
    begun = [thread for thread in threading.enumerate() if thread not in before and thread.name not in _TORCHS]
    for thread in begun:
        thread.join(5.0)
    assert not [thread for thread in begun if thread.is_alive()]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes with names are POSIX's")
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "folder", "link to itself"])
def test_an_export_replaces_nothing_but_a_file(tmp_path: Path, kind: str) -> None:
    """As root, a rename would put a file in the place of /dev/null."""
    store = PackStore(tmp_path / "packs", 1 << 20, b"shared")
    assert store.write(Pack("ab" * 16, {}))
    target, name = tmp_path / "node", tmp_path / "name"
    if kind == "folder":
        target.mkdir()
    elif kind == "device":
        try:
            os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("NO DEVICE WAS TRIED: only root can make one")
    elif kind != "link to itself":
        os.mkfifo(target)
    name.symlink_to({"link to itself": name, "link to a pipe": target}.get(kind, "nowhere"))
    given = name if kind.startswith("link") else target
    before = None if kind == "link to itself" else stat.S_IFMT(target.stat().st_mode)
    with pytest.raises(PackError, match="cannot be written"):
        store.export(None, given)
    assert before is None or stat.S_IFMT(target.stat().st_mode) == before
    assert name.is_symlink()


def test_an_export_through_a_link_leaves_the_link(tmp_path: Path) -> None:
    store = PackStore(tmp_path / "packs", 1 << 20, b"shared")
    assert store.write(Pack("ab" * 16, {}))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert store.export(None, tmp_path / "link") == 1
    assert (tmp_path / "link").is_symlink()
    assert store.load(tmp_path / "file") == 1
