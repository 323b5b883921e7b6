"""`accelerate-tts pack` lists, ships and clears warm packs, or says why it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal
from typer.testing import CliRunner

from accelerate_tts import Event
from accelerate_tts.cli import pack
from accelerate_tts.cli.app import app
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore

KEYS = [f"{number:x}" * 64 for number in (1, 2, 3)]
LIMIT = 1 << 24


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of packs, which does not exist yet."""
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "packs"))
    return tmp_path / "packs"


@pytest.fixture
def filled(folder: Path) -> Path:
    """Three packs; the third was used last."""
    store = PackStore(folder, LIMIT)
    for number, key in enumerate(KEYS):
        assert store.write(Pack(key, {"number": number}, b"code" * 1000 * number))
        os.utime(folder / f"{key}.pack", (1_700_000_000 + number, 1_700_000_000 + number))
    return folder


def invoke(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["pack", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


# --- list ----------------------------------------------------------------------------------------------------------


def test_the_list(filled: Path) -> None:
    result = invoke("list")
    lines = [line.split() for line in result.stdout.splitlines()]
    shown = [line for line in lines if line and len(line[0]) == 12 and set(line[0]) <= set("123")]
    assert [line[0] for line in shown] == [key[:12] for key in reversed(KEYS)]
    assert shown[0][1:3] == ["8.3", "kB"]  # 8000 bytes of code, and what is said about them
    assert all(line[3].startswith("2023-11-1") for line in shown)
    total = decimal(sum(path.stat().st_size for path in filled.glob("*.pack")))
    assert " ".join(lines[-1]) == f"3 warm packs, {total} of at most 2048 MB, in {filled}"
    assert result.stderr == ""


def test_the_list_as_json(filled: Path) -> None:
    found = json.loads(invoke("list", "--json").stdout)
    assert [entry["key"] for entry in found] == KEYS[::-1]
    assert found[0]["used"] == 1_700_000_002
    assert found[0]["bytes"] == (filled / f"{KEYS[2]}.pack").stat().st_size


def test_an_empty_list(folder: Path) -> None:
    assert invoke("list").stdout == f"0 warm packs, 0 bytes of at most 2048 MB, in {folder}\n"
    assert json.loads(invoke("list", "--json").stdout) == []
    assert not folder.exists()


@pytest.mark.parametrize("used", [1e18, -1e18, float("inf")])
def test_a_time_that_no_calendar_has(used: float) -> None:
    assert pack.time_text(used) == "?"


# --- export and load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_shipping(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Event], shared: bool
) -> None:
    if shared:
        monkeypatch.setenv("ACCELERATE_TTS_PACK_KEY", "shared")
        store = PackStore(filled, LIMIT, b"shared")
        for number, key in enumerate(KEYS):
            store.write(Pack(key, {"number": number}, b"code" * 1000 * number))
    parcel = tmp_path / "packs.bin"
    result = invoke("export", parcel)
    assert result.stdout.splitlines()[0] == f"wrote 3 warm packs to {parcel}"
    assert ("ACCELERATE_TTS_PACK_KEY" in result.stdout) is not shared
    other = tmp_path / "other"
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(other))
    assert seen == []
    assert invoke("load", parcel).stdout == f"took 3 warm packs into {other}\n"
    found = PackStore(other, LIMIT, b"shared").read(KEYS[2])
    assert found is not None
    assert found.decisions == {"number": 2}
    assert found.artifacts == (b"code" * 2000 if shared else None)
    # Of the three, every one's code was left behind, and once more when it was read just now.
    assert ["compiled code" in str(event) for event in seen] == ([] if shared else [True] * 4)


def test_one_pack_is_no_packs(folder: Path, tmp_path: Path) -> None:
    PackStore(folder, LIMIT).write(Pack(KEYS[0], {}))
    assert invoke("export", tmp_path / "x").stdout.startswith("wrote 1 warm pack to ")
    assert invoke("clear").stdout == f"removed 1 warm pack from {folder}\n"


def test_nothing_to_export(folder: Path, tmp_path: Path) -> None:
    result = invoke("export", tmp_path / "x", code=2)
    assert result.stderr.startswith(f"error: there is no warm pack in {folder}; load a model with @optimized_model")
    assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written(filled: Path, tmp_path: Path) -> None:
    result = invoke("export", tmp_path / "absent" / "x", code=2)
    assert result.stderr.startswith(f"error: {tmp_path / 'absent' / 'x'} cannot be written")


@pytest.mark.parametrize("content", [None, b"", b"no export", b"accelerate-tts pack 1\n"])
def test_what_is_no_export(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    result = invoke("load", tmp_path / "x", code=2)
    assert result.stderr.startswith(f"error: {tmp_path / 'x'} ")
    assert result.stdout == ""
    assert not folder.exists()


# --- clear ---------------------------------------------------------------------------------------------------------


def test_clearing_leaves_the_secret_and_what_is_not_ours(filled: Path) -> None:
    (filled / "notes.pack").write_text("mine")
    secret = (filled / "secret").read_bytes()
    assert invoke("clear").stdout == f"removed 3 warm packs from {filled}\n"
    assert sorted(path.name for path in filled.iterdir()) == ["notes.pack", "secret"]
    assert (filled / "secret").read_bytes() == secret
    assert invoke("clear").stdout == f"removed 0 warm packs from {filled}\n"


def test_clearing_what_cannot_be_removed(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert invoke("clear", code=2).stderr.startswith(f"error: the warm packs in {filled} cannot be removed")


def test_clearing_a_folder_that_is_a_file(folder: Path) -> None:
    folder.touch()
    assert "cannot be removed" in invoke("clear", code=2).stderr
    assert folder.exists()


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["list"], ["export", "x"], ["load", "x"], ["clear"]], ids=lambda a: a[0])
def test_a_variable_that_means_nothing_is_named(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PACK_LIMIT_MB", "much")
    assert invoke(*arguments, code=2).stderr.startswith("error: ACCELERATE_TTS_PACK_LIMIT_MB='much'")


@pytest.mark.parametrize("arguments", [["turbo"], ["export"], ["load", "a", "b"]])
def test_usage(arguments: list[str]) -> None:
    assert "Usage" in invoke(*arguments, code=2).output


PROBE = """
import sys
from accelerate_tts.cli import main
for words in (["list"], ["list", "--json"], ["export", "x.bin"], ["load", "x.bin"], ["clear"], ["--help"]):
    sys.argv = ["accelerate-tts", "pack", *words]
    try:
        main()
    except SystemExit as error:
        assert not error.code, words
print(sorted({"torch", "numpy"} & set(sys.modules)))
"""


def test_no_command_imports_torch(filled: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "x.bin").exists()
