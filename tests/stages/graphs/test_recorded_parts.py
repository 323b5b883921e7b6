"""Parts recorded by shape, as far as a CPU can show it: a recording runs again, and fails where a graph would be wrong.

Nothing here ran on a device; tests/cuda/test_recorded_parts.py is for one.
"""

from __future__ import annotations

import gc
import importlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import nn

from accelerate_tts import Event
from accelerate_tts.cli.bench import systems
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.events import FellBack, NotApplied, Recompiled
from accelerate_tts.models import describe
from accelerate_tts.plan import Part
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.graphs.obstacles import Look, ObstacleError, look
from accelerate_tts.stages.graphs.recorded_parts import PartBounds, RecordedPartsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.exclusions import obstacle
from reruns import Reruns

pytestmark = pytest.mark.usefixtures("one_thread")


class Body(nn.Module):
    """Some convolutions, with what a test puts in their middle."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 8, 1), nn.Tanh())
        self.last = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 4, 1), nn.Tanh())
        self.register_buffer("table", torch.ones(1, 8, 1))
        self.number = torch.tensor([2])
        self.factor = 1.5
        self.between = between

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        y = self.first(x) * self.factor * self.table
        if self.between is not None:
            y = self.between(self, y)
        return self.last(y * scale)


class Recorded:
    """A module with the stage on, over recordings that run again."""

    def __init__(
        self, module: nn.Module, bounds: PartBounds | None = None, kind: Any = "vocoder", **options: Any
    ) -> None:
        self.recorders: list[Reruns] = []
        self.module: Any = module.eval()
        how = {name: options.pop(name) for name in ("fault", "watched") if name in options}

        def recorder(device: torch.device) -> Reruns:
            self.recorders.append(Reruns(device, **how))
            return self.recorders[-1]

        self.stage = RecordedPartsStage(recorder, bounds=bounds or PartBounds(), **options)
        self.part = Part("part", kind, module)
        assert self.stage.applies(self.part) is None
        self.change = self.stage.prepare(self.part)
        self.change.on()

    @property
    def replays(self) -> int:
        return sum(recorder.replays for recorder in self.recorders)

    def untouched(self, *args: Any, **kwargs: Any) -> Any:
        self.change.off()
        try:
            with torch.inference_mode():
                return self.module(*args, **kwargs)
        finally:
            self.change.on()

    def check(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; the result must be that of the untouched one, bit for bit, with its strides."""
        expected = self.untouched(*args, **kwargs)
        with torch.inference_mode():
            found = self.module(*args, **kwargs)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        return found


def wave(length: int = 12, seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, length, generator=torch.Generator().manual_seed(seed))


def reasons(seen: list[Event], kind: type[Event]) -> list[str]:
    return [str(event) for event in seen if isinstance(event, kind)]


# --- which calls are recorded ----------------------------------------------------------------------------------------


def test_the_second_call_of_a_kind_is_recorded_in_service_and_the_third_gains() -> None:
    recorded = Recorded(Body(), kind="estimator")
    recorded.change.end_warmup()
    graphs = []
    for step in range(10):  # an estimator's steps
        recorded.check(wave(seed=step))
        graphs.append((recorded.change.graphs, recorded.replays))
    assert graphs == [(0, 0), *((1, count) for count in range(1, 10))]


def test_during_tuning_the_first_call_is_recorded_since_it_is_compared() -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    assert (recorded.change.graphs, recorded.replays) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [
        (wave(13),),
        (wave(12, rows=1),),
        (wave(12).transpose(0, 1).contiguous().transpose(0, 1),),
        (wave(12), 2.0),
        (wave(12), 1),
        (wave(12)[:, :, :].double().float()[:1].expand(2, 4, 12),),
        (torch.randn(2 * 4 * 12 + 1)[1:].view(2, 4, 12),),
    ],
    ids=["length", "rows", "strides", "number", "type of a number", "no stride", "alignment"],
)
def test_another_kind_of_call_is_another_recording(other: Any) -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    recorded.check(*other)
    recorded.check(wave(seed=3))
    recorded.check(*other)
    assert recorded.change.graphs == 2
    assert recorded.replays == 4


