"""A disk that is full, a SIGTERM in the middle of things, a clock that goes backwards: nothing is broken by it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_tts.events import Event, PackIgnored
from accelerate_tts.packs.format import Pack
from accelerate_tts.packs.store import PackStore
from accelerate_tts.storage import file_digests
from accelerate_tts.voices.disk import EmbeddingFiles
from accelerate_tts.voices.memory import StoredEmbedding

WAIT = 120.0  # seconds after which a child that should have ended has hung
MEGABYTE = 1 << 20
KEY = "0123456789abcdef" * 4
posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and mounts are POSIX's")


def key(number: int) -> str:
    return f"{number:032x}"


def child(script: str, *, before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """A process of its own, which runs this script; a file-size limit or a mount are `before` it."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "ACCELERATE_TTS_PACK": "1", "ACCELERATE_TTS_TORCH_COMPILE": "0", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=WAIT)
    finally:
        process.kill()  # only if it hung
        process.wait()
    return process.returncode, out, errors


# --- a full disk ----------------------------------------------------------------------------------------------------

FILL = """
    import os, sys
    from pathlib import Path
    from accelerate_tts import add_hook, cached_embedding, optimized_model, receipt_of
    from accelerate_tts.packs import compiler_cache
    from accelerate_tts.packs.store import Pack, PackStore
    from accelerate_tts.errors import PackError

    disk, medium = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["DISK"]), os.environ["MEDIUM"]
    seen = []
    add_hook(lambda event: seen.append(event))

    def refused(word):
        assert seen and all(type(event).__name__ == "PackIgnored" for event in seen), seen
        assert any(text in str(seen[0]) for text in ("No space left", "File too large")), seen
        seen.clear()
        print(word)

    import io, tarfile, torch
    if medium == "rlimit":
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    store = PackStore(disk / "packs", 1 << 30)
    small, large = Pack("1" * 32, {"a": 1}, b"code"), Pack("2" * 32, {"b": 2}, os.urandom(400_000))
    assert store.write(small) and not seen
    assert store.write(large) is False
    refused("pack")
    assert store.read("1" * 32) == small and store.read("2" * 32) is None and not seen
    assert sorted(p.name for p in (disk / "packs").iterdir()) == ["1" * 32 + ".pack", "secret"]

    calls, encoder = [], torch.nn.Linear(1, 1)
    @cached_embedding(folder=disk / "voices", encoder=lambda: encoder)
    def embed(voice):
        calls.append(voice)
        return torch.full((100_000,), voice)

    assert embed(1.0)[0] == 1.0 and embed(1.0)[0] == 1.0 and calls == [1.0]
    refused("embedding")
    assert not list((disk / "voices").iterdir())

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("ab/code.so")
        entry.size = 400_000
        archive.addfile(entry, io.BytesIO(os.urandom(400_000)))
    try:
        compiler_cache.unpack(buffer.getvalue())
    except OSError:
        print("code")
    assert not [p for p in (disk / "inductor").rglob("*") if p.is_file()]

    try:
        (disk / "rest").write_bytes(os.urandom(500_000))
    except OSError:  # from here on not a byte more
        pass
    if medium == "rlimit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    model = optimized_model(warmup=torch.ones(1, 8, 16))(lambda: torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3)).eval())()
    assert receipt_of(model) is not None
    lost = [event for event in seen if type(event).__name__ == "PackIgnored"]
    assert len(lost) == 1 and "could not be written" in str(lost[0]), seen
    seen.clear()
    print("load")
    try:
        store.export(None, disk / "export")
    except PackError:
        print("export")
    assert not (disk / "export").exists()
    assert store.read("1" * 32) == small

    (disk / "rest").unlink()
    if medium == "rlimit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen.clear()
    assert store.write(Pack("3" * 32, {"c": 3}, bytes(1000))) and store.read("3" * 32) and not seen
    print("again")
"""


