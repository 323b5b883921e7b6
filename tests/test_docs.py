"""The code on the pages of docs/ runs, against upstream's own classes at small size; what the pages name exists.

Each page is one program: its blocks share a namespace. Only what would fetch from a hub is replaced, and a web
framework that is not installed. A block that starts with "```python no-run" is compiled and not run.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from accelerate_tts.environment import VARIABLES
from doubles import is_faster

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INTEGRATION, PERFORMANCE, SUMMARY = "INTEGRATION_GUIDE.md", "PERFORMANCE_OPTIMIZATIONS.md", "OPTIMIZATIONS_SUMMARY.md"
TEXT = "Hello there."


def blocks(page: Path) -> Iterator[tuple[str, bool]]:
    """Each block, behind as many empty lines as make its line numbers the page's; and whether it is to be run."""
    content = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python( no-run)?\n(.*?)^```", content, re.DOTALL | re.MULTILINE):
        yield "\n" * content.count("\n", 0, found.start(2)) + found[2], not found[1]


def run(name: str, **names: Any) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": f"docs_{Path(name).stem.lower()}", **names}
    for block, wanted in blocks(DOCS / name):
        code = compile(block, name, "exec")
        if wanted:
            exec(code, namespace)  # noqa: S102 - our own pages
    return namespace


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, decide: Any) -> Callable[[str], ModuleType]:
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")  # minutes; compiling has tests of its own
    # Nothing is timed, and whatever is right is kept: the pages are to run with all of it.
    decide(compare=is_faster)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    warnings.simplefilter("ignore", FutureWarning)  # of the upstream packages' own imports
    return importlib.import_module


def hub(monkeypatch: pytest.MonkeyPatch, cls: Any, make: Callable[[], Any]) -> None:
    """Give a class a `from_pretrained` that fetches nothing."""

    def from_pretrained(*_args: Any, **_kwargs: Any) -> Any:
        torch.manual_seed(0)
        return make()

    monkeypatch.setattr(cls, "from_pretrained", staticmethod(from_pretrained))


def mms(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    import transformers

    def tokenizer(text: str, return_tensors: str) -> Any:
        return transformers.BatchEncoding({"input_ids": torch.tensor([module.letters(text, 38)])})

    hub(monkeypatch, transformers.VitsModel, lambda: module.random(tiny=True)[0])
    hub(monkeypatch, transformers.AutoTokenizer, lambda: tokenizer)


def chatterbox(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    for variant in module.VARIANTS:
        make = partial(module.random, seconds=0.3, tiny=True, variant=variant)
        hub(monkeypatch, module.class_of(variant), make)


def higgs(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    import transformers

    class Processor:
        def __init__(self) -> None:
            loaded = module.random(tiny=True)
            self.audio_tokenizer, self.decode, self._prepare = loaded.codec, loaded.decode, loaded.prepare

        def apply_chat_template(self, chat: Any, **options: Any) -> Any:
            return self._prepare(chat[-1]["content"][0]["text"])

    def model() -> Any:
        made = module.random(tiny=True).model
        made.generate = importlib.import_module("_common").at_most(made.generate, max_new_tokens=12)
        return made

    hub(monkeypatch, transformers.HiggsAudioV2ForConditionalGeneration, model)
    hub(monkeypatch, transformers.AutoProcessor, Processor)


def coqui(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    original = module.xtts.Xtts

    def small(_config: Any) -> Any:
        torch.manual_seed(0)
        with patch.object(module.xtts, "Xtts", original):
            model, latents, speaker = module.random(0.3, tiny=True)
        model.load_checkpoint = lambda *_args, **_kwargs: None
        model.get_conditioning_latents = lambda audio_path: (latents, speaker)
        return model

    monkeypatch.setattr(module.xtts, "Xtts", small)
    monkeypatch.setattr(module.XttsConfig, "load_json", lambda _self, _path: None)


def recordings(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    import resemblyzer

    monkeypatch.setattr(resemblyzer, "preprocess_wav", lambda _path: module.hum(120.0, 1.6))


class Routes:
    """Stand-in for FastAPI, which accepts the functions."""

    def __init__(self, *, lifespan: Any) -> None:
        self.lifespan = lifespan

    def post(self, _path: str) -> Callable[[Any], Any]:
        return lambda function: function

    get = post


def web(monkeypatch: pytest.MonkeyPatch) -> None:
    def response(content: Any, media_type: str) -> Any:
        return SimpleNamespace(content=content)

    names = {"Response": response, "StreamingResponse": response}
    for name, content in {"fastapi": {"FastAPI": Routes}, "fastapi.responses": names}.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_integration_guide_runs(monkeypatch: pytest.MonkeyPatch, example: Callable[[str], ModuleType]) -> None:
    chatterbox(monkeypatch, example("chatterbox_backend"))
    higgs(monkeypatch, example("higgs_backend"))
    mms(monkeypatch, example("mms_backend"))
    coqui(monkeypatch, example("xtts_backend"))
    recordings(monkeypatch, example("voice_clone_service"))
    web(monkeypatch)
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "2")  # each; what tuning does to them is shown by tests/models
    page = run(INTEGRATION)
    assert np.array_equal(page["voice"], page["again"])
    assert page["wave"].shape == (1, 1, 960)
    assert page["german"].numel() > 0
    assert len(page["sentences"]) == 2
    assert len(page["pieces"]) > 0

    async def serve() -> None:
        async with page["app"].lifespan(page["app"]):
            spoken = (await page["speak"](TEXT)).content
            streamed = [piece async for piece in (await page["stream"](TEXT)).content]
            assert len(spoken) > 0
            assert sum(map(len, streamed)) > 0
            assert (await page["health"]())["recompiles"] == 0

    asyncio.run(serve())


def test_the_performance_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, example: Any) -> None:
    mms(monkeypatch, example("mms_backend"))
    monkeypatch.chdir(tmp_path)
    page = run(PERFORMANCE)
    assert (tmp_path / "receipt.html").exists()
    assert page["error"] <= 1e-4
    assert page["size"] >= 1
    assert page["degraded"] == []


def test_the_summary_runs() -> None:
    class Model:
        conds = None

        def prepare_conditionals(self, path: str) -> None:
            self.conds = path

        def get_conditioning_latents(self, path: str) -> torch.Tensor:
            return torch.ones(len(path))

    class Encoder:
        def embed_utterance(self, wave: Any) -> Any:
            return wave

    from accelerate_tts import cached_embedding

    page = run(SUMMARY, model=Model(), encoder=Encoder(), cached_embedding=cached_embedding)
    page["model"].prepare_conditionals("a")
    assert page["model"].conds == "a"


def test_every_page_with_code_is_run() -> None:
    with_code = {page.name for page in DOCS.rglob("*.md") if "```python" in page.read_text(encoding="utf-8")}
    assert with_code == {INTEGRATION, PERFORMANCE, SUMMARY, "SERVICE.md"}, "the service has tests of its own"


