"""docs/SECURITY.md names a test for each sentence, and the package's source does not do what it says is not done."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import accelerate_tts

PACKAGE = Path(accelerate_tts.__file__).parent
# They run what is in the data, or speak to a network.
MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "socket", "ssl", "http",
    "urllib", "urllib3", "requests", "httpx", "ftplib", "smtplib", "xmlrpc", "telnetlib", "pty", "code",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.posix_spawn", "tempfile.mktemp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "numpy.load", "np.load", "torch.jit.load", "pickle.loads",
    "importlib.machinery.ExtensionFileLoader",
}  # fmt: skip
# The one starts Python for each variant of a benchmark; the other knows by its class what inductor waits for.
STARTS_PROGRAMS = {"cli/bench/processes.py", "runtime/compile_timeout.py"}


def found_in(source: str, name: str) -> Iterator[str]:
    """Return forbidden operations in a source file, each with its line."""
    for node in ast.walk(ast.parse(source)):
        what = None
        if isinstance(node, ast.Import):
            what = next((each.name for each in node.names if _forbidden(each.name, name)), None)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            what = node.module if _forbidden(node.module, name) else None
        elif isinstance(node, ast.Call):
            what = _of_call(node)
        if what is not None:
            yield f"{name}:{getattr(node, 'lineno', 0)}: {what}"


def _forbidden(module: str, name: str) -> bool:
    top = module.partition(".")[0]
    return top in MODULES or (top == "subprocess" and name not in STARTS_PROGRAMS)


def _of_call(call: ast.Call) -> str | None:
    named = ast.unparse(call.func)
    options = {each.arg: each.value for each in call.keywords}
    if named in CALLS or (isinstance(call.func, ast.Name) and named in BUILTINS):
        return named
    if named == "torch.load" and not _is_true(options.get("weights_only")):
        return "torch.load without weights_only=True"
    if "shell" in options and not (isinstance(options["shell"], ast.Constant) and options["shell"].value is False):
        return "shell="
    return "allow_pickle=" if "allow_pickle" in options else None


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    sources = {str(path.relative_to(PACKAGE)).replace("\\", "/"): path for path in PACKAGE.rglob("*.py")}
    sources.pop("kernels/build.py", None)  # starts the compiler where wheels are built, and is in none
    assert len(sources) > 90
    found = [line for name, path in sources.items() for line in found_in(path.read_text(encoding="utf-8"), name)]
    assert not found, "\n".join(found)
    assert sources.keys() > STARTS_PROGRAMS
    loads = [name for name, path in sources.items() if "torch.load(" in path.read_text(encoding="utf-8")]
    assert not loads, "docs/SECURITY.md says that nobody reads torch's files"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from shelve import open",
        "from urllib.request import urlopen",
        "import subprocess",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=chosen)",
        "torch.load(file, **options)",
        "subprocess.run(line, shell=True)",
        "Popen(line, shell=chosen)",
        "os.system('ls')",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "np.load(file, allow_pickle=True)",
        "def f():\n    if x:\n        return [exec(y) for y in z]",
    ],
)
def test_what_it_would_find(source: str) -> None:
    assert list(found_in(source, "packs/warm_pack.py"))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(x)",
        "torch.compile(m)",
        "import copyreg",
        "torch.load(f, weights_only=True)",
        "x.exec()",
    ],
)
def test_what_is_none_of_it(source: str) -> None:
    assert not list(found_in(source, "packs/warm_pack.py"))


# --- what is read -----------------------------------------------------------------------------------------------------

OPENS = """
import os, sys
from pathlib import Path
import torch
import accelerate_tts
from accelerate_tts import optimized_model, receipt_of

package, library, found = os.path.dirname(accelerate_tts.__file__), os.path.dirname(os.__file__), set()

def opened(event, arguments):
    if event != "open" or not isinstance(arguments[0], str):
        return
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib") or "importlib" in name:
            return  # a module, or what a package says of itself
        if not name.startswith((library, "<")) or "site-packages" in name:
            break
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(package):
        found.add(arguments[0])

sys.addaudithook(opened)
for _ in range(2):
    layers = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256)).eval()
    torch.manual_seed(0)
    for parameter in layers.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    model = optimized_model(warmup=torch.ones(1, 256), precision="fast", tune_seconds=5)(lambda: layers)()
    assert receipt_of(model) is not None
print("\\n".join(sorted(found)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the page names files of Linux")
def test_a_load_opens_what_the_page_names(tmp_path: Path) -> None:
    """Tuned, and from a pack; whatever torch opens for us is torch's."""
    given = {"PACK": "1", "PACK_FOLDER": str(tmp_path / "packs"), "GUARD_WEIGHTS": "disk", "TUNE_PATIENCE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", OPENS], capture_output=True, text=True, check=False,
        env={**os.environ, **{f"ACCELERATE_TTS_{name}": value for name, value in given.items()},
             "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("\n")
    assert any(path.startswith(str(tmp_path / "packs")) for path in found), "nothing was seen"
    named = (str(tmp_path), "/proc/", "/sys/fs/cgroup", str(PACKAGE / "kernels"))
    assert [path for path in found if path and not path.startswith(named)] == []


# --- the threat model -------------------------------------------------------------------------------------------------

TESTS = Path(__file__).parent
MODEL = TESTS.parent / "docs" / "SECURITY.md"


def sentences(text: str) -> list[str]:
    """The sentences of the model: each item of what an attacker can and cannot do."""
    part = text.partition("\n## What an attacker can and cannot do\n")[2].partition("\n## ")[0]
    return [" ".join(item.split()) for item in re.findall(r"^- (.*(?:\n  .*)*)", part, re.MULTILINE)]


def faults(text: str, tests: set[str]) -> list[str]:
    """Sentences that end without the name of a test, and names of tests that there are not."""
    found = []
    for item in sentences(text):
        names = re.findall(r"\(`(\w+)`\)", item)
        if not item.endswith("`).") or ". " in item:
            found.append(f"not one sentence that ends with its test: {item}")
        found += [f"there is no {name}: {item}" for name in names if name not in tests]
    return found


def test_each_sentence_of_the_threat_model_has_its_test() -> None:
    tests = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    text = MODEL.read_text(encoding="utf-8")
    assert len(sentences(text)) > 30
    assert faults(text, tests) == []
    headings = re.findall(r"^### (.*)", text, re.MULTILINE)
    for what in ("packs", "the key", "embedding", "receipts", "environment", "libraries", "read files"):
        assert any(what in heading for heading in headings), f"the model says nothing of {what}"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ("He cannot.", "not one sentence"),
        ("He cannot (`test_gone`).", "there is no test_gone"),
        ("He cannot (`test_here`). He can.", "not one sentence"),
        ("He cannot (`test_here`). He can (`test_here`).", "not one sentence"),
        ("He cannot this\n  (`test_here`), nor that (`test_gone`).", "there is no test_gone"),
    ],
)
def test_a_sentence_without_its_test_is_found(item: str, fault: str) -> None:
    text = (
        f"# A\n\n## What an attacker can and cannot do\n\n- {item}\n- He can (`test_here`).\n\n## B\n\n- Not of it.\n"
    )
    (found,) = faults(text, {"test_here"})
    assert fault in found
