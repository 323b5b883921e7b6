"""State that decides what an encoder computes: weights, modes, hooks, hyper-parameters, torch's own switches.

All of it is read at each call of a cached function, so the code is written for speed: some microseconds a module.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import inspect
import itertools
import sys
import threading
import weakref
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.object_tree import attributes_of
from accelerate_tts.inspection.signatures import foreign_hooks, hooks_of
from accelerate_tts.locks import lock
from accelerate_tts.patching.class_swap import copies_of
from accelerate_tts.patching.lazy_parameters import LazyParameters
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.storage.fingerprint import code_of, fingerprint
from accelerate_tts.storage.tensor_bytes import content_digest

if TYPE_CHECKING:
    from torch import nn

_LOOKS = 5
"""Kilobytes of each weight that are compared at each call: five in a row leave no gap of a quarter of the weight."""


@dataclasses.dataclass
class _WeightState:
    state: list[Any]
    watch: WeightWatch
    held: list[Any]
    token: int
    lock: threading.Lock = dataclasses.field(default_factory=lock)
    content: str | None = None


@dataclasses.dataclass
class _Said:
    values: list[Any]
    identities: list[int]
    texts: list[str]
    words: str


@dataclasses.dataclass
class _Beside:
    """Content of modules beside their weights and plain attributes.

    Attributes:
        functions: Each `forward`, and the hooks.
        packed: Packed weights of quantised layers, of which only the identity can be told.
        tensors: Tensors and arrays that are plain attributes. Those that a method other than `__init__` sets are left
            out, since a call may set them: a cache of keys, the last output.
    """

    functions: list[Any] = dataclasses.field(default_factory=list)
    packed: list[Any] = dataclasses.field(default_factory=list)
    tensors: list[Any] = dataclasses.field(default_factory=list)


class Encoders:
    """States of the modules of this process: a number for each state of the weights, and the digest of their bytes."""

    def __init__(self) -> None:
        self._lock = lock()
        self._numbers = itertools.count()
        self._known = IdentityMap[_WeightState]()
        self._owners = IdentityMap[int]()
        self._said = IdentityMap[_Said]()

    def computation(self, module: nn.Module, walked: list[nn.Module]) -> tuple[str, _Beside]:
        """Describe a module's computation apart from its weights.

        Returns:
            A text with the classes and plain attributes (`training`, hyper-parameters) of every module and of its
            configurations (a `config`, `hp` or `args`: a dictionary or an object), and the formats of weight copies in
            use; and what a text cannot describe.
        """
        values, texts, beside = _computation(walked)
        identities = list(map(id, values))
        with self._lock:
            said = self._said.get(module)
            # The values are kept alive, so the same id is the same value.
            if said is None or said.identities != identities or said.texts != texts:
                said = _Said(values, identities, texts, repr((values, texts)))
                self._said.put(module, said)
            return said.words, beside

    def known(self, module: nn.Module, walked: list[nn.Module], beside: list[Any]) -> _WeightState:
        """Return the record of the present state of a module's weights.

        Args:
            module: The module.
            walked: It and the modules inside it.
            beside: See `computation`.
        """
        tensors = _tensors(walked)  # held until their memory was read, since another thread may replace them
        state = _state(walked, tensors, beside)
        with self._lock:
            known = self._known.get(module)
            # The content is read only if the state shows that the memory still belongs to the weights.
            if known is None or known.state != state or any(known.watch.rewritten() for _ in range(_LOOKS)):
                held = [*map(_hold, tensors), *map(_hold, beside)]  # keep the addresses from being reused
                known = _WeightState(state, WeightWatch.at(_holders(walked)), held, next(self._numbers))
                self._known.put(module, known)
            return known

    def content(self, module: nn.Module, walked: list[nn.Module], beside: list[Any]) -> str | None:
        """Return a digest of the module and its weights' bytes, computed once a state.

        Args:
            module: The module.
            walked: It and the modules inside it.
            beside: See `computation`.

        Returns:
            `None` if a tensor's content is not covered (a tensor subclass, a sparse or a meta tensor), or if a weight
            was written meanwhile.
        """
        known = self.known(module, walked, beside)
        with known.lock:
            if known.content is None:
                plain = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
                tensors = [*_tensors(walked), *(value for value in beside if isinstance(value, torch.Tensor))]
                if any(type(t) not in plain or t.layout is not torch.strided or t.is_meta for t in tensors):
                    return None  # the fingerprint does not cover the content of such a tensor
                digest = hashlib.sha256(fingerprint([module], {"torch": torch.__version__}).encode())
                for value in beside:
                    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
                    digest.update(content_digest(value) if isinstance(value, torch.Tensor) else value.tobytes())
                if self.known(module, modules_of(module), beside) is not known:
                    return None  # written meanwhile
                known.content = digest.hexdigest()
            return known.content

    def number(self, owner: object) -> int:
        """Return a number that is unique to the object in this process, also after it is gone.

        Raises:
            TypeError: The object's class does not support weak references.
        """
        return self._owners.setdefault(owner, lambda: next(self._numbers))


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Return a module and all modules inside it, each once. Like `Module.modules()`, in a third of the time."""
    found, seen = [root], {id(root)}
    for module in found:
        if module._modules:
            for inner in module._modules.values():
                if inner is not None and id(inner) not in seen:
                    seen.add(id(inner))
                    found.append(inner)
    return found


