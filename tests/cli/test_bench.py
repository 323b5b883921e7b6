"""The bench command: real classes at small size, figures that come from runs, and errors that name the mend."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel
from typer.testing import CliRunner

from accelerate_tts import AccelerateTTSError, PerformanceOptimizer, Settings, SettingsError
from accelerate_tts.cli.app import app
from accelerate_tts.cli.bench import chart, command, measure, processes, report, systems, variant
from accelerate_tts.cli.bench.floors import floors as floors_of_machine
from accelerate_tts.cli.bench.measure import Measured, Ratio, undisturbed
from accelerate_tts.cli.bench.measure import series as measure_series
from accelerate_tts.cli.bench.naive import Naive, naive
from accelerate_tts.cli.bench.processes import VariantError, folders_of
from accelerate_tts.cli.bench.report import Found, summaries
from accelerate_tts.cli.bench.variant import Request
from accelerate_tts.device.usage import Usage
from accelerate_tts.kernels.library import missing
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.stages.layers.short_convolutions import ShortConvolutionStage
from accelerate_tts.stages.layers.skinny import SkinnyStage
from accelerate_tts.tuning.disturbance import Watcher
from doubles import begin_process


@pytest.fixture(autouse=True)
def no_compiler_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave compiling out: other tests cover it, and it takes a minute."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Measure variants in this process, since another one takes seconds to import torch; yield the requests in order.

    Each variant has its own pack folder and its own optimizer, as in a process of its own.
    """
    requests: list[Request] = []

    def ask(request: Request, folder: Path, _python: Path | None = None) -> dict[str, Any]:
        requests.append(request)
        for name, value in folders_of(request, folder).items():
            if name != "TORCHINDUCTOR_CACHE_DIR":  # our own kernels need not be built again
                monkeypatch.setenv(name, value)
        begin_process(PerformanceOptimizer(Settings.from_environment()))
        try:
            return json.loads(json.dumps(variant.answer(request)))
        except Exception as error:
            raise VariantError(f"{type(error).__name__}: {error}") from error

    monkeypatch.setattr(processes, "ask", ask)
    return requests


@pytest.fixture
def plain() -> systems.Built:
    """Stand-in for a system that is not one of the five and that dynamo traces quickly."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
    return systems.Built(model, lambda seconds: model(torch.ones(round(100 * seconds), 8)), model)


def bench(*arguments: str, seconds: float = 3) -> Any:
    told = ["bench", *arguments, "--size", "tiny", "--pairs", "2", "--tune-seconds", str(seconds)]
    return CliRunner().invoke(app, told)


def test_it_prints_a_table_and_writes_every_figure(
    tmp_path: Path, asked: list[Request], plain: systems.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variant, "naive", lambda _built, *args: replace(naive(plain, *args, "eager"), same_tokens=True))
    path, chart_path = tmp_path / "figures.json", tmp_path / "chart.png"
    done = bench("higgs", "--naive", "--warm-start", "--tokens", "12", "--json", str(path), "--plot", str(chart_path))
    assert done.exit_code == 0, done.output
    assert [request.variant for request in asked] == ["eager", "naive", "tuned", "restored"]
    (found,) = json.loads(path.read_text("utf-8"))["systems"]
    assert found["system"] == "higgs"
    assert found["failed"] == {}
    (run,) = found["runs"]
    assert (run["system"], run["size"], run["precision"]) == ("higgs", "tiny", "exact")
    # Its weights are in bf16: of two tokens that are all but alike, sums in fp32 may choose the other one.
    assert run["same_tokens"] is True or 0 < run["divergence"] < 0.01
    assert run["error"] is None
    for ratio in (run["whole"], run["step"], run["prompt"], found["naive"]["whole"]):
        assert 0 < ratio["lowest"] <= ratio["ratio"] <= ratio["highest"]
        assert ratio["before"] > 0
    assert run["floor"] > 0
    assert found["naive"]["graphs"] > 0
    assert found["naive"]["same_tokens"] is True
    assert min(found["peak"], found["naive"]["peak"], run["peak"], run["warm_peak"]) > 2**20
    assert run["warm_start"] < run["tuning"], "the second one tuned again"
    words = ("promised 1.4x to 1.6x", "whole", "one token", "tokens", "recompiles", "with a warm pack", "graphs")
    for text in words:
        assert text in done.output
    assert chart_path.read_bytes().startswith(b"\x89PNG")


def test_all_is_everything_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(command, "run", lambda names, options: told.append((names, options)))
    for arguments in (["all"], ["all", "--no-naive", "--no-warm-start", "--precision", "fast"], ["mms"]):
        assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 0
    options = [(o.precisions, o.naive, o.warm_start) for _, o in told]
    assert options == [
        (("exact", "balanced", "fast"), True, True), (("fast",), False, False), (("exact",), False, False),
    ]  # fmt: skip


def test_a_process_of_its_own_measures_its_own_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is measured in a process of its own, which writes packs only into the bench's own folder."""
    monkeypatch.setenv("ACCELERATE_TTS_PACK_FOLDER", str(tmp_path / "the user's own"))
    ours = torch.ones(2**28)  # 1 GiB
    request = Request("tuned", "voice-clone", "tiny", "exact", None, 1, 1.0, None)
    answer = processes.ask(request, tmp_path / "bench")
    here = measure.peak_bytes()
    assert ours.sum() > 0
    assert here is not None
    assert 2**26 < answer["peak"] < here
    assert answer["whole"]["before"] > 0
    assert list((tmp_path / "bench" / "packs").iterdir())
    assert not (tmp_path / "the user's own").exists()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_memory_on_a_device_is_its_allocators(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for the device's allocator."""
    module = getattr(torch, device)
    told: list[str] = []
    monkeypatch.setattr(module, "empty_cache", lambda: told.append("emptied"))
    monkeypatch.setattr(module, "memory_reserved", lambda: 5)
    monkeypatch.setattr(module, "max_memory_reserved", lambda: 7)
    assert measure.held_bytes(device) == 5
    assert told == ["emptied"]
    assert measure.peak_bytes(device) == 7


def test_another_environment_is_benched_by_its_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Path | None] = []

    def ask(_request: Request, _folder: Path, python: Path | None = None) -> dict[str, Any]:
        told.append(python)
        raise VariantError("this is enough")

    monkeypatch.setattr(processes, "ask", ask)
    for arguments in (["t3-turbo"], ["t3-turbo", "--python", "there/bin/python"]):
        assert bench(*arguments).exit_code == 2
    assert told == [None, Path("there/bin/python")]


