"""Convolutions in fewer products: exact matrices, right at any shape and layout, and no memory beside the tensors."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from accelerate_tts.kernels import calls
from accelerate_tts.kernels.library import VARIABLE, kernels
from accelerate_tts.kernels.toom_cook import (
    COLUMNS,
    MOST_DILATION,
    MOST_POINTS,
    MOST_TAPS,
    Ending,
    Geometry,
    Packed,
    Tiling,
    convolve,
    matrices,
    operator,
)

LIMIT = 4e-6
"""Of an error, of what the sum of the products' sizes is: numbers that cancel have rounding errors, too."""
AT_THE_EDGE = pytest.mark.parametrize("taps", [2, 3, 5, 6, 7, 8, 9, 12])


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taps", "frames"), [
    (taps, frames) for taps, frames in itertools.product(range(1, 9), repeat=2) if taps + frames - 1 <= MOST_POINTS
])  # fmt: skip
def test_the_matrices_are_exact(taps: int, frames: int) -> None:
    """Of each pair of a tap and a frame in exact fractions, but for the thirds of the weights' matrix."""
    found = matrices(taps, frames)
    before, weight, after = (
        [[Fraction(value).limit_denominator(10**6) for value in row] for row in each.tolist()]
        for each in (found.before, found.weight, found.after)
    )
    points = taps + frames - 1
    assert (len(before), len(weight), len(after)) == (points, points, frames)
    for exact, stored in ((before, found.before), (after, found.after)):
        assert [[float(value) for value in row] for row in exact] == stored.tolist()
        assert torch.equal(stored.float().double(), stored), "fp32 holds them"
    for tap, frame, result in itertools.product(range(taps), range(points), range(frames)):
        product = sum(after[result][p] * weight[p][tap] * before[p][frame] for p in range(points))
        assert product == (frame == result + tap)


@settings(max_examples=100, deadline=None)
@given(taps=st.integers(1, MOST_TAPS), seed=st.integers(0, 99))
def test_integers_are_convolved_exactly(taps: int, seed: int) -> None:
    """In float64, to the rounding of thirds: a convolution of whole numbers is the nearest whole number."""
    tiling = Tiling.of(taps)
    assert tiling.points <= MOST_POINTS
    assert tiling.chunks * tiling.taps >= taps
    assert tiling.chunks == 1 or tiling.frames == tiling.taps
    found = matrices(tiling.taps, tiling.frames)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-99, 100, (taps,), generator=generator).double()
    padded = functional.pad(weight, (0, tiling.chunks * tiling.taps - taps)).view(tiling.chunks, tiling.taps)
    length = tiling.frames * (tiling.chunks - 1) + tiling.points
    x = torch.randint(-99, 100, (length,), generator=generator).double()
    sums = torch.stack([
        (found.weight @ padded[chunk]) * (found.before @ x[chunk * tiling.frames :][: tiling.points])
        for chunk in range(tiling.chunks)
    ]).sum(0)  # fmt: skip
    result = found.after @ sums
    expected = x.unfold(0, taps, 1)[: tiling.frames] @ weight
    assert torch.equal(result.round(), expected)
    assert (result - expected).abs().max() < 1e-7


@pytest.mark.parametrize(("taps", "frames"), [(5, 5), (9, 1), (0, 4), (4, 0), (-1, 3)])
def test_there_are_only_so_many_points(taps: int, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"taps={taps} with frames={frames} take .* at most 8 are supported"):
        matrices(taps, frames)


# --- results ----------------------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "contiguous": normals,
    "channels-last": lambda batch, channels, length: normals(batch, length, channels).transpose(1, 2),
    "sliced": lambda batch, channels, length: normals(batch + 1, channels + 3, length + 5)[1:, 2:-1, 3:-2],
    "every other frame": lambda batch, channels, length: normals(batch, channels, 2 * length)[..., ::2],
    "transposed batch": lambda batch, channels, length: normals(channels, batch, length).transpose(0, 1),
    "one for all": lambda batch, channels, length: normals(1, channels, length).expand(batch, -1, -1),
    # Each frame shares numbers with the next, as those of a spectrogram do.
    "overlapping": lambda batch, channels, length: normals(batch * length + channels).as_strided(
        (batch, channels, length), (length, 1, 1)
    ),
}
"""Signals of a batch, channels and a length."""


