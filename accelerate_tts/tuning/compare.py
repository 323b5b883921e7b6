"""Comparison of a candidate's outputs with those of the untouched model."""

from __future__ import annotations

import dataclasses
import io
import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.inspection.object_tree import items_of
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.cache_delta import is_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate_tts.settings import Precision

NOTHING_TO_COMPARE = "nothing in the result can be compared; let the warm-up return the speech"
UNEQUAL = "values that are not finite or not equal"
UNEQUAL_BYTES = "bytes that are not equal; let the warm-up return samples, not an encoded file"


# A model that computes in bf16 is exact to bf16's rounding. Two orders of summation differ by a few steps of 2^-7 after
# some ten blocks, each of which rounds; beyond ten, the difference grows with the root of their number (decision 0011).
# Where the result is tokens, they are compared as well, and must be the same.
_ROUNDINGS, _BLOCKS, _MOST_BLOCKS = 4, 10, 40
# Factor on the limit for hidden states that only a head reads, since its probabilities are compared themselves.
_READ_BY_A_HEAD = 3.0
_AUDIBLE = 60.0
_FRAME = 1024
_LEAST_SAMPLES, _MOST_CHANNELS = 4096, 16
_BITS = 16
_IEEE, _EXTENSIBLE = 3, 0xFFFE  # WAV's codes for floats, and for a longer header that has the code later
_LOUDEST = 64.0  # of samples whose full scale is 1; a float of other bytes is mostly far larger or far smaller
_LEAST_CORRELATION = 0.1  # of neighbouring samples; speech has 0.8 and more, compressed data and tokens about 0


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Maximum difference at which a candidate counts as correct.

    Attributes:
        error: Maximum relative error of any tensor. For audio it is a signal-to-noise ratio of `-20 log10(error)` dB;
            for an embedding, a cosine to the reference of at least `1 - error ** 2 / 2`.
        spectral: Maximum log-spectral distance of audio, in dB.
        divergence: Maximum Kullback-Leibler divergence of a step's next-token distribution, in nats.
    """

    error: float
    spectral: float
    divergence: float = math.inf

    def objection(self, difference: Difference, *, depth: int = 1, read_by_a_head: bool = False) -> str:
        """Return the reason why a difference is not tolerated, or "".

        Args:
            difference: The difference.
            depth: Number of consecutive blocks in the compared part. Each block of a half-precision model rounds.
            read_by_a_head: True if only a head reads the output, whose probabilities are compared.
        """
        if difference.reason:
            return difference.reason
        deeper = math.sqrt(min(max(depth, _BLOCKS), _MOST_BLOCKS) / _BLOCKS)
        # "exact" means to rounding, even if only a head reads the output.
        inexact = read_by_a_head and difference.divergence is not None and self.error > EXACT_TOLERANCE
        allowed = self.error * (_READ_BY_A_HEAD if inexact else 1.0)
        # A half-precision reference itself has a rounding error, and a correct candidate may differ from it by as much
        # (triangle inequality). A relative error e of logits with a variance of s is a divergence of s * e ** 2 / 2,
        # and logits have a variance of a few.
        for rounding, error in difference.errors or ((difference.rounding, difference.error),):
            limit = allowed + _ROUNDINGS * deeper * rounding
            if not error <= limit:  # NaN fails
                return f"error {error:.1e}, {f'limit {limit:.0e}' if limit else 'must be bit-exact'}"
        divergence = self.divergence + (_ROUNDINGS * deeper * difference.rounding) ** 2
        if difference.spectral is not None and not difference.spectral <= self.spectral:
            return f"log-spectral distance {difference.spectral:.1f} dB, limit {self.spectral:.1f} dB"
        if difference.divergence is not None and not difference.divergence <= divergence:
            return f"a step diverges by {difference.divergence:.1e} nats, limit {divergence:.0e}"
        return ""


TOLERANCES: dict[Precision, Tolerance] = {
    # With an error of 1e-4, only content 80 dB below the signal can differ.
    "exact": Tolerance(EXACT_TOLERANCE, 1.0, 1e-4),
    # 34 dB between signal and noise; the 8 bits of telephone speech (G.711) give about 37 dB at best. The spectral
    # limit of 1 dB is customary for transparent coding of spectral envelopes (Paliwal and Atal, 1993). 0.01 nats: no
    # test can tell which of two such samplers a token came from more often than 54 times in 100 (Pinsker's inequality).
    "balanced": Tolerance(0.02, 1.0, 0.01),
    # 28 dB, and a cosine of 0.9992 for an embedding; careful listeners begin to hear such a distance. 0.05 nats: 58
    # times in 100.
    "fast": Tolerance(0.04, 2.0, 0.05),
}
"""Tolerances by precision level."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of two results.

    Attributes:
        error: Largest relative error of any tensor, ||candidate - reference|| / ||reference|| in float64. 0.0 is
            bit-exact; infinite if they cannot be compared.
        reason: Reason why they cannot be compared, or "".
        spectral: Largest log-spectral distance of tensors that look like audio, in dB; `None` if none does.
        rounding: Rounding step of the coarsest half-precision dtype among the tensors; 0.0 without one.
        divergence: Largest divergence of a step (kl_divergence.py) of a decoder with a known head, in nats.
        errors: Largest relative error of the tensors of each rounding step (0.0 for fp32 and wider), since
            half-precision tensors have another limit than fp32 tensors.
    """

    error: float
    reason: str = ""
    spectral: float | None = None
    rounding: float = 0.0
    divergence: float | None = None
    errors: tuple[tuple[float, float], ...] = dataclasses.field(default=(), compare=False)


def compare(reference: Any, candidate: Any) -> Difference:
    """Compare two results of the same call: every tensor, array and byte string in them, in order.

    Floating-point tensors are compared by relative error in float64. So are 16-bit samples, with half a step of
    tolerance, since a waveform that is correct to 1e-6 occasionally rounds to another integer. Pieces of 16-bit samples
    and byte strings are joined first, as a stream gives them; byte strings count as samples if their content looks like
    a waveform. All others must be equal. A different number of tensors, shape, dtype or memory layout, or a NaN that
    the reference does not have, is an infinite error with its reason. So is a result without anything to compare.
    """
    left, right = list(tensors_of(reference)), list(tensors_of(candidate))
    if len(left) != len(right):
        return Difference(math.inf, f"{len(right)} tensors instead of {len(left)}")
    if not left:
        return Difference(math.inf, NOTHING_TO_COMPARE)
    spectral: float | None = None
    errors: dict[float, float] = {}
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return Difference(math.inf, f"{b.dtype} of shape {tuple(b.shape)} instead of {a.dtype} of {tuple(a.shape)}")
        if a.is_contiguous() and not b.is_contiguous():  # the caller's .view() would fail
            return Difference(math.inf, "a different memory layout")
    for a, b in _with_pieces_joined(left, right):
        rounding = torch.finfo(a.dtype).eps if a.dtype in {torch.bfloat16, torch.float16} else 0.0
        error = _error(*_as_waves(a, b)) if _is_pcm(a) else _error(a, b)
        if math.isinf(error):
            return Difference(math.inf, UNEQUAL_BYTES if a.dtype == torch.uint8 else UNEQUAL)
        errors[rounding] = max(errors.get(rounding, 0.0), error)
        if _is_audio(a) or _is_pcm(a):
            spectral = max(spectral or 0.0, spectral_distance(a, b))
    return Difference(max(errors.values()), "", spectral, max(errors), errors=tuple(sorted(errors.items())))


def spectral_distance(reference: Any, candidate: Any) -> float:
    """Compute the log-spectral distance of two waveforms, in dB.

    Args:
        reference: Audio of shape (..., samples), of any real floating dtype.
        candidate: Audio of the same shape.

    Returns:
        The root mean square over frequency bins of the difference of the power spectra in dB, averaged over frames of
        1024 samples (Hann window, half overlapping). Bins are clamped to 60 dB below the strongest bin of the
        reference, since weaker ones are inaudible. 0.0 for two silences; infinite if a sample is not finite.
    """
    with torch.inference_mode():
        a, b = (_power(wave.detach().cpu().to(torch.float64)) for wave in (reference, candidate))
        floor = float(a.max()) * 10 ** (-_AUDIBLE / 10)
        if floor == 0.0:  # the reference is silent
            return 0.0 if float(b.max()) == 0.0 else math.inf
        decibels = 10 * (torch.log10(a.clamp_min(floor)) - torch.log10(b.clamp_min(floor)))
        distance = float(decibels.square().mean(-2).sqrt().mean())
    return distance if math.isfinite(distance) else math.inf


def _power(wave: Any) -> Any:
    flat = wave.reshape(-1, wave.shape[-1])
    window = torch.hann_window(_FRAME, dtype=flat.dtype)
    spectrum = torch.stft(flat, _FRAME, _FRAME // 2, window=window, center=False, return_complex=True)
    return spectrum.abs().square()


def _is_audio(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() and _is_long(tensor) and tensor.isfinite().all())


def _is_pcm(tensor: Any) -> bool:
    return bool(tensor.dtype == torch.int16) and _is_long(tensor)


def _is_long(tensor: Any) -> bool:
    # A few frames of one or two channels, in a small batch; hidden states are wide in more than one dimension.
    if tensor.numel() == 0 or tensor.dim() == 0 or tensor.shape[-1] < _LEAST_SAMPLES:
        return False
    return bool(tensor.numel() // tensor.shape[-1] <= _MOST_CHANNELS)


def _with_pieces_joined(left: list[Any], right: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of tensors, with rows of 16-bit samples joined, and likewise bytes, which become samples if they can.

    The pieces of a stream are short, and a byte string may end within a sample.
    """
    pieces: dict[torch.dtype, list[tuple[Any, Any]]] = {torch.int16: [], torch.uint8: []}
    for a, b in zip(left, right, strict=True):
        if a.dtype in pieces and a.dim() and a.numel() == a.shape[-1]:
            pieces[a.dtype].append((a, b))
        else:
            yield a, b
    for dtype, pairs in pieces.items():
        if not pairs:
            continue
        a, b = (torch.cat([pair[side].reshape(-1) for pair in pairs]) for side in (0, 1))
        kind = sample_dtype(a) if dtype == torch.uint8 else None
        if kind is not None:
            start, end = _samples_of(a, kind)
            yield _viewed(a[start:end], kind), _viewed(b[start:end], kind)
            a, b = (torch.cat([content[:start], content[end:]]) for content in (a, b))
        yield a, b


