"""The last word: the tuned object against the untouched one, through the public path that service calls take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.measure import Timing, compare_speed, synchronize
from accelerate_tts.engine.verify import EXACT_TOLERANCE, NOTHING_TO_COMPARE, Difference, compare
from accelerate_tts.events import FellBack, emit

if TYPE_CHECKING:
    from accelerate_tts.engine.receipt import StageResult
    from accelerate_tts.engine.session import Session

__all__ = ["check_whole", "finish"]

# The parts' own comparisons were sharper than one of the whole can be: a gain of 10 % on 5 % of the time drowns in its
# noise. So the whole must be slower beyond doubt, or by this much, before all is undone.
_WORST_TOTAL = 0.95
# Seconds for the comparison of the whole; compare_speed stretches them to at least five pairs.
_COMPARISON = 6.0
# Pairs of passes, most first: those are run that fit into what is left of the budget. One pair is always run, but only
# from five on is its verdict one of 95 %.
_PAIRS = (5, 3, 1)


def check_whole(session: Session, reference: list[Any]) -> tuple[Timing, Difference | None]:
    """Compare the whole object with what it was, and undo what the comparison does not bear out.

    A wrong result costs the changes that are not exact first, and everything if that does not help. A slower one costs
    everything.

    Args:
        session: The tuning; its kept changes are in force afterwards.
        reference: What the untouched object computed in a warm pass.

    Returns:
        The timing of the two, and how far apart they are; `None` where the output does not repeat.
    """
    if not session.kept:
        return _unchanged(_pass(session))
    session.off()
    clock = time.perf_counter()
    repeats = compare(reference, session.run())
    seconds = time.perf_counter() - clock
    session.on()
    difference: Difference | None = None
    if repeats.error > EXACT_TOLERANCE:
        why = repeats.reason if repeats.reason == NOTHING_TO_COMPARE else "the output does not repeat under one seed"
        session.notes.append(f"only the parts were verified, not the whole: {why}")
    else:
        difference = _right(session, reference)
        if not session.kept:
            return _unchanged(_pass(session))
    left = session.deadline - time.perf_counter()
    fewest = next((pairs for pairs in _PAIRS if 2 * pairs * seconds <= left), _PAIRS[-1])
    timing = compare_speed(session.run, session.off, session.on, session.device.type, _COMPARISON, fewest=fewest)
    surely = timing.high < 1.0 and timing.pairs >= _PAIRS[0]
    if surely or timing.ratio < _WORST_TOTAL:
        _give_up(session, f"slower in total ({timing.ratio:.2f}x)", "everything")
        return _unchanged(timing.before)
    session.on()
    return timing, difference


def finish(session: Session) -> None:
    """Warm-up ends here: the last kinds of input are run, and whatever is compiled later is worth an event."""
    session.run_others()
    for kept in session.kept:
        kept.change.seal()


def _right(session: Session, reference: list[Any]) -> Difference:
    """The difference of the whole, with what made it too large undone."""
    difference = compare(reference, session.run())
    objection = session.tolerance.objection(difference)
    if objection and any(map(_is_inexact, session.results)):
        _give_up(session, f"wrong in total: {objection}", "what is not exact", inexact=True)
        if not session.kept:
            return Difference(0.0)
        difference = compare(reference, session.run())
        objection = session.tolerance.objection(difference)
    if objection:
        _give_up(session, f"wrong in total: {objection}", "everything")
        return Difference(0.0)
    return difference


def _is_inexact(result: StageResult) -> bool:
    return result.kept and (result.error is None or result.error > EXACT_TOLERANCE)


def _give_up(session: Session, reason: str, what: str, *, inexact: bool = False) -> None:
    session.drop(reason, _is_inexact if inexact else lambda _result: True)
    emit(FellBack(session.plan.what, what, reason))


def _pass(session: Session) -> float:
    clock = time.perf_counter()
    session.run()
    synchronize(session.device.type)
    return time.perf_counter() - clock


def _unchanged(seconds: float) -> tuple[Timing, Difference]:
    return Timing(seconds, seconds, 1.0, 1.0, 1.0, 1), Difference(0.0)
