"""`accelerate-tts pack`: list, export, load and clear the warm packs of this user. Never imports torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from rich.filesize import decimal

from accelerate_tts.cli.tables import table, wide_console
from accelerate_tts.errors import PackError, printable
from accelerate_tts.packs.store import pack_folder, pack_store
from accelerate_tts.settings import Settings


def show(as_json: bool) -> None:
    """Print the packs, the most recently used first.

    Raises:
        SettingsError: An environment variable has an invalid value.
    """
    settings = Settings.from_environment()
    entries = pack_store(settings).entries()
    if as_json:
        sys.stdout.write(json.dumps([asdict(entry) for entry in entries], indent=2) + "\n")
        return
    if entries:
        rows = [(entry.key[:12], decimal(entry.bytes), time_text(entry.used)) for entry in entries]
        wide_console().print(table([("pack", "size", "last used"), *rows], "Warm packs", {"size", "last used"}))
    total = decimal(sum(entry.bytes for entry in entries))
    _say(f"{_packs(len(entries))}, {total} of at most {settings.pack_limit_mb} MB, in {pack_folder(settings)}")


def export(file: Path) -> None:
    """Write every pack into one file.

    Raises:
        PackError: There is no pack, or the file cannot be written.
        SettingsError: An environment variable has an invalid value.
    """
    settings = Settings.from_environment()
    store = pack_store(settings)
    if not store.entries():
        raise PackError(f"there is no warm pack in {pack_folder(settings)}; load a model with @optimized_model first")
    count = store.export(None, file)
    _say(f"wrote {_packs(count)} to {file}")
    if settings.pack_key is None:
        _say("another machine takes the decisions; set ACCELERATE_TTS_PACK_KEY on both to ship compiled code too")


def load(file: Path) -> None:
    """Load the packs of an exported file.

    Raises:
        PackError: The file was not exported by `pack export`.
        SettingsError: An environment variable has an invalid value.
    """
    settings = Settings.from_environment()
    count = pack_store(settings).load(file)
    _say(f"took {_packs(count)} into {pack_folder(settings)}")


def clear() -> None:
    """Remove every pack. The secret that signs them stays.

    Raises:
        PackError: A pack cannot be removed.
        SettingsError: An environment variable has an invalid value.
    """
    settings = Settings.from_environment()
    count = pack_store(settings).clear()
    _say(f"removed {_packs(count)} from {pack_folder(settings)}")


def _say(text: str) -> None:
    wide_console().print(printable(text), soft_wrap=True)


def _packs(count: int) -> str:
    return f"{count} warm pack{'' if count == 1 else 's'}"


def time_text(used: float) -> str:
    """Return a file's time for people, or "?" if no calendar has it."""
    try:
        return datetime.fromtimestamp(used, tz=timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # a file's time may be out of range
        return "?"
