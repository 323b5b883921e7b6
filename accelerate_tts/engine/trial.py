"""Try one stage on one part: compute with it, compare, time it against what was there, keep it or switch it off."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate_tts.engine.compilers import compiling_within
from accelerate_tts.engine.measure import compare_speed
from accelerate_tts.engine.plan import PROCESS
from accelerate_tts.engine.receipt import StageResult
from accelerate_tts.engine.session import Kept, Session, fallbacks, switch_off
from accelerate_tts.engine.verify import EXACT_TOLERANCE, NOTHING_TO_COMPARE
from accelerate_tts.errors import TimeLimitError
from accelerate_tts.events import FellBack, Trying, emit

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate_tts.engine.capture import Which
    from accelerate_tts.engine.plan import Part
    from accelerate_tts.engine.stages import Change, Stage
    from accelerate_tts.engine.verify import Difference

__all__ = ["MARGIN", "OVER_BUDGET", "try_stage"]

MARGIN = 1.02
"""A stage must be faster by this factor. Less is not worth a receipt's line, nor a dependency on a compiler."""

OVER_BUDGET = "the tuning budget"
"""In the reason of a stage that a larger budget would have given another chance."""

# Seconds beyond the budget after which a stage that is being prepared, or run for the first time, hangs.
_HANGS = 10.0
# Seconds for one comparison of speeds; compare_speed stretches them to at least five pairs.
_COMPARISON = 2.0
# A candidate that takes this many times as long as the untouched part, after a run that filled its caches, is dropped
# without being timed in pairs: half precision on a CPU without it can be a hundred times slower.
_HOPELESS = 3.0
# One that took this many times as long for its outputs, though it compiles nothing, is not run again.
_NOT_TWICE = 10.0
# Bytes of weights that a slow machine makes copies of in other formats, in a second. They are made when first needed.
_COPIED_A_SECOND = 2.5e8
# Seconds of a replay up to which the first look is the better of two, and those up to which it decides nothing: of
# microseconds a neighbour makes milliseconds, and pairs of so little are timed in no time.
_CHEAP_LOOK, _CHEAP_PAIRS = 0.05, 0.01
# An alternative that takes this many times as long as the one in force did when it was timed is not timed in pairs.
_FAR_BEHIND = 1.3
# Seconds of one replay from which a first look that shows no gain at all is enough: so much work varies by a few per
# cent, and the pairs would take a tenth of the budget.
_LONG_REPLAY = 0.5
# Replays before the pairs: the outputs, and a first look.
_FIRST_REPLAYS = 2
# Pairs of replays that a verdict needs, and seconds over the budget that it may take.
_PAIRS = 5
_SLACK = 2.0
# Bytes of weights that no processor's caches hold: then what reads fewer of them is faster.
_FROM_MEMORY = 512 << 20
# Seconds of a warm-up pass up to which changes of the process are tried.
_LONGEST_PASS = 3.0


def try_stage(session: Session, part: Part, stage: Stage) -> None:
    """Try one stage on one part, and record what came of it."""
    clock = time.perf_counter()
    result = StageResult(part.name, stage.name, kept=False, reason="")
    rival: Kept | None = None
    change: Change | None = None
    times = stage.times
    try:
        if stage.applies(part) is not None:
            return  # nothing to try, nothing to report
        obstacle = _not_worth_it(session, part, stage)
        if obstacle is not None:
            session.results.append(replace(result, reason=obstacle))
            return
        emit(Trying(f"{session.plan.what}: {part.name}", stage.name))
        rival = session.incumbent(part, stage.group)
        session.reference(part)  # of the part as it was loaded, so before the first change is made
        if rival is not None:
            session.lift(rival)
        change = compiling_within(_left(session), stage.name, lambda: stage.prepare(part))
        if rival is not None and rival.times == "pass":  # which calls by themselves would make slower than it is
            times = "pass"
        result = _judge(session, part, change, rival, result, times)
    except Exception as error:  # a stage must never cost the user the model
        result = replace(result, kept=False, reason=_failure(session, part, stage, error))
    finally:
        if not result.kept:
            result = _put_back(session, part, stage, change, rival, result)
    graphs = None if change is None else change.graphs
    result = replace(result, graphs=graphs, seconds=time.perf_counter() - clock)
    if result.kept and change is not None:
        if rival is not None:
            _replaced(session, rival, stage.name)
        session.kept.append(Kept(part.name, stage.name, stage.group, change, times))
    session.results.append(result)


