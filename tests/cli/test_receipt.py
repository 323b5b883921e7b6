"""`accelerate-tts receipt` shows a saved receipt as a table, as JSON or as a page, or says why it cannot."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from accelerate_tts.cli.app import app
from accelerate_tts.cli.receipt import ReceiptFileError, load, show
from accelerate_tts.receipts.receipt import Receipt, StageResult

STAGES = (
    StageResult("decoder", "fold weight norm", True, "faster", 0.0123, 0.0100, 1.23, 1.2, 3e-7, None, 0.5),
    StageResult("encoder", "torch.compile", False, "no gain", 0.0002, 0.0002, 1.0, 0.9, 0.0, 1, 2.0),
)
RECEIPT = Receipt("Vits", "cpu (Test)", {"torch": "2.14"}, STAGES, 1.5, 1.4, 1.05, 1.33, 3e-7, 4.5, ("a note",))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A saved receipt."""
    path = tmp_path / "receipt.json"
    RECEIPT.save(path)
    return path


def invoke(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["receipt", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def shown(receipt: Receipt, width: int, **options: Any) -> str:
    out = io.StringIO()
    show(receipt, Console(file=out, width=width, highlight=False, emoji=False, **options))
    return out.getvalue()


# --- what it prints ------------------------------------------------------------------------------------------------


def test_the_table(file: Path) -> None:
    result = invoke(file)
    output = " ".join(result.stdout.split())
    for text in (
        "Receipt: Vits on cpu (Test)",
        "decoder: fold weight norm 12.3 ms 10.0 ms 1.23x 3e-07 kept, faster",
        "encoder: torch.compile 200 us 200 us 1.00x bit-exact rejected: no gain",
        "the whole 1.40 s 1.05 s 1.33x 3e-07 1 kept, 0 recompiles since warm-up",
        "cold first pass 1.50 s, tuning took 4.5 s (torch 2.14)",
        "note: a note",
    ):
        assert text in output
    assert result.stderr == ""


def test_what_is_not_known_is_left_out_or_a_dash() -> None:
    output = " ".join(shown(Receipt("Vits", "cpu", {}), 80).split())
    assert "the whole - - 1.00x - 0 kept" in output
    assert "cold" not in output


def styled(receipt: Receipt, width: int) -> list[str]:
    return shown(receipt, width, force_terminal=True, color_system="standard", no_color=False).splitlines()


@pytest.mark.parametrize("width", [40, 100])
def test_kept_is_green_and_dropped_is_dim(width: int) -> None:
    lines = styled(RECEIPT, width)
    assert [line.count("\x1b[32m") > 0 for line in lines if "decoder" in line] == [True]
    assert [line.count("\x1b[2m") > 0 for line in lines if "encoder" in line] == [True]
    assert all("\x1b[32m" not in line for line in lines if "decoder" not in line and "faster" not in line)


def test_a_narrow_terminal_still_shows_every_name_and_figure() -> None:
    wide, narrow = shown(RECEIPT, 60), shown(RECEIPT, 30)
    assert max(map(len, wide.splitlines())) <= 60
    assert max(map(len, narrow.splitlines())) <= 30
    assert "decoder: fold weight norm: 12.3 ms, now 10.0 ms (1.23x, 3e-07), kept, faster" in " ".join(narrow.split())
    for output in (wide, narrow):
        text = " ".join(output.split())
        for word in ("decoder", "12.3 ms", "10.0 ms", "1.23x", "bit-exact", "the whole", "1.05 s", "note: a note"):
            assert word in text


NASTY = ("[red]", "[/x]", "\x1b[31m", "\x1b]0;title\x07", "\r\n", "\u202e", "\ud800", ":warning:", "日本語" * 30)
texts = st.lists(st.one_of(st.text(max_size=10), st.sampled_from(NASTY)), max_size=4).map("".join)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
receipts = st.builds(
    lambda what, stages, notes: Receipt(what, what, {what: what}, tuple(stages), notes=tuple(notes)),
    texts,
    st.lists(st.builds(StageResult, texts, texts, st.booleans(), texts, numbers, numbers, numbers), max_size=3),
    st.lists(texts, max_size=2),
)


@given(receipts, st.integers(1, 120))
def test_any_receipt_is_shown_in_any_width_and_sends_nothing_to_the_terminal(receipt: Receipt, width: int) -> None:
    output = shown(receipt, width)
    output.encode()
    assert all(character.isprintable() for line in output.split("\n") for character in line)


@pytest.mark.parametrize("text", ["list[int]", "[/x]", "[red]", ":warning:"])
@pytest.mark.parametrize("width", [50, 100])
def test_a_receipt_s_own_texts_are_no_markup(text: str, width: int) -> None:
    stage = StageResult(f"part {text}", f"stage {text}", False, f"reason {text}")
    receipt = Receipt(f"what {text}", f"device {text}", {f"torch {text}": "2"}, (stage,), notes=(text,))
    output = " ".join(shown(receipt, width).split())
    for name in ("part", "stage", "reason", "what", "device", "torch", "note:"):
        assert f"{name} {text}" in output


def test_json_is_printed_as_it_was_saved(file: Path) -> None:
    result = invoke(file, "--json")
    assert result.stdout == file.read_text() + "\n"
    assert Receipt.from_json(result.stdout) == RECEIPT
    assert result.stderr == ""


def test_a_byte_order_mark_does_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert "Vits" in invoke(file).stdout


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["page.html", "page"])
def test_the_page_is_written_beside_the_table(file: Path, tmp_path: Path, name: str) -> None:
    result = invoke(file, "--html", tmp_path / name)
    assert (tmp_path / name).read_bytes().decode() == RECEIPT.to_html()
    assert "decoder: fold weight norm" in result.stdout
    assert result.stderr == f"wrote {tmp_path / name}\n"


def test_the_page_beside_json_leaves_the_json_pure(file: Path, tmp_path: Path) -> None:
    result = invoke(file, "--json", "--html", tmp_path / "page.html")
    assert json.loads(result.stdout) == json.loads(file.read_text())
    assert (tmp_path / "page.html").exists()


def test_a_page_that_is_there_is_replaced(file: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old" * 10_000)
    invoke(file, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes().decode() == RECEIPT.to_html()


@pytest.mark.parametrize("name", ["absent/page.html", "."])
def test_a_page_that_cannot_be_written(file: Path, tmp_path: Path, name: str) -> None:
    result = invoke(file, "--html", tmp_path / name, code=2)
    assert result.stderr.startswith(f"error: {tmp_path / name}: cannot be written (")
    assert "give --html a file" in result.stderr
    assert result.stdout == ""


def test_the_page_never_replaces_the_receipt(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    (tmp_path / "other.html").symlink_to(file)
    for page in (file, tmp_path / "other.html"):
        result = invoke(file, "--html", page, code=2)
        assert result.stderr.startswith(f"error: {page}: the page would replace the receipt itself; give --html")
        assert file.read_bytes() == before


# --- what is no receipt --------------------------------------------------------------------------------------------


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(RECEIPT.to_json()), **fields}).encode()


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "text": (b"hello", "not JSON (Expecting value, line 1, column 1)"),
    "cut off": (RECEIPT.to_json().encode()[:-20], "not JSON"),
    "its page": (RECEIPT.to_html().encode(), "not JSON"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "binary"),
    "UTF-16": (RECEIPT.to_json().encode("utf-16"), "binary"),
    "a list": (b"[]", "no receipt"),
    "a number": (b"3", "no receipt"),
    "null": (b"null", "no receipt"),
    "another thing": (b'{"name": "x"}', "no receipt"),
    "only a format": (b'{"format": 1}', "no receipt"),
    "a newer format": (changed(format=99), "receipt format 99 is not 1; use the version that wrote it"),
    "a stage with an unknown field": (changed(stages=[{"part": "x", "surprise": 1}]), "no receipt"),
    "stages are text": (changed(stages="many"), "no receipt"),
    "a ratio is a list": (changed(ratio=[1]), "no receipt"),
    "an infinite ratio": (changed(ratio=float("inf")), "Infinity is no number of JSON"),
    "too deep": (b"[" * 100_000, "no receipt"),
    "an escape sequence": (changed(format="\x1b[31m"), "no"),
}


@pytest.mark.parametrize(("content", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_receipt_is_refused_with_the_mend(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(content)
    result = invoke(path, "--html", tmp_path / "page.html", code=2)
    assert result.stderr.startswith(f"error: {path}: ")
    assert why in result.stderr
    assert result.stderr.endswith("; give a file that receipt.save('NAME.json') wrote\n")
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "why"), [("absent.json", "no such file"), (".", "a folder"), ("x" * 1000, "cannot be read (")]
)
def test_a_file_that_cannot_be_read_is_refused_with_the_mend(tmp_path: Path, name: str, why: str) -> None:
    result = invoke(tmp_path / name, code=2)
    assert result.stderr.startswith(f"error: {tmp_path / name}: ")
    assert why in result.stderr
    assert result.stderr.endswith("; give a file that receipt.save('NAME.json') wrote\n")


@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["format", "stages", "what", "device", "versions", "notes", "part"]), inner, max_size=3
    ),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_other_file_is_refused_and_nothing_else_is_raised(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    with pytest.raises(ReceiptFileError):
        load(path)


# --- what it imports -----------------------------------------------------------------------------------------------

PROBE = """
import contextlib, io, sys
from accelerate_tts.cli import main
sys.argv = ["accelerate-tts", "receipt", *sys.argv[1:]]
out = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
    main()
assert {expected!r} in out.getvalue(), out.getvalue()
print(sorted(sys.modules.keys() & {{"torch", "numpy", "transformers", "onnx"}}))
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "--html"),
        (["receipt.json"], "the whole"),
        (["receipt.json", "--json"], '"format": 1'),
        (["receipt.json", "--html", "page.html"], "the whole"),
    ],
    ids=["help", "table", "json", "html"],
)
def test_torch_is_not_imported(file: Path, arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-c", PROBE.format(expected=expected), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent)
    assert done.stdout == "[]\n", done.stderr
