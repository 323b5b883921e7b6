"""Random numbers of one thread's call, from generators of its own.

torch's generators belong to the process. Calls in several threads draw from the same one, so what a seeded call says
depends on who else draws meanwhile. Here a mode of the thread (`TorchFunctionMode`, as `torch.set_default_device` uses)
hands a generator of its own to each function that draws. The numbers are those that the function draws after
`torch.manual_seed` of the same seed.

Not reached are draws inside other functions, which take no generator: dropout during training in attention and
recurrent layers (an event says so), and what scripts and extensions draw in C++. What this package compiles draws from
the process's generators, so graphs with draws are left out while such a mode is on (`is_open`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

from accelerate_tts.events import Lasting, NotApplied
from accelerate_tts.inspection.tracing import KEEPS_KERNELS
from accelerate_tts.runtime.seeding import without_collection

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor


class States(NamedTuple):
    """A mode's seed, and its generators with their states."""

    seed: int
    generators: list[tuple[torch.device, torch.Generator, Tensor]]


_core: Any = torch._C
_overrides, _override_at = _core._len_torch_function_stack, _core._get_function_stack_at
_pop, _push = _core._pop_torch_function_stack, _core._push_on_torch_function_stack
_tracing, _transform = _core._get_tracing_state, _core._functorch.peek_interpreter_stack
_said = Lasting()  # of the process: a mode lives as long as a call


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

    def entries(self) -> int:
        """Count how often the mode is entered on this thread."""
        return sum(mode is self for mode in _stack())

    def leave(self, entered: int) -> None:
        """Take the mode from this thread's stack until it is entered so many times there. Idempotent."""
        while self.entries() > entered:
            stack = _stack()
            place = max(number for number, mode in enumerate(stack) if mode is self)
            _put_above(place, stack[place + 1 :])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, with a generator if it draws."""
        draw = _DRAWS.get(func)
        if draw is None or torch.compiler.is_compiling() or _is_recorded(types):
            return func(*args, **(kwargs or {}))
        return draw(self, func, args, kwargs or {})

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of a device; `None`, with an event, if it can have none but the process's."""
        if device.type in {"cuda", "xpu"} and device == torch.device(device.type):  # without a number
            device = torch.device(device.type, getattr(torch, device.type).current_device())
        found = self._generators.get(device)
        if found is None and device.type != "meta":  # which draws nothing
            try:
                made = torch.Generator(device)
            except RuntimeError as error:
                reason = f"{device.type} has no generators but the process's: {error}"
                _said.emit(NotApplied("own_random", reason))
                return None
            found = self._generators.setdefault(device, made.manual_seed(self._seed))  # another thread may be first
        return found

    def seed(self, seed: int) -> None:
        """Begin again at another seed."""
        self._seed, self._generators = seed, {}

    def states(self) -> States:
        """Return the seed, and the generators that were made, with their states."""
        made = list(self._generators.items())
        return States(self._seed, [(device, each, without_collection(each.get_state)) for device, each in made])

    def put_back(self, states: States) -> None:
        """Set the states of `states()`. Generators that were made later begin at the seed again."""
        self._seed = states.seed
        self._generators = {device: each for device, each, _ in states.generators}
        for _, each, state in states.generators:
            each.set_state(state)


setattr(OwnRandom, KEEPS_KERNELS, True)


class Entry:
    """Context with a mode on this thread. It is taken off whatever else was put there and left, and after any Ctrl-C.

    Args:
        mode: The mode.
    """

    __slots__ = ("__weakref__", "_before", "_dropped", "_mode")

    def __init__(self, mode: OwnRandom) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._before = self._mode.entries()
        # For Ctrl-C at the very beginning of `__exit__`, which is then not run.
        self._dropped = weakref.finalize(self, _leave, get_ident(), self._mode, self._before)
        try:
            _push(self._mode)
        except BaseException:  # Ctrl-C, after it was put there
            self._dropped()
            raise

    def __exit__(self, *_exception: object) -> None:
        try:
            self._mode.leave(self._before)
        finally:  # also after Ctrl-C in it
            self._dropped()


