"""What the arguments of a call and the weights of an encoder are, as a digest: equal only where the content is.

A value whose content cannot be told (a URL, a pipe, an object of an unknown class) is refused, never guessed.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.file_digests import DURABLE, FileDigests, UnknownContentError, fastest
from accelerate_tts.engine.stages.swap import copies_of
from accelerate_tts.locks import lock

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Digest"]

_SCALARS = (type(None), bool, int, float, complex)


@dataclasses.dataclass
class _Known:
    state: list[Any]
    held: list[Any]
    token: int
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    content: str | None = None


class _Weights:
    """A number for each state of a module's weights that this process has met, and the digest of their bytes."""

    def __init__(self) -> None:
        self._lock = lock()
        self._numbers = itertools.count()
        self._known: Any = None
        self._owners: Any = None

    def known(self, module: nn.Module) -> _Known:
        state = _state(module)
        with self._lock:
            if self._known is None:
                self._known = _by_identity()
            known: _Known | None = self._known.get(module)
            if known is None or known.state != state:
                held = [_hold(tensor) for inner in _walk(module) for tensor in _own(inner)]
                # Taken again, now that no address in it can come to belong to another storage.
                known = _Known(_state(module), held, next(self._numbers))
                self._known[module] = known
            return known

    def content(self, module: nn.Module) -> str | None:
        """A digest of the module and its weights' bytes, once for each state; `None` where it would not tell all."""
        import torch

        from accelerate_tts.engine.fingerprint import fingerprint

        known = self.known(module)
        with known.lock:
            if known.content is None:
                plain = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
                for tensor in (tensor for inner in _walk(module) for tensor in _own(inner)):
                    if type(tensor) not in plain or tensor.layout is not torch.strided or tensor.is_meta:
                        return None  # of such a tensor the fingerprint does not hold the content
                made = fingerprint([module], {"torch": torch.__version__})
                if _state(module) != known.state:
                    return None  # written meanwhile
                known.content = made
            return known.content

    def number(self, owner: object) -> int:
        """A number that no other object of this process has, ever.

        Raises:
            TypeError: The object's class has no room for weak references.
        """
        with self._lock:
            if self._owners is None:
                self._owners = _by_identity()
            if owner not in self._owners:
                self._owners[owner] = next(self._numbers)
            return int(self._owners[owner])


def _by_identity() -> Any:
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _walk(root: nn.Module) -> Iterator[nn.Module]:
    stack, seen = [root], {id(root)}
    while stack:
        module = stack.pop()
        yield module
        for inner in module._modules.values() if module._modules else ():
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                stack.append(inner)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _copies(root: nn.Module) -> str:
    """What of a tuned module computes from copies in fewer bits at this moment; "" if nothing does."""
    walked = enumerate(_walk(root))
    return " ".join(f"{number}:{copies}" for number, module in walked if (copies := copies_of(module)))


def _state(root: nn.Module) -> list[Any]:
    """What differs once a module is exchanged or a weight is written, moved or replaced.

    As everywhere in torch, a write through `.data` or to an inference tensor counts no version, and is not seen.
    """
    state: list[Any] = []
    for module in _walk(root):
        state.append(weakref.ref(module))  # equal only to a reference to the same living module
        for tensors in (module._parameters, module._buffers):
            if tensors:  # most modules have none, and this runs for all of them at each request
                state += [_tensor_state(tensor) for tensor in tensors.values() if tensor is not None]
    return state


def _tensor_state(tensor: torch.Tensor) -> tuple[int, int, int]:
    try:
        return tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version
    except (RuntimeError, NotImplementedError):
        version = 0 if tensor.is_inference() else tensor._version
    try:
        return tensor.untyped_storage()._cdata, tensor.data_ptr(), version
    except (RuntimeError, NotImplementedError):  # a sparse tensor has no storage of its own
        return id(tensor), 0, version


