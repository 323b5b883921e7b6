"""Warm packs: decisions and compiled code of an earlier process's tuning, checked once and applied.

The second process times nothing. It runs the warm-up once on the untouched object for reference outputs, applies the
pack's changes, loads the compiled code, runs the warm-up again and compares. A pack that does not fit, or does not
compute the same, causes an event and normal tuning.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from accelerate_tts._version import __version__
from accelerate_tts.errors import described
from accelerate_tts.events import PackIgnored, Restored, Retuned, emit
from accelerate_tts.kernels.library import level
from accelerate_tts.packs import compiler_cache
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore, pack_store
from accelerate_tts.plan import PROCESS, Part
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.storage.fingerprint import fingerprint
from accelerate_tts.tuning.activate import IN_ANY_CASE, activate
from accelerate_tts.tuning.findings import Findings, recompile_counter
from accelerate_tts.tuning.first_passes import one_pass
from accelerate_tts.tuning.ledger import AppliedChange, Ledger
from accelerate_tts.tuning.policy import OVER_BUDGET
from accelerate_tts.tuning.tune import acts_in_training, warn_of_training

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.plan import Kind, ModelPlan
    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.settings import Settings
    from accelerate_tts.stages.protocol import Stage
    from accelerate_tts.tuning.baseline import Baseline
    from accelerate_tts.tuning.limits import Limits
    from accelerate_tts.tuning.warmup import WarmupCalls

# Version of the decisions. Version 1 does not mark uncertain verdicts.
_FORMAT = 2
_BY_CHANCE = re.compile(r"at the first look|^undone: slower")


@dataclass
class WarmPack:
    """The warm pack of one loaded object, existing or not yet written.

    Attributes:
        store: The store of packs.
        plan: The object's plan, before anything was changed.
        key: Key of the pack.
        seconds: The tuning budget of this process.
        retune: True if uncertain verdicts of an earlier process may be tried again.
    """

    store: PackStore
    plan: ModelPlan
    key: str
    seconds: float
    _code: compiler_cache.Snapshot
    retune: bool = True
    _earlier: Receipt | None = field(default=None, init=False)
    _training: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls, plan: ModelPlan, stages: Sequence[Stage], device: DeviceInfo, settings: Settings, **options: Any
    ) -> WarmPack | None:
        """Return the pack for a plan, or `None`.

        An object without a fingerprint (whose `repr` raises, for example) causes an event and has no pack.

        Args:
            plan: The object's plan.
            stages: The stages that would be tried.
            device: The device.
            settings: The settings.
            options: Further options of tuning, which become part of the key.
        """
        circumstances = {
            "accelerate_tts": __version__,
            "torch": torch.__version__,
            "python": sys.version_info[:2],
            "device": (device.kind, device.name, torch.backends.cpu.get_cpu_capability()),
            "kernels": level() if device.kind == "cpu" else "",  # a tuning without kernels may gain by them
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
        except Exception as error:  # a pack is optional: without it the object is tuned
            emit(PackIgnored(f"the warm pack of {plan.what}", described(error)))
            return None

    def restore(
        self, calls: WarmupCalls, stages: Sequence[Stage], device: DeviceInfo, limits: Limits
    ) -> Findings | None:
        """Apply the pack's changes; return `None`, with the object untouched, if there is no pack or it does not fit.

        Also returns `None` if the pack has uncertain verdicts and the machine is quiet now. The tuning that follows
        tries these again, and takes the others from `known`.
        """
        pack = self.store.read(self.key) if calls.main else None
        if pack is None:
            return None
        start = time.perf_counter()
        self._training = acts_in_training(self.plan)  # a call may leave the model in train mode, as WaveRNN's does
        ledger = Ledger()
        limits.began(ledger)
        try:
            receipt, entries = _read(pack.decisions, self.plan, stages, limits.seconds)
            if pack.artifacts is not None:
                compiler_cache.unpack(pack.artifacts)
            if receipt.unsure and self.retune and limits.watcher().look().quiet:
                self._earlier = receipt
                return None
            # Parts that must be bit-exact are compared one by one. So is everything where the whole could not be.
            alone = {part.name: part for part, _ in entries if part.decides or receipt.error is None}
            baseline = _untouched(replace(self.plan, parts=tuple(alone.values())), calls, device, limits)
            spared = activate(baseline, ledger, entries, whole=receipt.error is not None)
            if limits.stopped():
                ledger.off()
                return None
        except Exception as error:  # see `of`
            ledger.off()
            if not isinstance(error, _WarmupFailedError):  # tuning will report the same error
                emit(PackIgnored(f"the warm pack of {self.plan.what}", described(error)))
            return None
        except BaseException:
            ledger.off()
            raise
        findings = self._restored(baseline, ledger, entries, receipt, spared, time.perf_counter() - start)
        if pack.artifacts is None:
            # The pack has no trusted code: the code that was compiled here is stored under this user's signature.
            self._write(findings, receipt, only_with_code=True)
        return findings

    def _restored(  # noqa: PLR0913, PLR0917 - what was read, and what came of it
        self, baseline: Baseline, ledger: Ledger, entries: Sequence[tuple[Part, Stage]], receipt: Receipt,
        spared: Mapping[tuple[str, str], str], seconds: float,
    ) -> Findings:  # fmt: skip
        """Return the changes that are in force now, with the facts of the earlier receipt."""
        kept = tuple(ledger.kept)
        note = f"from a warm pack: tuned for {receipt.seconds:.1f} s in an earlier process, nothing was timed again"
        if receipt.unsure and self.retune:
            note += f"; {len(receipt.unsure)} verdicts are uncertain, and wait for a quiet machine"
        if self._training:
            warn_of_training(self.plan)
        emit(Restored(self.plan.what, len(entries), seconds))
        dropped = {key: f"not needed here: {obstacle}" for key, obstacle in spared.items()}
        keyed = [((result.part, result.stage), result) for result in receipt.stages]
        stages = tuple(result.dropped(dropped[key]) if key in dropped else result for key, result in keyed)
        facts = {
            **{item.name: getattr(receipt, item.name) for item in fields(receipt) if item.name != "notes"},
            "what": self.plan.what, "seconds": seconds, "cold": baseline.cold, "recompiled": 0,
            "stages": stages, "_live": recompile_counter(kept),
        }  # fmt: skip
        parts = tuple(part for part, _ in entries)
        return Findings(facts, (*receipt.notes, note), kept, complete=True, parts=parts, expected=baseline.expected)

    @property
    def known(self) -> tuple[StageResult, ...]:
        """Verdicts of an earlier process on the parts of which all its verdicts are certain."""
        if self._earlier is None:
            return ()
        again = {result.part for result in self._earlier.unsure}
        return tuple(result for result in self._earlier.stages if result.part not in again)

    def renew(self, findings: Findings) -> None:
        """Write the pack of the repeated tuning, unless the earlier one had fewer uncertain verdicts; emit an event."""
        before = self._earlier
        if before is None or not findings.complete:
            self.keep(findings)
            return
        after = findings.receipt()
        if len(after.unsure) <= len(before.unsure):
            self.keep(findings)
        emit(Retuned(self.plan.what, len(before.unsure), len(after.unsure), before.ratio, after.ratio))

    def keep(self, findings: Findings) -> None:
        """Write the pack of a complete tuning. A failure causes an event."""
        if findings.complete:
            self._write(findings, findings.receipt())

    def _write(self, findings: Findings, receipt: Receipt, *, only_with_code: bool = False) -> None:
        decided = [entry for entry in findings.kept if entry.stage not in IN_ANY_CASE]
        kept = [found for entry in decided if (found := _described(self.plan, findings, entry)) is not None]
        if len(kept) < len(decided):
            return  # a part has no path by which it can be found again
        try:
            code = self._code_of(findings.kept)
            if code is None and only_with_code:
                return
            decisions = {
                "format": _FORMAT, "kept": kept, "receipt": receipt.to_json(), "tune_seconds": self.seconds,
            }  # fmt: skip
            self.store.write(Pack(self.key, decisions, code))
        except Exception as error:  # see `of`
            emit(PackIgnored(f"the warm pack of {self.plan.what}", f"it could not be written: {error}"))

    def _code_of(self, kept: Sequence[AppliedChange]) -> bytes | None:
        """Compiled code of the changes in force."""
        return compiler_cache.pack(self._code) if any(entry.change.graphs for entry in kept) else None


class _WarmupFailedError(Exception):
    """The user's warm-up raised before anything was changed."""