def _holders(walked: list[nn.Module]) -> list[dict[str, Any]]:
    # Most modules have none. Offloaded weights (`LazyParameters`) cannot have been written, and are not to be reloaded.
    return [
        tensors
        for module in walked
        for tensors in (module._parameters, module._buffers)
        if tensors and type(tensors) is not LazyParameters
    ]


def _tensors(walked: list[nn.Module]) -> list[torch.Tensor]:
    return [tensor for tensors in _holders(walked) for tensor in tensors.values() if tensor is not None]


def _state(walked: list[nn.Module], tensors: list[torch.Tensor], beside: list[Any]) -> list[Any]:
    """Return a list that changes when a module is replaced, or a weight is written, moved or replaced.

    Writes through `.data`, to inference tensors or by another process count no version, and do not change it: the
    content is watched besides.
    """
    state: list[Any] = list(map(weakref.ref, walked))  # equal only to references to the same live modules
    try:
        state += [(t.untyped_storage()._cdata, t.data_ptr(), t._version, t.stride()) for t in tensors]
    except (RuntimeError, NotImplementedError):
        state += map(_odd_state, tensors)
    return state + [(*_odd_state(one)[:2], one.shape) if isinstance(one, torch.Tensor) else id(one) for one in beside]


def _odd_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        return tensor.untyped_storage()._cdata, tensor.data_ptr(), version, tensor.stride()
    except (RuntimeError, NotImplementedError):  # a sparse tensor has no storage of its own
        return id(tensor), 0, version, ()


def _hold(tensor: Any) -> Any:
    """Return an object that keeps a storage's address from being reused, without keeping its memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch has no types for it
    except (RuntimeError, NotImplementedError, AttributeError):  # a sparse tensor, or an array
        return tensor


# --- beside the weights --------------------------------------------------------------------------------------------

_SCALARS = frozenset({int, float, bool, str, type(None)})
_LISTS = frozenset({tuple, list})
_TORCHS_OWN = frozenset(vars(torch.nn.Module()))
_MOST_OPTIONS = 1000
_FUNCTIONS = 64  # maximum functions that are searched for the names that a cached function may use


def _computation(walked: list[nn.Module]) -> tuple[list[Any], list[str], _Beside]:
    values: list[Any] = []
    texts: list[str] = []
    beside = _Beside()
    classes: dict[type, str] = {}
    seen: set[int] = set()
    for module in walked:
        own = module.__dict__
        name = classes.get(type(module))
        if name is None:
            plain = plain_class(module)
            name = classes[type(module)] = sys.intern(f"{plain.__module__}.{plain.__qualname__} {copies_of(module)}")
            forward = getattr(plain, "forward", None)
            if inspect.isfunction(forward) and forward not in beside.functions:
                beside.functions.append(forward)
        values.append(name)
        # Without names, for speed: the order identifies the attribute.
        values += [value for value in own.values() if type(value) in _SCALARS]
        beside.functions += foreign_hooks(hooks_of(module))
        if "forward" in own:
            beside.functions.append(own["forward"])
        for key in [key for key, value in own.items() if type(value) not in _SCALARS and key not in _TORCHS_OWN]:
            if type(own[key]) is torch.ScriptObject:
                beside.packed.append(own[key])
            elif _is_array(own[key]):
                beside.tensors += [] if _is_set_by_calls(module, key) else [own[key]]
            else:
                texts += _options(own[key], seen)
    return values, texts, beside


def _options(value: Any, seen: set[int]) -> list[str]:
    """Return the plain items of an attribute as texts. Modules share a configuration, which is read once."""
    if type(value) in _LISTS:  # the items of a list may change while its id stays
        return [f"{value}"] if _is_plain(value) else []
    held = value if isinstance(value, dict) else attributes_of(value)
    if id(value) in seen or len(held) > _MOST_OPTIONS:  # more are a vocabulary, or the like
        return []
    seen.add(id(value))
    items = list(dict.items(held))  # at once, since another thread may add some
    return [f"{name} {item!r}" for name, item in items if str(name)[:1] != "_" and _is_plain(item)]


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, torch.Tensor) or (
        numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject
    )


def _is_set_by_calls(module: nn.Module, name: str) -> bool:
    """Check that code of torch's, such as a weight norm, or a method apart from `__init__` sets an attribute."""
    cls = plain_class(module)
    if cls.__module__.startswith("torch.") or module._parameters.keys() & {f"{name}_g", f"{name}_orig"}:
        return True
    known = _set.get(cls)
    if known is None:
        bases = [base for base in cls.__mro__ if base is not object and not base.__module__.startswith("torch.")]
        methods = [inspect.unwrap(member) for base in bases for at, member in vars(base).items() if at != "__init__"]
        steps = (step for method in methods if inspect.isfunction(method) for step in dis.get_instructions(method))
        known = _set[cls] = frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")
    return name in known


