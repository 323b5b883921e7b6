"""A warm pack takes the place of tuning, is checked before it counts, and never costs more than one event."""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.modeling_outputs import BaseModelOutputWithPast

from accelerate_tts import Event, Receipt, events, optimized_model, optimizer, receipt_of
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.events import FellBack, NotApplied, PackIgnored, Restored, Trying, Tuned, WarmupFailed
from accelerate_tts.inspection.object_tree import find_modules
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore, pack_folder
from accelerate_tts.packs.warm_pack import WarmPack
from accelerate_tts.plan import Head, ModelPlan, Part
from accelerate_tts.settings import Settings
from accelerate_tts.stages.layers.channels_last import ChannelsLastStage
from accelerate_tts.stages.layers.weight_norm import FoldStage
from accelerate_tts.tuning.activate import activate, check
from accelerate_tts.tuning.first_passes import one_pass
from accelerate_tts.tuning.ledger import Ledger
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.tune import find
from accelerate_tts.tuning.warmup import Loaded, WarmupCall, WarmupCalls, warmup_calls
from doubles import Stage, begin_process, pays_off

MEL = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(1))
MEGABYTE = 1 << 20
CPU = DeviceInfo("cpu", "test")


class Stack(nn.Module):
    """A few weight-normed convolutions, with hyper-parameters that change no shape of a weight."""

    def __init__(self, *, dilation: int = 1, stride: int = 1, slope: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(8, 8, 3, padding=dilation, dilation=dilation, stride=stride)) for _ in range(3)
        )
        self.slope = slope
        self.offset = 0.0
        self.eval()

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            mel = nn.functional.leaky_relu(conv(mel), self.slope)
        return mel.mean(1) + self.offset