def _described(plan: ModelPlan, findings: Findings, kept: AppliedChange) -> dict[str, Any] | None:
    base = {"part": kept.part, "stage": kept.stage}
    if kept.part == PROCESS:
        return {**base, "kind": PROCESS, "decides": False, "root": 0, "path": ""}
    part = next((part for part in findings.parts if part.name == kept.part), None)
    for number, root in enumerate(plan.roots):
        for path, module in root.named_modules():
            if part is not None and module is part.module:
                return {**base, "kind": part.kind, "decides": part.decides, "root": number, "path": path}
    return None


def _read(
    decisions: Mapping[str, Any], plan: ModelPlan, stages: Sequence[Stage], seconds: float
) -> tuple[Receipt, list[tuple[Part, Stage]]]:
    """Read the receipt and the changes to apply from untrusted decisions.

    Raises:
        ValueError: The decisions do not fit the plan or the stages, or ran out of a smaller budget.
    """
    receipt = Receipt.from_json(decisions["receipt"])
    if decisions.get("format", 1) < _FORMAT:
        # A single look on a busy machine could reject the best stage, without being marked as uncertain.
        verdicts = [
            replace(one, sure=one.sure and (one.kept or not _BY_CHANCE.search(one.reason))) for one in receipt.stages
        ]
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


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _untouched(plan: ModelPlan, calls: WarmupCalls, device: DeviceInfo, limits: Limits) -> Baseline:
    try:
        return one_pass(plan, calls, device, limits)
    except Exception as error:
        raise _WarmupFailedError from error
