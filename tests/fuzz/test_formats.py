"""Files that somebody else may have written, and the environment, as a hostile writer would make them from good ones.

Reading them raises nothing but what is documented, takes no more memory than is stated, and leaves nothing elsewhere.
The tests beside each module make up files from nothing; here good ones are damaged, and given right checksums and,
where that is the point, right signatures, so that the damage gets past them. `make fuzz` runs the same for long.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerate_tts import Settings
from accelerate_tts.environment import VARIABLES
from accelerate_tts.errors import PackError, SettingsError
from accelerate_tts.packs import compiler_cache
from accelerate_tts.packs import format as pack_format
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore
from accelerate_tts.receipts.receipt import Receipt, StageResult
from accelerate_tts.voices.disk import EmbeddingFiles
from accelerate_tts.voices.memory import StoredEmbedding

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "80")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
KEY, SECRET = "0123456789abcdef", b"shared"
LIMIT = 1 << 20
SLACK = 8 << 20  # of whatever else is done for the first time meanwhile: a module imported, a long traceback
NUMBERS = (b"-1", b"0", b"2", b"4294967296", b"9223372036854775808", b"1e999", b"9" * 5000, b"NaN", b"0.5")
OPENED = [b"[" * 3000, b'{"a":' * 3000, b"null", b'""', b"\x00", b"\xff", b"\\ud800", b"\x1b]0;x\x07", b"true", b"{}"]


@st.composite
def damaged(draw: st.DrawFn, content: bytes, start: int = 0) -> bytes:
    """A file with bytes exchanged, cut out, doubled, put in from elsewhere, and numbers that are others."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(start, max(start, len(made))))
        end = place + draw(st.integers(0, 24))
        how = draw(st.sampled_from(["exchange", "cut", "double", "put", "number", "end"]))
        if how == "exchange":
            made[place:end] = draw(st.binary(min_size=1, max_size=8))
        elif how == "cut":
            del made[place:end]
        elif how == "double":
            made[end:end] = made[place:end] * draw(st.sampled_from([1, 100]))
        elif how == "put":
            made[place:place] = draw(st.sampled_from(OPENED))
        elif how == "end":
            del made[place:]
        else:
            spots = [spot for spot in range(start, len(made)) if chr(made[spot]).isdigit()]
            if spots:
                spot = draw(st.sampled_from(spots))
                made[spot : spot + 1] = draw(st.sampled_from(NUMBERS))
    return bytes(made)