def test_modes_are_a_part_of_the_kind() -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    with torch.no_grad():
        found = recorded.module(wave())
    assert not found.is_inference()
    assert recorded.change.graphs == 2
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = recorded.module(wave())
        again = recorded.module(wave())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, again)
    assert recorded.change.graphs == 3
    recorded.module(wave())  # with gradients
    assert recorded.change.graphs == 3


@pytest.mark.parametrize("flag", ["allow_tf32", "convolutions"])
def test_the_flags_of_onednn_are_a_part_of_the_kind(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for the flags by which XPU chooses kernels, which torch without XPU does not keep."""
    recorded = Recorded(Body())
    made = []
    for value in (False, True, False):
        convolutions = SimpleNamespace(fp32_precision="tf32" if flag == "convolutions" and value else "none")
        flags = SimpleNamespace(allow_tf32=flag == "allow_tf32" and value, conv=convolutions)
        with monkeypatch.context() as scope:
            scope.setattr(torch.backends, "mkldnn", flags)
            with torch.inference_mode():
                recorded.module(wave())
        made.append(recorded.change.graphs)
    assert made == [1, 2, 2]


def test_results_are_the_callers_own() -> None:
    """Views of one result, an argument that is returned, and gaps between rows stay what they were."""

    class Returns(Body):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:  # type: ignore[override]
            mean, deviation = self.last(self.first(x)).chunk(2, 1)
            return {"stats": (mean, deviation), "mask": mask, "same": mean, "length": x.shape[-1]}

    recorded = Recorded(Returns())
    mask = torch.ones(2, 1, 12)
    expected = recorded.untouched(wave(), mask)
    with torch.inference_mode():
        recorded.module(wave(), mask)
        found, other = recorded.module(wave(), mask), recorded.module(wave(seed=5), mask)
    assert found["mask"] is mask
    assert found["same"] is found["stats"][0]
    assert found["length"] == 12
    for a, b in zip(found["stats"], expected["stats"], strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert found["stats"][0].untyped_storage().data_ptr() == found["stats"][1].untyped_storage().data_ptr()
    assert not torch.equal(other["stats"][0], found["stats"][0]), "the next replay has overwritten it"


# --- what cannot be recorded -----------------------------------------------------------------------------------------


def asks(module: Any, y: torch.Tensor) -> torch.Tensor:
    return y + 1 if float(y.sum()) > 0 else y - 1


def selects(module: Any, y: torch.Tensor) -> torch.Tensor:
    return y[:, :, y.abs().sum((0, 1)) > 0]


def draws(module: Any, y: torch.Tensor) -> torch.Tensor:
    return y + torch.randn_like(y)


def keeps(module: Any, y: torch.Tensor) -> torch.Tensor:
    module.last_seen = y
    return y


def counts(module: Any, y: torch.Tensor) -> torch.Tensor:
    module.table.add_(1)
    return y


def reads_its_own(module: Any, y: torch.Tensor) -> torch.Tensor:
    return y * int(module.number)


def inverts(module: Any, y: torch.Tensor) -> torch.Tensor:
    spectrum = torch.stft(y.flatten(0, 1), 4, window=torch.hann_window(4), return_complex=True)
    return torch.istft(spectrum, 4, window=torch.hann_window(4), length=y.shape[-1]).view_as(y)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (asks, "aten._local_scalar_dense.default reads a value from the device"),
        (selects, "the size of the result of aten.index.Tensor depends on values"),
        (draws, "aten.randn_like.default draws random numbers"),
        (keeps, "its forward sets last_seen of a Body"),
        (counts, "aten.add_.Tensor writes into a tensor that it was given or keeps"),
        (inverts, "reads a value from the device"),
        (reads_its_own, "aten._local_scalar_dense.default reads a value from the device"),
    ],
)
def test_what_is_in_the_way_is_named_and_what_lies_around_it_is_recorded(
    between: Any, reason: str, seen: list[Event]
) -> None:
    recorded = Recorded(Body(between))
    table = recorded.module.table.clone()
    torch.manual_seed(3)
    expected = recorded.untouched(wave())
    state = torch.get_rng_state()
    recorded.module.table.copy_(table)
    for _ in range(2):
        torch.manual_seed(3)
        recorded.module.table.copy_(table)
        with torch.inference_mode():
            assert torch.equal(recorded.module(wave()), expected)
        assert torch.equal(torch.get_rng_state(), state), "the trace draws nothing"
    assert recorded.change.graphs == 2
    assert recorded.replays == 4
    (told,) = reasons(seen, NotApplied)
    assert reason in told
    assert "the modules inside it are recorded" in told
    assert not reasons(seen, FellBack)


def whole_number(_module: Any, y: torch.Tensor) -> torch.Tensor:
    count = torch.IntTensor([4])[0]
    return torch.cat([y[:, :count].tanh(), y[:, count:]], 1)


def bounds(_module: Any, y: torch.Tensor) -> torch.Tensor:
    low, high = torch.tensor(-0.25), torch.tensor(0.25)
    assert low < high
    return y.clamp(low, high)


def attends(_module: Any, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])[0]


def test_attention_without_dropout_draws_nothing(seen: list[Event]) -> None:
    """torch passes arguments on without those that are as by default, such as no dropout."""
    recorded = Recorded(Body(attends))
    expected = recorded.untouched(wave())
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(recorded.module(wave()), expected)
    assert recorded.change.graphs == 1
    assert not seen


@pytest.mark.parametrize("between", [whole_number, bounds])
def test_a_number_of_the_host_is_a_constant(between: Any) -> None:
    """VITS's WaveNet makes a tensor of its width in each call, and reads it: that is no value of the device."""
    recorded = Recorded(Body(between))
    recorded.check(wave())
    recorded.check(wave(seed=1))
    assert (recorded.change.graphs, recorded.replays) == (1, 2)


def test_a_part_in_which_nothing_can_be_recorded_is_given_up_with_the_reason(seen: list[Event]) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = self.layer(x).tanh()
            return x * float(x.max())

    recorded = Recorded(Asks())
    recorded.check(torch.ones(2, 4))
    assert recorded.change.graphs == 0, "the trial says so, too"
    (told,) = reasons(seen, FellBack)
    assert "aten._local_scalar_dense.default reads a value from the device in Asks" in told


@pytest.mark.parametrize(
    ("given", "reason", "inside"),
    [
        ((wave(), object()), "it is given a object", 2),
        ((wave().to_sparse(),), "of another layout", 0),
        ((torch.empty(2, 4, 12, device="meta"),), "it is given a tensor on meta", 0),
    ],
)
def test_arguments_that_no_recording_can_serve_are_upstreams(
    given: Any, reason: str, inside: int, seen: list[Event]
) -> None:
    class Takes(Body):
        def forward(self, x: torch.Tensor, other: object = None) -> Any:  # type: ignore[override]
            return x if x.layout is not torch.strided or x.device.type == "meta" else super().forward(x)

    recorded = Recorded(Takes())
    with torch.inference_mode():
        recorded.module(*given)
    assert recorded.change.graphs == inside
    assert reason in reasons(seen, NotApplied)[0]


@pytest.mark.parametrize("make", [lambda: torch.ones(12), lambda: torch.tensor(1.5)], ids=["tensor", "number"])
def test_a_copy_between_host_and_device_is_found_without_a_device(make: Callable[[], torch.Tensor]) -> None:
    def run(tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].tanh() + make().to("meta")

    with pytest.raises(ObstacleError, match="copies between the host and the device"):
        look(run, Body(), [torch.empty(2, 4, 12, device="meta")])


def test_a_tensor_that_is_made_on_the_device_is_found_without_a_device() -> None:
    """`torch.tensor(1.5, device="cuda")` ends with this operator, on a machine that has one; meta stands in for it."""

    def run(tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].tanh() * torch.ops.aten.lift_fresh(torch.empty((), device="meta"))

    with pytest.raises(ObstacleError, match=r"torch\.tensor copies Python's numbers to the device"):
        look(run, Body(), [torch.empty(2, 4, 12, device="meta")])


@pytest.fixture
def look_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Look]:
    """`look` at tensors that say that they are on a CUDA device."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    found: Callable[..., Look] = importlib.import_module("recordable").look_on_cuda
    return found


def fills(y: torch.Tensor) -> torch.Tensor:
    y = y.tanh()
    y[y > 0] = 0.5
    return y


def writes_places(y: torch.Tensor) -> torch.Tensor:
    y = y.tanh()
    y[torch.arange(2, device=y.device)] = 0.5
    return y


def writes_by_a_mask(y: torch.Tensor) -> torch.Tensor:
    y = y.tanh()
    y[y > 0] = y.amax()
    return y


@pytest.mark.parametrize(
    "run",
    [fills, lambda y: torch.where(y > 0, y, 0.0), lambda y: y.tanh() * torch.tensor(0.5)],
    ids=["a mask", "where", "a product"],
)
def test_a_number_of_the_host_that_a_kernel_is_given_is_no_copy(
    run: Callable[[torch.Tensor], torch.Tensor], look_on_cuda: Callable[..., Look]
) -> None:
    assert look_on_cuda(lambda given: run(given[0]), Body(), [wave()]).launches


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (writes_places, "copies between the host and the device"),
        (writes_by_a_mask, "asks the device for the places of a mask"),
        (lambda y: y.tanh() * y.max().cpu(), "copies between the host and the device"),
    ],
    ids=["places", "a mask", "a value"],
)
def test_what_waits_for_the_device_is_found_without_one(
    run: Callable[[torch.Tensor], torch.Tensor], why: str, look_on_cuda: Callable[..., Look]
) -> None:
    with pytest.raises(ObstacleError, match=why):
        look_on_cuda(lambda given: run(given[0]), Body(), [wave()])


@pytest.mark.parametrize("times", [1, 2])
def test_a_number_that_a_module_keeps_on_the_host_is_no_constant(times: int) -> None:
    body = Body()
    body.number = torch.tensor(2.0)

    def run(tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].tanh() * (body.number * times if times > 1 else body.number)

    with pytest.raises(ObstacleError, match="copies between the host and the device"):
        look(run, body, [torch.empty(2, 4, 12, device="meta")])


class Codec(nn.Module):
    """Its decoder is called by a method of its own, as DAC's is; `forward` does more."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Body()
        self.factor = 1.0

    def forward(self, x: torch.Tensor, how: object = None) -> torch.Tensor:
        del how
        return self.decode(x * 2)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x) * self.factor  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["by its own method", "with an object"])
