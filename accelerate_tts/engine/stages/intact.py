"""Whether what a kernel passes by, when it serves a whole block, is still what it was when the kernel learnt of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages.tokens import has_hooks, is_capture

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Inside"]


class Inside:
    """What is inside a block.

    Args:
        block: The block, as it is served.
        watched: Places besides its modules, an object and an attribute each, that must hold what they hold now.
        read: A module in it whose outputs transformers may collect; who serves the block sees to that.
    """

    def __init__(
        self, block: nn.Module, watched: Iterable[tuple[Any, str]] = (), read: nn.Module | None = None
    ) -> None:
        self._read = read
        self._inner = [inner for inner in block.modules() if inner is not block]
        # What has nothing in it, too: a linear layer may be given an adapter.
        self._places = [(inner._modules, list(inner._modules.values())) for inner in block.modules()]
        self._watched = [(holder, name, getattr(holder, name, None)) for holder, name in watched]

    def altered(self) -> str | None:
        """What came into the block since that the kernel would pass by, as an obstacle; `None` if nothing did."""
        if has_hooks(*self._inner):
            return "there are hooks on what is inside a block, and nothing inside it is called"
        if [1 for holder, before in self._places if list(holder.values()) != before] or [
            1
            for inner in self._inner
            if "forward" in inner.__dict__ and not (inner is self._read and is_capture(inner.__dict__["forward"]))
        ]:  # lists, since this is asked of each block at each token, and a generator costs more
            return "a module inside a block was exchanged, or given a forward of its own"  # an adapter, perhaps
        for holder, name, before in self._watched:
            if getattr(holder, name, None) is not before:
                return f"the {name} inside a block was exchanged"
        return None
