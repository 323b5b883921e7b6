"""Takes the pictures of docs/figures: what doctor, bench, tune, a receipt and the example service look like.

    python benchmarks/screenshots.py                   # all; `make screenshots` installs what it needs
    python benchmarks/screenshots.py doctor receipt    # some

Commands run in a process of their own, and their output becomes an SVG. Pages are drawn by a Chromium that is
installed already (`--browser`). The backend is that of docs/tutorial.md, so that page and pictures are of one model.
Run nothing else meanwhile: a receipt says what the machine was busy with.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
TUTORIAL = ROOT / "docs" / "tutorial.md"
TEXT = "The quick brown fox jumps over the lazy dog."
WIDE, PHONE = 1000, 390  # pixels of the window
_COLUMNS = 116  # of the terminal
_WIDE_COLUMNS = 140  # for a table of many columns
# No request leaves the machine, and a container's root is accepted.
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*PICTURES, []], help="which pictures; all if none is named")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--to", type=Path, default=FIGURES, help="the folder that they are written to")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or PICTURES:
            PICTURES[name](Path(folder), options.to, options.browser)


def run(folder: Path, *words: str, columns: int = _COLUMNS, **variables: str) -> str:
    """Run `accelerate-tts` in a folder, with packs of its own, as if in a terminal; return what it prints."""
    terminal = {"FORCE_COLOR": "1", "COLUMNS": str(columns), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = os.environ | terminal | variables
    done = subprocess.run(
        [sys.executable, "-m", "accelerate_tts", *words], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode not in {0, 1}:  # the doctor's 1 is a finding
        raise SystemExit(f"accelerate-tts {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def without_places(text: str) -> str:
    """Return a text without the folders of this machine."""
    text = re.sub(r"/[^\s:]*/site-packages", "~/.venv/lib/site-packages", text)
    for folder, name in ((sys.prefix, "~/.venv"), (str(ROOT), "~"), (str(Path.home()), "~")):
        text = text.replace(folder, name)
    return text


def terminal(command: str, output: str, path: Path, columns: int = _COLUMNS) -> None:
    """Write what a command printed as a picture of a terminal."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    console = Console(record=True, width=columns, file=Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(without_places(output).strip("\n")), end="\n\n")  # rich cuts into the last line
    svg = console.export_svg(title="", theme=MONOKAI, unique_id=path.stem)
    # rich asks another server for its fonts; those of the reader's machine will do.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
    svg = re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
    path.write_text(re.sub(r"\n{2,}", "\n", svg), "utf-8")
    print(f"{path} is written")


@contextmanager
def browser(executable: str | None) -> Iterator[Any]:
    """Open a headless Chromium; yields a function that takes pictures of pages."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise SystemExit("pictures of pages need playwright: pip install playwright") from error
    if executable is None:
        raise SystemExit("no Chromium was found: install one (Debian: apt install chromium), or give --browser PATH")
    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=executable, args=list(_FLAGS))

        def take(address: str, path: Path, height: int | None = None) -> None:
            """Take a picture, and one on a phone in the dark, which goes to the current folder to be looked at."""
            phone = Path(f"{path.stem}-phone.png")
            for file, width, scheme in ((path, WIDE, "light"), (phone, PHONE, "dark")):
                page = chromium.new_page(viewport={"width": width, "height": height or 800}, color_scheme=scheme)
                page.goto(address)
                page.wait_for_timeout(500)
                wide = page.evaluate("document.documentElement.scrollWidth")
                if wide > width:
                    raise SystemExit(f"{address} is {wide} pixels wide in a window of {width}: readers scroll sideways")
                page.screenshot(path=file, full_page=height is None)
                page.close()
                print(f"{file} is written")

        yield take
        chromium.close()


def backend_of_the_tutorial(folder: Path) -> None:
    """Write the backend of the tutorial's steps 1 and 3 as a module."""
    blocks = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (folder / "my_voice.py").write_text("\n\n".join(blocks[:2]), "utf-8")


def doctor(folder: Path, to: Path, _browser: str | None) -> None:
    # A usual fault, so that the picture has a mend.
    said = run(folder, "doctor", OMP_NUM_THREADS="64")
    terminal("OMP_NUM_THREADS=64 accelerate-tts doctor", said, to / "doctor.svg")


def bench(folder: Path, to: Path, _browser: str | None) -> None:
    words = ("bench", "mms", "--size", "tiny")
    said = run(folder, *words, columns=_WIDE_COLUMNS)
    terminal(f"accelerate-tts {' '.join(words)}", said, to / "bench.svg", _WIDE_COLUMNS)


def receipt(folder: Path, to: Path, executable: str | None) -> None:
    """The receipt of the tutorial's backend, and the page of `tune`."""
    backend_of_the_tutorial(folder)
    run(folder, "tune", "my_voice:FastBackend", "--text", TEXT, "--html", "tuned.html", "--receipt", "receipt.json")
    run(folder, "receipt", "receipt.json", "--html", "receipt.html")
    for page in (folder / "receipt.html", folder / "tuned.html"):
        page.write_text(page.read_text("utf-8").replace(str(folder / "cache"), "~/.cache"), "utf-8")
    with browser(executable) as take:
        take((folder / "receipt.html").as_uri(), to / "receipt.png")
        take((folder / "tuned.html").as_uri(), to / "tune.png", height=920)  # below it has the receipt once more


def service(folder: Path, to: Path, executable: str | None) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ("--systems", "mms-random", "--folder", str(folder / "service"), "--port", str(port))
    address = f"http://127.0.0.1:{port}/"
    environment = os.environ | {"ACCELERATE_TTS_TORCH_COMPILE": "0", "ACCELERATE_TTS_TUNE_SECONDS": "20"}
    served = subprocess.Popen(
        [sys.executable, "-m", "service", *words], cwd=ROOT / "examples", env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(f"{address}ready", served)
        with browser(executable) as take:
            take(address, to / "service.png", height=900)
    finally:
        served.terminate()
        served.wait()


def _wait_for(address: str, served: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and served.poll() is None:
        try:
            urlopen(address, timeout=5.0).close()  # noqa: S310 - of this machine
        except OSError:  # not there yet, or 503 while it loads
            time.sleep(0.5)
        else:
            return
    raise SystemExit("the service did not start")


PICTURES: dict[str, Callable[[Path, Path, str | None], None]] = {
    "doctor": doctor,
    "bench": bench,
    "receipt": receipt,
    "service": service,
}


if __name__ == "__main__":
    main()
