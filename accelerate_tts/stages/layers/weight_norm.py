"""Weight-norm folding: compute `g * v / ||v||` once instead of at every call. Bit-exact.

Both of torch's interfaces are folded: `torch.nn.utils.weight_norm` (a pre-forward hook) and
`torch.nn.utils.parametrizations.weight_norm` (a property of a class made for that module).

Removing the norm, as `remove_weight_norm` does, changes the keys of the state dict. Here the parameters stay in place,
and the product is a non-persistent buffer. `state_dict`, `load_state_dict`, `.to()` and `named_parameters` work as
before, and a pickled or copied module is unfolded. Each read of the weight checks the factors (weight_versions.py) and
recomputes the product if they were written. With gradients on, and under tracing, the weight is computed at each call,
as upstream does.
"""

from __future__ import annotations

import copy
import copyreg
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.patching.class_swap import per_class, unannounced
from accelerate_tts.patching.weight_versions import Weights
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part

__all__ = ["FoldStage", "has_folds"]

_FOLD = "_accelerate_tts_fold"
# Containers in a module's __dict__ that a fold changes.
_EDITED = {"_forward_pre_hooks", "_buffers", "_non_persistent_buffers_set"}


@register_stage
class FoldStage(BaseStage):
    """Folds every weight norm inside a part."""

    name = "fold weight norm"
    least_share = 0.0

    def applies(self, part: Part) -> str | None:
        return None if _foldable(part.module) else "no weight norm in it"

    def prepare(self, part: Part) -> _Folds:
        return _Folds(_foldable(part.module))


class _Folds(BaseChange):
    def __init__(self, folds: list[_Fold]) -> None:
        self._folds = folds

    def on(self) -> None:
        for fold in self._folds:
            fold.on()

    def off(self) -> None:
        for fold in reversed(self._folds):
            fold.off()


def has_folds(module: nn.Module) -> bool:
    """Check that a weight inside a module is folded now. A compiled graph treats it as a plain weight."""
    return any(_FOLD in vars(inner) for inner in module.modules())


def _foldable(module: nn.Module) -> list[_Fold]:
    folds: list[_Fold] = []
    for inner in module.modules():
        if _FOLD in vars(inner):
            continue
        hooks = [hook for hook in inner._forward_pre_hooks.items() if type(hook[1]).__name__ == "WeightNorm"]
        if len(hooks) == 1 and hasattr(hooks[0][1], "compute_weight"):
            folds.append(_HookFold(inner, *hooks[0]))
            continue
        parametrized = getattr(inner, "parametrizations", None) or {}
        if len(parametrized) == 1:  # a second parametrized tensor still needs the class
            name, steps = next(iter(parametrized.items()))
            if len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm":
                folds.append(_ParametrizationFold(inner, name))
    return folds


class _Fold:
    """The fold of one tensor of one module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.own_class = type(module)
        self._on = False
        # The product, and the versions of its factors. One pair, replaced atomically.
        self._made: tuple[Weights, Any] | None = None

    def weight(self) -> Any:
        """Compute the folded tensor by torch's own operation."""
        raise NotImplementedError

    def factors(self) -> list[dict[str, Any]]:
        """Return the parameter dictionaries that hold the factors."""
        raise NotImplementedError

    def plain_class(self) -> type:
        """Return the class without the weight norm."""
        raise NotImplementedError

    def detach(self, module: nn.Module) -> None:
        """Remove the weight norm's hook, if it has one."""

    def attach(self, module: nn.Module) -> None:
        """Restore the weight norm's hook, if it has one."""

    def on(self) -> None:
        if self._on:
            return
        module = self.module
        self.own_class = type(module)  # read again: another change may have been switched since __init__
        weight = self.product()
        self.detach(module)
        module.__class__ = _folded_class(self.plain_class(), self.name)
        module._buffers[self.name] = weight
        module._non_persistent_buffers_set.add(self.name)
        vars(module)[_FOLD] = self
        self._on = True

    def off(self) -> None:
        if self._on:
            self.unfold(self.module)
            self._on = False

    def unfold(self, module: nn.Module) -> None:
        """Undo the fold on `module`, which is the folded module or a shallow copy of it."""
        del vars(module)[_FOLD]
        del module._buffers[self.name]
        module._non_persistent_buffers_set.discard(self.name)
        module.__class__ = self.own_class
        self.attach(module)

    def product(self) -> Any:
        """Return the folded tensor; recompute it if a factor was written or replaced."""
        made = self._made
        if made is None or made[0].outdated():
            # A normal tensor, even if tuning runs in inference mode, since it outlives that scope.
            with torch.inference_mode(mode=False), torch.no_grad():
                made = self._made = (Weights.at(self.factors()), self.weight().detach().clone())
        return made[1]

    def current(self) -> Any:
        """Return the weight for a read."""
        buffers = self.module._buffers
        if torch.compiler.is_compiling():  # the compiled callers check at each call (`has_folds`)
            return buffers[self.name]
        if torch.is_grad_enabled() or is_traced():
            return self.weight()
        weight = self.product()
        if buffers.get(self.name) is not weight:
            buffers[self.name] = weight
        return weight


