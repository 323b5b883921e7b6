"""Parts that decide lengths, exact to rounding, with each decision checked by its margin. For CPUs.

VITS rounds the duration of each token up to whole frames. A rounding error there changes the number of frames, and with
it the whole waveform. Text encoder and duration predictor would therefore have to be bit-exact. Here they are computed
in fewer operators, and each value is compared with the edge at which its decision would flip. If a value lies within
its error bound of an edge, the result is discarded, the random generators are restored, and the untouched parts decide
for this call.

Each token has an error bound of its own. An inverted spline amplifies a rounding error by the inverse of its slope,
which ranges over three orders of magnitude. The bound is this amplification times a factor. The factor is measured on
this model's weights, with texts of random tokens against the untouched parts; eight times the largest observed value is
used. NaN, and a value exactly at an edge, always fail the check.
"""

from __future__ import annotations

import inspect
import math
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.signatures import has_hooks, parameters_of
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.patching.class_swap import FUSED, ClassSwap, subclass_with
from accelerate_tts.plan import CALL
from accelerate_tts.runtime.seeding import Source, seeded, sources_of, warming
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.layers.fused_sequence import Served
from accelerate_tts.stages.vocoder.vits import DURATIONS, TEXT, Amplified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from accelerate_tts.kernels.packed import Kernel
    from accelerate_tts.plan import Decision, Part
    from accelerate_tts.stages.protocol import Target

_CHECKED = "_accelerate_tts_checked"
_ROUNDING = 2.0**-24
_SAFETY = 8.0
_LEAST_FACTOR = 64.0
"""Minimum factor, in roundings: a few texts cannot show that a part of a hundred operators is more accurate."""
_TEXTS = 8


class _TooCloseError(Exception):
    """A decision of this call may depend on rounding.

    Attributes:
        drawn: True if the deciding part has drawn its random numbers.
    """

    def __init__(self, *, drawn: bool) -> None:
        super().__init__()
        self.drawn = drawn


def is_checked(module: nn.Module) -> bool:
    """Check that a part that decides lengths is replaced now by one with checked decisions."""
    return hasattr(type(module), _CHECKED)


def holds(values: torch.Tensor, errors: torch.Tensor) -> bool:
    """Check that rounding up gives the same integers for all values within their error bounds.

    Args:
        values: Exponentials, of any shape.
        errors: Error bounds of their logarithms, broadcastable to `values`.
    """
    # exp(x + e) is off by exp(x) * (exp(e) - 1). The second term covers exp itself and the product with the rate.
    reach = values * (torch.expm1(errors) + 8 * _ROUNDING)
    distance = (values - values.round()).abs()
    return bool((distance > reach).all())  # False for NaN


@dataclass
class _OwnerCall:
    """One call of an owner.

    Attributes:
        guard: The owner's guard.
        named: The call's arguments by name.
        untouched: Let the untouched parts decide.
        fast: True once a part was computed in fewer operators.
        measuring: Stop the call as soon as the deciding value is known.
        later: States of the random generators that are set after the untouched parts have repeated a call.
    """

    guard: _Guard
    named: dict[str, Any]
    untouched: bool = False
    fast: bool = False
    measuring: bool = False
    later: list[tuple[Source, Any]] | None = None


_attempt: ContextVar[_OwnerCall | None] = ContextVar("attempt", default=None)


@register_stage
class CheckedStage(BaseStage):
    """Computes a part that decides lengths in fewer operators, if its decision is known and can be checked.

    Args:
        kernel: Implementation of the part. The duration predictor's comes first, since it checks the decision.
    """

    name = "checked by margin"
    devices = ("cpu",)
    after = ("fewer operators",)

    @classmethod
    def variants(cls, target: Target) -> Iterable[CheckedStage]:
        del target
        return map(cls, (DURATIONS, TEXT))

    def __init__(self, kernel: Kernel) -> None:
        self.name = f"{kernel.name} in fewer operators, checked by margin"
        self._kernel = kernel

    def applies(self, part: Part) -> str | None:
        decision = part.decision
        if decision is None or part.method != CALL:
            return "no decision is known that hangs on it"
        last = decision.last
        if last is not part.module and not is_checked(last):
            return "the decision that hangs on it is not checked"
        return None if self._kernel.parts_of(part.module) is not None else "not of the class that is known"

    def prepare(self, part: Part) -> _Checked:
        decision = cast("Decision", part.decision)
        last = decision.last
        served = Served(part.module, self._kernel, part.name, "fp32")
        guard = _Guard(decision, served) if last is part.module else getattr(type(last), _CHECKED)
        return _Checked(part.module, served, guard)


