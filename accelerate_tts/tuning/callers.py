"""Trial of shared steps: one pass over a decoder's weights for several callers, against one pass for each.

It is made where a decoder's blocks are fused (CPU) or its steps are recorded (GPU), whether or not calls are limited
to one at a time: threads come without notice, and the trial takes a dozen steps. A pass is timed without threads, on
the last step of the warm-up and copies of its cache. What callers do between steps is not in these figures.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.errors import message_of
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.stages.decode.shared_steps import SharedSteps
from accelerate_tts.tuning.policy import OVER_BUDGET

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.decode.shared_steps import Joinable, Rules
    from accelerate_tts.tuning.baseline import Baseline
    from accelerate_tts.tuning.ledger import Ledger

_CALLERS = (2, 4, 8)
_LOOKS = 3
_TOKENS = 8
"""Tokens of which all bits are compared, where they may vary: those of a single one may agree by chance."""
_GAIN = 1.1
"""Minimum gain of a pass for two. Threads that wake each other take some of it."""
_LEAST_ALONE = 0.9
"""Minimum speed of a caller that is alone where steps are shared, against where they are not."""
_LONGEST = 5.0
"""Maximum seconds of the replay that shows a step."""
_MEMORY = 1 << 30
"""Maximum bytes of copied caches."""


def share_steps(baseline: Baseline, ledger: Ledger) -> None:
    """Let callers share steps of each decoder where that can be done and is faster, and say so on the receipt."""
    parts = {part.name: part for part in baseline.plan.parts}
    for kept in ledger.kept:
        for steps in getattr(kept.change, "steps", ()):
            part = parts.get(kept.part)
            if part is not None and isinstance(steps, SharedSteps):
                ledger.notes.append(_tried(baseline, part, steps))


def _tried(baseline: Baseline, part: Part, steps: SharedSteps) -> str:
    steps.is_on = False
    no = f"concurrent calls do not share steps of {part.name}"
    cost = baseline.captured_seconds(part)
    if cost > min(_LONGEST, baseline.budget.left):
        return f"{no}: a step of it takes {cost:.1f} s to show, over {OVER_BUDGET}"
    found, rows = _Gains({}, []), 1
    try:
        seen = _step_of(baseline, part, steps)
        if seen is None:
            return f"{no}: the warm-up made no token with it"
        rows = seen[1].rows
        found = _gains(baseline, steps.usual, *seen)
    except Exception as error:  # must never cost the user the model
        reason = f"{type(error).__name__}: {message_of(error)}"
        emit(NotApplied(f"shared steps of {part.name}", reason))
        return f"{no}: {reason}"
    finally:
        most = found.most()
        steps.usual.arrange((1, *(callers for callers in found.gains if 1 < callers <= most)), rows)
    shown = ", ".join(f"{callers} {gain:.2f}x" for callers, gain in found.gains.items())
    others = ""
    if found.differ:
        others = f"; not for {' and '.join(map(str, found.differ))}, whose results differ in bits from those of one"
    if most == 1 and not found.gains:
        return f"{no}: {'a call has too many rows' if not found.differ else others.removeprefix('; ')}"
    if most == 1:
        return f"{no}: together they are as fast as one, {shown}{others}"
    steps.rules = steps.usual._replace(most_rows=most * rows)
    steps.is_on = True
    return (
        f"concurrent calls share steps of {part.name}; callers, and their tokens a second against one's: {shown}"
        f"{others}"
    )


class _Gains(NamedTuple):
    gains: dict[int, float]
    """Ratio of a pass for each to a pass for so many callers, by the number of callers."""
    differ: list[int]
    """Numbers of callers whose results differ in bits from those of one."""

    def most(self) -> int:
        """Return the number of callers that gains most; 1 if none gains enough."""
        if self.gains.get(1, 1.0) < _LEAST_ALONE:
            return 1
        most, best = 1, _GAIN
        for callers, gain in self.gains.items():
            if gain >= best:
                most, best = callers, gain
        return most


def _step_of(baseline: Baseline, part: Part, steps: SharedSteps) -> tuple[Sequence[Any], Joinable] | None:
    """Return the blocks and the inputs of the last step in a replay, the step with the most blocks."""
    found: list[tuple[Sequence[Any], Joinable]] = []

    def recorded(blocks: Sequence[Any], call: Joinable) -> Any:
        result = steps.usual.alone(blocks, call)
        if result is not None and (not found or len(blocks) >= len(found[0][0])):
            found[:] = [(blocks, call)]
        return result

    steps.rules = steps.usual._replace(alone=recorded)
    try:
        baseline.replay(part)()
    finally:
        steps.rules = steps.usual
    if found:
        found[0][1].undo()
    return found[0] if found else None


class _Trial:
    """Passes for several callers, on copies of one step."""

    def __init__(self, baseline: Baseline, rules: Rules, blocks: Sequence[Any], call: Joinable) -> None:
        self._baseline, self._rules, self._blocks = baseline, rules, blocks
        self.counts = [count for count in _CALLERS if count * call.rows <= rules.most_rows]
        size = call.size()
        if rules.bits_vary:  # each cache grows
            self.counts = [count for count in self.counts if size * (count - 1) <= _MEMORY]
        others = range(1, max(self.counts, default=1))
        self._calls = [call, *(call.copied() if number * size <= _MEMORY else call for number in others)]

    def alone(self) -> Any:
        """Compute a step of one caller."""
        result = self._rules.alone(self._blocks, self._calls[0])
        if result is None:
            raise ValueError("its step cannot be computed by itself")
        self._calls[0].undo()
        return result

    def together(self, count: int) -> Any:
        """Compute a step of so many callers."""
        result = self._rules.together(self._blocks, self._calls[:count])
        for call in self._calls[:count]:
            call.undo()
        return result

    def states(self, count: int) -> list[list[torch.Tensor]]:
        """Return the results of some tokens of each of so many callers."""
        found: list[list[torch.Tensor]] = [[] for _ in range(count)]
        done = 0
        for number in range(_TOKENS):
            calls = [call.following(number) for call in self._calls[:count]]
            if None in calls:
                break
            rows = calls[0].rows
            made = self._rules.together(self._blocks, calls) if count > 1 else self._rules.alone(self._blocks, calls[0])
            for place in range(count):
                found[place] += calls[0].tensors(self._rules.taken(made, place * rows, rows) if count > 1 else made)
            done += 1
        if not done:
            raise ValueError("the last step of the warm-up has no room for another")
        for call in self._calls[:count]:
            for _ in range(done):
                call.undo()
        return found

    def best_of(self, works: dict[int, Callable[[], Any]]) -> dict[int, float]:
        """Return the least seconds of each."""
        best = dict.fromkeys(works, float("inf"))
        policy, device = self._baseline.policy, self._baseline.device.type
        for _ in range(_LOOKS):
            for count, work in works.items():
                best[count] = min(best[count], policy.look(work, device, policy.clock))
        return best


def _gains(baseline: Baseline, rules: Rules, blocks: Sequence[Any], call: Joinable) -> _Gains:
    """Time passes for several callers, and compare them with a step alone.

    Raises:
        ValueError: A caller's result is not bit for bit the same as alone, and the rules do not expect that.
    """
    trial = _Trial(baseline, rules, blocks, call)
    before = None
    if rules.bits_vary and trial.counts:  # where steps are shared, one of a caller alone is made in another way, too
        trial.alone()
        before = trial.best_of({1: trial.alone})[1]
        rules.arrange((1, *trial.counts), call.rows)
    (expected,) = trial.states(1)
    works: dict[int, Callable[[], Any]] = {1: trial.alone}
    differ = []
    for count in trial.counts:
        if all(len(one) == len(expected) and all(map(torch.equal, one, expected)) for one in trial.states(count)):
            works[count] = partial(trial.together, count)
        elif rules.bits_vary:
            differ.append(count)
        else:
            raise ValueError(f"a step for {count} callers differs from the step of one")
    best = trial.best_of(works) if len(works) > 1 else {}
    one = best.get(1, 0.0) if before is None else before
    return _Gains({count: count * one / best[count] for count in best if count > 1 or before is not None}, differ)
