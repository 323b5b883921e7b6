"""The worker process: loads the models, speaks, and reports. It ends when the service's side of its socket closes."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from accelerate_tts import add_hook, own_random
from accelerate_tts.errors import message_of, printable
from accelerate_tts.events import Event
from accelerate_tts.metrics import measurements
from service.wire import Message, pack, receive

logger = logging.getLogger("service.worker")


class Refused(ValueError):  # noqa: N818 - it is the caller's fault, and not one of this process
    """A request that a model cannot speak. The message is the answer."""

    def __init__(self, message: str, param: str = "input") -> None:
        super().__init__(message)
        self.param = param


class Left:
    """Flag that the caller of a request has left. It closes the stream of the sentence that is being spoken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._stream: Any = None

    def is_set(self) -> bool:
        """Return True if the caller has left."""
        return self._is_set

    def set(self) -> None:
        """Say that the caller has left, from any thread."""
        with self._lock:
            self._is_set, stream = True, self._stream
        if stream is not None:
            stream.close()

    def stops(self, stream: Any) -> Iterator[Any]:
        """Yield the pieces of a stream. It is closed as soon as the caller leaves.

        Args:
            stream: Its `close` may be called from any thread, also while another one waits for a piece.
        """
        with self._lock:
            self._stream = stream
        try:
            if not self._is_set:
                yield from stream
        finally:
            with self._lock:
                self._stream = None
            stream.close()


@dataclass(frozen=True)
class Utterance:
    """A request for speech.

    Attributes:
        text: The text, not empty.
        voice: Name of a built-in voice; "" if `reference` is given.
        reference: WAV file of the voice, 24 kHz mono, or `None`.
        speed: 1.0 is the model's own.
        streamed: True if each piece is sent as soon as it is there.
        left: Says that the caller has left.
    """

    text: str
    voice: str = ""
    reference: Path | None = None
    speed: float = 1.0
    streamed: bool = False
    left: Left = field(default_factory=Left)


@dataclass(frozen=True)
class Speaker:
    """A loaded model.

    Attributes:
        rate: Sampling rate in Hz.
        stream: Yields the speech of an utterance in pieces, `(samples,)`, fp32 in -1..1.
        voices: Names of the built-in voices, the default first.
        takes_references: True if it speaks with the voice of a recording.
        takes_speed: True if it speaks faster or slower.
        receipt: The accelerate_tts receipt, or `None`.
    """

    rate: int
    stream: Callable[[Utterance], Iterator[np.ndarray]]
    voices: tuple[str, ...]
    takes_references: bool = False
    takes_speed: bool = False
    receipt: Any = None


@dataclass
class _Task:
    message: Message
    left: Left = field(default_factory=Left)


class _Worker:
    def __init__(self, link: socket.socket, options: Message) -> None:
        self._link = link
        self._options = options
        self._sending = threading.Lock()
        self._speakers: dict[tuple[str, str], Speaker] = {}
        self._waiting: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._tasks: dict[int, _Task] = {}

    def run(self) -> None:
        add_hook(self._report)
        self._load()
        for number in range(self._options["at_once"]):
            threading.Thread(target=self._speak_all, name=f"speaker {number}", daemon=True).start()
        with self._link.makefile("rb") as file:
            while (message := receive(file)) is not None:
                self._take(message)

    def _load(self) -> None:
        models: Message = {}
        for name, factory in self._options["systems"].items():
            module, _, function = factory.partition(":")
            receipts = {}
            for precision in self._options["precisions"]:
                logger.info("loading %s, %s", name, precision)
                folder = Path(self._options["folder"])
                speaker = getattr(import_module(module), function)(precision, folder)
                self._speakers[name, precision] = speaker
                if speaker.receipt is not None:
                    receipts[precision] = {"text": str(speaker.receipt), "html": speaker.receipt.to_html()}
            models[name] = {
                "rate": speaker.rate, "voices": speaker.voices, "takes_references": speaker.takes_references,
                "takes_speed": speaker.takes_speed, "receipts": receipts,
            }  # fmt: skip
        self._send({"kind": "ready", "models": models})

    def _take(self, message: Message) -> None:
        if message["kind"] == "ping":
            self._send({"kind": "pong"})
        elif message["kind"] == "speak":
            task = self._tasks[message["id"]] = _Task(message)
            self._waiting.put(task)
        elif (task := self._tasks.get(message["id"])) is not None:  # otherwise it has just ended
            task.left.set()

    def _speak_all(self) -> None:
        while True:
            task = self._waiting.get()
            key = task.message["id"]
            try:
                self._speak(key, task)
                answer: Message = {"kind": "done"}
            except Refused as error:
                answer = {"kind": "refused", "message": printable(error), "param": error.param}
            except Exception as error:  # one request that fails must not end the worker
                logger.exception("a request failed")
                answer = {"kind": "failed", "message": printable(f"{type(error).__name__}: {message_of(error)}")}
            self._tasks.pop(key)
            self._send({"id": key, **answer})

    def _speak(self, key: int, task: _Task) -> None:
        if task.left.is_set():
            return
        self._send({"kind": "started", "id": key})
        message = task.message
        reference = Path(message["reference"]) if message["reference"] else None
        said = Utterance(message["text"], message["voice"], reference, message["speed"], message["streamed"], task.left)
        # A system without torch needs no seed. Others speak at the same time, and torch's generator is one for all.
        with own_random(message["seed"]) if "torch" in sys.modules else nullcontext():
            pieces = self._speakers[message["model"], message["precision"]].stream(said)
            try:
                for piece in pieces:
                    if task.left.is_set():
                        return
                    self._send({"kind": "sound", "id": key}, np.ascontiguousarray(piece, dtype=np.float32).tobytes())
            finally:
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()

    def _report(self, event: Event) -> None:
        self._send({"kind": "event", "measured": [
            {"name": m.name, "value": m.value, "labels": dict(m.labels), "kind": m.kind} for m in measurements(event)
        ]})  # fmt: skip

    def _send(self, message: Message, samples: bytes = b"") -> None:
        frame = pack(message, samples)
        with self._sending:
            try:
                self._link.sendall(frame)
            except OSError:  # the service is gone; nobody is left to speak for
                os._exit(0)


def main(arguments: list[str]) -> None:
    """Run the worker on the socket whose number is the first argument, with the options of the second."""
    # A terminal and a service manager signal all processes. This one ends when the service has no more use for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="worker %(levelname)s %(name)s: %(message)s")
    link = socket.socket(fileno=int(arguments[0]))
    _Worker(link, json.loads(arguments[1])).run()
    os._exit(0)  # threads that still compute are not waited for


if __name__ == "__main__":
    # Under its own name, so that `Refused` of a system is the class that is caught here.
    import_module("service.worker").main(sys.argv[1:])
