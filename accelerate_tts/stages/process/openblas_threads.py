"""One thread for OpenBLAS, so that NumPy's idle workers do not slow down torch's threads.

torch's results stay bit-exact; NumPy may sum in another order.

This changes the process rather than a part. It is therefore tried on whole passes through the public path, where NumPy
and torch alternate as in service. device/openblas.py explains the effect.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from accelerate_tts.device.flags import HeldFlags
from accelerate_tts.device.openblas import BLAS_THREADS, busy_libraries
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage

if TYPE_CHECKING:
    from accelerate_tts.plan import Part


@register_stage
class QuietBlasStage(BaseStage):
    """Holds OpenBLAS at one thread. For CPUs."""

    name = "one OpenBLAS thread"
    devices = ("cpu",)
    after = ("fold weight norm",)
    process = True

    def applies(self, part: Part) -> str | None:
        del part
        return None if busy_libraries() else "no OpenBLAS with several threads is loaded"

    def prepare(self, part: Part) -> _Quiet:
        del part
        return _Quiet()


class _Quiet(BaseChange):
    def __init__(self) -> None:
        self._hold: HeldFlags | None = None
        self._dropped: weakref.finalize[..., _Quiet] | None = None

    def on(self) -> None:
        if self._hold is None:
            held = HeldFlags()
            # A tuned object that is dropped is not undone first.
            self._dropped = weakref.finalize(self, held.release)
            self._dropped.atexit = False
            try:
                held.take([(BLAS_THREADS, 1)])
                self._hold = held
            except BaseException:  # Ctrl-C
                held.release()
                raise

    def off(self) -> None:
        if self._hold is not None:
            self._hold.release()
            if self._dropped is not None:
                self._dropped.detach()
            self._hold = None