@pytest.mark.parametrize("name", [INTEGRATION, PERFORMANCE])
def test_what_a_page_names_is_there(name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    for file in re.findall(r"(?:examples|benchmarks)/\w+\.py", page):
        assert (ROOT / file).exists(), file
    assert set(re.findall(r"\bACCELERATE_TTS_\w+", page)) <= VARIABLES
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)|`make (\w+)", page, re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_decisions_that_files_name_are_there() -> None:
    decisions = {path.name for path in (DOCS / "decisions").glob("0*.md")}
    assert len(decisions) <= 20, "merge those that tell one story"
    numbers = {name[:4] for name in decisions}
    for folder in ("accelerate_tts", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.[pch]*"):
            if path.suffix in {".py", ".h", ".cpp"}:
                text = path.read_text(encoding="utf-8")
                assert set(re.findall(r"docs/decisions/([\w-]+\.md)", text)) <= decisions, path
                assert set(re.findall(r"\bdecision (\d{4})\b", text)) <= numbers, path


PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_lines_are_short(page: Path) -> None:
    """Lines have at most 100 columns, except in tables that a script writes."""
    lines = page.read_text(encoding="utf-8").splitlines()
    if page in (DOCS / "ENVIRONMENTS.md", DOCS / "STRANGERS.md", ROOT / "README.md"):
        lines = [line for line in lines if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []
