"""State of an encoder that changes what it computes: weights, modes, hooks, hyper-parameters, torch's own switches.

Everything here is read at each call of a cached function, so it is written for speed: some microseconds a module.
"""

from __future__ import annotations

import ctypes
import dataclasses
import dis
import functools
import hashlib
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Iterable
from types import CodeType
from typing import TYPE_CHECKING, Any

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.locks import lock
from accelerate_tts.patching.class_swap import copies_of
from accelerate_tts.patching.lazy_parameters import Absent
from accelerate_tts.storage.fingerprint import code_of, fingerprint

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "Encoders",
    "constants",
    "foreign_hooks",
    "function_words",
    "global_hooks",
    "modules_of",
    "numerics",
    "outside",
]

_SAMPLE = 64  # bytes: a cache line costs no more than one of its bytes


@dataclasses.dataclass
class _Known:
    state: list[Any]
    places: list[Any]
    sample: bytes
    held: list[Any]
    token: int
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    content: str | None = None


@dataclasses.dataclass
class _Said:
    values: list[Any]
    identities: list[int]
    texts: list[str]
    words: str


class Encoders:
    """States of modules that this process has met: a number for each of the weights, and the digest of their bytes."""

    def __init__(self) -> None:
        self._lock = lock()
        self._numbers = itertools.count()
        self._known: Any = None
        self._owners: Any = None
        self._said: Any = None

    def computation(self, module: nn.Module, walked: list[nn.Module]) -> tuple[str, list[Any]]:
        """How a module computes, beside its weights, and the functions that decide it: each `forward`, and hooks.

        Args:
            module: The module.
            walked: It, and all modules in it.

        Returns:
            The classes and plain attributes of every module (`training`, hyper-parameters) and of their `config`, and
            which of them compute from copies in fewer bits at this moment; then the functions.
        """
        values, texts, functions = _computation(walked)
        identities = list(map(id, values))
        with self._lock:
            if self._said is None:
                self._said = _by_identity()
            said: _Said | None = self._said.get(module)
            # The values are held: the same object is the same value.
            if said is None or said.identities != identities or said.texts != texts:
                said = self._said[module] = _Said(values, identities, texts, repr((values, texts)))
            return said.words, functions

    def known(self, module: nn.Module, walked: list[nn.Module]) -> _Known:
        """What is known of the present state of a module's weights; `walked` are it and all modules in it."""
        state = _state(walked)
        with self._lock:
            if self._known is None:
                self._known = _by_identity()
            known: _Known | None = self._known.get(module)
            # The addresses are looked at only if the state says that the memory there is still that of the weights.
            if known is None or known.state != state or _sampled(known.places) != known.sample:
                held = [_hold(tensor) for inner in walked for tensor in _own(inner)]
                # Taken again, now that no address in it can come to belong to another storage.
                places = _places(walked)
                known = _Known(_state(walked), places, _sampled(places), held, next(self._numbers))
                self._known[module] = known
            return known

    def content(self, module: nn.Module, walked: list[nn.Module]) -> str | None:
        """A digest of the module and its weights' bytes, once for each state; `None` where it would not tell all."""
        import torch

        known = self.known(module, walked)
        with known.lock:
            if known.content is None:
                plain = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
                for tensor in (tensor for inner in walked for tensor in _own(inner)):
                    if type(tensor) not in plain or tensor.layout is not torch.strided or tensor.is_meta:
                        return None  # of such a tensor the fingerprint does not hold the content
                made = fingerprint([module], {"torch": torch.__version__})
                if self.known(module, modules_of(module)) is not known:
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


def modules_of(root: nn.Module) -> list[nn.Module]:
    """A module and all modules in it, each once. As `Module.modules()`, in a third of the time."""
    found, seen = [root], {id(root)}
    for module in found:
        if module._modules:
            for inner in module._modules.values():
                if inner is not None and id(inner) not in seen:
                    seen.add(id(inner))
                    found.append(inner)
    return found


def _own(module: nn.Module) -> list[torch.Tensor]:
    # Weights that are away (`Absent`) were not written, and a look at them would have them loaded again.
    parameters: Iterable[Any] = () if type(module._parameters) is Absent else module._parameters.values()
    return [tensor for tensor in (*parameters, *module._buffers.values()) if tensor is not None]


