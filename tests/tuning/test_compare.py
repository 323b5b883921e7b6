"""Two results are compared number by number, whatever holds them."""

from __future__ import annotations

import io
import json
import math
import struct
import wave as wave_module
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import ModelOutput

from accelerate_tts.settings import EXACT_TOLERANCE, Precision
from accelerate_tts.tuning.compare import (
    NOTHING_TO_COMPARE,
    TOLERANCES,
    Difference,
    Tolerance,
    compare,
    spectral_distance,
    tensors_of,
)

T = torch.tensor([3.0, 4.0])


@dataclass
class Output(ModelOutput):
    waveform: torch.Tensor | None = None
    rest: Any = None


@dataclass
class Plain:
    wave: torch.Tensor
    rate: int


@pytest.mark.parametrize(
    "holder",
    [lambda t: t, lambda t: (1, [t, None]), lambda t: {"a": t}, lambda t: Output(waveform=t), lambda t: Plain(t, 5),
     lambda t: t.numpy()],
    ids=["tensor", "nested", "dict", "ModelOutput", "dataclass", "numpy"],
)  # fmt: skip
def test_relative_error_in_every_holder(holder: Any) -> None:
    assert compare(holder(T), holder(T.clone())).error == 0.0
    assert compare(holder(T), holder(T + torch.tensor([0.5, 0.0]))).error == pytest.approx(0.1)
    assert len(list(tensors_of(holder(T)))) == 1


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (torch.ones(3), "shape"),
        (T.double(), "float64"),
        (torch.tensor([3.0, math.nan]), "finite"),
        ((T, T), "2 tensors instead of 1"),
        (None, "0 tensors instead of 1"),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(candidate: Any, reason: str) -> None:
    difference = compare(T, candidate)
    assert math.isinf(difference.error)
    assert reason in difference.reason


def test_whole_numbers_must_be_equal_and_nans_may_agree() -> None:
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 2])).error == 0.0
    assert math.isinf(compare(torch.tensor([1, 2]), torch.tensor([1, 3])).error)
    both = torch.tensor([1.0, math.nan, math.inf])
    assert compare(both, both.clone()).error == 0.0
    assert math.isinf(compare(both, torch.tensor([1.0, math.inf, math.nan])).error)
    assert compare(torch.zeros(3), torch.zeros(3)).error == 0.0
    assert math.isinf(compare(torch.zeros(3), torch.full((3,), 1e-9)).error)
    assert compare(torch.zeros(0), torch.zeros(0)).error == 0.0


def test_speech_without_tensors() -> None:
    assert compare(b"abc", b"abc").error == 0.0
    assert math.isinf(compare(b"abc", b"abd").error)
    assert compare([0.1, 0.2], [0.1, 0.2]).error == 0.0
    assert compare([0.1, 0.2], [0.1, 0.3]).error > 0.1
    assert math.isinf(compare({"audio": b"a"}, {"audio": b"b"}).error)
    assert math.isinf(compare([b"ab", b"c"], [b"ab", b"d"]).error)


def test_a_plain_result_object_is_looked_into() -> None:
    class Result:
        def __init__(self, wave: torch.Tensor) -> None:
            self.wave, self.me, self.text = wave, self, "hello"

    assert compare(Result(T), Result(T)).error == 0.0
    assert compare(Result(T), Result(2 * T)).error == pytest.approx(1.0)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4.0)[::-1], np.arange(8.0).reshape(2, 4)[:, ::-1], np.arange(4, dtype=">f4"),
        np.arange(4, dtype=">i2"), np.arange(4, dtype=np.longdouble),
        np.arange(4) * 1j, np.arange(4, dtype=np.clongdouble), np.float32(2.0),
        np.zeros((0, 3))[:, ::-1],
    ],
)  # fmt: skip
def test_an_array_that_torch_does_not_take_is_compared(array: Any) -> None:
    assert compare({"wave": array}, {"wave": array.copy()}).error == 0.0
    if array.size:
        assert compare(array, 2 * array).error > 0.1


