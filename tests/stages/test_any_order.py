"""The real stages in any order and with any fault: once all are off, a module is bit for bit what it was."""

from __future__ import annotations

import contextlib
import errno
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.plan import ModelPlan, Part
from accelerate_tts.runtime.time_limit import WatchdogPolicy, watchdog_policy
from accelerate_tts.settings import Precision
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.compile import inductor, regional
from accelerate_tts.stages.compile import whole as compile_stages
from accelerate_tts.stages.compile.regional import CompiledBlocksStage
from accelerate_tts.stages.compile.whole import CompileStage, FrozenCompileStage
from accelerate_tts.stages.decode import bf16_prefill
from accelerate_tts.stages.decode.bf16_prefill import PromptStage
from accelerate_tts.stages.decode.cuda_graph import CapturedStepStage
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.decode.growing_cache import GrowingCacheStage
from accelerate_tts.stages.decode.recorded_prompts import RecordedPromptsStage
from accelerate_tts.stages.graphs.recorded_parts import RecordedPartsStage
from accelerate_tts.stages.graphs.recorded_pieces import RecordedPiecesStage
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.few_rows import FewRowsStage
from accelerate_tts.stages.layers.half_precision import HalfStage
from accelerate_tts.stages.layers.int8 import QuantizeRecurrentStage, QuantizeStage, engines
from accelerate_tts.stages.layers.short_convolutions import ShortConvolutionStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.stages.protocol import Change, Stage
from accelerate_tts.tuning.baseline import Baseline
from accelerate_tts.tuning.compare import Difference
from accelerate_tts.tuning.exclusions import obstacle
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.policy import current_policy
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import pays_off, tune
from reruns import Reruns


def rerun(device: torch.device) -> Reruns:
    """Return a recorder for a CPU. Unwatched: other stages inside run upstream's forward where they are watched."""
    return Reruns(device, watched=False)


