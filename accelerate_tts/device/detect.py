"""Which accelerator there is, as one small value; and what is known of each type of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from accelerate_tts.errors import SettingsError
from accelerate_tts.registry import Registry
from accelerate_tts.settings import DEVICES, Settings

if TYPE_CHECKING:
    import torch

    from accelerate_tts.device.flags import Flag

__all__ = ["DEVICES", "SPECS", "DeviceInfo", "DeviceSpec", "detect", "register_device", "spec_of"]


@dataclass(frozen=True)
class DeviceInfo:
    """A detected device.

    Attributes:
        kind: What it is. ROCm answers to torch's name "cuda" and is told apart here.
        name: The hardware's own name, for people.
        total_memory: Bytes of device memory; `None` where it is the machine's own (CPU, MPS) or unknown.
    """

    kind: str
    name: str
    total_memory: int | None = None

    @property
    def type(self) -> str:
        """Torch's name for the device type: "cuda", "mps", "xpu" or "cpu"."""
        return "cuda" if self.kind == "rocm" else self.kind


Wanted: TypeAlias = "list[tuple[Flag, Any]]"
"""Flags, and the values that they are to have."""


def _nothing(_: object) -> Wanted:
    return []


def _unknown(_: object) -> int | None:
    return None


@dataclass(frozen=True)
class DeviceSpec:
    """What is known of one type of device. Its other functions are found in torch's module of that name.

    A device other than the CPU needs `torch.<type>` with `synchronize()` and `empty_cache()`.

    Attributes:
        type: torch's name.
        probe: Looks for the device; `None` where there is none.
        compile_mode: torch.compile's mode, unless `Settings.compile_mode` says another; `None` where compiling is not
            worth trying.
        call_flags: The flags that make calls faster, which `fast_inference()` holds.
        setup_flags: Further flags and variables that `PerformanceOptimizer.initialize()` sets. A variable that the user
            has set must not be among them.
        half_dtypes: The half-precision dtypes that it computes in at full speed, best first.
        free_bytes: Bytes that can still be taken; `None` where nobody can say.
        batch_size: Items that fit into a batch by a rule of thumb; `None` for the caller's own default.
    """

    type: str
    probe: Callable[[], DeviceInfo | None]
    compile_mode: str | None = "default"
    call_flags: Callable[[Settings], Wanted] = _nothing
    setup_flags: Callable[[Settings], Wanted] = _nothing
    half_dtypes: Callable[[], tuple[torch.dtype, ...]] = tuple
    free_bytes: Callable[[DeviceInfo], int | None] = _unknown
    batch_size: Callable[[DeviceInfo], int | None] = _unknown


SPECS: Registry[DeviceSpec] = Registry("accelerate_tts.device.kinds")
"""What is known of each type of device, by torch's name."""


def register_device(spec: DeviceSpec) -> DeviceSpec:
    """Add a type of device to those that are looked for. One that `settings.DEVICES` does not name goes first.

    Raises:
        ValueError: Something else is registered under this name.
    """
    SPECS.add(spec.type, spec)
    if spec.type not in DEVICES:
        DEVICES.insert(0, spec.type)
    return spec


def spec_of(device: DeviceInfo | str) -> DeviceSpec:
    """What is known of a device, or of a device type."""
    return SPECS.entries()[device if isinstance(device, str) else device.type]


def detect(wanted: str | None = None) -> DeviceInfo:
    """Find the best device: the first of `settings.DEVICES` that is there.

    Args:
        wanted: Take this device type ("cuda", "mps", "xpu", "cpu") and no other.

    Raises:
        SettingsError: `wanted` is not available here.
    """
    specs = SPECS.entries()
    for name in DEVICES:
        if wanted in {None, name} and name in specs:
            found = specs[name].probe()
            if found is not None:
                return found
    raise SettingsError(
        f"device={wanted!r} is not available on this machine;"
        f" unset ACCELERATE_TTS_DEVICE to take the best that is, or run `accelerate-tts doctor`"
    )