def test_what_is_inside_is_recorded_where_the_part_itself_cannot_be(how: str, seen: list[Event]) -> None:
    recorded = Recorded(Codec())

    def call(seed: int) -> torch.Tensor:
        with torch.inference_mode():
            if how == "by its own method":
                return recorded.module.decode(wave(seed=seed))  # type: ignore[no-any-return]
            return recorded.module(wave(seed=seed), object())  # type: ignore[no-any-return]

    recorded.change.off()
    expected = [call(seed) for seed in range(3)]
    recorded.change.on()
    for seed in range(3):
        assert torch.equal(call(seed), expected[seed])
    assert (recorded.change.graphs, recorded.replays) == (1, 3)
    assert bool(reasons(seen, NotApplied)) == (how == "with an object")
    recorded.check(wave())  # the whole is recorded by itself where it can be
    recorded.check(wave(seed=1))
    assert (recorded.change.graphs, recorded.replays) == (2, 5)


def test_modules_inside_are_not_recorded_while_the_whole_is_not_due() -> None:
    recorded = Recorded(Codec())
    recorded.change.end_warmup()
    for seed in range(3):
        recorded.check(wave(seed=seed))
    assert (recorded.change.graphs, recorded.replays) == (1, 2)


def turned(_module: Any, y: torch.Tensor) -> torch.Tensor:
    return y.unsqueeze(0).squeeze_(0).tanh()


