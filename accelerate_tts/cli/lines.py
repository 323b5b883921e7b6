"""Lines on standard output that need no library: an interpreter without the command line's extra runs the bench too."""

from __future__ import annotations

import sys

from accelerate_tts.errors import printable


def cleaned(line: str) -> str:
    """Return a line without control characters. Its spaces stay, since tables are laid out with them."""
    return "".join(printable(c) or " " for c in line)


def say(line: str) -> None:
    """Write a line to standard output, flushed at once, also into a file, since tuning takes minutes."""
    sys.stdout.write(f"{cleaned(line)}\n")
    sys.stdout.flush()
