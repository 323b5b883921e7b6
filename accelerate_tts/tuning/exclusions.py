"""Exclusions: tuning asks which changes are on a part. A stage only declares which of them exclude it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.patching.class_swap import is_fused, is_recorded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import Stage, State


def obstacle(stage: Stage, part: Part) -> str | None:
    """Return the reason why a stage cannot be tried on a part now; `None` if it can."""
    for state in stage.excluded_by:
        is_in, reason = _STATES[state]
        if is_in(part.module):
            return reason
    return stage.applies(part)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


_STATES: dict[State, tuple[Callable[[nn.Module], bool], str]] = {
    "compiled": (_is_compiled, "is compiled already"),
    "fused": (is_fused, "it is served as a whole"),
    "recorded": (is_recorded, "its steps are recorded"),
}
