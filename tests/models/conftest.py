"""Contract that every system must satisfy, with upstream's classes at small size from the examples.

A system's file declares how it is made, how it speaks and which parts it has. `contract` and `steady` do the rest.
Here every change that is right counts as faster: which of them would be kept is the machine's business, and a test that
left it to the clock would show something else each time. Whether timing is right is what tests/tuning is about.
"""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packaging.version import Version

from accelerate_tts import Event, optimized_model, own_random
from accelerate_tts.device.detect import DeviceInfo
from accelerate_tts.device.half_dtypes import half_dtypes
from accelerate_tts.events import FellBack, Recompiled
from accelerate_tts.models import describe
from accelerate_tts.optimizer import get_performance_optimizer
from accelerate_tts.patching.change import BaseChange
from accelerate_tts.plan import PROCESS, ModelPlan, Part
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.tuning.compare import TOLERANCES, compare
from accelerate_tts.tuning.limits import Limits
from accelerate_tts.tuning.warmup import Loaded, warmup_calls
from doubles import is_faster, tune

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.receipts.receipt import Receipt
    from accelerate_tts.stages.protocol import Stage

EXAMPLES = Path(__file__).parents[2] / "examples"
Speak = Callable[[Any], Any]


UPSTREAMS = {"chatterbox_backend": "chatterbox", "xtts_backend": "TTS", "mms_backend": "transformers",
             "higgs_backend": "transformers", "voice_clone_service": "resemblyzer"}  # fmt: skip


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports an example; the test is skipped where its upstream is not installed, or has not that model yet."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        upstream = pytest.importorskip(UPSTREAMS[name])
        if name == "higgs_backend" and Version(upstream.__version__) < Version("5.3"):
            pytest.skip(f"transformers {upstream.__version__} has no Higgs Audio v2; 5.3 brought it")
        return importlib.import_module(name)

    return load


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """Keep every correct change on every part, without timing it; compile nothing."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")  # minutes; `steady` compiles, and tests/stages does
    decide(compare=is_faster, looks=False, unworthy=lambda *_given: None)


@pytest.fixture
def only_growing(clockless: None, decide: Any, layered_caches: None) -> None:
    """Try only the growing cache, for properties of any tuning that need not wait for all stages."""
    decide(unworthy=lambda *given: None if given[-1].name == "growing cache" else "not in this test")


class Wrong(BaseChange):
    """Spoils the weights of a part."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._weights = [parameter.detach().clone() for parameter in module.parameters()]

    def on(self) -> None:
        with torch.no_grad():
            for parameter in self._module.parameters():
                parameter.mul_(1.1)

    def off(self) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._module.parameters(), self._weights, strict=True):
                parameter.copy_(weight)


class WrongStage(BaseStage):
    name = "spoiled weights"

    def applies(self, part: Part) -> str | None:
        return None

    def prepare(self, part: Part) -> Wrong:
        return Wrong(part.module)


def said(subject: Any, speak: Speak) -> Any:
    torch.manual_seed(1)
    with torch.inference_mode():
        return speak(subject)


def in_two_threads(subject: Any, ways: Sequence[Speak]) -> None:
    """Run every way of speaking in two threads, in different orders; both get the serial result."""

    def alone(number: int) -> Any:
        with own_random(number), torch.inference_mode():
            return ways[number](subject)

    together = Barrier(2)

    def thread(order: Iterable[int]) -> list[Any]:
        together.wait(60)
        return [alone(number) for number in order]

    serial = [alone(0), alone(1)]
    assert compare(serial[0], alone(0)).error == 0.0, "it does not repeat by itself: nothing can be seen"
    with ThreadPoolExecutor(2) as pool:
        forwards, backwards = pool.map(thread, ([0, 1, 0, 1], [1, 0, 1, 0]))
    for got, expected in zip([*forwards, *backwards], [*serial, *serial, *serial[::-1], *serial[::-1]], strict=True):
        assert compare(expected, got).error <= EXACT_TOLERANCE


def put(subject: Any, part: Part, module: nn.Module) -> Any:
    """The subject with another module as that part; the module itself where the part is the whole."""
    *path, name = part.name.split(".")
    if part.module is subject:
        return module
    setattr(functools.reduce(getattr, path, subject), name, module)
    return subject


