"""The last word: the tuned object against the untouched one, through the public path that service calls take."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import FellBack, emit
from accelerate_tts.plan import PROCESS
from accelerate_tts.stages.process.constants import KeptConstants
from accelerate_tts.tuning.compare import EXACT_TOLERANCE, NOTHING_TO_COMPARE, Difference, compare, tensors_of
from accelerate_tts.tuning.disturbance import one_thread
from accelerate_tts.tuning.policy import OVER_BUDGET
from accelerate_tts.tuning.session import Kept, OtherThreadsDrawError
from accelerate_tts.tuning.timing import Timing, synchronize

if TYPE_CHECKING:
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.tuning.session import Session

__all__ = ["IN_ANY_CASE", "WHOLE_PASSES", "check_whole", "finish"]

IN_ANY_CASE = frozenset({KeptConstants.name})
"""Changes that `finish` makes without a trial; a warm pack has nothing to say of them."""

# What a verdict of fewer pairs than five must find before all is undone: so much is no noise of two passes.
_WORST_TOTAL = 0.95
# Pairs of passes, most first: those are run that fit into what is left of the budget. One pair is always run, but only
# from five on is its verdict one of 95 %.
_PAIRS = (5, 3, 1)
WHOLE_PASSES = 4
"""Passes that the check takes at least: does the output repeat, is it right, and a pair for its time."""
_LOOKS = 4  # passes for a comparison whose random numbers another thread used
# Another sampled sequence of the same speech is about as long and as loud; a broken one is not.
_LENGTHS, _LOUDNESS = 2.0, 4.0


def check_whole(session: Session, reference: list[Any]) -> tuple[Timing, Difference | None]:
    """Compare the whole object with what it was, and undo what the comparison does not bear out.

    A wrong result costs the changes that are not exact first, one after the other, what gains least first; and
    everything if that does not help. A slower one costs everything.

    Args:
        session: The tuning; its kept changes are in force afterwards.
        reference: What the untouched object computed in a warm pass.

    Returns:
        The timing of the two, and how far apart they are; `None` where the output does not repeat.
    """
    if not session.kept:
        return _unchanged(session.pass_seconds)
    if WHOLE_PASSES * session.pass_seconds > session.deadline - session.policy.clock():
        found = _at_once(session, reference)
        if found is not None:
            return found
    session.off()
    untouched, seconds = _clocked(session)
    repeats, reference = session.repeated(reference, session.run, second=untouched)
    session.on()
    difference: Difference | None = None
    lengths, tuned_seconds = 1.0, 0.0
    if repeats.error > EXACT_TOLERANCE:
        why = repeats.reason if repeats.reason == NOTHING_TO_COMPARE else "the output does not repeat under one seed"
        session.notes.append(f"only the parts were verified, not the whole: {why}")
    else:
        difference, lengths, tuned_seconds = _right(session, reference)
        if not session.kept:
            return _unchanged(_clocked(session)[1])
    left = session.deadline - session.policy.clock()
    fewest = next((pairs for pairs in _PAIRS if 2 * pairs * seconds <= left), _PAIRS[-1])
    if fewest == _PAIRS[-1] and tuned_seconds and (ratio := seconds / tuned_seconds) * lengths > 1.0:
        # Long passes: the two that have just shown what comes of it are a pair already, and as good as another one.
        timing, sure = Timing(seconds, tuned_seconds, ratio, ratio, ratio, 1), True
    else:
        timing, sure = _timed(session, fewest)
    timing = _for_the_same_length(timing, lengths)
    if timing.ratio < 1.0 <= timing.high and timing.pairs >= _PAIRS[0] and sure:
        # A gain of 10 % on 5 % of the time drowns in the noise of the whole: a total that seems slower, but is not
        # beyond doubt, is timed once more, and that decides.
        timing, sure = _timed(session, fewest)
        timing = _for_the_same_length(timing, lengths)
    if timing.pairs < _PAIRS[0]:
        session.notes.append(f"the total was timed in {timing.pairs} pairs only, for {OVER_BUDGET} allowed no more")
    # What is slower beside others' work may well be faster without; its parts have been compared one by one.
    if sure and timing.ratio < (1.0 if timing.pairs >= _PAIRS[0] else _WORST_TOTAL):
        _give_up(session, f"slower in total ({timing.ratio:.2f}x)", "everything")
        return _unchanged(timing.before)
    session.on()
    return timing, difference


def _at_once(session: Session, reference: list[Any]) -> tuple[Timing, Difference] | None:
    """The check in one pass, where more would go beyond the budget: `None` unless it is right and faster at once.

    What is the same as the reference needs no other pass to show that it repeats; and how long the reference took is
    known, with what recording the inputs took in it.
    """
    candidate, seconds = _clocked(session)
    difference = compare(reference, candidate)
    ratio = session.pass_seconds / seconds
    if difference.reason or session.tolerance.objection(difference) or ratio <= 1.0:
        return None
    session.notes.append(f"the total is one pass against the one that was recorded, for {OVER_BUDGET} allowed no more")
    return Timing(session.pass_seconds, seconds, ratio, ratio, ratio, 1), difference


def _timed(session: Session, fewest: int) -> tuple[Timing, bool]:
    """The total, and whether nothing disturbed it. If others are at work it is the processor time of one thread."""
    watcher, policy = session.watcher, session.policy
    states = (session.run, session.off, session.on, session.device.type, policy.total)
    for last in (False, True):
        with watcher.window() as window:
            timing = policy.compare(*states, fewest=fewest, clean=watcher.clean)
        if watcher.believes(timing, window.disturbance):
            return timing, True
        if last or fewest < _PAIRS[0] or not watcher.wait():
            break
    if session.device.type == "cpu" and all(kept.change.graphs is None for kept in session.kept):
        with one_thread():
            timing = policy.compare(*states, fewest=fewest, clock=time.process_time)
        session.notes.append("the total is the processor time of one thread, since others were at work")
    else:
        session.notes.append("the total was timed while others were at work")
    return timing, False


def finish(session: Session) -> None:
    """Warm-up ends here: the last kinds of input are run, and whatever is compiled later is worth an event."""
    session.run_others()
    for kept in session.kept:
        kept.change.seal()
    if session.constants.found:
        session.constants.on()
        session.kept.append(Kept(PROCESS, KeptConstants.name, "", session.constants))
        session.notes.append(f"kept, bit for bit, in place of computing it at each call: {session.constants}")


def _right(session: Session, reference: list[Any]) -> tuple[Difference | None, float, float]:
    """Undo what makes the whole wrong.

    Returns:
        The difference of the whole, how many times as long its result is now, and the seconds that a pass took.
    """
    while session.kept:
        candidate, seconds = _clocked(session)
        for _ in range(_LOOKS):
            difference = compare(reference, candidate)
            objection = session.tolerance.objection(difference)
            if not objection or not session.drawn_by_others():
                break
            candidate, seconds = _clocked(session)
        else:
            raise OtherThreadsDrawError
        if objection and any(map(_is_sampled, session.results)):
            objection = _unlike(session, reference, candidate)
            if not objection:
                return None, _size(candidate) / _size(reference), seconds
        if not objection:
            return difference, 1.0, seconds
        # A small error of one part can be a large one of the speech, and another part's none: one at a time.
        inexact = min(filter(_is_inexact, session.results), key=_loss, default=None)
        if inexact is None:
            _give_up(session, f"wrong in total: {objection}", "everything")
        else:
            what = f"{inexact.stage} of {inexact.part}"
            _give_up(session, f"wrong in total: {objection}", what, inexact)
    return Difference(0.0), 1.0, 0.0


def _loss(result: StageResult) -> tuple[bool, float]:
    """What is lost without a stage: seconds of a pass. A decoder's, whose steps were found right, goes last."""
    return _is_sampled(result), (result.before or 0.0) - (result.after or 0.0)