def test_another_environment_is_measured_with_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout in the present folder is not what was installed there; relative paths are of the present folder."""
    checkout = tmp_path / "checkout"
    (checkout / "accelerate_tts").mkdir(parents=True)
    (checkout / "accelerate_tts" / "__init__.py").write_text("raise SystemExit('the checkout')")
    (checkout / "bin").mkdir()
    python = checkout / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(checkout)
    request = Request("eager", "voice-clone", "tiny", "exact", None, 1, 1.0, None)
    assert processes.ask(request, Path("bench"), Path("bin/python"))["peak"] > 0


def test_a_process_that_dies_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant's process is killed, as one is that runs out of memory."""
    begin = subprocess.run
    with pytest.raises(VariantError, match=r"/nowhere/python could not be started: .*No such file"):
        processes.ask(Request("eager", "mms", "tiny", "exact", None, 1, 1.0, None), tmp_path, Path("/nowhere/python"))
    for code, said in (
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "signal 9, perhaps for lack of memory"),
        ("raise SystemExit('no such thing')", "no such thing"),
        ("import sys; open(sys.argv[2], 'w').write('{\"no answer\": \"MemoryError: too much\"}')", "MemoryError: too"),
    ):
        monkeypatch.setattr(
            subprocess, "run",
            lambda told, code=code, **options: begin([sys.executable, "-c", code, *told[3:]], **options),
        )  # fmt: skip
        with pytest.raises(VariantError, match=said):
            processes.ask(Request("eager", "mms", "tiny", "exact", None, 1, 1.0, None), tmp_path)


def test_torch_compile_is_timed_in_turn_and_taken_off(plain: systems.Built) -> None:
    found = naive(plain, 0.2, 3, "eager")
    assert (found.graphs, found.error, found.same_tokens) == (1, 0.0, None)
    assert found.whole.lowest <= found.whole.ratio <= found.whole.highest
    assert "forward" not in vars(plain.hot)


def test_torch_compile_that_fails_is_a_cell(
    monkeypatch: pytest.MonkeyPatch, asked: list[Request], plain: systems.Built
) -> None:
    def no_compiler(*_args: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more lines")

    monkeypatch.setattr(variant, "naive", lambda _built, *args: naive(plain, *args, no_compiler))
    done = bench("mms", "--naive", seconds=1)
    assert done.exit_code == 0, done.output
    assert "mms, torch.compile: failed: BackendCompilerFailed" in done.output
    assert "mms, exact: promised" in done.output


def test_torch_compile_of_what_dynamo_leaves_out_is_no_success(
    monkeypatch: pytest.MonkeyPatch, plain: systems.Built
) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_options: forward)
    with pytest.raises(AccelerateTTSError, match="no graph was compiled"):
        naive(plain, 0.2, 1)