@pytest.fixture(autouse=True)
def packs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Packs are on, in a folder of the test's own, which is not there yet."""
    monkeypatch.setenv("ACCELERATE_TTS_PACK", "1")
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "packs"))
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    monkeypatch.setenv("ACCELERATE_TTS_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "packs"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, decide: Any) -> Iterator[None]:
    looks = (0.2 * 0.97**number for number in itertools.count())  # each is faster than the one before
    decide(compare=pays_off, look=lambda *_: next(looks))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The only stage that there is."""
    made = Stage(offset=1e-9)
    use(monkeypatch, made)
    return made


def use(monkeypatch: pytest.MonkeyPatch, *stages: Any) -> None:
    monkeypatch.setattr("accelerate_tts.stages.catalogue.default_stages", lambda *_: stages)


def load(make: Callable[[], Any] = Stack, **options: Any) -> Any:
    return optimized_model(**{"warmup": MEL, **options})(lambda: make())()


def happened(seen: list[Event]) -> Counter[str]:
    """Count the events by kind, without those of every load, and forget them."""
    found = Counter(type(event).__name__ for event in seen)
    seen.clear()
    del found["Prepared"]
    return found


def receipt(model: Any) -> Receipt:
    found = receipt_of(model)
    assert found is not None
    return found


def kept(model: Any) -> list[tuple[str, str]]:
    return [(result.part, result.stage) for result in receipt(model).kept]


def speak(model: nn.Module, mel: torch.Tensor = MEL) -> torch.Tensor:
    with torch.no_grad():
        return model(mel)


def state(model: nn.Module) -> Any:
    """State that a stage might have left changed."""
    modules = [
        (name, type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))}, m._compiled_call_impl,
         list(m._buffers), list(m._forward_pre_hooks), list(m._load_state_dict_post_hooks))
        for name, m in model.named_modules()
    ]  # fmt: skip
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}, speak(model)


def assert_untouched(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert list(found[1]) == list(expected[1])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    assert torch.equal(found[2], expected[2])


@pytest.fixture
def meanwhile() -> Iterator[list[tuple[Any, Any]]]:
    """With `watch(model)`: the model's state before it was loaded, and when a pack was ignored."""
    states: list[Any] = []
    model: list[nn.Module] = []

    def hook(event: Event) -> None:
        if isinstance(event, PackIgnored):
            states.append(state(model[0]))

    remove = events.add_hook(hook)
    found: Any = _Meanwhile(model, states)
    yield found
    remove()


class _Meanwhile:
    def __init__(self, model: list[nn.Module], states: list[Any]) -> None:
        self.model, self.states = model, states

    def watched(self, make: Callable[[], nn.Module] = Stack) -> nn.Module:
        self.model[:] = [make()]
        self.before = state(self.model[0])
        return self.model[0]

    def assert_untouched(self) -> None:
        (then,) = self.states
        assert_untouched(then, self.before)


# --- the same object again -----------------------------------------------------------------------------------------


def test_the_second_load_tries_nothing_and_is_the_same(seen: list[Event], packs: Path) -> None:
    first = load()
    assert {stage for _, stage in kept(first)} >= {"fold weight norm", "channels-last convolutions"}
    assert happened(seen).keys() == {"Trying", "Tuned"}
    assert len(list(packs.glob("*.pack"))) == 1

    second, untouched = Stack(), Stack()
    before = state(second)
    load(lambda: second)
    assert happened(seen) == {"Restored": 1}
    assert kept(second) == [entry for entry in kept(first) if entry[0] != "process"]  # of which one is enough
    assert [type(module) for module in second.modules()] != [entry[1] for entry in before[0]]  # stages are in force
    assert torch.equal(speak(second), speak(first))
    torch.testing.assert_close(speak(second), speak(untouched), rtol=1e-4, atol=1e-6)
    assert list(second.state_dict()) == list(untouched.state_dict())
    assert optimizer.get_performance_optimizer().undo(second)
    assert_untouched(state(second), before)
    assert torch.equal(speak(first), speak(load()))  # undoing one of them is no matter of the others


def test_the_receipt_says_where_it_comes_from(stage: Stage) -> None:
    one, two = receipt(load()), receipt(load())
    assert two.stages == one.stages
    assert (two.ratio, two.error, two.precision, two.versions) == (one.ratio, one.error, "exact", one.versions)
    *same, origin, guard = two.notes
    assert origin.startswith("from a warm pack: tuned for ")
    assert (*same, guard) == one.notes
    assert two.cold is not None
    assert two.recompiles == 0
    assert Receipt.from_json(two.to_json()) == two


def test_the_name_is_that_of_the_object_now(stage: Stage, seen: list[Event]) -> None:
    class Voice:
        def __init__(self) -> None:
            self.model = Stack()

    class Speaker(Voice):
        pass

    first, second = (load(make, warmup=lambda loaded: loaded.model(MEL)) for make in (Voice, Speaker))
    assert happened(seen)["Restored"] == 1
    assert [receipt(item).what for item in (first, second)] == ["Voice", "Speaker"]


def test_a_pack_that_kept_nothing_saves_the_tuning_too(stage: Stage, seen: list[Event]) -> None:
    stage.attributes = {"offset": 9.0}
    assert kept(load()) == []
    happened(seen)
    model = Stack()
    before = state(model)
    load(lambda: model)
    assert happened(seen) == {"Restored": 1}
    assert_untouched(state(model), before)


def test_packs_are_off_where_the_settings_say_so(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], packs: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PACK", "0")
    load(), load()
    assert happened(seen)["Tuned"] == 2
    assert not packs.exists()


def test_without_a_warm_up_nothing_is_written_or_read(stage: Stage, packs: Path) -> None:
    load(warmup=None)
    assert not packs.exists()


def test_vits_and_several_roots_in_one_object(seen: list[Event]) -> None:
    from transformers import VitsConfig, VitsModel

    def vits() -> VitsModel:
        torch.manual_seed(0)
        config = VitsConfig(
            vocab_size=38, hidden_size=16, num_hidden_layers=1, ffn_dim=32, flow_size=16, spectrogram_bins=17,
            upsample_initial_channel=32, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]], duration_predictor_filter_channels=16, prior_encoder_num_flows=2,
            posterior_encoder_num_wavenet_layers=1,
        )  # fmt: skip
        return VitsModel(config).eval()

    ids = torch.randint(1, 37, (1, 12), generator=torch.Generator().manual_seed(0))

    class Backend:
        def __init__(self) -> None:
            self.voice, self.post = vits(), Stack()

        def speak(self) -> torch.Tensor:
            torch.manual_seed(1)
            wave = self.voice(ids).waveform
            return self.post(wave[:, : wave.shape[-1] // 8 * 8].reshape(1, 8, -1))

    first, second = (load(Backend, warmup=lambda backend: backend.speak()) for _ in range(2))
    assert happened(seen)["Restored"] == 1
    assert kept(second) == [entry for entry in kept(first) if entry[0] != "process"]
    assert {part.split(".")[0] for part, _ in kept(second)} >= {"voice", "post"}
    with torch.no_grad():
        torch.testing.assert_close(second.speak(), first.speak(), rtol=1e-4, atol=1e-6)
        assert optimizer.get_performance_optimizer().undo(second)
        assert torch.equal(second.speak(), Backend().speak())


# --- another process -----------------------------------------------------------------------------------------------

CHILD = """
import itertools, json, os, sys
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from accelerate_tts import add_hook, optimized_model, optimizer, receipt_of
from accelerate_tts.packs import compiler_cache
from accelerate_tts.tuning import policy
from accelerate_tts.tuning.timing import Timing

# Stand-in for a machine on which every stage pays off.
def pays_off(run, before, after, *_, **__):
    for switch in (before, after):
        switch(), run()
    return Timing(2.0, 1.0, 2.0, 1.9, 2.1, 5)
looks = (0.2 * 0.97**number for number in itertools.count())
scope = policy.tuning_policy(policy.TuningPolicy(compare=pays_off, look=lambda *_: next(looks)))
scope.__enter__()

unpacked = []
unpack = compiler_cache.unpack
compiler_cache.unpack = lambda archive: unpacked.append(unpack(archive))

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(weight_norm(nn.Conv1d(8, 8, 3, padding=1)) for _ in range(3))
    def forward(self, mel):
        for conv in self.convs:
            mel = torch.tanh(conv(mel)) * 0.9 + 0.1
        return mel

mel = torch.linspace(-1, 1, 8 * 24).view(1, 8, 24)
seen = []
add_hook(lambda event: seen.append(type(event).__name__))
model = optimized_model(warmup=mel)(lambda: Stack().eval())()
with torch.inference_mode():
    tuned, plain = model(mel), Stack().eval()(mel)
receipt = receipt_of(model)
counters = {}
if "torch._dynamo.utils" in sys.modules:
    counters = dict(sys.modules["torch._dynamo.utils"].counters["inductor"])
optimizer.get_performance_optimizer().undo(model)
with torch.inference_mode():
    undone = torch.equal(model(mel), plain)
print(json.dumps({
    "events": seen, "kept": [(s.part, s.stage) for s in receipt.kept], "output": tuned.flatten().tolist(),
    "error": float((tuned - plain).norm() / plain.norm()), "undone": undone, "unpacked": unpacked,
    "hits": counters.get("fxgraph_cache_hit", 0), "misses": counters.get("fxgraph_cache_miss", 0),
}))
"""


def in_a_process(code: str = CHILD) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files(folder: Path, suffix: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}")}


def removed(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


BOTH = """
from accelerate_tts.stages import catalogue
from accelerate_tts.stages.compile.whole import CompileStage
from accelerate_tts.stages.layers.skinny import SkinnyStage

catalogue.default_stages = lambda *_: (SkinnyStage("fp32"), CompileStage("default"))

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(256, 256)
    def forward(self, mel):
        return torch.tanh(self.linear(mel)) * 0.9 + 0.1

mel = torch.linspace(-1, 1, 2 * 256).view(2, 256)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the compiler that takes notes is a shell script")
def test_another_process_with_compiled_code_from_the_pack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packs: Path
) -> None:
    """Graphs and our own kernels; also where all had been compiled before, so that tuning only found it there.

    The compiler's folder is wiped in between, as a reboot does with a temporary one.
    """
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of workers to start,
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # and no header for a hundred kernels
    compiler, notes, cache = tmp_path / "g++", tmp_path / "notes", tmp_path / "inductor"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -o "*) echo "$*" >> {notes};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    start, end = CHILD.index("class Stack"), CHILD.index("seen = []")
    child = CHILD[:start] + BOTH + CHILD[end:]
    first = in_a_process(child)
    assert first["kept"] == [["Stack", "skinny linear layers (fp32)"], ["Stack", "torch.compile"]]
    assert (first["misses"] > 0, first["unpacked"]) == (True, [])
    assert notes.exists()
    notes.unlink()
    for known in (False, True):
        if known:
            removed(packs)
            again = in_a_process(child)
            assert (again["kept"], again["events"].count("Tuned")) == (first["kept"], 1)
            assert (again["hits"] > 0, again["misses"]) == (True, 0)
        removed(cache)
        second = in_a_process(child)
        assert second["events"] == ["Prepared", "Restored", "Undone"]
        assert (second["kept"], second["output"]) == (first["kept"], first["output"])
        assert second["unpacked"][0] > 0
        assert second["error"] < 1e-4
        assert second["undone"]
        assert (second["hits"] > 0, second["misses"]) == (True, 0)
        assert not notes.exists(), "nothing was compiled again"


# --- what makes another key ----------------------------------------------------------------------------------------


def bent(change: Callable[[Stack], object]) -> Callable[[], Stack]:
    def make() -> Stack:
        model = Stack()
        with torch.no_grad():
            change(model)
        return model

    return make


@pytest.mark.parametrize(
    "other",
    [
        {"make": bent(lambda m: m.convs[2].bias[7].add_(1e-6))},
        {"make": bent(lambda m: [p.mul_(0.9) for p in m.parameters()])},
        {"make": lambda: Stack(stride=2)},
        {"make": lambda: Stack(dilation=2)},
        {"make": lambda: Stack(slope=0.2)},
        {"make": lambda: Stack().double(), "warmup": MEL.double()},
        {"precision": "balanced"},
        {"lengths": (8, 32)},
        {"mode": "no_grad"},
        {"warmup": MEL[..., :8]},
        {"warmup": lambda model: model(MEL)},
    ],
    ids=lambda other: next(reversed(other)) if isinstance(other, dict) else "",
)
def test_another_model_or_option_is_tuned_for_itself(
    other: dict[str, Any], stage: Stage, seen: list[Event], packs: Path
) -> None:
    load()
    happened(seen)
    load(**other)
    assert happened(seen)["Restored"] == 0
    assert len(list(packs.glob("*.pack"))) == 2
    load(**other), load()
    assert happened(seen)["Restored"] == 2


@pytest.mark.parametrize("what", ["torch", "ours", "threads", "processor", "kernels", "stages", "compile mode", "TF32"])
def test_another_machine_or_version_is_tuned_for_itself(
    what: str, monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], packs: Path
) -> None:
    load()
    threads = torch.get_num_threads()
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif what == "ours":
        monkeypatch.setattr("accelerate_tts.packs.warm_pack.__version__", "9.9.9")
    elif what == "threads":
        torch.set_num_threads(threads + 1)
    elif what == "processor":  # stand-in for another one
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    elif what == "kernels":  # the first load was in a wheel without them
        monkeypatch.setattr("accelerate_tts.packs.warm_pack.level", lambda: "none")
    elif what == "stages":
        use(monkeypatch, stage, Stage("another"))
    else:
        name = {"compile mode": "COMPILE_MODE", "TF32": "TF32"}[what]
        monkeypatch.setenv(f"ACCELERATE_TTS_{name}", {"TF32": "0"}.get(name, "max-autotune"))
        begin_process()
    happened(seen)
    try:
        load()
        assert happened(seen)["Restored"] == 0
        assert len(list(packs.glob("*.pack"))) == 2
    finally:
        torch.set_num_threads(threads)


def test_random_warm_up_tensors_have_one_pack(stage: Stage, seen: list[Event]) -> None:
    load(warmup=torch.rand(1, 8, 24)), load(warmup=torch.rand(1, 8, 24))
    assert happened(seen)["Restored"] == 1


def test_a_larger_budget_gives_what_was_left_out_its_chance(
    stage: Stage, seen: list[Event], meanwhile: _Meanwhile
) -> None:
    load(tune_seconds=0.0)
    happened(seen)
    assert kept(load(tune_seconds=0.0)) == []
    assert happened(seen) == {"Restored": 1}
    model = load(lambda: meanwhile.watched())
    assert kept(model) == [("Stack", "test stage")]
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}
    meanwhile.assert_untouched()
    assert kept(load(tune_seconds=0.0)) == [("Stack", "test stage")]  # a smaller one takes what a larger one found
    assert happened(seen) == {"Restored": 1}


# --- packs that do not fit -----------------------------------------------------------------------------------------


def edited(packs: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, **fields: Any) -> None:
    """Change the decisions of the only pack, and sign it as its owner would."""
    store = PackStore(packs, MEGABYTE)
    (entry,) = store.entries()
    pack = store.read(entry.key)
    assert pack is not None
    decisions = copy.deepcopy(dict(pack.decisions))
    change(decisions)
    assert store.write(Pack(pack.key, decisions, **{"artifacts": pack.artifacts, **fields}))


def first_entry(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda decisions: decisions["kept"][0].update(fields)


def receipt_text(change: Callable[[str], str]) -> Callable[[dict[str, Any]], object]:
    return lambda decisions: decisions.update(receipt=change(decisions["receipt"]))


def archive(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        file.addfile(entry)
    return buffer.getvalue()


FAULTS: dict[str, tuple[Any, str]] = {
    "an unknown stage": (first_entry(stage="turbo"), "no stage 'turbo'"),
    "a path that is gone": (first_entry(path="convs.7"), "has no attribute"),
    "a root that is gone": (first_entry(root=3), "IndexError"),
    "a path that is no text": (first_entry(path=3), "3 is no text"),
    "a part that is no text": (first_entry(part={"a": 1}), "is no text"),
    "an entry that is no mapping": (lambda d: d["kept"].append(3), "TypeError"),
    "a field that is missing": (lambda d: d["kept"][0].pop("path"), "path"),
    "nothing at all": (lambda d: d.clone() if hasattr(d, "clone") else d.clear(), "KeyError"),
    "kept is a number": (lambda d: d.update(kept=3), "TypeError"),
    "one name for two parts": (
        lambda d: d["kept"].append({**d["kept"][0], "path": "convs.0"}), "name of two parts"
    ),
    "a budget that is no number": (lambda d: d.update(tune_seconds="long"), "TypeError"),
    "an empty receipt": (receipt_text(lambda _: ""), "Expecting value"),
    "half a receipt": (receipt_text(lambda text: text[: len(text) // 2]), "Error"),
    "a receipt of another format": (receipt_text(lambda text: text.replace('"format": 1', '"format": 7')), "format 7"),
    "a receipt that is a list": (lambda d: d.update(receipt=[1]), "ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_decisions_that_do_not_fit(
    name: str, stage: Stage, seen: list[Event], packs: Path, meanwhile: _Meanwhile
) -> None:
    expected = kept(load())
    change, reason = FAULTS[name]
    edited(packs, change)
    happened(seen)
    model = load(lambda: meanwhile.watched())
    (event,) = [event for event in seen if isinstance(event, PackIgnored)]
    assert event.what == "the warm pack of Stack"
    assert reason in event.reason
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}
    meanwhile.assert_untouched()
    assert kept(model) == expected
    load()
    assert happened(seen) == {"Restored": 1}  # the tuning has left a good one


def test_a_forged_receipt_is_shown_and_its_model_is_as_loaded(
    stage: Stage, seen: list[Event], packs: Path, meanwhile: _Meanwhile
) -> None:
    """All that decisions of somebody without the key can do beside choosing among the stages."""
    assert kept(load())
    (entry,) = PackStore(packs, MEGABYTE).entries()
    pack = PackStore(packs, MEGABYTE).read(entry.key)
    assert pack is not None
    told = {**json.loads(pack.decisions["receipt"]), "ratio": 99.0}
    forged = {**pack.decisions, "kept": [], "receipt": json.dumps(told)}
    assert PackStore(packs, MEGABYTE, b"theirs").write(Pack(entry.key, forged, b"code"))
    happened(seen)
    model = load(lambda: meanwhile.watched())
    assert happened(seen) == {"PackIgnored": 1, "Restored": 1}
    assert receipt(model).ratio == 99.0
    assert_untouched(state(model), meanwhile.before)


@pytest.mark.parametrize(
    "artifacts",
    [b"", b"no archive", archive("x")[:20], archive("../evil"), archive("a", tarfile.SYMTYPE), None],
    ids=["empty", "no archive", "cut short", "parent", "link", "absolute"],
)
def test_artifacts_that_are_no_archive_or_leave_their_folder(
    artifacts: bytes | None, stage: Stage, seen: list[Event], packs: Path, tmp_path: Path, meanwhile: _Meanwhile
) -> None:
    load()
    edited(packs, artifacts=archive(str(tmp_path / "evil")) if artifacts is None else artifacts)
    happened(seen)
    model = load(lambda: meanwhile.watched())
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}
    meanwhile.assert_untouched()
    assert kept(model)
    assert not (tmp_path / "evil").exists()


class Shelf:
    """Stand-in for the store, with one pack in it."""

    decisions: Any = None

    def write(self, pack: Pack) -> bool:
        self.decisions = pack.decisions
        return True

    def read(self, key: str) -> Pack:
        return Pack(key, self.decisions)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["", "process", "convs.0", "fold weight norm", "test stage", "Stack", "{}", -1, 0, 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["kept", "receipt", "tune_seconds", "part", "stage", "path", "root", "kind", "decides"]
    ), inner, max_size=6),
    max_leaves=8,
)  # fmt: skip


def test_any_decisions_are_refused_or_right() -> None:
    """Any JSON at all, and a good pack with any JSON in any place of it."""
    plan, calls, stages, findings = tuned()
    pack = WarmPack.of(plan, stages, CPU, Settings())
    assert pack is not None
    shelf = pack.store = Shelf()  # type: ignore[assignment]
    pack.keep(findings)
    findings.tuning().undo()
    (model,) = plan.roots
    before = state(model)
    good = json.dumps(shelf.decisions)
    outcomes: set[bool] = set()

    @hypothesis_settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        decisions = json.loads(good)
        if data.draw(st.booleans()):
            decisions = data.draw(st.dictionaries(st.sampled_from(sorted(decisions)), JSON))
        else:
            holder, name = data.draw(st.sampled_from(list(leaves(decisions))))
            holder[name] = data.draw(JSON)
        shelf.decisions = decisions
        seen: list[Event] = []
        remove = events.add_hook(seen.append)
        try:
            restored = pack.restore(calls, stages, CPU, Limits(60.0))
        finally:
            remove()
        outcomes.add(restored is None)
        if restored is None:
            assert [type(event) for event in seen] == [PackIgnored]
        else:
            assert [type(event) for event in seen] == [Restored]
            torch.testing.assert_close(speak(model), before[2], rtol=1e-4, atol=1e-6)
            assert str(restored.receipt())
            restored.tuning().undo()
        assert_untouched(state(model), before)

    logging.disable(logging.WARNING)
    try:
        check()
    finally:
        logging.disable(logging.NOTSET)
    # The good pack itself: a random change that does no harm is not drawn in every run.
    shelf.decisions = json.loads(good)
    restored = pack.restore(calls, stages, CPU, Limits(60.0))
    assert restored is not None
    restored.tuning().undo()
    assert True in outcomes


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in list(places):
        yield value, name
        yield from leaves(item)


def tuned() -> Any:
    """A plan, its calls, real stages, and what tuning made of them."""
    model = Stack()
    plan = ModelPlan("Stack", tuple(find_modules(model).values()), (Part("Stack", "vocoder", model),))
    calls = warmup_calls(MEL, Loaded(model), "inference")
    stages = (FoldStage(), ChannelsLastStage())
    findings = find(plan, calls, stages, CPU, Limits(60.0))
    assert len(findings.kept) == 2
    return plan, calls, stages, findings


# --- results that are checked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.5, 1e-3, float("nan")])
def test_a_stage_that_computes_something_else_by_now(
    offset: float, stage: Stage, seen: list[Event], meanwhile: _Meanwhile
) -> None:
    load()
    happened(seen)
    stage.attributes = {"offset": offset}
    model = load(lambda: meanwhile.watched())
    assert any("the result is wrong" in str(event) for event in seen)
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}
    meanwhile.assert_untouched()
    assert kept(model) == []
    assert_untouched(state(model), meanwhile.before)


def test_a_pack_cannot_switch_the_check_off(stage: Stage, seen: list[Event], packs: Path) -> None:
    """Decisions need no signature: one that says that the whole could not be compared has its parts compared."""
    load()
    edited(packs, lambda d: d.update(receipt=json.dumps({**json.loads(d["receipt"]), "error": None})))
    happened(seen)
    load()
    assert happened(seen) == {"Restored": 1}
    stage.attributes = {"offset": 0.5}
    assert kept(load()) == []
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}


def test_where_the_whole_cannot_be_compared_its_parts_are(stage: Stage, seen: list[Event]) -> None:
    def silent(model: nn.Module) -> None:
        model(MEL)

    assert "only the parts were compared" in receipt(load(warmup=silent)).notes[0]
    happened(seen)
    assert kept(load(warmup=silent)) == [("Stack", "test stage")]
    assert happened(seen) == {"Restored": 1}
    stage.attributes = {"offset": 0.5}
    assert kept(load(warmup=silent)) == []
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}


@pytest.mark.parametrize("reads_alone", [True, False])
def test_a_decoder_is_checked_by_its_probabilities(reads_alone: bool) -> None:
    """The check uses the limits of tuning: hidden states that only the head reads may differ more (Higgs)."""
    torch.manual_seed(0)
    decoder, head = nn.Linear(16, 16), nn.Linear(16, 9)
    with torch.no_grad():
        head.weight.mul_(0.01)
    x = torch.randn(1, 4, 16)

    def speak() -> BaseModelOutputWithPast:
        with torch.no_grad():
            return BaseModelOutputWithPast(last_hidden_state=decoder(x))

    part = Part("decoder", "decoder", decoder, head=Head((head,), reads_alone=reads_alone))
    calls = WarmupCalls((WarmupCall(speak),))
    baseline = one_pass(ModelPlan("model", (decoder,), ()), calls, CPU, Limits(float("inf"), "fast"))
    baseline.reference(part)
    with torch.no_grad():
        decoder.weight.mul_(1.08)
    if reads_alone:
        check(baseline, Ledger(), [part], whole=False)
    else:
        with pytest.raises(ValueError, match="decoder: error "):
            check(baseline, Ledger(), [part], whole=False)


@pytest.mark.parametrize(("kind", "passes", "made"), [("cpu", 3, 1), ("cuda", 2, 2), ("cuda", 3, 3), ("xpu", 2, 2)])
def test_a_change_is_as_warm_as_it_needs_before_it_is_checked(
    kind: str, passes: int, made: int, stage: Stage, decide: Any
) -> None:
    """A recording is replayed in the second pass, and only inductor's graphs need a third; nothing is timed."""
    model, spoken = Stack(), list[int]()

    def speak() -> torch.Tensor:
        spoken.append(1)
        with torch.no_grad():
            return model(MEL)  # type: ignore[no-any-return]

    part = Part("Stack", "encoder", model)
    calls = WarmupCalls((WarmupCall(speak),))
    baseline = one_pass(ModelPlan("Stack", (model,), (part,)), calls, CPU, Limits(float("inf")))
    decide(look=lambda *_: pytest.fail("timed"))
    spoken.clear()
    stage.passes = passes
    activate(replace(baseline, device=DeviceInfo(kind, "stand-in")), Ledger(), [(part, stage)], whole=True)
    assert len(spoken) == made


@pytest.mark.parametrize("decides", [True, False])
def test_a_part_on_which_lengths_hang_is_checked_bit_for_bit(
    decides: bool, monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event]
) -> None:
    def describe(model: nn.Module, _only: Any) -> ModelPlan:
        return ModelPlan("Stack", (model,), (Part("Stack", "encoder", model, decides=decides),))

    monkeypatch.setattr("accelerate_tts.models.describe", describe)
    stage.attributes = {"offset": 0.0}
    load()
    happened(seen)
    stage.attributes = {"offset": 1e-6}
    load()
    ignored = [event for event in seen if isinstance(event, PackIgnored)]
    assert [("bit-exact" in event.reason) for event in ignored] == ([True] if decides else [])
    assert happened(seen)["Restored"] == (0 if decides else 1)


def test_a_stage_that_does_not_apply_any_more(stage: Stage, seen: list[Event]) -> None:
    load()
    happened(seen)
    stage.obstacle = "is compiled already"
    assert kept(load()) == []
    assert any("test stage does not fit Stack: is compiled already" in str(event) for event in seen)
    assert happened(seen) == {"PackIgnored": 1, "Tuned": 1}


def test_a_stage_of_the_process_that_another_object_has_done_already(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], decide: Any
) -> None:
    decide(looks=False)  # a look compares with the pass that was recorded, of which this test knows nothing
    process = Stage("process stage")
    process.process = True
    use(monkeypatch, process, stage)
    assert kept(load()) == [("process", "process stage"), ("Stack", "test stage")]
    assert kept(load()) == [("process", "process stage"), ("Stack", "test stage")]
    happened(seen)
    process.obstacle = "nothing to do"
    model = load()
    assert happened(seen) == {"Restored": 1}
    assert kept(model) == [("Stack", "test stage")]
    assert receipt(model).stages[0].reason == "not needed here: nothing to do"


def test_compiled_code_that_turns_out_to_be_none(stage: Stage, seen: list[Event]) -> None:
    stage.graphs = 1
    load()
    stage.graphs = 0
    happened(seen)
    assert kept(load()) == []
    assert any("compiled no graph" in str(event) for event in seen)
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}