def sample_dtype(content: Any) -> torch.dtype | None:
    """Return the dtype of the samples that raw bytes seem to be: 16 bits, or fp32; `None` for anything else.

    Args:
        content: `(bytes,)` of uint8 on the CPU, as of `array.tobytes()`. The header of a WAV file may precede.
    """
    for dtype in (torch.int16, torch.float32):
        wave = samples_in(content, dtype).double()
        if len(wave) < _LEAST_SAMPLES or not bool(wave.isfinite().all()):
            continue
        low, high = float(wave.min()), float(wave.max())
        # Text has no byte of 128 and more, so it has no negative samples.
        if low < 0.0 < high and (dtype == torch.int16 or max(-low, high) < _LOUDEST):
            wave = wave - wave.mean()
            if float((wave[1:] * wave[:-1]).sum()) > _LEAST_CORRELATION * float(wave.square().sum()):
                return dtype
    return None


def samples_in(content: Any, dtype: torch.dtype) -> Any:
    """Return raw bytes as samples, without a WAV file's header and what is left over at the end."""
    start, end = _samples_of(content, dtype)
    return _viewed(content[start:end], dtype)


def _samples_of(content: Any, dtype: torch.dtype) -> tuple[int, int]:
    head = bytes(content[:1024].tolist())
    start = head.find(b"data") + 8 if head[:4] == b"RIFF" and b"data" in head else 0
    return start, start + max(0, len(content) - start) // dtype.itemsize * dtype.itemsize


