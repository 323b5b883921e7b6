"""A convolution of oneDNN is torch's to rounding, and its weights are in the right layout at every length."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts.stages.vocoder.convolution import Convolution, narrow, wide

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")

LENGTHS = [20, 1000, *range(21, 130, 7), 223, 447]
_OF_OURS = re.compile(r"exec,cpu,reorder.*src:f32:\w*:blocked:[a-z]*[A-Z]")  # from a layout that is not torch's own


def layer(outputs: int, inputs: int, frames: int, dilation: int) -> nn.Conv1d:
    torch.manual_seed(0)
    return nn.Conv1d(inputs, outputs, frames, padding=dilation * (frames - 1) // 2, dilation=dilation).eval()


@pytest.mark.parametrize("sizes", [(384, 192, 5, 1), (192, 768, 3, 1), (64, 64, 7, 3)])
def test_no_length_reorders_the_weights_again(sizes: tuple[int, ...], capfd: Any) -> None:
    plain = layer(*sizes)
    convolution = Convolution.of(plain)
    with torch.inference_mode():
        signals = [torch.randn(length, sizes[1]) for length in LENGTHS]
        for signal in signals:
            assert torch.allclose(narrow(convolution(wide(signal))), plain(signal.t()[None])[0].t(), atol=1e-5)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            for signal in signals:
                convolution(wide(signal))
    said = capfd.readouterr().out
    assert said.count("exec,cpu,convolution") == len(signals)
    assert not _OF_OURS.findall(said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_activations_and_batches(dtype: torch.dtype) -> None:
    plain = layer(64, 64, 3, 2)
    convolution = Convolution.of(plain, dtype)
    near: Any = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    with torch.inference_mode():
        for batch, length in ((1, 17), (3, 17), (2, 300)):
            image = torch.randn(batch, 64, 1, length).contiguous(memory_format=torch.channels_last)
            expected, image = plain(image[:, :, 0]), image.to(dtype)
            other = torch.randn_like(image)
            assert torch.allclose(convolution(image, "relu").float()[:, :, 0], expected.relu(), **near)
            assert torch.allclose(convolution.plus(image, other).float()[:, :, 0], expected + other[:, :, 0], **near)
            added = other.clone()
            assert torch.allclose(
                convolution.onto(added, image).float(), convolution.plus(image, other).float(), **near
            )


def test_another_number_of_threads_is_another_layout() -> None:
    convolution, plain = Convolution.of(layer(384, 192, 5, 1)), layer(384, 192, 5, 1)
    threads = torch.get_num_threads()
    signal = torch.randn(60, 192)
    with torch.inference_mode():
        try:
            for number in (1, 2, 16):
                torch.set_num_threads(number)
                assert torch.allclose(narrow(convolution(wide(signal))), plain(signal.t()[None])[0].t(), atol=1e-5)
        finally:
            torch.set_num_threads(threads)