@pytest.mark.parametrize("nothing", [None, [], [None], "text", {"rate": 16000}, 5, object()])
def test_nothing_to_compare_is_not_right(nothing: Any) -> None:
    assert math.isinf(compare(nothing, nothing).error)
    assert compare(nothing, nothing).reason == NOTHING_TO_COMPARE


def test_another_memory_layout_is_a_difference() -> None:
    """The caller's .view() would fail on it."""
    a = torch.randn(2, 3, 4)
    b = a.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(a, b)
    assert compare(a, b).reason == "a different memory layout"
    assert compare(b, a).error == 0.0


def test_a_reference_of_infinities_is_compared_by_sign() -> None:
    assert math.isinf(compare(torch.tensor([math.inf]), torch.tensor([-math.inf])).error)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(1e-6, 1e-1))
def test_the_error_is_that_of_numpy(values: list[float], size: float) -> None:
    a = torch.tensor(values)
    b = a * (1 + size)
    left, right = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    norm = np.linalg.norm(left)
    if norm > 0:
        assert compare(a, b).error == pytest.approx(np.linalg.norm(left - right) / norm, rel=1e-9)


# --- audio -------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tone(hertz: float, samples: int = 16_000) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(samples) / 16_000)


WAVE = noise(16_000)


@pytest.mark.parametrize("shape", [(4096,), (1, 5000), (2, 1, 4097), (3, 2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_waves_are_at_no_distance(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wave = noise(*shape).to(dtype)
    assert spectral_distance(wave, wave.clone()) == 0.0
    assert compare(wave, wave.clone()).spectral == 0.0


@settings(max_examples=25, deadline=None)
@given(decibels=st.floats(-40, 40), length=st.integers(4096, 9000), seed=st.integers(0, 99))
def test_another_loudness_is_so_many_decibels(decibels: float, length: int, seed: int) -> None:
    """Every bin of white noise is audible and changes by as much as the gain."""
    wave = noise(length, seed=seed).double()
    expected = abs(decibels)
    found = spectral_distance(wave, wave * 10 ** (decibels / 20))
    if decibels < 0:  # the bins that fall below 60 dB under the strongest move by less
        assert 0.8 * expected - 0.1 <= found <= expected + 1e-9
    else:
        assert found == pytest.approx(expected, rel=0.02, abs=1e-6)


def test_ten_times_as_loud_is_twenty_decibels() -> None:
    assert spectral_distance(WAVE, 10 * WAVE) == pytest.approx(20.0, rel=1e-3)
    # Of a pure tone only the bins near it are heard: the rest lies at the floor in both, or is lifted from there.
    assert 0.0 < spectral_distance(tone(1000), 10 * tone(1000)) < 20.0


def test_the_distance_grows_with_the_noise_and_is_about_the_same_both_ways() -> None:
    distances = []
    for level in (1e-4, 1e-3, 1e-2, 1e-1):
        other = WAVE + level * noise(16_000, seed=1)
        forth, back = spectral_distance(WAVE, other), spectral_distance(other, WAVE)
        assert forth == pytest.approx(back, rel=0.05)
        distances.append(forth)
    assert distances == sorted(distances)
    assert distances[0] < 0.1
    assert distances[-1] > 0.5


def test_silences() -> None:
    silence = torch.zeros(8000)
    assert spectral_distance(silence, silence) == 0.0
    assert compare(silence, silence.clone()) == Difference(0.0, "", 0.0)
    assert math.isinf(spectral_distance(silence, WAVE[:8000]))
    assert math.isinf(compare(silence, WAVE[:8000]).error)
    # The other way round: everything that was heard lies at the floor now.
    assert 30.0 < spectral_distance(WAVE[:8000], silence) < 60.0
    assert compare(WAVE[:8000], silence).error == pytest.approx(1.0)


def test_a_silent_stretch_inside_speech_is_heard_when_it_is_filled() -> None:
    gap = WAVE.clone()
    gap[8000:] = 0.0
    filled = gap.clone()
    filled[8000:] = 1e-2 * noise(8000, seed=2)
    difference = compare(gap, filled)
    assert difference.error == pytest.approx(0.01, rel=0.05)
    assert difference.spectral is not None
    assert difference.spectral > TOLERANCES["fast"].spectral


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_near(bad: float) -> None:
    broken = WAVE.clone()
    broken[5000] = bad
    assert math.isinf(spectral_distance(WAVE, broken))
    assert math.isinf(spectral_distance(broken, WAVE))
    assert math.isinf(spectral_distance(torch.zeros(16_000), broken))
    assert math.isinf(compare(WAVE, broken).error)
    both = compare(broken, broken.clone())  # a NaN in both is no difference, and no audio either
    assert (both.error, both.spectral) == (0.0, None)


@pytest.mark.parametrize(
    ("tensor", "is_audio"),
    [
        (noise(4096), True),
        (noise(4095), False),
        (noise(2, 8, 4096), True),  # a batch of 2, or two channels, or both
        (noise(17, 4096), False),
        (noise(1, 80, 5000), False),  # a spectrogram, hidden states
        (noise(4096, 2), False),  # (samples, channels): the relative error alone
        (noise(5000).to(torch.int16), True),  # samples of 16 bits
        (noise(5000).to(torch.int32), False),
        (torch.tensor(1.0), False),
        (torch.zeros(0, 5000), False),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_what_looks_like_audio(tensor: torch.Tensor, is_audio: bool) -> None:
    difference = compare(tensor, tensor.clone())
    assert difference.error == 0.0
    assert (difference.spectral is not None) is is_audio


def test_the_worst_tensor_counts() -> None:
    near, far = WAVE + 1e-3 * noise(16_000, seed=1), WAVE + 1e-1 * noise(16_000, seed=1)
    both = compare([WAVE, {"b": WAVE}], [far, {"b": near}])
    assert both.error == compare(WAVE, far).error
    assert both.spectral == spectral_distance(WAVE, far)
    assert compare([WAVE, T], [far, T]).spectral == both.spectral


def test_error_and_signal_to_noise_ratio() -> None:
    # The statements in the comments of TOLERANCES.
    decibels = [-20 * math.log10(TOLERANCES[precision].error) for precision in ("exact", "balanced", "fast")]
    assert list(map(round, decibels)) == [80, 34, 28]
    found = compare(WAVE, WAVE + 0.02 * noise(16_000, seed=3) * WAVE.norm() / noise(16_000, seed=3).norm())
    assert found.error == pytest.approx(0.02)


@given(st.integers(2, 200), st.floats(1e-4, 0.04), st.integers(0, 99))
def test_the_error_bounds_the_cosine_of_an_embedding(size: int, error: float, seed: int) -> None:
    truth = noise(size, seed=seed).double()
    wrong = noise(size, seed=seed + 1000).double()
    other = truth + wrong * error * truth.norm() / wrong.norm()
    assert compare(truth, other).error == pytest.approx(error)
    assert torch.cosine_similarity(truth, other, 0) >= 1 - error**2 / 2 - 1e-6


# --- what is tolerated ---------------------------------------------------------------------------------------------


def test_tolerances_widen_with_precision() -> None:
    exact, balanced, fast = (TOLERANCES[precision] for precision in ("exact", "balanced", "fast"))
    assert exact.error == EXACT_TOLERANCE < balanced.error < fast.error
    assert exact.spectral <= balanced.spectral <= fast.spectral


@pytest.mark.parametrize(
    ("difference", "objection"),
    [
        (Difference(0.0), ""),
        (Difference(0.02), ""),
        (Difference(0.02, "", 1.0), ""),
        (Difference(0.0201), "error 2.0e-02, limit 2e-02"),
        (Difference(0.01, "", 1.01), "log-spectral distance 1.0 dB, limit 1.0 dB"),
        (Difference(0.01, "", math.inf), "log-spectral distance inf dB"),
        (Difference(math.inf, "a different memory layout"), "a different memory layout"),
        (Difference(0.0, NOTHING_TO_COMPARE), NOTHING_TO_COMPARE),
        (Difference(math.nan), "error nan"),
        (Difference(0.0, "", math.nan), "log-spectral distance nan dB"),
    ],
)
def test_objections(difference: Difference, objection: str) -> None:
    found = Tolerance(0.02, 1.0).objection(difference)
    assert found.startswith(objection) if objection else not found


@pytest.mark.parametrize("precision", ["balanced", "fast"])
def test_a_destroyed_quiet_band_is_refused_though_the_error_is_small(precision: Precision) -> None:
    """A loud voice with a quiet treble: without the treble 40 dB of signal to noise are left, and the air is gone."""
    spectrum = torch.fft.rfft(noise(32_000).double())
    middle = len(spectrum) // 2
    spectrum[middle:] *= 0.01
    full = torch.fft.irfft(spectrum)
    spectrum[middle:] = 0.0
    muffled = torch.fft.irfft(spectrum)
    difference = compare(full, muffled)
    tolerance = TOLERANCES[precision]
    assert difference.error < 0.6 * tolerance.error
    assert tolerance.objection(difference).startswith("log-spectral distance")
    # The same error spread as the voice itself is spread is one that nobody hears.
    assert not tolerance.objection(compare(full, full * (1 + difference.error)))


# --- audio and tokens in other clothes -----------------------------------------------------------------------------

TONE = torch.sin(torch.arange(8192) / 7.0) * 0.3


def pcm(wave: torch.Tensor) -> torch.Tensor:
    return (wave * 32767).round().to(torch.int16)


def wav_file(wave: torch.Tensor, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with wave_module.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(pcm(wave).numpy().tobytes())
    return buffer.getvalue()


def float_file(wave: torch.Tensor) -> bytes:
    data = wave.numpy().astype("<f4").tobytes()
    shape = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32)
    body = b"WAVE" + shape + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def in_pieces(content: Any, size: int) -> list[Any]:
    return [content[start : start + size] for start in range(0, len(content), size)]


CLOTHES: dict[str, Any] = {
    "tensor": pcm,
    "array": lambda wave: pcm(wave).numpy(),
    "file": wav_file,
    "file of two channels": lambda wave: wav_file(wave, 2),
    "file of floats": float_file,
    "file in memory": lambda wave: io.BytesIO(wav_file(wave)),
    "bytes": lambda wave: pcm(wave).numpy().tobytes(),
    "bytes of floats": lambda wave: wave.numpy().tobytes(),
    "stream of arrays": lambda wave: in_pieces(pcm(wave).numpy(), 640),
    "stream with rates": lambda wave: [(16_000, piece) for piece in in_pieces(pcm(wave).numpy()[None, :], 1)],
    "stream of bytes": lambda wave: in_pieces(pcm(wave).numpy().tobytes(), 641),
    "stream of a file": lambda wave: [b"", *in_pieces(wav_file(wave), 44)],
    "stream of floats": lambda wave: in_pieces(float_file(wave), 321),
}


@pytest.mark.parametrize("clothes", CLOTHES.values(), ids=CLOTHES)
def test_16_bit_samples_are_audio(clothes: Any) -> None:
    """A rounding error moves a sample by a step now and then; what is audibly wrong is still refused."""
    exact = TOLERANCES["exact"]
    nearly = clothes(TONE * (1 + 1e-5))
    difference = compare(clothes(TONE), nearly)
    assert 0.0 < difference.error < EXACT_TOLERANCE
    assert difference.spectral is not None
    assert not exact.objection(difference)
    assert exact.objection(compare(clothes(TONE), clothes(TONE * 1.01)))
    assert exact.objection(compare(clothes(TONE), clothes(-TONE)))
    assert compare(clothes(TONE), clothes(TONE)).error == 0.0
    assert exact.objection(compare(clothes(TONE), clothes(TONE[:-2])))


@pytest.mark.parametrize(
    "content",
    [
        torch.randint(0, 1000, (9000,)),
        torch.randint(0, 1000, (9000,), dtype=torch.int32),
        torch.randint(-9000, 9000, (9000,), dtype=torch.int16),
        torch.randint(0, 256, (20_000,), dtype=torch.uint8),
        torch.zeros(20_000, dtype=torch.uint8),
        torch.tensor(list(json.dumps(list(range(6000))).encode()), dtype=torch.uint8),
    ],
    ids=["int64", "int32", "int16", "compressed", "nothing", "text"],
)
def test_bytes_that_are_no_samples_must_be_the_same(content: torch.Tensor) -> None:
    other = content.clone()
    other[5000] += 1
    left, right = content.numpy().tobytes(), other.numpy().tobytes()
    assert compare(left, left).error == 0.0
    assert "bytes that are not equal" in compare(left, right).reason
    assert "bytes that are not equal" in compare(in_pieces(left, 1000), in_pieces(right, 1000)).reason


def test_a_header_is_compared_to_the_byte() -> None:
    left = wav_file(TONE)
    right = left[:24] + (8000).to_bytes(4, "little") + left[28:]  # another sampling rate
    assert math.isinf(compare(left, right).error)
    assert math.isinf(compare(b"RIFF", b"RIFG").error)
    assert compare(left[:44], left[:44]).error == 0.0, "no sample in it"
    assert math.isinf(compare(left, left + b"tail").error)
    assert math.isinf(compare(in_pieces(left, 500), in_pieces(right, 500)).error)


def test_tokens_in_a_list_must_be_the_same() -> None:
    tokens = list(range(4000, 6000))
    assert compare(tokens, list(tokens)).error == 0.0
    assert math.isinf(compare(tokens, [*tokens[:-1], tokens[-1] + 1]).error)
    assert 0.0 < compare([0.5, 1.0], [0.5, 1.0001]).error < 1e-3
    assert compare([2**70], [2**70]).error == 0.0, "too large for int64"


def test_a_half_precision_tensor_loosens_no_other() -> None:
    """A cache in bf16 beside an fp32 waveform: each is held to its own rounding."""
    wave, cache = torch.linspace(-1, 1, 8192), torch.linspace(-1, 1, 64)
    coarse = cache.to(torch.bfloat16)
    exact = TOLERANCES["exact"]
    assert not exact.objection(compare((wave, coarse), (wave * (1 + 1e-5), (cache * 1.005).to(torch.bfloat16))))
    assert "1.0e-02" in exact.objection(compare((wave, coarse), (wave * 1.01, coarse)))
    assert exact.objection(compare((wave, coarse), (wave, (cache * 1.1).to(torch.bfloat16))))


def test_deep_models_in_half_precision_differ_by_the_root_of_their_depth_more() -> None:
    """Rounding errors of blocks are independent of each other: decision 0011 has what was measured."""
    exact, rounding = TOLERANCES["exact"], torch.finfo(torch.bfloat16).eps
    limits = {depth: exact.error + 4 * rounding * factor for depth, factor in ((1, 1), (10, 1), (40, 2), (400, 2))}
    for depth, limit in limits.items():
        just, over = (Difference(limit * factor, rounding=rounding) for factor in (0.99, 1.01))
        assert not exact.objection(just, depth=depth)
        assert "error" in exact.objection(over, depth=depth)
        assert exact.objection(Difference(2e-4), depth=depth), "an fp32 model's is its own"


def test_what_only_a_head_reads_is_judged_by_its_probabilities() -> None:
    right, diverged = (Difference(0.1, divergence=divergence) for divergence in (0.01, 0.06))
    fast, exact = TOLERANCES["fast"], TOLERANCES["exact"]
    assert "error" in fast.objection(right)
    assert not fast.objection(right, read_by_a_head=True)
    assert "nats" in fast.objection(diverged, read_by_a_head=True)
    assert "error" in fast.objection(Difference(0.13, divergence=0.01), read_by_a_head=True)
    assert "error" in fast.objection(Difference(0.1), read_by_a_head=True), "nothing was compared but itself"
    assert "error" in exact.objection(Difference(2e-4, divergence=0.0), read_by_a_head=True)