def _viewed(content: Any, dtype: torch.dtype) -> Any:
    return content.clone().view(dtype)  # a copy, since the memory need not be aligned


def _as_waves(reference: Any, candidate: Any) -> tuple[Any, Any]:
    """Convert 16-bit samples to waveforms, and reduce each difference by half a step."""
    a, b = reference.double(), candidate.double()
    difference = b - a
    return a, a + difference.sign() * (difference.abs() - 0.5).clamp_min(0.0)


def tensors_of(value: Any) -> Iterator[Any]:
    """Yield every tensor in a result in a fixed order, from containers, dataclasses and plain objects.

    NumPy arrays, byte strings and lists of numbers count as tensors: lists of integers (tokens) as int64, other lists
    (audio) as float64. A 16-bit WAV file gives its samples and its header.
    """
    yield from _tensors(value, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (bytes, bytearray)):
        yield from _of_bytes(bytes(value))
    elif isinstance(value, io.BytesIO):
        yield from _of_bytes(value.getvalue())
    elif (
        isinstance(value, (str, int, float, complex, type, ModuleType))
        or value is None
        or (isinstance(value, torch.nn.Module) and not is_cache(value))  # caches of transformers 4.46 are modules
    ):
        return
    elif type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        yield from _of_array(value)
    elif id(value) not in seen:
        seen.add(id(value))
        if hasattr(type(value), "compared_as"):  # an object of this package that replaces one of upstream's
            replaced: Any = value
            value = replaced.compared_as()
        if isinstance(value, (tuple, list)) and value and all(isinstance(item, (int, float)) for item in value):
            whole = all(isinstance(item, int) and -(2**63) <= item < 2**63 for item in value)
            yield torch.tensor(value, dtype=torch.int64 if whole else torch.float64)
        else:
            items = items_of(value)
            for item in list(getattr(value, "__dict__", {}).values()) if items is None else items:
                yield from _tensors(item, seen)