@pytest.mark.parametrize("name", [*systems.SYSTEMS, *systems.PARTS])
def test_the_hot_module_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each system, the module that its users compile is on the path of a call, and is restored afterwards."""
    runs: list[int] = []

    def counted(forward: Any, **_options: Any) -> Any:
        return lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", counted)
    built = systems.system_of(name).build("tiny", None, "cpu")
    with pytest.raises(AccelerateTTSError, match="no graph was compiled"):
        naive(built, 0.3, 1)
    assert runs
    assert "forward" not in vars(built.hot)


@pytest.mark.parametrize("name", ["chatterbox", "xtts", "voice-clone", *systems.PARTS])
def test_the_other_systems_speak_the_same_twice(name: str) -> None:
    """Untouched and tuned calls use the same seed, so that their outputs can be compared."""
    import torch

    from accelerate_tts.runtime.seeding import seeded
    from accelerate_tts.tuning.compare import compare

    torch.manual_seed(0)
    built = systems.system_of(name).build("tiny", None, "cpu")
    outputs = []
    for _ in range(2):
        with seeded("cpu"), torch.no_grad():
            outputs.append(built.speak(0.5))
    assert compare(*outputs).error == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonesuch"], "'nonesuch' is not one of chatterbox, higgs"),
        (["mms", "--precision", "sloppy"], "precision='sloppy'"),
        (["mms", "--pairs", "0"], "greater than or equal to 1"),
        (["mms", "--tune-seconds", "nan"], "--tune-seconds"),
        (["mms", "--json", "/no/such/folder/bench.json"], "--json /no/such/folder/bench.json"),
        (["mms", "--json", "/"], "--json /"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_a_size_that_there_is_not() -> None:
    done = CliRunner().invoke(app, ["bench", "mms", "--size", "huge"])
    assert done.exit_code == 2
    assert "size='huge'" in done.output


def test_a_system_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, asked: list[Request]) -> None:
    monkeypatch.setattr(systems, "import_module", lambda name: __import__("no_such_package_" + name))
    done = bench("xtts")
    assert done.exit_code == 2
    assert "pip install 'coqui-tts[codec]' six" in " ".join(done.output.split())
    assert [request.variant for request in asked] == ["eager"], "the rest would fail as well"


def test_a_chart_that_cannot_be_drawn_is_said_first(monkeypatch: pytest.MonkeyPatch, asked: list[Request]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = bench("mms", "--plot", "chart.png")
    assert done.exit_code == 2
    assert "pip install 'accelerate_tts[bench]'" in " ".join(done.output.split())
    assert asked == []


def test_tokens_are_for_systems_that_write_some(asked: list[Request]) -> None:
    done = bench("mms", "--tokens", "300")
    assert done.exit_code == 2
    assert "mms writes no tokens; chatterbox, higgs, xtts do" in " ".join(done.output.split())
    assert measure.length_of("chatterbox", "full", 300) * 25 == 300
    assert measure.length_of("mms", "full", 300) == systems.SYSTEMS["mms"].seconds


@pytest.mark.parametrize("name", ["chatterbox", "higgs", "xtts", *systems.PARTS])
def test_so_many_tokens_are_written(name: str) -> None:
    torch.manual_seed(0)
    built = systems.system_of(name).build("tiny", None, "cpu")
    loop = measure.Loop()
    measure.spoken(built, measure.length_of(name, "tiny", 40), loop)
    assert 34 <= len(loop.steps) <= 41  # XTTS keeps five back


def measured(system: str, precision: str, after: float, **facts: Any) -> Measured:
    one = Measured(
        system, "full", precision, None, Ratio.of([(2.0, after)]), None, None, 1e-6, None, None, None, 30.0, None,
        1.25, 0, 2**31,
    )  # fmt: skip
    return replace(one, **facts)


def test_a_variant_that_fails_costs_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A variant that runs out of memory is one cell that says so; the other results are kept."""

    def ask(request: Request, _folder: Path, _python: Path | None = None) -> dict[str, Any]:
        if request.system == "xtts" or request.precision == "fast" or request.variant in {"naive", "restored"}:
            raise VariantError("MemoryError: not enough")
        return {"seconds": 1.0, "peak": 2**30} if request.variant == "eager" else asdict(
            measured(request.system, request.precision, 1.0)
        )  # fmt: skip

    monkeypatch.setattr(processes, "ask", ask)
    path = tmp_path / "figures.json"
    done = bench("xtts", "mms", "--precision", "exact", "--precision", "fast", "--naive", "--warm-start", "--json",
                 str(path))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "xtts, eager: failed: MemoryError: not enough" in done.output
    assert "mms, warm start, exact: failed: MemoryError" in done.output
    assert "mms, exact: promised" in done.output
    xtts, mms = json.loads(path.read_text("utf-8"))["systems"]
    assert (xtts["runs"], list(xtts["failed"])) == ([], ["eager"])
    assert list(mms["failed"]) == ["torch.compile", "warm start, exact", "fast"]