@posix
@pytest.mark.parametrize("medium", ["tmpfs", "rlimit"])
def test_a_full_disk_costs_events_and_nothing_else(medium: str, tmp_path: Path) -> None:
    before: tuple[str, ...] = ()
    if medium == "tmpfs":
        mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
        unshare = shutil.which("unshare")
        if unshare is None or subprocess.run([unshare, "-rm", *mount.split()], check=False).returncode:
            pytest.skip("NO FULL DISK WAS TRIED: a private mount of a small tmpfs is not permitted here")
        before = (unshare, "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    process = child(
        FILL,
        before=before,
        DISK=str(tmp_path),
        MEDIUM=medium,
        ACCELERATE_TTS_PACK_FOLDER=str(tmp_path / "packs"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    code, out, errors = ended(process)
    assert code == 0, errors
    assert out.split() == ["pack", "embedding", "code", "load", "export", "again"]


READ_ONLY = """
    import os
    from pathlib import Path
    import torch
    from accelerate_tts import add_hook, cached_embedding, get_performance_optimizer, optimized_model, receipt_of
    from accelerate_tts.errors import PackError

    disk, seen = Path(os.environ["DISK"]), []
    add_hook(seen.append)
    model = optimized_model(warmup=torch.ones(1, 8, 16))(lambda: torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3)).eval())()
    assert receipt_of(model) is not None and receipt_of(model).before is not None
    lost = [event for event in seen if type(event).__name__ == "PackIgnored"]
    assert len(lost) == 1 and "Read-only" in str(lost[0]), seen
    print("load")

    seen.clear()
    calls, encoder = [], torch.nn.Linear(1, 1)
    @cached_embedding(folder=disk / "voices", encoder=lambda: encoder)
    def embed(voice):
        calls.append(voice)
        return torch.full((10,), voice)
    assert embed(1.0)[0] == 1.0 and embed(1.0)[0] == 1.0 and calls == [1.0]
    assert {type(event).__name__ for event in seen} == {"PackIgnored"} and "Read-only" in str(seen[0]), seen
    print("embedding")

    try:
        get_performance_optimizer().export_packs(disk / "export")
    except PackError as error:
        assert "Read-only" in str(error), error
        print("export")
    assert list(disk.iterdir()) == []
"""


@posix
def test_a_read_only_folder_costs_events_and_nothing_else(tmp_path: Path) -> None:
    """A mount of its own: a mode keeps nobody out who runs as root, as tests in containers do."""
    mount = f"mount -t tmpfs -o ro none {tmp_path}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", *mount.split()], check=False).returncode:
        pytest.skip("NO READ-ONLY FOLDER WAS TRIED: a private mount of a read-only tmpfs is not permitted here")
    process = child(
        READ_ONLY,
        before=(unshare, "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"),
        DISK=str(tmp_path),
        ACCELERATE_TTS_PACK_FOLDER=str(tmp_path / "packs"),
    )
    code, out, errors = ended(process)
    assert code == 0, errors
    assert out.split() == ["load", "embedding", "export"]


READ_ONLY_ROOT = """
    import os, time
    from dataclasses import replace
    import torch
    from torch import nn
    from accelerate_tts import add_hook, get_performance_optimizer, inference, optimized_model, receipt_of
    from accelerate_tts.tuning.policy import current_policy, tuning_policy
    from accelerate_tts.device.usage import Usage
    from accelerate_tts.tuning.timing import Timing

    class QuietMachine:
        usage = staticmethod(lambda: Usage(time.perf_counter(), 0.0))
        waited, probe, sleep = staticmethod(lambda: None), staticmethod(lambda: 1.0), staticmethod(lambda _: None)

    faster, bakes = Timing(before=2.0, after=1.0, ratio=2.0, low=2.0, high=2.0, pairs=5), os.environ["BAKES"] == "1"
    seen = []
    add_hook(seen.append)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
            self.up, self.down = nn.Linear(64, 1100), nn.Linear(1100, 64)
            self.eval()

        def forward(self, x):
            return self.conv(self.down(torch.tanh(self.up(x))))

    class Voice:
        @optimized_model(warmup=lambda self: self.speak(torch.ones(1, 8, 64)), precision="fast")
        def load(self):
            self.model = Model()

        @inference
        def speak(self, x):
            return self.model(x)

    def unworthy(_baseline, _part, stage):
        return "it needs a compiler" if bakes and stage.needs_compiler else None

    x, twin = torch.randn(1, 8, 64), Model()
    with torch.inference_mode():
        expected = twin(x)
    def compare(*_args, **_kwargs):
        return faster

    policy = replace(current_policy(), compare=compare, looks=False, unworthy=unworthy, machine=QuietMachine)
    for _ in range(1 if bakes else 2):
        voice = Voice()
        with tuning_policy(policy):
            voice.load()
        receipt = receipt_of(voice)
        assert receipt is not None and receipt.kept and receipt.before is not None
        assert not [result for result in receipt.stages if "failed" in result.reason], str(receipt)
        assert not [note for note in receipt.notes if "are in a file" in note] or bakes, str(receipt)
        assert (voice.speak(x) - expected).abs().max() < 0.02 * expected.abs().max()
        lost = sorted(type(event).__name__ for event in seen if event.degraded)
        print(lost, any(type(event).__name__ == "Restored" for event in seen))
        assert get_performance_optimizer().undo(voice) and receipt_of(voice) is None
        assert torch.equal(voice.speak(x), expected)
        assert voice.model.state_dict().keys() == twin.state_dict().keys()
        seen.clear()
"""
NOTHING_WRITABLE = """
while read -r _ place _; do mount -o remount,ro,bind "$place" 2>/dev/null; done < /proc/mounts
exec "$@"
"""
PROBE = """
    import os, tempfile
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        folders = "/", "/dev/shm", os.path.expanduser("~")
        raise SystemExit(any(os.access(folder, os.W_OK) for folder in folders)) from None
    raise SystemExit(1)
"""