def truth(x: torch.Tensor, weight: torch.Tensor, bias: Any, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and the sizes of what was added up."""
    padded = functional.pad(x.double(), (geometry.left, geometry.right))
    y = functional.conv1d(padded, weight.double(), None, dilation=geometry.dilation)
    size = functional.conv1d(padded.abs(), weight.double().abs(), None, dilation=geometry.dilation)
    return (y, size) if bias is None else (y + bias.double()[:, None], size + bias.double().abs()[:, None])


def assert_near(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, limit: float = LIMIT) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    # An error has the size of the largest numbers of the tile, which are not those of each result.
    if found.numel():
        assert float((found.double() - expected).abs().max()) <= limit * max(float(size.max()), 1e-30)
    assert (found.double() - expected).norm() <= 2e-6 * size.norm().clamp_min(1e-30)


@settings(max_examples=150, deadline=None)
@given(
    outputs=st.integers(1, 70), inputs=st.integers(1, 70), taps=st.integers(1, 20), dilation=st.integers(1, 16),
    left=st.integers(0, 20), right=st.integers(0, 20), batch=st.integers(0, 3), results=st.integers(1, 220),
    layout=st.sampled_from(sorted(LAYOUTS)), bias=st.booleans(), last=st.booleans(),
    plus=st.sampled_from(["", "plus", "out", "onto"]), slope=st.sampled_from([1.0, 0.0, 0.1]), number=st.integers(1, 3),
)  # fmt: skip
def test_any_convolution(
    outputs: int, inputs: int, taps: int, dilation: int, left: int, right: int, batch: int, results: int, layout: str,
    bias: bool, last: bool, plus: str, slope: float, number: int,
) -> None:  # fmt: skip
    geometry = Geometry(outputs, taps, dilation, left, right)
    length = results - left - right + dilation * (taps - 1)
    if length < 1:
        length, geometry = results + dilation * (taps - 1), Geometry(outputs, taps, dilation)
    x = LAYOUTS[layout](batch, inputs, length)
    weight, offset = normals(outputs, inputs, taps, seed=1), normals(outputs, seed=2) if bias else None
    assert x.shape == (batch, inputs, length)
    assert geometry.results(length) == results
    expected, size = truth(x, weight, offset, geometry)
    ending = Ending(slope=slope)
    if plus:
        shape = (batch, results, outputs) if last else (batch, outputs, results)
        more = normals(*shape, seed=3)
        more = more.transpose(1, 2) if last else more
        into = torch.full_like(more, math.nan) if plus == "out" else more if plus == "onto" else None
        expected, size = (expected, size) if plus == "out" else (expected + more.double(), size + more.double().abs())
        ending = Ending(None if plus == "out" else more, slope, into)
    with threads(number):
        found = convolve(x, Packed.of(weight, offset), geometry, last=last, ending=ending)
    assert found is ending.out or (found.transpose(1, 2) if last else found).is_contiguous()
    assert_near(found, functional.leaky_relu(expected, slope), size)


@pytest.mark.parametrize("taps", [17, 23, 33, 48, MOST_TAPS])
@pytest.mark.parametrize("dilation", [1, MOST_DILATION])
def test_many_taps(taps: int, dilation: int) -> None:
    x, weight, geometry = normals(2, 33, 1300), normals(40, 33, taps, seed=1), Geometry(40, taps, dilation, 7, 0)
    assert_near(convolve(x, Packed.of(weight, None), geometry, last=False), *truth(x, weight, None, geometry))


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_long_signals_in_pieces(number: int) -> None:
    """Several pieces for each thread; a result does not depend on who computes it, nor on the sequences beside it."""
    x, weight, geometry = normals(3, 48, 9_000), normals(64, 48, 7, seed=1), Geometry(64, 7, 3, 9, 9)
    packed = Packed.of(weight, normals(64, seed=2))
    with threads(1):
        first = convolve(x, packed, geometry, last=True)
    with threads(number):
        found = convolve(x, packed, geometry, last=True)
        alone = convolve(x[1:2], packed, geometry, last=True)
    assert_near(found, *truth(x, weight, normals(64, seed=2), geometry))
    torch.testing.assert_close(found, first, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, found[1:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [(32, 512, 3, 1), (512, 32, 11, 5), (100, 1030, 4, 16)])
def test_many_channels(sizes: tuple[int, int, int, int]) -> None:
    outputs, inputs, taps, dilation = sizes
    x, weight = normals(1, inputs, 400), normals(outputs, inputs, taps, seed=1)
    geometry = Geometry(outputs, taps, dilation, 3, 4)
    assert_near(convolve(x, Packed.of(weight, None), geometry, last=False), *truth(x, weight, None, geometry))


@pytest.mark.parametrize(("channels", "limit"), [(64, 1.5e-6), (512, 4e-6)])
def test_the_error_is_a_few_roundings(channels: int, limit: float) -> None:
    """Of convolutions as vocoders have them; the limit of stages for `exact` is 1e-4."""
    for taps, dilation in itertools.product((2, 3, 7, 11), (1, 5)):
        x, weight = normals(1, channels, 200), normals(channels, channels, taps, seed=1)
        geometry = Geometry(channels, taps, dilation)
        expected, _ = truth(x, weight, None, geometry)
        found = convolve(x, Packed.of(weight, None), geometry, last=True)
        assert (found - expected).norm() <= limit * expected.norm()


def test_padding_that_crops() -> None:
    """Frames of zeros less than none: the signal without its first and last frames."""
    x, weight = normals(1, 32, 100), normals(32, 32, 5, seed=1)
    found = convolve(x, Packed.of(weight, None), Geometry(32, 5, 2, -3, -4), last=False)
    expected, size = truth(x[..., 3:-4], weight, None, Geometry(32, 5, 2))
    assert_near(found, expected, size)


AT_EACH_LEVEL = """
import torch
from accelerate_tts.kernels.library import level
from accelerate_tts.kernels.toom_cook import Ending, Geometry, Packed, convolve

for outputs, inputs, taps, dilation, last in [(33, 35, 3, 1, True), (64, 48, 7, 3, True), (70, 64, 11, 5, False),
                                              (32, 31, 2, 16, False), (40, 40, 16, 2, True)]:
    x, weight, bias = torch.randn(2, inputs, 333), torch.randn(outputs, inputs, taps), torch.randn(outputs)
    geometry = Geometry(outputs, taps, dilation, 5, 6)
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.double(), (5, 6)), weight.double(), bias.double(), dilation=dilation
    )
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found = convolve(x, Packed.of(weight, bias), geometry, last=last, ending=Ending(slope=0.5))
        expected_here = torch.nn.functional.leaky_relu(expected, 0.5)
        assert (found - expected_here).norm() <= 3e-6 * expected_here.norm(), (outputs, taps)
