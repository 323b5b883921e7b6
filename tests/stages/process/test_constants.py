"""Constants of upstream: kept while an object is tuned, the same bit for bit, and given back."""

from __future__ import annotations

import gc
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchaudio.compliance import kaldi

from accelerate_tts import get_performance_optimizer, optimized_model, receipt_of
from accelerate_tts.stages.process.constants import KeptConstants

librosa: Any = pytest.importorskip("librosa")
librosa.feature.melspectrogram(y=np.zeros(400, np.float32))  # it loads its modules when they are asked for
MEL: Any = {"sr": 16_000, "n_fft": 400, "n_mels": 40}
# Not as names of this module, which would be replaced like all others.
UPSTREAM = types.SimpleNamespace(mel=librosa.filters.mel, get_window=librosa.filters.get_window)


@pytest.fixture
def constants() -> Iterator[KeptConstants]:
    """A change that has seen librosa's and Kaldi's filter banks made, in force."""
    gc.collect()  # another test's object may have them, and be a part of a cycle
    change = KeptConstants()
    with change.watching():
        librosa.filters.mel(**MEL)
        kaldi.fbank(torch.ones(1, 4000))
    change.on()
    yield change
    change.off()
    assert librosa.filters.mel is UPSTREAM.mel


def test_what_is_watched_is_found_and_put_back(constants: KeptConstants) -> None:
    assert {"librosa.filters:mel", "torchaudio.compliance.kaldi:get_mel_banks"} <= constants.found.keys()
    assert "librosa.filters:get_window" not in constants.found, "nobody called it"
    assert librosa.filters.mel is not UPSTREAM.mel
    assert "librosa.filters.mel (1 calls, " in str(constants)
    assert constants.saved > 0
    held = librosa.filters.mel
    constants.off()
    constants.off()
    assert librosa.filters.mel is UPSTREAM.mel
    assert np.array_equal(held(**MEL), UPSTREAM.mel(**MEL)), "whoever still holds it is served by upstream"


def test_a_module_that_imports_a_function_at_any_time_has_it_replaced_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def imported(name: str) -> Any:
        module: Any = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        vars(module)["mel"] = librosa.filters.mel  # as `from librosa.filters import mel` does
        return module

    early, late = imported("imported_early"), types.ModuleType("imported_late")
    monkeypatch.setitem(sys.modules, "imported_late", late)
    change = KeptConstants(("librosa.filters:mel",))
    for _ in range(2):  # the second time what was found by a walk over all modules is remembered
        with KeptConstants(change.functions).watching(), change.watching():
            librosa.filters.mel(**MEL)
            assert early.mel is librosa.filters.mel is not UPSTREAM.mel
            during = imported("imported_while_it_is_replaced")
            vars(late)["mel"] = librosa.filters.mel
            assert during.mel is vars(late)["mel"] is librosa.filters.mel
        for module in (early, during, late):
            assert vars(module)["mel"] is UPSTREAM.mel
        change.on()
        assert early.mel is during.mel is vars(late)["mel"] is librosa.filters.mel is not UPSTREAM.mel
        change.off()
        assert early.mel is during.mel is vars(late)["mel"] is librosa.filters.mel is UPSTREAM.mel


@pytest.mark.parametrize(
    "other",
    [
        {"n_mels": 41},
        {"n_mels": 40.0},
        {"fmin": -0.0},
        {"fmin": 0.0},
        {"htk": True},
        {"dtype": np.float64},
        {"sr": 16e3},
    ],
)
def test_every_argument_counts(constants: KeptConstants, other: dict[str, Any]) -> None:
    del constants
    for arguments in (MEL, {**MEL, **other}, MEL):
        try:
            expected = UPSTREAM.mel(**arguments)
        except TypeError:
            with pytest.raises(TypeError):
                librosa.filters.mel(**arguments)
            continue
        for _ in range(2):
            found = librosa.filters.mel(**arguments)
            assert (found.dtype, found.strides, found.tobytes()) == (
                expected.dtype,
                expected.strides,
                expected.tobytes(),
            )
            found.fill(7.0)  # whoever is given it may write into it


def test_features_are_the_same_bit_for_bit(constants: KeptConstants) -> None:
    wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    run = lambda: (kaldi.fbank(wave).numpy(), librosa.feature.melspectrogram(y=wave[0].numpy(), **MEL))  # noqa: E731
    kept, again = run(), run()
    constants.off()
    for plain, first, second in zip(run(), kept, again, strict=True):
        assert plain.tobytes() == first.tobytes() == second.tobytes()


