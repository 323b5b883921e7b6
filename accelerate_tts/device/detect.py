"""Which accelerator there is, as one small value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accelerate_tts.errors import SettingsError

__all__ = ["DEVICES", "DeviceInfo", "DeviceKind", "detect"]

DEVICES = ("cuda", "mps", "xpu", "cpu")
"""torch's names of the device types, the best first."""

DeviceKind = Literal["cuda", "rocm", "mps", "xpu", "cpu"]


@dataclass(frozen=True)
class DeviceInfo:
    """A detected device.

    Attributes:
        kind: What it is. ROCm answers to torch's name "cuda" and is told apart here.
        name: The hardware's own name, for people.
        total_memory: Bytes of device memory; `None` where it is the machine's own (CPU, MPS) or unknown.
    """

    kind: DeviceKind
    name: str
    total_memory: int | None = None

    @property
    def type(self) -> str:
        """Torch's name for the device type: "cuda", "mps", "xpu" or "cpu"."""
        return "cuda" if self.kind == "rocm" else self.kind


def detect(wanted: str | None = None) -> DeviceInfo:
    """Find the best device: CUDA or ROCm, then MPS, then XPU, then CPU.

    Args:
        wanted: Take this device type ("cuda", "mps", "xpu", "cpu") and no other.

    Raises:
        SettingsError: `wanted` is not available here.
    """
    for kind, probe in zip(DEVICES, (_cuda, _mps, _xpu, _cpu), strict=True):
        if wanted in {None, kind}:
            found = probe()
            if found is not None:
                return found
    raise SettingsError(
        f"device={wanted!r} is not available on this machine;"
        f" unset ACCELERATE_TTS_DEVICE to take the best that is, or run `accelerate-tts doctor`"
    )


def _cuda() -> DeviceInfo | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    kind: DeviceKind = "rocm" if torch.version.hip is not None else "cuda"
    return DeviceInfo(kind, str(properties.name), int(properties.total_memory))


def _mps() -> DeviceInfo | None:
    import torch

    return DeviceInfo("mps", "Apple GPU (MPS)") if torch.backends.mps.is_available() else None


def _xpu() -> DeviceInfo | None:
    import torch

    xpu = getattr(torch, "xpu", None)
    if xpu is None or not xpu.is_available():
        return None
    properties = xpu.get_device_properties(xpu.current_device())
    return DeviceInfo("xpu", str(properties.name), int(properties.total_memory))


def _cpu() -> DeviceInfo:
    import platform

    return DeviceInfo("cpu", _cpu_model() or platform.processor() or platform.machine() or "CPU")


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - no Path for one line
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module's name is used
    return None