def test_a_change_that_falls_back_by_itself_is_not_in_force(stage: Stage, seen: list[Event]) -> None:
    load()
    happened(seen)
    original = Stack.forward

    def forward(self: Stack, mel: torch.Tensor) -> torch.Tensor:
        if self.offset:
            events.emit(FellBack("Stack", "test stage", "no compiler"))
        return original(self, mel)

    class Falling(Stack):
        pass

    Falling.__qualname__, Falling.__name__ = Stack.__qualname__, Stack.__name__
    Falling.forward = forward  # type: ignore[method-assign]
    model = load(Falling)
    assert kept(model) == []
    assert receipt(model).stages[0].reason == "failed: no compiler"
    assert any("the result is wrong: no compiler" in str(event) for event in seen)
    assert happened(seen)["Restored"] == 0


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


# --- interrupted, cancelled, failed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_while_it_is_put_in_force(error: BaseException, stage: Stage, seen: list[Event]) -> None:
    load()
    happened(seen)
    stage.faults["on"] = raising(error)
    model = Stack()
    before = state(model)
    with pytest.raises(type(error)):
        load(lambda: model)
    assert_untouched(state(model), before)
    assert happened(seen) == {}
    stage.faults.clear()
    assert kept(load(lambda: model))
    assert happened(seen) == {"Restored": 1}


