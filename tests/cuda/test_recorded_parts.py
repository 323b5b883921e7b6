"""Parts that are no decoder as CUDA graphs: bit for bit upstream's, from several threads, and after failures."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from accelerate_tts import Event
from accelerate_tts.cli.bench import systems
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.events import FellBack
from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.graphs.recorded_parts import PartBounds, RecordedPartsStage
from accelerate_tts.stages.graphs.recorded_pieces import RecordedPiecesStage
from accelerate_tts.stages.graphs.recorder import GraphRecorder


class Vocoder(nn.Module):
    """Convolutions, as a vocoder has them; `asks` reads a value from the device in the middle."""

    def __init__(self, *, asks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.asks = asks
        self.first = nn.Sequential(nn.Conv1d(16, 64, 7, padding=3), nn.Tanh(), nn.Conv1d(64, 64, 7, padding=3))
        self.last = nn.Sequential(nn.Tanh(), nn.Conv1d(64, 64, 7, padding=3), nn.Tanh(), nn.Conv1d(64, 1, 7, padding=3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.asks and float(y.sum()) > 0:
            y = -y
        return self.last(y)  # type: ignore[no-any-return]


def features(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, length, generator=torch.Generator().manual_seed(seed)).cuda()


def record(module: nn.Module, bounds: PartBounds | None = None) -> Any:
    stage = RecordedPartsStage(bounds=bounds or PartBounds())
    part = Part("part", "vocoder", module)
    assert stage.applies(part) is None
    change = stage.prepare(part)
    change.on()
    return change


@pytest.mark.parametrize("asks", [False, True])
def test_a_part_is_bit_for_bit_upstreams(asks: bool, seen: list[Event]) -> None:
    model = Vocoder(asks=asks).eval().cuda()
    work = [(length, seed) for seed in range(4) for length in (400, 700)]
    with torch.inference_mode():
        expected = [model(features(*each)) for each in work]
        change = record(model)
        found = [model(features(*each)) for each in work]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert change.graphs == (4 if asks else 2)
    assert not [event for event in seen if isinstance(event, FellBack)]
    change.off()


def test_eight_threads_with_streams_of_their_own(seen: list[Event]) -> None:
    model = Vocoder().eval().cuda()
    work = [(length, seed) for seed in range(8) for length in (300, 400, 500)]
    with torch.inference_mode():
        expected = [model(features(*each)).cpu() for each in work]
        change = record(model, PartBounds(graphs=2))

        def ask(number: int) -> list[torch.Tensor]:
            with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():  # type: ignore[no-untyped-call]
                return [model(features(*each)).cpu() for each in work[number:] + work[:number]]

        with ThreadPoolExecutor(8) as pool:
            for number, found in enumerate(pool.map(ask, range(8))):
                turned = expected[number:] + expected[:number]
                # A thread that has not convolved yet may find other kernels for eager calls.
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, turned, strict=True))
    assert change.kept <= 2
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_each_length_is_replayed_in_pieces(seen: list[Event]) -> None:
    model = Vocoder().eval().cuda()
    stage, part = RecordedPiecesStage(), Part("part", "vocoder", model)
    assert stage.applies(part) is None
    lengths = (400, 401, 333, 650, 2000)
    with torch.inference_mode():
        expected = [model(features(length)) for length in lengths]
        change = stage.prepare(part)
        change.on()
        for length, whole in zip(lengths, expected, strict=True):
            assert float((model(features(length)) - whole).norm() / whole.norm()) < EXACT_TOLERANCE
    assert change.graphs == 1
    assert not [event for event in seen if isinstance(event, FellBack)]
    change.off()


def test_weights_written_in_place_and_exchanged() -> None:
    model = Vocoder().eval().cuda()
    change = record(model)
    with torch.inference_mode():
        model(features(400))
    with torch.no_grad():
        model.first[0].weight.mul_(2)
    fresh = Vocoder().eval().cuda()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(features(400)), fresh(features(400)))
    assert change.graphs == 1
    model.cpu().cuda()
    with torch.inference_mode():
        assert torch.equal(model(features(400)), fresh(features(400)))


def test_a_failed_capture_leaves_the_device_usable() -> None:
    stream = torch.cuda.current_stream()
    x = features(400)
    recorder = GraphRecorder(x.device)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.sum().item())
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(torch.randn(4, device="cuda")).all(), "the generator counts for no graph any more"
    made = recorder.record(lambda: x.sum())
    made.replay()
    assert torch.equal(made.outputs, x.sum())


def test_a_recording_outlives_those_of_other_recorders() -> None:
    """If a graph goes, late releases of torch free the workspaces of cuBLAS of its stream."""
    x = torch.randn(64, 1024, device="cuda")
    weights = [torch.randn(1024, 1024, device="cuda") for _ in range(40)]
    kept = GraphRecorder(x.device).record(lambda: x @ weights[0])
    for weight in weights:
        GraphRecorder(x.device).record(lambda weight=weight: x @ weight).replay()
        gc.collect()
    taken = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(40)]
    kept.replay()
    assert torch.equal(kept.outputs, x @ weights[0])
    assert all((each == 7).all() for each in taken)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_second_device_is_recorded_too() -> None:
    for index in (0, 1, 0):
        x = torch.randn(64, 64, device=f"cuda:{index}")
        made = GraphRecorder(x.device).record(lambda x=x: x @ x)
        x.normal_()
        made.replay()
        assert torch.equal(made.outputs, x @ x)


def test_a_recording_while_another_thread_computes(seen: list[Event]) -> None:
    model, other = Vocoder().eval().cuda(), Vocoder().eval().cuda()
    stop = threading.Event()
    wrong: list[Exception] = []

    def compute() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():  # type: ignore[no-untyped-call]
                while not stop.is_set():
                    other(features(640)).sum().item()
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        change = record(model)
        with torch.inference_mode():
            for length in (300, 400, 500):
                model(features(length))
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert change.graphs == 3
    assert not [event for event in seen if isinstance(event, FellBack)]


def test_what_is_recorded_is_freed(held: Callable[[], int]) -> None:
    before = held()
    model = Vocoder().eval().cuda()
    change = record(model)
    with torch.inference_mode():
        model(features(4000))
    assert change.graphs == 1
    change.off()
    del model, change
    assert held() <= before + 2**22  # what the libraries keep for themselves


def products(seed: int) -> nn.Module:
    """Products of one row, whose sums cuBLAS divides and puts into a workspace."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(6) for layer in (nn.Linear(4096, 512), nn.Tanh(), nn.Linear(512, 4096))]
    return nn.Sequential(*layers).eval().cuda()


