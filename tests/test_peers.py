"""The command that times other engines: what it does with one that fails, is absent or takes too long."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from accelerate_tts.cli.bench.measure import bytes_of_a_token, bytes_read_by_a_token
from accelerate_tts.kernels.library import level, missing
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from accelerate_tts.tuning.disturbance import Machine
from schemas import SCHEMA, objections

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GIVEN = {"size": "tiny", "precision": ["exact"], "layers": None, "rounds": 2, "tune_seconds": 5.0, "peers": None,
         "threads": 1, "set_up_seconds": 60.0, "json": None, "into": None}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The command and its engines."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("peers"), importlib.import_module("engines")
    for name in ("peers", "engines", "ggml", "record"):
        sys.modules.pop(name, None)


def subject(engines: Any, closed: list[str]) -> Any:
    def engine(seconds: float, output: Any) -> Any:
        return engines.Engine(lambda: (seconds, output), close=lambda: closed.append("closed"))

    def broken() -> Any:
        raise ValueError("no such format\nand more")

    def slow() -> Any:
        left, again = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= GIVEN["set_up_seconds"]
        signal.setitimer(signal.ITIMER_REAL, 0.001, again)  # as if they were over
        time.sleep(10)

    one = torch.ones(4)
    return engines.Subject("llama", "one token", None, ("memory", 1e9), "", [
        engines.Candidate("eager", lambda: engine(0.2, one), (), ours=True),
        engines.Candidate("ours, exact", lambda: engine(0.1, one * 1.5), (engines.ours,), ours=True),
        engines.Candidate("absent", broken, (), ("no_such_module",)),
        engines.Candidate("broken", broken, (engines.compiled,)),
        engines.Candidate("slow", slow, ()),
        engines.Candidate("other", lambda: engine(0.4, one[:2]), ()),
    ])  # fmt: skip


def compared(peers: Any, subject: Any, given: Namespace) -> dict[str, Any]:
    rates = {"memory": 1e10, "fp32": 1e11, "bf16": None, "int8": None}
    return peers.compared(subject, given, patience=0.0, rates=lambda: rates)


def test_each_engine_has_a_row_or_a_reason(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peers, engines = scripts
    closed: list[str] = []
    given = Namespace(**GIVEN)
    item = compared(peers, subject(engines, closed), given)
    rows = {row["name"]: row for row in item["peers"]}
    assert list(rows) == ["eager", "ours, exact", "absent", "broken", "slow", "other"]
    assert rows["absent"]["failed"] == "no_such_module is not installed: pip install no_such_module"
    assert "absent is left out: no_such_module is not installed" in capsys.readouterr().out
    assert rows["broken"]["failed"] == "ValueError: no such format"
    assert rows["slow"]["failed"] == "OverTimeError: not ready within 60 s"
    assert (rows["broken"]["ratio"], rows["broken"]["lines"]) == (None, 1)
    ratios = {name: row["ratio"]["ratio"] for name, row in rows.items() if row["ratio"]}
    assert ratios == {"eager": 1.0, "ours, exact": 2.0, "other": 0.5}
    assert rows["ours, exact"]["error"] == pytest.approx(0.5)
    assert rows["other"]["error"] is None  # of another length
    assert len(closed) == 3
    assert [row["read"] for row in rows.values()] == [None] * 6


@pytest.mark.skipif(missing() is not None, reason="the kernels' library is not there")
def test_what_a_tuned_step_reads_is_stored(scripts: Any) -> None:
    peers, engines = scripts
    llama = LlamaModel(
        LlamaConfig(vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    change = FusedBlocksStage("int8").prepare(Part("llama", "decoder", llama))
    change.on()
    ours = engines.Engine(lambda: (0.1, torch.ones(1)), llama)
    one = engines.Subject("llama", "one token", None, ("memory", 1e9), "", [
        engines.Candidate("eager", lambda: engines.Engine(lambda: (0.2, torch.ones(1))), (), ours=True),
        engines.Candidate("ours, fast", lambda: ours, (), ours=True),
    ])  # fmt: skip
    (_, row) = compared(peers, one, Namespace(**GIVEN))["peers"]
    assert 0 < row["read"] == bytes_read_by_a_token(llama) < bytes_of_a_token(llama) / 2
    change.off()


def test_a_run_of_engines_is_in_the_format(scripts: Any) -> None:
    peers, engines = scripts
    given = Namespace(**GIVEN)
    item = compared(peers, subject(engines, []), given)
    content = json.loads(json.dumps(peers.documented(item, given)))
    assert list(objections({**content, "commit": "0123456"}, SCHEMA)) == []
    assert content["options"]["precisions"] == ["exact"]
    assert content["kernels"] == level()


def test_a_package_that_cannot_be_imported_loses_no_run(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without metadata, with a library that does not load: its engine has failed, and all others are there."""
    peers, engines = scripts
    (tmp_path / "llama_cpp.py").write_text("raise OSError('libllama.so: no such file')", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.setattr(peers.metadata, "version", only_known(peers.metadata.version))
    given = Namespace(**GIVEN)
    content = peers.documented(compared(peers, subject(engines, []), given), given)
    assert content["versions"]["llama-cpp-python"] == "unknown"


def only_known(version: Any) -> Any:
    def asked(package: str) -> str:
        if package == "llama-cpp-python":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    return asked


def test_some_engines_are_chosen_by_the_beginning_of_their_names(scripts: Any) -> None:
    peers, engines = scripts
    given = Namespace(**{**GIVEN, "peers": ["OTH"]})
    item = compared(peers, subject(engines, []), given)
    assert [row["name"] for row in item["peers"]] == ["eager", "ours, exact", "other"]


def test_each_system_is_compared_in_int8_too(scripts: Any) -> None:
    _, engines = scripts
    for name, wanted in (
        ("llama", ["torch.compile, max-autotune", "pruna, torch_compile", "torchao, int8 weights and activations"]),
        ("mms", ["torch.compile, max-autotune", "pruna, torch_compile", "ONNX Runtime int8", "OpenVINO int8"]),
    ):
        names = [one.name for one in engines.SUBJECTS[name](Namespace(**GIVEN)).engines]
        assert set(wanted) <= set(names)
        assert len(names) == len(set(names))


def test_lines_are_those_beside_the_eager_program(scripts: Any) -> None:
    _, engines = scripts
    counts = {one.__name__: engines.lines_of(one) for one in (engines.eager, engines.compiled, engines.ours)}
    assert counts == {"eager": 0, "compiled": 1, "ours": 3}
    assert engines.lines_of(engines.compiled, engines.ours) == 4


def test_an_engine_that_gives_no_answer_is_ended(scripts: Any) -> None:
    peers, engines = scripts
    closed: list[str] = []

    def dead() -> Any:
        raise RuntimeError("it ended")

    one = engines.Subject("llama", "one token", None, ("memory", 1e9), "", [
        engines.Candidate("eager", lambda: engines.Engine(lambda: (0.2, torch.ones(1))), (), ours=True),
        engines.Candidate("dead", lambda: engines.Engine(dead, close=lambda: closed.append("dead")), ()),
    ])  # fmt: skip
    (_, row) = compared(peers, one, Namespace(**GIVEN))["peers"]
    assert row["failed"] == "RuntimeError: it ended"
    assert closed == ["dead"]


# --- llama.cpp --------------------------------------------------------------------------------------------------------

ABSENT = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]


