"""The catalogue finds the stages, filters them by what they declare, and sorts them: on each device the order is this."""

from __future__ import annotations

import re

import pytest
import torch

from accelerate_tts.settings import Precision
from accelerate_tts.stages.catalogue import default_stages

HALVES = {"cpu": torch.bfloat16, "cuda": torch.bfloat16, "mps": torch.float16, "xpu": torch.bfloat16}
PRECISIONS: tuple[Precision, ...] = ("exact", "balanced", "fast")
MODES = (None, "default", "max-autotune", "reduce-overhead")
# In the order in which they are tried: the name, behind the first precision that has it; those with a "+" need a
# compiler. Which int8 kernels there are depends on the machine.
ORDERS = {
    "cpu": """
        exact     fold weight norm
        exact     one OpenBLAS thread
        exact     fewer operators
        balanced  fewer operators (bfloat16)
        exact     durations in fewer operators, checked by margin
        exact     text encoder in fewer operators, checked by margin
        exact     channels-last convolutions
        fast      fused decoder blocks (int8)
        balanced  fused decoder blocks (bf16)
        exact     fused decoder blocks (fp32)
        balanced  bf16 prompts
        balanced  fused transformer blocks (bf16)
        balanced  fused residual blocks (bf16)
        exact     growing cache
        balanced  bf16 layers
        balanced  bf16 part
        fast      skinny linear layers (int8)
        balanced  skinny linear layers (bf16)
        exact     skinny linear layers (fp32)
        exact     few-row linear layers
        fast      int8 linear layers (*)
        fast      int8 recurrent layers
        exact     + torch.compile, frozen
        exact     + compiled blocks
        exact     + torch.compile
    """,
    "cuda": """
        exact     fold weight norm
        exact     captured decode step
        balanced  captured decode step, bf16 part
        balanced  bf16 layers
        balanced  bf16 part
        exact     + compiled blocks
        exact     + torch.compile
    """,
    "mps": """
        exact     fold weight norm
        exact     growing cache
        balanced  fp16 layers
        balanced  fp16 part
        exact     + compiled blocks
        exact     + torch.compile
    """,
    "xpu": """
        exact     fold weight norm
        exact     growing cache
        balanced  bf16 layers
        balanced  bf16 part
        exact     + compiled blocks
        exact     + torch.compile
    """,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ORDERS)
def test_the_order_on_each_device(
    device: str, mode: str | None, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate_tts.device.half_dtypes.half_dtypes", lambda kind: (HALVES[kind],))
    lines = (line.split(maxsplit=1) for line in ORDERS[device].strip().splitlines())
    wanted = [name for least, name in lines if PRECISIONS.index(least) <= PRECISIONS.index(precision)]
    expected = [name.removeprefix("+ ") for name in wanted if mode is not None or not name.startswith("+")]
    found = [re.sub(r"(int8 linear layers) \(.*\)", r"\1 (*)", s.name) for s in default_stages(device, mode, precision)]
    once = [name for number, name in enumerate(found) if name not in found[max(0, number - 1) : number]]
    assert once == expected
