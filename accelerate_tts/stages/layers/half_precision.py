"""Half-precision weights for the layers of a part, with fp32 everywhere else. For `balanced` and `fast`.

Convolutions and linear layers compute with half-precision copies of their weights. Operations that need the range or
precision of fp32 stay in it: recurrent states, norms and other modules with weights of their own, Fourier transforms,
exponentials and logarithms. There are two variants, and tuning times them against each other:

- *layers*: each layer casts its input down and its output up. Everything between layers stays in fp32.
- *part*: activations stay in half precision between layers, at half the memory traffic. Operations that need fp32 cast
  their inputs up, and the part's outputs are fp32 again.

Autocast is not used. Around a part it was slower than fp32, since weights are cast at every call; around a whole
pipeline it breaks the inverse Fourier transform of vocoders. The fp32 weights stay in place for the state dict,
pickling and undo, so the copies cost half the weights' size.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn, overrides
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from accelerate_tts.inspection.classes import class_of, plain_class, twin_of
from accelerate_tts.inspection.routers import routers
from accelerate_tts.inspection.signatures import sets_attributes
from accelerate_tts.inspection.tracing import KEEPS_KERNELS, is_plain, is_watched
from accelerate_tts.patching.class_swap import (
    COPY,
    HALF,
    CarryingSwap,
    call_patched,
    fused_by,
    in_fused,
    is_fused,
    open_modules,
    per_class,
    subclass_with,
)
from accelerate_tts.patching.derived import Derived
from accelerate_tts.patching.lazy_parameters import LazyParameters
from accelerate_tts.plan import CALL
from accelerate_tts.stages.base import BaseStage, are_left_over
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import State, Target


@register_stage
class HalfStage(BaseStage):
    """Half precision for a part.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
        carried: Keep activations in it between layers.
    """

    name = "half precision"
    group = "half precision"
    precisions = ("balanced", "fast")
    excluded_by: tuple[State, ...] = ("recorded",)
    after = ("captured decode step", "recorded by shape", "growing cache")

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
        if any(fused_by(block).only_tokens for block in part.module.modules() if is_fused(block)):
            return "its blocks are fused"  # prefill alone would not justify copies of all weights
        layers = _layers(part.module)
        if not layers:
            return "no layer that computes in fp32"
        return "next to nothing is left beside its fused blocks" if are_left_over(layers, part.module) else None

    def prepare(self, part: Part) -> CarryingSwap:
        dtype, carried = self._dtype, self._carried
        found = _layers(part.module)
        layers = set(found)
        twins = {layer: Derived(layer, lambda module: half_copy(module, dtype)) for layer in layers}
        if not carried:
            return CarryingSwap(list(layers), lambda m: _layer_class(class_of(m), dtype, carried=False), HALF, twins)
        fused = in_fused(part.module)  # a fused block takes fp32, and is one unit
        outermost = {block for block in fused if is_fused(block)}
        islands = {module for module in part.module.modules() if module not in fused and _is_island(module, layers)}
        islands |= outermost
        outer = {part.module} - layers
        # An island computes with its own fp32 weights, so its layers must return fp32 to it.
        alone = {layer for island in islands - outermost for layer in island.children()} | {part.module}

        def swapped(module: nn.Module) -> type:
            if module in twins:
                return _layer_class(class_of(module), dtype, carried=module not in alone)
            if module in outer:
                return _border_class(module, dtype, part.method, found)
            return _island_class(class_of(module), dtype)

        return CarryingSwap([*layers, *(islands - outer), *outer], swapped, HALF, twins)


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the fp32 convolutions and linear layers outside fused blocks and routers."""
    choosing = routers(module)
    return [
        inner
        for inner in open_modules(module)
        if isinstance(inner, _KINDS)
        and inner not in choosing
        and is_plain(weight := inner.weight)  # a layer may have no weight, or one that torchao has quantised
        and weight.dtype == torch.float32
        and _is_known(inner)
    ]


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _is_known(layer: nn.Module) -> bool:
    """Check that a layer's forward reads no tensors but weight and bias."""
    return plain_class(layer).forward in {kind.forward for kind in _KINDS} or _is_leaf(layer)