print(level())
"""


@pytest.mark.parametrize("level", kernels().levels[: kernels().levels.index(kernels().level) + 1])
def test_each_instruction_set_of_this_processor(level: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EACH_LEVEL], env=os.environ | {VARIABLE: level}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == [level], done.stderr


# --- memory -----------------------------------------------------------------------------------------------------------


SENTINEL = 12345.0


@settings(max_examples=80, deadline=None)
@given(
    outputs=st.sampled_from([1, 31, 32, 33, 64, 70]), inputs=st.sampled_from([1, 15, 16, 17, 32, 48]),
    taps=st.integers(1, 13), dilation=st.sampled_from([1, 2, 5, 16]), padding=st.integers(0, 9),
    length=st.integers(200, 330), layout=st.sampled_from(["channels-last", "contiguous"]), number=st.integers(1, 3),
    onto=st.booleans(),
)  # fmt: skip
def test_nothing_beside_the_tensors_is_read_or_written(
    outputs: int, inputs: int, taps: int, dilation: int, padding: int, length: int, layout: str, number: int, onto: bool
) -> None:
    """The signal lies within NaN, the result and what is added within other numbers."""
    geometry = Geometry(outputs, taps, dilation, padding, padding)
    results, last = geometry.results(length), layout == "channels-last"

    def within(value: float, channels: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((4, frames + 40, channels + 40) if last else (4, channels + 40, frames + 40), value)
        inside = whole[1:3, 20:-20, 20:-20]
        return whole, inside.transpose(1, 2) if last else inside

    _, x = within(math.nan, inputs, length)
    x.copy_(normals(2, inputs, length))
    whole, y = within(SENTINEL, outputs, results)
    y.copy_(normals(2, outputs, results, seed=3) if onto else torch.full((2, outputs, results), math.nan))
    weight, bias = normals(outputs, inputs, taps, seed=1), normals(outputs, seed=2)
    expected, size = truth(x, weight, bias, geometry)
    expected, size = (expected + y.double(), size + y.double().abs()) if onto else (expected, size)
    with threads(number):
        convolve(x, Packed.of(weight, bias), geometry, last=last, ending=Ending(y if onto else None, 1.0, y))
    assert_near(y, expected, size)
    y.fill_(SENTINEL)
    assert torch.equal(whole, torch.full_like(whole, SENTINEL))


@contextmanager
def at_the_end_of_memory(*shape: int) -> Iterator[torch.Tensor]:
    """Zeros of a shape that end where memory ends: the page behind them cannot be read."""
    import ctypes

    page, size = mmap.PAGESIZE, math.prod(shape) * 4
    room = -(-size // page) * page
    pages = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    library: Any = ctypes.CDLL(None, use_errno=True)
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert library.mprotect(address + room, page, 0) == 0
    try:
        yield torch.from_numpy(np.frombuffer(pages, np.float32, size // 4, room - size).reshape(shape))
    finally:
        assert library.mprotect(address + room, page, 3) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux has them")
@AT_THE_EDGE
@pytest.mark.parametrize("inputs", [31, 32, 48])
@pytest.mark.parametrize("last", [True, False])
def test_nothing_behind_the_last_page_is_read_or_written(taps: int, inputs: int, last: bool) -> None:
    geometry = Geometry(40, taps, 2, 0, 0)
    for length in (24 + 2 * (taps - 1), 301):
        results = geometry.results(length)
        weight, bias = normals(40, inputs, taps, seed=1), normals(40, seed=2)
        shapes = (length, inputs), (results, 40)
        with (
            at_the_end_of_memory(1, *(shapes[0] if last else shapes[0][::-1])) as x,
            at_the_end_of_memory(1, *(shapes[1] if last else shapes[1][::-1])) as y,
            at_the_end_of_memory(*Packed.of(weight, None).weight.shape) as packed,
        ):
            packed.copy_(Packed.of(weight, None).weight)
            x.copy_(normals(*x.shape))
            signal, into = (x.transpose(1, 2), y.transpose(1, 2)) if last else (x, y)
            convolve(signal, Packed(packed, Packed.of(weight, bias).bias), geometry, last=last, ending=Ending(out=into))
            assert_near(into.clone(), *truth(signal, weight, bias, geometry))
            del x, y, packed, signal, into


# --- numbers that are not finite --------------------------------------------------------------------------------------


@AT_THE_EDGE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("dilation", [1, 3])
def test_what_is_not_finite_stays_so_and_reaches_six_frames_more(taps: int, value: float, dilation: int) -> None:
    """All results that have it among their sums are not finite; and others only next to them, in its own sequence."""
    geometry = Geometry(33, taps, dilation, 4, 4)
    x, packed = normals(2, 34, 200), Packed.of(normals(33, 34, taps, seed=1), None)
    with threads(1):
        clean = convolve(x, packed, geometry, last=False)
        for place in (0, 77, 100, 199):
            spoilt = x.clone()
            spoilt[1, 5, place] = value
            reached = functional.conv1d(
                functional.pad((spoilt != x).any(1, keepdim=True).double(), (4, 4)), torch.ones(1, 1, taps).double(),
                dilation=dilation,
            )[1, 0] > 0  # fmt: skip
            found = convolve(spoilt, packed, geometry, last=False)
            assert torch.equal(found[0], clean[0]), "another sequence"
            if abs(value) != 3e38:  # a large one may be right, or infinite
                assert not found[1, :, reached].isfinite().any()
            frames = torch.arange(found.shape[2])
            near = (frames[:, None] - frames[reached]).abs().min(1).values <= 6 * dilation
            assert torch.equal(found[1, :, ~near], clean[1, :, ~near]), "far from it, not a bit differs"


@pytest.mark.parametrize("where", ["weight", "bias", "plus"])
def test_what_is_not_finite_elsewhere(where: str) -> None:
    x, weight, bias, plus = normals(1, 32, 60), normals(33, 32, 3), normals(33), normals(1, 33, 58)
    {"weight": weight[7, 3], "bias": bias[7:8], "plus": plus[0, 7, 20:21]}[where].fill_(math.inf)
    found = convolve(x, Packed.of(weight, bias), Geometry(33, 3), last=False, ending=Ending(plus, 0.1))
    affected = found[0, 7] if where != "plus" else found[0, 7, 20:21]
    assert not affected.isfinite().any()
    assert int((~found.isfinite()).sum()) == affected.numel()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_small_and_large_numbers(scale: float) -> None:
    x, weight = normals(1, 32, 60) * scale, normals(32, 32, 3, seed=1)
    expected, size = truth(x, weight, None, Geometry(32, 3))
    found = convolve(x, Packed.of(weight, None), Geometry(32, 3), last=False)
    assert (found.double() - expected).norm() <= max(2e-6 * size.norm(), 1e-40)


# --- what it refuses --------------------------------------------------------------------------------------------------

X, WEIGHTS, GEOMETRY = normals(2, 16, 50), Packed.of(normals(40, 16, 3), normals(40)), Geometry(40, 3, 2, 1, 1)
Y = normals(2, 40, 48)


def weights(**changes: Any) -> Packed:
    return WEIGHTS._replace(**changes)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("fewer channels", {"x": X[:, 1:]}),
        ("no batch", {"x": X[0]}),
        ("a dimension more", {"x": X[None]}),
        ("float64", {"x": X.double()}),
        ("bf16", {"x": X.bfloat16()}),
        ("no memory", {"x": X.to("meta")}),
        ("too short", {"x": X[..., :2]}),
        ("empty", {"x": X[..., :0]}),
        ("a weight of more chunks", {"weights": Packed.of(normals(40, 16, 11), None)}),
        ("a weight of other outputs", {"weights": Packed.of(normals(70, 16, 3), None)}),
        ("a weight that was not packed", {"weights": weights(weight=normals(40, 16, 3))}),
        ("a weight in float64", {"weights": weights(weight=WEIGHTS.weight.double())}),
        ("a weight without memory", {"weights": weights(weight=WEIGHTS.weight.to("meta"))}),
        ("a strided weight", {"weights": weights(weight=WEIGHTS.weight.repeat(1, 1, 1, 1, 2)[..., ::2])}),
        ("a bias that was not filled up", {"weights": weights(bias=normals(40))}),
        ("a strided bias", {"weights": weights(bias=normals(128)[::2])}),
        ("a bias in bf16", {"weights": weights(bias=WEIGHTS.bias.bfloat16())}),  # type: ignore[union-attr]
        ("too far apart", {"geometry": replace(GEOMETRY, dilation=17)}),
        ("no distance", {"geometry": replace(GEOMETRY, dilation=0)}),
        ("no taps", {"geometry": replace(GEOMETRY, taps=0)}),
        ("too many taps", {"geometry": replace(GEOMETRY, taps=MOST_TAPS + 1)}),
        ("other outputs", {"geometry": replace(GEOMETRY, outputs=65)}),
        ("a longer result", {"ending": Ending(out=normals(2, 40, 49))}),
        ("a result of one sequence", {"ending": Ending(out=Y[:1])}),
        ("a result in float64", {"ending": Ending(out=Y.double())}),
        ("a result without memory", {"ending": Ending(out=Y.to("meta"))}),
        ("one number more for all", {"ending": Ending(normals(1))}),
        ("another order of what is added", {"ending": Ending(normals(2, 48, 40).transpose(1, 2))}),
        ("more is added to one sequence", {"ending": Ending(Y[:1].expand(2, -1, -1))}),
        ("what is added in bf16", {"ending": Ending(Y.bfloat16())}),
        ("another order than the result's", {"ending": Ending(Y, 1.0, normals(2, 48, 40).transpose(1, 2))}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_it_refuses_what_it_would_misread(what: str, changes: dict[str, Any]) -> None:
    fits: dict[str, Any] = {"x": X, "weights": WEIGHTS, "geometry": GEOMETRY, "ending": Ending()}
    convolve(**fits, last=False)
    with pytest.raises(ValueError):
        convolve(**(fits | changes), last=False)


def test_the_refusal_says_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"signal \(2, 15, 50\) of torch.float32 and a packed weight \(2, .* fit Geom"):
        convolve(X[:, 1:], WEIGHTS, GEOMETRY, last=False)


def test_no_memory_to_work_in_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so by what it returns: the call raises, and gives no result that was not computed."""

    def without(*_given: int) -> None:
        raise MemoryError

    monkeypatch.setattr("accelerate_tts.kernels.toom_cook.short_convolution", lambda: without)
    with pytest.raises(MemoryError):
        convolve(X, WEIGHTS, GEOMETRY, last=False)


