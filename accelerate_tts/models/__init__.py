"""Known systems, identified by the names of their classes without importing them.

A new system is a file in this folder, or in a package of your own, that registers its parts. CONTRIBUTING.md has an
example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from torch import nn

from accelerate_tts.errors import described
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.object_tree import find_modules, members_of
from accelerate_tts.models import generic
from accelerate_tts.models.catalogue import SYSTEMS, SystemEntry, register_system
from accelerate_tts.models.named import Known
from accelerate_tts.plan import ModelPlan, Part

__all__ = ["Known", "Part", "describe", "register_system"]

_DEPTH = 3  # a service, its backend, upstream's own object


def describe(subject: object, only: Collection[nn.Module] | None = None) -> ModelPlan:
    """Return the plan of a loaded object: its modules and parts.

    Args:
        subject: A module, or an object, tuple or mapping that holds modules.
        only: The outermost modules to include; all by default.
    """
    modules = find_modules(subject)
    if only is not None:
        wanted = {id(module) for module in only}
        modules = {path: module for path, module in modules.items() if id(module) in wanted}
    systems = SYSTEMS.entries()
    parts: list[Part] = []
    known: set[str] = set()
    for path, module in modules.items():
        name = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in systems), None)
        if name is not None:
            known |= {_package(cls) for cls in type(module).__mro__}
        parts += generic.parts(path, module) if name is None else _parts(systems[name], name, path, module)
    _say_what_is_not_known(subject, known, systems)
    # Unknown models are divided into parts after the first pass, by the times of their modules.
    refine = partial(generic.refine, tuple(parts)) if any(part.kind == "model" for part in parts) else None
    return ModelPlan(type(subject).__name__, tuple(modules.values()), tuple(parts), refine)


def _parts(system: SystemEntry, name: str, path: str, module: nn.Module) -> tuple[Part, ...]:
    try:
        return tuple(system.parts(path, module))
    except Exception as error:  # a system of another package must not fail the user's load
        reason = f"{described(error)}; its parts are found by watching"
        emit(NotApplied(f"the plan for {name}", reason))
        return generic.parts(path, module)


def _say_what_is_not_known(subject: object, known: Collection[str], systems: Mapping[str, SystemEntry]) -> None:
    """Emit an event for each upstream package with an object in which no module has a known class."""
    holders: dict[str, tuple[str, ...]] = {}
    for system in systems.values():
        holders[system.package] = (*holders.get(system.package, ()), *system.holders)
    strange: dict[str, str] = {}
    level = [subject]
    for _ in range(_DEPTH):
        inner: list[object] = []
        for value in level:
            held = [] if isinstance(value, nn.Module) else [item for _, item in members_of(value)]
            inner += held
            if not isinstance(value, nn.Module) and not any(isinstance(item, nn.Module) for item in held):
                continue
            for cls in type(value).__mro__:
                package = _package(cls)
                if package not in known and cls.__name__.startswith(holders.get(package, ())):
                    strange.setdefault(package, cls.__qualname__)
        level = inner
    for package, name in strange.items():
        reason = (
            f"in {name} of {package} nothing is of a class that we know: a release of another shape, or parts of it"
        )
        emit(NotApplied(f"the plan for {name}", f"{reason}; its parts are found by watching"))


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
