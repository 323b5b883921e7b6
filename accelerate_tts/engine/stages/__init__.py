"""The optimisations, one file each. Adding one means adding a file and naming it in `default_stages`.

A stage makes a *change* of a part that can be switched on and off at will. Both are cheap, so that the engine can time
the two states in turn; what is costly (a compilation) happens once, when the change is first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from accelerate_tts.engine.plan import Part

__all__ = ["Change", "Stage", "default_stages"]


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

    def applies(self, part: Part) -> str | None:
        """Why the stage has nothing to do on `part`, or `None` if it may be tried."""
        ...

    def prepare(self, part: Part) -> Change:
        """Make the change, switched off."""
        ...


def default_stages(device_type: str, compile_mode: str | None) -> tuple[Stage, ...]:
    """The stages in the order in which they are tried.

    Args:
        device_type: torch's device type.
        compile_mode: torch.compile's mode for the device, or `None` to leave that stage out.
    """
    from accelerate_tts.engine.stages.compile import CompileStage
    from accelerate_tts.engine.stages.fold import FoldStage
    from accelerate_tts.engine.stages.layout import ChannelsLastStage
    from accelerate_tts.engine.stages.linear import FewRowsStage

    stages: tuple[Stage, ...] = (FoldStage(),)
    if device_type == "cpu":
        stages = (*stages, ChannelsLastStage(), FewRowsStage())
    return stages if compile_mode is None else (*stages, CompileStage(compile_mode))