def _is_leaf(layer: nn.Module) -> bool:
    """Check that a layer with a custom forward has no tensors but weight and bias, and no submodules.

    A causal convolution only pads, and an adapter layer without adapters is a plain one: both work with half-precision
    weights. The forward of an active adapter or of a quantised layer is unknown. One that sets attributes (a streaming
    convolution keeps the end of its input) would set those of the copy.
    """
    tensors = {name for name, tensor in (*layer._parameters.items(), *layer._buffers.items()) if tensor is not None}
    return (
        next(layer.children(), None) is None
        and tensors <= {"weight", "bias"}
        and all(type(layer._parameters.get(name)) in {nn.Parameter, torch.Tensor} for name in tensors)
        and not sets_attributes(plain_class(layer))
    )


def _is_cast(layers: Iterable[nn.Module]) -> bool:
    """Check that layers were cast to half precision since, by the first parameter that is a plain tensor.

    A weight that a hook computes is that of the last call. One that torchao has quantised keeps its dtype in a cast.
    """
    for layer in layers:
        if type(layer._parameters) is LazyParameters:  # reading offloaded weights would reload them
            return False
        for tensor in chain(layer.parameters(), layer.buffers()):  # the weight may be a buffer
            if is_plain(tensor):
                return tensor.dtype in {torch.bfloat16, torch.float16}
    return False


def _is_island(module: nn.Module, layers: set[nn.Module]) -> bool:
    """Check for any other module with weights of its own: a norm, a recurrent net, an attention."""
    own = any(p is not None for p in (*module._parameters.values(), *module._buffers.values()))
    return own and module not in layers and not isinstance(module, ParametrizationList)


def half_copy(module: Any, dtype: torch.dtype) -> Any:
    """Make a shallow copy of a layer with half-precision weights.

    Returns:
        `None` if the layer's own are such, or not plain (sparse), or if it was given other tensors that it may read.
    """
    if _is_cast([module]) or not is_plain(module.weight) or not _is_known(module):
        return None
    plain = plain_class(module)
    # A folded weight is a buffer, and one that a hook computes is a plain attribute.
    halves = {
        name: None if (value := getattr(module, name)) is None else value.detach().to(dtype)
        for name in ("weight", "bias")
    }
    # A parametrized layer computes its weight in a property of its own class.
    twin = twin_of(module, plain.__bases__[0] if is_parametrized(module) else plain, {*halves, COPY, HALF})
    # A forward may look for a parameter or a module that the layer does not have: an adapter that was taken out.
    absent = {name: None for own in (module._parameters, module._buffers) for name in own if own[name] is None}
    removed = {name: None for name, inner in module._modules.items() if inner is None}
    vars(twin).update(_parameters={}, _buffers={**absent, **halves}, _modules=removed)
    return twin


