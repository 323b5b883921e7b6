"""Values derived from a module's weights (a half-precision copy, packed integers), kept up to date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.signatures import calls_others
from accelerate_tts.patching.class_swap import CARRIED
from accelerate_tts.patching.lazy_parameters import LazyParameters
from accelerate_tts.patching.structure_watch import plain_attributes
from accelerate_tts.patching.weight_versions import WeightWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

T = TypeVar("T")


class Derived(Generic[T]):
    """A value that is computed from a module at first use, and again after its weights or plain attributes changed.

    Those of modules inside count, too: a parametrization may be switched by an attribute (minLoRA does so).

    Args:
        module: The module. Each `get` checks its tensors, so it should be small.
        make: Computes the value; runs without autograd.
    """

    def __init__(self, module: nn.Module, make: Callable[[Any], T]) -> None:
        self._module = module
        self._make = make
        self._made: tuple[WeightWatch, _Attributes, bool, T] | None = None

    def get(self) -> T:
        """Return the value for the present weights and attributes."""
        made = self._made
        # A compiler cannot trace the check; the callers of compiled code do it at each call (`keeps_copies`).
        # Offloaded weights (`LazyParameters`) cannot have been written, and reading them would reload them.
        if made is not None and (
            torch.compiler.is_compiling()
            or type(self._module._parameters) is LazyParameters
            or not (made[0].outdated() or made[1].differ() or made[2] or self._is_hooked())
        ):
            return made[3]
        # Normal tensors, even if tuning runs in inference mode, since they outlive that scope.
        with torch.inference_mode(mode=False), torch.no_grad():
            weights = WeightWatch(self._module)  # first the watch, so that a concurrent write is seen next time
            attributes = _Attributes(self._module)
            hooked = self._is_hooked()
            value = self._make(self._module)
        self._made = (weights, attributes, hooked, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as `None`: a class that other code gave the module since copies all of its attributes."""
        return type(None), ()

    def _is_hooked(self) -> bool:
        """Check for a user's code at the calls of modules inside, whose results are computed anew at each call."""
        inside = self._module._modules
        return bool(inside) and calls_others(*(inner for inner in self._module.modules() if inner is not self._module))


class _Attributes:
    """The attributes of a module and those inside that their forwards may read beside the weights.

    A forward of torch's own reads numbers and texts. Any other may read any attribute, and ones that are set later: an
    adapter whose tensors are no parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._values: list[tuple[dict[str, Any], str, Any]] = []
        self._names: list[tuple[dict[str, Any], frozenset[str]]] = []
        for inner in module.modules():
            own = vars(inner)
            found = plain_attributes(inner, training=inner is not module)
            if not plain_class(inner).__module__.startswith("torch."):
                self._names.append((own, frozenset({*own, *CARRIED})))
                found += [(name, own[name]) for name in own.keys() - _TORCHS_OWN - {*CARRIED, *dict(found)}]
            self._values += [(own, name, value) for name, value in found]

    def differ(self) -> bool:
        """Check whether one was replaced, or another one was set."""
        return bool(
            [1 for own, name, value in self._values if own.get(name) is not value]
            or [1 for own, names in self._names if not own.keys() <= names]
        )


_TORCHS_OWN = vars(torch.nn.Module()).keys()
