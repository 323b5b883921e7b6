"""Functions of torch that draw random numbers, each with a way to have it draw from a given generator.

Most take a generator. Others are composed here of functions that do, so that the numbers are those which they draw from
a generator of the same state. Those that can do neither are named by an event if they draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional, init

from accelerate_tts.events import Lasting, NotApplied

if TYPE_CHECKING:
    from torch import Tensor

_core: Any = torch._C
_transform = _core._functorch.peek_interpreter_stack
said = Lasting()
"""Events of the process: whoever gives generators lives as long as a call."""


class Generators(Protocol):
    """Generators by device."""

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of a device; `None` for the process's."""
        ...


def draws_in(graph: Any) -> bool:
    """Check that a graph of `torch.fx` calls a function that draws."""
    return any(_draws(node) for node in graph.nodes)


def _draws(node: Any) -> bool:
    if node.op == "call_method":
        return node.target in _NAMES
    if node.op != "call_function" or draw_of(node.target) is None:
        return False
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return _draws_with(node.target, node.args, node.kwargs)
    if node.target in _SOMETIMES:
        return bool(_SOMETIMES[node.target](node.args, node.kwargs))
    return node.target not in _DROPOUT or _is_dropping(node.target, node.args, node.kwargs)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device on which a function draws: the one that it is given, its tensors', or the default."""
    given = kwargs.get("device")
    if given is not None:  # before tensors, one of which may be a size
        return torch.device(given)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    # torch 2.6's own function for it raises AttributeError once a default was set and taken back.
    return torch.empty(()).device


def _is_given(generator: Any) -> bool:
    """Check for a generator of the caller's. The process's, by name, is as none: it is what the block replaces."""
    if not isinstance(generator, torch.Generator):
        return False
    of_devices = getattr(getattr(torch, generator.device.type, None), "default_generators", ())  # CUDA's and XPU's
    return not any(generator is each for each in (torch.default_generator, *of_devices))


def _given(own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that takes a generator."""
    if _is_given(kwargs.get("generator")) or any(map(_is_given, args)):
        return func(*args, **kwargs)
    generator = own.generator(_device_of(args, kwargs))
    placed = [isinstance(value, torch.Generator) for value in args]
    if any(placed):
        return func(*(generator if place else value for place, value in zip(placed, args, strict=True)), **kwargs)
    return func(*args, **{**kwargs, "generator": generator})


def _like(own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `rand_like`, `randn_like` or `randint_like`, which take a generator in late releases only."""
    if _is_given(kwargs.get("generator")):
        return func(*args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name not in {"input", "low", "high", "generator"}}
    wants_gradient = options.pop("requires_grad", False)
    given = args[0] if args else kwargs["input"]
    made = _blank(torch.empty_like(given, **options))
    generator, numbers = own.generator(made.device), _numbers_of(made)
    if func is torch.rand_like:
        numbers.uniform_(generator=generator)
    elif func is torch.randn_like:
        numbers.normal_(generator=generator)
    else:
        limits = [*args[1:], *(kwargs[name] for name in ("low", "high") if name in kwargs)]
        numbers.random_(*(limits if len(limits) > 1 else (0, *limits)), generator=generator)
    return made.requires_grad_() if wants_gradient else made  # which transforms of torch.func refuse, also to clear


def _numbers_of(made: Tensor) -> Tensor:
    """Return the numbers of a tensor: of a nested one those of all its parts, into which torch draws them, too."""
    return made.values() if made.is_nested else made


def _blank(made: Tensor) -> Tensor:
    """Return memory to draw into. In `torch.func.vmap`, one with a row for each call, if these draw for themselves."""
    if _transform() is None:
        return made
    any_numbers = torch.Generator(made.device)
    return torch.randint(0, 1, made.shape, dtype=made.dtype, device=made.device, generator=any_numbers)


def _of_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float, bool, bool]:
    """Return dropout's input, its probability, True if it drops, and True if it writes into its input."""
    train = "training" if func in _OF_FUNCTIONAL else "train"
    given = dict(zip(("input", "p", train, "inplace"), args, strict=False))
    named: dict[str, Any] = {"p": 0.5, train: func not in _ALPHA, **given, **kwargs}
    return named["input"], named["p"], named[train], named.get("inplace", False) or func in _IN_PLACE