def test_the_overview_has_a_row_a_system_and_a_column_a_precision() -> None:
    found = [
        Found("mms", 0.5, 2**30, Naive(Ratio.of([(2.0, 2.5)]), 9.0, 2, peak=2**30 * 3), [
            measured("mms", "exact", 1.6, warm_start=3.0, warm_peak=2**30 + 2**29), measured("mms", "fast", 0.5),
        ]),
        Found("xtts", 0.5, 2**30, None, [measured("xtts", "balanced", 1.0)], {"fast": "OOM", "torch.compile": "no"}),
        Found("higgs", failed={"eager": "memory"}),
    ]  # fmt: skip
    header, mms, xtts, higgs = (dict(zip(report.OVERVIEW, row, strict=True)) for row in report.overview(found))
    assert list(header) == list(header.values())
    assert (mms["torch.compile"], mms["exact"], mms["balanced"], mms["fast"]) == ("0.80x", "1.25x", "", "4.00x")
    assert (mms["first call"], mms["cold start"], mms["warm start"]) == ("0.5 s", "30 s, 30 s", "3 s, -")
    assert mms["peak memory"] == "1024 MiB; torch.compile 3.00x; exact 2.00x; exact warm 1.50x; fast 2.00x"
    assert (xtts["promised"], xtts["balanced"], xtts["torch.compile"]) == ("1.2 to 1.4x", "2.00x", "failed")
    assert (xtts["exact"], xtts["fast"]) == ("", "failed")
    assert {higgs[name] for name in ("torch.compile", "exact", "balanced", "fast")} == {"failed"}


def test_the_chart_has_a_bar_for_each_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    monkeypatch.setattr(Axes, "barh", lambda _self, names, widths, **_kw: drawn.append((names, widths)))
    runs = [measured("mms", "fast", 0.5), measured("mms", "exact", 1.6)]
    chart.draw(
        [Found("mms", naive=Naive(Ratio.of([(2.0, 2.5)]), 9.0, 2), runs=runs), Found("xtts")],
        tmp_path / "chart.svg",
    )  # fmt: skip
    assert drawn == [(["mms, torch.compile", "mms, exact", "mms, fast"], [0.8, 1.25, 4.0])]


def test_ratios_are_of_pairs() -> None:
    ratio = measure.Ratio.of([(4.0, 2.0), (9.0, 3.0), (5.0, 5.0)])
    assert (ratio.before, ratio.after, ratio.ratio, ratio.lowest, ratio.highest) == (5.0, 3.0, 2.0, 1.0, 3.0)


class Neighbours:
    """Stand-in for a machine that is busy for a given number of measurements or waits."""

    def __init__(self, measurements: int, waits: float) -> None:
        self.measurements, self.waits, self.now, self.others = measurements, waits, 0.0, 0.0

    def usage(self) -> Usage:
        self.now += 1.0
        self.others += 1.5 if self.measurements > 0 else 0.0
        return Usage(self.now, self.now, self.now + self.others, processors=2)

    def probe(self) -> float:
        return 1.0

    def sleep(self, _seconds: float) -> None:
        self.waits -= 1
        if self.waits <= 0:
            self.measurements = 0


@pytest.mark.parametrize(
    ("measurements", "waits", "disturbed", "numbers"),
    [(0, 0, 0, [0, 1, 2]), (1, 2, 0, [1, 2, 3]), (99, math.inf, 3, [0, 1, 2])],
    ids=["quiet", "once", "always"],
)
def test_a_disturbed_measurement_is_repeated_or_counted(
    measurements: int, waits: float, disturbed: int, numbers: list[int]
) -> None:
    found: tuple[list[int], list[str]] = ([], [])
    done: list[int] = []

    def measure() -> None:
        found[0].append(len(done))
        found[1].append(str(len(done)))
        done.append(1)

    watcher = Watcher(Neighbours(measurements, waits), 2, 1.0)
    assert undisturbed(measure, found, 3, watcher) == disturbed
    assert found == (numbers, [str(number) for number in numbers])


