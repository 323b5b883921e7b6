"""Parts of real models: which are recorded whole on CUDA, which are cut, and what is in the way.

    python benchmarks/recordable.py [--device cuda] [--markdown] [NAME ...]

Upstream's own classes at small size, with random weights. Without a device each call is traced with tensors that say
that they are on one (no kernel runs, and no address is known), and a recording is stood in for by running again: a row
says what the trace finds, and not that the device would accept it. With `--device cuda` parts are recorded as CUDA
graphs. `before` is the number of operators that the calls of a part start by themselves, or those of the
whole system where the part is called by a method of its own; `after` is how many are
left, with each replay counted as one, without the copies of its inputs and results. The last line is JSON, and so is
one after each system.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from accelerate_tts.cli.bench import systems as benched
from accelerate_tts.errors import described
from accelerate_tts.events import FellBack, hooked
from accelerate_tts.models import describe
from accelerate_tts.plan import CALL, Part
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.stages.graphs import obstacles, recorded_parts
from accelerate_tts.stages.graphs.recorded_parts import PartBounds, RecordedPartsStage
from accelerate_tts.stages.graphs.recorder import GraphRecorder, recording

ROOT = Path(__file__).parents[1]
STRANGERS = (
    "campplus", "bark", "encodec", "dac", "snac", "mimi", "vocos", "bigvgan", "kokoro", "speecht5",
    "fastspeech2-conformer", "univnet", "xcodec", "styletts2", "f5-tts",
)  # fmt: skip
BENCHED = ("mms", "xtts", "voice-clone")

System = tuple[Any, Callable[[], Any]]
"""A model, and what speaks."""


# --- systems ---------------------------------------------------------------------------------------------------------


def _chatterbox(device: str) -> System:
    if device != "cpu":
        return _benched("chatterbox")(device)
    model = importlib.import_module("chatterbox_backend").random(seconds=0.4, tiny=True, variant="english")
    return model, lambda: model.generate("Hello there.")


def _chatterbox_voice(_device: str) -> System:
    from chatterbox.models.voice_encoder import VoiceEncoder

    encoder = VoiceEncoder().eval()
    return encoder, lambda: encoder(torch.randn(2, 160, 40))


def _xtts_speaker(_device: str) -> System:
    from TTS.encoder.models.resnet import ResNetSpeakerEncoder

    encoder = ResNetSpeakerEncoder(
        input_dim=64, proj_dim=512, log_input=True, use_torch_spec=True, audio_config={
            "fft_size": 512, "win_length": 400, "hop_length": 160, "sample_rate": 16000, "preemphasis": 0.97,
            "num_mels": 64,
        },
    ).eval()  # fmt: skip
    wave = torch.randn(1, 16000) / 10
    return encoder, lambda: encoder(wave, l2_norm=True)


def _higgs(_device: str) -> System:
    loaded = importlib.import_module("higgs_backend").random(tiny=True)
    inputs = loaded.prepare("Hello there.")
    return (
        {"model": loaded.model, "codec": loaded.codec},
        lambda: loaded.decode(loaded.model.generate(**inputs, max_new_tokens=14, do_sample=True)),
    )


def _benched(name: str) -> Callable[[str], System]:
    def build(device: str) -> System:
        built = benched.SYSTEMS[name].build("tiny", None, device)
        return built.model, lambda: built.speak(0.4)

    return build


def _stranger(name: str) -> Callable[[str], System]:
    def build(_device: str) -> System:
        made = importlib.import_module("systems").SYSTEMS[name].build()
        return made.model, lambda: _pytree.tree_leaves(_whole(made.call(made.model, *made.inputs[0])))

    return build


def _whole(result: Any) -> Any:
    return list(result) if isinstance(result, Iterator) else result


BUILDERS: dict[str, Callable[[str], System]] = {
    **{name: _benched(name) for name in BENCHED},
    "chatterbox": _chatterbox, "chatterbox-voice": _chatterbox_voice, "xtts-speaker": _xtts_speaker, "higgs": _higgs,
    **{name: _stranger(name) for name in STRANGERS},
}  # fmt: skip


# --- tensors that say that they are on a device ----------------------------------------------------------------------


@contextmanager
def _moved(module: torch.nn.Module, mode: Any) -> Generator[None, None, None]:
    """Put stand-ins on a device in the places of a module's tensors."""
    known: dict[int, Any] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in known:
                known[id(value)] = _fake(value, mode)
            return known[id(value)]
        if type(value) in {list, tuple} and value and all(isinstance(one, torch.Tensor) for one in value):
            return type(value)(map(moved, value))
        return value

    before = []
    for inner in module.modules():
        for place in (vars(inner), inner._parameters, inner._buffers):
            before.append((place, dict(place)))
            place.update({name: moved(value) for name, value in place.items()})
    try:
        yield
    finally:
        for place, content in before:
            place.update(content)


