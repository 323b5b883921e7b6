"""Random numbers of one thread's call, from generators of its own.

torch's generators belong to the process. Calls in several threads draw from the same one, so what a seeded call says
depends on who else draws meanwhile. Here a mode of the thread (`TorchFunctionMode`, as `torch.set_default_device` uses)
hands a generator of its own to each function that draws. The numbers are those that the function draws after
`torch.manual_seed` of the same seed.

Not reached are draws inside other functions: dropout during training in attention and recurrent layers, and what
extensions draw in C++. What this package compiles draws from the process's generators, so graphs with draws are left
out while such a mode is on (`is_open`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

from accelerate_tts.events import Lasting, NotApplied
from accelerate_tts.inspection.tracing import KEEPS_KERNELS
from accelerate_tts.runtime.seeding import without_collection

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

States = list[tuple[torch.device, torch.Generator, "Tensor"]]

_core: Any = torch._C
_overrides, _override_at = _core._len_torch_function_stack, _core._get_function_stack_at
_pop, _push = _core._pop_torch_function_stack, _core._push_on_torch_function_stack


class OwnRandom(TorchFunctionMode):
    """A mode with generators of its own, one for each device, which are made when they are first drawn from.

    It may be entered in several threads, which then draw from the same generators.

    Args:
        seed: The seed of each generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._said = Lasting()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, with a generator if it draws."""
        del types
        draw = _DRAWS.get(func)
        if draw is None or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        return draw(self, func, args, kwargs or {})

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of a device; `None`, with an event, if it can have none but the process's."""
        if device.type in {"cuda", "xpu"} and device == torch.device(device.type):  # without a number
            device = torch.device(device.type, getattr(torch, device.type).current_device())
        found = self._generators.get(device)
        if found is None and device.type != "meta":  # which draws nothing
            try:
                found = torch.Generator(device)
            except RuntimeError as error:
                reason = f"{device.type} has no generators but the process's: {error}"
                self._said.emit(NotApplied("own_random", reason))
                return None
            self._generators[device] = found.manual_seed(self._seed)
        return found

    def seed(self, seed: int) -> None:
        """Begin again at another seed."""
        self._seed, self._generators = seed, {}

    def states(self) -> States:
        """Return the generators that were made, with their states."""
        return [(device, each, without_collection(each.get_state)) for device, each in list(self._generators.items())]

    def put_back(self, states: States) -> None:
        """Set the states of `states()`. Generators that were made later begin at the seed again."""
        self._generators = {device: each for device, each, _ in states}
        for _, each, state in states:
            each.set_state(state)


setattr(OwnRandom, KEEPS_KERNELS, True)


def opened() -> OwnRandom | None:
    """Return this thread's innermost mode, or `None`."""
    for place in reversed(range(_overrides())):
        mode = _override_at(place)
        if isinstance(mode, OwnRandom):
            return mode
    return None


def is_open() -> bool:
    """Check for a mode on this thread. Cheap where there is no function mode at all."""
    return bool(_overrides()) and opened() is not None


class _Without:
    """Context without the innermost function mode. A class: a generator takes three times as long, 30 times a token."""

    __slots__ = ("_mode",)

    def __enter__(self) -> None:
        self._mode = _pop()

    def __exit__(self, *_exception: object) -> None:
        _push(self._mode)


_NOTHING = nullcontext()


def outside() -> AbstractContextManager[None]:
    """Return a context without this thread's mode, where it is the innermost of all function modes.

    In it, functions of torch take no turn in Python, and dynamo finds no mode that it would have to trace.
    """
    if not _overrides() or not isinstance(_override_at(_overrides() - 1), OwnRandom):
        return _NOTHING
    return _Without()


def draws_in(graph: Any) -> bool:
    """Check that a graph of `torch.fx` calls a function that draws."""
    return any(_draws(node) for node in graph.nodes)