def test_the_report_says_what_was_disturbed() -> None:
    why = "other processes used 1.0 of 2 processors"
    floors = [{"memory": rate, "fp32": 1e11} for rate in (1e10, 9.5e9, 1.02e10)]
    one = measured("mms", "exact", 1.0, floors=floors, disturbed=2, disturbance=why, moved="x")
    (line,) = summaries(Found("mms", runs=[one]))
    assert "memory gave 10.0, 9.5, 10.2 GB/s; 2 pairs were disturbed: other processes used 1.0 of 2 processors" in line
    assert "the machine changed meanwhile: x" in line


@pytest.mark.parametrize(
    ("rates", "waits", "numbers", "told"),
    [
        ([10.0, 11.0, 12.0], 0, [0, 1, 2], ""),
        ([10.0, 20.0, 10.0, 10.0, 10.0, 11.0], 0, [3, 4, 5], ""),
        ([10.0, 20.0, 10.0, 20.0, 20.0, 40.0], 0, [3, 4, 5], "memory gave 20.0 to 40.0 GB/s"),
        ([10.0, 20.0, 10.0], math.inf, [0, 1, 2], "memory gave 10.0 to 20.0 GB/s"),
    ],
    ids=["steady", "once", "always", "busy"],
)
def test_a_run_whose_floors_moved_is_repeated_or_says_so(
    rates: list[float], waits: float, numbers: list[int], told: str
) -> None:
    """Floors before, in the middle and after: three for each series of pairs."""
    left, done, found = [1e9 * rate for rate in rates], list[int](), list[int]()

    def measure() -> None:
        found.append(len(done))
        done.append(1)

    watcher = Watcher(Neighbours(99 if waits else 0, waits), 2, 1.0)
    _, floors, why = measure_series(measure, (found,), 3, watcher, lambda: {"memory": left.pop(0), "bf16": None})
    assert (found, why, left) == (numbers, told, [])
    assert len(floors) == 3


def test_the_floors_of_this_machine() -> None:
    found = floors_of_machine()
    assert found.keys() == {"memory", "fp32", "bf16", "int8"}
    assert all(rate is None or rate > 1e6 for rate in found.values())
    assert None not in {found["memory"], found["fp32"]}


def test_run_checks_its_names_before_it_builds_anything() -> None:
    with pytest.raises(SettingsError, match="'other' is not one of"):
        command.run(["mms", "other"], command.Options(size="tiny"))


def test_the_floor_counts_what_a_token_reads() -> None:
    """It leaves out the feed-forwards of Higgs Audio's text, and embedding tables, of which a token reads a row."""
    built = systems.SYSTEMS["higgs"].build("tiny", None, "cpu")
    named = dict(built.decoder.named_parameters())
    read = {name for name in named if ".mlp." not in name and "embed" not in name}
    assert any(".audio_mlp." in name for name in read)
    assert measure.bytes_of_a_token(built.decoder) == sum(named[name].numel() * 2 for name in read)


@pytest.mark.skipif(missing() is not None, reason="the kernels' library is not there")
def test_what_a_tuned_token_reads_is_counted_in_the_format_of_its_copies() -> None:
    llama = LlamaModel(
        LlamaConfig(vocab_size=9, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    head = torch.nn.Linear(64, 512, bias=True)
    decoder = torch.nn.ModuleDict({"llama": llama, "head": head, "convolution": torch.nn.Conv1d(64, 64, 3)})
    linears = [one for one in llama.modules() if isinstance(one, torch.nn.Linear)]
    loaded = measure.bytes_of_a_token(decoder)
    part = Part("decoder", "decoder", decoder)
    ShortConvolutionStage().prepare(part).on()
    assert measure.bytes_read_by_a_token(decoder) == loaded, "they serve no single token"
    inside = sum(one.weight.numel() for one in linears)
    scales = sum(len(one.weight) for one in linears)
    for stage, saved in (
        (FusedBlocksStage("fp32"), 0), (FusedBlocksStage("bf16"), 2 * inside),
        (FusedBlocksStage("int8"), 3 * inside - 4 * scales),
    ):  # fmt: skip
        change = stage.prepare(part)
        change.on()
        assert measure.bytes_read_by_a_token(decoder) == loaded - saved
        linear = SkinnyStage("int8").prepare(part)  # the head alone: the others are inside fused blocks
        linear.on()
        assert measure.bytes_read_by_a_token(decoder) == loaded - saved - 3 * head.weight.numel() + 4 * 512
        linear.off()
        change.off()
        assert measure.bytes_read_by_a_token(decoder) == loaded
