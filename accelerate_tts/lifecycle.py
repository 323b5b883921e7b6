"""Lifecycle of loaded objects: tune, warm up, register, and undo."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate_tts.device import flags, setup
from accelerate_tts.device.detect import detect
from accelerate_tts.errors import WarmupError, described
from accelerate_tts.events import NotApplied, Undone, Warmed, WarmupFailed, emit
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.settings import DEVICES, Settings
from accelerate_tts.tuning.registry import TuningMap, drop_keeper, keep, keeper_of
from accelerate_tts.tuning.tuning_lock import TuningLock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from torch import nn

    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.packs.warm_pack import WarmPack
    from accelerate_tts.patching.lazy_parameters import WeightOffloader
    from accelerate_tts.plan import ModelPlan
    from accelerate_tts.receipts.receipt import Receipt
    from accelerate_tts.stages.protocol import Stage
    from accelerate_tts.tuning.findings import Findings, Tuning
    from accelerate_tts.tuning.ledger import Ledger
    from accelerate_tts.tuning.limits import Limits
    from accelerate_tts.tuning.load_request import LoadRequest
    from accelerate_tts.tuning.warmup import Loaded, WarmupCalls

_GUARD_ON = "guard: on; the original weights are still in place, so a retry switches the changes off: 0 bytes extra"
_FOR_UNDO = "for undoing, state_dict and the guard; guard_weights='disk' keeps them in a file"
_GUARD_OFF = "guard: off, by Settings.guard"

# One lock for the process.
_tuning_lock = TuningLock()


class LoadedObjects:
    """Objects that one `PerformanceOptimizer` has tuned.

    Args:
        settings: Its options.
        ready: Returns the device, once it is set up.
        tidy: Gives memory back.
    """

    def __init__(self, settings: Settings, ready: Callable[[], DeviceInfo], tidy: Callable[[], object]) -> None:
        self._settings = settings
        self._ready = ready
        self._tidy = tidy
        self._tunings = TuningMap()

    def optimize(self, request: LoadRequest) -> Receipt | None:
        """See `PerformanceOptimizer.optimize`."""
        with _tuning_lock.held(request.loaded.loop) as mine:
            if mine:
                return self._optimize(request)
        emit(NotApplied("@optimized_model", "a load inside another load's warm-up is not tuned; load it beforehand"))
        return None

    def _optimize(self, request: LoadRequest) -> Receipt | None:
        from accelerate_tts.inspection.object_tree import find_modules

        prepared = self._ready()
        loaded = request.loaded
        if loaded.result is not None and loaded.owner is not None and not find_modules(loaded.result):
            loaded = replace(loaded, result=None)  # `return True`, and the model is on self
            request = replace(request, loaded=loaded)
        found = find_modules(loaded.subject)
        settings = request.applied_to(self._settings)
        self._tell_other_precisions(loaded, found.values(), settings.precision)
        tuned = {id(root): done for root in found.values() if (done := self._tunings.get(root)) and done.complete}
        new = [root for root in found.values() if id(root) not in tuned]
        if not new:
            self._warm_up_new(request, found)
            for done in tuned.values():
                self._remember(loaded, done)
                return done.receipt
            return None
        if lazy := _lazy_modules(new):
            name = type(loaded.subject).__name__
            emit(
                NotApplied(
                    f"@optimized_model on {name}",
                    f"{lazy[0]} has no weights before its first call; make one in the load",
                )
            )
            return None
        from accelerate_tts.models import describe
        from accelerate_tts.packs.warm_pack import WarmPack
        from accelerate_tts.stages.catalogue import default_stages, with_writable_folder
        from accelerate_tts.storage.fingerprint import outline
        from accelerate_tts.tuning.limits import Limits
        from accelerate_tts.tuning.policy import current_policy

        calls = request.calls(self._settings.warmup_timeout)
        plan = describe(loaded.subject, new)
        device = _device_of(plan, prepared)
        stages = default_stages(device.type, setup.compile_mode(device, settings), settings.precision)
        pack = None
        if settings.pack and calls.main and plan.parts:
            told = {"precision": settings.precision, "lengths": request.lengths, "warmup": outline(request.warmup)}
            pack = WarmPack.of(plan, stages, device, settings, mode=request.mode, **told)
        # Not before: a pack that was made where the compiler could write is found by the same key.
        stages = with_writable_folder(stages)
        policy = replace(current_policy(), patience=settings.tune_patience)
        begun: list[Ledger] = []
        limits = Limits(settings.tune_seconds, settings.precision, request.stopped, policy, begun.append)
        tuning = None
        # Not in the block: on Python 3.13 a signal at the jump of a comprehension's `if` passes an `except` by.
        roots = {path: root for path, root in found.items() if id(root) not in tuned}
        try:
            # Before anything else: dynamo may guard on which attributes a module has.
            for root in plan.roots:
                keep(root)
            findings = _found(plan, calls, stages, limits, pack, device)
            tuning = self._with_weights_placed(plan, findings, loaded, roots, calls)
            for root in plan.roots:
                keeper_of(root).tuning = tuning
            self._remember(loaded, tuning, *plan.roots)
        except BaseException:  # Ctrl-C: a tuned model must have its receipt, its guard and its undo
            self._take_back(plan, begun, tuning)
            raise
        self._tidy()  # frees captured inputs and rejected copies
        return tuning.receipt

    def _tell_other_precisions(self, loaded: Loaded, roots: Iterable[nn.Module], precision: str) -> None:
        """Emit an event for each module that a load of another object has tuned in another precision.

        An object may load its model and its vocoder in different ones.
        """
        own = set(map(id, self._tunings.all(loaded.owner)))
        known = {id(done): done for root in roots for inner in root.modules() if (done := self._tunings.get(inner))}
        for done in known.values():
            if done.changes and id(done) not in own and done.receipt.precision != precision:
                asked, had = f"precision={precision!r} of {type(loaded.subject).__name__}", done.receipt
                emit(
                    NotApplied(
                        asked,
                        f"another load has tuned {had.what} in precision={had.precision!r}, and the model is shared;"
                        " undo that first, or load another model",
                    )
                )

    def _take_back(self, plan: ModelPlan, begun: list[Ledger], tuning: Tuning | None) -> None:
        for ledger in begun:
            ledger.off()
        if tuning is not None:
            self._undo(tuning)
        for root in plan.roots:
            drop_keeper(root)

    def _with_weights_placed(
        self, plan: ModelPlan, findings: Findings, loaded: Loaded, found: dict[str, nn.Module], calls: WarmupCalls
    ) -> Tuning:
        """Place the original weights as `guard_weights` asks, and make the tuning, whose receipt has the cost."""
        if not findings.kept:
            return findings.tuning()
        from accelerate_tts.packs.store import pack_folder
        from accelerate_tts.patching.offload import copied_storages, originals_to_file

        beside = sum(storage.nbytes() for storage in copied_storages(plan.roots).values()) / 2**20
        notes = [_GUARD_ON if self._settings.guard else _GUARD_OFF]
        if beside >= 1.0:
            notes.append(
                f"{beside:.0f} MiB of original weights stay in memory beside the copies that compute now: {_FOR_UNDO}"
            )
        if self._settings.guard_weights == "disk":
            moved = originals_to_file(plan.roots, plan.what, pack_folder(self._settings))
            if moved:
                saved = f"{moved / 2**20:.0f} MiB of memory less"
                notes.append(f"the original weights that have copies are in a file: {saved}")
        offloader = None
        if self._settings.guard_weights == "reload":
            offloader, note = self._freed(plan.what, findings, loaded, found, calls)
            notes.append(note)
        return findings.tuning(*notes, offloader=offloader)

    def _freed(
        self, what: str, findings: Findings, loaded: Loaded, found: dict[str, nn.Module], calls: WarmupCalls
    ) -> tuple[WeightOffloader | None, str]:
        """Free original weights, and run the warm-up to see that they are not read.

        Returns:
            The object that reloads them, or `None`, and a note for the receipt.
        """
        from accelerate_tts.patching.offload import offloader_of
        from accelerate_tts.runtime.seeding import seeded

        again, device = loaded.again, self._ready().type
        if again is None:
            why = "there is no load function to call again: decorate it with @optimized_model"
            emit(NotApplied(f"guard_weights='reload' of {what}", why))
            return None, f"the original weights stay in memory: {why}"
        start = time.perf_counter()
        timeout = self._settings.warmup_timeout
        # A graph refers to its weights, and would be compiled again.
        compiled = {kept.part for kept in findings.kept if kept.change.graphs is not None}
        besides = {inner for part in findings.parts if part.name in compiled for inner in part.module.modules()}
        offloader = offloader_of(what, found, lambda: again.modules(what, device, timeout), besides)
        seconds = time.perf_counter() - start
        gone = 0 if offloader is None else offloader.free()
        try:
            with seeded(device):  # other code may read a layer's weights at each call
                for call in calls.main if gone else ():
                    call.run()
        except Exception as error:  # the user's model raised; the loaded model is kept
            emit(WarmupFailed(what, described(error)))
        if offloader is None or not offloader.gone:
            return offloader, "guard_weights='reload': no original weights could be freed; they stay in memory"
        return offloader, (
            f"{gone / 2**20:.1f} MiB of original weights were freed: a second attempt, undo or state_dict loads them"
            f" again ({seconds:.1f} s, and the memory of one more model meanwhile)"
        )

    def _warm_up_new(self, request: LoadRequest, found: dict[str, nn.Module]) -> None:
        """Warm up an object whose modules need no tuning (or that has none), unless it is warm already."""
        from accelerate_tts.runtime.seeding import seeded

        name = type(request.loaded.subject).__name__
        if not found:
            emit(NotApplied(f"@optimized_model on {name}", "no torch.nn.Module was found in what was loaded"))
        elif self._tunings.get(request.loaded.subject) is not None:
            return
        start = time.perf_counter()
        try:
            with seeded(self._ready().type):
                for call in request.calls(self._settings.warmup_timeout).main:
                    call.run()
        except WarmupError:
            raise
        except Exception as error:  # the user's warm-up failed; the loaded object is kept
            emit(WarmupFailed(name, described(error)))
            return
        emit(Warmed(name, time.perf_counter() - start))

    def _remember(self, loaded: Loaded, tuning: Tuning, *roots: object) -> None:
        guarding = guards.guard_of(tuning)
        if guarding is None and self._settings.guard and tuning.changes:
            guarding = guards.Guard(tuning.receipt.what, tuning, tuning.expected, self._settings.guard_limit)
        items = [item for item in (*roots, loaded.result, loaded.owner) if item is not None]
        for item in items:
            self._tunings.put(item, tuning)
        if guarding is not None:
            for item in (*items, tuning):
                guards.protect(item, guarding)

    def receipt(self, tuned: object) -> Receipt | None:
        """See `PerformanceOptimizer.receipt`."""
        tuning = self.tuning_of(tuned)
        if tuning is None:
            return None
        guarding = guards.guard_of(tuning)
        return tuning.put_back() if guarding is not None and guarding.retired else tuning.receipt

    def tuning_of(self, tuned: object) -> Tuning | None:
        """Return the last tuning of an object, or for a container that of its first tuned module."""
        known = self._tunings.get(tuned)
        return known or next(iter(self._tunings_in(tuned)), None)

    def _tunings_in(self, tuned: object) -> list[Tuning]:
        """Return all tunings of an object, or of the modules in a container, in order."""
        known = self._tunings.all(tuned)
        if known or (type(tuned).__weakrefoffset__ and not isinstance(tuned, (tuple, list, dict))):
            return known
        # A container, or an object of a class with slots, is not registered itself, but its modules are.
        from accelerate_tts.inspection.object_tree import find_modules

        found = {id(tuning): tuning for root in find_modules(tuned).values() for tuning in self._tunings.all(root)}
        return list(found.values())

    def undo(self, tuned: object) -> bool:
        """See `PerformanceOptimizer.undo`."""
        # Without a lock, since reloading weights emits events, whose hooks may call this. Every step may run twice, and
        # the caller that finishes emits the event.
        tunings = self._tunings_in(tuned)
        for tuning in tunings:
            tuning.keep_loaded()  # for all tunings before any is undone, since it may fail
        undone = [tuning for tuning in reversed(tunings) if self._undo(tuning)]
        for tuning in reversed(undone):
            emit(Undone(tuning.receipt.what))
        return bool(tunings)

    def _undo(self, tuning: Tuning) -> bool:
        """Put an object back as it was loaded; return True unless another caller has done so."""
        guarding = guards.guard_of(tuning)
        if guarding is not None:
            guarding.retire()  # a retry that runs at this moment must not put the changes in force again
        tuning.undo()
        return self._tunings.forget(tuning)

    @contextmanager
    def untouched(self, tuned: object) -> Generator[bool, None, None]:
        """See `PerformanceOptimizer.untouched`."""
        with ExitStack() as scopes:
            in_force = [scopes.enter_context(_untouched(tuning)) for tuning in self._tunings_in(tuned)]
            yield any(in_force)


def _found(  # noqa: PLR0913, PLR0917 - what a tuning consists of
    plan: ModelPlan, calls: WarmupCalls, stages: Sequence[Stage], limits: Limits, pack: WarmPack | None,
    device: DeviceInfo,
) -> Findings:  # fmt: skip
    """Put the changes of a warm pack in force or, if none fits, those of a tuning."""
    from accelerate_tts.tuning.tune import find

    with flags.holding(setup.tuning_flags(device)):
        findings = None if pack is None else pack.restore(calls, stages, device, limits)
        if findings is None:
            findings = find(plan, calls, stages, device, limits, () if pack is None else pack.known)
            if pack is not None:
                pack.renew(findings)
    return findings


def _lazy_modules(roots: Sequence[nn.Module]) -> list[str]:
    """Return the classes of modules whose weights are made by their first call."""
    from torch.nn.parameter import is_lazy

    modules = (module for root in roots for module in root.modules())
    return [type(module).__name__ for module in modules if any(map(is_lazy, module.parameters(recurse=False)))]


def _device_of(plan: ModelPlan, prepared: DeviceInfo) -> DeviceInfo:
    """Return the device that holds most of an object's weights. It may differ from the detected device."""
    sizes: Counter[str] = Counter()
    for parameter in (parameter for root in plan.roots for parameter in root.parameters()):
        sizes[parameter.device.type] += parameter.numel() * parameter.element_size()
    ((most, _),) = sizes.most_common(1) or [(prepared.type, 0)]
    if most == prepared.type or most not in DEVICES:
        return prepared
    emit(NotApplied(f"{prepared.kind} for {plan.what}", f"its weights are on {most}, so it is tuned for that"))
    return detect(most)


@contextmanager
def _untouched(tuning: Tuning) -> Generator[bool, None, None]:
    guarding = guards.guard_of(tuning)
    if guarding is not None:  # the guard counts the holders, and knows if the changes are off for good
        with guarding.untouched():
            of_process = tuning.of_process()  # which the guard leaves on, since they compute the same
            try:
                for change in reversed(of_process):
                    change.off()
                yield guarding.in_force
            finally:
                for change in of_process:
                    change.on()
        return
    _pin = tuning.at_hand()  # keeps the weights until the changes are on again
    try:
        for change in reversed(tuning.changes):
            change.off()
        yield bool(tuning.changes)
    finally:
        for change in tuning.changes:
            change.on()
