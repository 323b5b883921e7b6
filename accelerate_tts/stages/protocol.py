"""Protocols of stages and of their changes, and what stages are made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from accelerate_tts.plan import Part, Which
    from accelerate_tts.settings import Precision

__all__ = ["Change", "Stage", "Target"]


@dataclass(frozen=True)
class Target:
    """What stages are made for.

    Attributes:
        device: torch's name of the device type.
        precision: What may be changed.
        compile_mode: torch.compile's mode for the device; `None` where compiling is left out.
        half_dtypes: The half-precision dtypes that the device computes in, best first; none under "exact".
    """

    device: str
    precision: Precision = "exact"
    compile_mode: str | None = None
    half_dtypes: tuple[torch.dtype, ...] = ()


class Change(Protocol):
    """A reversible change of one part."""

    @property
    def graphs(self) -> int | None:
        """Graphs compiled so far; `None` for a change that compiles nothing."""
        ...

    def on(self) -> None:
        """Put the change in force. Idempotent."""
        ...

    def off(self) -> None:
        """Put the part back exactly as it was. Idempotent."""
        ...

    def seal(self) -> None:
        """Warm-up is over: whatever has to be compiled from here on is worth an event."""
        ...


class Stage(Protocol):
    """One optimisation."""

    name: str
    least_share: float
    """The share of the whole time that a part must take before this stage is worth trying on it."""
    group: str
    """Of the stages of one group, at most one is kept on a part: the fastest. "" for a stage without alternatives."""
    process: bool
    """Whether it is about the process as a whole and tried once, on the whole pass; not on each part."""
    times: Which
    """Of a part that is called in a loop, the calls in which its gain is looked for."""
    superseded_by: tuple[str, ...]
    """Names of stages that do the same from fewer bytes: once one is kept on a part whose weights come from memory at
    each step, this one has nothing to gain, and the copies that it would make are never made."""

    def cost_of(self, part: Part) -> float:
        """Seconds that trying it on `part` usually takes, at least; with less of the budget left it is not begun."""
        ...

    def applies(self, part: Part) -> str | None:
        """Why the stage has nothing to do on `part`, or `None` if it may be tried."""
        ...

    def prepare(self, part: Part) -> Change:
        """Make the change, switched off."""
        ...
