"""First passes of an untouched object, which record its outputs and the inputs of its parts."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from accelerate_tts.plan import PROCESS
from accelerate_tts.runtime.guard.guard import listening
from accelerate_tts.stages.process.constants import KeptConstants
from accelerate_tts.tuning.baseline import Baseline
from accelerate_tts.tuning.capture import calls_of, time_modules, watch
from accelerate_tts.tuning.compare import TOLERANCES
from accelerate_tts.tuning.draws import Draws
from accelerate_tts.tuning.kl_divergence import head_of
from accelerate_tts.tuning.linear_profile import linear_work
from accelerate_tts.tuning.policy import OVER_BUDGET
from accelerate_tts.tuning.timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.plan import ModelPlan, Part
    from accelerate_tts.runtime.guard.guard import Listener
    from accelerate_tts.tuning.capture import Captured
    from accelerate_tts.tuning.ledger import Ledger
    from accelerate_tts.tuning.limits import Limits
    from accelerate_tts.tuning.policy import TuningPolicy
    from accelerate_tts.tuning.warmup import WarmupCalls


@contextmanager
def _recording(
    parts: Sequence[Part], device: DeviceInfo, policy: TuningPolicy, constants: KeptConstants
) -> Generator[tuple[dict[str, Captured], Listener], None, None]:
    """Record a pass while open: the calls of each part, by its name, and those of `@inference` functions."""
    with watch(tuple(parts), device.type, policy.enough) as captured, listening() as listener, constants.watching():
        yield captured, listener


def one_pass(plan: ModelPlan, calls: WarmupCalls, device: DeviceInfo, limits: Limits) -> Baseline:
    """Make the baseline of one pass, for changes that were decided earlier and are not timed again."""
    policy, budget, constants, draws = limits.policy, limits.budget(), KeptConstants(), Draws(device.type)

    run = partial(draws.whole, calls.run)
    start = policy.clock()
    replayed = [part for part in plan.parts if part.name != PROCESS]
    with _recording(replayed, device, policy, constants) as (captured, listener), draws.finding():
        output = run()
    synchronize(device.type)
    cold = policy.clock() - start
    if not draws.found(output, run):
        output = run()
    return Baseline(
        _with_heads(plan, captured), calls, device, TOLERANCES[limits.precision], policy, limits.watcher(),
        budget, output, cold, cold, captured, listener.expected, draws, constants,
    )  # fmt: skip


def first_passes(plan: ModelPlan, calls: WarmupCalls, device: DeviceInfo, limits: Limits, ledger: Ledger) -> Baseline:
    """Make the baseline from a cold pass, and from a warm pass that gives the reference and the inputs of each part.

    If passes are so long that the budget allows no trial after two of them, the cold pass is the reference, too; unless
    most of it was spent outside of the parts, where a first pass sets things up (imports, and functions that numba
    compiles: 17 s of a voice clone of 0.1 s).
    """
    policy, watcher, budget, constants = limits.policy, limits.watcher(), limits.budget(), KeptConstants()
    clock, draws = policy.clock, Draws(device.type)

    run = partial(draws.whole, calls.run)

    def recorded(cold: Callable[[], float]) -> Baseline:
        with (
            watcher.window() as window,
            _recording(plan.parts, device, policy, constants) as (captured, listener),
            calls_of(plan.roots) as called,
            linear_work(plan.roots) as work,
        ):
            start = clock()
            output = run()
            seconds = clock() - start
        first = cold()
        parts = tuple(
            replace(part, cached=captured[part.name].cached, few_rows=work.share_of_few(part.module))
            for part in _with_heads(plan, captured).parts
        )
        reserved = min(policy.whole_passes * seconds, max(0.0, budget.left) / 3)
        return Baseline(
            replace(plan, parts=parts), calls, device, TOLERANCES[limits.precision], policy, watcher, budget,
            output, first, seconds, captured, listener.expected, draws, constants, called, window.disturbance.quiet,
            reserved,
        )  # fmt: skip

    begun = clock()

    def since() -> float:
        synchronize(device.type)
        return clock() - begun

    baseline: Baseline | None = None
    with KeptConstants().watching():  # keeps the functions replaced from one pass to the next
        with draws.finding():
            if plan.refine is None:
                baseline = recorded(since)
                first, cold = baseline.output, baseline.cold
            else:
                with time_modules(plan.roots, device.type) as seconds:
                    first = run()
                plan = replace(plan, parts=plan.refine(seconds), refine=None)
                cold = since()
        if not draws.found(first, run):
            baseline = None
        del first
        set_up = baseline is not None and baseline.share_elsewhere > policy.set_up_share and cold <= budget.left
        if baseline is None or set_up or policy.first_passes * cold <= budget.seconds:
            baseline = None  # freed first, since it has copies of the parts' inputs
            return recorded(lambda: cold)
    ledger.notes.append(f"outputs are compared with those of the first pass: {OVER_BUDGET} allows no other")
    return baseline


def _with_heads(plan: ModelPlan, captured: Mapping[str, Captured]) -> ModelPlan:
    """Return the plan with the output heads of its decoders that were called in a loop."""
    parts = (
        part if part.head is not None or part.name not in captured or not captured[part.name].cached
        else replace(part, head=head_of(part.module, plan.roots))
        for part in plan.parts
    )  # fmt: skip
    return replace(plan, parts=tuple(parts))
