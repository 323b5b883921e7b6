"""A convolution of oneDNN is torch's to rounding, and its weights are in the right layout at every length."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts.kernels.library import level
from accelerate_tts.stages.vocoder import convolution as convolution_module
from accelerate_tts.stages.vocoder.convolution import Convolution, narrow, wide

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")

LENGTHS = [20, 1000, *range(21, 130, 7), 223, 447]
_OF_OURS = re.compile(r"exec,cpu,reorder.*src:f32:\w*:blocked:[a-z]*[A-Z]")  # from a layout that is not torch's own


def layer(outputs: int, inputs: int, frames: int, dilation: int) -> nn.Conv1d:
    torch.manual_seed(0)
    return nn.Conv1d(inputs, outputs, frames, padding=dilation * (frames - 1) // 2, dilation=dilation).eval()


@pytest.mark.parametrize("sizes", [(384, 192, 5, 1), (192, 768, 3, 1), (64, 64, 7, 3)])
def test_no_length_reorders_the_weights_again(
    sizes: tuple[int, ...], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution_module, "level", lambda: "none")  # as where there are no kernels
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


@pytest.mark.skipif(level() in {"none", "base"}, reason="oneDNN computes all of them on this processor")
@pytest.mark.parametrize("sizes", [(384, 192, 5, 1), (192, 768, 3, 1), (64, 64, 7, 3), (32, 33, 4, 1)])
def test_in_fewer_products_at_each_length(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes short signals alone."""
    counted: list[int] = []
    own = convolution_module.convolve
    monkeypatch.setattr(
        convolution_module, "convolve", lambda x, *g, **n: counted.append(x.shape[2]) or own(x, *g, **n)
    )
    plain = layer(*sizes)
    convolution = Convolution.of(plain)
    with torch.inference_mode():
        for length in LENGTHS:
            signal = torch.randn(length, sizes[1])
            expected = plain(signal.t()[None])[0].t()
            found = narrow(convolution(wide(signal)))
            assert found.is_contiguous()
            assert (found - expected).norm() <= 4e-6 * expected.norm()
    assert counted == [length for length in LENGTHS if plain(torch.zeros(1, sizes[1], length)).shape[2] >= 24]


def test_an_activation_that_nobody_computes_is_an_error() -> None:
    image = torch.randn(1, 64, 1, 40).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), pytest.raises(KeyError, match="tanh"):
        Convolution.of(layer(64, 64, 3, 1))(image, "tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_activations_and_batches(dtype: torch.dtype) -> None:
    plain = layer(64, 64, 3, 2)
    convolution = Convolution.of(plain, dtype)
    near: Any = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    with torch.inference_mode():
        for batch, length in ((1, 17), (3, 17), (2, 300), (1, 300)):
            image = torch.randn(batch, 64, 1, length).contiguous(memory_format=torch.channels_last)
            expected, image = plain(image[:, :, 0]), image.to(dtype)
            other = torch.randn_like(image)
            bent = nn.functional.leaky_relu(expected, 0.3)
            assert torch.allclose(convolution(image, "leaky_relu", 0.3).float()[:, :, 0], bent, **near)
            assert torch.allclose(convolution(image, "relu").float()[:, :, 0], expected.relu(), **near)
            assert torch.allclose(convolution.plus(image, other).float()[:, :, 0], expected + other[:, :, 0], **near)
            piece = torch.cat([other, other], 3)[..., :length]  # a piece of a longer signal
            assert torch.equal(convolution.plus(image, piece), convolution.plus(image, other))
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
