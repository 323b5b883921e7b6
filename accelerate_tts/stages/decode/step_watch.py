"""Watch on what a recorded step or prompt holds for: a decoder's weights, and its structure.

A replay calls nothing inside the decoder and reads no attribute, so it would ignore hooks, and keep factors, numbers of
layers and functions that were there when it was recorded.
"""

from __future__ import annotations

from typing import Any

from accelerate_tts.inspection.signatures import foreign_hooks, global_hooks, hooks_of
from accelerate_tts.patching.structure_watch import Inside
from accelerate_tts.patching.weight_versions import WeightWatch
from accelerate_tts.stages.decode.call_args import is_spied


class StepWatch:
    """The state of a decoder, as it was found.

    Args:
        decoder: The decoder.
        copies: Recordings hold copies of weights, so that the content is watched, too.
    """

    def __init__(self, decoder: Any, *, copies: bool) -> None:
        self._weights = WeightWatch(decoder, content=copies)
        self._inner = [inner for inner in decoder.modules() if inner is not decoder]  # its own hooks run as usual
        self._hooks = [*hooks_of(*self._inner), *global_hooks()]
        self._inside = Inside(decoder)

    def outdated(self) -> bool:
        """Check for other weights or modules than were found: recordings must be made anew, and so must the watch."""
        return self._weights.outdated()

    def moved(self) -> bool:
        """Check for other tensors or modules than were found. Writes in place do not count."""
        return self._weights.moved()

    def obstacle(self) -> str | None:
        """Return the reason why recordings cannot serve for now, or `None`."""
        if foreign_hooks(self._hooks) or any(map(is_spied, self._inner)):
            return "there are hooks inside it, which a replay does not call"
        return self._inside.changed()
