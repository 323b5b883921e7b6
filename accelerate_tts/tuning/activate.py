"""Application of decided changes, their common check, and the end of a warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.device.graphs import graphs_of
from accelerate_tts.plan import PROCESS
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.process.constants import KeptConstants
from accelerate_tts.tuning.callers import share_steps
from accelerate_tts.tuning.compare import compare
from accelerate_tts.tuning.draws import WHOLE
from accelerate_tts.tuning.exclusions import obstacle
from accelerate_tts.tuning.fallbacks import fallbacks
from accelerate_tts.tuning.ledger import AppliedChange

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Change, Stage
    from accelerate_tts.tuning.baseline import Baseline
    from accelerate_tts.tuning.compare import Difference
    from accelerate_tts.tuning.ledger import Ledger

IN_ANY_CASE = frozenset({KeptConstants.name})
"""Changes that `finish` makes without a trial; a warm pack has nothing to say of them."""


def activate(
    baseline: Baseline, ledger: Ledger, entries: Sequence[tuple[Part, Stage]], *, whole: bool
) -> dict[tuple[str, str], str]:
    """Put decided changes in force, and check them.

    Args:
        baseline: The untouched object; the parts of its plan are compared one by one.
        ledger: Records the changes.
        entries: The decided changes, in order.
        whole: Compare the whole object's output, too.

    Returns:
        Reasons why changes of the process were not needed (another object has made them), by part and stage.

    Raises:
        ValueError: A change does not fit, or its output is wrong. The ledger has the changes made until then.
    """
    for part in baseline.plan.parts:
        if baseline.reference(part, timed=False).repeats.error > EXACT_TOLERANCE:
            raise ValueError(f"the output of {part.name} does not repeat, so nothing can be checked")
    spared: dict[tuple[str, str], str] = {}
    for part, stage in entries:
        reason = obstacle(stage, part)
        if reason is not None and stage.process:
            spared[part.name, stage.name] = reason
            continue
        if reason is not None:
            raise ValueError(f"{stage.name} does not fit {part.name}: {reason}")
        change = stage.prepare(part)
        ledger.kept.append(AppliedChange(part.name, stage.name, stage.group, change))
        change.on()
    if ledger.kept:
        passes = 1 if graphs_of(baseline.device.type) is None else max(stage.passes for _, stage in entries)
        check(baseline, ledger, baseline.plan.parts, whole=whole, passes=passes)
    finish(baseline, ledger)
    return spared


def check(baseline: Baseline, ledger: Ledger, parts: Iterable[Part], *, whole: bool, passes: int = 1) -> None:
    """Compare these parts, and with `whole` the whole object, with the untouched one, after some passes.

    Raises:
        ValueError: An output differs by more than the tolerance.
    """
    with fallbacks() as fallen:
        output: list[Any] = []
        for _ in range(passes):
            output = baseline.run()
    names = {kept.part for kept in ledger.kept}
    reasons = [event.reason for event in fallen if event.what in names]
    reasons += [_nothing_compiled(kept.change) for kept in ledger.kept]
    if whole:
        reference, objection = baseline.output, baseline.tolerance.objection
        difference = baseline.draws.confirmed(
            compare(reference, output), objection, lambda: compare(reference, baseline.run())
        )
        reasons.append(objection(difference))
    for part in parts:
        wrong = baseline.objection(part, baseline.compared(part, baseline.outputs(part)))
        reasons.append(wrong and f"{part.name}: {wrong}")
    reason = next(filter(None, reasons), None)
    if reason is not None:
        raise ValueError(f"the result is wrong: {reason}")


def fault_of(baseline: Baseline, part: Part, change: Change, difference: Difference) -> str:
    """Return the fault for which a change of one part is rejected at any speed; "" without one."""
    return _nothing_compiled(change) or baseline.objection(part, difference)


def _nothing_compiled(change: Change) -> str:
    return "compiled no graph" if change.graphs == 0 else ""


def finish(baseline: Baseline, ledger: Ledger) -> None:
    """End the warm-up: run the remaining kinds of inputs, and report later compilations as events."""
    share_steps(baseline, ledger)
    with baseline.draws.seeded(WHOLE):
        baseline.calls.run_others()
    for kept in ledger.kept:
        kept.change.end_warmup()
    constants = baseline.constants
    if constants.found:
        constants.on()
        ledger.kept.append(AppliedChange(PROCESS, KeptConstants.name, "", constants))
        ledger.notes.append(f"computed once instead of at each call, with bit-exact results: {constants}")