@posix
@pytest.mark.parametrize("compiles", ["0", "1"])
@pytest.mark.parametrize("is_baked", [False, True])
def test_a_root_of_which_nothing_can_be_written(compiles: str, is_baked: bool, tmp_path: Path) -> None:
    """A container with a read-only root: no temporary folder, no home, no shared memory, no cache.

    A pack that lies there already is used.
    """
    unshare = shutil.which("unshare")
    before = (unshare or "", "-rm", "sh", "-c", NOTHING_WRITABLE, "sh")
    if unshare is None or ended(child(PROBE, before=before))[0]:
        pytest.skip("NO READ-ONLY ROOT WAS TRIED: remounting it in a namespace of its own is not permitted here")
    variables = {
        "ACCELERATE_TTS_PACK_FOLDER": str(tmp_path), "ACCELERATE_TTS_TORCH_COMPILE": compiles,
        "ACCELERATE_TTS_GUARD_WEIGHTS": "disk", "XDG_CACHE_HOME": "", "TORCHINDUCTOR_CACHE_DIR": "", "TMPDIR": "",
    }  # fmt: skip
    if is_baked:
        code, _, errors = ended(child(READ_ONLY_ROOT, **variables, BAKES="1"))
        assert code == 0, errors
        assert len(list(tmp_path.glob("*.pack"))) == 1
    files = sorted(tmp_path.iterdir())
    code, out, errors = ended(child(READ_ONLY_ROOT, before=before, **variables, BAKES="0"))
    assert code == 0, errors
    no_file, no_pack = ["NotApplied"], [] if is_baked else ["PackIgnored"]
    no_compiler = ["NotApplied"] if compiles == "1" or find_spec("torchao") is not None else []
    assert out.splitlines() == [f"{[*no_compiler, *no_file, *no_pack]} {is_baked}"] * 2, errors
    told = [line for line in errors.splitlines() if "was not applied" in line or "was ignored" in line]
    assert len(told) == len([*no_compiler, *no_file, *no_pack]), "the second load logged the same once more"
    assert not no_compiler or "set TMPDIR" in errors
    assert sorted(tmp_path.iterdir()) == files


def test_an_embedding_that_is_wrong_in_any_byte_is_computed_anew(tmp_path: Path, seen: list[Event]) -> None:
    """One bit is flipped in each byte at both ends and in a sample between; then the file is truncated."""
    files = EmbeddingFiles(tmp_path, MEGABYTE)
    assert files.write(key(1), StoredEmbedding([torch.arange(100.0), "a", 1.5]))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert len(whole) > 500
    places = [*range(160), *range(160, len(whole) - 60, 11), *range(len(whole) - 60, len(whole))]
    wrong = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in places]
    wrong += [whole[:length] for length in range(0, len(whole), 61)] + [whole + b"\0", whole * 2]
    for content_ in wrong:
        file.write_bytes(content_)
        assert files.read(key(1)) is None
    assert len(seen) == len(wrong)
    assert all(isinstance(event, PackIgnored) for event in seen)
    file.write_bytes(whole)
    kept = files.read(key(1))
    assert kept is not None
    assert torch.equal(kept.copy()[0], torch.arange(100.0))


# --- no compiler ----------------------------------------------------------------------------------------------------