@pytest.fixture
def llama() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=9, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 700.0},
            initializer_range=0.125,  # so that attention matters beside the residual path
        )
    ).eval()  # fmt: skip


def test_weights_of_a_llama_have_the_names_of_ggml(scripts: Any, llama: LlamaModel) -> None:
    ggml = importlib.import_module("ggml")
    names = [ggml.name_of(name) for name in llama.state_dict()]
    assert len(set(names)) == len(names) == 2 * 9 + 2
    assert {name for name in names if not name.startswith("blk.")} == {"token_embd.weight", "output_norm.weight"}
    inner = ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert {f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in inner} < set(names)


def test_heads_that_rotate_neighbours_score_as_those_that_rotate_halves(scripts: Any) -> None:
    ggml = importlib.import_module("ggml")
    heads, size, width = 3, 8, 20
    torch.manual_seed(0)
    x, query, key = torch.randn(2, 5, width), torch.randn(heads * size, width), torch.randn(heads * size, width)
    angles = torch.arange(5.0)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)

    def split(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).unflatten(-1, (heads, size)).transpose(1, 2)

    def halves(weight: torch.Tensor) -> torch.Tensor:  # as transformers has it
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        return apply_rotary_pos_emb(split(weight), split(weight), cos[None], sin[None])[0]

    def pairs(weight: torch.Tensor) -> torch.Tensor:  # as ggml has it
        told = split(torch.from_numpy(ggml.neighbours(weight.numpy(), heads)))
        return torch.view_as_real(torch.view_as_complex(told.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    expected, found = (turned(query) @ turned(key).mT for turned in (halves, pairs))
    torch.testing.assert_close(found, expected)


def test_a_file_that_does_not_fit_is_not_begun(scripts: Any, llama: LlamaModel, tmp_path: Path) -> None:
    ggml = importlib.import_module("ggml")
    free = 3 * sum(weight.numel() for weight in llama.parameters())
    ggml.need_room(llama, "BF16", tmp_path, free)
    ggml.need_room(llama, "Q8_0", tmp_path, free)
    with pytest.raises(OSError, match=r"a file of 0\.0 GB is needed in .*, and 0\.0 GB are free"):
        ggml.need_room(llama, "F32", tmp_path, free)
    ggml.need_room(llama, "F32", tmp_path)


def test_the_process_of_llama_cpp_has_no_variable_that_the_library_sets(
    scripts: Any, llama: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its user would not have it either, and its threads would sleep at each barrier."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    ggml = importlib.reload(importlib.import_module("ggml"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the library does when it loads a model
    (tmp_path / "child.py").write_text(
        "import os\nprint('ready', flush=True)\ninput()\nprint(int('OMP_WAIT_POLICY' in os.environ))", "utf-8"
    )
    monkeypatch.setattr(ggml, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(ggml, "write", lambda *_: None)
    engine = ggml.Engine(llama, "F32", 1, torch.randn(2, 3, 64), torch.randn(1, 2, 1, 64))
    assert engine.prompt() == 0
    engine.close()


@pytest.mark.skipif(bool(ABSENT), reason="llama-cpp-python and gguf are not installed: the engine llama.cpp needs both")
@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("F32", 0.0, 1e-5), ("F16", 1e-4, 5e-3), ("BF16", 1e-3, 3e-2), ("Q8_0", 3e-3, 6e-2)],
)
def test_llama_cpp_computes_what_transformers_computes(
    scripts: Any, llama: LlamaModel, kind: str, least: float, most: float
) -> None:
    """Decode steps behind a prompt, two rows that differ, twice: the second time with a cache that is full."""
    ggml = importlib.import_module("ggml")
    prompt, tokens = torch.randn(2, 10, 64), torch.randn(4, 2, 1, 64)
    with torch.no_grad():
        past = llama(inputs_embeds=prompt, use_cache=True).past_key_values
        for token in tokens:
            hidden = llama(inputs_embeds=token, past_key_values=past, use_cache=True).last_hidden_state
    engine = ggml.Engine(llama, kind, 1, prompt, tokens)
    try:
        assert engine.prompt() > 0
        for _ in range(2):
            seconds, found = engine.steps()
            assert seconds > 0
            assert found.shape == hidden.shape
            assert least < float((found - hidden).norm() / hidden.norm()) < most  # in this format indeed
    finally:
        engine.close()
    assert engine._child.poll() is not None


@pytest.mark.skipif(bool(ABSENT), reason="llama-cpp-python and gguf are not installed: the engine llama.cpp needs both")
def test_llama_cpp_that_cannot_read_its_file_says_why(
    scripts: Any, llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ggml = importlib.import_module("ggml")
    folders: list[Path] = []

    def write(_model: Any, _kind: str, path: Path) -> None:
        folders.append(path.parent)
        path.write_bytes(b"x")

    monkeypatch.setattr(ggml, "write", write)
    with pytest.raises(RuntimeError, match="llama.cpp ended with status 1: .*; no model was loaded"):
        ggml.Engine(llama, "F32", 1, torch.randn(2, 3, 64), torch.randn(1, 2, 1, 64))
    assert not folders[0].exists()


def test_an_engine_in_a_process_of_its_own_is_no_disturbance(scripts: tuple[Any, Any]) -> None:
    peers, _ = scripts
    alone, both = Machine(), peers.WithChildren(Machine())
    spin = (
        "import sys, time\nsys.stdin.readline()\nend = time.process_time() + 0.5\n"
        "while time.process_time() < end: pass\nprint('done', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", spin], stdin=PIPE, stdout=PIPE) as engine:
        before = alone.usage().own, both.usage().own
        assert engine.stdin is not None
        assert engine.stdout is not None
        engine.stdin.write(b"go\n")  # only now does it begin
        engine.stdin.flush()
        assert engine.stdout.readline() == b"done\n"
        own, with_engine = alone.usage().own - before[0], both.usage().own - before[1]
        assert with_engine - own > 0.3
        engine.communicate()
