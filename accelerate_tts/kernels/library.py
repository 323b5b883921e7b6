"""The kernels' library: loaded once, checked before the first call, and given torch's OpenMP threads.

It lies beside this file, is built with the wheel, and works with every release of torch and Python. Before the first
call, the file's owner and permissions are checked, and the offsets and sizes of all struct fields (`structs.py`). A
failure is stored and reported once; stages that need the library then do not apply, and say why.

`ACCELERATE_TTS_KERNELS` limits the instruction set (for example "avx2") or switches the kernels off ("none").
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import shown
from accelerate_tts.events import FellBack, emit
from accelerate_tts.kernels.structs import ABI_VERSION, expected, library_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VARIABLE = "ACCELERATE_TTS_KERNELS"
NONE = "none"

PLACE = Path(__file__).with_name(library_name())
"""Path of the package's own library."""
_REBUILD = "install a wheel for this platform, or build it anew: python -m accelerate_tts.kernels.build"
_BUILD = (
    "install a wheel for this platform, or have a C++ compiler when it is built"
    " (in a checkout: python -m accelerate_tts.kernels.build)"
)

_POINTER, _INTEGER, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_NO_MEMORY = 1


class KernelError(RuntimeError):
    """The kernels' library is missing, cannot be trusted, or was built for other structs.

    Attributes:
        reason: The problem.
        mend: The way to solve it.
    """

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(f"{reason}: {mend}")
        self.reason = reason
        self.mend = mend


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", _INTEGER), ("size", _INTEGER))


@dataclass(frozen=True)
class Library:
    """Functions of a checked library.

    Attributes:
        path: Path of the library.
        level: Instruction set in use.
        levels: Instruction sets that were built, plainest first.
        threads: File of the OpenMP that it uses; "" if torch has none, so that it runs on one thread.
        decoder_blocks: `(addresses of blocks, tokens, count, threads)`, see decoder_block.py.
        transformer_block: `(address of a block, address of a call, threads)`, see transformer_block.py.
        residual_block: The same for a residual block, see residual_block.py.
        short_convolution: The same for a convolution along time, see toom_cook.py.
        skinny_linear: `(format, x, weight, scale, bias, y, rows, outputs, inputs, threads)`, addresses and sizes.
        digests: `(address, bytes, digests)`, see weight_versions.py; it holds the GIL.
        changed: `(addresses, bytes, digests, places, steps, count)`, likewise.
    """

    path: Path
    level: str
    levels: tuple[str, ...]
    threads: str
    decoder_blocks: Callable[..., None]
    transformer_block: Callable[..., None]
    residual_block: Callable[..., None]
    short_convolution: Callable[..., None]
    skinny_linear: Callable[..., None]
    digests: Callable[..., None]
    changed: Callable[..., int]

    @property
    def has_tiles(self) -> bool:
        """True if matrix products of whole sequences use AMX."""
        return self.level == "amx"


def kernels() -> Library:
    """Return the library.

    Raises:
        KernelError: It cannot be used. The error was reported at the first call, and is raised at each.
    """
    found = loaded_library()
    if isinstance(found, KernelError):
        raise found
    return found


def missing() -> str | None:
    """Return the reason why there are no kernels, or `None` if there are."""
    found = loaded_library()
    return str(found) if isinstance(found, KernelError) else None


def level() -> str:
    """Return the instruction set in use, or "none"."""
    found = loaded_library()
    return NONE if isinstance(found, KernelError) else found.level


@cache
def loaded_library(place: Path = PLACE) -> Library | KernelError:
    """Load a library once, by default the package's own, and return it or the reason why it cannot be used."""
    try:
        return load(place, os.environ.get(VARIABLE, ""))
    except KernelError as error:
        if os.environ.get(VARIABLE) != NONE:  # otherwise the user asked for it
            emit(FellBack("accelerate_tts", "the kernels' library", str(error)))
        return error


def load(path: Path, limit: str = "") -> Library:
    """Load a library and check it; use `kernels()` for the package's own.

    Args:
        path: Path of the library.
        limit: Name of the best instruction set to use; "" for the best of the processor.

    Raises:
        KernelError: The library is missing, cannot be trusted or was built for other structs, or there is no such
            instruction set.
    """
    if limit == NONE:
        raise KernelError(f"the kernels are switched off by {VARIABLE}={NONE}", "unset it to use them")
    if not path.exists():
        raise KernelError("accelerate_tts was built without kernels", _BUILD)
    _distrust(path)
    try:
        dll = ctypes.CDLL(str(path))
        _compare(dll)
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded ({error})", _REBUILD) from error
    levels = _levels(dll)
    if limit and limit not in levels:
        raise KernelError(f"{VARIABLE}={shown(limit)} is none of {', '.join(levels)}, {NONE}", "correct or unset it")
    choose = dll.accelerate_tts_choose
    choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    level = choose(limit.encode() if limit else None).decode()
    block_and_call = [_POINTER, _POINTER, _INT]
    return Library(
        path, level, levels, _give_threads(dll),
        _function(dll.accelerate_tts_decoder_blocks, [_POINTER, _POINTER, _INTEGER, _INT]),
        _function(dll.accelerate_tts_transformer_block, block_and_call),
        _function(dll.accelerate_tts_residual_block, block_and_call),
        _function(dll.accelerate_tts_short_convolution, block_and_call),
        _function(dll.accelerate_tts_skinny_linear, [_INTEGER, *[_POINTER] * 5, *[_INTEGER] * 3, _INT]),
        *_digests(path),
    )  # fmt: skip


