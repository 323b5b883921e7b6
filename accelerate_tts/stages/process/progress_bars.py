"""Progress bars of a model's own code: drawn on terminals, and nowhere else.

Chatterbox draws a bar for each sentence's tokens and one for the steps of its flow. In a service that is a line in the
log for each tenth of a second of each request. Here the name `tqdm` of the modules that a model's classes come from
means the same class with another default, `disable=None`: tqdm's own word for "unless this is a terminal". What passes
`disable` itself is left alone, and so is every bar of other code.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from accelerate_tts.patching.change import BaseChange

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["QuietBars"]

_lock = threading.RLock()
_users: dict[str, int] = {}
"""Tuned objects by the module whose bars they share: the last one gives them back."""


class QuietBars(BaseChange):
    """The change; see `Change`. It computes nothing, so nothing of it is measured.

    Args:
        roots: The model's modules.
    """

    name = "quiet progress bars"

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        names = {cls.__module__ for root in roots for inner in root.modules() for cls in type(inner).__mro__}
        self.modules = sorted(name for name in names if _bars(name) is not None)
        self._is_on = False

    def on(self) -> None:
        """See `Change.on`."""
        with _lock:
            if not self._is_on:
                for name in self.modules:
                    _users[name] = _users.get(name, 0) + 1
                    bars = _bars(name)
                    if bars is not None and not hasattr(bars, _LOUD):
                        vars(sys.modules[name])["tqdm"] = _quiet(bars)
            self._is_on = True

    def off(self) -> None:
        """See `Change.off`."""
        with _lock:
            if self._is_on:
                for name in self.modules:
                    _users[name] -= 1
                    loud = getattr(_bars(name), _LOUD, None)
                    if _users[name] == 0 and loud is not None:
                        vars(sys.modules[name])["tqdm"] = loud
            self._is_on = False


_LOUD = "_accelerate_tts_loud"


def _bars(module: str) -> Any:
    """What `tqdm` is in a module, if it is a class of that package."""
    found = vars(sys.modules.get(module, sys)).get("tqdm")
    return found if isinstance(found, type) and found.__module__.startswith(("tqdm.", __name__)) else None


def _quiet(bars: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes the class's own
        kwargs.setdefault("disable", None)
        bars.__init__(self, *args, **kwargs)

    return type(bars.__name__, (bars,), {"__init__": __init__, "__module__": __name__, _LOUD: bars})
