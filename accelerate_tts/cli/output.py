"""Files that commands write, checked before minutes of work."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate_tts.errors import AccelerateTTSError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


class OutputError(AccelerateTTSError, OSError):
    """The output file cannot be written."""


def check_writable(path: Path) -> None:
    """Raise `OutputError` unless `path` can be written. An existing file is not changed."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}; make it first")
    existed = path.exists()
    if existed and not (path.is_file() or path.is_char_device()):  # opening a pipe would block
        raise OutputError(f"{path} is no regular file; name a file")
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()


class Files:
    """Files that a command writes after minutes of work.

    One that cannot be written stops neither the others nor what is printed: `check` raises at the end.
    """

    def __init__(self) -> None:
        self._faults: list[str] = []

    @contextmanager
    def writing(self, path: Path) -> Generator[None, None, None]:
        """Store an error of the block, which writes a file."""
        try:
            yield
        except OutputError as error:
            self._faults.append(str(error))
        except OSError as error:
            self._faults.append(f"{path} cannot be written: {error.strerror or error}")

    def check(self) -> None:
        """Raise `OutputError` if a file could not be written."""
        if self._faults:
            raise OutputError("; ".join(self._faults))
