"""Protocols of stages and changes, and the target that stages are made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from accelerate_tts.plan import Part, TimedCalls
    from accelerate_tts.settings import Precision

State = Literal["compiled", "fused", "recorded"]
"""States that a change, of this tuning or of other code, leaves a part in: its calls are compiled, one kernel computes
it as a whole, or its steps replay a recording."""


@dataclass(frozen=True)
class Target:
    """Target that stages are made for.

    Attributes:
        device: torch's name of the device type.
        precision: Precision level.
        compile_mode: torch.compile's mode for the device; `None` if nothing is compiled.
        half_dtypes: Half-precision dtypes that the device computes in, best first; none under "exact".
    """

    device: str
    precision: Precision = "exact"
    compile_mode: str | None = None
    half_dtypes: tuple[torch.dtype, ...] = ()


class Change(Protocol):
    """A reversible change of one part."""

    @property
    def graphs(self) -> int | None:
        """Number of compiled graphs; `None` for a change that compiles nothing."""
        ...

    def on(self) -> None:
        """Switch the change on. Idempotent."""
        ...

    def off(self) -> None:
        """Put the part back exactly as it was. Idempotent."""
        ...

    def end_warmup(self) -> None:
        """End the warm-up: report later compilations as events."""
        ...


class Stage(Protocol):
    """One optimisation."""

    name: str
    least_share: float
    """Minimum share of the whole time that a part must take for this stage to be tried on it."""
    group: str
    """Group of alternatives. At most one stage of a group is kept on a part: the fastest. "" without alternatives."""
    process: bool
    """True if the stage changes the process. It is tried once, on whole passes, and not on each part."""
    times: TimedCalls
    """Calls that are timed, for a part that is called in a loop."""
    excluded_by: tuple[State, ...]
    """States of a part in which the stage is not tried on it. Tuning asks for them before `applies`."""
    superseded_by: tuple[str, ...]
    """Names of stages that do the same from fewer bytes. Once one is kept on a part whose weights are read from memory
    at each step, this stage cannot gain anything, and is not tried."""
    passes: int
    """Passes on a device with graphs until the change is warm: it records in the first, and replays in the second."""

    def cost_of(self, part: Part) -> float:
        """Return the minimum seconds of a trial on `part`. With less of the budget left, it is not begun."""
        ...

    def applies(self, part: Part) -> str | None:
        """Return the reason why the stage does not apply to `part`, or `None` if it may be tried."""
        ...

    def prepare(self, part: Part) -> Change:
        """Make the change. It is off at first."""
        ...