def _state(walked: list[nn.Module]) -> list[Any]:
    """What differs once a module is exchanged or a weight is written, moved or replaced.

    A write through `.data`, to an inference tensor or by another process counts no version, and is not in it.
    """
    state: list[Any] = list(map(weakref.ref, walked))  # equal only to references to the same living modules
    for module in walked:
        for tensors in (module._parameters, module._buffers):
            if not tensors:  # most modules have none, and this runs for all of them at each request
                continue
            if type(tensors) is Absent:
                state.append(Absent)
                continue
            try:
                state += [
                    (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version, tensor.stride())
                    for tensor in tensors.values()
                    if tensor is not None
                ]
            except (RuntimeError, NotImplementedError):
                state += [_odd_state(tensor) for tensor in tensors.values() if tensor is not None]
    return state


def _odd_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        return tensor.untyped_storage()._cdata, tensor.data_ptr(), version, tensor.stride()
    except (RuntimeError, NotImplementedError):  # a sparse tensor has no storage of its own
        return id(tensor), 0, version, ()


def _places(walked: list[nn.Module]) -> list[Any]:
    """Where in the CPU's memory some dozens of elements of each tensor lie, as buffers that keep nothing alive."""
    places: list[Any] = []
    line = ctypes.c_char * _SAMPLE
    for tensor in (tensor for inner in walked for tensor in _own(inner)):
        try:
            if not tensor.is_cpu or not (address := tensor.data_ptr()):
                continue
            storage = tensor.untyped_storage()
            size = min(tensor.nbytes, storage.nbytes() - address + storage.data_ptr())
        except (RuntimeError, NotImplementedError):  # it has no memory of its own
            continue
        if size <= 2 * _SAMPLE:
            places.append((ctypes.c_char * size).from_address(address))
        else:
            places += [line.from_address(address + third * (size // 3)) for third in (1, 2)]
    return places


def _sampled(places: list[Any]) -> bytes:
    return b"".join(places)


def _hold(tensor: torch.Tensor) -> Any:
    """What keeps the addresses in a tensor's state from being used again, without keeping its memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch has no types for it
    except (RuntimeError, NotImplementedError):
        return tensor


# --- beside the weights --------------------------------------------------------------------------------------------

_SCALARS = frozenset({int, float, bool, str, type(None)})
_LISTS = frozenset({tuple, list})
_FUNCTIONS = 64  # of a module are looked into, for what a cached function may use
_OWN_HOOKS = ("transformers.", "accelerate_tts.")  # the former collect attention weights, the latter watch


def _computation(walked: list[nn.Module]) -> tuple[list[Any], list[str], list[Any]]:
    values: list[Any] = []
    texts: list[str] = []
    functions: list[Any] = []
    classes: dict[type, tuple[str, bool]] = {}
    configs: set[int] = set()
    for module in walked:
        own = module.__dict__
        about = classes.get(type(module))
        if about is None:
            plain = plain_class(module)
            holds = any(type(value) in _LISTS for value in own.values())
            name = sys.intern(f"{plain.__module__}.{plain.__qualname__} {copies_of(module)}")
            about = classes[type(module)] = name, holds
            forward = getattr(plain, "forward", None)
            if inspect.isfunction(forward) and forward not in functions:
                functions.append(forward)
        values.append(about[0])
        # Without names, and of most modules in one step: which attribute is meant the order tells.
        values += [value for value in own.values() if type(value) in _SCALARS]
        if about[1]:  # a list may come to hold something else while it is the same
            texts += [f"{value}" for value in own.values() if type(value) in _LISTS and _is_plain(value)]
        if own.get("_forward_hooks") or own.get("_forward_pre_hooks"):
            functions += foreign_hooks(own.get("_forward_hooks", {}), own.get("_forward_pre_hooks", {}))
        if "forward" in own:
            functions.append(own["forward"])
        config = own.get("config")
        if config is not None and id(config) not in configs:
            configs.add(id(config))
            held = config if isinstance(config, dict) else getattr(config, "__dict__", {})
            texts += [f"{name} {value!r}" for name, value in held.items() if _is_plain(value) and str(name)[:1] != "_"]
    return values, texts, functions


def _is_plain(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) in _LISTS and all(map(_is_plain, value)))


def _is_constant(value: Any) -> bool:
    """Whether a value around a function decides what it computes; a list may as well be what it writes to."""
    return type(value) in _SCALARS or (type(value) is tuple and all(map(_is_constant, value)))


def foreign_hooks(*hooks: Any) -> list[Any]:
    """The hooks of a user, in the order in which they are called."""
    found = [hook for each in hooks for hook in each.values()]
    return [hook for hook in found if not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS)]


def global_hooks() -> list[Any]:
    """A user's hooks on the calls of all modules."""
    from torch.nn.modules import module

    return foreign_hooks(module._global_forward_hooks, module._global_forward_pre_hooks)


def numerics() -> str:
    """Torch's own switches that decide in which precision and where something is computed."""
    import torch

    said = [str(torch.get_default_dtype()), str(torch.get_default_device())]
    for device in ("cpu", "cuda", "mps", "xpu"):
        try:
            if torch.is_autocast_enabled(device):
                said.append(f"{device} {torch.get_autocast_dtype(device)}")
        except RuntimeError:  # a device that this build of torch does not know
            continue
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    mkldnn = getattr(torch.backends, "mkldnn", None)
    for holder, name in (
        (torch.backends, "fp32_precision"),
        (matmul, "fp32_precision"),
        (getattr(cudnn, "conv", None), "fp32_precision"),
        (getattr(cudnn, "rnn", None), "fp32_precision"),
        (getattr(mkldnn, "matmul", None), "fp32_precision"),
        (getattr(mkldnn, "conv", None), "fp32_precision"),
        (matmul, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (cudnn, "allow_tf32"),
    ):
        said.append(_switch(holder, name))
    try:
        said.append(torch.get_float32_matmul_precision())
    except RuntimeError:  # as `allow_tf32`: it was set by the newer names, which are read above
        said.append("mixed")
    return " ".join(said)


def _switch(holder: Any, name: str) -> str:
    try:
        return str(getattr(holder, name, ""))
    except RuntimeError:  # it was set by a newer name, and torch refuses the older one
        return "mixed"


_told: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def function_words(function: Any) -> list[Any] | None:
    """What a function computes, as far as its code, defaults and the plain values around it say.

    `None` for an object that is called: nothing says what it computes.
    """
    if isinstance(function, functools.partial):
        inner = function_words(function.func)
        values = [*function.args, *function.keywords.items()]
        return None if inner is None else [inner, [value for value in values if _is_plain(value)]]
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if code is None:
        kind = type(function)
        if kind.__module__.startswith("torch."):  # weight_norm and its like are hooks of torch's own
            return [kind.__module__, kind.__qualname__, sorted(i for i in vars(function).items() if _is_plain(i[1]))]
        return None
    known = _told.get(function)
    if known is None or known[0] is not code:
        known = _told[function] = (code, hashlib.sha256(code_of(function).encode(errors="surrogatepass")).hexdigest())
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [value for name, value in around(function).items() if name in code.co_freevars]
    return [function.__module__, function.__qualname__, known[1], [value for value in values if _is_constant(value)]]


def around(function: Any) -> dict[str, Any]:
    """What a function takes from its module and from the functions around it, and does not assign itself."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    globals_ = getattr(function, "__globals__", {})
    names, assigned = _names(code)
    found = {name: globals_[name] for name in names if name in globals_ and name not in assigned}
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
        if name in assigned:
            continue
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names that code and the code inside it use, and those of other scopes that it assigns."""
    names = dict.fromkeys(code.co_names)
    assigned = {each.argval for each in dis.get_instructions(code) if each.opname in {"STORE_GLOBAL", "STORE_DEREF"}}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, also = _names(inner)
            names.update(dict.fromkeys(more))
            assigned |= also
    return tuple(names), frozenset(assigned)


def outside(function: Any) -> dict[str, Any]:
    """`around` of a function, and of the functions of its module that it may call."""
    found: dict[str, Any] = {}
    stack, seen = [inspect.unwrap(getattr(function, "__func__", function))], set[int]()
    while stack and len(seen) < _FUNCTIONS:
        here = stack.pop()
        seen.add(id(here))
        for name, value in around(here).items():
            found.setdefault(name, value)
            if inspect.isfunction(value) and value.__module__ == here.__module__ and id(value) not in seen:
                stack.append(value)
    return found


def constants(function: Any) -> list[str]:
    """The plain values with names in capitals that a function and its helpers use."""
    return [f"{name} {value!r}" for name, value in outside(function).items() if name.isupper() and _is_constant(value)]