@per_class
def _layer_class(plain: Any, dtype: torch.dtype, *, carried: bool) -> type:

    taken, own = {torch.float32, dtype}, plain.forward

    def forward(self: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: A002 - torch's name
        if plain.forward is not own:
            return call_patched(plain, self, input, *args, **kwargs)  # type: ignore[no-any-return]
        half = getattr(self, HALF, None)  # another thread may have switched the change off
        # Other dtypes get torch's own error; the layer may also have been cast, or been given an adapter.
        if (
            half is None
            or torch.is_grad_enabled()  # copies have no gradients
            or _is_autocast()
            or is_watched(input)
            or input.dtype not in taken
            or [name for name, inner in self._modules.items() if inner is not None and name != "parametrizations"]
        ):
            return plain.forward(self, input, *args, **kwargs)  # type: ignore[no-any-return]
        twin = half.get()
        if twin is None:
            return plain.forward(self, input, *args, **kwargs)  # type: ignore[no-any-return]
        y = plain.forward(twin, input.to(dtype), *args, **kwargs)
        # Only a call of the part raises what comes out. A service may call another method, or a module inside, too.
        if carried and _is_inside(dtype):
            return y  # type: ignore[no-any-return]
        # A forward of its own may return several tensors (transformers' `Llama4Router`).
        return y.to(input.dtype) if isinstance(y, torch.Tensor) else _cast(y, {dtype}, input.dtype)

    return subclass_with(plain, forward, copies=str(dtype))


_AUTOCAST_TYPES = ("cpu", "cuda", "mps", "xpu")


def _is_autocast() -> bool:
    """Check for autocast, under which upstream's own layers compute in half precision, and return it."""
    return any(map(torch.is_autocast_enabled, _AUTOCAST_TYPES))


def _is_inside(dtype: torch.dtype) -> bool:
    """Check that a call of the part is running, which raises its outputs to fp32."""
    if torch.compiler.is_compiling():  # a part is compiled with its border
        return True
    kind, modes = _ISLANDS[dtype], cast("Any", overrides)._get_current_function_mode_stack()
    return any(isinstance(mode, kind) for mode in modes)


@per_class
def _island_class(plain: Any, dtype: torch.dtype) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Rotary embeddings have buffers alone.
        every = (*self._parameters.values(), *self._buffers.values())
        was_cast = [1 for own in every if own is not None and own.dtype == dtype]
        if was_cast or _is_autocast():
            return plain.forward(self, *args, **kwargs)
        return plain.forward(self, *_raised(args, dtype), **_raised(kwargs, dtype))

    return subclass_with(plain, forward)


def _border_class(module: nn.Module, dtype: torch.dtype, method: str, layers: list[nn.Module]) -> type:
    """Make the class of a part. Its layers show if it was cast."""
    name = "forward" if method == CALL else method
    plain, mode = getattr(type(module), name), _ISLANDS[dtype]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_cast(layers) or _is_autocast():
            return plain(self, *args, **kwargs)
        with mode():
            result = plain(self, *args, **kwargs)
        return _raised(result, dtype)

    return subclass_with(type(module), forward, method=name)


def _raised(value: Any, dtype: torch.dtype) -> Any:
    """Cast the half-precision tensors of a value to fp32."""
    # A packed sequence is a leaf of the pytree in torch 2.6, and a node in 2.14.
    kinds = (torch.Tensor, PackedSequence)
    return _pytree.tree_map_only(kinds, lambda t: t.float() if _dtype_of(t) == dtype else t, value)


def _cast(values: Any, dtypes: set[torch.dtype], target: torch.dtype) -> Any:
    """Cast the tensors of these dtypes in a value to another one."""
    return _pytree.tree_map_only(torch.Tensor, lambda t: t.to(target) if t.dtype in dtypes else t, values)


def _dtype_of(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, torch.Tensor) else value.data.dtype


def delicate_functions() -> frozenset[Any]:
    """Return the functions that half precision breaks: no kernel (Fourier), or too little range or precision.

    A sum of a mask is a length, and bf16 has no odd number beyond 256. In-place functions are excluded, since they
    would write into the copy.
    """
    names = ["stft", "istft", "cumsum", "sum", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logsumexp"]
    names += ["sin", "cos", "pow"]
    functions = [getattr(holder, name) for holder in (torch, torch.Tensor) for name in names]
    functions += [torch.complex, torch.polar, torch.view_as_complex, torch.special.exp2]
    functions += [torch.Tensor.__pow__, torch.Tensor.__rpow__]
    functions += [getattr(torch.fft, name) for name in dir(torch.fft) if name.lstrip("ih").startswith(("fft", "rfft"))]
    return frozenset(functions)


def _products() -> frozenset[Any]:
    """Return the functions that multiply tensors of one dtype only.

    Transformers before 4.54 may rotate queries and keys by fp32 cosines and leave the values in half precision. A layer
    that was exchanged or parametrized after tuning has fp32 weights.
    """
    names = ["matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "einsum"]
    functions = [getattr(holder, name) for holder in (torch, torch.Tensor) for name in names if hasattr(holder, name)]
    functions += [torch.Tensor.__matmul__, torch.Tensor.__rmatmul__]
    convolutions = [f"conv{transpose}{number}d" for transpose in ("", "_transpose") for number in (1, 2, 3)]
    functions += [getattr(torch.nn.functional, name) for name in ("linear", "bilinear", *convolutions)]
    return frozenset([*functions, torch.nn.functional.scaled_dot_product_attention])


def _writes() -> frozenset[Any]:
    """Return the functions that write numbers of their tensor's own dtype only, as into the keys of a static cache."""
    names = ["index_copy_", "index_add_", "index_put_", "scatter_", "scatter_add_", "masked_scatter_", "__setitem__"]
    return frozenset(getattr(torch.Tensor, name) for name in names)


def _casts() -> frozenset[Any]:
    """Return the functions that cast a tensor, as in `torch.arange(length).to(x)`."""
    return frozenset(getattr(torch.Tensor, name) for name in ("to", "type", "type_as"))


def _is_in_place(function: Any, kwargs: dict[str, Any]) -> bool:
    name = str(getattr(function, "__name__", ""))
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))


def _is_mixed(values: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Check for tensors of this dtype beside fp32 ones, also in lists (`einsum`)."""
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else (value,))]
    found = {item.dtype for item in flat if isinstance(item, torch.Tensor)}
    return dtype in found and torch.float32 in found


# Dictionaries, not sets: dynamo cannot trace look-ups in a set.
_DELICATE, _PRODUCTS, _WRITES, _CASTS = map(dict.fromkeys, (delicate_functions(), _products(), _writes(), _casts()))
_RANGES = dict.fromkeys((torch.arange, torch.linspace))
_WHOLE = dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8))


class _Islands(TorchFunctionMode):
    """Casts the arguments of functions that need fp32, and of products of mixed dtypes, to fp32.

    What is written into a tensor is cast to the dtype of that tensor. Positions and other whole numbers become fp32
    where upstream gives them the dtype of activations. A function that refuses half precision, or mixed dtypes, is
    called again in fp32; the warm-up may not have met it.

    A class for each dtype, since a compiled graph is guarded on the class of a mode and not on its attributes.
    """

    dtype: ClassVar[torch.dtype]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        # Half-precision complex numbers, as in `1j * phase`, have no kernels.
        up = function in _DELICATE or any(isinstance(argument, complex) for argument in args)
        up = up or (function in _PRODUCTS and _is_mixed((*args, *kwargs.values()), self.dtype))
        if up and "out" not in kwargs:
            args, kwargs = _raised(args, self.dtype), _raised(kwargs, self.dtype)
        elif function in _WRITES and _is_mixed((*args, *kwargs.values()), self.dtype):
            args, kwargs = _cast((args, kwargs), {torch.float32, self.dtype}, args[0].dtype)
        elif function in _RANGES and kwargs.get("dtype") == self.dtype:
            kwargs = {**kwargs, "dtype": torch.float32}
        result = self._result(function, args, kwargs)
        if function in _CASTS and args[0].dtype in _WHOLE and getattr(result, "dtype", None) == self.dtype:
            return args[0].to(result.device, torch.float32)
        return result

    def _result(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function, and once more in fp32 if it refuses half precision."""
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            again = None if isinstance(error, torch.OutOfMemoryError) else self._again(function, args, kwargs)
            if again is None:
                raise
        return function(*again[0], **again[1])  # which raises upstream's own error, if there is one

    def _again(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return other arguments for a function that has refused these, or `None`."""
        leaves = _pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, torch.Tensor) and leaf.dtype == self.dtype for leaf in leaves):
            return None
        if not _is_in_place(function, kwargs):
            return _raised((args, kwargs), self.dtype)
        floats = {torch.float32, self.dtype}
        target = kwargs.get("out", args[0] if args else None)
        if not isinstance(target, torch.Tensor) or target.dtype not in floats:
            return None
        return _cast((args, kwargs), floats, target.dtype)


setattr(_Islands, KEEPS_KERNELS, True)


class _Bf16Islands(_Islands):
    dtype = torch.bfloat16


class _Fp16Islands(_Islands):
    dtype = torch.float16


_ISLANDS: dict[torch.dtype, type[_Islands]] = {torch.bfloat16: _Bf16Islands, torch.float16: _Fp16Islands}
