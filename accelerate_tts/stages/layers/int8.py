"""Dynamic int8 quantisation of a part's linear and recurrent layers. For `fast` on CPUs.

A decode step reads every weight once for one or two rows, so a quarter of the bytes can take a quarter of the time. The
fastest kernels depend on the processor, so tuning times several against each other:

- *x86* or *qnnpack*: the kernels that PyTorch itself chooses for the processor (FBGEMM or oneDNN on x86);
- *oneDNN*: the same operators with oneDNN's own packing;
- *torchao*: its dynamic W8A8 tensors, if that package is installed.

Weights are symmetric per output channel, activations asymmetric per tensor. Recurrent nets are a stage of their own and
must pass the same comparison: the embedding of one speaker encoder had a cosine of only 0.53 to the reference.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_tts.errors import message_of
from accelerate_tts.inspection.classes import beneath_swaps, class_of, is_bias, is_torchs_linear, plain_class, twin_of
from accelerate_tts.inspection.routers import routers
from accelerate_tts.inspection.tracing import is_plain, is_watched
from accelerate_tts.kernels.weight_formats import int8_scales
from accelerate_tts.locks import lock
from accelerate_tts.patching.class_swap import (
    PACKED,
    CarryingSwap,
    call_patched,
    open_modules,
    per_class,
    subclass_with,
)
from accelerate_tts.patching.derived import Derived
from accelerate_tts.stages.base import BaseStage, are_left_over
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode.call_args import Obstacles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Target

# Smaller layers spend their time quantising the input.
_LEAST_WEIGHTS = 16_384
# Minimum dimensions of the kernels' inputs: (rows, features), and (batch, time, features).
_ROWS, _SEQUENCES = 2, 3
# Packing sets a process-wide flag.
_packing = lock()


@register_stage
class QuantizeStage(BaseStage):
    """8-bit linear layers by one family of kernels.

    Args:
        engine: "x86", "fbgemm", "onednn" or "qnnpack", torch's quantised engines; or "torchao".
    """

    name = "int8 linear layers"
    group = "linear layers"
    devices = ("cpu",)
    precisions = ("fast",)
    after = ("few-row linear layers",)

    @classmethod
    def variants(cls, target: Target) -> Iterable[QuantizeStage]:
        """See `BaseStage.variants`: one for each engine that this machine has."""
        del target
        return map(cls, engines())

    def __init__(self, engine: str) -> None:
        self.name = f"{self.name} ({engine})"
        self.needs_compiler = engine == "torchao"  # which imports inductor
        self._engine = engine

    def applies(self, part: Part) -> str | None:
        layers = _linears(part.module)
        if not layers:
            return "no large linear layer in it"
        return "next to nothing is left beside its fused blocks" if are_left_over(layers, part.module) else None

    def prepare(self, part: Part) -> CarryingSwap:
        make = _torchao_call if self._engine == "torchao" else _packed_call(self._engine)
        calls = _packed(part, _linears(part.module), make)
        return CarryingSwap(list(calls), lambda module: _quantized_class(class_of(module), _ROWS), PACKED, calls)


@register_stage
class QuantizeRecurrentStage(BaseStage):
    """8-bit LSTMs and GRUs by torch's dynamic kernels."""

    name = "int8 recurrent layers"
    devices = ("cpu",)
    precisions = ("fast",)
    after = ("int8 linear layers",)

    def applies(self, part: Part) -> str | None:
        return None if _recurrent(part.module) else "no recurrent layer in it"

    def prepare(self, part: Part) -> CarryingSwap:
        calls = _packed(part, _recurrent(part.module), _quantized_recurrent)
        return CarryingSwap(
            list(calls), lambda module: _quantized_class(class_of(module), _SEQUENCES, only_fp32=True), PACKED, calls
        )  # fmt: skip


def engines() -> list[str]:
    """Return this machine's engines for 8-bit linear layers, torch's own choice first."""
    there = set(torch.backends.quantized.supported_engines)
    own = next((name for name in ("x86", "fbgemm", "qnnpack") if name in there), None)
    found = [name for name in (own, "onednn" if "onednn" in there else None) if name is not None]
    return found if find_spec("torchao") is None else [*found, "torchao"]


def _linears(module: nn.Module) -> list[nn.Module]:
    choosing = routers(module)
    return [
        inner
        for inner in open_modules(module)
        if isinstance(inner, nn.Linear)
        and inner not in choosing
        and is_torchs_linear(plain_class(inner))
        and is_plain(inner.weight)
        and inner.weight.numel() >= _LEAST_WEIGHTS
        and inner.weight.is_floating_point()
    ]


def _recurrent(module: nn.Module) -> list[nn.Module]:
    return [
        inner
        for inner in module.modules()
        if plain_class(inner) in {nn.LSTM, nn.GRU}  # also inside a half-precision part, where they stay in fp32
        and inner.bias  # the converter needs a bias, and supports no projections
        and not getattr(inner, "proj_size", 0)
        and all(parameter.dtype == torch.float32 for parameter in inner.parameters())
    ]


