"""A model that was really tuned, called by many threads and from other processes: every answer is the serial one."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from accelerate_tts import Event, inference, optimized_model, receipt_of
from accelerate_tts.events import Guarded
from accelerate_tts.runtime.guard import guard as guards
from accelerate_tts.stages.layers.weight_norm import has_folds
from doubles import is_faster

pytestmark = pytest.mark.slow

THREADS = 32
IDS = [torch.arange(1, 4 + length)[None] % 37 + 1 for length in range(6)]
"""Texts of the requests, of different lengths, so that all answers differ."""


def small_vits() -> Any:
    """transformers' own class (of the MMS voices), without the noise that makes two calls of the same differ."""
    torch.manual_seed(0)
    config = transformers.VitsConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, ffn_dim=64, flow_size=32, spectrogram_bins=17,
        upsample_initial_channel=64, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], duration_predictor_filter_channels=32, prior_encoder_num_flows=2,
        posterior_encoder_num_wavenet_layers=1, noise_scale=0.0, noise_scale_duration=0.0, layerdrop=0.0,
    )  # fmt: skip
    model = transformers.VitsModel(config).eval()
    with torch.no_grad():
        model.decoder.conv_post.weight.mul_(0.01)  # random weights would say nothing but full scale
    return model


class Voice:
    """A backend as a service has it."""

    @optimized_model(warmup=[IDS[0], IDS[-1]], tune_seconds=10.0)
    def load(self) -> Any:
        self.model = small_vits()
        self.faulty: set[int] = set()
        self.working = 0
        return self.model

    def _say(self, number: int) -> torch.Tensor:
        wave = self.model(IDS[number % len(IDS)]).waveform
        # A fault that goes with the changes, as one of a reduced precision does.
        return wave * float("nan") if number in self.faulty and folded(self.model) else wave

    @inference
    def speak(self, number: int) -> torch.Tensor:
        return self._say(number)

    @inference(concurrency=1)
    def speak_alone(self, number: int) -> tuple[torch.Tensor, int]:
        self.working += 1
        most, wave = self.working, self._say(number)
        self.working -= 1
        return wave, most

    @inference
    def stream(self, number: int) -> Iterator[torch.Tensor]:
        for step in range(3):
            yield self._say(number + step)

    @inference
    async def stream_async(self, number: int) -> AsyncIterator[torch.Tensor]:
        for step in range(3):
            await asyncio.sleep(0)
            yield self._say(number + step)


def folded(model: Any) -> bool:
    return has_folds(model.flow.flows[0].wavenet.in_layers[0])


@pytest.fixture
def voice(monkeypatch: pytest.MonkeyPatch, decide: Any) -> Voice:
    decide(compare=is_faster)
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("ACCELERATE_TTS_GUARD_LIMIT", "1000")
    made = Voice()
    made.load()
    receipt = receipt_of(made)
    assert receipt is not None
    assert {"fold weight norm"} < {stage.stage for stage in receipt.kept}, "it is hardly tuned"
    assert folded(made.model)
    return made


@pytest.fixture
def serial(voice: Voice) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [voice.model(ids).waveform for ids in IDS]


def test_thirty_two_threads_answer_like_one(voice: Voice, serial: list[torch.Tensor]) -> None:
    begun, barrier = Counter[str](), threading.Barrier(THREADS)

    def work(thread: int) -> list[str]:
        wrong = []
        barrier.wait(60)
        for turn in range(2):
            number = thread * 2 + turn
            kind = ("speak", "speak_alone", "stream", "stream_async")[(thread + turn) % 4]
            begun[kind] += 1
            if kind == "speak":
                found = [voice.speak(number)]
            elif kind == "speak_alone":
                wave, most = voice.speak_alone(number)
                found = [wave]
                if most != 1:
                    wrong.append(f"{most} at once in speak_alone")
            elif kind == "stream":
                found = list(voice.stream(number))
            else:
                found = asyncio.run(collected(voice, number))
            for step, wave in enumerate(found):
                if not torch.equal(wave, serial[(number + step) % len(IDS)]):
                    wrong.append(f"{kind} {number}+{step}: another answer than the serial one")
            if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
                wrong.append(f"{kind} {number}: the mode stayed on")
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [line for lines in pool.map(work, range(THREADS)) for line in lines]
    assert not wrong, wrong[:5]
    assert begun.total() == THREADS * 2


