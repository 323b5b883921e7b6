"""Warm packs: a tuning's decisions and compiled code from an earlier process, checked once and put in force.

The second process measures nothing. It runs the warm-up once as it was loaded, which is the reference, applies what the
pack says, loads the compiled code, runs the warm-up again and compares. A pack that does not fit, or does not compute
the same, costs one event and the usual tuning.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from accelerate_tts._version import __version__
from accelerate_tts.events import PackIgnored, Restored, Retuned, emit
from accelerate_tts.kernels.library import level
from accelerate_tts.packs import compiler_cache
from accelerate_tts.packs.store import Pack, PackStore
from accelerate_tts.plan import PROCESS, Part
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.runtime.guard.guard import listening
from accelerate_tts.storage.files import own_folder
from accelerate_tts.storage.fingerprint import fingerprint
from accelerate_tts.tuning.capture import watch
from accelerate_tts.tuning.compare import EXACT_TOLERANCE, compare
from accelerate_tts.tuning.end_to_end import IN_ANY_CASE, finish
from accelerate_tts.tuning.policy import OVER_BUDGET
from accelerate_tts.tuning.session import CUDA_GRAPH_PASSES, Kept, Session, fallbacks
from accelerate_tts.tuning.timing import synchronize
from accelerate_tts.tuning.tune import Tuning, acts_in_training, begin, recompile_counter, warn_of_training

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.plan import Kind, ModelPlan
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.settings import Settings
    from accelerate_tts.stages.protocol import Stage
    from accelerate_tts.tuning.tune import Limits
    from accelerate_tts.tuning.warmup import WarmupCalls

__all__ = ["WarmPack", "pack_folder", "pack_store"]

# Of the decisions. Those of 1 do not say how sure they are.
_FORMAT = 2


def pack_folder(settings: Settings) -> Path:
    """Where warm packs are kept: `settings.pack_folder`, or `accelerate_tts/packs` in the user's cache folder."""
    return own_folder("packs", settings.pack_folder)


def pack_store(settings: Settings) -> PackStore:
    """The store of warm packs that the settings name."""
    # A variable of the environment may hold bytes that are no UTF-8.
    secret = None if settings.pack_key is None else settings.pack_key.encode(errors="surrogateescape")
    return PackStore(pack_folder(settings), settings.pack_limit_mb * 1024 * 1024, secret)


