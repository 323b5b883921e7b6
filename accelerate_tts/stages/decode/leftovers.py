"""Hooks and forwards that upstream leaves on a decoder at each request, which slow down every later one.

Chatterbox's multilingual T3 makes an `AlignmentStreamAnalyzer` for each request. It registers hooks on three attention
layers and never removes them; the loop uses only the newest analyzer. After thousands of requests, each token calls
thousands of hooks, and each analyzer keeps the attention weights of its prompt. Chatterbox 0.1.1 has one in its English
model, which also puts a `forward` around that of the request before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.events import Tidied, emit
from accelerate_tts.inspection.signatures import is_analyzer
from accelerate_tts.stages.decode.call_args import tidy

if TYPE_CHECKING:
    from torch import nn


class Leftovers:
    """Left-over hooks of one decoder, removed at the start of each request. Other hooks are untouched."""

    def __init__(self) -> None:
        self._was_told = False

    def tidy(self, decoder: nn.Module) -> None:
        """Remove the hooks of all analyzers but the newest, and each `forward` of theirs."""
        for inner in decoder.modules():
            tidy(inner)
        gone = sum(_tidied(inner._forward_hooks) for inner in decoder.modules() if len(inner._forward_hooks) > 1)
        if gone and not self._was_told:
            self._was_told = True
            reason = "hooks of alignment analyzers of earlier requests, which upstream never removes and no longer uses"
            emit(Tidied(type(decoder).__name__, reason))


def _tidied(hooks: Any) -> int:
    """Remove left-over hooks of a module and return their number."""
    owners = {number: _owner(hook) for number, hook in list(hooks.items()) if is_analyzer(hook)}
    last = next(reversed(owners.values()), None)
    old = [number for number, owner in owners.items() if owner is not last]
    for number in old:
        hooks.pop(number, None)  # another thread may have removed it
    return len(old)


def _owner(hook: Any) -> object:
    """Return the analyzer that a hook belongs to: the `self` in the hook's closure."""
    inside = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=False))
    return inside["self"].cell_contents if "self" in inside else hook