def _fake(tensor: torch.Tensor, mode: Any) -> Any:
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made


def look_on_cuda(run: Any, module: Any, tensors: list[torch.Tensor], length: int | None = None) -> Any:
    """Trace a computation as `look` does, as if all its tensors were on a CUDA device. None is needed."""
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    mode.from_tensor = lambda tensor: tensor  # type: ignore[method-assign, assignment]  # they are the mode's already
    obstacles.fake_tensor = SimpleNamespace(**{**vars(fake_tensor), "FakeTensorMode": lambda **_options: mode})  # type: ignore[assignment]
    try:
        with _moved(module, mode):
            return obstacles.look(run, module, [_fake(tensor, mode) for tensor in tensors], length)
    finally:
        obstacles.fake_tensor = fake_tensor


# --- a recording that runs again -------------------------------------------------------------------------------------


class _Again:
    def __init__(self, run: Callable[[], Any], counts: Replays) -> None:
        self._run, self._counts, mode = run, counts, _Counts()
        with mode:
            self.outputs = run()
        self._operators = mode.number

    def replay(self) -> None:
        self._counts.replays += 1
        self._counts.operators += self._operators
        with recording():  # a graph's replay calls no module
            again = self._run()
        for old, new in zip(_pytree.tree_leaves(self.outputs), _pytree.tree_leaves(again), strict=True):
            if isinstance(old, torch.Tensor) and old is not new:
                old.copy_(new)


@dataclass
class Replays:
    """Replays so far, and the operators in them."""

    replays: int = 0
    operators: int = 0

    def record(self, run: Callable[[], Any]) -> _Again:
        return _Again(run, self)

    def in_turn(self, *, stream: Any = None) -> Any:
        del stream
        return nullcontext()

    def finish(self) -> None:
        pass


