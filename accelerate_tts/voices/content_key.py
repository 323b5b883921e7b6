"""Content keys: digests of a call's arguments and an encoder's state, equal only for equal content.

A value whose content cannot be hashed (a URL, a pipe, an object of an unknown class) is refused, never guessed.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import inspect
import os
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from accelerate_tts.inspection.object_tree import slots_of
from accelerate_tts.inspection.signatures import foreign_hooks, global_hooks
from accelerate_tts.storage.file_digests import DURABLE, FileDigests, UnknownContentError, fastest
from accelerate_tts.voices.encoder_state import Encoders, function_words, modules_of

if TYPE_CHECKING:
    from torch import nn

_SCALARS = (type(None), bool, int, float, complex)
_CONTAINERS = (str, bytes, bytearray, int, float, complex, list, tuple, set, frozenset, deque)
_LONGEST_PATH = 4096  # bytes, the limit of Linux; other systems allow less
_PATH_MARKS = tuple({os.sep.encode(), (os.altsep or os.sep).encode(), b"."})
_UNSET = object()


_files = FileDigests()
_encoders = Encoders()


class Digest:
    """A digest of values that are added one by one.

    Args:
        durable: Hash the bytes of modules' weights, so that another process gets the same digest. Otherwise modules are
            identified by a number that is valid in this process. The attribute of this name turns False if a value
            could not be hashed durably.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self.durable = self._asked_durable = durable
        self.files: list[tuple[str, str]] = []
        self._algorithm = DURABLE if durable else fastest()
        self._hash = hashlib.new(self._algorithm)

    def __str__(self) -> str:
        return self._hash.hexdigest()

    def same_files(self) -> bool:
        """Check that the added files still have the hashed content."""
        try:
            return all(_files.digest(path, self._algorithm) == digest for path, digest in self.files)
        except (OSError, UnknownContentError):
            return False

    def identity(self, value: object) -> None:
        """Add the identity of `value`, which no other object of this process has.

        Raises:
            UnknownContentError: Its class does not support weak references.
        """
        self.durable = False
        try:
            self._put("identity", str(_encoders.number(value)))
        except TypeError as error:
            raise UnknownContentError(f"{_name(type(value))} allows no weak references; name its encoder=") from error

    def word(self, text: str) -> None:
        """Add a text that is not a path."""
        self._put("str", text)

    def circumstances(self, settings: str) -> None:
        """Add global state that affects the encoder: torch's settings (`numerics`) and global module hooks."""
        self._put("numerics", settings)
        for hook in foreign_hooks(global_hooks()):
            self.function(hook)

    def function(self, function: Any) -> None:
        """Add a function by its code; in a digest that is not durable, also by its identity.

        Raises:
            UnknownContentError: It has neither readable code nor an identity.
        """
        words = function_words(function)
        if words is not None:
            self._put("function", repr(words))
        if words is None or not self._asked_durable:
            self.identity(function)

    def add(self, value: Any) -> None:  # noqa: C901 - a table of types, which need a test each
        """Add a value's type and content.

        Raises:
            UnknownContentError: Its content cannot be hashed.
        """
        kind = type(value)
        if kind in _SCALARS:
            # An int in hexadecimal: Python refuses to format more than 4300 decimal digits.
            self._put(kind.__name__, hex(value) if kind is int else repr(value))
        elif isinstance(value, enum.Enum):
            self._put(_name(kind), str(value.name))  # a combination of flags may have no name
            self.add(value.value)
        elif isinstance(value, (str, bytes)):
            self._words(value)
        elif kind is bytearray:
            self._put("bytearray", value)
        elif kind is memoryview:
            self._put("memoryview", f"{value.format} {value.shape}")
            self._put("content", value.tobytes())
        elif kind in {list, tuple, dict} or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            self._container(value)
        elif isinstance(value, os.PathLike):
            self._path(os.fsdecode(value))
        elif self._torch(value) or self._numpy(value):
            pass
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self._dataclass(value)
        elif all(callable(getattr(value, name, None)) for name in ("read", "seek", "tell")):
            self._opened(value)
        else:
            raise UnknownContentError(
                f"an argument of type {_name(kind)} cannot be hashed; give the audio, its path or its bytes"
            )

    def _put(self, tag: str, content: str | bytes | bytearray | memoryview) -> None:
        if isinstance(content, str):
            content = content.encode("utf-8", errors="surrogatepass")
        # The lengths separate consecutive values unambiguously.
        self._hash.update(f"{len(tag)} {tag} {len(content)} ".encode())
        self._hash.update(content)

    def _container(self, value: Any) -> None:
        kind = type(value)
        if kind is dict:
            self._put("dict", str(len(value)))
            for name, item in value.items():
                if type(name) is str:
                    self.word(name)  # never a path
                else:
                    self.add(name)
                self.add(item)
            return
        if kind not in {list, tuple} and getattr(value, "__dict__", None):
            raise UnknownContentError(f"a {_name(kind)} holds more than its items")
        items = list(list.__iter__(value) if kind is list else tuple.__iter__(value))
        self._put(kind.__name__ if kind in {list, tuple} else _name(kind), str(len(items)))
        for item in items:
            self.add(item)

    def _dataclass(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, _CONTAINERS):
            raise UnknownContentError(f"a {_name(kind)} holds more than its fields")
        # A field may be unset, and there may be more than fields: attributes, slots of a base, items.
        names = [field.name for field in dataclasses.fields(value)]
        names += [*getattr(value, "__dict__", {}), *(slot for cls in kind.__mro__ for slot in slots_of(cls))]
        held = {name: getattr(value, name, _UNSET) for name in names}
        self._put("dataclass", f"{_name(kind)} {len(held)}")
        for name, item in held.items():
            self.word(name)
            if item is _UNSET:
                self._put("unset", "")
            else:
                self.add(item)
        if isinstance(value, dict):
            self._container(dict(dict.items(value)))

    def _words(self, value: str | bytes) -> None:
        kind, plain = type(value), str.__str__(value) if isinstance(value, str) else bytes(value)
        if kind.__module__ not in {"builtins", "numpy"}:
            if getattr(value, "__dict__", None):
                raise UnknownContentError(f"a {_name(kind)} holds more than its characters")
            self._put("class", _name(kind))
        if isinstance(plain, str):
            self._text(plain)
            return
        self._put("bytes", plain)
        if len(plain) <= _LONGEST_PATH and any(mark in plain for mark in _PATH_MARKS):  # `open` takes bytes, too
            self._path(os.fsdecode(plain))

    def _text(self, text: str) -> None:
        if "://" in text or text.startswith("file:"):
            raise UnknownContentError("the content behind a URL cannot be hashed; give the audio itself")
        separators = {os.sep, os.altsep or os.sep, "."}
        if not separators & set(text):
            self.word(text)  # "en" counts as a text even if a file of this name exists
        self._path(text)

    def _path(self, path: str) -> None:
        if path.startswith("~") or "$" in path:  # the function may expand these before it opens the file
            self._file(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111 - a text that may be no path
        self._file(path)

    def _file(self, path: str) -> None:
        try:
            digest = _files.digest(path, self._algorithm)
        except (OSError, ValueError):  # no such file, or a text that cannot be a path
            self.word(path)
            return
        self.files.append((path, digest))
        # Not the name, since each upload gets another one. The suffix may decide how a file is read.
        self._put("file", os.path.splitext(path)[1].lower())  # noqa: PTH122
        self._put("content", digest)

    def _opened(self, file: Any) -> None:
        if inspect.iscoroutinefunction(file.read):
            raise UnknownContentError(f"a {_name(type(file))} is read asynchronously; give its bytes")
        try:
            place = file.tell()
            try:
                file.seek(0)
                content = file.read()
            finally:
                file.seek(place)
        except (OSError, ValueError) as error:
            raise UnknownContentError(f"a {_name(type(file))} cannot be read twice") from error
        if not isinstance(content, (str, bytes)):
            raise UnknownContentError(f"a {_name(type(file))} cannot be read at once")
        # The suffix of its name may decide how it is read.
        name = getattr(file, "name", None)
        suffix = os.path.splitext(name)[1].lower() if isinstance(name, (str, bytes)) else ""  # noqa: PTH122
        self._put("opened", f"{_name(type(file))} {type(content).__name__} {place} {suffix!r}")
        self._put("content", content)

    def _torch(self, value: Any) -> bool:
        torch = sys.modules.get("torch")
        if torch is None:
            return False
        if isinstance(value, (torch.dtype, torch.device)):
            self._put(type(value).__name__, str(value))
            return True
        if isinstance(value, torch.nn.Module):
            self._module(value)
            return True
        if not isinstance(value, torch.Tensor):
            return False
        plain = type(value) in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
        if not plain or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise UnknownContentError(f"a tensor of type {_name(type(value))} cannot be hashed; give a plain tensor")
        from accelerate_tts.storage.tensor_bytes import content_digest

        self._put("tensor", f"{value.dtype} {tuple(value.shape)} {value.device}")
        self._put("content", content_digest(value.detach().resolve_conj().resolve_neg()))
        return True

    def _module(self, module: nn.Module) -> None:
        walked = modules_of(module)
        words, beside = _encoders.computation(module, walked)
        self._put("computation", words)
        for function in beside.functions:
            self.function(function)
        for weights in beside.packed:
            self.identity(weights)
        content = _encoders.content(module, walked, beside.tensors) if self.durable else None
        if content is not None:
            self._put("weights", content)
        else:
            self.durable = False
            self._put("module", str(_encoders.known(module, walked, beside.tensors).token))

    def _numpy(self, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
            return False
        plain = type(value) in {numpy.ndarray, numpy.memmap} or isinstance(value, numpy.generic)
        if not plain or value.dtype.hasobject or value.dtype.names is not None:
            raise UnknownContentError(
                f"an array of {value.dtype} ({_name(type(value))}) cannot be hashed; give an array of numbers"
            )
        self._put("array", f"{value.dtype.str} {value.shape}")
        if value.dtype.kind in "US":  # an array of texts, each of which may be a path
            self._container(value.reshape(-1).tolist())
            return True
        plain = value.size and value.flags.c_contiguous and value.dtype.kind in "fiub"
        self._put("content", memoryview(value.reshape(-1).view("u1")) if plain else value.tobytes())
        return True


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