def _put_back(  # noqa: PLR0913, PLR0917 - what a trial consists of
    session: Session, part: Part, stage: Stage, change: Change | None, rival: Kept | None, result: StageResult
) -> StageResult:
    """Switch a change off that is not kept, and the one that it was to replace on again."""
    if change is not None:
        try:
            switch_off((change,))
        except Exception as error:  # see `try_stage`
            result = replace(result, reason=_failure(session, part, stage, error))
    if rival is not None:
        session.put(rival)
    return result


def _failure(session: Session, part: Part, stage: Stage, error: Exception) -> str:
    """Say in an event that a stage raised, or did not come back; and why it is dropped."""
    if isinstance(error, TimeLimitError):
        emit(FellBack(f"{session.plan.what}: {part.name}", stage.name, str(error)))
        return "; ".join(filter(None, (f"given up: it ran over {OVER_BUDGET} and was interrupted", error.stopped)))
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    emit(FellBack(f"{session.plan.what}: {part.name}", stage.name, reason))
    return f"failed: {reason}"


def _replaced(session: Session, rival: Kept, by: str) -> None:
    session.kept.remove(rival)
    for number, result in enumerate(session.results):
        if result.kept and (result.part, result.stage) == (rival.part, rival.stage):
            session.results[number] = result.dropped(f"{by} is faster still")


def _not_worth_it(session: Session, part: Part, stage: Stage) -> str | None:
    captured = session.captured.get(part.name)
    if captured is not None:
        if captured.count == 0 and not _is_whole(session, part):
            return "the warm-up never called it"
        total = sum(seen.seconds for seen in session.captured.values())
        if captured.count and total > 0 and captured.seconds < stage.least_share * total:
            return f"only {100 * captured.seconds / total:.1f} % of the time is spent in it"
    if part.kind == PROCESS and session.pass_seconds > _LONGEST_PASS:
        return f"not tried: it takes a dozen whole passes, and one takes {session.pass_seconds:.0f} s"
    smaller = next((k.stage for k in session.kept if k.part == part.name and k.stage in stage.spared_by), None)
    if smaller is not None and _weights_bytes(part) >= _FROM_MEMORY:
        return f"not tried: {smaller} does the same from fewer bytes"
    return _no_time_for(session, part, stage)


def _no_time_for(session: Session, part: Part, stage: Stage) -> str | None:
    left = session.deadline - session.reserved - time.perf_counter()
    if left <= 0:
        return f"not tried: {OVER_BUDGET} is spent"
    # Its outputs, and one look at its time, are replays too.
    if left < (cost := stage.cost_of(part) + _FIRST_REPLAYS * session.known_seconds(part)):
        return f"not tried: it takes about {cost:.0f} s, and {left:.0f} s of {OVER_BUDGET} are left"
    return None


def _weights_bytes(part: Part) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.module.parameters())


def _left(session: Session) -> float:
    """Seconds until a stage that does not come back is interrupted; not while it is switched on or off, or timed."""
    return max(0.0, session.deadline - time.perf_counter()) + _HANGS


def _is_whole(session: Session, part: Part) -> bool:
    # A root module may be driven by other methods than __call__; then the whole pass is what is timed.
    is_root = any(part.module is root for root in session.plan.roots)
    return is_root and any(id(module) in session.called for module in part.module.modules())


def _judge(  # noqa: PLR0911, PLR0913, PLR0917 - what a trial consists of, and each reason to end it
    session: Session, part: Part, change: Change, rival: Kept | None, result: StageResult, which: Which
) -> StageResult:
    """Run the part with the change: first for its outputs, then for its time."""
    reference = session.reference(part)
    on_cpu = session.device.type == "cpu"
    if reference.repeats.reason == NOTHING_TO_COMPARE:
        return replace(result, reason=NOTHING_TO_COMPARE)
    if reference.repeats.error > EXACT_TOLERANCE:
        return replace(result, reason="its own output does not repeat, so nothing can be verified")
    with fallbacks() as fallen:
        change.on()
        clock = time.perf_counter()
        outputs = compiling_within(_left(session), result.stage, lambda: session.outputs(part))
        took = time.perf_counter() - clock
        difference = session.difference(part, outputs)
    for event in fallen:
        if (event.what, event.stage) == (part.name, result.stage):
            return replace(result, reason=f"failed: {event.reason}")
    result = replace(
        result, error=_finite(difference.error), spectral=_finite(difference.spectral),
        divergence=_finite(difference.divergence),
    )  # fmt: skip
    fault = _fault(session, part, change, difference)
    if fault is not None:
        return replace(result, reason=fault)
    # Nothing was compiled in that time. (A GPU's libraries may have looked for the fastest kernels in it.)
    making_copies = _weights_bytes(part) / _COPIED_A_SECOND
    if on_cpu and change.graphs is None and took > max(_NOT_TWICE * reference.seconds, 1.0) + making_copies:
        return replace(result, before=reference.seconds, after=took, reason="far slower, at the first look")
    seconds = _first_look(session, part, which)
    untouched = session.pass_seconds if which == "pass" else reference.seconds
    before = math.inf if which == "others" else untouched
    hopeless = _hopeless(part, before, seconds) or _behind(session, rival, seconds)
    if hopeless is None and which == "loop":
        hopeless = _gains_nothing(session, part, rival, untouched, seconds)
    hopeless = hopeless or _no_time_for_pairs(session, seconds if which == "others" else max(seconds, untouched))
    if hopeless is not None:
        return replace(result, before=untouched, after=seconds, reason=hopeless)
    return _timed(session, part, change, rival, result, which)