@dataclass
class WarmPack:
    """The warm pack of one loaded object: there or still to be written.

    Attributes:
        store: Where packs are.
        plan: The object's plan, before anything was changed.
        key: What the pack is for.
        seconds: The tuning budget of this process.
        retune: Whether what an earlier process was not sure of may be tried again.
    """

    store: PackStore
    plan: ModelPlan
    key: str
    seconds: float
    _code: compiler_cache.Snapshot
    retune: bool = True
    _earlier: Receipt | None = field(default=None, init=False)

    @classmethod
    def of(
        cls, plan: ModelPlan, stages: Sequence[Stage], device: DeviceInfo, settings: Settings, **options: Any
    ) -> WarmPack | None:
        """The pack for a plan under these circumstances; `options` are whatever else tuning was told.

        An object that cannot be told from others (a `repr` that raises, say) costs one event and has no pack.
        """
        import torch

        circumstances = {
            "accelerate_tts": __version__,
            "torch": torch.__version__,
            "python": sys.version_info[:2],
            "device": (device.kind, device.name, torch.backends.cpu.get_cpu_capability()),
            "kernels": level() if device.kind == "cpu" else "",  # what was tuned without them may gain by them
            "threads": torch.get_num_threads(),
            "flags": (settings.compile_mode, settings.tf32, settings.cudnn_benchmark),
            "training": acts_in_training(plan),
            "stages": [stage.name for stage in stages],
            **options,
        }
        try:
            key = fingerprint(plan.roots, circumstances)
            return cls(
                pack_store(settings), plan, key, settings.tune_seconds, compiler_cache.snapshot(), settings.retune
            )
        except Exception as error:  # a pack is a convenience: whatever is wrong with it, tuning is still there
            emit(PackIgnored(f"the warm pack of {plan.what}", f"{type(error).__name__}: {error}"))
            return None

    def restore(self, calls: WarmupCalls, stages: Sequence[Stage], device: DeviceInfo, limits: Limits) -> Tuning | None:
        """Put in force what the pack says; `None`, with everything as it was, if there is none or it does not fit.

        `None` as well if it says that it is not sure, and the machine is quiet now: the tuning that follows tries that
        again, and takes the rest from `known`.
        """
        pack = self.store.read(self.key) if calls.main else None
        if pack is None:
            return None
        start = time.perf_counter()
        session = begin(self.plan, calls, device, limits)
        try:
            receipt, entries = _read(pack.decisions, self.plan, stages, limits.seconds)
            decided = receipt
            if pack.artifacts is not None:
                compiler_cache.unpack(pack.artifacts)
            if receipt.unsure and self.retune and session.watcher.look().quiet:
                self._earlier = receipt
                return None
            receipt = _apply(session, entries, receipt)
            if limits.stopped():
                session.off()
                return None
        except Exception as error:  # see `of`
            session.off()
            if not isinstance(error, _WarmupFailedError):  # tuning meets the same, and says so
                emit(PackIgnored(f"the warm pack of {self.plan.what}", f"{type(error).__name__}: {error}"))
            return None
        except BaseException:
            session.off()
            raise
        tuning = self._restored(session, receipt, len(entries), time.perf_counter() - start)
        tuning = replace(tuning, parts=tuple(part for part, _ in entries))
        if pack.artifacts is None and self._code_of(tuning.kept) is not None:
            # Somebody else's, without code that we trust: what was compiled here instead is kept under our own key.
            self.keep(replace(tuning, receipt=decided))
        return tuning

    def _restored(self, session: Session, receipt: Receipt, entries: int, seconds: float) -> Tuning:
        """What is in force now, and said of it."""
        changes = tuple(kept.change for kept in session.kept)
        note = f"from a warm pack: tuned for {receipt.seconds:.1f} s in an earlier process, nothing was timed again"
        if receipt.unsure and self.retune:
            note += f"; {len(receipt.unsure)} verdicts are not sure, and wait for a quiet machine"
        receipt = replace(
            receipt,
            what=self.plan.what,
            seconds=seconds,
            notes=(*receipt.notes, note),
            recompiled=0,
            _live=recompile_counter(changes),
        )
        if acts_in_training(self.plan):
            warn_of_training(self.plan)
        emit(Restored(self.plan.what, entries, seconds))
        return Tuning(receipt, changes, complete=True, kept=tuple(session.kept), expected=session.heard)

    @property
    def known(self) -> tuple[StageResult, ...]:
        """What an earlier process was sure of, of parts of which it was sure of everything."""
        if self._earlier is None:
            return ()
        again = {result.part for result in self._earlier.unsure}
        return tuple(result for result in self._earlier.stages if result.part not in again)

    def renew(self, tuning: Tuning) -> None:
        """Write the pack of a tuning that followed, unless the earlier process was surer. Says what came of it."""
        before = self._earlier
        if before is None or not tuning.complete:
            self.keep(tuning)
            return
        left = len(tuning.receipt.unsure)
        if left <= len(before.unsure):
            self.keep(tuning)
        emit(Retuned(self.plan.what, len(before.unsure), left, before.ratio, tuning.receipt.ratio))

    def keep(self, tuning: Tuning) -> None:
        """Write the pack of a complete tuning. What cannot be written costs one event."""
        if not tuning.complete:
            return
        decided = [entry for entry in tuning.kept if entry.stage not in IN_ANY_CASE]
        kept = [found for entry in decided if (found := _described(self.plan, tuning, entry)) is not None]
        if len(kept) < len(decided):
            return  # a part that cannot be found again by its path
        try:
            decisions = {
                "format": _FORMAT, "kept": kept, "receipt": tuning.receipt.to_json(), "tune_seconds": self.seconds,
            }  # fmt: skip
            self.store.write(Pack(self.key, decisions, self._code_of(tuning.kept)))
        except Exception as error:  # see `of`
            emit(PackIgnored(f"the warm pack of {self.plan.what}", f"it could not be kept: {error}"))

    def _code_of(self, kept: Sequence[Kept]) -> bytes | None:
        """What was compiled for the changes in force."""
        return compiler_cache.pack(self._code) if any(entry.change.graphs for entry in kept) else None


class _WarmupFailedError(Exception):
    """The user's own warm-up raised, before anything was changed."""


def _described(plan: ModelPlan, tuning: Tuning, kept: Kept) -> dict[str, Any] | None:
    base = {"part": kept.part, "stage": kept.stage}
    if kept.part == PROCESS:
        return {**base, "kind": PROCESS, "decides": False, "root": 0, "path": ""}
    part = next((part for part in tuning.parts if part.name == kept.part), None)
    for number, root in enumerate(plan.roots):
        for path, module in root.named_modules():
            if part is not None and module is part.module:
                return {**base, "kind": part.kind, "decides": part.decides, "root": number, "path": path}
    return None