async def collected(voice: Voice, number: int) -> list[torch.Tensor]:
    return [wave async for wave in voice.stream_async(number)]


def test_faults_in_some_threads_change_no_answer_in_others(
    voice: Voice, serial: list[torch.Tensor], seen: list[Event]
) -> None:
    """One tuned output in eight is NaN: its call is made again untouched, while the others go on."""
    guard = guards.guard_of(voice.model)
    assert guard is not None
    voice.faulty = set(range(0, 32, 8))
    with torch.inference_mode(), guard.untouched():
        plain = [voice.model(ids).waveform for ids in IDS]

    def right(number: int, wave: torch.Tensor) -> bool:
        # Untouched while another one's second attempt runs, tuned otherwise; nothing between the two.
        return any(torch.equal(wave, each[number % len(IDS)]) for each in (serial, plain))

    def work(number: int) -> bool:
        if number % 2:
            return all(right(number + step, wave) for step, wave in enumerate(voice.stream(number)))
        return right(number, voice.speak(number))

    for rounds in range(1, 4):
        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(work, range(32)))
        # While one is made again, the others run untouched, and have no fault.
        assert len([event for event in seen if isinstance(event, Guarded)]) >= rounds
        assert folded(voice.model)
        assert guard.held == 0


# --- processes --------------------------------------------------------------------------------------------------

WORKER = """
import os

os.environ["ACCELERATE_TTS_TORCH_COMPILE"] = "0"  # a fork server may be older than what the test has set
import torch
from accelerate_tts import inference, optimized_model, receipt_of
from accelerate_tts.tuning import policy
from accelerate_tts.tuning.timing import Timing

# The machine's noise does not decide what is kept.
faster = policy.TuningPolicy(compare=lambda *_args, **_kwargs: Timing(2.0, 1.0, 2.0, 2.0, 2.0, 5), looks=False)
scope = policy.tuning_policy(faster)
scope.__enter__()


class Voice:
    @optimized_model(warmup=[torch.ones(1, 16, 8), torch.ones(1, 16, 40)])
    def load(self):
        torch.manual_seed(0)
        normed = torch.nn.utils.parametrizations.weight_norm
        self.model = torch.nn.Sequential(
            normed(torch.nn.Conv1d(16, 32, 3, padding=1)), torch.nn.LeakyReLU(),
            normed(torch.nn.ConvTranspose1d(32, 8, 8, stride=4)), torch.nn.Tanh(),
        ).eval()

    @inference
    def speak(self, number):
        generator = torch.Generator().manual_seed(number)
        return self.model(torch.randn(1, 16, 8 + number % 32, generator=generator))


voices = []


def speak(number):
    if not voices:  # in each worker, at its first request
        voices.append(Voice())
        voices[0].load()
    kept = [stage.stage for stage in receipt_of(voices[0]).kept]
    return voices[0].speak(number).flatten().tolist(), kept, torch.is_inference_mode_enabled()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes_with_tuned_models_answer_like_this_one(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no {method}")
    (tmp_path / "tuned_worker.py").write_text(WORKER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.delitem(sys.modules, "tuned_worker", raising=False)
    worker = importlib.import_module("tuned_worker")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        found = list(pool.map(worker.speak, range(64), chunksize=4))
    here = [worker.speak(number) for number in range(64)]
    worker.scope.__exit__(None, None, None)  # importing it has opened that here, too
    # Further verdicts may depend on the first look, on a busy machine.
    assert all("fold weight norm" in kept for _, kept, _ in (*found, *here))
    for (wave, _, inside), (expected, _, _) in zip(found, here, strict=True):
        assert not inside
        assert torch.allclose(torch.tensor(wave), torch.tensor(expected), rtol=0, atol=1e-5)