def pickled(module: nn.Module) -> nn.Module | str:
    """Return a module after pickling; the reason where torch or a hook of upstream's does not allow it."""
    try:
        return pickle.loads(pickle.dumps(module))
    except (AttributeError, RuntimeError, pickle.PicklingError) as error:
        return f"{type(error).__name__}: {error}"


def classes_of(module: nn.Module) -> list[tuple[str, ...]]:
    """By name, with the classes below: torch makes a class for each parametrized module."""
    return [tuple(cls.__qualname__ for cls in type(inner).__mro__) for inner in module.modules()]


class Checked:
    """A system under test, and its untouched state, which must come back after each check."""

    def __init__(self, make: Callable[[], Any], speak: Speak) -> None:
        torch.manual_seed(0)
        self.make, self.speak = make, speak
        self.subject = make()
        self.plan: ModelPlan = describe(self.subject)
        self.reference = said(self.subject, speak)
        assert compare(self.reference, self.say()).error == 0.0
        self.modules = list(
            {id(module): module for root in self.plan.roots for module in root.modules()}.values()
        )  # fmt: skip
        self.classes = [type(module) for module in self.modules]
        self.states = [{key: value.clone() for key, value in root.state_dict().items()} for root in self.plan.roots]

    def say(self) -> Any:
        return said(self.subject, self.speak)

    def tuned(self, **options: Any) -> Receipt:
        optimized_model(warmup=self.speak, tune_seconds=300.0, **options)(lambda: self.subject)()
        receipt = get_performance_optimizer().receipt(self.subject)
        assert receipt is not None
        return receipt

    def same_weights(self) -> None:
        for root, old in zip(self.plan.roots, self.states, strict=True):
            now = root.state_dict()
            assert list(now) == list(old)
            assert all(torch.equal(now[key], old[key]) for key in old)

    def undone(self) -> None:
        assert get_performance_optimizer().undo(self.subject)
        assert [type(module) for module in self.modules] == self.classes
        assert compare(self.reference, self.say()).error == 0.0
        self.same_weights()

    def rejects(self) -> None:
        """Check that a wrong change of any part is rejected even under the widest limit, that of "fast"."""
        calls = warmup_calls(self.speak, Loaded(self.subject), "inference")
        spoiled = tune(self.plan, calls, [WrongStage()], DeviceInfo("cpu", "test"), Limits(300.0, "fast")).receipt
        # A part that nobody named may be taken apart by where its time goes, which is another matter on each machine.
        unnamed = tuple(f"{part.name}." for part in self.plan.parts if part.kind == "model")
        names = {part.name for part in self.plan.parts}
        tried = [stage.part for stage in spoiled.stages]
        assert all(name in names or name.startswith(unnamed) for name in tried)
        assert all(name in tried or any(t.startswith(f"{name}.") for t in tried) for name in names)
        # Modules inside an unnamed part may be normalised at once, and then no scale can be wrong.
        named = [stage for stage in spoiled.stages if stage.part in names]
        assert all(stage.verdict.startswith("rejected: ") and stage.before is None for stage in named), named
        self.same_weights()

    def copies_are_untouched(self) -> None:
        """A tuned part that is pickled or copied is the part as it was loaded: by its classes, and by what it says."""
        torch.manual_seed(0)
        fresh = self.make()
        said(fresh, self.speak)  # what is filled at the first call
        for part, plain in zip(self.plan.parts, describe(fresh).parts, strict=True):
            copied, by_pickle = copy.deepcopy(part.module), pickled(part.module)
            if isinstance(by_pickle, str):
                assert by_pickle == pickled(plain.module)
            for made in [copied] if isinstance(by_pickle, str) else [copied, by_pickle]:
                assert classes_of(made) == classes_of(plain.module)
                assert list(made.state_dict()) == list(plain.module.state_dict())
            fresh = put(fresh, plain, copied if isinstance(by_pickle, str) else by_pickle)
        assert compare(self.reference, said(fresh, self.speak)).error == 0.0