def _draws(node: Any) -> bool:
    if node.op == "call_method":
        return node.target in _NAMES
    if node.op != "call_function" or node.target not in _DRAWS:
        return False
    return node.target not in _DROPOUT or _is_dropping(node.target, node.args, node.kwargs)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device on which a function draws: its tensors', the one that it is given, or the default."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    given = kwargs.get("device")
    return torch.get_default_device() if given is None else torch.device(given)


def _given(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that takes a generator."""
    if kwargs.get("generator") is None and not any(isinstance(value, torch.Generator) for value in args):
        kwargs = {**kwargs, "generator": mode.generator(_device_of(args, kwargs))}
    return func(*args, **kwargs)


def _like(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `rand_like`, `randn_like` or `randint_like`, which take a generator in late releases only."""
    if kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name not in {"input", "low", "high", "generator"}}
    wants_gradient = options.pop("requires_grad", False)
    given = args[0] if args else kwargs["input"]
    made = torch.empty_like(given, **options)
    generator = mode.generator(made.device)
    if func is torch.rand_like:
        made.uniform_(generator=generator)
    elif func is torch.randn_like:
        made.normal_(generator=generator)
    else:
        limits = [*args[1:], *(kwargs[name] for name in ("low", "high") if name in kwargs)]
        made.random_(*(limits if len(limits) > 1 else (0, *limits)), generator=generator)
    return made.requires_grad_(wants_gradient)


def _of_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float, bool, bool]:
    """Return dropout's input, its probability, True if it drops, and True if it writes into its input."""
    train = "training" if func is functional.dropout else "train"
    given = dict(zip(("input", "p", train, "inplace"), args, strict=False))
    named: dict[str, Any] = {"p": 0.5, train: True, **given, **kwargs}
    return named["input"], named["p"], named[train], named.get("inplace", False) or func is _dropout_


def _is_dropping(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    _, p, training, _ = _of_dropout(func, args, kwargs)
    return bool(training) and p != 0.0


def _dropped(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call dropout, as torch computes it on a CPU: some speech models drop at inference, too (Tacotron's prenet)."""
    given, p, _, in_place = _of_dropout(func, args, kwargs)
    if not _is_dropping(func, args, kwargs) or not 0.0 < p < 1.0 or not given.numel():
        return func(*args, **kwargs)  # draws nothing, or raises its error
    noise = torch.empty_like(given).bernoulli_(1.0 - p, generator=mode.generator(given.device)).div_(1.0 - p)
    return given.mul_(noise) if in_place else given * noise


def _gumbel(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `gumbel_softmax` with noise of its own: the distribution is the same, the numbers are those of a CPU."""
    del func
    named = dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False)) | kwargs
    logits, tau = named["logits"], named.get("tau", 1)
    drawn = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format)
    drawn.exponential_(generator=mode.generator(logits.device))
    soft = ((logits - drawn.log()) / tau).softmax(named.get("dim", -1))
    if not named.get("hard", False):
        return soft
    best = soft.max(named.get("dim", -1), keepdim=True)[1]
    return torch.zeros_like(logits).scatter_(named.get("dim", -1), best, 1.0) - soft.detach() + soft


_NAMES = frozenset({
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_",
    "random_", "uniform_",
})  # fmt: skip
"""Methods of tensors that draw."""
_FUNCTIONS = (
    "bernoulli", "binomial", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm",
    "_sample_dirichlet", "_standard_gamma",
)  # fmt: skip
_dropout_ = cast("Any", torch).dropout_
_DROPOUT = frozenset({torch.dropout, _dropout_, functional.dropout})
_Draw = Callable[[OwnRandom, Any, tuple[Any, ...], dict[str, Any]], Any]
_DRAWS: dict[Any, _Draw] = {
    **{getattr(torch, name): _given for name in _FUNCTIONS},
    **{getattr(torch.Tensor, name): _given for name in _NAMES},
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), _like),
    **dict.fromkeys(_DROPOUT, _dropped),
    **{getattr(init, name): _given for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_")},
    functional.gumbel_softmax: _gumbel,
}
