"""Trial of one stage on one part: compute with it, compare the outputs, time it, keep it or switch it off."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate_tts.errors import TimeLimitError, described
from accelerate_tts.events import FellBack, Trying, emit
from accelerate_tts.plan import PROCESS
from accelerate_tts.receipts.receipt import StageResult
from accelerate_tts.runtime.compile_timeout import compiling_within
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.activate import fault_of
from accelerate_tts.tuning.compare import NOTHING_TO_COMPARE
from accelerate_tts.tuning.disturbance import one_thread
from accelerate_tts.tuning.draws import OtherThreadsDrawError
from accelerate_tts.tuning.exclusions import obstacle
from accelerate_tts.tuning.fallbacks import fallbacks
from accelerate_tts.tuning.ledger import AppliedChange, Ledger, switch_off
from accelerate_tts.tuning.policy import OVER_BUDGET
from accelerate_tts.tuning.promises import promise

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate_tts.plan import Part, TimedCalls
    from accelerate_tts.stages.protocol import Change, Stage
    from accelerate_tts.tuning.baseline import Baseline, Reference
    from accelerate_tts.tuning.compare import Difference
    from accelerate_tts.tuning.timing import Timing


class Trial:
    """Trial of one stage on one part, from the reasons not to begin to the verdict.

    Args:
        baseline: The untouched object, and the policy of tuning.
        ledger: Records the verdict, and the change if it is kept.
        part: The part.
        stage: The stage.
        known: The verdict of an earlier tuning, which is compared again, but not timed.
    """

    def __init__(
        self, baseline: Baseline, ledger: Ledger, part: Part, stage: Stage, known: StageResult | None = None
    ) -> None:
        self._baseline = baseline
        self._ledger = ledger
        self._policy = baseline.policy
        self._known = known
        self._what = f"{baseline.plan.what}: {part.name}"
        self._part = part
        self._stage = stage
        self._times: TimedCalls = stage.times
        self._current: AppliedChange | None = None
        self._change: Change | None = None
        self._result = StageResult(part.name, stage.name, kept=False, reason="")

    def run(self) -> None:
        """Try the stage, and enter the verdict in the ledger."""
        try:
            self._run()
        except BaseException:  # Ctrl-C: the ledger may not know the change yet
            if self._change is not None:
                switch_off((self._change,))
            raise

    def _run(self) -> None:
        part, stage = self._part, self._stage
        start = self._policy.clock()
        try:
            if obstacle(stage, part) is not None:
                return  # nothing to try, nothing to report
            known = self._known
            verdict = known if known is not None and not known.kept else self._not_begun()
            if verdict is not None:
                self._ledger.enter(verdict, None)
                return
            emit(Trying(self._what, stage.name))
            self._current = self._ledger.current(part.name, stage.group)
            self._baseline.reference(part)  # of the part as it was loaded, so before the first change is made
            if self._current is not None:
                self._ledger.lift(self._current)
            self._change = compiling_within(self._left(), stage.name, lambda: stage.prepare(part))
            if self._current is not None and self._current.times == "end_to_end":
                self._times = "end_to_end"  # single calls would show it slower than it is
            self._result = self._judge(self._change)
        except OtherThreadsDrawError as error:
            self._result = replace(self._result, kept=False, reason=f"not compared: {error}", sure=False)
        except Exception as error:  # a stage must never cost the user the model
            self._result = replace(self._result, kept=False, reason=self._failure(error))
        finally:
            if not self._result.kept:
                self._put_back()
        graphs = None if self._change is None else self._change.graphs
        self._result = replace(self._result, graphs=graphs, seconds=self._policy.clock() - start)
        kept = None
        if self._result.kept and self._change is not None:
            kept = AppliedChange(part.name, stage.name, stage.group, self._change, self._times)
        self._ledger.enter(self._result, kept, self._current)

    def _put_back(self) -> None:
        """Switch off the change that is not kept, and switch the current alternative on again."""
        if self._change is not None:
            try:
                switch_off((self._change,))
            except Exception as error:  # see `run`
                self._result = replace(self._result, reason=self._failure(error))
        if self._current is not None:
            self._ledger.put(self._current)

    def _failure(self, error: Exception) -> str:
        """Report in an event that a stage raised or hung; return the reason for the receipt."""
        if isinstance(error, TimeLimitError):
            emit(FellBack(self._what, self._stage.name, str(error)))
            return "; ".join(filter(None, (f"stopped: over {OVER_BUDGET}, interrupted", error.stopped)))
        reason = described(error).splitlines()[0]
        emit(FellBack(self._what, self._stage.name, reason))
        return f"failed: {reason}"

    # --- reasons not to begin -----------------------------------------------------------------------------------

    def _not_begun(self) -> StageResult | None:
        """Return the result with the reason not to begin the stage; `None` if it is begun."""
        if self._policy.unworthy is not None:
            reason, sure = self._policy.unworthy(self._baseline, self._part, self._stage), True
        else:
            reason, sure = self._not_worth_it()
        return None if reason is None else replace(self._result, reason=reason, sure=sure)

    def _not_worth_it(self) -> tuple[str | None, bool]:  # noqa: PLR0911 - each reason
        """Return the reason not to begin the stage, and True if it holds on a quiet machine, too."""
        baseline, part, stage = self._baseline, self._part, self._stage
        captured = baseline.captured.get(part.name)
        if captured is not None:
            if captured.count == 0 and not self._is_whole():
                return "not tried: the warm-up never called it", True
            # A costly stage has to be worth its seconds beside the untouched whole.
            is_cheap = stage.cost_of(part) < self._policy.costly
            share = baseline.share_left(part, self._ledger.seconds_now) if is_cheap else baseline.share(part)
            if captured.count and share < stage.least_share:
                return f"not tried: {100 * share:.1f} % of the time", baseline.pass_quiet
        longest = min(self._policy.longest_pass, baseline.budget.seconds * self._policy.pass_share)
        if part.kind == PROCESS and baseline.pass_seconds > longest:
            seconds = baseline.pass_seconds
            return f"not tried: takes a dozen whole passes of {seconds:.1f} s", baseline.pass_quiet
        if part.kind == PROCESS and not baseline.pass_quiet and not baseline.watcher.wait():
            # Such a stage is only about interactions of threads.
            return f"not tried: {baseline.watcher.worst.why}", False
        names = self._names_kept()
        smaller = next((name for name in names if name in stage.superseded_by), None)
        if smaller is not None and self._weights_bytes() >= self._policy.from_memory:
            return f"not tried: {smaller} does the same with fewer bytes", True
        cost = stage.cost_of(part)
        known = promise(stage.name, part.kind, names) if cost >= self._policy.costly else None
        if known is not None and known.ratio <= 1.0 and baseline.budget.seconds < self._policy.thorough:
            why = f"takes {cost:.0f} s or more and gained nothing on similar parts"
            return f"not tried: {why}; tune_seconds={self._policy.thorough:.0f} tries it", True
        reason = self._no_time_for_it()
        if reason is not None:
            self._missed()
        return reason, baseline.watcher.worst.quiet

    def _missed(self) -> None:
        """Record that there is no time for the stage, and the budget that it needs."""
        baseline, part, stage = self._baseline, self._part, self._stage
        known = promise(stage.name, part.kind, self._names_kept())
        ratio = self._policy.unknown_gain if known is None else known.ratio
        seconds = baseline.known_seconds(part) or baseline.captured_seconds(part)
        wanted = baseline.budget.seconds - baseline.budget.left + baseline.reserved
        wanted += stage.cost_of(part) + (self._policy.first_replays + 2 * self._policy.pairs) * seconds
        self._ledger.unmet.append((baseline.share(part) * (1 - 1 / ratio), part.name, stage.name, wanted))

    def _no_time_for_it(self) -> str | None:
        left = self._baseline.budget.left - self._baseline.reserved
        if left <= 0:
            return f"not tried: {OVER_BUDGET} is spent"
        # The outputs and a look are replays, too.
        replays = self._policy.first_replays * self._baseline.known_seconds(self._part)
        if left < (cost := self._stage.cost_of(self._part) + replays):
            return f"not tried: takes about {cost:.0f} s, {left:.0f} s of {OVER_BUDGET} left"
        return None

    def _names_kept(self) -> list[str]:
        return [kept.stage for kept in self._ledger.kept_on(self._part.name)]

    def _weights_bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self._part.module.parameters())

    def _left(self) -> float:
        """Return the seconds until a hanging stage is interrupted. Switching and timing are not limited."""
        left = max(0.0, self._baseline.budget.left)
        return min(self._policy.longest, left + self._policy.hangs)

    def _is_whole(self) -> bool:
        # A root module may be driven by other methods than __call__; then the whole pass is timed.
        is_root = any(self._part.module is root for root in self._baseline.plan.roots)
        return is_root and any(id(module) in self._baseline.called for module in self._part.module.modules())

    # --- correctness and speed ----------------------------------------------------------------------------------

    def _judge(self, change: Change) -> StageResult:  # noqa: PLR0911 - each reason to end it
        """Run the part with the change, first for its outputs, then for its time unless that is known."""
        baseline, part, result = self._baseline, self._part, self._result
        reference = baseline.reference(part)
        if reference.repeats.reason == NOTHING_TO_COMPARE:
            return replace(result, reason=f"not compared: {NOTHING_TO_COMPARE}")
        if reference.repeats.error > EXACT_TOLERANCE:
            return replace(result, reason="not compared: its untouched output does not repeat")
        with fallbacks() as fallen, baseline.watcher.window() as window:
            change.on()
            start = self._policy.clock()
            outputs = compiling_within(self._left(), result.stage, lambda: baseline.outputs(part))
            took = self._policy.clock() - start
            difference = baseline.compared(part, outputs)
        for event in fallen:
            if (event.what, event.stage) == (part.name, result.stage):
                return replace(result, reason=f"failed: {event.reason}")
        result = replace(
            result, error=_finite(difference.error), spectral=_finite(difference.spectral),
            divergence=_finite(difference.divergence),
        )  # fmt: skip
        fault = self._fault(change, difference)
        if fault is not None:
            return replace(result, reason=fault)
        if self._known is not None:
            return replace(self._known, error=result.error, spectral=result.spectral, divergence=result.divergence)
        if self._is_far_slower(reference, took) and window.disturbance.quiet and reference.quiet:
            return replace(result, before=reference.seconds, after=took, reason="far slower at the first look")
        return self._looked_at(change, replace(result, before=self._untouched))

    def _fault(self, change: Change, difference: Difference) -> str | None:
        """Return the reason why a change is not timed; `None` if it is timed."""
        fault = fault_of(self._baseline, self._part, change, difference)
        if not fault and self._baseline.budget.left < 0:
            return f"stopped: over {OVER_BUDGET}"
        return fault or None

    def _is_far_slower(self, reference: Reference, took: float) -> bool:
        # Only if nothing was compiled in that time. A GPU's libraries may have searched for the fastest kernels.
        if self._baseline.device.type != "cpu" or (self._change is not None and self._change.graphs is not None):
            return False
        making_copies = self._weights_bytes() / self._policy.copied_a_second
        return took > max(self._policy.not_twice * reference.seconds, 1.0) + making_copies

    @property
    def _untouched(self) -> float:
        """Seconds of the untouched part in the timed calls."""
        baseline = self._baseline
        return baseline.pass_seconds if self._times == "end_to_end" else baseline.reference(self._part).seconds

    def _looked_at(self, change: Change, result: StageResult) -> StageResult:
        """Take a single look at the time, a second one if the first shows no gain, and then time it in pairs."""
        baseline, watcher = self._baseline, self._baseline.watcher
        calm = baseline.reference(self._part).quiet and (self._times != "end_to_end" or baseline.pass_quiet)
        quiet = True
        for again in (False, True):
            with watcher.window() as window:
                seconds = self._look()
            quiet = window.disturbance.quiet or watcher.wait()
            hopeless = self._hopeless(seconds) if self._policy.looks and calm else None
            if hopeless is None:
                break
            # A single look rejects a change only if it takes long, and nothing was compiled, which takes longer.
            enough = again or (seconds > self._policy.long_replay and change.graphs is None)
            if window.disturbance.quiet and enough:
                return replace(result, after=seconds, reason=hopeless)
            if not quiet:
                break
        longest = seconds if self._times == "prefill" else max(seconds, self._untouched)
        no_time = self._no_time_for_pairs(longest)
        if no_time is not None:
            self._missed()
            return replace(result, after=seconds, reason=no_time, sure=quiet and watcher.worst.quiet)
        return self._timed(change, result, quiet=quiet)

    def _look(self) -> float:
        """Return the seconds of a replay with warm caches."""
        baseline, part, which = self._baseline, self._part, self._times
        if baseline.device.type != "cpu":
            baseline.seconds(part, which)
        seconds = baseline.seconds(part, which)
        return min(seconds, baseline.seconds(part, which)) if seconds < self._policy.cheap_look else seconds

    def _hopeless(self, seconds: float) -> str | None:
        """Return the reason why a change is not timed in pairs after single looks; `None` if it is."""
        before = math.inf if self._times == "prefill" else self._untouched
        if seconds > max(self._policy.hopeless * before, self._policy.cheap_pairs):
            return "slower at the first look"
        # Whole passes are long. Collisions of other libraries' threads show in one look, or are not worth more.
        if self._part.kind == PROCESS and seconds > before / self._policy.process_gain:
            return "no gain at the first look"
        return self._behind(seconds) or (self._gains_nothing(seconds) if self._times == "loop" else None)

    def _behind(self, seconds: float) -> str | None:
        """Return the reason why an alternative is not timed in pairs against the one in force; `None` if it is."""
        if self._current is None:
            return None
        known = self._verdicts({self._current.stage})[-1]
        if known.sure and known.after is not None:
            limit = max(self._policy.far_behind * known.after, self._policy.cheap_pairs)
            return f"slower than {self._current.stage} at the first look" if seconds > limit else None
        return None

    def _gains_nothing(self, seconds: float) -> str | None:
        """Return the reason why a change of a part with a long replay is not timed in pairs; `None` if it is."""
        names = {kept.stage for kept in self._ledger.kept_on(self._part.name) if kept.times == "loop"}
        kept = self._verdicts(names if self._current is None else {self._current.stage})
        if not all(result.sure for result in kept):
            return None
        now = (kept[-1].after if kept else None) or self._untouched
        return "no gain at the first look" if min(now, seconds) > self._policy.long_replay and seconds >= now else None

    def _verdicts(self, stages: set[str]) -> list[StageResult]:
        return [
            result for result in self._ledger.results
            if result.kept and result.part == self._part.name and result.stage in stages
        ]  # fmt: skip

    def _no_time_for_pairs(self, seconds: float) -> str | None:
        """Return a reason if the budget has no time for pairs of replays of so many seconds each; `None` if it has."""
        needed, left = 2 * self._policy.pairs * seconds, self._baseline.budget.left
        if needed <= left + self._policy.slack:
            return None
        return f"not timed: takes {needed:.0f} s, {max(0.0, left):.0f} s of {OVER_BUDGET} left"

    # --- timing -------------------------------------------------------------------------------------------------

    def _timed(self, change: Change, result: StageResult, *, quiet: bool) -> StageResult:
        """Time it in pairs, on a quiet machine if possible; otherwise by the processor time of one thread."""
        watcher = self._baseline.watcher
        switches = self._switches(change)
        timing: Timing | None = None
        how = ""
        believed = shown = False
        for _ in range(self._policy.comparisons if quiet else 0):
            with watcher.window() as window:
                timing = self._pairs(switches, clean=watcher.clean)
            believed = watcher.believes(timing, window.disturbance)
            # Others who use the memory slow both sides, so a gain in pairs remains one. One thread would not show it,
            # where the gain is that two threads together read at the memory's rate.
            shown = window.disturbance.memory and self._gains(timing)
            slowest = max(timing.before, timing.after)
            if believed or not watcher.wait() or self._no_time_for_pairs(slowest) is not None:
                break
        if not believed and not shown and self._can_be_alone(change):
            with one_thread():
                for switch in switches[1:]:
                    switch()
                    switches[0]()
                timing = self._pairs(switches, clock=time.process_time)
            how = ", processor time of one thread"
        timing = timing or self._pairs(switches)
        result = replace(
            result, before=timing.before, after=timing.after, ratio=timing.ratio, low=timing.low, sure=believed
        )
        if not self._gains(timing):
            than = "" if self._current is None else f" than {self._current.stage}"
            why = f"slower{than}" if timing.high < 1.0 else "no certain gain"
            return replace(result, reason=f"{why}, {timing.low:.2f}x to {timing.high:.2f}x (95 %){how}")
        switches[2]()
        over = "" if self._current is None else f" over {self._current.stage}"
        return replace(result, kept=True, reason=f"at least {timing.low:.2f}x{over} (95 %){how}")

    def _gains(self, timing: Timing) -> bool:
        return timing.ratio >= self._policy.margin and timing.low > 1.0

    def _pairs(self, switches: tuple[Callable[[], object], ...], **how: Callable[[], object]) -> Timing:
        return self._policy.compare(*switches, self._baseline.device.type, self._policy.comparison, **how)

    def _can_be_alone(self, change: Change) -> bool:
        """Check that timing on one thread is meaningful. dynamo compiles again for another number of threads."""
        if self._part.kind == PROCESS:  # its effect is on how threads interact
            return False
        return self._baseline.device.type == "cpu" and change.graphs is None and not self._ledger.compiles

    def _switches(self, change: Change) -> tuple[Callable[[], object], ...]:
        """Functions that run the part, and that switch to the two states before it."""
        baseline, ledger, current = self._baseline, self._ledger, self._current
        ready: list[Callable[[], object]] = []

        def prepare() -> None:
            ready.clear()  # first, since it holds copies of the part's inputs
            ready.append(baseline.replay(self._part, self._times))

        def run() -> object:
            return ready[0]()

        def before() -> None:
            change.off()
            if current is not None:
                ledger.put(current)
            prepare()

        def after() -> None:
            if current is not None:
                ledger.lift(current)
            change.on()
            prepare()

        return run, before, after


def _finite(figure: float | None) -> float | None:
    return None if figure is None or math.isinf(figure) else figure  # JSON has no infinity
