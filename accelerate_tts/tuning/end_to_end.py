"""Final check: the tuned object against the untouched one, through the public path."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import TimeLimitError, described
from accelerate_tts.events import FellBack, emit
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.compare import NOTHING_TO_COMPARE, Difference, compare, tensors_of
from accelerate_tts.tuning.disturbance import one_thread
from accelerate_tts.tuning.draws import LOOKS, OtherThreadsDrawError
from accelerate_tts.tuning.policy import OVER_BUDGET
from accelerate_tts.tuning.timing import Timing, synchronize

if TYPE_CHECKING:
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.tuning.baseline import Baseline
    from accelerate_tts.tuning.ledger import Ledger
    from accelerate_tts.tuning.policy import TuningPolicy


def check_whole(baseline: Baseline, ledger: Ledger) -> tuple[Timing, Difference | None]:
    """Compare the whole tuned object with the untouched one, and undo changes if it is wrong or slower.

    If the result is wrong, or the tuned object raises an error that the untouched one does not, inexact changes are
    undone one by one, the smallest gain first, and then everything; after an error exact changes are undone one by one,
    too. If it is slower, everything is undone.

    Args:
        baseline: The untouched object.
        ledger: The changes in force. Afterwards, those that are still kept are in force.

    Returns:
        The timing of the two, and their difference; `None` if the output does not repeat.
    """
    policy, reference = baseline.policy, baseline.output
    if not ledger.kept:
        return _unchanged(baseline.pass_seconds)
    if policy.whole_passes * baseline.pass_seconds > baseline.budget.left:
        found = _at_once(baseline, ledger)
        if found is not None:
            return found
    ledger.off()
    untouched, seconds = _clocked(baseline)
    repeats, reference = baseline.draws.repeated(reference, baseline.run, second=untouched)
    ledger.on()
    difference: Difference | None = None
    lengths, tuned_seconds = 1.0, 0.0
    if repeats.error > EXACT_TOLERANCE:
        why = repeats.reason if repeats.reason == NOTHING_TO_COMPARE else "the output does not repeat under one seed"
        ledger.notes.append(f"only the parts were compared, not the whole: {why}")
    else:
        difference, lengths, tuned_seconds = _right(baseline, ledger, reference)
        if not ledger.kept:
            return _unchanged(_clocked(baseline)[1])
    left = baseline.budget.left
    enough, least = policy.total_pairs[0], policy.total_pairs[-1]
    fewest = next((pairs for pairs in policy.total_pairs if 2 * pairs * seconds <= left), least)
    if fewest == least and tuned_seconds and (ratio := seconds / tuned_seconds) * lengths > 1.0:
        # For long passes, the two passes that gave the outputs are a pair already.
        timing, sure = Timing(seconds, tuned_seconds, ratio, ratio, ratio, 1), True
    else:
        timing, sure = _timed(baseline, ledger, fewest)
    timing = _for_the_same_length(timing, lengths)
    if timing.ratio < 1.0 <= timing.high and timing.pairs >= enough and sure:
        # A gain of 10 % on 5 % of the time is within the noise of the whole. A total that seems slower, without
        # certainty, is timed once more, and the second timing decides.
        timing, sure = _timed(baseline, ledger, fewest)
        timing = _for_the_same_length(timing, lengths)
    if timing.pairs < enough:
        ledger.notes.append(f"the whole was timed in {timing.pairs} pairs only: {OVER_BUDGET} allowed no more")
    # A total that is slower on a busy machine may be faster on a quiet one; its parts have been compared separately.
    if sure and timing.ratio < (1.0 if timing.pairs >= enough else policy.worst_total):
        _give_up(baseline, ledger, f"the whole is slower, {timing.ratio:.2f}x", "everything")
        return _unchanged(timing.before)
    ledger.on()
    return timing, difference


def _at_once(baseline: Baseline, ledger: Ledger) -> tuple[Timing, Difference] | None:
    """Check in one pass, if more would exceed the budget; return `None` unless the result is correct and faster.

    An output equal to the reference needs no other pass to show that it repeats. The reference's seconds are known,
    and include the capture of inputs.
    """
    try:
        candidate, seconds = _clocked(baseline)
    except TimeLimitError:
        raise
    except Exception:  # `_right` finds out by which change
        return None
    difference = compare(baseline.output, candidate)
    ratio = baseline.pass_seconds / seconds
    if difference.reason or baseline.tolerance.objection(difference) or ratio <= 1.0:
        return None
    ledger.notes.append(f"the whole was timed in one pass, against the recorded one: {OVER_BUDGET} allowed no more")
    return Timing(baseline.pass_seconds, seconds, ratio, ratio, ratio, 1), difference


def _timed(baseline: Baseline, ledger: Ledger, fewest: int) -> tuple[Timing, bool]:
    """Time the whole object; return the timing, and True if it was not disturbed.

    On a busy machine, the processor time of one thread is measured if nothing is compiled.
    """
    watcher, policy = baseline.watcher, baseline.policy
    states = (baseline.run, ledger.off, ledger.on, baseline.device.type, policy.total)
    for last in (False, True):
        with watcher.window() as window:
            timing = policy.compare(*states, fewest=fewest, clean=watcher.clean)
        if watcher.believes(timing, window.disturbance):
            return timing, True
        if last or fewest < policy.total_pairs[0] or not watcher.wait():
            break
    if baseline.device.type == "cpu" and not ledger.compiles:
        with one_thread():
            timing = policy.compare(*states, fewest=fewest, clock=time.process_time)
        ledger.notes.append("the machine was busy: the whole was timed by the processor time of one thread")
    else:
        ledger.notes.append("the machine was busy while the whole was timed")
    return timing, False


def _compared(
    baseline: Baseline, ledger: Ledger, reference: list[Any]
) -> tuple[list[Any] | None, Difference, float, str]:
    """Run a pass with the changes.

    Returns:
        Its results, or `None` if it raised; their difference from the reference; the seconds; and what is wrong, or "".
    """
    for _ in range(LOOKS):
        try:
            candidate, seconds = _clocked(baseline)
        except TimeLimitError:
            raise
        except Exception as error:
            ledger.off()
            _clocked(baseline)  # raises where the untouched object fails too, which is no change's fault
            ledger.on()
            return None, Difference(math.inf), 0.0, described(error)
        difference = compare(reference, candidate)
        objection = baseline.tolerance.objection(difference)
        if not objection or not baseline.draws.by_others():
            return candidate, difference, seconds, objection
    raise OtherThreadsDrawError


def _right(baseline: Baseline, ledger: Ledger, reference: list[Any]) -> tuple[Difference | None, float, float]:
    """Undo changes until the whole result is correct.

    Returns:
        The difference of the whole, the ratio of the results' lengths, and the seconds of a pass.
    """
    while ledger.kept:
        candidate, difference, seconds, objection = _compared(baseline, ledger, reference)
        if candidate is not None and objection and any(map(_is_sampled, ledger.results)):
            objection = _unlike(baseline, ledger, reference, candidate)
            if not objection:
                return None, _size(candidate) / _size(reference), seconds
        if not objection:
            return difference, 1.0, seconds
        # One change at a time: a small error of one part may be a large error of the speech.
        suspect = _suspect(ledger, raised=candidate is None)
        if suspect is None:
            _give_up(baseline, ledger, f"the whole is wrong: {objection}", "everything")
        else:
            what = f"{suspect.stage} of {suspect.part}"
            _give_up(baseline, ledger, f"the whole is wrong: {objection}", what, suspect)
    return Difference(0.0), 1.0, 0.0


def _suspect(ledger: Ledger, *, raised: bool) -> StageResult | None:
    """Return the change that is undone next; `None` for everything."""
    inexact = min(filter(_is_inexact, ledger.results), key=_loss, default=None)
    if inexact is None and raised:  # an exact change may raise: the last one goes first
        return next((result for result in reversed(ledger.results) if result.kept), None)
    return inexact


def _loss(result: StageResult) -> tuple[bool, float]:
    """Return the sort key of a stage's loss in seconds. Decoders, whose steps were verified, come last."""
    return _is_sampled(result), (result.before or 0.0) - (result.after or 0.0)


