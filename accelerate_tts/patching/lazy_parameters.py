# ruff: noqa: D102 - dict has documented its methods
"""Lazy parameters: original weights that are freed, and reloaded by the user's load function on access.

`balanced` and `fast` compute from copies of the weights. A layer's `_parameters` is then a `LazyParameters`, a
dictionary that knows the names and reloads the tensors on access. `state_dict`, `parameters()`, `.to()`, pickling,
`layer.weight` and torch's own forward all go through it, so a read never finds a wrong or missing tensor. A tensor that
other code holds stays alive, and is not freed.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.errors import ReloadError
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.locks import rlock
from accelerate_tts.storage.tensor_bytes import content_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

_LEAST = 1 << 16  # bytes; smaller weights are not worth freeing


class LazyParameters(dict[str, Any]):
    """A module's `_parameters` while some of them are offloaded.

    The base dictionary is empty. Names are read from `own`, and access to an offloaded tensor reloads it first.

    Args:
        own: The module's own dictionary, with `None` for offloaded parameters.
        away: Names of the offloaded parameters.
        reload: Reloads them into `own`.
    """

    __slots__ = ("_away", "_own", "_reload")

    def __init__(self, own: dict[str, Any], away: frozenset[str], reload: Callable[[str], None]) -> None:
        super().__init__()
        self._own = own
        self._away = away
        self._reload = reload

    def _all(self) -> dict[str, Any]:
        self._reload(", ".join(sorted(self._away)))
        return self._own

    def __getitem__(self, name: str) -> Any:
        return (self._all() if name in self._away else self._own)[name]

    def get(self, name: str, default: Any = None) -> Any:
        return (self._all() if name in self._away else self._own).get(name, default)

    def __or__(self, other: Any) -> Any:
        return self._all() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._all()

    def __ior__(self, other: Any) -> Any:
        self._all().update(other)
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or self._all() == other

    __hash__ = None

    def __repr__(self) -> str:
        return f"LazyParameters({list(self._own)})"

    def __copy__(self) -> dict[str, Any]:
        return self._all().copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._all(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self._all()),)


# dict's other methods: those that read names are of the own dictionary, all others reload the tensors first.
_OF_NAMES = ("__contains__", "__len__", "__iter__", "__reversed__", "keys")
_OF_TENSORS = (
    "items", "values", "__setitem__", "__delitem__", "pop", "popitem", "setdefault", "update", "clear", "copy",
)  # fmt: skip


def _forwarded(name: str) -> Callable[..., Any]:
    reloads, method = name in _OF_TENSORS, getattr(dict, name)

    def call(self: LazyParameters, *args: Any, **kwargs: Any) -> Any:
        return method(self._all() if reloads else self._own, *args, **kwargs)

    return call


for _name in (*_OF_NAMES, *_OF_TENSORS):
    setattr(LazyParameters, _name, _forwarded(_name))


@dataclass
class Layer:
    """A layer and those of its weights that can be offloaded.

    Attributes:
        module: The layer.
        root: Path of its outermost module in the loaded object.
        path: Its path in that module.
        digests: SHA-256 of the bytes of each weight, by name.
        device: Device of the weights.
        own: Its `_parameters`.
    """

    module: nn.Module
    root: str
    path: str
    digests: dict[str, bytes]
    device: torch.device
    own: dict[str, Any]

    def same_weights(self, found: Mapping[str, nn.Module]) -> dict[str, torch.nn.Parameter]:
        """Return the same weights from a reloaded object.

        Raises:
            ReloadError: A weight is missing or differs, or the load function returns the object that is loaded already.
        """
        try:
            layer = found[self.root].get_submodule(self.path)
        except (KeyError, AttributeError):
            layer = None
        weights: dict[str, Any] = {} if layer is None else {name: layer._parameters.get(name) for name in self.digests}
        label = ".".join(filter(None, (self.root, self.path))) or "the model itself"
        if layer is self.module:
            raise ReloadError(f"its load function gives what is loaded already ({label}); it must load another one")
        for name, digest in self.digests.items():
            weight = weights.get(name)
            if weight is None or weight.device != self.device or content_digest(weight) != digest:
                raise ReloadError(f"its load function gives other weights than before ({name} of {label})")
        return weights


def layers_of(
    found: Mapping[str, nn.Module], complete: Callable[[nn.Module], bool], besides: set[nn.Module]
) -> list[Layer]:
    """Return the layers whose original weights are not read while copies serve.

    Args:
        found: The outermost modules, by path.
        complete: Checks that a layer computes all inputs from copies.
        besides: Layers to skip.
    """
    layers: list[Layer] = []
    for root, outer in found.items():
        for path, module in outer.named_modules():
            own = module._parameters
            weights = {name: weight for name, weight in own.items() if weight is not None and _can_go(weight)}
            if weights and type(own) is dict and module not in besides and complete(module):
                digests = {name: content_digest(weight) for name, weight in weights.items()}
                device = next(iter(weights.values())).device
                layers.append(Layer(module, root, path, digests, device, own))
    return layers


def _can_go(weight: torch.Tensor) -> bool:
    if type(weight) is not torch.nn.Parameter or weight.layout != torch.strided or weight.device.type == "meta":
        return False
    storage = weight.untyped_storage()
    # Reloaded weights would no longer share memory with views or other processes.
    return storage.nbytes() == _bytes(weight) >= _LEAST and not storage.is_shared()


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


class WeightOffloader:
    """Offloads the weights of one tuned object and reloads them.

    Args:
        what: The object's name in events.
        layers: The layers.
        again: Loads the object again; see `Reloader.modules`.
    """

    def __init__(self, what: str, layers: list[Layer], again: Callable[[], dict[str, nn.Module]]) -> None:
        self._what = what
        self._layers = layers
        self._again = again
        # Reentrant: the load function may read the object, and the collector may close a stream on the same thread.
        self._lock = rlock()
        self._gone: list[tuple[Layer, frozenset[str]]] = []
        self._state: list[tuple[int, int]] | None = None
        self._over = False
        self._pins: set[int] = set()

    @property
    def gone(self) -> bool:
        """True while any weight is offloaded."""
        return bool(self._gone)

    def check(self) -> None:
        """Load the weights once to check that they can be reloaded.

        Raises:
            ReloadError: The load function fails or returns other weights.
        """
        found = self._again()
        for layer in self._layers:
            layer.same_weights(found)

    def free(self) -> int:
        """Free the weights that no other code holds, unless one was written or read since.

        The changes must be on, and each layer must have its copy.

        Returns:
            Bytes freed.
        """
        # Does not block: the collector may call this on a thread that holds another lock.
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            written = self._state is not None and self._state != self._now()
            return 0 if self._over or self._pins or self._gone or written else sum(map(self._free, self._layers))
        finally:
            self._lock.release()

    def _free(self, layer: Layer) -> int:
        own, names = layer.own, frozenset(layer.digests)
        sizes = {name: _bytes(own[name]) for name in names}
        # First, so that a concurrent read waits for the lock and reloads them.
        vars(layer.module)["_parameters"] = LazyParameters(own, names, self._needed)
        for name in names:
            known = weakref.ref(own[name])
            own[name] = None
            own[name] = known()  # still alive if other code holds it; freeing it saves nothing
        gone = frozenset(name for name in names if own[name] is None)
        if gone:
            vars(layer.module)["_parameters"] = LazyParameters(own, gone, self._needed)
            self._gone.append((layer, gone))
        else:
            vars(layer.module)["_parameters"] = own
        return sum(sizes[name] for name in gone)

    def at_hand(self) -> object:
        """Reload the weights and keep them as long as the returned object lives.

        Raises:
            ReloadError: They cannot be reloaded.
        """
        pin = _Pin(self)
        self._reload()
        return pin

    def keep(self) -> None:
        """Reload the weights and keep them for good.

        Raises:
            ReloadError: They cannot be reloaded.
        """
        self._reload()
        self._over = True

    def pin(self, number: int) -> None:
        """Keep the weights in memory until `unpin`."""
        self._pins.add(number)

    def unpin(self, number: int) -> None:
        """Remove a pin; offload the weights again after the last one."""
        self._pins.discard(number)
        if not self._pins:
            self.free()

    def _reload(self) -> None:
        with self._lock:
            if not self._gone:
                return
            found = self._again()
            fresh = [layer.same_weights(found) for layer, _ in self._gone]  # all are checked before any is put in place
            for (layer, names), weights in zip(self._gone, fresh, strict=True):
                layer.own.update((name, weights[name]) for name in names)
                vars(layer.module)["_parameters"] = layer.own
            self._gone = []
            self._state = self._now()

    def _needed(self, names: str) -> None:
        with self._lock:
            asked = bool(self._gone)
            self._reload()
            self._over = self._over or asked
        if asked:
            emit(
                NotApplied(
                    f"guard_weights='reload' of {self._what}",
                    f"something read the {names} of a layer that computes from copies; the loaded weights were loaded"
                    " again, and stay in memory",
                )
            )

    def _now(self) -> list[tuple[int, int]]:
        tensors = [layer.own.get(name) for layer in self._layers for name in layer.digests]
        return [(0, 0) if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


class _Pin:
    """Keeps weights in memory while it lives."""

    __slots__ = ("_offloader",)

    def __init__(self, offloader: WeightOffloader) -> None:
        self._offloader = offloader
        offloader.pin(id(self))

    def __del__(self) -> None:
        self._offloader.unpin(id(self))