def test_a_tensor_that_is_turned_where_it_is_is_not_written() -> None:
    """As XTTS's speaker encoder does with its input."""

    class Squeezes(Body):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
            x.squeeze_(1)
            return super().forward(x, scale)

    recorded = Recorded(Squeezes(turned))
    recorded.check(wave())
    recorded.check(wave(seed=1))
    assert (recorded.change.graphs, recorded.replays) == (1, 2)


def test_a_tensor_of_the_callers_gets_its_other_shape() -> None:
    class Squeezes(Body):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
            x.squeeze_(0)
            return super().forward(x, scale)

    recorded = Recorded(Squeezes())
    for _ in range(3):
        given = wave(rows=1)[None]
        with torch.inference_mode():
            recorded.module(given)
        assert given.shape == (1, 4, 12)


def test_a_tensor_that_gets_other_memory_is_no_turned_one() -> None:
    """Its shape stays, and a replay would write two inputs into one memory."""
    given = [wave(), wave(seed=1)]
    with pytest.raises(ObstacleError, match="set_.source_Tensor changes a tensor that it was given or keeps"):
        look(lambda tensors: tensors[0].set_(tensors[1]).tanh(), Body(), given)


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_of_the_module_that_gets_other_memory_keeps_its_own_in_a_trace(
    inference: bool, seen: list[Event]
) -> None:
    """The trace would leave it without any."""

    def keeps(module: Any, y: torch.Tensor) -> torch.Tensor:
        module.table.data = y.mean((0, 2), keepdim=True)
        return y.tanh()

    plain, recorded = Body(keeps), Recorded(Body(keeps))
    if inference:
        with torch.inference_mode():
            recorded.module.table = torch.ones(1, 8, 1)
    for seed in range(3):
        with torch.inference_mode():
            assert torch.equal(recorded.module(wave(seed=seed)), plain(wave(seed=seed)))
    assert torch.equal(recorded.module.table, plain.table)
    assert "its forward sets table.data of a Body" in reasons(seen, NotApplied)[0]