_set: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _is_plain(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) in _LISTS and all(map(_is_plain, value)))


def _is_constant(value: Any) -> bool:
    """Check for an immutable plain value. A list outside a function may as well be one that it writes to."""
    return type(value) in _SCALARS or (type(value) is tuple and all(map(_is_constant, value)))


def numerics() -> str:
    """Return torch's global settings of precision and device as a text."""
    said = [str(torch.get_default_dtype()), str(torch.get_default_device())]
    for device in ("cpu", "cuda", "mps", "xpu"):
        try:
            if torch.is_autocast_enabled(device):
                said.append(f"{device} {torch.get_autocast_dtype(device)}")
        except RuntimeError:  # this build of torch does not have the device
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
        (mkldnn, "allow_tf32"),  # XPU's
    ):
        said.append(_switch(holder, name))
    try:
        said.append(torch.get_float32_matmul_precision())
    except RuntimeError:  # like `allow_tf32`: it was set by the newer names, which are read above
        said.append("mixed")
    return " ".join(said)


def _switch(holder: Any, name: str) -> str:
    try:
        return str(getattr(holder, name, ""))
    except RuntimeError:  # it was set by a newer name, and torch refuses to read the older one
        return "mixed"


_told: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def function_words(function: Any) -> list[Any] | None:
    """Describe a function by its code, its defaults and the plain values in its closure.

    Returns:
        A list of plain values; `None` for a callable object, whose computation is unknown.
    """
    if isinstance(function, functools.partial):
        inner = function_words(function.func)
        values = [*function.args, *function.keywords.items()]
        return None if inner is None else [inner, [value for value in values if _is_plain(value)]]
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if code is None:
        kind = type(function)
        if kind.__module__.startswith("torch."):  # weight_norm and similar hooks of torch's own
            return [kind.__module__, kind.__qualname__, sorted(i for i in vars(function).items() if _is_plain(i[1]))]
        return None
    known = _told.get(function)
    if known is None or known[0] is not code:
        known = _told[function] = (code, hashlib.sha256(code_of(function).encode(errors="surrogatepass")).hexdigest())
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [value for name, value in around(function).items() if name in code.co_freevars]
    return [function.__module__, function.__qualname__, known[1], [value for value in values if _is_constant(value)]]


def around(function: Any) -> dict[str, Any]:
    """Return the globals and closure variables that a function reads and does not assign, by name."""
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
    """Return the names that code uses, nested code included, and the outer names that it assigns."""
    names = dict.fromkeys(code.co_names)
    assigned = {each.argval for each in dis.get_instructions(code) if each.opname in {"STORE_GLOBAL", "STORE_DEREF"}}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, also = _names(inner)
            names.update(dict.fromkeys(more))
            assigned |= also
    return tuple(names), frozenset(assigned)


def outside(function: Any) -> dict[str, Any]:
    """Return `around` of a function and of the functions of its module that it may call."""
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
    """Return the upper-case constants that a function and its helpers use, as texts."""
    return [f"{name} {value!r}" for name, value in outside(function).items() if name.isupper() and _is_constant(value)]
