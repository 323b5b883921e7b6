"""Catalogue of stages: registers them, selects those for a target, and sorts them.

A stage makes a *change* of a part, which can be switched on and off. Switching is cheap, so that tuning can time the
two states alternately. Costly work, such as a compilation, happens once, in the first run of the change.
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar, get_args

from accelerate_tts.device.compiler_folder import unwritable_folder
from accelerate_tts.errors import SettingsError, described, shown
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.registration import Registry
from accelerate_tts.settings import Precision
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.protocol import Stage, State, Target

STAGES: Registry[type[BaseStage]] = Registry("accelerate_tts.stages", "accelerate_tts.stages")
"""Stage classes by name."""

_StageClass = TypeVar("_StageClass", bound=type[BaseStage])


def register_stage(cls: _StageClass) -> _StageClass:
    """Register a stage, as a class decorator.

    Args:
        cls: A subclass of `BaseStage` with a `name`, `applies(part)` and `prepare(part)`.

    Returns:
        The class, unchanged.

    Raises:
        TypeError: `cls` is not such a class.
        ValueError: A declaration is invalid, or another stage has its name.
    """
    given: Any = cls
    if not isinstance(given, type) or not issubclass(given, BaseStage):
        raise TypeError(f"@register_stage needs a subclass of BaseStage, got {shown(cls)}")
    missing = [name for name in ("applies", "prepare") if not callable(getattr(cls, name, None))]
    if missing or not cls.name:
        raise TypeError(f"the stage {cls.__qualname__} has no {', '.join(missing or ['name'])}")
    for field in ("devices", "precisions", "after", "before", "excluded_by"):
        names = getattr(cls, field)
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{cls.__qualname__}.{field} must be a tuple of names, got {shown(names)}")
    for field, known in (("precisions", get_args(Precision)), ("excluded_by", get_args(State))):
        unknown = [name for name in getattr(cls, field) if name not in known]
        if unknown:
            raise ValueError(f"{cls.__qualname__}.{field} has {shown(unknown[0])}, which is none of {', '.join(known)}")
    STAGES.add(cls.name, cls)
    return cls


def default_stages(device_type: str, compile_mode: str | None, precision: Precision = "exact") -> tuple[Stage, ...]:
    """Return the stages in the order of trials. Later stages build on the changes that were kept before.

    A stage that cannot be made is omitted with a `NotApplied` event. So are all stages of other packages if they cannot
    be sorted.

    Args:
        device_type: torch's device type.
        compile_mode: torch.compile's mode for the device, or `None` to omit stages that need a compiler.
        precision: Precision level.
    """
    from accelerate_tts.device.half_dtypes import half_dtypes

    halves = () if precision == "exact" else half_dtypes(device_type)
    target = Target(device_type, precision, compile_mode, halves)
    classes = STAGES.entries().values()
    try:
        order = in_order(classes)
    except SettingsError as error:  # a stage must never fail the user's load; a test sorts this package's own
        emit(NotApplied("every stage of another package", str(error)))
        order = in_order([cls for cls in classes if _is_ours(cls)])
    return tuple(stage for cls in order for stage in _variants(cls, target))


def with_writable_folder(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """Return the stages that can be tried where the compiler has no folder to write into.

    The others are omitted with one `NotApplied` event. Inside a tuning each would fail by itself, on each part.
    """
    everything = tuple(stages)
    lost = [stage for stage in everything if getattr(stage, "needs_compiler", False)]
    why = unwritable_folder() if lost else None
    if why is None:
        return everything
    emit(NotApplied("; ".join(stage.name for stage in lost), f"the compiler has nowhere to write. {why}"))
    return tuple(stage for stage in everything if stage not in lost)


def in_order(classes: Iterable[type[BaseStage]]) -> list[type[BaseStage]]:
    """Sort stages by `after` and `before`, and otherwise this package's stages first, by name.

    Raises:
        SettingsError: The declarations are circular. The message names the circle.
    """
    ranked = sorted(classes, key=lambda cls: (not _is_ours(cls), cls.name))
    rank = {cls.name: number for number, cls in enumerate(ranked)}
    graph = {cls.name: {name for name in cls.after if name in rank} for cls in ranked}
    for cls in ranked:
        for name in cls.before:
            if name in rank:
                graph[name].add(cls.name)
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " after ".join(reversed(error.args[1]))
        raise SettingsError(f"these stages cannot be put in order: {circle}; mend their after= or before=") from None
    order: list[type[BaseStage]] = []
    ready = set(sorter.get_ready())
    while ready:
        name = min(ready, key=rank.__getitem__)
        order.append(ranked[rank[name]])
        sorter.done(name)
        ready = (ready - {name}) | set(sorter.get_ready())
    return order


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("accelerate_tts.")


def _variants(cls: type[BaseStage], target: Target) -> tuple[Stage, ...]:
    if cls.devices and target.device not in cls.devices:
        return ()
    if target.precision not in cls.precisions or (cls.needs_compiler and target.compile_mode is None):
        return ()
    try:
        return tuple(cls.variants(target))
    except Exception as error:  # a stage must never fail the user's load
        emit(NotApplied(f"the stage {cls.name}", described(error)))
        return ()