def test_a_module_that_only_a_capture_refuses_is_cut(seen: list[Event]) -> None:
    """As where a library waits for the device, which no trace shows."""
    number = 0

    def fails() -> None:
        nonlocal number
        number += 1
        if number == 1:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    recorded = Recorded(Body(), fault=fails)
    for seed in range(3):
        recorded.check(wave(seed=seed))
    assert recorded.change.graphs == 2
    (told,) = reasons(seen, NotApplied)
    assert "not permitted when stream is capturing; the modules inside it are recorded" in told
    assert not reasons(seen, FellBack)


def test_a_failed_recording_costs_one_event_and_gives_everything_back(seen: list[Event]) -> None:
    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    recorded = Recorded(Body(), fault=fails)
    for seed in range(3):
        recorded.check(wave(seed=seed))
    assert [(event.what, event.stage) for event in seen if isinstance(event, FellBack)] == [
        ("part", "recorded by shape")
    ]
    assert (recorded.change.graphs, recorded.change.kept, recorded.change.bytes) == (0, 0, 0)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_and_needs_more_calls_to_come_back() -> None:
    recorded = Recorded(Body(), PartBounds(graphs=2))
    recorded.change.end_warmup()
    for length in (10, 20):
        for _ in range(2):
            recorded.check(wave(length))
    recorded.check(wave(10))
    for _ in range(2):
        recorded.check(wave(30))  # in place of 20
    assert (recorded.change.graphs, recorded.change.kept) == (3, 2)
    assert recorded.recorders[0].finished == 1, "its last replay has to end first"
    for _ in range(5):
        recorded.check(wave(20))
    assert recorded.change.graphs == 3
    recorded.check(wave(20))  # four times as many calls as when it was dropped
    recorded.check(wave(20))
    assert recorded.change.graphs == 4