NO_COMPILER = """
    import torch
    from accelerate_tts import add_hook, inference, optimized_model, receipt_of
    from accelerate_tts.stages import catalogue
    from accelerate_tts.stages.compile.whole import CompileStage
    from accelerate_tts.stages.layers.skinny import SkinnyStage

    catalogue.default_stages = lambda *_: (SkinnyStage("fp32"), CompileStage("default"))
    seen, x = [], torch.randn(2, 512)
    add_hook(seen.append)

    class Voice:
        @optimized_model(warmup=x)
        def load(self):
            layers = torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)
            self.model = torch.nn.Sequential(*layers).eval()

        @inference
        def speak(self, x):
            return self.model(x)

    voice = Voice()
    voice.load()
    first, second, third = voice.model
    expected = (x @ first.weight.T + first.bias).relu() @ third.weight.T + third.bias
    torch.testing.assert_close(voice.speak(x), expected)
    (receipt,) = [receipt_of(voice)]
    kernel, compiled = receipt.stages
    assert "failed" not in kernel.reason, str(receipt)
    assert not compiled.kept, str(receipt)
    assert "ompiler" in compiled.reason or "g++" in compiled.reason, str(receipt)
    assert [type(event).__name__ for event in seen].count("FellBack") == 1, seen
    print("right")
"""


