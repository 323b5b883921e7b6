"""What upstream leaves behind on a decoder at each call, and would pay for at every later one.

Chatterbox's multilingual T3 makes an `AlignmentStreamAnalyzer` for each request, which hooks itself onto three
attention layers and never off again; its loop asks only the one that it made last. After some thousands of requests,
each token calls thousands of hooks, and each analyzer keeps the attention weights of its prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.events import Tidied, emit
from accelerate_tts.inspection.signatures import is_analyzer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Leftovers"]


class Leftovers:
    """What is left behind on one decoder. Taken away at the start of each request; nothing else is touched."""

    def __init__(self) -> None:
        self._was_told = False

    def tidy(self, decoder: nn.Module) -> None:
        """Take away the hooks of all analyzers but the one that was made last."""
        gone = sum(_tidied(inner._forward_hooks) for inner in decoder.modules() if len(inner._forward_hooks) > 1)
        if gone and not self._was_told:
            self._was_told = True
            reason = "hooks of alignment analyzers of earlier requests, which upstream never removes and no longer asks"
            emit(Tidied(type(decoder).__name__, reason))


def _tidied(hooks: Any) -> int:
    """Remove what is left over from a module's hooks; how many there were."""
    owners = {number: _owner(hook) for number, hook in list(hooks.items()) if is_analyzer(hook)}
    last = next(reversed(owners.values()), None)
    old = [number for number, owner in owners.items() if owner is not last]
    for number in old:
        hooks.pop(number, None)  # another thread may begin a request, too
    return len(old)


def _owner(hook: Any) -> object:
    """The analyzer that a hook belongs to: a function in one of its methods, which has its `self`."""
    inside = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=False))
    return inside["self"].cell_contents if "self" in inside else hook
