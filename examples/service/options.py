"""Options of the service: one dataclass, read from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

KNOWN = {
    "joe": "service.systems:joe",
    "mms-random": "service.systems:mms_random",
    "chatterbox-random": "service.systems:chatterbox_random",
    "chatterbox-few-layers": "service.systems:chatterbox_few_layers",
    "chatterbox": "service.systems:chatterbox",
}
"""Factories of systems, `module:function`, by the names of their models."""

PRECISIONS = ("exact", "balanced", "fast")


@dataclass(frozen=True)
class Options:
    """Options of the service.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        systems: Factories of the models, `module:function`, by name. The first model is the page's default.
        precisions: Precision levels that each model is loaded in. The first is the default of a request.
        plain: True switches accelerate_tts off, for a comparison.
        folder: Folder of the uploaded voices and their embeddings.
        at_once: Calls that the worker computes at the same time, each with random numbers of its own.
        most: Requests in the service at the same time: waiting, spoken or sent. A further one is answered with 429.
        characters: Longest text of a request.
        queue_seconds: Longest wait for a turn.
        request_seconds: Longest time of a request until its speech is complete.
        send_seconds: Longest time of a response, after which a client that does not read is cut off.
        hang_seconds: Time without a sign of life after which the worker is replaced. A sentence is spoken without one,
            so this is more than the longest takes.
        load_seconds: Longest time of loading, tuning and warm-up.
        ping_seconds: Interval of the pings to the worker.
        shutdown_seconds: Time that running responses have to end after SIGTERM.
        upload_bytes: Largest reference recording.
        upload_seconds: Shortest and longest reference recording.
        voices: Largest number of uploaded voices.
        traces: "" for none, "console" or "otlp": where OpenTelemetry spans go.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    systems: dict[str, str] | None = None
    precisions: tuple[str, ...] = ("exact",)
    plain: bool = False
    folder: Path = Path("service_data")
    at_once: int = 1
    most: int = 32
    characters: int = 4096
    queue_seconds: float = 60.0
    request_seconds: float = 120.0
    send_seconds: float = 600.0
    hang_seconds: float = 180.0
    load_seconds: float = 1800.0
    ping_seconds: float = 5.0
    shutdown_seconds: float = 30.0
    upload_bytes: int = 10 * 2**20
    upload_seconds: tuple[float, float] = (1.0, 30.0)
    voices: int = 1000
    traces: str = ""

    def for_worker(self) -> str:
        """Return the JSON text of the options that the worker needs."""
        known = asdict(replace(self, systems=self.systems or {"joe": KNOWN["joe"], "mms-random": KNOWN["mms-random"]}))
        return json.dumps(
            {name: known[name] for name in ("systems", "precisions", "at_once")}
            | {"folder": str(self.folder.absolute())}
        )


_HELP = {
    "at_once": "calls computed at the same time",
    "most": "requests in the service at the same time; further ones get 429",
    "folder": "folder of uploaded voices",
    "plain": "switch accelerate_tts off, for a comparison",
    "traces": "where OpenTelemetry spans go: console or otlp",
}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line. Each field of `Options` that is a single value is an option of its name."""
    parser = argparse.ArgumentParser(prog="python -m service", description="A speech service.")
    parser.add_argument(
        "--systems",
        default="joe,mms-random",
        help=f"models to serve, of {', '.join(KNOWN)}, or NAME=MODULE:FUNCTION; separated by commas",
    )
    parser.add_argument("--precisions", default="exact", help=f"of {', '.join(PRECISIONS)}; separated by commas")
    for field in fields(Options):
        default = field.default
        if isinstance(default, bool):
            parser.add_argument(_flag(field.name), action="store_true", help=_HELP.get(field.name))
        elif isinstance(default, (str, int, float, Path)):
            choices = ("", "console", "otlp") if field.name == "traces" else None
            parser.add_argument(
                _flag(field.name), type=type(default), default=default, choices=choices, help=_HELP.get(field.name)
            )
    given = vars(parser.parse_args(arguments))
    try:
        given["systems"] = dict(map(_system, given["systems"].split(",")))
        given["precisions"] = tuple(map(_precision, given["precisions"].split(",")))
        _positive(given)
    except ValueError as error:
        parser.error(str(error))
    return Options(**given)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _system(text: str) -> tuple[str, str]:
    name, _, factory = text.strip().partition("=")
    if not factory and name not in KNOWN:
        raise ValueError(f"--systems: {name!r} is none of {', '.join(KNOWN)}; give NAME=MODULE:FUNCTION for your own")
    return name, factory or KNOWN[name]


def _precision(text: str) -> str:
    if text.strip() not in PRECISIONS:
        raise ValueError(f"--precisions: {text!r} is none of {', '.join(PRECISIONS)}")
    return text.strip()


def _positive(given: dict[str, object]) -> None:
    for name, value in given.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "port" and not value > 0:
            raise ValueError(f"{_flag(name)} {value} must be above 0")