def _is_inexact(result: StageResult) -> bool:
    return result.kept and (result.error is None or result.error > EXACT_TOLERANCE)


def _is_sampled(result: StageResult) -> bool:
    """Check that a decoder's steps were verified one by one, so that it may sample another sequence of tokens."""
    return _is_inexact(result) and result.divergence is not None


def _unlike(baseline: Baseline, ledger: Ledger, reference: list[Any], candidate: list[Any]) -> str:
    """Return an objection to a result whose sampled sequence differs; "" if nothing else differs.

    Without the changes that sample another sequence, the output must equal the reference. With them, its lengths and
    its loudness must be plausible.
    """
    sampled = {(result.part, result.stage) for result in ledger.results if _is_sampled(result)}
    changes = [kept.change for kept in ledger.kept if (kept.part, kept.stage) in sampled]
    for change in reversed(changes):
        change.off()
    try:
        objection = baseline.tolerance.objection(compare(reference, baseline.run()))
    finally:
        ledger.off()
        ledger.on()  # in the order in which they were made
    objection = objection or _implausible(reference, candidate, baseline.policy)
    if not objection:
        worst = max(result.divergence or 0.0 for result in ledger.results if _is_sampled(result))
        limit = f"limit {baseline.tolerance.divergence:.0e}"
        if worst > baseline.tolerance.divergence:
            limit = "within the rounding of the model's own half precision"
        ledger.notes.append(
            "another sequence is sampled than by the untouched model: a step diverges by at most"
            f" {worst:.1e} nats, {limit}; without that change the whole output is the same"
        )
    return objection


