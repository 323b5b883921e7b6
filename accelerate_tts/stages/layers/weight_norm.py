"""Weight-norm folding: compute `g * v / ||v||` once instead of at every call. Bit-exact.

Both of torch's interfaces are folded: `torch.nn.utils.weight_norm` (a pre-forward hook) and
`torch.nn.utils.parametrizations.weight_norm` (a list of parametrizations, which a property of the module runs).

The hook or the list gets a class that keeps its product; the module, its parameters and its class stay as they are. So
`state_dict`, `load_state_dict`, `.to()`, `named_parameters` and torch's own ways to add and remove a norm work as
before, and a pickled or copied module is unfolded. Each run checks the factors (weight_versions.py) and recomputes the
product if they were written. With gradients on, and under tracing, the weight is computed at each call, as upstream
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.inspection.classes import reduction_of, twin_of
from accelerate_tts.inspection.signatures import calls_others
from accelerate_tts.inspection.tracing import is_watched
from accelerate_tts.patching.change import BaseChange, Changes
from accelerate_tts.patching.class_swap import per_class, unannounced
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from accelerate_tts.plan import Part

_OURS = _FOLD, _PRODUCT = "_accelerate_tts_fold", "_accelerate_tts_product"


@register_stage
class FoldStage(BaseStage):
    """Folds every weight norm inside a part."""

    name = "fold weight norm"
    least_share = 0.0

    def applies(self, part: Part) -> str | None:
        return None if _foldable(part.module) else "no weight norm in it"

    def prepare(self, part: Part) -> Changes:
        return Changes(*_foldable(part.module))


def has_folds(module: nn.Module) -> bool:
    """Check that a weight inside a module is folded now. A compiled graph treats it as a plain weight."""
    return any(
        _FOLD in vars(holder)
        for inner in module.modules()
        for holder in (inner, *inner._forward_pre_hooks.values())
        if hasattr(holder, "__dict__")
    )


def _norms(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the modules with a weight norm, each with the hook or the list of parametrizations that computes it."""
    for inner in module.modules():
        hooks = [hook for hook in inner._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm"]
        if len(hooks) == 1 and hasattr(hooks[0], "compute_weight"):
            yield inner, hooks[0]
            continue
        lists: Any = getattr(inner, "parametrizations", None) or {}
        if len(lists) == 1:
            steps = next(iter(lists.values()))
            if len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm":
                yield inner, steps


def _foldable(module: nn.Module) -> list[_Fold]:
    return [
        _ListFold(inner, norm) if hasattr(norm, "_parameters") else _HookFold(inner, norm)
        for inner, norm in _norms(module)
        if _FOLD not in vars(norm)
    ]


class _Fold(BaseChange):
    """The fold of one weight of one module.

    Args:
        module: The module.
        norm: The hook, or the list of parametrizations, that computes the weight.
    """

    def __init__(self, module: nn.Module, norm: Any) -> None:
        self.module = module
        self._norm = norm
        self._class: type | None = None
        # Watches on the factors and on the product, the steps that it was made by, and the product. One tuple, replaced
        # atomically.
        self._made: tuple[WeightWatch, WeightWatch, list[Any], torch.Tensor] | None = None

    def weight(self) -> Any:
        """Compute the weight by torch's own operation."""
        raise NotImplementedError

    def factors(self) -> list[dict[str, Any]]:
        """Return the parameter dictionaries that hold the factors."""
        raise NotImplementedError

    def steps(self) -> list[Any]:
        """Return the objects that the weight is computed by."""
        return []

    def folded(self, plain: type) -> type:
        """Return the class of the hook or list while the fold is on."""
        raise NotImplementedError

    def place(self, product: torch.Tensor) -> None:
        """Put the product where a compiler finds a weight: in an attribute of a module."""
        raise NotImplementedError

    def is_there(self) -> bool:
        """Check that the module still has this norm: it may have been removed while the fold was off."""
        raise NotImplementedError

    def on(self) -> None:
        if _FOLD in vars(self._norm) or not self.is_there():
            return
        folded, product = self.folded(type(self._norm)), self.product()
        self._class = type(self._norm)
        vars(self._norm)[_FOLD] = self  # first: `off` takes back what an interruption has left
        self.place(product)
        self._norm.__class__ = folded

    def off(self) -> None:
        if self._class is not None and vars(self._norm).get(_FOLD) is self:
            # A class that others have derived from ours meanwhile, as for a parametrized factor, stays: without the
            # fold it computes as upstream's.
            if type(self._norm) is self.folded(self._class):
                self._norm.__class__ = self._class
            vars(self._norm).pop(_PRODUCT, None)
            del vars(self._norm)[_FOLD]  # last: it is repeated after an interruption

    def product(self) -> torch.Tensor:
        """Return the folded weight; recompute it if a factor was written or replaced."""
        made = self._made
        # Whoever writes to a weight that upstream computes at each call has no effect on the next call.
        if made is None or made[0].outdated() or made[1].outdated() or made[2] != self.steps():
            # A normal tensor, even if tuning runs in inference mode, since it outlives that scope.
            with torch.inference_mode(mode=False), torch.no_grad():
                watched = WeightWatch.at(
                    self.factors()
                )  # first the watch, so that a concurrent write is seen next time
                product = self.weight().detach().clone()
                made = self._made = (watched, WeightWatch.at([{"": product}]), self.steps(), product)
        return made[3]


class _HookFold(_Fold):
    """`torch.nn.utils.weight_norm`: a pre-forward hook that writes a plain attribute at every call."""

    def weight(self) -> Any:
        return self._norm.compute_weight(self.module)

    def is_there(self) -> bool:
        return any(hook is self._norm for hook in self.module._forward_pre_hooks.values())

    def factors(self) -> list[dict[str, Any]]:
        return [self.module._parameters]

    def folded(self, plain: type) -> type:
        return _hook_class(plain)

    def place(self, product: torch.Tensor) -> None:
        if vars(self.module).get(self._norm.name) is not product:
            setattr(self.module, self._norm.name, product)


class _ListFold(_Fold):
    """`torch.nn.utils.parametrizations.weight_norm`: a list of one step, which others may be added to."""

    def weight(self) -> Any:
        plain: Any = self._class or type(self._norm)
        return plain.forward(self._norm)

    def is_there(self) -> bool:
        lists: Any = getattr(self.module, "parametrizations", None) or {}
        return any(steps is self._norm for steps in lists.values())

    def factors(self) -> list[dict[str, Any]]:
        return [inner._parameters for inner in self._norm.modules()]

    def steps(self) -> list[Any]:
        return list(self._norm._modules.values())

    def folded(self, plain: type) -> type:
        return _list_class(plain)

    def place(self, product: torch.Tensor) -> None:
        if vars(self._norm).get(_PRODUCT) is not product:
            vars(self._norm)[_PRODUCT] = product


@per_class
def _hook_class(plain: Any) -> type:
    def run(self: Any, module: Any, inputs: Any) -> None:
        fold = vars(self).get(_FOLD)
        # A half-precision copy shares the hook with its module.
        if (
            fold is None
            or fold.module is not module
            or is_watched()
            or (not torch.compiler.is_compiling() and torch.is_grad_enabled())
        ):
            plain.__call__(self, module, inputs)
        elif not torch.compiler.is_compiling():  # the compiled callers check at each call (`has_folds`)
            fold.place(fold.product())

    return unannounced(plain, {"__call__": run, "__reduce_ex__": _reduced(plain)})


@per_class
def _list_class(plain: Any) -> type:
    def forward(self: Any) -> Any:
        fold = vars(self).get(_FOLD)
        if fold is None or is_watched():  # another thread has switched the fold off, or upstream's operators are wanted
            return plain.forward(self)
        if torch.compiler.is_compiling():
            return self._accelerate_tts_product  # as above
        if torch.is_grad_enabled() or calls_others(*fold.steps()):
            return plain.forward(self)
        product = fold.product()
        fold.place(product)
        return product

    def prepare_scriptable(self: Any) -> Any:
        return twin_of(self, plain, _OURS)  # torch.jit.script compiles the source of a forward

    return unannounced(
        plain, {"forward": forward, "__reduce_ex__": _reduced(plain), "__prepare_scriptable__": prepare_scriptable}
    )


def _reduced(plain: type) -> Any:
    def reduce_ex(self: Any, _protocol: int) -> Any:
        return reduction_of(self, plain, _OURS)

    return reduce_ex
