"""Progress of a command while a model is loaded and tuned: this library's events, and nothing of other libraries."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate_tts.errors import printable
from accelerate_tts.events import Event, FellBack, NotApplied, Trying, WarmupFailed, hooked

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.console import Console


@contextmanager
def shown_events(console: Console) -> Generator[None, None, None]:
    """Print the events of tuning as they come."""

    def show(event: Event) -> None:
        if isinstance(event, Trying):
            console.print(f"  {printable(event)}", style="dim")
        elif isinstance(event, (FellBack, NotApplied, WarmupFailed)):
            console.print(f"  {printable(event)}", style="yellow")

    with hooked(show):
        yield


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Silence the messages of other libraries; this library's events are shown by the hook."""
    import logging
    import warnings

    from torch._logging import set_logs  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]

    ours = logging.getLogger("accelerate_tts")
    level = ours.level
    with warnings.catch_warnings():
        try:
            warnings.filterwarnings("ignore", module="torch")
            ours.setLevel(logging.ERROR)
            set_logs(all=logging.ERROR)
            yield
        finally:
            ours.setLevel(level)
            set_logs()