def test_an_interrupt_in_the_check(stage: Stage, seen: list[Event]) -> None:
    calls: list[int] = []

    def warm(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        if calls[0] == 0 and len(calls) == 3:
            raise KeyboardInterrupt
        return model(MEL)

    load(warmup=warm)
    happened(seen)
    calls[:] = [0]
    model = Stack()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        load(lambda: model, warmup=warm)
    assert_untouched(state(model), before)
    assert happened(seen) == {}


@pytest.mark.parametrize("error", [RuntimeError("no memory"), MemoryError(), OSError(28, "No space left on device")])
def test_a_fault_while_it_is_put_in_force(
    error: Exception, stage: Stage, seen: list[Event], meanwhile: _Meanwhile
) -> None:
    load()
    happened(seen)
    stage.faults["on"] = raising(error)
    model = load(lambda: meanwhile.watched())
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "FellBack": 1, "Tuned": 1}
    meanwhile.assert_untouched()
    assert kept(model) == []


def test_a_cancelled_load_is_not_restored() -> None:
    plan, calls, stages, findings = tuned()
    findings.tuning().undo()
    before = state(plan.roots[0])
    pack = WarmPack.of(plan, stages, CPU, Settings())
    assert pack is not None
    pack.keep(findings)
    assert pack.restore(calls, stages, CPU, Limits(60.0, stopped=lambda: True)) is None
    assert_untouched(state(plan.roots[0]), before)
    restored = pack.restore(calls, stages, CPU, Limits(60.0))
    assert restored is not None
    assert restored.complete