def _leave(thread: int, mode: OwnRandom, entered: int) -> None:
    if thread == get_ident():
        mode.leave(entered)


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


def _stack() -> list[Any]:
    """Return this thread's function modes, the innermost last."""
    return [_override_at(place) for place in range(_overrides())]


def _put_above(place: int, modes: list[Any]) -> None:
    """Replace this thread's function modes from a place on, also if Ctrl-C comes in between."""
    try:
        _replace(place, modes)
    except BaseException:
        _replace(place, modes)
        raise


def _replace(place: int, modes: list[Any]) -> None:
    while _overrides() > place:
        _pop()
    while _overrides() < place + len(modes):
        _push(modes[_overrides() - place])


class _Without:
    """Context without the innermost function mode. A class: a generator takes three times as long, 30 times a token."""

    __slots__ = ("_mode",)

    def __enter__(self) -> None:
        depth = _overrides()
        self._mode = _override_at(depth - 1)
        try:
            _pop()
        except BaseException:  # Ctrl-C, after it was taken away
            if _overrides() < depth:
                _push(self._mode)
            raise

    def __exit__(self, *_exception: object) -> None:
        _push(self._mode)


class _WithoutAny:
    """Context without any of this thread's modes, which may be below other function modes."""

    def __enter__(self) -> None:
        before = _stack()
        self._taken = [(each, before[place + 1 :]) for place, each in enumerate(before) if isinstance(each, OwnRandom)]
        try:
            _put_above(0, [each for each in before if not isinstance(each, OwnRandom)])
        except BaseException:  # Ctrl-C in it
            _put_above(0, before)
            raise

    def __exit__(self, *_exception: object) -> None:
        for mode, above in reversed(self._taken):
            stack = _stack()  # in which others may have been put meanwhile, such as `torch.set_default_device`
            places = [place for place, each in enumerate(stack) if any(each is other for other in above)]
            place = min(places, default=len(stack))
            _put_above(place, [mode, *stack[place:]])


_NOTHING = nullcontext()


def outside() -> AbstractContextManager[None]:
    """Return a context without this thread's modes.

    In it, functions of torch take no turn in Python, and dynamo finds no mode that it would have to trace.
    """
    if not _overrides():
        return _NOTHING
    owns = [isinstance(mode, OwnRandom) for mode in _stack()]
    if not any(owns):
        return _NOTHING
    return _Without() if owns[-1] and sum(owns) == 1 else _WithoutAny()


def draws_in(graph: Any) -> bool:
    """Check that a graph of `torch.fx` calls a function that draws."""
    return any(_draws(node) for node in graph.nodes)


def _draws(node: Any) -> bool:
    if node.op == "call_method":
        return node.target in _NAMES
    if node.op != "call_function" or node.target not in _DRAWS:
        return False
    if node.target in _SOMETIMES:
        return bool(_SOMETIMES[node.target](node.args, node.kwargs))
    return node.target not in _DROPOUT or _is_dropping(node.target, node.args, node.kwargs)


def _is_recorded(types: Any) -> bool:
    """Check for a recorder (`torch.jit.trace`, `torch.fx`), whose graph a generator of a block would outlive in."""
    return _tracing() is not None or not all(issubclass(kind, torch.Tensor) for kind in types)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device on which a function draws: the one that it is given, its tensors', or the default."""
    given = kwargs.get("device")
    if given is not None:  # before tensors, one of which may be a size
        return torch.device(given)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.get_default_device()


def _is_given(generator: Any) -> bool:
    """Check for a generator of the caller's. The process's, by name, is as none: it is what the block replaces."""
    if not isinstance(generator, torch.Generator):
        return False
    of_devices = torch.cuda.default_generators if generator.device.type == "cuda" else ()
    return not any(generator is own for own in (torch.default_generator, *of_devices))


