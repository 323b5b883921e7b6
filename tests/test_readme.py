"""The README's code runs, its commands exist, and its pages are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUMMARY = (ROOT / "docs" / "OPTIMIZATIONS_SUMMARY.md").read_text(encoding="utf-8")


# Without the compiler, whose wait belongs to the benchmark, with little time for the rest, and the class at small size:
# the code counts here.
QUICK = """
import functools, os
os.environ.update(ACCELERATE_TTS_TORCH_COMPILE="0", ACCELERATE_TTS_TUNE_SECONDS="2", ACCELERATE_TTS_PACK="0")
import transformers
transformers.VitsConfig = functools.partial(
    transformers.VitsConfig, hidden_size=32, num_hidden_layers=1, ffn_dim=64, flow_size=32, spectrogram_bins=17,
    upsample_initial_channel=32, upsample_rates=[4], upsample_kernel_sizes=[8], resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1]], duration_predictor_filter_channels=32, posterior_encoder_num_wavenet_layers=1,
)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run(tmp_path: Path) -> None:
    """Run in a fresh interpreter, as a reader does."""
    assert len(blocks("python")) == 1
    for block in blocks("python"):
        assert len(list(filter(None, block.splitlines()))) == 10, "the first screen has ten lines of code"
        done = subprocess.run(
            [sys.executable, "-c", f"{QUICK}\n{block}"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "fold weight norm" in done.stdout


def test_every_command_that_is_shown_exists() -> None:
    from accelerate_tts.cli.app import app

    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        commands |= {f"{group.name} {command.name}" for command in group.typer_instance.registered_commands}
    groups = "|".join(str(group.name) for group in app.registered_groups)
    shown = re.findall(rf"^accelerate-tts ((?:(?:{groups}) )?\w+)", README, re.MULTILINE)
    assert set(shown) == commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", [README, SUMMARY], ids=["README", "summary"])
def test_links_lead_somewhere(page: str) -> None:
    base = ROOT if page is README else ROOT / "docs"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
        assert (base / link).exists(), link


def test_the_summary_names_every_variable_and_public_name() -> None:
    import accelerate_tts
    from accelerate_tts.environment import VARIABLES
    from accelerate_tts.kernels.library import VARIABLE

    assert VARIABLE in VARIABLES
    assert set(re.findall(r"`(ACCELERATE_TTS_\w+|TRANSLATOR_\w+)`", SUMMARY)) == VARIABLES
    for name in ("optimized_model", "inference", "fast_inference", "carry_mode", "receipt_of", "set_active", "testing"):
        assert name in dir(accelerate_tts)
        assert name in SUMMARY
    methods = [name for name in vars(accelerate_tts.PerformanceOptimizer) if not name.startswith("_")]
    for method in set(methods) - {"device", "call_flags", "optimize"}:
        assert f"`{method}(" in SUMMARY, method