def test_a_warm_up_that_fails_writes_nothing(stage: Stage, packs: Path, seen: list[Event]) -> None:
    load(warmup=torch.zeros(1, 3, 3))
    assert happened(seen) == {"WarmupFailed": 1}
    assert not list(packs.glob("*.pack"))


def test_a_warm_up_that_fails_later_is_no_fault_of_the_pack(stage: Stage, packs: Path, seen: list[Event]) -> None:
    broken: list[bool] = []

    def warm(model: nn.Module) -> torch.Tensor:
        if broken:
            raise ConnectionError("no reference voice")
        return model(MEL)

    load(warmup=warm)
    happened(seen)
    broken.append(True)
    model = Stack()
    before = state(model)
    load(lambda: model, warmup=warm)
    assert happened(seen) == {"WarmupFailed": 1}
    assert_untouched(state(model), before)
    broken.clear()
    load(warmup=warm)
    assert happened(seen) == {"Restored": 1}


def test_a_tuning_that_was_given_up_writes_nothing(stage: Stage, packs: Path) -> None:
    calls: list[int] = []

    def flaky(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise ConnectionError("gone")
        return model(MEL)

    assert "given up" in receipt(load(warmup=flaky)).notes[0]
    assert not list(packs.glob("*.pack"))


def test_train_mode_is_said_of_a_restored_object_too(stage: Stage, seen: list[Event]) -> None:
    load(bent(lambda m: setattr(m, "drop", nn.Dropout(0.1).eval())))
    assert not any(isinstance(event, NotApplied) for event in seen)
    for restored in (False, True):  # the pack above is not for it
        model = load(bent(lambda m: setattr(m, "drop", nn.Dropout(0.1))))
        assert any(isinstance(event, NotApplied) and "train mode" in event.reason for event in seen)
        assert happened(seen)["Restored"] == restored
        assert sum("train mode" in note for note in receipt(model).notes) == 1


def test_a_call_that_leaves_train_mode_on_is_not_the_loads_fault(stage: Stage, seen: list[Event]) -> None:
    class Trains(Stack):
        def forward(self, mel: torch.Tensor) -> torch.Tensor:  # as Coqui's WaveRNN does
            wave = super().eval()._spoken(mel)
            self.train()
            return wave

        def _spoken(self, mel: torch.Tensor) -> torch.Tensor:
            return super().forward(mel)

    def made() -> nn.Module:
        model = Trains()
        model.drop = nn.Dropout(0.1)
        return model.eval()

    for restored in (False, True):
        load(made)
        events = happened(seen)
        assert (events["Restored"], events["NotApplied"]) == (restored, 0)


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "file" / "packs"))
    assert kept(load())
    found = happened(seen)
    assert found["PackIgnored"] >= 1
    assert found["Tuned"] == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root: test_hostile_machine.py mounts one")
