"""Tuning: try each stage on each part with captured inputs, keep what is faster and correct, and write a receipt.

Whatever fails, the object is at least as good as before. A stage that raises, compiles nothing, is slower, has no gain
beyond noise, or computes something else is switched off again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import described
from accelerate_tts.events import BudgetTooSmall, FellBack, NotApplied, Tuned, TunedUnderLoad, WarmupFailed, emit
from accelerate_tts.plan import PROCESS, Part
from accelerate_tts.tuning.activate import finish
from accelerate_tts.tuning.end_to_end import check_whole
from accelerate_tts.tuning.findings import Findings, recompile_counter, versions
from accelerate_tts.tuning.first_passes import first_passes
from accelerate_tts.tuning.ledger import Ledger
from accelerate_tts.tuning.timing import WORTH_A_SECOND_LOOK
from accelerate_tts.tuning.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.plan import ModelPlan
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.stages.protocol import Stage
    from accelerate_tts.tuning.baseline import Baseline
    from accelerate_tts.tuning.limits import Limits
    from accelerate_tts.tuning.warmup import WarmupCalls

_FIRSTS = 3
"""Calls whose time to the first piece is measured."""


def find(  # noqa: PLR0913, PLR0917 - what a tuning consists of
    plan: ModelPlan,
    calls: WarmupCalls,
    stages: Sequence[Stage],
    device: DeviceInfo,
    limits: Limits,
    known: Sequence[StageResult] = (),
) -> Findings:
    """Find the changes that make a loaded object faster, and put them in force.

    Args:
        plan: Its parts.
        calls: Warm-up calls through the path that service calls will take.
        stages: The stages to try, in order.
        device: The device.
        limits: Limits of tuning.
        known: Valid verdicts of an earlier tuning. These changes are compared, but not timed again.

    Returns:
        The changes in force, and the facts for a receipt. An exception of a warm-up call becomes a `WarmupFailed`
        event and a note that says so; the object is then untouched.
    """
    clock = limits.policy.clock
    start = clock()
    facts: dict[str, Any] = {
        "what": plan.what, "device": f"{device.kind} ({device.name})", "versions": versions(),
        "precision": limits.precision,
    }  # fmt: skip
    if not calls.main:
        return Findings(facts, ("no warmup= was given: nothing can be verified, so nothing was changed",))
    ledger = Ledger()
    limits.began(ledger)
    if acts_in_training(plan):
        ledger.notes.append(warn_of_training(plan))
    try:
        baseline = first_passes(plan, calls, device, limits, ledger)
    except Exception as error:  # the user's warm-up failed; the loaded model is kept
        reason = described(error)
        emit(WarmupFailed(plan.what, reason))
        return Findings({**facts, "seconds": clock() - start}, (f"the warm-up failed: {reason}",))
    try:
        facts |= _tried(baseline, ledger, stages, limits, {(result.part, result.stage): result for result in known})
    except _StoppedError as error:
        reason = str(error)
    except Exception as error:  # the user's model raised in a later pass; the loaded model is kept
        reason = described(error)
    except BaseException:  # Ctrl-C, SIGTERM's SystemExit: leave no half-tuned model behind
        ledger.off()
        raise
    else:
        kept, results, seconds = tuple(ledger.kept), _by_part(baseline, ledger), clock() - start
        facts |= {"stages": results, "seconds": seconds, "_live": recompile_counter(kept)}
        emit(Tuned(plan.what, sum(result.kept for result in results), len(results), facts["ratio"], seconds))
        return Findings(facts, tuple(ledger.notes), kept, True, baseline.plan.parts, baseline.expected)
    ledger.drop(reason)
    emit(FellBack(plan.what, "everything", reason))
    facts |= {"stages": _by_part(baseline, ledger), "seconds": clock() - start}
    return Findings(facts, (f"tuning was given up: {reason}",))


class _StoppedError(Exception):
    """The load was stopped while it was tuned."""


def _tried(
    baseline: Baseline, ledger: Ledger, stages: Sequence[Stage], limits: Limits,
    known: Mapping[tuple[str, str], StageResult],
) -> dict[str, Any]:  # fmt: skip
    """Try each stage on each part, then check the whole; return the receipt's figures of the whole."""
    for part, stage in _in_order(baseline, stages):
        if limits.stopped():
            raise _StoppedError("the load was cancelled")
        Trial(baseline, ledger, part, stage, known.get((part.name, stage.name))).run()
    if _look_again(baseline, ledger, stages, limits, known):  # further stages may apply now
        judged = {(result.part, result.stage) for result in ledger.results}
        for part, stage in _in_order(baseline, stages):
            if (part.name, stage.name) not in judged and not limits.stopped():
                Trial(baseline, ledger, part, stage, known.get((part.name, stage.name))).run()
    timing, difference = check_whole(baseline, ledger)
    finish(baseline, ledger)
    first_audio = baseline.first_audio(_FIRSTS)
    _say_how_sure(baseline, ledger)
    _say_what_was_missed(baseline, ledger)
    return {
        "cold": baseline.cold, "before": timing.before, "after": timing.after, "ratio": timing.ratio,
        "error": None if difference is None else difference.error,
        "spectral": None if difference is None else difference.spectral, "shares": _shares(baseline),
        "first_audio": first_audio,
    }  # fmt: skip


def _shares(baseline: Baseline) -> dict[str, float]:
    """Return the share of each part in the recorded pass of the untouched object."""
    whole = baseline.pass_seconds
    seconds = {name: seen.seconds for name, seen in baseline.captured.items()} if whole > 0.0 else {}
    return {name: min(1.0, spent / whole) for name, spent in seconds.items() if spent > 0.0}


