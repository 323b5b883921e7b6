"""Detection of the device, and the registry of device types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from accelerate_tts.errors import SettingsError
from accelerate_tts.registration import Registry
from accelerate_tts.settings import DEVICES, Settings

if TYPE_CHECKING:
    import torch

    from accelerate_tts.device.flags import Flag
    from accelerate_tts.device.graphs import DeviceGraphs


@dataclass(frozen=True)
class DeviceInfo:
    """A detected device.

    Attributes:
        kind: Kind of device. ROCm has torch's name "cuda", and is a kind of its own here.
        name: Name of the hardware, for people.
        total_memory: Bytes of device memory; `None` if it is the machine's own (CPU, MPS) or unknown.
    """

    kind: str
    name: str
    total_memory: int | None = None

    @property
    def type(self) -> str:
        """Torch's name for the device type: "cuda", "mps", "xpu" or "cpu"."""
        return "cuda" if self.kind == "rocm" else self.kind


Wanted: TypeAlias = "list[tuple[Flag, Any]]"
"""Flags with their wanted values."""


@dataclass(frozen=True)
class DeviceSpec:
    """Properties of one type of device. Its other functions are those of torch's module of that name.

    A device other than the CPU needs `torch.<type>` with `synchronize()` and `empty_cache()`.

    Attributes:
        type: torch's name.
        probe: Returns the device, or `None` if there is none.
        compile_mode: Default mode of torch.compile; `None` if compiling is not worth trying.
        call_flags: Returns the flags that make calls faster, which `fast_inference()` holds.
        setup_flags: Returns further flags and variables for `PerformanceOptimizer.initialize()`. Variables that the
            user has set must not be among them.
        tuning_flags: Returns flags that are held while an object is tuned.
        half_dtypes: Returns the half-precision dtypes that it computes in at full speed, best first.
        graphs: Its graphs, for the stages that record; `None` if it has none.
        free_bytes: Returns the free bytes; `None` if unknown.
        batch_size: Returns a default number of items for a batch; `None` for the caller's default.
    """

    type: str
    probe: Callable[[], DeviceInfo | None]
    compile_mode: str | None = "default"
    call_flags: Callable[[Settings], Wanted] = lambda _: []
    setup_flags: Callable[[Settings], Wanted] = lambda _: []
    tuning_flags: Callable[[DeviceInfo], Wanted] = lambda _: []
    half_dtypes: Callable[[], tuple[torch.dtype, ...]] = tuple
    graphs: DeviceGraphs | None = None
    free_bytes: Callable[[DeviceInfo], int | None] = lambda _: None
    batch_size: Callable[[DeviceInfo], int | None] = lambda _: None


SPECS: Registry[DeviceSpec] = Registry("accelerate_tts.device.kinds")
"""Device types by torch's name."""


def register_device(spec: DeviceSpec) -> DeviceSpec:
    """Register a type of device. One that `settings.DEVICES` does not contain is inserted at the front.

    Raises:
        ValueError: Another device is registered under this name.
    """
    SPECS.add(spec.type, spec)
    if spec.type not in DEVICES:
        DEVICES.insert(0, spec.type)
    return spec


def spec_of(device: DeviceInfo | str) -> DeviceSpec:
    """Return the properties of a device or a device type."""
    return SPECS.entries()[device if isinstance(device, str) else device.type]


def current_devices() -> list[torch.device]:
    """Return this thread's current device of each type of which a machine may have several, as far as it is in use."""
    import torch

    modules = {name: getattr(torch, name, None) for name in ("cuda", "xpu")}
    return [
        torch.device(name, module.current_device())
        for name, module in modules.items()
        if module is not None and module.is_initialized()
    ]


def detect(wanted: str | None = None) -> DeviceInfo:
    """Detect the best device: the first of `settings.DEVICES` that is available.

    Args:
        wanted: Use this device type ("cuda", "mps", "xpu", "cpu") only.

    Raises:
        SettingsError: `wanted` is not available on this machine.
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