def test_a_read_only_folder(stage: Stage, seen: list[Event], packs: Path) -> None:
    packs.mkdir(mode=0o500)
    assert kept(load())
    assert happened(seen) == {"Trying": 1, "Tuned": 1, "PackIgnored": 1}


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], packs: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert kept(load())
    assert happened(seen) == {"Trying": 1, "Tuned": 1, "PackIgnored": 1}
    assert not list(packs.glob("*.pack"))


def test_a_user_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: Stage, seen: list[Event]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ACCELERATE_TTS_PACK_FOLDER")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the packs of such a user go
    assert kept(load())
    assert happened(seen) == {"Trying": 1, "Tuned": 1, "NotApplied": 1}


def test_a_model_that_cannot_be_told_from_others(stage: Stage, seen: list[Event], packs: Path) -> None:
    class Shy(Stack):
        def extra_repr(self) -> str:
            raise AttributeError("not yet")

    assert kept(load(Shy))
    assert happened(seen) == {"PackIgnored": 1, "Trying": 1, "Tuned": 1}
    assert not packs.exists()


def test_compiled_code_that_cannot_be_collected(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], packs: Path
) -> None:
    def refuse(_before: object) -> None:
        raise PermissionError(13, "Permission denied")

    stage.graphs = 1
    monkeypatch.setattr("accelerate_tts.packs.compiler_cache.pack", refuse)
    assert kept(load())
    assert happened(seen) == {"Trying": 1, "Tuned": 1, "PackIgnored": 1}
    assert not list(packs.glob("*.pack"))


