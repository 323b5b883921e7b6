"""Frames between the service and its worker: a JSON message, and samples behind it."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

Message = dict[str, Any]

_HEAD = struct.Struct("!II")  # bytes of the message, bytes of the samples


def pack(message: Message, samples: bytes = b"") -> bytes:
    """Return a frame. The JSON text is ASCII, so any text can be sent, lone surrogates too."""
    text = json.dumps(message).encode("ascii")
    return _HEAD.pack(len(text), len(samples)) + text + samples


async def read(reader: asyncio.StreamReader) -> tuple[Message, bytes]:
    """Read a frame.

    Raises:
        asyncio.IncompleteReadError: The other side has ended.
    """
    text, samples = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    return json.loads(await reader.readexactly(text)), await reader.readexactly(samples)


def receive(file: BinaryIO) -> Message | None:
    """Read a frame without samples from a blocking file, or return `None` when the other side has ended."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    text = file.read(_HEAD.unpack(head)[0])
    return json.loads(text) if text else None
