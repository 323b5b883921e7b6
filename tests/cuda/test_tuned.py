"""Whole tunings on a CUDA device: of a decoder, of the systems at small size, from several threads, with a pack."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event, cached_embedding, get_performance_optimizer, inference, optimized_model, receipt_of
from accelerate_tts.events import FellBack, Recompiled
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.compare import TOLERANCES, compare


class Vocoder(nn.Module):
    """Convolutions, as a vocoder has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv1d(16, 64, 7, padding=3)]
        for _ in range(6):
            layers += [nn.LeakyReLU(0.1), nn.Conv1d(64, 64, 7, padding=3)]
        self.layers = nn.Sequential(*layers, nn.Conv1d(64, 1, 7, padding=3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def features(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, length, generator=torch.Generator().manual_seed(seed)).cuda()


def test_the_device_is_found_and_made_ready() -> None:
    optimizer = get_performance_optimizer()
    assert optimizer.initialize() == torch.device("cuda")
    assert optimizer.device.total_memory == torch.cuda.get_device_properties(0).total_memory
    assert torch.backends.cudnn.benchmark
    gib = optimizer.device.total_memory / 2**30
    expected = 4 if gib > 16 else 2 if gib > 8 else 1
    assert optimizer.get_optimal_batch_size() == expected
    model = nn.Linear(64, 64).cuda()
    assert optimizer.warmup_model(model, torch.ones(2, 64))
    optimizer.cleanup_memory(force=True)
    optimizer.close()
    assert not torch.backends.cudnn.benchmark


def test_tf32_is_on_and_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_TF32", "1")
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(n)).cuda() for n in (0, 1))
    true = a.double() @ b.double()

    def error() -> float:
        return float((a @ b - true).norm() / true.norm())

    assert error() < 1e-5
    optimizer = get_performance_optimizer()
    optimizer.initialize()
    assert 1e-5 < error() < 2e-3
    optimizer.close()
    assert error() < 1e-5


@pytest.mark.parametrize("precision", ["exact", "balanced", "fast"])
def test_a_vocoder(precision: Any, seen: list[Event]) -> None:
    model = Vocoder().eval().cuda()
    with torch.inference_mode():
        expected = [model(features(length)).cpu() for length in (400, 700, 1000)]
    optimized_model(warmup=lambda m: m(features(400)), lengths=None, precision=precision, tune_seconds=30)(
        lambda: model
    )()
    receipt = receipt_of(model)
    assert receipt is not None
    with torch.inference_mode():
        for length, wave in zip((400, 700, 1000), expected, strict=True):
            difference = compare([wave], [model(features(length)).cpu()])
            assert not TOLERANCES[precision].objection(difference), str(receipt)
    # A compiler that takes longer than the budget is interrupted, and that is told; anything else would be a fault.
    assert not [event for event in seen if isinstance(event, FellBack) and "did not return" not in event.reason]
    assert get_performance_optimizer().undo(model)
    with torch.inference_mode():
        found = model(features(400)).cpu()
    assert float((found - expected[0]).norm() / expected[0].norm()) < EXACT_TOLERANCE


def test_threads_share_a_compiled_part() -> None:
    """inductor's CUDA graphs belong to a thread, and their outputs are overwritten by the next replay."""
    model = Vocoder().eval().cuda()
    optimizer = get_performance_optimizer()
    with torch.inference_mode():
        expected = [model(features(400, seed)).cpu() for seed in range(16)]
        optimizer.compile_model(model, "vocoder", features(400))

        def ask(seed: int) -> torch.Tensor:
            with torch.inference_mode():
                return model(features(400, seed))

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(16)))
    for a, b in zip(expected, found, strict=True):
        assert float((a - b.cpu()).norm() / a.norm()) < EXACT_TOLERANCE
    assert optimizer.undo(model) is False  # it was compiled by hand, not tuned
    optimizer.close()