def rows(seed: int) -> torch.Tensor:
    return torch.randn(1, 4096, generator=torch.Generator().manual_seed(seed)).cuda()


def test_a_recording_outlives_those_before_it(held: Callable[[], int]) -> None:
    """torch keeps a workspace of cuBLAS by stream, which goes with any graph of the stream (pytorch issue 193402)."""
    first, model = products(0), products(1)
    with torch.inference_mode():
        expected = [model(rows(seed)) for seed in range(4)]
        others, change = record(first), record(model)
        first(rows(0))
        model(rows(0))
        others.off()
        del others, first
        held()
        filler = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
        assert all(torch.equal(model(rows(seed)), each) for seed, each in enumerate(expected))
    assert change.graphs == 1
    del filler


def test_recordings_of_two_parts_at_once(seen: list[Event]) -> None:
    """They have no memory in common, so no order is kept between them."""
    models = [products(seed) for seed in range(2)]
    with torch.inference_mode():
        expected = [[model(rows(seed)).cpu() for seed in range(8)] for model in models]
        for model in models:  # by one thread, whose handle of cuBLAS both have
            record(model)
            model(rows(0))

        def ask(number: int) -> list[list[torch.Tensor]]:
            with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():  # type: ignore[no-untyped-call]
                return [[models[number](rows(seed)) for seed in range(8)] for _ in range(50)]

        with ThreadPoolExecutor(2) as pool:
            for number, found in enumerate(pool.map(ask, range(2))):
                for each in found:
                    assert all(torch.equal(a.cpu(), b) for a, b in zip(each, expected[number], strict=True))
    assert not [event for event in seen if isinstance(event, FellBack)]


@pytest.mark.parametrize("name", ["mms", "voice-clone", "chatterbox", "xtts"])
def test_a_systems_parts(name: str, seen: list[Event]) -> None:
    torch.manual_seed(0)
    try:
        built = systems.SYSTEMS[name].build("tiny", None, "cuda")
    except MissingExtraError as missing:
        pytest.skip(f"upstream's package of {name} is not installed: {missing}")

    def speak() -> list[torch.Tensor]:
        with seeded("cuda"), torch.inference_mode():
            return [t for t in _pytree.tree_leaves(built.speak(0.8)) if isinstance(t, torch.Tensor)]

    expected = speak()
    for part in describe(built.model).parts:
        stage = RecordedPartsStage()
        if stage.applies(part) is None:
            change = stage.prepare(part)
            change.on()
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(speak(), expected, strict=True)), part.name
            assert change.graphs or any(isinstance(event, FellBack) for event in seen), part.name
            change.off()