def _implausible(reference: list[Any], candidate: list[Any], policy: TuningPolicy) -> str:
    left, right = list(tensors_of(reference)), list(tensors_of(candidate))
    if [(a.dtype, a.dim()) for a in left] != [(b.dtype, b.dim()) for b in right]:
        return "the results are tensors of other kinds"
    for a, b in zip(left, right, strict=True):
        if not 1 / policy.other_lengths <= max(b.numel(), 1) / max(a.numel(), 1) <= policy.other_lengths:
            return f"a result of shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.is_floating_point() or a.numel() == 0:
            continue
        loud, now = (float(tensor.double().square().mean().sqrt()) for tensor in (a, b))
        if not loud / policy.other_loudness <= now <= loud * policy.other_loudness:  # a NaN is not
            return f"a result that is {now / loud if loud else now:.1g} times as loud"
    return ""


def _size(results: list[Any]) -> int:
    return max(1, sum(int(tensor.numel()) for tensor in tensors_of(results)))


def _for_the_same_length(timing: Timing, lengths: float) -> Timing:
    """Scale the timing to results of the same length."""
    return timing if lengths == 1.0 else replace(
        timing, ratio=timing.ratio * lengths, low=timing.low * lengths, high=timing.high * lengths,
    )  # fmt: skip


def _give_up(baseline: Baseline, ledger: Ledger, reason: str, what: str, only: StageResult | None = None) -> None:
    if only is None:
        ledger.drop(reason)
    else:
        ledger.undo(only, reason)  # a slower alternative may be right
    emit(FellBack(baseline.plan.what, what, reason))


def _clocked(baseline: Baseline) -> tuple[list[Any], float]:
    """Run a pass; return its results and its seconds."""
    start = baseline.policy.clock()
    results = baseline.run()
    synchronize(baseline.device.type)
    return results, baseline.policy.clock() - start


def _unchanged(seconds: float) -> tuple[Timing, Difference]:
    return Timing(seconds, seconds, 1.0, 1.0, 1.0, 1), Difference(0.0)