class _Checked(BaseChange):
    """The change of one part. The change of the deciding part also swaps the owner's class."""

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
    """State that the parts of one owner share: the decision and its error bound.

    Attributes:
        decision: The decision.
        served: Replacement of the deciding part.
        factor: Error bound of a value in roundings, before its own amplification.
        calls: Number of calls whose decisions were checked.
        repeated: Number of calls in which the untouched parts decided.
        last: The value that was checked last.
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
        """Measure the factor with the parts that are replaced now.

        Raises:
            RuntimeError: The owner does not call the parts as expected, so their errors cannot be measured.
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
        token = _attempt.set(_OwnerCall(self, named, untouched=untouched, measuring=True))
        try:
            with seeded("cpu"), torch.no_grad():
                self.decision.owner.forward(**named)
        except _MeasuredError as measured:
            return measured.value
        finally:
            _attempt.reset(token)
        raise RuntimeError(f"{type(self.decision.owner).__name__} did not call its {self.decision.parts[-1]}")

    def holds(self, attempt: _OwnerCall, found: Amplified) -> bool:
        """Check that a value decides as the untouched parts would."""
        self.calls, self.last = self.calls + 1, found
        if self.served.described is not self._measured_with:  # the weights changed, so the factor is unknown
            if not self._said:
                what = f"decisions by margin of {type(self.decision.owner).__name__}"
                emit(NotApplied(what, "its weights were written since it was tuned; the untouched parts decide"))
                self._said = True
            return False
        edges = self.decision.edges(self.decision.owner, attempt.named, found.value)
        return holds(edges, self.factor * _ROUNDING * found.gain)


class _MeasuredError(Exception):
    """Ends a call as soon as the value is known."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _states() -> list[tuple[Source, Any]]:
    """Return torch's and NumPy's generators, which VITS draws from, with their states."""
    return [(source, source.get()) for name, source in sources_of(()).items() if name[0] != "python"]


def _put_back(states: list[tuple[Source, Any]]) -> None:
    for source, state in states:
        source.put(state)


def _owner_class(plain: Any, guard: _Guard) -> type:
    names = parameters_of(plain)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        parts = [getattr(self, name) for name in guard.decision.parts]
        if torch.compiler.is_compiling() or _attempt.get() is not None:
            return plain.forward(self, *args, **kwargs)
        # A user's hook on a part must be called once, and see what upstream computes.
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        attempt = _OwnerCall(guard, named, untouched=has_hooks(*parts))
        before = _states()
        token = _attempt.set(attempt)
        try:
            try:
                return plain.forward(self, *args, **kwargs)
            except _TooCloseError as close:
                guard.repeated += 1
                # Other code may have drawn meanwhile, so the generators continue from their present states afterwards.
                attempt.later = _states() if close.drawn else None
            attempt.untouched, attempt.fast = True, False
            _put_back(before)
            return plain.forward(self, *args, **kwargs)
        finally:
            _attempt.reset(token)

    vars(forward)["__signature__"] = inspect.signature(plain.forward)
    return subclass_with(plain, forward)


def _leading_class(plain: Any, served: Served, guard: _Guard) -> type:
    """Make the class of a part that influences the decision through the deciding part."""
    names = parameters_of(plain)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attempt = _attempt.get()
        last = guard.decision.last
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
        if attempt is None or attempt.guard is not guard:  # a replayed call, which decides nothing
            return plain.forward(self, *args, **kwargs) if found is None else found.value
        if found is None and attempt.fast:
            raise _TooCloseError(drawn=False)
        value = plain.forward(self, *args, **kwargs) if found is None else found
        if attempt.measuring:
            raise _MeasuredError(value)
        if attempt.later is not None:
            _put_back(attempt.later)
        if found is None:
            return value
        if not guard.holds(attempt, found):
            raise _TooCloseError(drawn=True)
        return found.value

    return _marked(plain, forward, served, guard)


def _is_checked_now(attempt: _OwnerCall | None, guard: _Guard) -> bool:
    """Check that a part may be computed in fewer operators: in a call of its owner, or while tuning compares it."""
    return warming.get() if attempt is None else attempt.guard is guard and not attempt.untouched


def _marked(plain: Any, forward: Callable[..., Any], served: Served, guard: _Guard) -> type:
    vars(forward)["__signature__"] = inspect.signature(plain.forward)
    cls = subclass_with(plain, forward, copies="fp32")
    setattr(cls, FUSED, served)
    setattr(cls, _CHECKED, guard)
    return cls