def _read(
    decisions: Mapping[str, Any], plan: ModelPlan, stages: Sequence[Stage], seconds: float
) -> tuple[Receipt, list[tuple[Part, Stage]]]:
    """The receipt, and what is to be put in force: all texts and numbers of a file that anybody may have written."""
    receipt = Receipt.from_json(decisions["receipt"])
    if decisions.get("format", 1) < _FORMAT:
        # One look on a busy machine could drop what is best, and left a verdict like any other.
        verdicts = (replace(one, sure=one.sure and not _may_be_by_chance(one)) for one in receipt.stages)
        receipt = replace(receipt, stages=tuple(verdicts))
    before = decisions["tune_seconds"]
    if before < seconds and any(OVER_BUDGET in result.reason for result in receipt.stages):
        raise ValueError(f"its tuning ran out of its {before:g} s, and now there are {seconds:g} s")
    known = {stage.name: stage for stage in stages}
    by_module = {id(part.module): part for part in plan.parts}
    named: dict[str, nn.Module] = {}
    entries: list[tuple[Part, Stage]] = []
    for entry in decisions["kept"]:
        name, kind, path, wanted = (_text(entry[field]) for field in ("part", "kind", "path", "stage"))
        stage = known.get(wanted)
        if stage is None:
            raise ValueError(f"there is no stage {wanted!r} here")
        if stage.process:
            entries.append((Part(PROCESS, "process", plan.roots[0]), stage))
            continue
        module = plan.roots[entry["root"]].get_submodule(path)
        part = by_module.get(id(module)) or Part(name, cast("Kind", kind), module, bool(entry["decides"]))
        if named.setdefault(part.name, module) is not module:
            raise ValueError(f"{part.name} is the name of two parts")
        entries.append((part, stage))
    return receipt, entries


def _may_be_by_chance(result: StageResult) -> bool:
    return not result.kept and ("at the first look" in result.reason or result.reason.startswith("undone: slower"))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _apply(session: Session, entries: Sequence[tuple[Part, Stage]], receipt: Receipt) -> Receipt:
    """Put the entries in force, and check what the object computes then; returns what became of the receipt."""
    # Parts that must be bit-exact are compared one by one. So is everything where the whole could not be compared.
    alone = {part.name: part for part, _ in entries if part.decides or receipt.error is None}
    reference, cold = _reference(session, [part for part in alone.values() if part.name != PROCESS])
    for part in alone.values():
        if session.reference(part).repeats.error > EXACT_TOLERANCE:
            raise ValueError(f"the output of {part.name} does not repeat, so nothing can be checked")
    for part, stage in entries:
        obstacle = stage.applies(part)
        if obstacle is not None and stage.process:  # another object has done it for this process already
            receipt = _without(receipt, part, stage, obstacle)
            continue
        if obstacle is not None:
            raise ValueError(f"{stage.name} does not fit {part.name}: {obstacle}")
        change = stage.prepare(part)
        session.kept.append(Kept(part.name, stage.name, stage.group, change))
        change.on()
    if session.kept:
        parts = [session.with_head(part) for part in alone.values()]
        _check(session, parts, None if receipt.error is None else reference)
    finish(session)
    return replace(receipt, cold=cold)


def _reference(session: Session, parts: Sequence[Part]) -> tuple[list[Any], float]:
    """What the untouched object computes, which also is its cold pass, and what the parts are given in it."""
    start = time.perf_counter()
    try:
        with (
            watch(tuple(parts), session.device.type) as session.captured,
            listening() as listener,
            session.constants.watching(),
            session.finding_draws(),
        ):
            reference = session.run()
        synchronize(session.device.type)
        cold = time.perf_counter() - start
        if not session.draws_found(reference):
            reference = session.run()
    except Exception as error:
        raise _WarmupFailedError from error
    session.heard = listener.expected
    return reference, cold


def _check(session: Session, parts: Iterable[Part], reference: list[Any] | None) -> None:
    """Raise ValueError unless the object computes what it did: as a whole if there is a reference, and these parts."""
    with fallbacks() as fallen:
        result = session.run()
        for _ in range(CUDA_GRAPH_PASSES - 1 if session.device.type == "cuda" else 0):
            result = session.run()
    names = {kept.part for kept in session.kept}
    reasons = [event.reason for event in fallen if event.what in names]
    if any(kept.change.graphs == 0 for kept in session.kept):
        reasons.append("compiled no graph at all")
    if reference is not None:
        difference = session.confirmed(
            compare(reference, result), session.tolerance.objection, lambda: compare(reference, session.run())
        )
        reasons.append(session.tolerance.objection(difference))
    for part in parts:
        objection = session.objection(part, session.compared(part, session.outputs(part)))
        reasons.append(objection and f"{part.name}: {objection}")
    reason = next(filter(None, reasons), None)
    if reason is not None:
        raise ValueError(f"the result is wrong: {reason}")


def _without(receipt: Receipt, part: Part, stage: Stage, obstacle: str) -> Receipt:
    results = (
        result.dropped(f"not needed here: {obstacle}")
        if (result.part, result.stage) == (part.name, stage.name)
        else result
        for result in receipt.stages
    )
    return replace(receipt, stages=tuple(results))
