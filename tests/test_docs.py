"""The code on the pages of docs/ runs, against upstream's own classes at small size; what the pages name exists.

Each page is one program: its blocks share a namespace. Only what would fetch from a hub is replaced, and a web
framework that is not installed. A block that starts with "```py" is compiled and not run.
"""

from __future__ import annotations

import ast
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
from accelerate_tts.events import Event
from accelerate_tts.stages.catalogue import default_stages
from accelerate_tts.stages.process.constants import KeptConstants
from accelerate_tts.tuning.policy import OVER_BUDGET
from doubles import is_faster

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INTEGRATION, PERFORMANCE, SUMMARY = "INTEGRATION_GUIDE.md", "PERFORMANCE_OPTIMIZATIONS.md", "OPTIMIZATIONS_SUMMARY.md"
TUTORIAL, TROUBLESHOOTING = "tutorial.md", "TROUBLESHOOTING.md"
TEXT = "Hello there."


def blocks(page: Path) -> Iterator[tuple[str, bool]]:
    """Each block, behind as many empty lines as make its line numbers the page's; and whether it is to be run."""
    content = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```py(thon)?\n(.*?)^```", content, re.DOTALL | re.MULTILINE):
        yield "\n" * content.count("\n", 0, found.start(2)) + found[2], bool(found[1])


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
    mms(monkeypatch, example("mms_backend"))
    web(monkeypatch)
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "2")  # each; what tuning does to them is shown by tests/models
    page = run(INTEGRATION)
    assert page["wave"].shape == (1, 1, 960)

    async def serve() -> None:
        async with page["app"].lifespan(page["app"]):
            spoken = (await page["speak"](TEXT)).content
            streamed = [piece async for piece in (await page["speak_in_pieces"](TEXT)).content]
            assert len(spoken) > 0
            assert sum(map(len, streamed)) > 0
            assert (await page["health"]())["recompiles"] == 0

    asyncio.run(serve())


# Each guide, the example whose model it speaks with, and what takes the place of the hub.
GUIDES = {
    "chatterbox": ("chatterbox_backend", chatterbox),
    "higgs": ("higgs_backend", higgs),
    "mms": ("mms_backend", mms),
    "streaming": ("xtts_backend", coqui),
    "voice-clone": ("voice_clone_service", recordings),
    "xtts": ("xtts_backend", coqui),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs(guide: str, monkeypatch: pytest.MonkeyPatch, example: Callable[[str], ModuleType]) -> None:
    module, fetch = GUIDES[guide]
    fetch(monkeypatch, example(module))
    monkeypatch.setenv("ACCELERATE_TTS_TUNE_SECONDS", "2")
    page = run(f"guides/{guide}.md")
    if guide == "voice-clone":
        assert np.array_equal(page["voice"], page["again"])
    elif guide == "chatterbox":
        assert page["german"].numel() > 0
        assert len(page["sentences"]) == 2
    elif guide == "xtts":
        assert len(page["pieces"]) > 0
    elif guide == "streaming":
        assert len(page["early"]) >= 2


def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, example: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page = run(TUTORIAL)
    assert page["receipt"].kept, "every stage that is right counts as faster here"
    assert (tmp_path / "receipt.html").exists()
    assert page["difference"] <= 1e-4
    assert page["events"] == []


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
    pages = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
    with_code = {name for name, content in pages.items() if "```python" in content}
    guides = {f"guides/{name}.md" for name in GUIDES}
    run_here = {INTEGRATION, PERFORMANCE, SUMMARY, TUTORIAL, *guides}
    assert with_code == run_here


WITH_CODE = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
             if "```py" in page.read_text(encoding="utf-8")]  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_compiles(page: Path) -> None:
    """Also the blocks of pages that are not run, such as the front page's."""
    for block, _ in blocks(page):
        compile(block, page.name, "exec")


# --- what the pages name exists ---------------------------------------------------------------------------------------

# Files by their names as a page gives them: whole, or without the folders in front.
FOLDERS = ("accelerate_tts", "benchmarks", "tests", "examples", "docs", ".ci", ".github")
FILES = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
FILES |= {path.relative_to(ROOT) for path in ROOT.iterdir() if path.is_file()}
NAMED = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md"))])
MADE_BY_RUNS = {"ENVIRONMENTS.md", "RESULTS.md", "STRANGERS.md"}  # they quote the messages of upstream's packages
# Files of the reader's own, of other projects, and of CONTRIBUTING's examples. 0001 has the folders before its move.
OTHERS = re.compile(
    r"my_voice\.py|receipt\.json|xtts_v2/.*|voices/.*|voices\.json|llama\.cpp|.*snake(_vocoder)?\.py|.*/hpu\.py"
)
BEFORE_A_MOVE = {"0001-the-house.md": re.compile(r"engine/.*|loading\.py")}


