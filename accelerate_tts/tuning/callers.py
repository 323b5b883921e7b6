"""Trial of shared steps: one pass over a decoder's weights for several callers, against one pass for each.

It is made where a decoder's blocks are fused, whether or not calls are limited to one at a time: threads come without
notice, and the trial takes a dozen steps. A pass is timed without threads, on the last step of the warm-up and copies
of its cache. What callers do between steps is theirs, and is not in these figures.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.errors import message_of
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.kernels.decoder_block import Call, run
from accelerate_tts.stages.decode.shared_steps import Rules, SharedSteps
from accelerate_tts.tuning.policy import OVER_BUDGET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate_tts.kernels.decoder_block import Described
    from accelerate_tts.plan import Part
    from accelerate_tts.tuning.baseline import Baseline
    from accelerate_tts.tuning.ledger import Ledger

_CALLERS = (2, 4, 8)
_LOOKS = 3
_GAIN = 1.1
"""Minimum gain of a pass for two. Threads that wake each other take some of it."""
_LONGEST = 5.0
"""Maximum seconds of the replay that shows a step."""
_MEMORY = 1 << 30
"""Maximum bytes of copied caches."""


def share_steps(baseline: Baseline, ledger: Ledger) -> None:
    """Let callers share steps of each decoder with fused blocks where that is faster, and say so on the receipt."""
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
    try:
        seen = _step_of(baseline, part, steps)
        if seen is None:
            return f"{no}: the warm-up made no token with it"
        gains = _gains(baseline, *seen)
    except Exception as error:  # must never cost the user the model
        reason = f"{type(error).__name__}: {message_of(error)}"
        emit(NotApplied(f"shared steps of {part.name}", reason))
        return f"{no}: {reason}"
    most, best = 1, _GAIN
    for callers, gain in gains.items():
        if gain >= best:
            most, best = callers, gain
    shown = ", ".join(f"{callers} {gain:.2f}x" for callers, gain in gains.items())
    if most == 1:
        return f"{no}: {f'together they are as fast as one, {shown}' if shown else 'a call has too many rows'}"
    steps.rules = Rules(most_rows=most * seen[1].rows)
    steps.is_on = True
    return f"concurrent calls share steps of {part.name}; callers, and their tokens a second against one's: {shown}"


def _step_of(baseline: Baseline, part: Part, steps: SharedSteps) -> tuple[Sequence[Described], Call] | None:
    """Return the blocks and the inputs of the last step in a replay, the step with the most blocks."""
    found: list[tuple[Sequence[Described], Call]] = []

    def recorded(blocks: Sequence[Described], call: Call) -> torch.Tensor:
        if not found or len(blocks) >= len(found[0][0]):
            found[:] = [(blocks, call)]
        return run(blocks, call)

    steps.rules = Rules(alone=recorded)
    try:
        baseline.replay(part)()
    finally:
        steps.rules = Rules()
    return found[0] if found else None


def _gains(baseline: Baseline, blocks: Sequence[Described], call: Call) -> dict[int, float]:
    """Return how much faster a pass for so many callers is than a pass for each.

    Raises:
        ValueError: A caller's result is not bit for bit the same as alone.
    """
    rules = Rules()
    size = sum(tensor.numel() * tensor.element_size() for pair in call.buffers for tensor in pair)
    counts = [count for count in _CALLERS if count * call.rows <= rules.most_rows]
    others = range(1, max(counts, default=1))
    copies = [call, *(_copy(call) if number * size <= _MEMORY else call for number in others)]
    expected = rules.alone(blocks, call)
    works: dict[int, Any] = {1: partial(rules.alone, blocks, call)}
    for count in counts:
        works[count] = partial(rules.together, blocks, copies[:count])
        if not all(torch.equal(part, expected) for part in works[count]().split(call.rows, 1)):
            raise ValueError(f"a step for {count} callers differs from the step of one")
    best = dict.fromkeys(works, float("inf"))
    for _ in range(_LOOKS):
        for count, work in works.items():
            best[count] = min(best[count], baseline.policy.look(work, baseline.device.type, baseline.policy.clock))
    return {count: count * best[1] / best[count] for count in counts}


def _copy(call: Call) -> Call:
    return call._replace(buffers=[(keys.clone(), values.clone()) for keys, values in call.buffers], attentions=None)