def test_a_decoders_tokens_and_what_was_kept(model: Any, seen: list[Event]) -> None:
    ids = torch.randint(3, 50, (1, 6), generator=torch.Generator().manual_seed(0)).cuda()

    def speak(count: int = 300) -> torch.Tensor:
        torch.manual_seed(3)
        found: torch.Tensor = model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=True, pad_token_id=0
        )
        return found

    expected = speak()
    optimized_model(warmup=lambda _model: speak(40), tune_seconds=60)(lambda: model)()
    receipt = receipt_of(model)
    assert receipt is not None
    assert "captured decode step" in {stage.stage for stage in receipt.kept}, str(receipt)
    assert torch.equal(speak(), expected)
    with ThreadPoolExecutor(4) as pool:
        # The tokens are drawn with the device's one generator, so only what needs none is compared across threads.
        for found in pool.map(lambda _n: model(ids).logits, range(8)):
            assert torch.isfinite(found).all()
    assert not [event for event in seen if isinstance(event, FellBack)]
    assert get_performance_optimizer().undo(model)
    assert torch.equal(speak(), expected)


@pytest.mark.parametrize("name", ["mms", "xtts", "chatterbox", "higgs"])
def test_a_system_at_small_size(name: str, monkeypatch: pytest.MonkeyPatch, seen: list[Event]) -> None:
    from accelerate_tts.cli.bench import measure

    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    found = measure.bench(name, "tiny", "exact", layers=None, pairs=1, seconds=30)
    assert found.device == "cuda"
    assert found.same_tokens is not False
    assert found.error is None or found.error < EXACT_TOLERANCE, found.kept
    assert not [event for event in seen if isinstance(event, (FellBack, Recompiled))]
    if name != "mms":
        assert found.step is not None
        assert any("captured" in kept for kept in found.kept), found.receipt


def test_the_event_loop_and_generators() -> None:
    model = nn.Linear(8, 8).cuda().eval()

    class Backend:
        @inference
        async def stream(self, count: int) -> Any:
            for number in range(count):
                assert torch.is_inference_mode_enabled()
                yield model(torch.full((1, 8), float(number)).cuda())
                await asyncio.sleep(0)

    async def collect() -> list[torch.Tensor]:
        return [piece async for piece in Backend().stream(4)]

    async def several() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*(collect() for _ in range(4)))

    assert all(len(pieces) == 4 for pieces in asyncio.run(several()))
    assert not torch.is_inference_mode_enabled()


def test_a_reference_voice_on_the_device_is_embedded_once(tmp_path: Path) -> None:
    calls: list[int] = []
    encoder = nn.Linear(16, 4).cuda().eval()

    class Voices:
        def __init__(self) -> None:
            self.encoder = encoder

        @cached_embedding(folder=tmp_path)
        def embed(self, wave: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.encoder(wave)

    wave = torch.ones(1, 16).cuda()
    first, second = Voices().embed(wave), Voices().embed(wave.clone())
    assert calls == [1]
    assert first.device.type == second.device.type == "cuda"
    assert torch.equal(first, second)


def test_a_model_on_the_cpu_beside_the_device_is_tuned_for_the_cpu(seen: list[Event]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).eval()
    optimized_model(warmup=lambda m: m(torch.ones(4, 64)), tune_seconds=20)(lambda: model)()
    receipt = receipt_of(model)
    assert receipt is not None
    assert receipt.device.startswith("cpu")


def test_a_load_gives_another_thread_the_numbers_of_the_devices_generator_that_it_would_have_had() -> None:
    """The model draws nothing, so the generators of all devices are left to the threads of the service."""
    model, found, ends = Vocoder().eval().cuda(), list[float](), threading.Event()

    @optimized_model(warmup=features(40))
    def load() -> nn.Module:
        return model

    def draw() -> None:
        while not ends.wait(0.0005):
            found.append(float(torch.rand(1, device="cuda")))

    torch.cuda.manual_seed_all(7)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        load()
    finally:
        ends.set()
        thread.join()
    torch.cuda.manual_seed_all(7)
    assert found == [float(torch.rand(1, device="cuda")) for _ in found]
    assert len(found) > 10