def test_compiled_code_that_cannot_be_collected_by_a_load_from_a_pack_without_code(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event]
) -> None:
    stage.graphs = 1  # no file of the compiler, so the pack has no code
    assert kept(load())
    happened(seen)
    # A file that nobody can read, as another user's in a folder that several share.
    link = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "itself"
    link.parent.mkdir(exist_ok=True)
    stage.faults["on"] = lambda: link.is_symlink() or link.symlink_to(link)  # while it is put in force
    begin_process()
    assert kept(load())
    assert happened(seen) == {"Restored": 1, "PackIgnored": 1}


def test_where_packs_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert pack_folder(Settings()) == tmp_path / "cache" / "accelerate_tts" / "packs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pack_folder(Settings()) == tmp_path / ".cache" / "accelerate_tts" / "packs"
    assert pack_folder(Settings(pack_folder=str(tmp_path / "x"))) == tmp_path / "x"
    assert pack_folder(Settings(pack_folder="~/x")) == tmp_path / "x"


def test_a_key_of_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event]) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PACK_KEY", os.fsdecode(b"secret \xff"))
    load(), load()
    assert happened(seen)["Restored"] == 1


# --- shipping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_shipping_with_and_without_a_shared_key(
    shared: bool, monkeypatch: pytest.MonkeyPatch, stage: Stage, seen: list[Event], tmp_path: Path
) -> None:
    """The file that the stage leaves is a stand-in for what a compiler does."""
    library = tmp_path / "inductor" / "ab" / "code.so"

    def compiled() -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        library.write_bytes(b"code")

    stage.graphs = 1
    stage.faults["on"] = compiled
    if shared:
        monkeypatch.setenv("ACCELERATE_TTS_PACK_KEY", "the same on both")
    load()
    parcel = tmp_path / "packs.bin"
    assert optimizer.get_performance_optimizer().export_packs(parcel) == 1

    removed(tmp_path / "inductor")
    if shared:
        stage.faults.clear()
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "another machine"))
    begin_process()
    happened(seen)
    assert optimizer.get_performance_optimizer().load_packs(str(parcel)) == 1
    assert happened(seen) == ({} if shared else {"PackIgnored": 1})  # the code is left behind, and that is said
    assert not library.exists()
    assert kept(load()) == [("Stack", "test stage")]
    assert happened(seen)["Restored"] == 1
    assert library.exists(), "unpacked, or compiled here"
    # The code that was compiled here is now stored under this machine's own key.
    stage.faults.clear()
    removed(tmp_path / "inductor")
    begin_process()
    assert kept(load()) == [("Stack", "test stage")]
    assert happened(seen)["Restored"] == 1
    assert library.exists()


def test_an_object_beside_a_tuned_one_is_warmed_up_at_its_lengths_too(stage: Stage, seen: list[Event]) -> None:
    """A model that is tuned already, in a second backend whose warm-up takes a length."""
    model = Stack()

    class Backend:
        def __init__(self) -> None:
            self.lengths: list[int] = []

        @optimized_model(warmup=lambda backend, length: backend.speak(length), lengths=(8, 16))
        def load(self) -> None:
            self.model = model

        def speak(self, length: int) -> torch.Tensor:
            self.lengths.append(length)
            return self.model(MEL[..., :length])

    first, second = Backend(), Backend()
    first.load(), second.load()
    assert second.lengths == [8, 16]
    assert happened(seen) == {"Trying": 1, "Tuned": 1, "Warmed": 1}


def test_these_events_are_what_the_tests_above_count() -> None:
    assert {Restored, PackIgnored, Trying, Tuned, FellBack, WarmupFailed, NotApplied} <= set(Event.__subclasses__())