class _Packed(Derived[Any]):
    """The int8 kernel's call of a layer. The layers of a part report together what the kernel refuses."""

    def __init__(self, module: nn.Module, make: Callable[[Any], Any], obstacles: Obstacles, number: int) -> None:
        super().__init__(module, make)
        self._obstacles, self._number = obstacles, number

    def refused(self, reason: str) -> None:
        """Report that the kernel refused a call."""
        self._obstacles.report(reason, self._number)

    def served(self) -> None:
        """Note that the kernel served a call."""
        self._obstacles.served(self._number)


def _packed(part: Part, layers: list[nn.Module], make: Callable[[Any], Any]) -> dict[nn.Module, _Packed]:
    obstacles = Obstacles(f"int8 of {part.name}")
    return {layer: _Packed(layer, make, obstacles, number) for number, layer in enumerate(layers)}


@per_class
def _quantized_class(plain: Any, least: int, *, only_fp32: bool = False) -> type:

    own, base = plain.forward, beneath_swaps(plain)
    torchs = base.forward

    def forward(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002 - torch's own name
        if plain.forward is not own:
            return call_patched(plain, self, input, *args, **kwargs)
        if base.forward is not torchs:
            return plain.forward(self, input, *args, **kwargs)  # the class swap in between knows it, and says so
        packed = getattr(self, PACKED, None)  # another thread may have switched the change off
        is_sequence = not isinstance(input, torch.Tensor) and hasattr(input, "batch_sizes")  # a packed one
        if (
            packed is None
            or torch.is_grad_enabled()  # copies have no gradients
            or torch.is_autocast_enabled("cpu")  # upstream's own layer returns half precision
            or is_watched(*(() if is_sequence else (input,)))
            or (not is_sequence and (input.dim() < least or input.numel() == 0 or not input.is_floating_point()))
            or (only_fp32 and (input.data if is_sequence else input).dtype != torch.float32)
        ):
            return plain.forward(self, input, *args, **kwargs)
        try:
            call = packed.get()
            if call is not None:
                result = call(input, *args, **kwargs)
                if not torch.compiler.is_compiling():  # a graph would guard on what was reported
                    packed.served()
                return result
        except RuntimeError as error:  # NaN in the input, a sparse weight, or an input that torch refuses, too
            result = plain.forward(self, input, *args, **kwargs)
            packed.refused(message_of(error))
            return result
        return plain.forward(self, input, *args, **kwargs)

    return subclass_with(plain, forward, copies="int8")


def _has_plain_weights(module: nn.Module) -> bool:
    """Check that weights are plain numbers. One of a class of its own may compute something else by `F.linear`."""
    return all(is_plain(tensor) for tensor in module._parameters.values() if tensor is not None)


def _packed_call(engine: str) -> Any:
    def make(module: Any) -> Any:
        if not _has_plain_weights(module):
            return None
        weight = module.weight.detach().float()
        scales = int8_scales(weight).double()
        points = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.14 announces the removal of its quantised tensors
            quantized = torch.quantize_per_channel(weight, scales, points, 0, torch.qint8)
        bias = None if module.bias is None else module.bias.detach().float()
        apart = None if bias is None or is_bias(bias, len(weight)) else bias.clone()
        packed = _prepacked(engine, quantized, bias if apart is None else None)
        # On x86 without VNNI the 16-bit sums of FBGEMM and oneDNN overflow unless activations leave one bit free.
        on_x86 = "fbgemm" in torch.backends.quantized.supported_engines
        reduced = on_x86 and engine != "qnnpack" and not torch.cpu._is_vnni_supported()

        def call(x: Any) -> Any:
            y = torch.ops.quantized.linear_dynamic(x.float(), packed, reduced)
            return (y if apart is None else y + apart).to(x.dtype)

        return call

    return make


def _prepacked(engine: str, quantized: Any, bias: Any) -> Any:
    # The engine is read only while packing; a packed weight keeps its own kernels.
    with _packing:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            return torch.ops.quantized.linear_prepack(quantized, bias)
        finally:
            torch.backends.quantized.engine = before


def _torchao_call(module: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if not _has_plain_weights(module):
        return None
    twin = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    twin.weight = nn.Parameter(module.weight.detach().float().clone(), requires_grad=False)
    if module.bias is not None:
        twin.bias = nn.Parameter(module.bias.detach().float().clone(), requires_grad=False)
    # By default it changes inductor's settings, for the whole process and for good.
    quantize_(twin, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))

    def call(x: Any) -> Any:
        return twin.forward(x.float()).to(x.dtype)  # not by a call, which would run global hooks once more

    return call


def _quantized_recurrent(module: Any) -> Any:
    # Of a layer from which one was taken out, upstream raises its own error.
    if not _has_plain_weights(module) or any(getattr(module, name) is None for name in module._flat_weights_names):
        return None
    plain = plain_class(module)
    # The converter looks up the class, copies what the module carries, and would put the user's module into eval.
    twin = twin_of(module, plain, {PACKED})
    holder = torch.nn.ModuleDict({"inner": twin})
    with warnings.catch_warnings():
        # torch 2.10 deprecates its eager quantisation in favour of torchao's, which supports no LSTM.
        warnings.simplefilter("ignore")
        holder = torch.ao.quantization.quantize_dynamic(holder.eval(), {plain}, torch.qint8)  # type: ignore[no-untyped-call]
    if type(holder["inner"]) is plain:
        raise RuntimeError(f"torch.ao.quantization did not convert the {plain.__name__}")
    return holder["inner"].forward