STAGES: tuple[Stage, ...] = (
    FoldStage(), GrowingCacheStage(), ChannelsLastStage(), FusedBlocksStage("fp32"), FusedBlocksStage("bf16"),
    FusedBlocksStage("int8"), PromptStage(), HalfStage(torch.bfloat16, carried=False),
    HalfStage(torch.bfloat16, carried=True), ShortConvolutionStage(), SkinnyStage("fp32"), SkinnyStage("bf16"),
    SkinnyStage("int8"), FewRowsStage(), *map(QuantizeStage, engines()), QuantizeRecurrentStage(), FrozenCompileStage(),
    CompiledBlocksStage("default"), CompileStage("default"), CapturedStepStage(rerun), RecordedPartsStage(rerun),
    RecordedPiecesStage(rerun), RecordedPromptsStage(rerun),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace nothing, and run prompts in bf16 on any processor."""

    def direct(function: Any, _mode: str, counter: Any, **_options: Any) -> Any:
        counter.count("")
        return function

    for module in (compile_stages, regional):
        monkeypatch.setattr(module, "compile_function", direct)
    monkeypatch.setattr(bf16_prefill, "half_dtypes", lambda _device: (torch.bfloat16,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Probe(nn.Module):
    """Point inside a model at which a test acts."""

    def __init__(self) -> None:
        super().__init__()
        self.then: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for then in self.then:
            x = then(x)
        return x


class Tower(nn.Module):
    """Something for every stage that is not about decoders."""

    def __init__(self, norm: Callable[..., Any], bias: bool, recurrent: type[nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(32, 128, 3, padding=1, bias=bias))
        self.up = norm(nn.ConvTranspose1d(128, 128, 4, stride=2, bias=bias))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128, bias=bias), nn.Tanh()) for _ in range(2)
        )
        self.memory: Any = recurrent(128, 128, batch_first=True)
        self.last = norm(nn.Conv1d(128, 4, 1))
        self.probe = Probe()
        self.register_buffer("scale", torch.ones(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.first(x)).transpose(1, 2) * self.scale
        for block in self.blocks:
            y = y + block(y)
        found: torch.Tensor = self.last(self.probe(self.memory(y)[0].transpose(1, 2)))
        return found


def tower(old: bool, bias: bool, recurrent: type[nn.Module]) -> nn.Module:
    norm: Any = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tower(norm, bias, recurrent).eval()


def decoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if name == "GPT2":
        sizes = {"n_embd": 128, "n_inner": 128, "n_layer": 2, "n_head": 4}
    else:
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vocab_size=20, **sizes, **options)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.probe = Probe()
    model.register_forward_hook(_probed)
    return model


def _probed(model: Any, _given: Any, output: Any) -> Any:
    output.last_hidden_state = model.probe(output.last_hidden_state)
    return output


def spoken(model: Any) -> list[torch.Tensor]:
    """Output of a module; of a decoder, for a prompt and the tokens after it."""
    generator = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        if isinstance(model, Tower):
            return [model(torch.randn(1, 32, length, generator=generator)) for length in (2, 9, 30)]
        past = None
        for positions in (6, 1, 1):
            x = torch.randn(2, positions, 128, generator=generator)
            out = model(inputs_embeds=x, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.last_hidden_state.clone())
    return found


class Before:
    """All of a module that a stage could leave changed, and what the module computes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs = spoken(model)
        self.found = self.look()
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def look(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for path, module in self.model.named_modules():
            found.append((f"{path}: class", type(module)))
            for name, value in vars(module).items():
                found.append((f"{path}.{name}", None if isinstance(value, torch.Tensor) else value))
                if isinstance(value, dict):
                    found += [(f"{path}.{name}[{key}]", item) for key, item in value.items()]
                elif isinstance(value, (set, list)):
                    found.append((f"{path}.{name}", tuple(value)))
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            found.append((name, (tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.requires_grad)))
            found.append((name, (tensor.dtype, tensor.stride(), tensor._version)))
        return found

    def assert_untouched(self) -> None:
        now = self.look()
        assert [name for name, _ in now] == [name for name, _ in self.found]
        for (name, then), (_, value) in zip(self.found, now, strict=True):
            assert value is then or (isinstance(then, tuple) and value == then), name
        state = self.model.state_dict()
        assert list(state) == list(self.values)
        assert all(torch.equal(state[name], value) for name, value in self.values.items())
        assert all(torch.equal(a, b) for a, b in zip(spoken(self.model), self.outputs, strict=True))


MODELS: dict[str, Callable[[], Any]] = {
    "convolutions, old norm, LSTM": lambda: tower(True, True, nn.LSTM),
    "convolutions, new norm, GRU": lambda: tower(False, False, nn.GRU),
    "Llama": lambda: decoder("Llama"),
    "GPT2": lambda: decoder("GPT2"),
}


def part_of(model: nn.Module) -> Part:
    is_decoder = not isinstance(model, Tower)
    return Part("part", "decoder" if is_decoder else "vocoder", model, cached=is_decoder)


# Without its explanations: they trace each line, and an interruption that comes in the tracer is lost in it.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.sampled_from(STAGES)),
        st.tuples(st.just("apply"), st.sampled_from(STAGES)),
        st.tuples(st.sampled_from(["undo", "all off", "run"]), st.none()),
        st.tuples(st.just("drop"), st.integers(0, 3)),
    ),
    min_size=3,
    max_size=9,
)


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_applying_and_undoing(name: str) -> None:
    model = MODELS[name]()
    before = Before(model)
    part = part_of(model)
    tried: set[str] = set()

    def play(actions: list[tuple[str, Any]]) -> None:
        changes: list[Change] = []

        def off() -> None:
            for change in reversed(changes):
                change.off()

        for action, what in actions:
            if action == "apply" and obstacle(what, part) is None:
                tried.add(what.name)
                changes.append(what.prepare(part))
                changes[-1].on()
            elif action == "undo" and changes:
                changes.pop().off()
            elif action == "run":
                assert all(bool(tensor.isfinite().all()) for tensor in spoken(model))
            elif action in {"all off", "drop"}:
                off()
                before.assert_untouched()
                if action == "drop" and changes:  # as the check of the whole gives up one of several
                    changes.pop(what % len(changes))
                for change in changes:
                    change.on()
        off()
        before.assert_untouched()

    for stage in STAGES:
        play([("apply", stage), ("run", None)])
        play([("run", None), ("apply", stage), ("run", None), ("apply", stage), ("run", None)])
    play([*(("apply", stage) for stage in STAGES), ("run", None), ("all off", None), ("run", None), ("drop", 0)])
    play([*(("apply", stage) for stage in reversed(STAGES)), ("run", None), ("drop", 1), ("run", None)])
    settings(max_examples=25, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))(
        given(ACTIONS)(play)
    )()
    assert tried >= {stage.name for stage in STAGES if obstacle(stage, part) is None}


