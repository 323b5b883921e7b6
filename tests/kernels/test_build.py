"""Build of the kernels' library into a wheel, and of a wheel without a compiler. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def module(path: str) -> Any:
    """A file of the source tree by itself, as a wheel's build has it."""
    spec = importlib.util.spec_from_file_location(f"_of_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_no_compiler_is_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = module("accelerate_tts/kernels/build.py")
    with pytest.raises(build.NoCompilerError, match=r"neither c\+\+, g\+\+ nor clang\+\+ is on PATH: install"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "my-c++ -m64")
    with pytest.raises(build.NoCompilerError, match=r"CXX=my-c\+\+ -m64 is not there"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *probe*) exit 0;; esac\necho "it does not like this" >&2\nexit 3\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    build = module("accelerate_tts/kernels/build.py")
    with pytest.raises(build.BuildError, match=r"(?s)ended with 3:\nit does not like this"):
        build.build(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_each_level_takes_its_own_kernels_or_those_below() -> None:
    build = module("accelerate_tts/kernels/build.py")
    for machine, levels in (("x86_64", build.X86), ("aarch64", {"base": ()})):
        jobs = build.jobs_of(levels)
        compiled = {(unit, level) for unit, level, _ in jobs}
        assert len(compiled) == len(jobs), machine
        assert {(unit, "base") for unit in (*build.TOKENS, *build.SEQUENCES)} <= compiled
        assert jobs[0][:2] == ("dispatch", "")


class Hook:
    """hatch_build.py's hook, as hatchling would call it."""

    def __init__(self, target: str = "wheel") -> None:
        pytest.importorskip("hatchling")
        self.warnings: list[str] = []
        self.data: dict[str, Any] = {"force_include": {}}
        app = SimpleNamespace(display_warning=self.warnings.append)
        made = module("hatch_build.py").KernelsBuildHook(str(ROOT), {}, None, None, str(ROOT), target, app)
        self.initialize = made.initialize


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("pure", ["", "1"])
def test_a_wheel_without_a_compiler_is_pure(pure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PURE", pure)
    hook = Hook()
    hook.initialize("standard", hook.data)
    assert hook.data == {"force_include": {}}
    assert [text for text in hook.warnings if "built without its kernels: neither c++" in text] == hook.warnings
    assert bool(hook.warnings) == (not pure), "who asks for a pure wheel knows"


@pytest.mark.usefixtures("no_compiler")
def test_where_kernels_are_a_must_no_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TTS_PURE", "0")
    hook = Hook()
    with pytest.raises(RuntimeError, match="is on PATH: install a C"):
        hook.initialize("standard", hook.data)


@pytest.mark.usefixtures("no_compiler")
def test_a_source_distribution_has_the_sources_alone() -> None:
    hook = Hook("sdist")
    hook.initialize("standard", hook.data)
    assert hook.data == {"force_include": {}}
    assert not hook.warnings
