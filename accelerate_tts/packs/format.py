"""File format of warm packs: writing, signing, checking and reading.

Artifacts run as code once they are loaded, so they are returned only with a valid HMAC-SHA256. Decisions are plain JSON
and harmless, so a valid checksum is enough. Nothing is pickled. The file has a line with the format version, and a line
of JSON with the key, and with size and SHA-256 of the decisions and the artifacts. These two follow, and then 32 bytes
of HMAC over everything before; zeros for an unsigned pack.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate_tts.receipts.format import json_number
from accelerate_tts.storage.files import BadFileError

MAGIC = b"accelerate-tts pack 1\n"
LINE_LIMIT = 1024
"""Maximum bytes of a line; the longest key, two sizes and two digests are below 400."""

MOST_DECISIONS = 4 << 20
"""Maximum bytes of the decisions' JSON. Other users may have written it, and JSON can take thirty times its length in
memory. A tuning of a hundred parts takes a fifth of a megabyte."""

_UNSIGNED = bytes(32)


@dataclass(frozen=True)
class Pack:
    """A warm pack.

    Attributes:
        key: Hex digest of model structure, weights, torch, device and options.
        decisions: The kept changes and their figures, serialisable as JSON, with texts as keys.
        artifacts: The compiler's artifacts, opaque; `None` if there are none, or none that can be trusted.
    """

    key: str
    decisions: Mapping[str, Any]
    artifacts: bytes | None = field(default=None, repr=False)


def sealed(key: str, text: bytes, artifacts: bytes | None, secret: bytes | None) -> tuple[bytes, bytes]:
    """Return a pack's file and its signature; unsigned without a secret."""
    header: dict[str, Any] = {"key": key}
    for name, section in (("decisions", text), ("artifacts", artifacts)):
        header[name] = None if section is None else [len(section), hashlib.sha256(section).hexdigest()]
    body = b"".join([MAGIC, json.dumps(header).encode(), b"\n", text, artifacts or b""])
    return body, _UNSIGNED if secret is None else mac(secret, body)


def mac(secret: bytes, body: bytes | memoryview) -> bytes:
    """Return the signature of a file's bytes."""
    return hmac.new(secret, body, hashlib.sha256).digest()


def unpack(content: bytes, key: str, secret: bytes | None) -> tuple[Pack, bool, bytes]:
    """Check and read a pack's file.

    Returns:
        The pack, True if it is signed with `secret`, and the text of the decisions.

    Raises:
        BadFileError: The file is damaged, for another key, or of another format version.
    """
    if not content.startswith(MAGIC):
        raise BadFileError("it is no warm pack, or one of another format version")
    end = content.find(b"\n", len(MAGIC), len(MAGIC) + LINE_LIMIT)
    body = len(content) - len(_UNSIGNED)
    if not 0 <= end < body:
        raise BadFileError("it has no header: it is damaged or cut short")
    header = _from_json(content[len(MAGIC) : end])
    if header.get("key") != key:
        raise BadFileError("it is for another key")
    view, start = memoryview(content), end + 1
    sections: list[bytes] = []
    for name in ("decisions", "artifacts"):
        match header.get(name):
            case None if name == "artifacts":
                pass
            case [int(size), _] if name == "decisions" and size > MOST_DECISIONS:
                raise BadFileError(f"its decisions take {size} bytes, and may take {MOST_DECISIONS}")
            case [int(size), str(digest)] if 0 <= size <= body - start:
                sections.append(bytes(view[start : start + size]))
                start += size
                if hashlib.sha256(sections[-1]).hexdigest() != digest:
                    raise BadFileError(f"the checksum of its {name} is wrong: it is damaged")
            case _:
                raise BadFileError("its header claims what the file does not hold: it is damaged or cut short")
    if start != body:
        raise BadFileError("it is longer than its header claims: it is damaged")
    authentic = secret is not None and hmac.compare_digest(mac(secret, view[:body]), view[body:])
    text, *artifacts = sections
    return Pack(key, _from_json(text), artifacts[0] if authentic and artifacts else None), authentic, text


def _from_json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode(), parse_constant=json_number, parse_float=json_number)
    except (ValueError, OverflowError, RecursionError) as error:
        raise BadFileError(f"its JSON cannot be read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise BadFileError("its JSON is no object")
    return content
