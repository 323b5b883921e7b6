"""The folder in which torch.compile keeps its code, and a check that it can be written."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return the compiler's folder, as inductor names it (torch 2.6 to 2.14).

    inductor itself is not imported, which takes two seconds.

    Raises:
        FileNotFoundError: `TORCHINDUCTOR_CACHE_DIR` is not set, and no temporary folder can be written.
    """
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if own:
        return Path(own)
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user without a name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def _temporary_folders() -> list[str]:
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return [*filter(None, named), "/tmp", "/var/tmp", "/usr/tmp", os.curdir]  # noqa: S108 - as Python's tempfile


def unwritable_folder() -> str | None:
    """Return the reason why inductor cannot be imported or used here, since it has nowhere to write; else `None`.

    inductor (torch 2.14) asks for the temporary folder when it is imported, also if its own folder is another one. An
    import that fails half-way leaves modules behind that fail with an unrelated error from then on.
    """
    try:
        if not any(os.access(place, os.W_OK | os.X_OK) for place in _temporary_folders()):
            tempfile.gettempdir()  # writes a file to try each, so it is asked only if none seems to do
        folder = cache_folder()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except FileNotFoundError as error:
        return f"{error.strerror}: set TMPDIR to a folder that can be written"
    except OSError as error:
        return f"{error}: set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    if os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"its folder {folder} cannot be written: set TORCHINDUCTOR_CACHE_DIR, or TMPDIR, to one that can"