def _is_dropping(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    _, p, training, _ = _of_dropout(func, args, kwargs)
    return bool(training) and p != 0.0


def _dropped(own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call dropout, as torch computes it on a CPU: some speech models drop at inference, too (Tacotron's prenet)."""
    given, p, _, in_place = _of_dropout(func, args, kwargs)
    shape = _noise_of(func, given)
    if not _is_dropping(func, args, kwargs) or not 0.0 < p < 1.0 or not given.numel() or shape is None:
        return func(*args, **kwargs)  # draws nothing, or raises its error
    of_noise = given.new_empty(shape) if func in _CHANNELS else torch.empty_like(given)  # in torch's order
    noise = _blank(of_noise)
    numbers = _numbers_of(noise).bernoulli_(1.0 - p, generator=own.generator(given.device))
    if func not in _ALPHA:
        numbers.div_(1.0 - p)
        return given.mul_(noise) if in_place else given * noise
    scale = 1.0 / math.sqrt((_SELU**2 * p + 1.0) * (1.0 - p))
    shift = noise.add(-1.0).mul_(_SELU * scale).add_(_SELU * scale * p)
    noise.mul_(scale)
    return (given.mul_(noise) if in_place else given * noise).add_(shift)


def _noise_of(func: Any, given: Tensor) -> torch.Size | None:
    """Return the shape of a dropout's noise: one number for each channel if it drops these; `None` for an error."""
    if given.is_nested:  # of which torch drops single numbers alone
        return None if func in _CHANNELS or func in _ALPHA else torch.Size()
    if func not in _CHANNELS:
        return given.shape
    allowed, batched = _CHANNELS[func]
    if given.dim() < 2 or (allowed and given.dim() not in allowed):  # noqa: PLR2004 - a batch and its channels
        return None
    kept = 1 if batched and given.dim() != batched else 2
    return torch.Size([*given.shape[:kept], *[1] * (given.dim() - kept)])


def _leaky(own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a randomised leaky ReLU."""
    names = ("input", "lower", "upper", "training", "inplace" if func is functional.rrelu else "generator")
    named = dict(zip(names, args, strict=False)) | kwargs
    if not named.get("training", False) or _is_given(named.get("generator")):
        return func(*args, **kwargs)
    in_place = named.pop("inplace", False) or func is _any_torch.rrelu_
    named["generator"] = own.generator(named["input"].device)
    return (_any_torch.rrelu_ if in_place else torch.rrelu)(named.pop("input"), **named)


def _gumbel(own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `gumbel_softmax` with noise of its own: the distribution is the same, the numbers are those of a CPU."""
    del func
    named = dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False)) | kwargs
    logits, tau = named["logits"], named.get("tau", 1)
    drawn = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format)
    drawn.exponential_(generator=own.generator(logits.device))
    soft = ((logits - drawn.log()) / tau).softmax(named.get("dim", -1))
    if not named.get("hard", False):
        return soft
    best = soft.max(named.get("dim", -1), keepdim=True)[1]
    return torch.zeros_like(logits).scatter_(named.get("dim", -1), best, 1.0) - soft.detach() + soft


def _unreached(own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that takes no generator. If it draws, say so."""
    del own
    if _UNREACHED[func](args, kwargs):
        said.emit(NotApplied("own_random", f"{func.__name__} takes no generator, and draws from the process's"))
    return func(*args, **kwargs)


def _argument(name: str, place: int, default: Any = 0.0) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    return lambda args, kwargs: kwargs.get(name, args[place] if len(args) > place else default)


_NAMES = frozenset({
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_",
    "random_", "uniform_",
})  # fmt: skip
"""Methods of tensors that draw."""
_FUNCTIONS = (
    "bernoulli", "binomial", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm",
    "_sample_dirichlet", "_standard_gamma",
)  # fmt: skip
_any_torch, _any_functional = cast("Any", torch), cast("Any", functional)
_IN_PLACE = frozenset({
    _any_torch.dropout_, _any_torch.feature_dropout_, _any_torch.alpha_dropout_, _any_torch.feature_alpha_dropout_,
})  # fmt: skip
_OF_FUNCTIONAL = frozenset({
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout,
})  # fmt: skip
_ALPHA = frozenset({
    torch.alpha_dropout, _any_torch.alpha_dropout_, _any_torch.feature_alpha_dropout,
    _any_torch.feature_alpha_dropout_, functional.alpha_dropout, functional.feature_alpha_dropout,
})  # fmt: skip
_CHANNELS: dict[Any, tuple[tuple[int, ...], int]] = {
    functional.dropout1d: ((2, 3), 3),
    functional.dropout3d: ((4, 5), 5),
    **dict.fromkeys((functional.dropout2d, functional.feature_alpha_dropout), ((), 0)),
    **dict.fromkeys((_any_torch.feature_dropout, _any_torch.feature_dropout_), ((), 0)),
    **dict.fromkeys((_any_torch.feature_alpha_dropout, _any_torch.feature_alpha_dropout_), ((), 0)),
}
"""Dropout of whole channels: the numbers of dimensions that it takes, and the one with a batch, if there are others."""
_DROPOUT = _OF_FUNCTIONAL | _ALPHA | _IN_PLACE | {torch.dropout, _any_torch.feature_dropout}
_SELU = 1.7580993408473766
"""The limit of SELU far below zero, as torch's alpha dropout has it."""


def _of_recurrent(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> bool:
    """Check that a recurrent layer drops between its layers. torch's own layers call it by places."""
    # (input, states, weights, bias, layers, dropout, train, ...), and with sizes after the input for packed sequences.
    place = 5 if isinstance(args[3], bool) else 6
    return bool(args[place + 1]) and args[place] != 0.0


_UNREACHED: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], bool]] = {
    functional.scaled_dot_product_attention: lambda args, kwargs: _argument("dropout_p", 4)(args, kwargs) != 0.0,
    functional.multi_head_attention_forward: (
        lambda args, kwargs: _argument("training", 13, default=True)(args, kwargs)
        and _argument("dropout_p", 10)(args, kwargs) != 0.0
    ),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _of_recurrent),
    torch.native_dropout: lambda _args, _kwargs: True,
    **{
        getattr(functional, name): lambda _args, _kwargs: True
        for name in ("fractional_max_pool2d", "fractional_max_pool3d", "fractional_max_pool2d_with_indices",
                     "fractional_max_pool3d_with_indices")
    },
}  # fmt: skip
"""Functions that may draw and take no generator, each with a check for that."""
_LEAKY = (functional.rrelu, torch.rrelu, _any_torch.rrelu_)
_SOMETIMES = {**_UNREACHED, **dict.fromkeys(_LEAKY, _argument("training", 3, default=False))}
"""Functions that draw with some arguments only, each with a check for that."""
_Draw = Callable[[Generators, Any, tuple[Any, ...], dict[str, Any]], Any]
DRAWS: dict[Any, _Draw] = {
    **{getattr(torch, name): _given for name in _FUNCTIONS},
    **{getattr(torch.Tensor, name): _given for name in _NAMES},
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), _like),
    **dict.fromkeys(_DROPOUT, _dropped),
    **dict.fromkeys(_LEAKY, _leaky),
    **{getattr(init, name): _given for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_")},
    functional.gumbel_softmax: _gumbel,
    **dict.fromkeys(_UNREACHED, _unreached),
}
"""Replacements that have each function draw from given generators."""


