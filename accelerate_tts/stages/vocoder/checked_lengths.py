"""Parts on which lengths hang, to rounding, with each decision checked by its margin. For CPUs.

VITS rounds the duration of each token up to whole frames. A rounding error there is one frame more or less, and all
that follows is another waveform; so text encoder and durations had to be bit-exact. Here they are computed in fewer
operators, and before anything is decided each value is held against the edge at which the decision would turn. If one
lies within a bound of it, what was computed is thrown away, random generators are put back, and the untouched parts
decide, for this call.

The bound is not one number. How far rounding is carried through a spline that is inverted is known where it is
inverted: by the inverse of its slope there, which ranges over three orders of magnitude. So each token has a bound of
its own: what its splines amplify a rounding by, times a factor that is measured on this model's weights, on texts of
random tokens against the untouched parts, and taken eight times as large as the largest that was seen. What is not a
number, or at an edge itself, is never within the bound.
"""

from __future__ import annotations

import inspect
import math
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.signatures import has_hooks, parameters_of
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.patching.class_swap import FUSED, ClassSwap, subclass_with
from accelerate_tts.plan import CALL
from accelerate_tts.runtime.seeding import seeded, warming
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.layers.fused_sequence import Served
from accelerate_tts.stages.vocoder.vits import DURATIONS, TEXT, Amplified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch import nn

    from accelerate_tts.kernels.packed import Kernel
    from accelerate_tts.plan import Decision, Part
    from accelerate_tts.stages.protocol import Target

__all__ = ["CheckedStage", "holds", "is_checked"]

_CHECKED = "_accelerate_tts_checked"
_ROUNDING = 2.0**-24
_SAFETY = 8.0
_LEAST_FACTOR = 64.0
"""Of roundings: no measurement on a few texts shows that a part of a hundred operators does better than that."""
_TEXTS = 8


class _TooCloseError(Exception):
    """A decision of this call may turn with the rounding."""


def is_checked(module: nn.Module) -> bool:
    """Whether a part on which lengths hang is served now by something that checks each decision by its margin."""
    return hasattr(type(module), _CHECKED)


def holds(values: torch.Tensor, errors: torch.Tensor) -> bool:
    """Whether rounding up gives the same whole numbers for all values that are off by their errors at most.

    Args:
        values: Any shape, of logarithms that were exponentiated.
        errors: The largest error of each of the logarithms, broadcastable to it.
    """
    import torch

    # exp(x + e) is off by exp(x) * (exp(e) - 1); the second term is for exp itself, and the product with the rate.
    reach = values * (torch.expm1(errors) + 8 * _ROUNDING)
    distance = (values - values.round()).abs()
    return bool((distance > reach).all())  # a NaN is not


@dataclass
class _Attempt:
    """One call of an owner.

    Attributes:
        guard: The owner's.
        named: The call's arguments by name.
        untouched: Whether the untouched parts are to decide.
        fast: Whether something was computed to rounding.
        measuring: Whether the value is all that is wanted.
        later: The random generators' states that the untouched parts leave behind when they repeat a call.
    """

    guard: _Guard
    named: dict[str, Any]
    untouched: bool = False
    fast: bool = False
    measuring: bool = False
    later: tuple[Any, Any] | None = None


_attempt: ContextVar[_Attempt | None] = ContextVar("attempt", default=None)


@register_stage
class CheckedStage(BaseStage):
    """Serves a part on which lengths hang in fewer operators, where the decision is known.

    Args:
        kernel: What serves it: that of the durations first, for without it nothing else can be checked.
    """

    name = "checked by margin"
    devices = ("cpu",)
    after = ("fewer operators",)

    @classmethod
    def variants(cls, target: Target) -> Iterable[CheckedStage]:
        """See `BaseStage.variants`."""
        del target
        return map(cls, (DURATIONS, TEXT))

    def __init__(self, kernel: Kernel) -> None:
        self.name = f"{kernel.name} in fewer operators, checked by margin"
        self._kernel = kernel

    def applies(self, part: Part) -> str | None:
        """See `Stage.applies`."""
        decision = part.decision
        if decision is None or part.method != CALL:
            return "no decision is known that hangs on it"
        last = getattr(decision.owner, decision.parts[-1])
        if last is not part.module and not is_checked(last):
            return "the decision that hangs on it is not checked"
        return None if self._kernel.parts_of(part.module) is not None else "not of the class that is known"

    def prepare(self, part: Part) -> _Checked:
        """See `Stage.prepare`."""
        decision = cast("Decision", part.decision)
        last = getattr(decision.owner, decision.parts[-1])
        served = Served(part.module, self._kernel, part.name, "fp32")
        guard = _Guard(decision, served) if last is part.module else getattr(type(last), _CHECKED)
        return _Checked(part.module, served, guard)


class _Checked(BaseChange):
    """The change of one part; that of the last one brings the guard along."""

    def __init__(self, module: Any, served: Served, guard: _Guard) -> None:
        decides = guard.served is served
        self.guard = guard
        make = _deciding_class if decides else _leading_class
        modules = [module, guard.decision.owner] if decides else [module]
        self._swap = ClassSwap(
            modules,
            lambda m: _owner_class(type(m), guard) if m is guard.decision.owner else make(type(m), served, guard),
        )
        self._is_measured = False

    def on(self) -> None:
        self._swap.on()
        if not self._is_measured:
            self._is_measured = True
            self.guard.measure()

    def off(self) -> None:
        self._swap.off()