def _digests(path: Path) -> tuple[Callable[..., None], Callable[..., int]]:
    """Return the functions that read weights. They hold the GIL, so that no other thread frees the weights."""
    dll = ctypes.PyDLL(str(path))
    digests, changed = dll.accelerate_tts_digests, dll.accelerate_tts_changed
    digests.argtypes, digests.restype = [_POINTER, _INTEGER, _POINTER], None
    changed.argtypes, changed.restype = [*[_POINTER] * 5, _INTEGER], _INT
    return digests, changed


def _distrust(path: Path) -> None:
    """Refuse a library that another user could have put there.

    Raises:
        KernelError: The file or its folder is world-writable, or has an owner that does not own this package.
    """
    if sys.platform == "win32":
        return  # Windows has access control lists; site-packages has those of Python itself
    trusted = {0, os.geteuid(), Path(__file__).stat().st_uid}
    for place in (path, path.parent):
        status = place.stat()
        if status.st_mode & stat.S_IWOTH:
            raise KernelError(f"{place} is not loaded, since everybody may write it", f"chmod o-w {place}")
        if status.st_uid not in trusted:
            reason = (
                f"{place} is not loaded, since it belongs to user {status.st_uid}, who is neither this user nor the"
                " owner of this package"
            )
            raise KernelError(reason, "install the package anew")


def _compare(dll: ctypes.CDLL) -> None:
    """Compare the structs of the library with ours, field by field.

    Raises:
        KernelError: The version or a field differs.
    """
    version = dll.accelerate_tts_abi_version()
    if version != ABI_VERSION:
        raise KernelError(f"{dll._name} has version {version} of the kernels, not {ABI_VERSION}", _REBUILD)
    fields = dll.accelerate_tts_fields
    fields.argtypes, fields.restype = [ctypes.POINTER(_INTEGER)], ctypes.POINTER(_Field)
    count = _INTEGER()
    table = fields(ctypes.byref(count))
    theirs = [(table[i].name.decode(), table[i].offset, table[i].size) for i in range(count.value)]
    ours = expected()
    if theirs != ours:
        pairs = (pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1])
        first = next(pairs, (f"{len(theirs)} fields", f"{len(ours)} fields"))
        raise KernelError(f"{dll._name} was built for other structs: {first[0]}, not {first[1]}", _REBUILD)


def _levels(dll: ctypes.CDLL) -> tuple[str, ...]:
    level = dll.accelerate_tts_level
    level.argtypes, level.restype = [_INT], ctypes.c_char_p
    names: list[str] = []
    while (name := level(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def _function(function: Any, argtypes: Sequence[Any]) -> Callable[..., None]:
    def checked(result: int, function: Any, _arguments: Any) -> None:
        if result == _NO_MEMORY:
            raise MemoryError("there is no memory for what a kernel works in")
        if result:
            raise KernelError(f"{function.__name__} returned {result}", _REBUILD)

    function.argtypes, function.restype, function.errcheck = list(argtypes), _INT, checked
    return function  # type: ignore[no-any-return]


# --- threads ---------------------------------------------------------------------------------------------------------

_GCC = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
_LLVM = ("__kmpc_global_thread_num", "__kmpc_push_num_threads", "__kmpc_fork_call", "__kmpc_barrier",
         "omp_get_thread_num", "omp_get_num_threads")  # fmt: skip


def _give_threads(dll: ctypes.CDLL) -> str:
    """Hand torch's OpenMP to the library; return the file of that OpenMP, or "" if there is none."""
    use = dll.accelerate_tts_use_threads
    use.argtypes, use.restype = [_INT, ctypes.POINTER(_POINTER)], None
    for source in _places_of_openmp():
        for flavour, names in ((1, _GCC), (2, _LLVM)):
            try:
                found = [ctypes.cast(getattr(source, name), _POINTER).value for name in names]
            except AttributeError:
                continue
            use(flavour, (_POINTER * len(found))(*found))
            return _file_of(found[0])
    use(0, (_POINTER * 1)())
    return ""


def _places_of_openmp() -> list[ctypes.CDLL]:
    """Return the libraries in which torch's calls of OpenMP are resolved, in look-up order, global symbols first."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    if sys.platform == "win32":
        names = ["libiomp5md.dll", "vcomp140.dll"]
        return [ctypes.CDLL(str(folder / name)) for name in names if (folder / name).exists()]
    library = folder / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"
    return [ctypes.CDLL(None), *([ctypes.CDLL(str(library))] if library.exists() else [])]


class _Info(ctypes.Structure):
    _fields_ = (("file", ctypes.c_char_p), ("base", _POINTER), ("name", ctypes.c_char_p), ("address", _POINTER))


def _file_of(address: int | None) -> str:
    """Return the file of the library that contains a function, or "OpenMP" if it cannot be found."""
    info = _Info()
    look = getattr(ctypes.CDLL(None), "dladdr", None) if sys.platform != "win32" else None
    if look is None or not look(_POINTER(address), ctypes.byref(info)) or not info.file:
        return "OpenMP"
    return os.fsdecode(info.file)