def test_bytes_are_bounded(seen: list[Event]) -> None:
    recorded = Recorded(Body(), PartBounds(bytes=40_000))
    for length in (20, 40, 80, 120):
        recorded.check(wave(length))
        assert 0 < recorded.change.bytes <= 40_000
    recorded.check(wave(4000))
    recorded.check(wave(4000))
    assert recorded.change.graphs == 4
    assert recorded.change.bytes <= 40_000
    assert any("takes more than 40000 bytes" in told for told in reasons(seen, NotApplied))


def test_recordings_of_about_one_length_share_buffers() -> None:
    recorded = Recorded(Body())
    recorded.check(wave(100))
    before = recorded.change.bytes
    recorded.check(wave(101))
    results = 2 * 4 * 101 * 4
    assert recorded.change.bytes <= before + results + 8 * 2 * 8 * 4  # of the larger intermediate tensors
    recorded.check(wave(100, seed=3))


def test_recording_in_service_is_an_event(seen: list[Event]) -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    recorded.change.end_warmup()
    assert not reasons(seen, Recompiled)
    recorded.check(wave(13))
    recorded.check(wave(13))
    assert "(2, 4, 13)" in reasons(seen, Recompiled)[0]


def test_few_operators_are_not_worth_a_replay(seen: list[Event]) -> None:
    recorded = Recorded(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    recorded.check(torch.ones(2, 4))
    assert recorded.change.graphs == 0
    assert "take less time than a replay" in reasons(seen, FellBack)[0]


# --- weights, hooks, structure ---------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Calls, writes and changes of structure in any order: every result is the untouched module's."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = Recorded(Body(asks), PartBounds(graphs=3, longer=2))
        self.results: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hook: Any = None

    @rule(length=st.sampled_from([8, 9, 16]), seed=st.integers(0, 3), scale=st.sampled_from([1.0, 2.0]))
    def call(self, length: int, seed: int, scale: float) -> None:
        found = self.recorded.check(wave(length, seed), scale)
        self.results = [*self.results[-3:], (found, found.clone())]

    @rule()
    def write_a_weight(self) -> None:
        with torch.no_grad():
            self.recorded.module.first[0].weight.mul_(1.25)
            self.recorded.module.last[0].weight.data.mul_(0.75)  # counts no version

    @rule()
    def exchange_a_weight(self) -> None:
        layer = self.recorded.module.first[0]
        layer.weight = nn.Parameter(layer.weight.detach() * 0.5)

    @rule()
    def load_a_state(self) -> None:
        state = {name: tensor * 0.9 for name, tensor in self.recorded.module.state_dict().items()}
        self.recorded.module.load_state_dict(state)

    @rule()
    def exchange_a_module(self) -> None:
        self.recorded.module.last[1] = nn.ReLU()

    @rule(factor=st.sampled_from([0.5, 1.5]))
    def set_an_attribute(self, factor: float) -> None:
        self.recorded.module.factor = factor

    @rule()
    def hook_a_layer(self) -> None:
        if self.hook is None:
            self.hook = self.recorded.module.first[2].register_forward_hook(lambda _m, _a, output: output * 2)
        else:
            self.hook.remove()
            self.hook = None

    @rule()
    def switch(self) -> None:
        self.recorded.change.off()
        self.recorded.change.on()

    @rule()
    def end_warmup(self) -> None:
        self.recorded.change.end_warmup()

    @invariant()
    def bounds_hold(self) -> None:
        assert self.recorded.change.kept <= 3

    @invariant()
    def results_stay(self) -> None:
        assert all(torch.equal(found, then) for found, then in self.results)


class Whole(Machine):
    """The same with a part that is recorded as one."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded.change.off()
        self.recorded = Recorded(Body(), PartBounds(graphs=3, longer=2))


@pytest.mark.parametrize("machine", [Machine, Whole])
def test_any_order_of_calls_and_changes(machine: Any) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))


def test_writes_in_place_are_served_by_the_same_recording_and_exchanged_weights_are_not() -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    with torch.no_grad():
        recorded.module.first[0].weight.mul_(2)
    recorded.check(wave())
    assert (recorded.change.graphs, recorded.replays) == (1, 2)
    recorded.module.first[0].weight = nn.Parameter(torch.randn(8, 4, 3))
    for _ in range(4):
        recorded.check(wave())
    assert (recorded.change.graphs, recorded.change.kept) == (2, 1)


def test_weights_can_be_swapped_after_a_trace() -> None:
    """torch refuses that for a tensor that something refers to weakly, as the trace did until its garbage was found."""
    gc.disable()
    try:
        recorded = Recorded(Body())
        recorded.check(wave())
        for parameter in recorded.module.parameters():
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.randn_like(parameter)))
        for _ in range(5):
            recorded.check(wave())
        assert recorded.change.graphs == 2
    finally:
        gc.enable()


def test_a_folded_weight_norm_is_followed() -> None:
    module = Body()
    nn.utils.parametrizations.weight_norm(module.first[0])
    fold = FoldStage().prepare(Part("part", "vocoder", module.eval()))
    fold.on()
    recorded = Recorded(module, watched=False)
    recorded.check(wave())
    with torch.no_grad():
        module.first[0].parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr]
    for _ in range(4):
        recorded.check(wave())
    assert recorded.change.graphs == 2
    recorded.change.off()
    fold.off()


def test_hooks_inside_are_called(seen: list[Event]) -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    called: list[int] = []
    recorded.module.first[0].register_forward_hook(lambda *_given: called.append(1))
    for _ in range(6):
        with torch.inference_mode():
            recorded.module(wave())
    assert len(called) == 6
    assert any("hooks" in told for told in reasons(seen, NotApplied))


def test_nothing_is_kept_alive_and_what_runs_is_waited_for() -> None:
    recorded = Recorded(Body())
    recorded.check(wave())
    (recorder,) = recorded.recorders
    recorded.change.off()
    gone = weakref.ref(recorded.change)
    del recorded.change
    gc.collect()
    assert gone() is None
    assert recorder.finished == 1


# --- threads ---------------------------------------------------------------------------------------------------------


def test_eight_threads_share_recordings() -> None:
    recorded = Recorded(Body(asks), PartBounds(graphs=4))
    work = [(length, seed) for seed in range(12) for length in (8, 9, 16)]
    expected = [recorded.untouched(wave(*each)) for each in work]
    start = threading.Barrier(8)

    def ask(number: int) -> list[torch.Tensor]:
        start.wait()
        with torch.inference_mode():
            return [recorded.module(wave(*each)) for each in work[number:] + work[:number]]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(ask, range(8))):
            turned = expected[number:] + expected[:number]
            assert all(torch.equal(a, b) for a, b in zip(found, turned, strict=True))
    assert recorded.change.kept <= 4


# --- upstream's parts ------------------------------------------------------------------------------------------------


def benched(name: str) -> tuple[Any, Callable[[], Any]]:
    """Build a system as the bench does, at small size; return it, and what speaks."""
    try:
        built = systems.SYSTEMS[name].build("tiny", None, "cpu")
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    return built.model, lambda: built.speak(0.4)


def chatterbox(example: Callable[[str], Any], variant: str) -> tuple[Any, Callable[[], Any]]:
    module = example("chatterbox_backend")
    pytest.importorskip(module.VARIANTS[variant][0], reason=f"this release of Chatterbox has no {variant} model")
    model = module.random(seconds=0.4, tiny=True, variant=variant)
    model.ve = None  # speaking does not run it
    return model, lambda: model.generate("Hello there.")


def higgs(example: Callable[[str], Any]) -> tuple[Any, Callable[[], Any]]:
    """With its codec, which the bench leaves out."""
    loaded = example("higgs_backend").random(tiny=True)
    inputs = loaded.prepare("Hello there.")
    return {"model": loaded.model, "codec": loaded.codec}, lambda: loaded.decode(
        loaded.model.generate(**inputs, max_new_tokens=14, do_sample=True)
    )


Making = Callable[[Callable[[str], Any]], tuple[Any, Callable[[], Any]]]
S3GEN = {
    "s3gen.flow.encoder": "aten._local_scalar_dense.default reads a value from the device in UpsampleConformerEncoder",
    "s3gen.flow.decoder.estimator": "aten._local_scalar_dense.default reads a value from the device in ConditionalDe",
    "s3gen.mel2wav": "aten.rand.default draws random numbers in SineGen",
}
SYSTEMS: dict[str, tuple[Making, dict[str, str]]] = {
    "mms": (lambda _example: benched("mms"), {
        "text_encoder": "", "flow": "", "decoder": "",
        "duration_predictor": "aten.randn.default draws random numbers in VitsStochasticDurationPredictor",
    }),
    "voice-clone": (lambda _example: benched("voice-clone"), {"VoiceEncoder": ""}),
    "xtts": (lambda _example: benched("xtts"), {"hifigan_decoder.waveform_decoder": ""}),
    "chatterbox": (partial(chatterbox, variant="english"), S3GEN),
    "chatterbox turbo": (partial(chatterbox, variant="turbo"), S3GEN),
    "higgs": (higgs, {"codec.acoustic_decoder": ""}),
}  # fmt: skip
"""Builders of systems, with their parts that are no decoder: "" for one that is recorded whole, or why it is cut."""


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_systems_parts_are_bit_for_bit_upstreams(name: str, example: Callable[[str], Any], seen: list[Event]) -> None:
    torch.manual_seed(0)
    make, parts = SYSTEMS[name]
    model, say = make(example)

    def speak() -> list[torch.Tensor]:
        with seeded("cpu"), torch.inference_mode():
            return [t for t in torch.utils._pytree.tree_leaves(say()) if isinstance(t, torch.Tensor)]

    expected = speak()
    tried = []
    for part in describe(model).parts:
        stage = RecordedPartsStage(Reruns)
        if stage.applies(part) is not None:
            assert part.kind in {"decoder", "head"}
            continue
        tried.append(part.name)
        seen.clear()
        change = stage.prepare(part)
        change.on()
        try:
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(speak(), expected, strict=True)), part.name
            told, why = reasons(seen, NotApplied), parts[part.name]
            assert change.graphs if why else change.graphs == 1, told
            assert [why in each for each in told] == [True] * bool(why), told
            assert not reasons(seen, FellBack)
        finally:
            change.off()
    assert sorted(tried) == sorted(parts)


# --- where it is tried -----------------------------------------------------------------------------------------------


def test_it_is_tried_where_torch_has_graphs_and_not_for_decoders() -> None:
    def names(device: str) -> list[str]:
        return [stage.name for stage in default_stages(device, None)]

    tried = [device for device in ("cpu", "cuda", "mps", "xpu") if "recorded by shape" in names(device)]
    assert tried == ["cuda", "xpu"]
    stage = RecordedPartsStage(Reruns)
    assert stage.applies(Part("part", "decoder", Body())) == "its decode step is recorded by itself"
    assert RecordedPartsStage().applies(Part("part", "vocoder", Body())) == "torch has no graphs for cpu"


def test_half_precision_is_inside_a_recording_and_not_behind_it() -> None:
    half = HalfStage(torch.bfloat16, carried=True)
    recorded = Recorded(Body(), inside=half, watched=False)
    with torch.inference_mode():
        first, again = recorded.module(wave()), recorded.module(wave())
    assert recorded.change.graphs == 1
    assert torch.equal(first, again)
    assert 1e-4 < float((first - recorded.untouched(wave())).norm() / first.norm()) < 1e-1
    assert obstacle(half, recorded.part) == "its steps are recorded"
