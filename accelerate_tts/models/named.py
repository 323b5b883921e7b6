"""Parts of known systems by attribute names, with events for upstream releases of another structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.models import generic
from accelerate_tts.plan import CALL, Head, Kind, Part


@dataclass(frozen=True)
class Known:
    """Table of the parts of one class of a system. Calling it makes the parts of such a module.

    Attributes:
        system: Name of the system, for people.
        releases: Known releases of its package, for people.
        parts: Kinds of the parts by their attribute path ("" for the module itself).
        decide: Paths of parts whose outputs become discrete.
        methods: Methods of parts that the system does not call as modules (`part(...)`).
        heads: Paths of the modules that compute a decoder's logits from its hidden states, in sequence.
        reads_alone: See `Head`.
        codebooks: Path of the attribute with the number of distributions side by side in the logits, an int; "" for
            one.
        guidance: See `Head`.
        needs: Further attributes that distinguish the class from others of the same name.
    """

    system: str
    releases: str
    parts: Mapping[str, Kind]
    decide: frozenset[str] = frozenset()
    methods: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads_alone: bool = False
    codebooks: str = ""
    guidance: float | None = None
    needs: tuple[str, ...] = ()

    def __call__(self, path: str, module: nn.Module) -> tuple[Part, ...]:
        """Return the parts of a module, or the whole module with an event if its structure is unknown."""
        found = {name: _at(module, name) for name in self.parts}
        missing = self._missing(module, found)
        if missing:
            reason = (
                f"{type(module).__name__} has no {', '.join(missing)}: a release we do not know"
                f" (known: {self.releases}); treated as a whole"
            )
            emit(NotApplied(f"the plan for {self.system}", reason))
            return generic.parts(path, module)
        parts = tuple(
            Part(
                _path(path, name, module),
                kind,
                part,
                name in self.decide,
                head=self._head(module, name),
                method=self.methods.get(name, CALL),
            )
            for name, kind in self.parts.items()
            if (part := _module(found[name])) is not None
        )
        return parts + self._projections(path, module, parts)

    def _projections(self, path: str, module: nn.Module, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Return the layers that compute logits as parts of their own, unless they lie inside another part.

        A head is some per cent of an untouched token, and much of what a fast decoder leaves.
        """
        inside = {inner for part in parts for inner in part.module.modules()}
        found: dict[nn.Module, Part] = {}
        for part, names in self.heads.items():
            head = self._head(module, part)
            if head is not None and head.modules[-1] not in inside:
                last = head.modules[-1]
                found[last] = Part(
                    _path(path, names[-1], module), "head", last, head=replace(head, modules=(), reads_alone=False)
                )
        return tuple(found.values())

    def _missing(self, module: nn.Module, parts: Mapping[str, object]) -> list[str]:
        """Return the attributes that are missing or of a wrong kind."""
        modules = {name: _module(part) for name, part in parts.items()}
        modules |= {name: _module(_at(module, name)) for names in self.heads.values() for name in names}
        missing = [name for name, part in modules.items() if part is None]
        missing += [name for name in self.needs if _at(module, name) is None]
        for name, method in self.methods.items():
            part = modules[name]
            if part is not None and not callable(getattr(part, method, None)):
                missing.append(f"{name}.{method}()")
        if self.codebooks and not isinstance(_at(module, self.codebooks), int):
            missing.append(self.codebooks)
        return missing

    def _head(self, module: nn.Module, part: str) -> Head | None:
        modules = [found for name in self.heads.get(part, ()) if (found := _module(_at(module, name))) is not None]
        if not modules:
            return None
        codebooks = _at(module, self.codebooks) if self.codebooks else 1
        count = codebooks if isinstance(codebooks, int) else 1
        return Head(tuple(modules), count, self.guidance, self.reads_alone)


def _path(path: str, name: str, module: nn.Module) -> str:
    return ".".join(filter(None, (path, name))) or type(module).__name__


def _at(module: object, name: str) -> object:
    for attribute in filter(None, name.split(".")):
        module = getattr(module, attribute, None)
    return module


def _module(found: object) -> nn.Module | None:
    return found if isinstance(found, nn.Module) else None
