"""The loaded weights of which there are copies, in a file: same numbers, same undo, less memory, or an event."""

from __future__ import annotations

import gc
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_tts import Event, PerformanceOptimizer, Settings, optimized_model, receipt_of
from accelerate_tts.device import file_mapping
from accelerate_tts.events import NotApplied
from accelerate_tts.packs.store import pack_folder
from accelerate_tts.patching import offload
from accelerate_tts.patching.offload import originals_to_file
from accelerate_tts.plan import Part
from accelerate_tts.stages.layers.half_precision import HalfStage
from doubles import begin_process

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mapped in place on Linux only")


@pytest.fixture(autouse=True)
def _disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file system in memory pass for a disk: all but the saving is the same there."""
    monkeypatch.setattr(file_mapping, "file_system", lambda _folder: "ext4")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()


def test_only_weights_with_copies_are_moved_and_all_stays_as_it_was(tmp_path: Path) -> None:
    plain = model()
    x = torch.randn(4, 256)
    change = HalfStage(torch.bfloat16, carried=False).prepare(Part("model", "vocoder", plain))
    assert originals_to_file([plain], "it", tmp_path) == 0, "nothing computes from copies yet"
    with torch.no_grad():
        expected = plain(x)
        change.on()
        halved = plain(x)
        state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        addresses = [parameter.data_ptr() for parameter in plain.parameters()]
        moved = originals_to_file([plain], "it", tmp_path)
        assert 0.9 < moved / (2 * 4 * 256 * 512) <= 1.0
        assert torch.equal(plain(x), halved)
        change.off()
        assert torch.equal(plain(x), expected)
    assert [parameter.data_ptr() for parameter in plain.parameters()] == addresses
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def maps(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_weights_that_die_leave_ordinary_memory_and_no_file(tmp_path: Path) -> None:
    plain = model()
    plain[2].weight = nn.Parameter(plain[0].weight.detach().t())  # type: ignore[union-attr,operator]  # two of one storage
    HalfStage(torch.bfloat16, carried=False).prepare(Part("model", "vocoder", plain)).on()
    kept = plain[0].weight.detach()  # type: ignore[operator]
    expected = kept.clone()
    with torch.no_grad():
        plain(torch.randn(4, 256))
    assert originals_to_file([plain], "it", tmp_path) > 0
    assert maps(tmp_path)
    address = kept.data_ptr()
    plain[0].weight = nn.Parameter(torch.zeros(512, 256))
    assert maps(tmp_path), "the other one is there"
    del plain
    gc.collect()
    assert not maps(tmp_path)
    assert torch.equal(kept, expected)
    assert kept.data_ptr() == address


def test_the_file_of_weights_is_for_its_user_alone_and_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[os.stat_result] = []
    make = tempfile.TemporaryFile

    def noted(*args: Any, **options: Any) -> Any:
        file = make(*args, **options)
        files.append(os.fstat(file.fileno()))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    plain = model()
    HalfStage(torch.bfloat16, carried=False).prepare(Part("model", "vocoder", plain)).on()
    before = os.umask(0)
    try:
        assert originals_to_file([plain], "it", tmp_path / "folder") > 0
    finally:
        os.umask(before)
    (about,) = files
    assert (stat.S_IMODE(about.st_mode), about.st_nlink) == (0o600, 0)
    assert maps(tmp_path)
    assert not list((tmp_path / "folder").iterdir())
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def test_where_it_cannot_be_done_the_weights_stay_and_an_event_says_so(tmp_path: Path, seen: list[Event]) -> None:
    plain = model()
    HalfStage(torch.bfloat16, carried=False).prepare(Part("model", "vocoder", plain)).on()
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert originals_to_file([plain], "it", blocked) == 0
    assert any(isinstance(event, NotApplied) and "weights of it" in event.what for event in seen)


def test_shared_memory_and_other_devices_are_left_alone() -> None:
    shared = torch.randn(1 << 16).share_memory_()
    assert offload.movable(shared) is None
    assert offload.movable(torch.empty(1 << 16, device="meta")) is None
    assert offload.movable(torch.randn(4)) is None
    assert offload.movable(torch.randn(1 << 16)) is not None


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_pinned_memory_is_left_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a device in use, and a tensor that says that it is pinned."""
    tensor = torch.randn(1 << 16)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    assert offload.movable(tensor) is not None, "no device is asked that is not in use"
    monkeypatch.setattr(getattr(torch, device), "is_initialized", lambda: True)
    monkeypatch.setattr(getattr(torch, device), "current_device", lambda: 0)
    assert offload.movable(tensor) is None


def test_the_setting_chooses_and_the_receipt_says_what_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_is_faster: None
) -> None:
    notes = {}
    for where in ("memory", "disk"):
        settings = Settings(
            device="cpu", compile=False, pack=False, precision="balanced", guard_weights=where,  # type: ignore[arg-type]
            pack_folder=str(tmp_path),
        )  # fmt: skip
        optimizer = PerformanceOptimizer(settings)
        plain = model()
        x = torch.randn(64, 256)
        begin_process(optimizer)
        receipt = receipt_of(optimized_model(warmup=x)(lambda: plain)())  # noqa: B023 - called at once
        assert receipt is not None
        notes[where] = " ".join(receipt.notes)
        with torch.no_grad():
            tuned = plain(x)
            assert optimizer.undo(plain)
            assert torch.allclose(plain(x), tuned, atol=0.05)
        optimizer.close()
    assert "MiB of memory less" not in notes["memory"]
    assert "MiB of memory less" in notes["disk"]


def test_a_user_without_a_home_has_a_folder_for_weights_all_the_same(
    monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert pack_folder(Settings()).is_absolute()
    assert "no home folder" in str(seen[0])
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert pack_folder(Settings()) == Path("/somewhere/accelerate_tts/packs")
    assert pack_folder(Settings(pack_folder="/else")) == Path("/else")
    assert len(seen) == 1