@contextmanager
def at_most(bytes_: int) -> Iterator[None]:
    """Fail if the block allocates more than so many bytes at a time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= bytes_, f"it took {peak} bytes, and may take {bytes_}"


RECEIPT = Receipt(
    "Model", "cpu (a processor)", {"torch": "2"},
    (StageResult("net", "fold weight norm", True, "at least 1.2x", 1.0, 0.5, 2.0, 1.2, 0.0, 1, 0.1, 0.2, 0.3),),
    cold=1.0, before=1.0, after=0.5, ratio=2.0, error=1e-7, notes=("a note",),
)  # fmt: skip


# --- warm packs -----------------------------------------------------------------------------------------------------


def pack_file(folder: Path) -> Path:
    return folder / f"{KEY}.pack"


def a_pack() -> bytes:
    decisions = {
        "format": 2, "tune_seconds": 1.5, "receipt": RECEIPT.to_json(),
        "kept": [{"part": "net", "kind": "other", "decides": False, "root": 0, "path": "net", "stage": "few"}],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        assert PackStore(Path(place), LIMIT, SECRET).write(Pack(KEY, decisions, b"code" * 8))
        return pack_file(Path(place)).read_bytes()


A_PACK = a_pack()


@fuzzed
@given(content=damaged(A_PACK[:-32]), signed=st.booleans())
def test_a_damaged_pack_is_read_or_ignored(content: bytes, *, signed: bool) -> None:
    content += pack_format.mac(SECRET, content) if signed else bytes(32)
    with tempfile.TemporaryDirectory() as place:
        pack_file(Path(place)).write_bytes(content)
        with at_most(SLACK + 32 * len(content)):
            pack = PackStore(Path(place), LIMIT, SECRET).read(KEY)
        assert pack is None or signed or pack.artifacts is None


@fuzzed
@given(text=damaged(b'{"a": [1, 2.5, {"b": null}], "c": "text"}'), artifacts=st.none() | st.binary(max_size=9))
def test_a_pack_of_any_decisions_with_right_checksums_is_read_or_ignored(text: bytes, artifacts: bytes | None) -> None:
    with tempfile.TemporaryDirectory() as place:
        pack_file(Path(place)).write_bytes(b"".join(pack_format.sealed(KEY, text, artifacts, None)))
        with at_most(SLACK + 64 * len(text)):
            pack = PackStore(Path(place), LIMIT, SECRET).read(KEY)
        assert pack is None or pack.artifacts is None


def test_decisions_that_would_take_much_memory_are_refused_unread() -> None:
    text = b'{"a": [' + b"[]," * (pack_format.MOST_DECISIONS // 3) + b"[]]}"
    with tempfile.TemporaryDirectory() as place:
        pack_file(Path(place)).write_bytes(b"".join(pack_format.sealed(KEY, text, None, SECRET)))
        with at_most(2 * len(text) + LIMIT):
            assert PackStore(Path(place), 100 * LIMIT, SECRET).read(KEY) is None
        with pytest.raises(PackError, match="may take"):
            PackStore(Path(place), 100 * LIMIT, SECRET).write(Pack(KEY, {"a": "x" * pack_format.MOST_DECISIONS}))


def an_export() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        store = PackStore(Path(place) / "packs", LIMIT, SECRET)
        store.write(Pack(KEY, {"a": 1}, b"code"))
        store.write(Pack(KEY[::-1], {"a": 2}))
        store.export(None, Path(place) / "out")
        return (Path(place) / "out").read_bytes()


@fuzzed
@given(content=damaged(an_export()))
def test_a_damaged_export_is_loaded_in_part_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "out"
        path.write_bytes(content)
        store = PackStore(Path(place) / "packs", LIMIT, SECRET)
        with at_most(2 * LIMIT):
            try:
                store.load(path)
            except PackError:
                return
        assert all(store.read(info.key) is not None for info in store.entries())
        assert {item.name for item in Path(place).iterdir()} <= {"out", "packs"}


# --- the compiler's files -------------------------------------------------------------------------------------------


def a_tar(kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in (("ab/cd.cpp", b"int main() {}"), ("ef/" + "x" * 120 + ".so", bytes(600))):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.pax_headers = {"comment": "1"} if kind == tarfile.PAX_FORMAT else {}
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def with_right_checksums(content: bytes) -> bytes:
    """Each block that looks like a header gets the checksum that a reader wants."""
    made = bytearray(content)
    for start in range(0, len(made) - 511, 512):
        block = made[start : start + 512]
        if b"ustar" in block:
            block[148:156] = b" " * 8
            made[start + 148 : start + 156] = b"%06o\x00 " % sum(block)
    return bytes(made)


def unpacked(archive: bytes, most: int = LIMIT) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(place) / "a" / "cache"))
        (Path(place) / "a").mkdir()
        (Path(place) / "b").write_bytes(b"kept")
        with at_most(4 * most), suppress(ValueError, OSError):
            compiler_cache.unpack(archive, most)
        assert {str(path.relative_to(place)) for path in Path(place).glob("*")} == {"a", "b"}
        assert [path.name for path in (Path(place) / "a").iterdir()] in ([], ["cache"])
        assert (Path(place) / "b").read_bytes() == b"kept"
        assert all(path.is_dir() or path.stat().st_size <= most for path in Path(place).rglob("*"))


@fuzzed
@given(
    tar=damaged(a_tar()[:3000]) | damaged(a_tar(tarfile.PAX_FORMAT)[:4000]),
    checked=st.booleans(),
    damage=st.data(),
)
def test_a_damaged_archive_of_compiled_code_stays_in_its_folder(
    tar: bytes, damage: st.DataObject, *, checked: bool
) -> None:
    archive = gzip.compress(with_right_checksums(tar) if checked else tar, 1)
    unpacked(damage.draw(damaged(archive)) if damage.draw(st.integers(0, 3)) == 0 else archive)


@pytest.mark.parametrize("kind", ["a large file", "many files", "a large header", "a sparse file", "a chain of names"])
def test_an_archive_that_unpacks_to_more_than_it_may_is_refused(kind: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            entry = tarfile.TarInfo(f"ab/{number}")
            if kind == "many files":
                entry.size = LIMIT // 2
            elif kind == "a large file":
                entry.size = 40 * LIMIT
            elif kind == "a large header":
                entry.pax_headers = {"comment": "x" * (40 * LIMIT)}
            elif kind == "a sparse file":
                entry.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "ab/s"}
                entry.pax_headers |= {"GNU.sparse.size": str(100 * LIMIT), "GNU.sparse.map": f"{100 * LIMIT},0"}
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    tar = buffer.getvalue()
    if kind == "a chain of names":
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2
        tar = (long.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 1000 + tar
    unpacked(gzip.compress(tar, 1))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", place)
        with pytest.raises((ValueError, OSError), match="compiled code"):
            compiler_cache.unpack(gzip.compress(tar, 1), LIMIT)


# --- embeddings -----------------------------------------------------------------------------------------------------


def an_embedding() -> tuple[bytes, bytes]:
    """The first line, and what lies behind the checksum."""
    value = {"a": torch.arange(6.0).view(2, 3), "b": [1, 2.5, None, "text", (True, b"bytes")], 3: torch.zeros(0)}
    with tempfile.TemporaryDirectory() as place:
        assert EmbeddingFiles(Path(place), LIMIT).write(KEY, StoredEmbedding(value))
        (path,) = Path(place).iterdir()
        magic, _, rest = path.read_bytes().split(b"\n", 2)
        return magic + b"\n", rest


MAGIC, REST = an_embedding()


@fuzzed
@given(rest=damaged(REST), right=st.booleans())
def test_a_damaged_embedding_is_read_or_ignored(rest: bytes, *, right: bool) -> None:
    digest = hashlib.sha256(KEY.encode() + rest if right else rest).hexdigest().encode()
    with tempfile.TemporaryDirectory() as place:
        files = EmbeddingFiles(Path(place), LIMIT)
        assert files.write(KEY, StoredEmbedding(0))
        (path,) = Path(place).iterdir()
        path.write_bytes(MAGIC + digest + b"\n" + rest)
        with at_most(3 * LIMIT):
            kept = files.read(KEY)
        assert kept is None or right


# --- receipts -------------------------------------------------------------------------------------------------------


@fuzzed
@given(content=damaged(RECEIPT.to_json().encode()))
def test_a_damaged_receipt_is_shown_or_refused(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    with at_most(SLACK + 64 * len(text)):
        try:
            receipt = Receipt.from_json(text)
        except ValueError:
            return
        shown = str(receipt)
        page = receipt.to_html()
    assert all(character.isprintable() or character == "\n" for character in shown)
    page.encode()
    assert Receipt.from_json(receipt.to_json()) == receipt


# --- the environment ------------------------------------------------------------------------------------------------

GOOD = ["1", "on", "auto", "exact", "60.5", "reload", "default", "cuda:0", "folder/x", "off", "none", "8"]


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from(sorted(VARIABLES)) | st.text(max_size=5).map(lambda name: f"ACCELERATE_TTS_{name}"),
        st.sampled_from(GOOD)
        .flatmap(lambda text: damaged(text.encode()))
        .map(lambda text: text.decode("utf-8", "surrogateescape")),
        max_size=3,
    )
)
def test_a_damaged_environment_gives_settings_or_an_error_of_ours(environment: dict[str, str]) -> None:
    with at_most(SLACK):
        try:
            Settings.from_environment(environment)
        except SettingsError:
            return
