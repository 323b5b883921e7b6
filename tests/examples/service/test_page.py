"""The page's script, run by node with stand-ins for the browser's elements and loudspeaker."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from serving import Served
from standin import RATE, tone

HERE = Path(__file__).parent
SCRIPT = HERE.parents[2] / "examples" / "service" / "page" / "page.js"


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run the page's script")
def test_the_page_speaks_stops_uploads_and_says_what_is_wrong(served: Served, tmp_path: Path) -> None:
    recording = tmp_path / "me.wav"
    soundfile.write(recording, np.tile(tone("me"), 8), RATE)
    command = ["node", str(HERE / "page_driver.js"), str(SCRIPT), served.url, str(recording)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    steps = {line["step"]: line for line in map(json.loads, done.stdout.splitlines())}
    start = steps["start"]
    assert (start["models"], start["voices"], start["precisions"]) == (["loud", "plain"], ["a", "b"], ["exact"])
    assert steps["stream"]["status"] == "Done."
    assert steps["stream"]["played"] == pytest.approx(0.5)
    assert steps["stream"]["seconds"] == "0.50 s"
    assert steps["stream"]["first"] != "–"
    assert (steps["whole"]["status"], steps["whole"]["seconds"]) == ("Done.", "0.50 s")
    assert steps["whole"]["hidden"] is False
    assert steps["refused"]["status"] == "input is empty; send a text"
    assert (steps["stopped"]["status"], steps["stopped"]["disabled"]) == ("Stopped.", True)
    assert steps["uploaded"]["status"] == "The voice Zoë is kept."
    assert steps["uploaded"]["voice"].startswith("voice_")
    assert steps["deleted"]["voices"] == ["a", "b"]
    assert (steps["changed"]["voices"], steps["changed"]["receipt"]) == (["only"], "This model was not tuned.")