def _hold(tensor: torch.Tensor) -> Any:
    """What keeps the addresses in a tensor's state from being used again, without keeping its memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch has no types for it
    except (RuntimeError, NotImplementedError):
        return tensor


_files = FileDigests()
_weights = _Weights()


class Digest:
    """A digest of values that are added one after another.

    Args:
        durable: Modules count with their weights' bytes, so that another process finds the same digest. The attribute
            of this name tells whether that could be kept up; otherwise modules count with a number of this process.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self.durable = durable
        self.files: list[tuple[str, str]] = []
        self._algorithm = DURABLE if durable else fastest()
        self._hash = hashlib.new(self._algorithm)

    def __str__(self) -> str:
        return self._hash.hexdigest()

    def same_files(self) -> bool:
        """Whether the files that were added still have the content that was added."""
        try:
            return all(_files.digest(path, self._algorithm) == digest for path, digest in self.files)
        except (OSError, UnknownContentError):
            return False

    def identity(self, value: object) -> None:
        """Add who `value` is: no other object of this process gets the same.

        Raises:
            UnknownContentError: Its class has no room for weak references.
        """
        self.durable = False
        try:
            self._put("identity", str(_weights.number(value)))
        except TypeError as error:
            raise UnknownContentError(f"{_name(type(value))} allows no weak references; name its encoder=") from error

    def word(self, text: str) -> None:
        """Add a text that is nothing but a text."""
        self._put("str", text)

    def add(self, value: Any) -> None:  # noqa: C901, PLR0912 - a table of types, which need a test each
        """Add a value's type and content.

        Raises:
            UnknownContentError: Its content cannot be told.
        """
        kind = type(value)
        if kind in _SCALARS:
            self._put(kind.__name__, repr(value))
        elif kind is str:
            self._text(value)
        elif kind in {bytes, bytearray, memoryview}:
            self._put("bytes", bytes(value))
        elif kind in {list, tuple}:
            self._many(kind.__name__, value)
        elif kind is dict:
            self._put("dict", str(len(value)))
            for name, item in value.items():
                if type(name) is str:
                    self.word(name)  # no path, whatever it looks like
                else:
                    self.add(name)
                self.add(item)
        elif isinstance(value, tuple) and hasattr(kind, "_fields"):
            self._many(_name(kind), list(value))
        elif isinstance(value, enum.Enum):
            self._put(_name(kind), value.name)
        elif isinstance(value, os.PathLike):
            self._path(os.fsdecode(value))
        elif self._torch(value) or self._numpy(value):
            pass
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            self._put("dataclass", _name(kind))
            self.add({**fields, **getattr(value, "__dict__", {})})
        elif all(callable(getattr(value, name, None)) for name in ("read", "seek", "tell")):
            self._opened(value)
        else:
            raise UnknownContentError(f"the content of an argument of type {_name(kind)} cannot be told")

    def _put(self, tag: str, content: str | bytes | memoryview) -> None:
        if isinstance(content, str):
            content = content.encode("utf-8", errors="surrogatepass")
        # The lengths keep two values from running into each other.
        self._hash.update(f"{len(tag)} {tag} {len(content)} ".encode())
        self._hash.update(content)

    def _many(self, tag: str, items: Any) -> None:
        self._put(tag, str(len(items)))
        for item in items:
            self.add(item)

    def _text(self, text: str) -> None:
        if "://" in text:
            raise UnknownContentError("the content behind a URL cannot be told; give the audio itself")
        separators = {os.sep, os.altsep or os.sep, "."}
        if not separators & set(text):
            self.word(text)  # "en" stays "en" where there happens to be a file of this name
        self._path(text)

    def _path(self, path: str) -> None:
        try:
            digest = _files.digest(path, self._algorithm)
        except (OSError, ValueError):  # no such file, or a text that can be no path
            self.word(path)
            return
        self.files.append((path, digest))
        # Not the name: an upload gets another one each time. The suffix may decide how a file is read.
        self._put("file", os.path.splitext(path)[1].lower())  # noqa: PTH122
        self._put("content", digest)

    def _opened(self, file: Any) -> None:
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
        self._put("opened", f"{type(content).__name__} {place}")
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
            raise UnknownContentError(f"the content of a tensor of type {_name(type(value))} cannot be told")
        from accelerate_tts.engine.fingerprint import _content

        self._put("tensor", f"{value.dtype} {tuple(value.shape)} {value.device}")
        self._put("content", _content(value.detach().resolve_conj().resolve_neg()))
        return True

    def _module(self, module: nn.Module) -> None:
        self._put("copies", _copies(module))  # what is heard with int8 weights is not for those who ask with fp32 ones
        content = _weights.content(module) if self.durable else None
        if content is not None:
            self._put("weights", content)
        else:
            self.durable = False
            self._put("module", str(_weights.known(module).token))

    def _numpy(self, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
            return False
        plain = type(value) in {numpy.ndarray, numpy.memmap} or isinstance(value, numpy.generic)
        if not plain or value.dtype.hasobject:
            raise UnknownContentError(f"the content of an array of {value.dtype} ({_name(type(value))}) cannot be told")
        self._put("array", f"{value.dtype.descr} {value.shape}")
        plain = value.size and value.flags.c_contiguous and value.dtype.kind in "fiub"
        self._put("content", memoryview(value.reshape(-1).view("u1")) if plain else value.tobytes())
        return True


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
