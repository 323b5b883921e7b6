"""The wheel and the source distribution: nothing missing, nothing extra, and metadata that an index takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from accelerate_tts import __version__
from accelerate_tts.kernels.library import PLACE, load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "accelerate_tts"
OF_BUILDS = re.compile(r"__pycache__|\.pyc$|kernels/_kernels\.|\.so$|compile_commands\.json$")
OF_THE_SOURCES = re.compile(r"^accelerate_tts/kernels/(csrc/|build\.py$)")  # a wheel has the library in place of them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure wheel and a source distribution: the kernels' library has tests of its own."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "ACCELERATE_TTS_PURE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def sources() -> set[str]:
    """The package's files in this folder, without what builds leave there."""
    names = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    return {name for name in names if not OF_BUILDS.search(name)}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (file,) = built.glob("*.whl")
    assert file.name == f"accelerate_tts-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(file) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"accelerate_tts-{__version__}.dist-info/METADATA").decode("utf-8")
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == {name for name in sources() if not OF_THE_SOURCES.search(name)}
    assert {name.partition(".dist-info/")[2] for name in about} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip
    assert {Path(name).suffix for name in names - about} == {".py", ".pyi", ".typed", ".j2"}
    assert "accelerate_tts/py.typed" in names
    assert "# accelerate_tts" in metadata


def test_the_wheel_for_a_platform_has_the_kernels_in_place_of_their_sources(tmp_path: Path) -> None:
    """The wheel that `make test` has built and installed: another build takes minutes of compiling."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    file = ROOT / "dist" / f"accelerate_tts-{__version__}-py3-none-{platform}.whl"
    if not file.exists() or file.stat().st_mtime < max((ROOT / name).stat().st_mtime for name in sources()):
        pytest.skip("dist has no wheel of these sources for this platform; make test builds one, given a C++ compiler")
    with zipfile.ZipFile(file) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = wheel.read(f"accelerate_tts-{__version__}.dist-info/WHEEL").decode("utf-8")
        library = f"accelerate_tts/kernels/{PLACE.name}"
        assert names == {name for name in sources() if not OF_THE_SOURCES.search(name)} | {library}
        assert load(Path(wheel.extract(library, tmp_path))).level
    assert "Root-Is-Purelib: false" in about
    assert f"Tag: py3-none-{platform}" in about


def test_the_source_distribution_has_what_builds_and_tests_it(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if name.startswith("accelerate_tts/")} == sources()
    top = {name.partition("/")[0] for name in names}
    wanted = {"accelerate_tts", "benchmarks", "docs", "examples", "tests", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
              "Makefile", "README.md", "hatch_build.py", "mkdocs.yml", "pyproject.toml", "PKG-INFO"}  # fmt: skip
    assert wanted <= top
    assert top - wanted <= {".gitignore"}
    assert not [name for name in names if OF_BUILDS.search(name)]
    assert "benchmarks/results/schema.json" in names


def test_an_index_takes_both(built: Path) -> None:
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)


def test_the_package_is_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelerate_tts", "--version"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__), done.stderr
