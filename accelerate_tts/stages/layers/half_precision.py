"""Half-precision weights for the layers of a part, with fp32 everywhere else. For `balanced` and `fast`.

Convolutions and linear layers get a half-precision twin and do their work in it; all that a half-precision number
cannot carry stays in fp32: recurrent states, norms and other modules with weights of their own, Fourier transforms,
exponentials and logarithms. There are two ways, and the engine times them against each other:

- *layers*: each layer casts its input down and its output up. Everything between them stays as it is.
- *part*: activations stay in half precision from layer to layer, half the traffic; what cannot take it casts up for
  itself, and the part's own outputs come back in the dtype that they had.

Autocast is not used: around a part it was slower than fp32 (weights are cast at every call), around a whole pipeline it
breaks the inverse Fourier transform of vocoders. The fp32 weights stay where they are: state dict, pickling and undoing
are untouched, at the price of half the weights' size.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from accelerate_tts.inspection.classes import class_of, plain_class
from accelerate_tts.inspection.tracing import is_watched
from accelerate_tts.patching.class_swap import (
    COPY,
    HALF,
    CarryingSwap,
    fused_by,
    in_fused,
    is_fused,
    is_recorded,
    open_modules,
    per_class,
    subclass_with,
)
from accelerate_tts.patching.derived import Derived
from accelerate_tts.plan import CALL
from accelerate_tts.stages.base import BaseStage, are_left_over
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Target

__all__ = ["HalfStage"]


@register_stage
class HalfStage(BaseStage):
    """Half precision for a part.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
        carried: Whether activations stay in it between layers.
    """

    name = "half precision"
    group = "half precision"
    precisions = ("balanced", "fast")
    after = ("captured decode step", "growing cache")

    @classmethod
    def variants(cls, target: Target) -> Iterable[HalfStage]:
        """See `BaseStage.variants`: both ways, in each half precision."""
        return (cls(dtype, carried=carried) for dtype in target.half_dtypes for carried in (False, True))

    def __init__(self, dtype: torch.dtype, *, carried: bool) -> None:
        short = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(dtype)]
        self.name = f"{short} part" if carried else f"{short} layers"
        self._dtype = dtype
        self._carried = carried

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        return "its steps are recorded" if is_recorded(part.module) else self.obstacle(part)

    def obstacle(self, part: Part) -> str | None:
        """Why there is nothing to halve in a part, whether or not its steps are recorded now."""
        if any(fused_by(block).only_tokens for block in part.module.modules() if is_fused(block)):
            return "its blocks are fused"  # a copy of all their weights, for the sake of the prompts
        layers = _layers(part.module)
        if not layers:
            return "no layer that computes in fp32"
        return "next to nothing is left beside its fused blocks" if are_left_over(layers, part.module) else None

    def prepare(self, part: Part) -> CarryingSwap:
        """See `Stage.prepare`."""
        dtype, carried = self._dtype, self._carried
        layers = set(_layers(part.module))
        twins = {layer: Derived(layer, lambda module: _twin(module, dtype)) for layer in layers}
        if not carried:
            return CarryingSwap(list(layers), lambda m: _layer_class(class_of(m), dtype, carried=False), HALF, twins)
        fused = in_fused(part.module)  # each takes fp32, and is asked as a whole
        outermost = {block for block in fused if is_fused(block)}
        islands = {module for module in part.module.modules() if module not in fused and _is_island(module, layers)}
        islands |= outermost
        outer = {part.module} - layers
        # What an island computes with its own weights has to meet fp32 from its layers too.
        alone = {layer for island in islands - outermost for layer in island.children()} | {part.module}

        def swapped(module: nn.Module) -> type:
            if module in twins:
                return _layer_class(class_of(module), dtype, carried=module not in alone)
            return (
                _border_class(module, dtype, part.method) if module in outer else _island_class(class_of(module), dtype)
            )

        return CarryingSwap([*layers, *(islands - outer), *outer], swapped, HALF, twins)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers whose arithmetic is worth halving."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    known = {kind.forward for kind in kinds}
    return [
        inner
        for inner in open_modules(module)
        if isinstance(inner, kinds) and _in_fp32(inner) and (plain_class(inner).forward in known or _is_leaf(inner))
    ]


def _is_leaf(layer: nn.Module) -> bool:
    """Whether a layer with a forward of its own has nothing else that it could compute with.

    A causal convolution pads, a layer that could have an adapter has none: both do the same with half-precision
    weights. An adapter, or a quantised layer, does something that we do not know.
    """
    import torch
    from torch import nn

    tensors = {name for name, tensor in (*layer._parameters.items(), *layer._buffers.items()) if tensor is not None}
    return (
        not layer._modules
        and tensors <= {"weight", "bias"}
        and all(type(layer._parameters.get(name)) in {nn.Parameter, torch.Tensor} for name in tensors)
    )


def _in_fp32(layer: nn.Module) -> bool:
    import torch

    weight: Any = layer.weight
    return bool(weight.dtype == torch.float32)


def _is_island(module: nn.Module, layers: set[nn.Module]) -> bool:
    """Whether it is any other module with weights of its own: a norm, a recurrent net, an attention."""
    from torch.nn.utils.parametrize import ParametrizationList

    own = any(p is not None for p in (*module._parameters.values(), *module._buffers.values()))
    return own and module not in layers and not isinstance(module, ParametrizationList)


def _twin(module: Any, dtype: torch.dtype) -> Any:
    """A shallow copy of a layer with half-precision weights."""
    from torch.nn.utils.parametrize import is_parametrized

    plain = plain_class(module)
    # A folded weight is a buffer; one that a hook computes, a plain attribute.
    halves = {
        name: None if (value := getattr(module, name)) is None else value.detach().to(dtype)
        for name in ("weight", "bias")
    }
    # A parametrized layer computes its weight in a property of its own class.
    twin: Any = object.__new__(plain.__bases__[0] if is_parametrized(module) else plain)
    own = {name: value for name, value in vars(module).items() if name not in {*halves, COPY, HALF}}
    twin.__dict__ = {**own, "_parameters": {}, "_buffers": halves, "_modules": {}}
    return twin


@per_class
def _layer_class(plain: Any, dtype: torch.dtype, *, carried: bool) -> type:
    import torch

    taken = {torch.float32, dtype}

    def forward(self: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: A002 - torch's name
        half = getattr(self, HALF, None)  # a thread may be in here while another one switches the change off
        # torch's own error for it, or a layer that was moved to another dtype since; or that was given an adapter
        if (
            half is None
            or is_watched(input)
            or input.dtype not in taken
            or [name for name in self._modules if name != "parametrizations"]
        ):
            return plain.forward(self, input, *args, **kwargs)  # type: ignore[no-any-return]
        y = plain.forward(half.get(), input.to(dtype), *args, **kwargs)
        return y if carried else y.to(input.dtype)  # type: ignore[no-any-return]

    return subclass_with(plain, forward, copies=str(dtype))


@per_class
def _island_class(plain: Any, dtype: torch.dtype) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain.forward(self, *_raised(args, dtype), **_raised(kwargs, dtype))

    return subclass_with(plain, forward)


def _border_class(module: nn.Module, dtype: torch.dtype, method: str) -> type:
    name = "forward" if method == CALL else method
    plain, mode = getattr(type(module), name), _islands(dtype)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode():
            result = plain(self, *args, **kwargs)
        return _raised(result, dtype)

    return subclass_with(type(module), forward, method=name)


def _raised(value: Any, dtype: torch.dtype) -> Any:
    """The same with its half-precision tensors in fp32."""
    import torch
    from torch.nn.utils.rnn import PackedSequence
    from torch.utils import _pytree

    # A packed sequence is a leaf of the tree in torch 2.6, and a branch of it in 2.14.
    kinds = (torch.Tensor, PackedSequence)
    return _pytree.tree_map_only(kinds, lambda t: t.float() if _dtype_of(t) == dtype else t, value)


def _dtype_of(value: Any) -> torch.dtype:
    import torch

    return value.dtype if isinstance(value, torch.Tensor) else value.data.dtype


@cache
def _delicate() -> frozenset[Any]:
    """Functions that half precision breaks: no kernel for it (Fourier), or no range or digits (the others).

    None that writes in place: it would write into the copy.
    """
    import torch

    names = ["stft", "istft", "cumsum", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logsumexp"]
    names += ["sin", "cos", "pow"]
    functions = [getattr(holder, name) for holder in (torch, torch.Tensor) for name in names]
    functions += [torch.complex, torch.polar, torch.view_as_complex, torch.special.exp2]
    functions += [torch.Tensor.__pow__, torch.Tensor.__rpow__]
    functions += [getattr(torch.fft, name) for name in dir(torch.fft) if name.lstrip("ih").startswith(("fft", "rfft"))]
    return frozenset(functions)


@cache
def _products() -> frozenset[Any]:
    """Functions that multiply matrices of one dtype only.

    Upstream may rotate queries and keys by fp32 cosines and leave the values as they are (transformers before 4.54).
    """
    import torch

    names = ["matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "einsum"]
    functions = [getattr(holder, name) for holder in (torch, torch.Tensor) for name in names if hasattr(holder, name)]
    functions += [torch.Tensor.__matmul__, torch.Tensor.__rmatmul__]
    return frozenset([*functions, torch.nn.functional.scaled_dot_product_attention])


def _is_mixed(values: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Whether there are tensors of this dtype beside others in fp32; a list's tensors count, too (`einsum`)."""
    import torch

    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else (value,))]
    found = {item.dtype for item in flat if isinstance(item, torch.Tensor)}
    return dtype in found and torch.float32 in found


@cache
def _islands(dtype: torch.dtype) -> Any:
    from torch.overrides import TorchFunctionMode

    # Not sets: a compiler that traces the mode cannot read one.
    delicate, products = dict.fromkeys(_delicate()), dict.fromkeys(_products())

    class Islands(TorchFunctionMode):
        """Casts the arguments of delicate functions up while it is on, and those of products of mixed dtypes."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            kwargs = kwargs or {}
            # Half-precision complex numbers, as of `1j * phase`, have no kernels.
            up = function in delicate or any(isinstance(argument, complex) for argument in args)
            up = up or (function in products and _is_mixed((*args, *kwargs.values()), dtype))
            if up and "out" not in kwargs:
                args, kwargs = _raised(args, dtype), _raised(kwargs, dtype)
            return function(*args, **kwargs)

    return Islands