@pytest.mark.parametrize("stage", [CompileStage("default"), CompiledBlocksStage("default")], ids=lambda s: s.name)
def test_what_dynamo_has_traced_is_untouched_again(
    stage: Any, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through torch.compile with the cheapest backend."""
    for module in (compile_stages, regional):
        monkeypatch.setattr(module, "compile_function", inductor.compile_function)
    model = tower(False, True, nn.GRU)
    before = Before(model)
    change = stage.prepare(Part("part", "model", model))
    for _ in range(2):
        change.on()
        spoken(model)
        assert change.graphs > 0
        change.off()
        before.assert_untouched()


# --- faults --------------------------------------------------------------------------------------------------------


class EndlessError(Exception):
    """Marks a fault that does not raise, but never returns."""


class NoNumbersError(Exception):
    """Marks a fault that does not raise, but computes NaN."""


FAULTS: tuple[Exception, ...] = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    InvalidCxxCompiler(),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    NoNumbersError(),
    EndlessError(),
)
NAMED = {
    NoNumbersError: "values that are not finite",
    EndlessError: "over the tuning budget, interrupted",
}
CASES = [
    *((fault, point, number) for fault in FAULTS[:-2] for point in ("prepare", "on", "call", "verify", "off")
      for number in range(3)),
    (FAULTS[-2], "call", 0), (FAULTS[-1], "call", 0), (FAULTS[-1], "prepare", 0),  # where a time limit is promised
]  # fmt: skip


class Faulty:
    """A real stage, in which something happens at one point.

    Args:
        stage: The stage.
        point: "prepare", "on", "call" (inside the part, while the stage is in force), "verify" or "off".
        fault: The fault.
        late: True to act after the step, False to act before it.
        number: Number of times that this point is reached before.
    """

    def __init__(self, stage: Stage, point: str, fault: Exception, late: bool, number: int) -> None:
        self._stage, self._point, self._fault, self._late, self._left = stage, point, fault, late, number
        self.name, self.group, self.process, self.times = stage.name, stage.group, False, stage.times
        self.least_share, self.excluded_by = 0.0, stage.excluded_by
        self.fired = False
        self.in_force = False
        self.change: Any = None

    @property
    def graphs(self) -> int | None:
        return self.change.graphs if self.change is not None else None

    def applies(self, part: Part) -> str | None:
        return self._stage.applies(part)

    def cost_of(self, _part: Part) -> float:
        return 0.0

    def prepare(self, part: Part) -> Faulty:
        self.probe = part.module.probe
        self.hit("prepare", early=True)
        self.change = self._stage.prepare(part)
        self.hit("prepare", early=False)
        return self

    def on(self) -> None:
        self.hit("on", early=True)
        self.change.on()
        if not self.in_force:
            self.probe.then.append(self.called)
            self.in_force = True
        self.hit("on", early=False)

    def off(self) -> None:
        self.hit("off", early=True)
        if self.in_force:
            self.probe.then.remove(self.called)
            self.in_force = False
        self.change.off()
        self.hit("off", early=False)

    def end_warmup(self) -> None:
        self.change.end_warmup()

    def called(self, x: torch.Tensor) -> torch.Tensor:
        return self.hit("call", early=not self._late, x=x)

    def hit(self, point: str, *, early: bool, x: Any = None) -> Any:
        """Have it happen, if it is to happen here and now."""
        if point != self._point or early == self._late:
            return x
        self._left -= 1
        if self._left >= 0 or self.fired:
            return x
        self.fired = True
        if isinstance(self._fault, NoNumbersError) and x is not None:
            return x * float("nan")
        while isinstance(self._fault, EndlessError):
            time.sleep(0.002)
        raise self._fault.with_traceback(None)  # else the one of every earlier time goes on growing


@pytest.fixture
def quick(decide: Any) -> Iterator[None]:
    """A machine on which every stage pays off, and a budget that has passed when something hangs."""
    decide(compare=pays_off, looks=False)
    with watchdog_policy(WatchdogPolicy(again=0.05)):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", MODELS)
def test_any_fault_in_a_real_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    before = Before(model)
    part = part_of(model)
    applicable = [stage for stage in STAGES if obstacle(stage, part) is None]
    compared = Baseline.difference

    @settings(max_examples=15, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(
        stage=st.sampled_from(applicable), case=st.sampled_from(CASES), late=st.booleans(), last=st.booleans(),
    )  # fmt: skip
    def check(stage: Stage, case: tuple[Exception, str, int], late: bool, last: bool) -> None:
        fault, point, number = case
        hangs = isinstance(fault, EndlessError)
        faulty = Faulty(stage, point, fault, late, number)

        def difference(baseline: Baseline, part: Part, outputs: list[Any]) -> Difference:
            faulty.hit("verify", early=not late)
            return compared(baseline, part, outputs)

        monkeypatch.setattr(Baseline, "difference", difference)
        others = [other for other in applicable if other is not stage][:2]
        plan = ModelPlan("hangs" if hangs else "model", (model,), (part,))
        calls = warmup_calls(lambda loaded: spoken(loaded), Loaded(model), "inference")
        stages: list[Any] = [*others, faulty] if last else [faulty, *others]
        policy = replace(current_policy(), longest=0.3) if hangs else current_policy()
        tuning = tune(plan, calls, stages, DeviceInfo("cpu", "test"), Limits(60.0, "fast", policy=policy))
        receipt = tuning.receipt
        fired, finite = faulty.fired, all(bool(tensor.isfinite().all()) for tensor in spoken(model))
        with contextlib.suppress(type(fault)):  # it may be the first time that it is switched off
            tuning.undo()
        before.assert_untouched()
        assert finite
        if fired:
            assert NAMED.get(type(fault), type(fault).__name__) in str(receipt), str(receipt)
            # It may happen in the trial of another stage, while this one is in force: then that is the one that failed.
            in_its_own = point not in {"off", "verify"}
            assert not (in_its_own and stage.name in {kept.stage for kept in tuning.kept}), str(receipt)

    check()


@pytest.mark.usefixtures("quick", "layered_caches")
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_caches_that_grow_under_fused_blocks_are_not_tried_again(precision: Precision) -> None:
    """For a full-size decoder it took a fifth of the budget, and int8 was then not tried."""
    model = decoder("Llama")
    part = Part("part", "decoder", model, cached=True)
    wanted = ("growing cache", "fused decoder blocks")
    stages = [stage for stage in default_stages("cpu", "default", precision) if stage.name.startswith(wanted)]
    calls = warmup_calls(lambda loaded: spoken(loaded), Loaded(model), "inference")
    limits = Limits(60.0, precision)
    tuning = tune(ModelPlan("model", (model,), (part,)), calls, stages, DeviceInfo("cpu", "test"), limits)
    tried = [result.stage for result in tuning.receipt.stages]
    assert tried == [stage.name for stage in stages if stage.name != "growing cache"]
    assert len(tuning.kept) == 1
    tuning.undo()
    assert GrowingCacheStage().applies(part) is None


@pytest.mark.usefixtures("quick")
def test_an_alternative_is_replaced_from_below_another_change() -> None:
    """Both give a decoder another class: int8 blocks first, a growing cache over them, then fp32 blocks instead."""

    class OverFusedBlocks(GrowingCacheStage):
        def applies(self, part: Part) -> None:
            """Apply even if the caches grow already."""

    model = decoder("Llama")
    before = Before(model)
    part = Part("part", "decoder", model, cached=True)
    stages = [FusedBlocksStage("int8"), OverFusedBlocks(), FusedBlocksStage("fp32")]
    calls = warmup_calls(lambda loaded: spoken(loaded), Loaded(model), "inference")
    tuning = tune(ModelPlan("model", (model,), (part,)), calls, stages, DeviceInfo("cpu", "test"), Limits(60.0, "fast"))
    assert [kept.stage for kept in tuning.kept] == ["growing cache", "fused decoder blocks (fp32)"]
    tuning.undo()
    before.assert_untouched()
