"""The command line: `accelerate-tts doctor | demo | receipt | pack`.

Needs the `cli` extra; `--help` never imports torch.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point of the `accelerate-tts` script."""
    try:
        from accelerate_tts.cli.app import app
    except ImportError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.stderr.write(f"accelerate-tts needs {error.name}: pip install 'accelerate_tts[cli]'\n")
        raise SystemExit(2) from None
    app()