def acts_in_training(plan: ModelPlan) -> bool:
    """Check for a module that is in train mode and computes something else there."""
    return any(_acts_in_training(module) for root in plan.roots for module in root.modules())


def warn_of_training(plan: ModelPlan) -> str:
    """Emit an event that a module is in train mode; return the text for a note."""
    why = "a module is in train mode, where dropout and batch statistics are on; call .eval() on it in the load"
    emit(NotApplied(f"tuning of {plan.what} for inference", why))
    return why


def _acts_in_training(module: Any) -> bool:
    from torch import nn

    if not module.training:
        return False
    rates = (getattr(module, name, None) for name in ("p", "dropout", "drop_prob"))
    if any(isinstance(rate, (int, float)) and rate for rate in rates):
        return True
    return isinstance(module, nn.modules.batchnorm._BatchNorm)  # the private base of torch's batch norms, 2.0 to 2.14


def _in_order(baseline: Baseline, stages: Sequence[Stage]) -> Iterator[tuple[Part, Stage]]:
    """Order the trials. Stages of the process come first, since they affect every later comparison.

    Cheap trials follow, then expensive ones: a compilation of one part must not use up the budget for the cheap stages
    of another. Within both, parts are sorted by their time. Parts that lead to one decision are adjacent, the deciding
    part first, since its change checks the decision that the others lead to. On each part, stages keep their order,
    since later ones build on the kept ones.
    """
    plan, costly = baseline.plan, baseline.policy.costly
    for stage in stages:
        if stage.process and plan.roots:
            yield Part(PROCESS, "process", plan.roots[0]), stage
    for late in (False, True):
        for part in sorted(plan.parts, key=lambda part: _rank(baseline, part)):
            for stage in stages:
                if not stage.process and (stage.cost_of(part) >= costly) is late:
                    yield part, stage


def _rank(baseline: Baseline, part: Part) -> tuple[float, bool, float]:
    """Rank a part: by the share of all parts that lead to its decision, the deciding part first, then by its share."""
    share = baseline.share(part)
    if part.decision is None:
        return -share, False, -share
    together = sum(baseline.share(other) for other in baseline.plan.parts if other.decision is part.decision)
    return -together, part.module is not part.decision.last, -share


def _look_again(
    baseline: Baseline, ledger: Ledger, stages: Sequence[Stage], limits: Limits,
    known: Mapping[tuple[str, str], StageResult],
) -> bool:  # fmt: skip
    """Repeat trials with an uncertain gain or an uncertain verdict, on top of the kept changes.

    On a shared machine such verdicts are random, and later stages may depend on them: a vocoder in half precision lost
    half of its gain over a layout that was not kept. Compiled stages are not repeated. Returns True if one is kept now.
    """
    kept_before = len(ledger.kept)
    named = {stage.name: stage for stage in stages}
    parts = {part.name: part for part in baseline.plan.parts}
    for result in [result for result in ledger.results if _is_undecided(result)]:
        part, stage = parts.get(result.part), named.get(result.stage)
        if any(kept.change.graphs for kept in ledger.kept_on(result.part)):
            continue  # a compiled stage would be compiled again with this change
        if part is None or stage is None or limits.stopped() or not (result.sure or baseline.watcher.look().quiet):
            continue
        ledger.results.remove(result)
        before = len(ledger.results)
        Trial(baseline, ledger, part, stage, known.get((part.name, stage.name))).run()
        if len(ledger.results) == before:
            ledger.results.append(result)
        elif ledger.results[-1].ratio is None:  # without time for it, the first verdict stands
            ledger.results[-1] = result
    return len(ledger.kept) > kept_before


def _is_undecided(result: StageResult) -> bool:
    if result.kept or result.graphs is not None:
        return False
    if result.ratio is None or result.low is None:
        return not result.sure
    return not result.sure or (result.ratio >= WORTH_A_SECOND_LOOK and result.low <= 1.0)


def _say_how_sure(baseline: Baseline, ledger: Ledger) -> None:
    """Report uncertain verdicts on the receipt and in an event."""
    watcher, results = baseline.watcher, ledger.results
    unsure = sum(not result.sure for result in results)
    if watcher.waited:
        ledger.notes.append(f"waited {watcher.waited:.1f} s for a quiet machine")
    if unsure:
        who = watcher.worst.why or "other threads drew random numbers"
        why = f"{who}; {unsure} of {len(results)} verdicts are uncertain"
        ledger.notes.append(f"tuning was disturbed: {why}, and the next load from a warm pack tries them again")
        emit(TunedUnderLoad(baseline.plan.what, who, unsure, len(results)))


def _say_what_was_missed(baseline: Baseline, ledger: Ledger) -> None:
    """Report the budget that the most promising stage without time needs."""
    for gain, part, stage, wanted in sorted(ledger.unmet, reverse=True)[:1]:
        if gain > 0:
            what, budget = f"{baseline.plan.what}: {part}", baseline.budget.seconds
            emit(BudgetTooSmall(what, stage, budget, float(math.ceil(wanted))))
            ledger.notes.append(f"{stage} on {part} may gain, and needs tune_seconds of about {math.ceil(wanted)}")


def _by_part(baseline: Baseline, ledger: Ledger) -> tuple[StageResult, ...]:
    """Return the verdicts, sorted by part."""
    order = {name: number for number, name in enumerate((PROCESS, *(part.name for part in baseline.plan.parts)))}
    return tuple(sorted(ledger.results, key=lambda result: order.get(result.part, len(order))))
