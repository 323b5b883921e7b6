"""The command that times other engines: what it does with one that fails, is absent or takes too long."""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from accelerate_tts.cli.bench.measure import bytes_of_a_token, bytes_read_by_a_token
from accelerate_tts.kernels.library import level, missing
from accelerate_tts.plan import Part
from accelerate_tts.stages.decode.fused_decoder import FusedBlocksStage
from schemas import SCHEMA, objections

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GIVEN = {"size": "tiny", "precision": ["exact"], "layers": None, "rounds": 2, "tune_seconds": 5.0, "peers": None,
         "threads": 1, "set_up_seconds": 0.2, "json": None, "into": None}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The command and its engines."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("peers"), importlib.import_module("engines")
    for name in ("peers", "engines", "ggml", "record"):
        sys.modules.pop(name, None)


def subject(engines: Any, closed: list[str]) -> Any:
    def engine(seconds: float, output: Any) -> Any:
        return engines.Engine(lambda: (seconds, output), close=lambda: closed.append("closed"))

    def broken() -> Any:
        raise ValueError("no such format\nand more")

    def slow() -> Any:
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
    assert rows["absent"]["failed"] == "no_such_module is not installed"
    assert "absent is left out: no_such_module is not installed" in capsys.readouterr().out
    assert rows["broken"]["failed"] == "ValueError: no such format"
    assert rows["slow"]["failed"] == "OverTimeError: not ready within 0 s"
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


def test_weights_of_a_llama_have_the_names_of_ggml(scripts: Any) -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    ggml = importlib.import_module("ggml")
    names = [ggml.name_of(name) for name in LlamaModel(config).state_dict()]
    assert len(set(names)) == len(names) == 2 * 9 + 2
    known = r"blk\.[01]\.(attn|ffn)_\w+\.weight|(token_embd|output_norm)\.weight"
    assert all(re.fullmatch(known, name) for name in names), names