def _of_array(array: Any) -> Iterator[Any]:
    if array.dtype.kind not in "fiubc":
        return
    widest = {"f": "f8", "c": "c16"}.get(array.dtype.kind, "")
    if widest and array.dtype.itemsize > int(widest[1:]):  # long double, which torch does not have
        array = array.astype(widest)
    # torch takes neither another byte order nor a negative stride, as of a reversed wave.
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    yield torch.as_tensor(native.copy() if any(stride < 0 for stride in native.strides) else native)


def _of_bytes(value: bytes) -> Iterator[Any]:
    data = value.find(b"data") + 8 if value[:4] == b"RIFF" and value[8:12] == b"WAVE" else 0
    dtype = _dtype_of_wav(value) if data > 8 else None  # noqa: PLR2004
    if dtype is not None:
        channels = max(1, int.from_bytes(value[22:24], "little"))
        frame = dtype.itemsize * channels
        count = (len(value) - data) // frame * frame
        if count:
            yield torch.frombuffer(bytearray(value[data : data + count]), dtype=dtype).view(-1, channels).T
            value = value[:data] + value[data + count :]
    yield torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)


def _dtype_of_wav(value: bytes) -> torch.dtype | None:
    """Return the dtype of a WAV file's samples: 16 bits, or fp32; `None` for others."""
    code, bits = int.from_bytes(value[20:22], "little"), int.from_bytes(value[34:36], "little")
    if code == _EXTENSIBLE:
        code = int.from_bytes(value[44:46], "little")
    if code == _IEEE:
        return torch.float32 if bits == 2 * _BITS else None
    return torch.int16 if bits == _BITS else None


def _error(reference: Any, candidate: Any) -> float:
    with torch.inference_mode():
        if not (reference.is_floating_point() or reference.is_complex()):
            return 0.0 if torch.equal(reference, candidate) else math.inf
        if reference.numel() == 0:
            return 0.0
        wide = torch.complex128 if reference.is_complex() else torch.float64
        # Always on the CPU, since MPS has no float64.
        a, b = reference.detach().cpu().to(wide), candidate.detach().cpu().to(wide)
        finite = torch.isfinite(a)
        # NaN must match NaN, and an infinity one of the same sign.
        if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(a.isnan(), b.isnan()):
            return math.inf
        infinite = a.isinf()
        if not torch.equal(a[infinite], b[infinite]):
            return math.inf
        a, b = a[finite], b[finite]
        norm = float(torch.linalg.vector_norm(a))
        distance = float(torch.linalg.vector_norm(a - b))
        if distance == 0.0:
            return 0.0
        return distance / norm if norm > 0.0 else math.inf