def _is_inexact(result: StageResult) -> bool:
    return result.kept and (result.error is None or result.error > EXACT_TOLERANCE)


def _is_sampled(result: StageResult) -> bool:
    """Whether a decoder's steps were verified one by one, so that another sequence of tokens may come of it."""
    return _is_inexact(result) and result.divergence is not None


def _unlike(session: Session, reference: list[Any], candidate: list[Any]) -> str:
    """What else than another sampled sequence is wrong with the whole, or "": the rest must be right without it."""
    sampled = {(result.part, result.stage) for result in session.results if _is_sampled(result)}
    changes = [kept.change for kept in session.kept if (kept.part, kept.stage) in sampled]
    for change in reversed(changes):
        change.off()
    try:
        objection = session.tolerance.objection(compare(reference, session.run()))
    finally:
        session.off()
        session.on()  # in the order in which they were made
    objection = objection or _implausible(reference, candidate)
    if not objection:
        worst = max(result.divergence or 0.0 for result in session.results if _is_sampled(result))
        session.notes.append(
            "another sequence is sampled than in fp32: the probabilities of a step diverge by at most"
            f" {worst:.1e} nats, {session.tolerance.divergence:.0e} are allowed;"
            " without that change the whole is as it was"
        )
    return objection


def _implausible(reference: list[Any], candidate: list[Any]) -> str:
    left, right = list(tensors_of(reference)), list(tensors_of(candidate))
    if [(a.dtype, a.dim()) for a in left] != [(b.dtype, b.dim()) for b in right]:
        return "other kinds of tensors come of it"
    for a, b in zip(left, right, strict=True):
        if not 1 / _LENGTHS <= max(b.numel(), 1) / max(a.numel(), 1) <= _LENGTHS:
            return f"a result of shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.is_floating_point() or a.numel() == 0:
            continue
        loud, now = (float(tensor.double().square().mean().sqrt()) for tensor in (a, b))
        if not loud / _LOUDNESS <= now <= loud * _LOUDNESS:  # a NaN is not
            return f"a result that is {now / loud if loud else now:.1g} times as loud"
    return ""


def _size(results: list[Any]) -> int:
    return max(1, sum(int(tensor.numel()) for tensor in tensors_of(results)))


def _for_the_same_length(timing: Timing, lengths: float) -> Timing:
    """The timing as it would be if the tuned object said no more or less than the untouched one."""
    return timing if lengths == 1.0 else replace(
        timing, ratio=timing.ratio * lengths, low=timing.low * lengths, high=timing.high * lengths,
    )  # fmt: skip


def _give_up(session: Session, reason: str, what: str, only: StageResult | None = None) -> None:
    session.drop(reason, lambda result: only is None or result is only)
    emit(FellBack(session.plan.what, what, reason))


def _clocked(session: Session) -> tuple[list[Any], float]:
    """What comes of a pass, and the seconds that it takes."""
    start = session.policy.clock()
    results = session.run()
    synchronize(session.device.type)
    return results, session.policy.clock() - start


def _unchanged(seconds: float) -> tuple[Timing, Difference]:
    return Timing(seconds, seconds, 1.0, 1.0, 1.0, 1), Difference(0.0)