class _HookFold(_Fold):
    """`torch.nn.utils.weight_norm`: a pre-forward hook that writes a plain attribute at every call."""

    def __init__(self, module: nn.Module, number: int, hook: Any) -> None:
        super().__init__(module, hook.name)
        self._number = number
        self._hook = hook
        self._order = list(module._forward_pre_hooks)
        self._attribute: Any = None

    def weight(self) -> Any:
        return self._hook.compute_weight(self.module)

    def factors(self) -> list[dict[str, Any]]:
        return [self.module._parameters]

    def plain_class(self) -> type:
        return self.own_class

    def detach(self, module: nn.Module) -> None:
        del module._forward_pre_hooks[self._number]
        self._attribute = vars(module).pop(self.name)

    def attach(self, module: nn.Module) -> None:
        vars(module)[self.name] = self._attribute
        hooks = module._forward_pre_hooks
        now = {**hooks, self._number: self._hook}
        later = [number for number in now if number not in self._order]
        hooks.clear()  # restores the hook's place; hooks registered since then come behind
        hooks.update({number: now[number] for number in [*self._order, *later] if number in now})


class _ParametrizationFold(_Fold):
    """`torch.nn.utils.parametrizations.weight_norm`: a property of a class that torch made for this module."""

    def weight(self) -> Any:
        return self._parametrization()

    def factors(self) -> list[dict[str, Any]]:
        return [inner._parameters for inner in self._parametrization.modules()]

    def plain_class(self) -> type:
        return self.own_class.__bases__[0]

    @property
    def _parametrization(self) -> Any:
        lists: Any = self.module.parametrizations
        return lists[self.name]


@per_class
def _folded_class(plain: type, name: str) -> type:
    def weight(self: Any) -> Any:
        fold: Any = vars(self).get(_FOLD)
        # A half-precision copy shares the fold with its module, and a user may have set a weight of their own.
        if fold is not None and fold.module is self and name in self._buffers:
            return fold.current()
        return self.__getattr__(name)

    def untouched(self: Any) -> Any:
        fold = vars(self)[_FOLD]
        twin = fold.own_class.__new__(fold.own_class)
        twin.__dict__ = {
            # The containers that unfold() edits are copied; all else is shared.
            key: copy.copy(value) if key in _EDITED else value
            for key, value in vars(self).items()
        }
        fold.unfold(twin)
        return twin

    def reduce_ex(self: Any, _protocol: int) -> Any:
        twin = untouched(self)
        # Not the copy's own __reduce_ex__: pickle requires that its __newobj__ makes an object of this class.
        return copyreg._reconstructor, (type(twin), object, None), twin.__getstate__()  # type: ignore[attr-defined]

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(untouched(self), memo)

    return unannounced(plain, {name: property(weight), "__reduce_ex__": reduce_ex, "__deepcopy__": deepcopy})