def _given(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that takes a generator."""
    if _is_given(kwargs.get("generator")) or any(map(_is_given, args)):
        return func(*args, **kwargs)
    own = mode.generator(_device_of(args, kwargs))
    placed = [isinstance(value, torch.Generator) for value in args]
    if any(placed):
        return func(*(own if place else value for place, value in zip(placed, args, strict=True)), **kwargs)
    return func(*args, **{**kwargs, "generator": own})


def _like(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `rand_like`, `randn_like` or `randint_like`, which take a generator in late releases only."""
    if _is_given(kwargs.get("generator")):
        return func(*args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name not in {"input", "low", "high", "generator"}}
    wants_gradient = options.pop("requires_grad", False)
    given = args[0] if args else kwargs["input"]
    made = _blank(torch.empty_like(given, **options))
    generator = mode.generator(made.device)
    if func is torch.rand_like:
        made.uniform_(generator=generator)
    elif func is torch.randn_like:
        made.normal_(generator=generator)
    else:
        limits = [*args[1:], *(kwargs[name] for name in ("low", "high") if name in kwargs)]
        made.random_(*(limits if len(limits) > 1 else (0, *limits)), generator=generator)
    return made.requires_grad_() if wants_gradient else made  # which transforms of torch.func refuse, also to clear


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


def _dropped(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call dropout, as torch computes it on a CPU: some speech models drop at inference, too (Tacotron's prenet)."""
    given, p, _, in_place = _of_dropout(func, args, kwargs)
    shape = _noise_of(func, given)
    if not _is_dropping(func, args, kwargs) or not 0.0 < p < 1.0 or not given.numel() or shape is None:
        return func(*args, **kwargs)  # draws nothing, or raises its error
    of_noise = given.new_empty(shape) if func in _CHANNELS else torch.empty_like(given)  # in torch's order
    noise = _blank(of_noise).bernoulli_(1.0 - p, generator=mode.generator(given.device))
    if func not in _ALPHA:
        noise.div_(1.0 - p)
        return given.mul_(noise) if in_place else given * noise
    scale = 1.0 / math.sqrt((_SELU**2 * p + 1.0) * (1.0 - p))
    shift = noise.add(-1.0).mul_(_SELU * scale).add_(_SELU * scale * p)
    noise.mul_(scale)
    return (given.mul_(noise) if in_place else given * noise).add_(shift)


def _noise_of(func: Any, given: Tensor) -> torch.Size | None:
    """Return the shape of a dropout's noise: one number for each channel if it drops these; `None` for an error."""
    if func not in _CHANNELS:
        return given.shape
    allowed, batched = _CHANNELS[func]
    if given.dim() < 2 or (allowed and given.dim() not in allowed):  # noqa: PLR2004 - a batch and its channels
        return None
    kept = 1 if batched and given.dim() != batched else 2
    return torch.Size([*given.shape[:kept], *[1] * (given.dim() - kept)])


def _leaky(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a randomised leaky ReLU."""
    names = ("input", "lower", "upper", "training", "inplace" if func is functional.rrelu else "generator")
    named = dict(zip(names, args, strict=False)) | kwargs
    if not named.get("training", False) or _is_given(named.get("generator")):
        return func(*args, **kwargs)
    in_place = named.pop("inplace", False) or func is _any_torch.rrelu_
    named["generator"] = mode.generator(named["input"].device)
    return (_any_torch.rrelu_ if in_place else torch.rrelu)(named.pop("input"), **named)


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


def _unreached(mode: OwnRandom, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that takes no generator. If it draws, say so."""
    del mode
    if _UNREACHED[func](args, kwargs):
        _said.emit(NotApplied("own_random", f"{func.__name__} takes no generator, and draws from the process's"))
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
_Draw = Callable[[OwnRandom, Any, tuple[Any, ...], dict[str, Any]], Any]
_DRAWS: dict[Any, _Draw] = {
    **{getattr(torch, name): _given for name in _FUNCTIONS},
    **{getattr(torch.Tensor, name): _given for name in _NAMES},
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), _like),
    **dict.fromkeys(_DROPOUT, _dropped),
    **dict.fromkeys(_LEAKY, _leaky),
    **{getattr(init, name): _given for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_")},
    functional.gumbel_softmax: _gumbel,
    **dict.fromkeys(_UNREACHED, _unreached),
}
