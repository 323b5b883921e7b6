"""Files that commands write are there whole or not at all: an older one stays where a new one finds no room."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from accelerate_tts.storage.files import replacing, write_whole

EXAMPLES = Path(__file__).parents[2] / "examples"
posix = pytest.mark.skipif(os.name != "posix", reason="limits of files, modes and links are POSIX's")

FULL = """
import resource, sys
from pathlib import Path
{imports}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    {written}
except OSError as error:
    print(error.strerror, error.filename)
"""
WAYS = {
    "text": ("from accelerate_tts.storage.files import write_whole", "write_whole(Path('there'), 'x' * 2000)"),
    "chart": (
        "import accelerate_tts.cli.bench.chart as chart; chart.pyplot()",
        "from accelerate_tts.cli.bench.report import Found; chart.draw([Found('mms')], Path('there'))",
    ),
    "sound of the examples": (
        "import torch; from _common import write_wav",
        "write_wav(Path('there'), iter([torch.ones(400), torch.ones(4000)]), 16000)",
    ),
}


@posix
@pytest.mark.parametrize("way", WAYS)
def test_what_finds_no_room_leaves_the_older_file_and_nothing_beside_it(way: str, tmp_path: Path) -> None:
    if way == "chart":
        pytest.importorskip("matplotlib")
    (tmp_path / "there").write_text("old", encoding="utf-8")
    imports, written = WAYS[way]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL.format(imports=imports, written=written)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("File too large"), done.stdout
    if way != "sound of the examples":  # which have no error of their own
        assert done.stdout.endswith(" there\n")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text(encoding="utf-8") == "old"


def test_an_error_of_the_block_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_text("old", encoding="utf-8")

    def broken_off() -> None:
        with replacing(path) as made:
            made.write_text("half", encoding="utf-8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    assert [each.name for each in tmp_path.iterdir()] == ["there"]
    assert path.read_text(encoding="utf-8") == "old"


@posix
def test_a_link_stays_one_and_a_mode_as_it_was(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old", encoding="utf-8")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, "new")
    assert link.is_symlink()
    assert (real.read_text(encoding="utf-8"), stat.S_IMODE(real.stat().st_mode)) == ("new", 0o640)


@posix
def test_a_device_is_written_itself() -> None:
    with replacing(Path("/dev/null")) as made:
        assert made == Path("/dev/null")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_whole(Path("/dev/full"), "x")
    assert Path("/dev/null").is_char_device()
