"""Import cost, public names, dependencies, and the test of the wheel in place of the folder."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import accelerate_tts

HEAVY = ["torch", "numpy", "transformers", "rich", "typer", "onnx", "soundfile", "psutil"]

PROBE = """
import json, sys
before = set(sys.modules)
{code}
print(json.dumps(sorted(name for name in set(sys.modules) - before if "." not in name)))
"""


def imported(code: str, tmp_path: Path) -> set[str]:
    """The top-level modules that `code` imports in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


DECORATED = """
import accelerate_tts
class Backend:
    @accelerate_tts.optimized_model(warmup="Hello there.")
    def load(self): ...
    @accelerate_tts.inference
    async def synthesize(self, text): ...
    @accelerate_tts.cached_embedding(sets=("conds",))
    def prepare(self, path): ...
accelerate_tts.fast_inference, accelerate_tts.Settings, accelerate_tts.set_active(True)
"""


@pytest.mark.parametrize("code", ["import accelerate_tts", DECORATED], ids=["import", "decorators"])
def test_importing_and_decorating_imports_nothing_heavy(code: str, tmp_path: Path) -> None:
    modules = imported(code, tmp_path)
    assert "accelerate_tts" in modules
    assert not modules & set(HEAVY)


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = """
import contextlib, io
from accelerate_tts.cli import main
for words in (["--help"], ["demo", "--help"], ["doctor", "--help"], ["pack", "--help"], ["--version"]):
    sys.argv = ["accelerate-tts", *words]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main()
"""
    modules = imported(code, tmp_path)
    assert "typer" in modules
    assert not modules & {"torch", "numpy", "transformers", "onnx"}


def test_the_command_line_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom accelerate_tts.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "accelerate-tts needs typer: pip install 'accelerate_tts[cli]'\n"


def test_the_front_door_is_short() -> None:
    """The public names, and the errors that public functions raise."""
    assert set(accelerate_tts.__all__) == {
        "optimized_model", "inference", "fast_inference", "cached_embedding", "receipt_of", "PerformanceOptimizer",
        "get_performance_optimizer", "create_inference_context", "Settings", "set_active", "testing", "add_hook",
        "AccelerateTTSError", "ConcurrencyError", "InferenceContextError", "ModelError", "PackError", "ReloadError",
        "SettingsError", "WarmupError",
    }  # fmt: skip


def test_every_public_name_is_there_and_documented() -> None:
    stub = Path(accelerate_tts.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: node.module for node in imports for alias in node.names}
    assert all(alias.name == alias.asname for node in imports for alias in node.names), "else it is private"
    assert names.keys() >= set(accelerate_tts.__all__)
    assert names.keys() <= set(dir(accelerate_tts))
    for name, module in names.items():
        value = getattr(accelerate_tts, name)
        assert value is getattr(importlib.import_module(str(module)), name)
        assert name == "__version__" or value.__doc__, name
    known = {name for name in dir(accelerate_tts) if callable(getattr(accelerate_tts, name)) and name[0] != "_"}
    assert known - {"Any", "import_module"} <= names.keys(), "type checkers know what there is"
    with pytest.raises(AttributeError, match="no attribute 'speed_up'"):
        _ = accelerate_tts.speed_up  # type: ignore[attr-defined]


def test_errors_of_public_functions_are_public() -> None:
    from accelerate_tts import errors

    own = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert "WarmupError" in own
    assert set(own) <= set(dir(accelerate_tts))


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    root = Path(accelerate_tts.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(f"{file.relative_to(root)}:{node.lineno}")
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    help(accelerate_tts)
    page = capsys.readouterr().out
    example = page[: page.index("By default everything stays exact")]
    for word in ("@optimized_model(warmup=", "@inference", "with fast_inference():", "print(receipt_of(backend))"):
        assert word in example
    assert "class PackError" in page
    code = "\n".join(line for line in (accelerate_tts.__doc__ or "").splitlines() if line.startswith("    "))
    compile(textwrap.dedent(code), "the docstring", "exec")


def test_the_core_depends_on_three_packages() -> None:
    required = importlib.metadata.requires("accelerate_tts") or []
    core = {line.split(">")[0].strip() for line in required if "extra ==" not in line}
    assert core == {"torch", "wrapt", "psutil"}
    copyleft = [line for line in required if line.startswith(("phonemizer-fork", "espeakng-loader"))]
    assert copyleft
    # The test and dev extras hold the demo extra; nobody else does.
    extras = {line.split("extra ==")[1].strip(" '\"") for line in copyleft}
    assert extras == {"demo", "test", "dev"}


def test_the_wheel_is_what_is_tested() -> None:
    """`make test` installs the built wheel; only a run by hand against the folder is let off."""
    if os.environ.get("PYTHONPATH"):
        return
    installed = Path(accelerate_tts.__file__)
    assert "site-packages" in installed.parts
    assert (installed.parent / "py.typed").exists()
    assert importlib.metadata.version("accelerate_tts") == accelerate_tts.__version__