def _first_look(session: Session, part: Part, which: Which) -> float:
    """Seconds of a replay, once its caches are filled."""
    if session.device.type != "cpu":
        session.seconds(part, which)
    seconds = session.seconds(part, which)
    return min(seconds, session.seconds(part, which)) if seconds < _CHEAP_LOOK else seconds


def _hopeless(part: Part, before: float, after: float) -> str | None:
    """Why a change is not timed in pairs after one look."""
    if after > max(_HOPELESS * before, _CHEAP_PAIRS):
        return "slower, at the first look"
    # Whole passes are long. What other libraries' threads are in the way of shows in one look, or is not worth it.
    return "no gain, at the first look" if part.kind == PROCESS and after > before / MARGIN else None


def _behind(session: Session, rival: Kept | None, seconds: float) -> str | None:
    """Why an alternative is not timed in pairs against the one in force."""
    if rival is None:
        return None
    known = next(r for r in session.results if r.kept and (r.part, r.stage) == (rival.part, rival.stage))
    if known.after is not None and seconds > max(_FAR_BEHIND * known.after, _CHEAP_PAIRS):
        return f"slower than {rival.stage}, at the first look"
    return None


def _gains_nothing(session: Session, part: Part, rival: Kept | None, untouched: float, seconds: float) -> str | None:
    """Why a change of a part with a long replay is not timed in pairs against what is in force."""
    names = {kept.stage for kept in session.kept if kept.part == part.name and kept.times == "loop"}
    if rival is not None:
        names = {rival.stage}
    kept = [result for result in session.results if result.kept and result.part == part.name and result.stage in names]
    now = (kept[-1].after if kept else None) or untouched
    return "no gain, at the first look" if min(now, seconds) > _LONG_REPLAY and seconds >= now else None


def _no_time_for_pairs(session: Session, seconds: float) -> str | None:
    """Why a verdict cannot be had within the budget: five pairs of replays that take up to so many seconds each."""
    needed, left = 2 * _PAIRS * seconds, session.deadline - time.perf_counter()
    if needed <= left + _SLACK:
        return None
    return f"not timed: it takes {needed:.0f} s, and {max(0.0, left):.0f} s of {OVER_BUDGET} are left"


def _finite(figure: float | None) -> float | None:
    return None if figure is None or math.isinf(figure) else figure  # JSON, and so a receipt, has no infinity


def _fault(session: Session, part: Part, change: Change, difference: Difference) -> str | None:
    """Why a change is not even timed."""
    if change.graphs == 0:
        return "compiled no graph at all"
    objection = session.objection(part, difference)
    if objection:
        return objection
    if time.perf_counter() > session.deadline:
        return f"given up: it ran over {OVER_BUDGET}"
    return None


def _timed(  # noqa: PLR0913, PLR0917 - what a trial consists of
    session: Session, part: Part, change: Change, rival: Kept | None, result: StageResult, which: Which
) -> StageResult:
    ready: list[Callable[[], object]] = []

    def prepare() -> None:
        ready.clear()  # first: it has copies of what the part was given
        ready.append(session.replay(part, which))

    def before() -> None:
        change.off()
        if rival is not None:
            session.put(rival)
        prepare()

    def after() -> None:
        if rival is not None:
            session.lift(rival)
        change.on()
        prepare()

    def run() -> object:
        return ready[0]()

    timing = compare_speed(run, before, after, session.device.type, _COMPARISON)
    result = replace(result, before=timing.before, after=timing.after, ratio=timing.ratio, low=timing.low)
    than = "" if rival is None else f" than {rival.stage}"
    if timing.ratio < MARGIN or timing.low <= 1.0:
        why = f"slower{than}" if timing.high < 1.0 else "no gain beyond doubt"
        return replace(result, reason=f"{why} ({timing.low:.2f}x to {timing.high:.2f}x)")
    after()
    return replace(result, kept=True, reason=f"at least {timing.low:.2f}x{than}, 95 % sure")
