"""The machine on which figures were measured, in words that a file of results keeps."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

from accelerate_tts.device.cpu import usable_cpus

_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve", "bf16", "i8mm")


def machine() -> dict[str, Any]:
    """Return the system, the processor, the cores of it that may be used, and the instruction sets of our kernels."""
    name, flags = platform.processor(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        told = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in cpuinfo.read_text("utf-8").splitlines())
        }
        flags = set(told.get("flags", told.get("Features", "")).split())
        model = " ".join(told[key] for key in ("cpu family", "model", "stepping") if key in told)
        name = f"{told.get('model name', name)} ({model})" if model else told.get("model name", name)
    return {
        "system": platform.system(), "machine": platform.machine(), "processor": name, "cores": usable_cpus(),
        "isa": [isa for isa in _ISA if isa in flags],
    }  # fmt: skip


def slug(machine: dict[str, Any]) -> str:
    """Return a folder's name for a machine: its processor, its best instruction set and its cores."""
    processor = re.sub(r"\((?:R|TM|tm|C)\)|\bProcessor\b|\bCPU\b|@.*", "", machine["processor"])
    words = re.findall(r"[a-z0-9]+", f"{processor} {(machine['isa'] or [''])[-1]}".lower())
    return "-".join([*words, f"{machine['cores']}-cores"])