@pytest.mark.parametrize("page", NAMED, ids=[page.name for page in NAMED])
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(?:ACCELERATE_TTS|TRANSLATOR)_[A-Z]\w*", text)) <= VARIABLES
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make\s([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    if page.name in MADE_BY_RUNS:
        return
    for name in re.findall(r"(?<![\w/.-])[\w.-][\w./-]*\.(?:py|pyi|cpp|h|toml|j2|json|md|yml)\b(?!\w)", text):
        moved = BEFORE_A_MOVE.get(page.name)
        if OTHERS.fullmatch(name) or (moved and moved.fullmatch(name)):
            continue
        if name.startswith(".github/") and not (ROOT / ".github").exists():
            continue  # an sdist has none
        parts = Path(name).parts[Path(name).parts.count("..") :]
        assert any(file.parts[-len(parts) :] == parts for file in FILES), f"{name} is not a file"
    for name, file in re.findall(r"`(_?\w+)` (?:in|of)\s`([\w/]+\.py)`", text):
        (path,) = [found for found in FILES if found.as_posix().endswith(f"/{file}") or found.as_posix() == file]
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{file} has no {name}"


def test_a_workflow_runs_each_check() -> None:
    """Tests that no job runs are tests that nobody sees fail. Each target that a job names exists."""
    workflows = ROOT / ".github" / "workflows"
    if not workflows.exists():
        pytest.skip("the source distribution has no .github")
    text = "\n".join(file.read_text(encoding="utf-8") for file in workflows.glob("*.yml"))
    found = set(re.findall(r"\bmake ([a-z-]+)", text))
    checks = "test test-slow cluster-test gpu-dry-run kernels-test kernels-tidy lint types imports docs audit"
    assert found >= set(checks.split())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found <= set(targets)


@pytest.mark.parametrize("page", NAMED, ids=[page.name for page in NAMED])
def test_every_command_and_option_that_a_page_shows_exists(page: Path) -> None:
    from typer.main import get_command

    from accelerate_tts.cli.app import app

    text = re.sub(r"(`[^`\n]*)\n\s*([^`\n]*`)", r"\1 \2", page.read_text(encoding="utf-8"))  # a span over two lines
    for line in re.findall(r"(?:^|`)accelerate-tts ([a-z][^`\n#]*)", text, re.MULTILINE):
        command: Any = get_command(app)
        words = line.split()
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"accelerate-tts {line}"
            command = command.commands[words.pop(0)]
        options = {"--help"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options, f"accelerate-tts {line}"
    for script, rest in re.findall(r"\b(benchmarks/[\w/]+\.py)([^`\n#,;)]*)", text):
        code = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r" (--[a-z][a-z-]*)", rest):
            assert f'"{option}"' in code, f"{script} has no {option}"


def test_the_performance_page_lists_the_stages_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / PERFORMANCE).read_text(encoding="utf-8")
    section = page[page.index("## The stages") : page.index("Stages that exclude each other")]
    openings = re.findall(r"^- ((?:[^:]|\n)*?):\s", section, re.MULTILINE)
    listed = {" ".join(name.split()) for opening in openings for name in re.findall(r"`([^`]+)`", opening)}
    halves = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
    monkeypatch.setattr("accelerate_tts.device.half_dtypes.half_dtypes", lambda kind: halves[kind])
    stages = [stage for device in halves for stage in default_stages(device, "default", "fast")]
    kernels = re.compile(r"(int8 linear layers) \(.*\)")  # which of them there are depends on the machine
    assert listed - {"balanced", "fast"} == {KeptConstants.name} | {kernels.sub(r"\1", stage.name) for stage in stages}


# What torch says itself, or asks about a call.
OF_TORCH = ("InvalidCxxCompiler", "Inference tensors")
# Before or behind these a message has a value, or the code puts two texts together.
VALUES = r"(?= is off)|(?= did not return)|(?= was (?:not applied|ignored))|\bcpu\b|\bcuda\b"


def quoted() -> Iterator[str]:
    """The messages at the head of the items of the troubleshooting page, in pieces without values."""
    page = (DOCS / TROUBLESHOOTING).read_text(encoding="utf-8")
    for item in re.findall(r"^- ((?:`[^`]+`[,;: ]*\n?\s*)+)", page, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", item):
            text = re.sub(r"^(rejected|note|failed|stopped|undone|\w+Error): ", "", " ".join(message.split()))
            pieces = re.split(rf"\.\.\.|; |, or |\b\d[\d.]*x?|\btfmr\b|: |, |{VALUES}", text)
            yield from (piece.strip(" :,()") for piece in pieces if not text.startswith(OF_TORCH))


def said(source: str) -> Iterator[str]:
    """The texts in a file's code, with nothing in place of the values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                CONSTANTS.get(ast.unparse(part.value), "\0") if isinstance(part, ast.FormattedValue) else part.value
                for part in node.values
                if isinstance(part, (ast.Constant, ast.FormattedValue))
            )


CONSTANTS = {"OVER_BUDGET": OVER_BUDGET}


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    messages = {text for file in FILES if file.parts[0] == "accelerate_tts" and file.suffix == ".py"
                for text in said((ROOT / file).read_text(encoding="utf-8"))}  # fmt: skip
    unknown = {piece for piece in quoted() if len(piece) > 3 and not any(piece in text for text in messages)}
    assert unknown == set()


DEGRADED = {cls.__name__ for cls in Event.__subclasses__() if cls.degraded}


def emitted() -> Iterator[tuple[str, list[str]]]:
    """Each place of the code that emits a degradation, and its texts without values."""
    for file in sorted(path for path in FILES if path.parts[0] == "accelerate_tts" and path.suffix == ".py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DEGRADED:
                texts = [text for argument in node.args for text in said(ast.unparse(argument))]
                pieces = [piece.strip(" :,;()'") for text in texts for piece in text.split("\0")]
                yield f"{file}:{node.lineno}", [piece for piece in pieces if len(piece) > 4]


def test_troubleshooting_has_every_degradation_of_the_code() -> None:
    """Each event by its name, and each place that emits one by a text of it; a reason alone may be foreign."""
    page = " ".join((DOCS / TROUBLESHOOTING).read_text(encoding="utf-8").split())
    assert {name for name in DEGRADED if f"`{name}`" not in page} == set()
    places = list(emitted())
    assert len(places) > 50
    quotes = [quote for quote in quoted() if len(quote) > 6]
    missing = [place for place, texts in places if texts and not any(q in text for text in texts for q in quotes)]
    assert missing == []


def test_troubleshooting_has_every_exception_and_event() -> None:
    page = (DOCS / TROUBLESHOOTING).read_text(encoding="utf-8")
    names = {cls.__name__ for cls in Event.__subclasses__() if cls.__module__.startswith("accelerate_tts.")}
    for file in FILES:
        if file.parts[0] == "accelerate_tts" and file.suffix == ".py":
            source = (ROOT / file).read_text(encoding="utf-8")
            names |= set(re.findall(r"^class (\w+)\(AccelerateTTSError\b", source, re.MULTILINE))
    assert len(names) > 25
    assert {name for name in names if f"`{name}`" not in page} == set()


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


PAGES = sorted([*NAMED, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "results" / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_lines_are_short(page: Path) -> None:
    """Lines have at most 100 columns, except pictures, which a machine may name, and tables that a script writes."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if not re.fullmatch(r"!\[.*\]\(.*\)", line)]
    if page.name in MADE_BY_RUNS:
        lines = [line for line in lines if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_and_pictures_are_there(page: Path) -> None:
    """`make docs` checks anchors and names, too."""
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_anchors_are_there(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in headings(page.parent / link if link else page), f"{link}#{anchor}"


def test_the_reference_has_every_public_name() -> None:
    import accelerate_tts

    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    stub = Path(accelerate_tts.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    for name in re.findall(r" import ([a-zA-Z]\w*) as ", stub):
        module = getattr(accelerate_tts, name).__module__
        assert {module, f"{module}.{name}"} & entries, name


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_block_of_code_is_one_for_the_site(page: Path) -> None:
    """A word behind the language makes a block plain text there."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert [fence for fence in fences if not re.fullmatch(r"\w*", fence)] == []


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in config, page