class _Counts(TorchDispatchMode):
    """Counts operators that start something while it is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        returned = [one.alias_info for one in function._schema.returns]
        if all(alias is None or alias.is_write for alias in returned):
            self.number += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def _counting(part: Part, counts: _Counts) -> Generator[None, None, None]:
    """Count within the calls of a part."""
    method = "forward" if part.method == CALL else part.method
    cls: Any = type(part.module)
    own, plain, depth = vars(cls).get(method), getattr(cls, method), [0]

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        if module is not part.module or depth[0]:
            return plain(module, *args, **kwargs)
        depth[0] += 1
        try:
            with counts:
                return plain(module, *args, **kwargs)
        finally:
            depth[0] -= 1

    setattr(cls, method, counted)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, method)
        else:
            setattr(cls, method, own)


# --- rows ------------------------------------------------------------------------------------------------------------


def row(part: Part, speak: Callable[[], Any], device: str) -> dict[str, Any] | None:
    """Record a part, and return what became of it; `None` for one that is not tried."""
    counts, before = Replays(), _Counts()
    fake = device == "cpu"
    stage = RecordedPartsStage((lambda _device: counts) if fake else GraphRecorder, bounds=PartBounds(bytes=1 << 32))
    if stage.applies(part) is not None:
        return None
    with _counting(part, before):
        speak()
    is_called = bool(before.number)
    if not is_called:  # or by a method of its own
        with before:
            speak()
    fallen: list[str] = []
    found: list[str] = []
    plain = recorded_parts.look

    def seen(run: Any, module: Any, tensors: Any, length: int | None) -> Any:
        try:
            return (look_on_cuda if fake else plain)(run, module, tensors, length)
        except obstacles.ObstacleError as obstacle:
            if "CUDA driver" not in str(obstacle):
                raise
            return plain(run, module, tensors, length)  # cuDNN asks for the device before it is traced

    def look(run: Any, module: Any, tensors: Any, length: int | None = None) -> Any:
        try:
            return seen(run, module, tensors, length)
        except obstacles.ObstacleError as obstacle:
            found.append(str(obstacle))
            raise

    change = stage.prepare(part)
    recorded_parts.look = look
    try:
        with hooked(lambda event: fallen.append(event.reason) if isinstance(event, FellBack) else None):
            change.on()
            for _ in range(3):  # what is inside a module that is cut is recorded at its next call
                speak()
            counts.replays = counts.operators = 0
            speak()
    finally:
        recorded_parts.look = plain
        graphs, kept = change.kept, list(change._recordings)
        change.off()
    whole = any(node is change._root for node, _ in kept)
    how = "whole" if whole else "in parts" if graphs else "not at all"
    small = "" if found or fallen or graphs else "too few operators" if is_called else "it is not called"
    left = before.number - counts.operators + counts.replays
    return {
        "how": how, "graphs": graphs, "before": before.number, "after": left,
        "obstacles": list(dict.fromkeys([*found, *fallen, *filter(None, [small])])),
    }  # fmt: skip


def rows(name: str, device: str) -> dict[str, Any]:
    """Return the rows of a system's parts by their names."""
    torch.manual_seed(0)
    with torch.device(device) if device != "cpu" else nullcontext():
        model, say = BUILDERS[name](device)

    def speak() -> None:
        with seeded(device), torch.no_grad():
            say()

    with torch.no_grad():
        parts = describe(model).parts
    found = {part.name: row(part, speak, device) for part in parts}
    return {part: made for part, made in found.items() if made is not None}


COLUMNS = 100
SHORT = {
    "_local_scalar_dense": "a value is read",
    "draws random numbers": "random numbers",
    "depends on values": "a size by values",
    "between the host and the device": "a copy from the host",
    "of a tensor that it was given or keeps": "a view is returned",
}
"""Obstacles in a table, by what their text has in it."""


def _short(obstacle: str) -> str:
    place = obstacle.rpartition(" in ")[2] if " in " in obstacle else ""
    known = next((short for text, short in SHORT.items() if text in obstacle), None)
    return obstacle if known is None else f"{known} ({place})" if place else known


def told(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| part | recorded | operators | first in the way |"
    yield "|---|---|---|---|"
    for system, parts in found.items():
        for name, one in parts.items() if isinstance(parts, dict) else []:
            how = f"{one['graphs']} parts" if one["how"] == "in parts" else one["how"]
            why = _short(one["obstacles"][0]) if one["obstacles"] else ""
            begun = f"| {system}: `{name}` | {how} | {one['before']} to {one['after']} | "
            yield f"{begun}{why if len(begun + why) < COLUMNS - 1 else why.partition(' (')[0]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BUILDERS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).parent / "strangers")]
    found: dict[str, Any] = {}
    for name in given.names or BUILDERS:
        package = getattr(importlib.import_module("systems").SYSTEMS.get(name), "package", None)
        missing = [each for each in (package or "").split("+") if each and find_spec(each) is None]
        if missing:
            found[name] = f"{missing[0]} is not installed"
            continue
        try:
            found[name] = rows(name, given.device)
        except Exception as error:  # a system that cannot be built or spoken must not hide the others
            found[name] = described(error)
        print(json.dumps(found), flush=True)
    if given.markdown:
        print("\n".join(told(found)))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