def test_tensors_of_every_mode_and_default(constants: KeptConstants) -> None:
    del constants
    banks = lambda: kaldi.get_mel_banks(23, 512, 16_000.0, 20.0, 0.0, 100.0, -500.0, 1.0)[0]  # noqa: E731
    with torch.inference_mode():
        inside = [banks(), banks()]
    outside = [banks(), banks()]
    assert all(bank.is_inference() for bank in inside)
    assert not any(bank.is_inference() for bank in outside)
    torch.set_default_dtype(torch.float64)
    try:
        assert banks().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert banks().device.type == "meta"
    assert banks().device.type == "cpu"


def test_what_cannot_be_told_goes_upstream_and_errors_pass(constants: KeptConstants) -> None:
    del constants
    window = np.hanning(400)
    assert librosa.filters.get_window(window, 400) is not None  # an array has no key
    with pytest.raises(librosa.ParameterError):
        librosa.filters.mel(**MEL, norm="loud")


def test_a_function_that_changes_or_warns_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))

    def slow(*_args: object) -> Any:
        return np.full(200_000, next(count), np.float64)

    def warning(*_args: object) -> Any:
        warnings.warn("too few", stacklevel=1)
        return np.zeros(200_000).cumsum()

    module: Any = types.ModuleType("an_upstream_with_constants")
    vars(module).update({"slow": slow, "warning": warning, "alias": slow})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    change = KeptConstants((f"{module.__name__}:slow", f"{module.__name__}:warning"))
    with change.watching(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.alias(1)
        module.warning(1)
        assert module.alias is not slow
    assert module.alias is slow
    assert not change.found


def test_many_arguments_do_not_fill_the_memory(constants: KeptConstants) -> None:
    del constants
    for count in range(20, 120):
        librosa.filters.mel(sr=16_000, n_fft=400, n_mels=count)
    from accelerate_tts.stages.process import constants as module

    assert sum(len(function.results) for function in module.replaced_functions.values()) == 64


def test_threads_get_the_right_ones(constants: KeptConstants) -> None:
    del constants
    expected = {count: UPSTREAM.mel(sr=16_000, n_fft=400, n_mels=count).tobytes() for count in (20, 40, 60, 80)}
    wrong: list[int] = []

    def ask(count: int) -> None:
        for _ in range(50):
            bank = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=count)
            if bank.tobytes() != expected[count]:
                wrong.append(count)
            bank[:] = 0

    threads = [threading.Thread(target=ask, args=(count,)) for count in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_torchs_compilers_see_upstreams_function() -> None:
    from torchaudio import functional as audio

    gc.collect()  # another test's object may have them, and be a part of a cycle
    change = KeptConstants()
    with change.watching():
        audio.resample(torch.ones(1, 4410), 44_100, 16_000)
    assert any("sinc" in name for name in change.found)
    change.on()
    try:
        wave = torch.randn(1, 4410)
        scripted = torch.jit.script(vars(audio.functional)["_get_sinc_resample_kernel"])
        assert isinstance(scripted, torch.jit.ScriptFunction)
        first, second = (audio.resample(wave, 44_100, 16_000) for _ in range(2))
    finally:
        change.off()
    assert torch.equal(first, second)
    assert torch.equal(first, audio.resample(wave, 44_100, 16_000))


class Ears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 8)

    def hear(self, wave: Any) -> torch.Tensor:
        mel = librosa.feature.melspectrogram(y=wave, **MEL)
        return self.layer(torch.from_numpy(mel).T)  # type: ignore[no-any-return]


def test_a_tuned_object_keeps_them_until_it_is_undone() -> None:
    wave = np.random.default_rng(0).normal(size=4000).astype(np.float32)

    @optimized_model(warmup=lambda ears: ears.hear(wave))
    def load() -> Ears:
        return Ears().eval()

    one, other = load(), load()
    receipt = receipt_of(one)
    assert receipt is not None
    assert any("librosa.filters.mel (1 calls" in note for note in receipt.notes)
    get_performance_optimizer().undo(one)
    assert librosa.filters.mel is not UPSTREAM.mel, "the other one still has them"
    get_performance_optimizer().undo(other)
    assert librosa.filters.mel is UPSTREAM.mel
    assert vars(librosa.core.spectrum)["get_window"] is UPSTREAM.get_window


def test_a_tuned_object_that_is_dropped_gives_them_back() -> None:
    wave = np.random.default_rng(0).normal(size=4000).astype(np.float32)

    @optimized_model(warmup=lambda ears: ears.hear(wave))
    def load() -> Ears:
        return Ears().eval()

    gc.collect()
    one = load()
    assert librosa.filters.mel is not UPSTREAM.mel
    del one
    gc.collect()
    assert librosa.filters.mel is UPSTREAM.mel