# --- operators: `torch.ops.aten.randn`, as exported programs call them ---


def draw_of(function: Any) -> _Draw | None:
    """Return how to have a function of torch, or an operator, draw from given generators; `None` if it draws not."""
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        return _draw_of_operator(function)
    return DRAWS.get(function)


@cache
def _draw_of_operator(operator: Any) -> _Draw | None:
    overloads = _overloads(operator)
    if not any(torch.Tag.nondeterministic_seeded in each.tags for each in overloads):
        return None
    packet = operator.overloadpacket if isinstance(operator, OpOverload) else operator
    name, is_torchs = packet.__name__, overloads[0].namespace == "aten"
    function = getattr(torch, name, None) if is_torchs else None
    composed = DRAWS.get(function) if function is not None else None
    if composed is not None and composed in {_like, _dropped, _leaky}:
        return lambda own, _func, args, kwargs: composed(own, function, args, _without_self(kwargs))
    if any(argument.name == "generator" for each in _overloads(packet) for argument in each._schema.arguments):
        return lambda own, _func, args, kwargs: _given(own, packet, args, kwargs)  # of any overload with one

    def unreached(_own: Generators, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _draws_with(operator, args, kwargs):
            said.emit(NotApplied("own_random", f"{operator} takes no generator, and draws from the process's"))
        return func(*args, **kwargs)

    return unreached


def _overloads(operator: Any) -> list[Any]:
    if isinstance(operator, OpOverload):
        return [operator]
    return [getattr(operator, name) for name in operator.overloads()]


def _without_self(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names of functions, which call `input` what operators call `self`."""
    return {"input" if name == "self" else name: value for name, value in kwargs.items()}


def _draws_with(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Check that an operator which may draw does: for dropout with a chance, in training."""
    names = [argument.name for argument in _overloads(operator)[0]._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    of_chance = {"dropout_p", "dropout", *(["p"] if "train" in names else [])}
    chances = [value for name, value in given.items() if name in of_chance]
    return (not chances or any(chances)) and given.get("train") is not False