@posix
def test_no_compiler_on_the_path_costs_one_stage_and_nothing_else(tmp_path: Path) -> None:
    """An empty folder as PATH, on which no compiler is found."""
    process = child(
        NO_COMPILER,
        before=("/usr/bin/env", "-u", "CXX"),  # the library's own name, which an empty one is to torch 2.6, too
        PATH=str(tmp_path),
        ACCELERATE_TTS_TORCH_COMPILE="1",
        ACCELERATE_TTS_PACK_FOLDER=str(tmp_path / "packs"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    code, out, errors = ended(process)
    assert code == 0, errors
    assert out.split() == ["right"]


# --- SIGTERM --------------------------------------------------------------------------------------------------------

TUNE = """
    import os, signal, sys, time, torch
    from accelerate_tts import add_hook, optimized_model, receipt_of

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 8, 3))
            self.kind = type(self.conv)

        def forward(self, x):
            if type(self.conv) is not self.kind:
                print("in force", flush=True)
            time.sleep(float(os.environ["PAUSE"]))
            return self.conv(x)

    def tell(event):
        print(type(event).__name__, flush=True)

    add_hook(tell)
    model = Slow().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = len(model._forward_hooks)

    class Ended(BaseException):
        pass

    def handler(*_):
        raise Ended

    if os.environ["HANDLER"] == "own":
        signal.signal(signal.SIGTERM, handler)
    try:
        optimized_model(warmup=torch.ones(1, 8, 16))(lambda: model)()
    except Ended:
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert before.keys() == model.state_dict().keys()
        assert type(model.conv) is model.kind
        assert receipt_of(model) is None and model._compiled_call_impl is None and len(model._forward_hooks) == hooks
        print("untouched", flush=True)
        sys.exit(7)
"""


@posix
@pytest.mark.slow
def test_sigterm_in_the_middle_of_tuning_ends_the_process_and_breaks_nothing(tmp_path: Path) -> None:
    variables = {"ACCELERATE_TTS_PACK_FOLDER": str(tmp_path / "packs")}
    children = []
    for handler in ("default", "own"):
        process = child(TUNE, **variables, PAUSE="0.05", HANDLER=handler)
        children.append(process)
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line != "in force\n":
            pass
        assert line == "in force\n"  # a change that is being tried
        process.terminate()
    (default, _, _), (own, said, errors) = map(ended, children)
    assert default == -signal.SIGTERM
    assert (own, said.split()[-1:]) == (7, ["untouched"]), errors
    assert not list((tmp_path / "packs").glob("*.pack"))
    code, said, errors = ended(child(TUNE, **variables, PAUSE="0", HANDLER="default"))
    assert code == 0, errors
    assert {"Trying", "Tuned"} <= set(said.split())
    assert "PackIgnored" not in said
    code, said, errors = ended(child(TUNE, **variables, PAUSE="0", HANDLER="default"))
    assert code == 0, errors
    assert "Restored" in said.split()


WRITE = """
    import os
    from pathlib import Path
    from accelerate_tts.packs.store import Pack, PackStore

    store = PackStore(Path(os.environ["ACCELERATE_TTS_PACK_FOLDER"]), 1 << 30)
    number = 0
    while True:
        number += 1
        assert store.write(Pack("ab" * 16, {"number": number}, bytes([number % 256]) * 300_000))
        if number == 3:
            print("writing", flush=True)
"""


@posix
def test_a_writer_that_is_killed_leaves_the_last_whole_pack(tmp_path: Path, seen: list[Event]) -> None:
    children = []
    for number in range(4):
        folder = tmp_path / str(number)
        process = child(WRITE, ACCELERATE_TTS_PACK_FOLDER=str(folder))
        children.append((process, folder))
    for number, (process, folder) in enumerate(children):
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.001 * number)  # another moment of its work
        process.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
        ended(process)
        store = PackStore(folder, MEGABYTE)
        pack = store.read("ab" * 16)
        assert pack is not None
        assert pack.artifacts == bytes([pack.decisions["number"] % 256]) * 300_000
        assert store.write(Pack(KEY, {}))
    assert seen == []


# --- a clock that goes backwards ------------------------------------------------------------------------------------


class Clock:
    """A wall clock that a test sets, in every module of ours that reads one. In ns since 1970."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = time.time_ns()
        patch.setattr(time, "time", lambda: self.now / 1e9)
        patch.setattr(time, "time_ns", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


DAY = 86_400 * 10**9


def test_who_was_used_last_is_known_on_a_clock_that_goes_backwards(
    tmp_path: Path, clock: Clock, seen: list[Event]
) -> None:
    store = PackStore(tmp_path / "packs", 3000, b"shared")
    for number in range(3):
        clock.now -= DAY
        assert store.write(Pack(key(number), {}, bytes(500)))
    assert [info.key for info in store.entries()] == [key(2), key(1), key(0)]
    clock.now -= DAY
    assert store.read(key(0)) is not None
    assert [info.key for info in store.entries()] == [key(0), key(2), key(1)]
    for number in (3, 4):
        clock.now -= DAY
        assert store.write(Pack(key(number), {}, bytes(500)))
    assert [info.key for info in store.entries()] == [key(4), key(3), key(0)]  # the least recently used two went
    assert not [event for event in seen if isinstance(event, PackIgnored)]


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(-40 * 365, 40 * 365)), max_size=15))
def test_any_clock(steps: list[tuple[int, bool, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    store = PackStore(tmp_path_factory.mktemp("clock") / "packs", 3000, b"shared")
    order: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        start = clock.now
        for number, writes, days in steps:
            clock.now = max(0, start + days * DAY)
            name = key(number)
            if writes:
                assert store.write(Pack(name, {"n": number}, bytes(500)))
            elif name not in order:
                assert store.read(name) is None
                continue
            else:
                assert store.read(name) == Pack(name, {"n": number}, bytes(500))
            order = [name, *(other for other in order if other != name)][:4]
            found = [info.key for info in store.entries()]
            assert found == order[: len(found)]
            assert len(found) >= min(3, len(order))
            order = found


def test_voices_are_evicted_in_order_on_a_clock_that_goes_backwards(tmp_path: Path, clock: Clock) -> None:
    files = EmbeddingFiles(tmp_path, 4000)
    names = [key(number) for number in range(4)]
    for name in names[:2]:
        clock.now -= DAY
        assert files.write(name, StoredEmbedding([1.0]))
    clock.now -= DAY
    assert files.read(names[0]) is not None
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    files = EmbeddingFiles(tmp_path, sum(sizes))  # room for two
    clock.now -= DAY
    assert files.write(names[2], StoredEmbedding([1.0]))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [names[0], names[2]]


def test_half_written_files_go_when_they_are_old_and_not_before(tmp_path: Path, clock: Clock) -> None:
    store = PackStore(tmp_path, MEGABYTE)
    (tmp_path / ".tmp-left").write_bytes(b"half")
    clock.now -= 10 * DAY  # it seems to come from the future: who knows whose it is
    assert store.write(Pack(KEY, {}))
    assert (tmp_path / ".tmp-left").exists()
    clock.now += 20 * DAY
    assert store.write(Pack(KEY, {}))
    assert not (tmp_path / ".tmp-left").exists()


def test_a_file_that_seems_to_come_from_the_future_is_read_each_time(tmp_path: Path, clock: Clock) -> None:
    voice = tmp_path / "voice.wav"
    voice.write_bytes(b"one")
    digests = file_digests.FileDigests()
    clock.now -= DAY
    first = digests.digest(str(voice))
    about = voice.stat()
    voice.write_bytes(b"two")
    os.utime(voice, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert digests.digest(str(voice)) != first


def test_a_budget_is_kept_by_a_clock_that_only_goes_forwards(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seen: list[Event]
) -> None:
    """Time limits and budgets must not read the wall clock at all."""
    from accelerate_tts.errors import TimeLimitError
    from accelerate_tts.runtime import time_limit

    def jumping() -> None:
        while True:
            clock.now -= DAY
            time_limit.time.sleep(0.001)

    with pytest.raises(TimeLimitError):
        time_limit.within(0.02, "x", jumping)