class _Guard:
    """What the parts of one owner share: the decision, and how far rounding is carried.

    Attributes:
        decision: The decision.
        served: What serves the part that decides.
        factor: Roundings that a value is off by at most, before its own amplification.
        calls: Calls whose decisions were looked at.
        repeated: Of them, those in which the untouched parts decided.
        last: What was looked at last.
    """

    def __init__(self, decision: Decision, served: Served) -> None:
        self.decision = decision
        self.served = served
        self.factor = _LEAST_FACTOR
        self.calls = self.repeated = 0
        self.last: Amplified | None = None
        self._measured_with: Any = None
        self._said = False

    def measure(self) -> None:
        """Find the factor, with whatever parts are served now.

        Raises:
            RuntimeError: The owner does not call the parts as it should, so nothing can be known of them.
        """
        for number in range(_TEXTS):
            named = self.decision.probe(self.decision.owner, number)
            plain, fast = (self._value(named, untouched=untouched) for untouched in (True, False))
            if not isinstance(fast, Amplified):
                raise RuntimeError(f"a plain text was not served by {self.decision.parts[-1]} in fewer operators")  # noqa: TRY004
            worst = float(((fast.value - plain).abs() / (fast.gain * _ROUNDING)).max())
            self.factor = max(self.factor, _SAFETY * worst) if math.isfinite(worst) else math.inf
        self._measured_with = self.served.described

    def _value(self, named: dict[str, Any], *, untouched: bool) -> Any:
        import torch

        token = _attempt.set(_Attempt(self, named, untouched=untouched, measuring=True))
        try:
            with seeded("cpu"), torch.no_grad():
                self.decision.owner.forward(**named)
        except _MeasuredError as measured:
            return measured.value
        finally:
            _attempt.reset(token)
        raise RuntimeError(f"{type(self.decision.owner).__name__} did not call its {self.decision.parts[-1]}")

    def holds(self, attempt: _Attempt, found: Amplified) -> bool:
        """Whether what was computed decides as the untouched parts would."""
        self.calls, self.last = self.calls + 1, found
        if self.served.described is not self._measured_with:  # other weights, of which nothing is known
            if not self._said:
                what = f"decisions by margin of {type(self.decision.owner).__name__}"
                emit(NotApplied(what, "its weights were written since it was tuned; the untouched parts decide"))
                self._said = True
            return False
        edges = self.decision.edges(self.decision.owner, attempt.named, found.value)
        return holds(edges, self.factor * _ROUNDING * found.gain)


class _MeasuredError(Exception):
    """Ends a call whose value was wanted."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _states() -> tuple[Any, Any]:
    """Of torch's and NumPy's generators, which VITS draws from."""
    import torch

    numpy: Any = sys.modules.get("numpy")
    return torch.get_rng_state(), None if numpy is None else numpy.random.get_state()


def _put_back(states: tuple[Any, Any]) -> None:
    import torch

    torch.set_rng_state(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])


def _owner_class(plain: Any, guard: _Guard) -> type:
    names = parameters_of(plain)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        parts = [getattr(self, name) for name in guard.decision.parts]
        if torch.compiler.is_compiling() or _attempt.get() is not None:
            return plain.forward(self, *args, **kwargs)
        # A user's hook on a part would be called twice, and is to see what upstream computes.
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        attempt = _Attempt(guard, named, untouched=has_hooks(*parts))
        before = _states()
        token = _attempt.set(attempt)
        try:
            try:
                return plain.forward(self, *args, **kwargs)
            except _TooCloseError:
                guard.repeated += 1
            # Others may have drawn meanwhile: what the generators are at now is where they go on from.
            attempt.untouched, attempt.fast, attempt.later = True, False, _states()
            _put_back(before)
            return plain.forward(self, *args, **kwargs)
        finally:
            _attempt.reset(token)

    vars(forward)["__signature__"] = inspect.signature(plain.forward)
    return subclass_with(plain, forward)


def _leading_class(plain: Any, served: Served, guard: _Guard) -> type:
    """Of a part that the decision hangs on by way of the last one."""
    names = parameters_of(plain)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attempt = _attempt.get()
        last = getattr(guard.decision.owner, guard.decision.parts[-1])
        if _is_checked_now(attempt, guard) and is_checked(last) and len(args) <= len(names):
            found = served.serve({**dict(zip(names, args, strict=False)), **kwargs})
            if found is not None:
                if attempt is not None:
                    attempt.fast = True
                return found
        return plain.forward(self, *args, **kwargs)

    return _marked(plain, forward, served, guard)


def _deciding_class(plain: Any, served: Served, guard: _Guard) -> type:
    names = parameters_of(plain)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attempt = _attempt.get()
        found = None
        if _is_checked_now(attempt, guard) and len(args) <= len(names):
            found = served.serve({**dict(zip(names, args, strict=False)), **kwargs})
        if attempt is None or attempt.guard is not guard:  # a replay, of which nothing hangs
            return plain.forward(self, *args, **kwargs) if found is None else found.value
        if found is None and attempt.fast:
            raise _TooCloseError
        value = plain.forward(self, *args, **kwargs) if found is None else found
        if attempt.measuring:
            raise _MeasuredError(value)
        if attempt.later is not None:
            _put_back(attempt.later)
        if found is None:
            return value
        if not guard.holds(attempt, found):
            raise _TooCloseError
        return found.value

    return _marked(plain, forward, served, guard)


def _is_checked_now(attempt: _Attempt | None, guard: _Guard) -> bool:
    """Whether a part may be computed to rounding: within a call of its owner, or where it is verified and timed."""
    return warming.get() if attempt is None else attempt.guard is guard and not attempt.untouched


def _marked(plain: Any, forward: Callable[..., Any], served: Served, guard: _Guard) -> type:
    vars(forward)["__signature__"] = inspect.signature(plain.forward)
    cls = subclass_with(plain, forward, copies="fp32")
    setattr(cls, FUSED, served)
    setattr(cls, _CHECKED, guard)
    return cls
