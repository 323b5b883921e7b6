"""The page of a tuned backend: both sounds, drawn beside each other, and the receipt. One file without a script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from accelerate_tts.cli.tune.sound import draw
from accelerate_tts.receipts.html import content_of, templates

if TYPE_CHECKING:
    from accelerate_tts.cli.tune.command import Result


def to_html(result: Result) -> str:
    """Render a result as an HTML5 page that loads nothing.

    Args:
        result: The measurements. Its texts are not trusted.

    Returns:
        The page's text, to be written as UTF-8.
    """
    sounds = [] if result.before is None or result.after is None else draw([result.before, result.after])
    # What was drawn is digits and letters of our own. Escaping megabytes of it would take seconds.
    safe = [{field: Markup(getattr(one, field)) for field in ("wav", "wave", "spectrogram")} for one in sounds]  # noqa: S704
    drawn = [(kind, one, texts) for kind, one, texts in zip(("untouched", "tuned"), sounds, safe, strict=False)]
    header, *rows = result.rows()
    return templates(Path(__file__).parent).get_template("tune.html.j2").render(
        content_of(result.receipt),
        result=result,
        sounds=drawn,
        header=header,
        rows=rows,
    )  # fmt: skip
