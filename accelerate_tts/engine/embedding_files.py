"""Embeddings on disk, for the next process: tensors, arrays and plain values, in files that nothing is executed from.

A file is a line with the format version, a line with the SHA-256 of its key and the rest, and what `torch.save` makes
of nested lists that `torch.load(weights_only=True)` takes. Dataclasses of packages that the caller names are written
field by field, and made again without a call of anything of theirs. Other values would need a pickle that runs code, so
they are not written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate_tts.engine.embedding_store import Kept
from accelerate_tts.engine.safe_files import regular, temporary, touch
from accelerate_tts.events import PackIgnored, emit

__all__ = ["EmbeddingFiles"]

_MAGIC = b"accelerate-tts embedding 2\n"
_SUFFIX = ".embedding"
_KEY = re.compile(r"[0-9a-f]{16,128}")
_PLAIN = (type(None), bool, int, float, str, bytes)


class EmbeddingFiles:
    """A folder of embeddings, readable by its owner only; shared by any number of threads and processes.

    What cannot be read or written costs an event and never an exception.

    Args:
        folder: Made at the first write, with mode 0700; its files have mode 0600.
        limit_bytes: What all files together may take; the least recently used go first.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes

    def read(self, key: str, packages: Collection[str] = ()) -> Kept | None:
        """The embedding of this key; `None` if there is none, or none that is whole.

        Args:
            key: As it was written under.
            packages: The packages whose dataclasses may be in it, if they are imported already.
        """
        path = self._folder / f"{key}{_SUFFIX}"
        try:
            with regular(path) as file:
                content = file.read(self._limit + 1)
            value = _unpacked(key, content, packages)
        except FileNotFoundError:
            return None
        except Exception as error:  # damaged in a way that torch.load answers with any exception
            emit(PackIgnored(f"embedding {key[:12]}", f"{type(error).__name__}: {error}"))
            return None
        touch(path, self._last_use())
        return Kept(value)

    def write(self, key: str, kept: Kept, packages: Collection[str] = ()) -> bool:
        """Write an embedding, in place of an older one of its key; returns whether it is there.

        Args:
            key: Its name, of hexadecimal digits.
            kept: The embedding.
            packages: The packages whose dataclasses may be in it.

        Raises:
            TypeError, ValueError: It holds something else than tensors, arrays, plain values, lists, tuples, dicts and
                such dataclasses.
        """
        content = _packed(key, kept.copy(), packages)
        if len(content) > self._limit:
            return False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with temporary(self._folder, [content]) as made:
                touch(made, self._last_use())
                made.replace(self._folder / f"{key}{_SUFFIX}")
            self._tidy()
        except OSError as error:
            emit(PackIgnored(f"the folder of embeddings {self._folder}", str(error)))
            return False
        return True

    def _last_use(self) -> int:
        try:
            return max((used for used, _, _ in self._scan()), default=0)
        except OSError:  # it is the order of eviction that suffers
            return 0

    def _scan(self) -> list[tuple[int, int, Path]]:
        found: list[tuple[int, int, Path]] = []
        for path in self._folder.iterdir():
            if path.suffix == _SUFFIX and _KEY.fullmatch(path.stem):
                with suppress(FileNotFoundError):  # another process evicts too
                    about = path.lstat()
                    found.append((about.st_mtime_ns, about.st_size, path))
        return sorted(found)

    def _tidy(self) -> None:
        found = self._scan()
        excess = sum(size for _, size, _ in found) - self._limit
        for _, size, path in found:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _packed(key: str, value: Any, packages: Collection[str]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(_said(value, packages), buffer)
    body = buffer.getvalue()
    return b"%s%s\n%s" % (_MAGIC, hashlib.sha256(key.encode() + body).hexdigest().encode(), body)


def _unpacked(key: str, content: bytes, packages: Collection[str]) -> Any:
    import torch

    if not content.startswith(_MAGIC):
        raise ValueError("it is no embedding, or one of another format version")
    digest, _, body = content[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(key.encode() + body).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong: it is damaged or cut short")
    with torch.inference_mode(mode=False):
        return _meant(torch.load(io.BytesIO(body), weights_only=True), packages)


def _said(value: Any, packages: Collection[str]) -> list[Any]:
    """A value as nested lists that begin with a word for its kind."""
    import torch

    kind = type(value)
    if kind in _PLAIN:
        return ["plain", value]
    if kind is torch.Tensor:
        return ["tensor", value]
    if kind in {list, tuple}:
        return [kind.__name__, *(_said(item, packages) for item in value)]
    if kind is dict:
        return ["dict", *([_said(key, packages), _said(item, packages)] for key, item in value.items())]
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray:
        return ["array", torch.from_numpy(value)]  # a TypeError of its own for dtypes that torch does not know
    where = (kind.__module__, kind.__qualname__)
    if _dataclass(*where, packages) is kind:
        held: dict[str, Any] = getattr(value, "__dict__", {})  # none with slots
        if held.keys() == _fields(kind):
            return ["fields", *where, *([name, _said(item, packages)] for name, item in held.items())]
    raise TypeError(f"a {'.'.join(where)} cannot be stored without a pickle")


def _meant(said: list[Any], packages: Collection[str]) -> Any:
    kind, *rest = said
    if kind in {"list", "tuple"}:
        items = [_meant(item, packages) for item in rest]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {_meant(key, packages): _meant(item, packages) for key, item in rest}
    if kind == "fields":
        return _made(rest[0], rest[1], {name: _meant(item, packages) for name, item in rest[2:]}, packages)
    return rest[0].numpy() if kind == "array" else rest[0]


def _made(module: str, name: str, fields: dict[str, Any], packages: Collection[str]) -> Any:
    """A dataclass as it was: without its `__init__` or `__post_init__`, which are code."""
    cls = _dataclass(module, name, packages)
    if cls is None or fields.keys() != _fields(cls):
        raise ValueError(f"{module}.{name} is no dataclass of {', '.join(packages)} with these fields")
    made: Any = object.__new__(cls)
    vars(made).update(fields)
    return made


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _dataclass(module: str, name: str, packages: Collection[str]) -> type | None:
    """The dataclass of that name in a package that may be asked for one; nothing is imported to find it."""
    if module.partition(".")[0] not in packages:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        return None
    cls: type = found
    return cls if (cls.__module__, cls.__qualname__) == (module, name) else None