@pytest.fixture
def contract(clockless: None) -> Callable[..., None]:
    """Check one system in every respect but compiling.

    Its arguments: how it is made, how it speaks, its parts with their kinds; another way of speaking, for the second
    thread (the same with other random numbers if not given); the stages that must be right on a part; and whether
    upstream's own code may be called by two threads at once.
    """

    def check(
        make: Callable[[], Any],
        speak: Speak,
        parts: list[tuple[str, str]],
        other: Speak | None = None,
        right: Iterable[tuple[str, str]] = (),
        *,
        threads: bool = True,
    ) -> None:
        system = Checked(make, speak)
        assert [(part.name, part.kind) for part in system.plan.parts] == parts
        system.rejects()
        receipt = system.tuned()
        kept = {(stage.part, stage.stage) for stage in receipt.kept}
        # Fused blocks let the caches grow by themselves, where there are kernels.
        fused = {(part, "growing cache") for part, stage in kept if stage.startswith("fused decoder blocks")}
        assert kept | fused >= set(right), receipt
        assert [stage for stage in receipt.kept if stage.part != PROCESS], "nothing was done: nothing is shown"
        assert all(stage.error is None or stage.error <= EXACT_TOLERANCE for stage in receipt.kept)
        assert compare(system.reference, system.say()).error <= EXACT_TOLERANCE
        system.same_weights()
        if threads:
            in_two_threads(system.subject, [speak, other or speak])
        system.copies_are_untouched()
        system.undone()
        for precision in ("balanced", "fast"):
            limit = TOLERANCES[precision]
            receipt = system.tuned(precision=precision)
            if half_dtypes("cpu"):  # otherwise there is nothing but int8, for larger layers than these small ones
                assert {stage.stage for stage in receipt.stages} - {stage for _, stage in kept}, (
                    "nothing else was tried"
                )
            assert all(stage.error is None or stage.error <= limit.error for stage in receipt.kept), receipt
            decides = {part.name for part in system.plan.parts if part.decides}
            inexact = [stage for stage in receipt.kept if stage.part in decides and stage.error]
            assert all(stage.stage.endswith("checked by margin") for stage in inexact), receipt
            assert all((stage.error or 0.0) <= EXACT_TOLERANCE for stage in inexact), receipt
            assert not limit.objection(compare(system.reference, system.say()))
            system.undone()

    return check


LENGTHS = [4, 7, 12, 22, 40, 54]
"""Letters of the sentences that are warmed up, each less than twice the one before (tuning/length_ladder.py)."""


def sentence(letters: int) -> str:
    """A text of so many letters."""
    return ("A quick brown fox jumps over " * 3)[: letters - 1] + "."


@pytest.fixture
def steady(seen: list[Event], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., None]:
    """No recompile over fifty lengths: parts compiled together, warmed up, sealed, then met with fifty sentences.

    Its arguments: how the system is made; the stage of each compiled part; how it speaks a sentence, by upstream's own
    method, tokens to samples; and whether graphs run as dynamo traced them. Which call needs another graph is dynamo's
    to say; what inductor makes of one takes minutes for a whole system, and is compared in tests/stages.
    """

    def check(
        make: Callable[[], Any], stages: dict[str, Stage], speak: Callable[[Any, str], Any], *, traced: bool = False
    ) -> None:
        if traced:
            request.getfixturevalue("uncompiled")
        torch.manual_seed(0)
        subject = make()
        spoken = {letters: functools.partial(speak, text=sentence(letters)) for letters in range(4, 54)}
        compared = list(spoken)[::7]
        expected = {letters: said(subject, spoken[letters]) for letters in compared}
        parts = {part.name: part for part in describe(subject).parts}
        assert not [why for name, stage in stages.items() if (why := stage.applies(parts[name]))]
        changes = [stage.prepare(parts[name]) for name, stage in stages.items()]
        sizes: set[int] = set()
        with ExitStack() as stack:
            for change in changes:
                stack.callback(change.off)
                change.on()
            for letters in LENGTHS:
                said(subject, lambda system, letters=letters: speak(system, sentence(letters)))
            for change in changes:
                change.end_warmup()
            graphs = [change.graphs for change in changes]
            for letters, say in spoken.items():
                result = said(subject, say)
                sizes.add(result.shape[-1])
                assert letters not in expected or compare(expected[letters], result).error <= EXACT_TOLERANCE
            assert [change.graphs for change in changes] == graphs
        assert not [event for event in seen if isinstance(event, (FellBack, Recompiled))]
        assert all(graphs), graphs
        assert len(sizes) >= 25, "a decoder, too, and what voices its tokens, must have met other lengths"

    return check
