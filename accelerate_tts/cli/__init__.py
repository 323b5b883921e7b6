"""The command line: `accelerate-tts demo | tune | doctor | bench | receipt | pack`.

Needs the `cli` extra; `--help` never imports torch.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Run the `accelerate-tts` script."""
    try:
        from accelerate_tts.cli.app import app
    except ImportError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.stderr.write(f"accelerate-tts needs {error.name}: pip install 'accelerate_tts[cli]'\n")
        raise SystemExit(2) from None
    _open_closed()
    standard, errors = sys.stdout, sys.stderr
    # Progress and complaints that cannot be told must not cost the work that they are about.
    complaints: Any = _Stderr(errors if errors is not None else io.StringIO())
    sys.stderr = complaints
    if isinstance(standard, io.TextIOWrapper) and standard.errors == "strict":
        # A pipe on Windows, or a terminal in another locale than UTF-8, does not have the characters of every name.
        standard.reconfigure(errors="backslashreplace")
    # There is none if it was closed before Python started; the output is then discarded.
    stdout: Any = _Stdout(standard if standard is not None else io.StringIO())
    sys.stdout = stdout
    status: Any = 0
    try:
        app()
    except SystemExit as error:
        status = error.code
    except OSError as error:
        if error is not stdout.error:
            raise
    finally:
        stdout.flush_at_end()
        sys.stdout = standard
    if stdout.error is not None:
        # Python would try to write the rest at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(stdout.error, BrokenPipeError):
            complaints.leave()
            raise SystemExit(_PIPE_CLOSED)
        why = stdout.error.strerror or stdout.error
        complaints.write(f"error: standard output cannot be written: {why}\n")
        status = status or 2
    complaints.leave()
    sys.stderr = errors
    raise SystemExit(status)


_PIPE_CLOSED = 141  # the status that a shell reports for a program ended by SIGPIPE: the reader has gone


def _open_closed() -> None:
    """Open the null device in place of standard streams that are closed.

    The next file that is opened would get their numbers, and what other code (OpenMP, a driver) writes to them by
    number would land in it: in a pack, or in the speech.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


class _Stderr:
    """Standard error whose own errors are nobody's: there is no place left to tell them."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            self._file.write(text)
        except OSError:
            self._failed = True
        return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._failed = True

    def leave(self) -> None:
        """Point the stream to the null device if it failed: Python writes the rest at exit, with status 120 then."""
        self.flush()
        if self._failed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class _Stdout:
    """Standard output that stores its error, to tell a full disk or a closed pipe from other errors."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return int(self._file.write(text))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    def flush_at_end(self) -> None:
        """Flush, and store an error instead of raising it."""
        with suppress(OSError):
            self.flush()