# --- packed weights and the operator ----------------------------------------------------------------------------------


def test_packed_weights_are_filled_up_and_their_own() -> None:
    weight, bias = normals(40, 16, 3).requires_grad_(), normals(64).requires_grad_()
    packed = Packed.of(weight, bias[:40])
    assert packed.weight.shape == (2, 8, 1, 16, COLUMNS)
    assert packed.weight.dtype == torch.float32
    assert not packed.weight.requires_grad
    assert packed.bias is not None
    assert not packed.bias.requires_grad
    assert packed.weight[1, ..., 8:].abs().sum() == packed.bias[40:].abs().sum() == 0
    whole = Packed.of(normals(64, 16, 3), bias).bias
    assert whole is not None
    assert whole.data_ptr() != bias.data_ptr(), "a bias that is written in place is not the packed one"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes_are_packed_as_they_are(dtype: torch.dtype) -> None:
    weight, bias = normals(40, 16, 3).to(dtype), normals(40).to(dtype)
    found = convolve(X, Packed.of(weight, bias), GEOMETRY, last=False)
    assert_near(found, *truth(X, weight, bias, GEOMETRY))


@pytest.mark.parametrize("last", [True, False])
def test_the_operator_is_the_function(last: bool) -> None:
    operator()
    sizes = [GEOMETRY.outputs, GEOMETRY.taps, GEOMETRY.dilation, GEOMETRY.left, GEOMETRY.right]
    given = (X, *WEIGHTS, sizes, last)
    assert torch.equal(torch.ops.accelerate_tts.short_convolution(*given), convolve(X, WEIGHTS, GEOMETRY, last=last))
    torch.library.opcheck(
        torch.ops.accelerate_tts.short_convolution.default, given,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_operators_are_registered_in_any_order_and_once() -> None:
    code = """
import torch
from accelerate_tts.kernels import calls, toom_cook
first, second = {order}
first(), second(), first()
assert toom_cook.operator() is toom_cook.operator()
print(torch.ops.accelerate_tts.short_convolution.default, torch.ops.accelerate_tts.skinny_linear.default)
"""
    for order in ("toom_cook.operator, calls.skinny_linear", "calls.skinny_linear, toom_cook.operator"):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{order}", order)], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [
            "accelerate_tts.short_convolution.default",
            "accelerate_tts.skinny_linear.default",
        ]
    assert calls.short_convolution() is kernels().short_convolution


def test_the_matrices_of_a_call_in_inference_mode_outlive_it() -> None:
    code = """
import torch
from accelerate_tts.kernels.toom_cook import Geometry, Packed, convolve
x, weight = torch.randn(1, 32, 60), torch.randn(32, 32, 3)
with torch.inference_mode():
    first = convolve(x, Packed.of(weight, None), Geometry(32, 3), last=False)
with torch.device("meta"):
    assert convolve(x, Packed.of(weight, None), Geometry(32, 3), last=False).equal(first)
torch.set_default_dtype(torch.float64)
assert convolve(x, Packed.of(weight, None), Geometry(32, 3), last=False).equal(first)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
