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
    standard = sys.stdout
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
            raise SystemExit(_PIPE_CLOSED)
        sys.stderr.write(f"error: standard output cannot be written: {stdout.error.strerror or stdout.error}\n")
        raise SystemExit(status or 2)
    raise SystemExit(status)


_PIPE_CLOSED = 141  # the status that a shell reports for a program ended by SIGPIPE: the reader has gone


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
