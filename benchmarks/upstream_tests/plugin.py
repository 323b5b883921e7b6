"""pytest plugin: each transformers model of a test is tuned at its first call in eval mode, and every test is logged.

`run.py` gives it to pytest with `-p plugin`, and tells it by environment variables:

    UPSTREAM_LOG    file to which each test is appended, as a line of JSON
    UPSTREAM_ONLY   file with the names of the tests to run, one a line; all by default
    UPSTREAM_TUNED  1 if models are tuned

Whatever computes the same is kept, whether it is faster or not, since at the size of tests little is faster. The tests
run in a mixed order, the same each time: where the limit comes before the end, those of every kind have run.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import threading
import weakref
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECONDS = 20.0
"""Budget of one tuning. At the size of tests it takes less than a second."""
_LOG = "UPSTREAM_LOG"


# --- tuning -----------------------------------------------------------------------------------------------------------


class Tuner:
    """Tunes each model at its first call from outside; calls inside a call are its parts."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._inside = threading.local()
        self.kept: Counter[str] = Counter()
        self.models = 0
        self.events: Counter[str] = Counter()

    def install(self) -> None:
        """Take the place of the two entry points of transformers' models, calls and `generate`."""
        from transformers import PreTrainedModel
        from transformers.generation import GenerationMixin

        PreTrainedModel.__call__ = self.entry(nn.Module.__call__)  # type: ignore[method-assign]
        GenerationMixin.generate = self.entry(GenerationMixin.generate)  # type: ignore[method-assign]
        init = PreTrainedModel.__init__

        @functools.wraps(init)
        def made(model: Any, *args: Any, **kwargs: Any) -> None:
            for each in type(model).__mro__:
                own = vars(each).get("generate")
                if own is not None and not hasattr(own, "is_tuning_entry"):  # a class's own, as Bark has it
                    each.generate = self.entry(own)  # type: ignore[attr-defined]
            init(model, *args, **kwargs)

        PreTrainedModel.__init__ = made  # type: ignore[method-assign]

    def told(self) -> dict[str, Any]:
        """Return what was tuned since the last time, and forget it."""
        told = {"models": self.models, "kept": dict(self.kept), "events": dict(self.events)}
        self.models, self.kept, self.events = 0, Counter(), Counter()
        return told

    def entry(self, call: Any) -> Any:
        """Return an entry of a model that tunes the model first, at its first call in eval mode."""

        @functools.wraps(call)
        def entry(model: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "on", False) or torch.compiler.is_compiling() or torch.jit.is_tracing():
                return call(model, *args, **kwargs)
            self._inside.on = True
            try:
                if not model.training and model not in self._seen:
                    self._seen.add(model)
                    self._tune(model, call, args, kwargs)
                return call(model, *args, **kwargs)
            finally:
                self._inside.on = False

        entry.is_tuning_entry = True  # type: ignore[attr-defined]
        return entry

    def _tune(self, model: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        from accelerate_tts import add_hook, optimized_model, receipt_of
        from accelerate_tts.events import FellBack, NotApplied
        from accelerate_tts.tuning.policy import current_policy, tuning_policy
        from accelerate_tts.tuning.timing import Timing

        def warmup(loaded: Any) -> Any:
            return call(loaded, *_copied(args), **_copied(kwargs))

        @optimized_model(warmup=warmup, mode="no_grad", tune_seconds=_SECONDS)
        def load() -> Any:
            return model

        def heard(event: Any) -> None:
            if isinstance(event, (FellBack, NotApplied)):
                self.events[str(event)[:200]] += 1

        faster = Timing(before=2.0, after=1.0, ratio=2.0, low=2.0, high=2.0, pairs=5)
        all_of_them: dict[str, Any] = {"compare": lambda *_, **__: faster, "looks": False, "unworthy": lambda *_: None}
        remove = add_hook(heard)
        try:
            with tuning_policy(replace(current_policy(), **all_of_them)):
                load()
        finally:
            remove()
        receipt = receipt_of(model)
        self.models += 1
        self.kept.update(stage.stage for stage in (receipt.kept if receipt else ()))


def _copied(value: Any) -> Any:
    """Copy the arguments of a call, which may write into them; modules and what cannot be copied stay as they are.

    An object that can be called is copied, too: a logits processor may count its calls.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (nn.Module, type)):
        return value
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(_copied(item) for item in value)
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever a test gives: then the call gets its own object
        return value


# --- the log ----------------------------------------------------------------------------------------------------------


class _Log:
    def __init__(self, path: Path, tuner: Tuner | None) -> None:
        self._path = path
        self._tuner = tuner
        self._reports: dict[str, Any] = {}

    def _write(self, **facts: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        only = os.environ.get("UPSTREAM_ONLY")
        wanted = set(Path(only).read_text(encoding="utf-8").splitlines()) if only else None
        kept = [item for item in items if wanted is None or _name(item.nodeid) in wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = sorted(kept, key=lambda item: zlib.crc32(_name(item.nodeid).encode()))
        self._write(collected=[_name(item.nodeid) for item in items])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write(begins=_name(item.nodeid))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self._reports.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
        known["seconds"] = round(known["seconds"] + report.duration, 3)
        if report.outcome != "passed" and known["outcome"] == "passed":
            known["why"] = _why(report)
            known["outcome"] = "stopped" if known["why"].startswith("Failed: Timeout") else report.outcome
            known["text"] = report.longreprtext[-6000:] if report.failed else ""
        if report.when == "teardown":
            told = {} if self._tuner is None else self._tuner.told()
            self._write(test=_name(report.nodeid), **self._reports.pop(report.nodeid), **told)


def _name(nodeid: str) -> str:
    """The class and the test, without the file."""
    return nodeid.partition("::")[2]


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:200]
    lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines or report.longreprtext.splitlines()[-1:] or [""])[0][:300]


def pytest_configure(config: pytest.Config) -> None:
    """Register the log and, for the tuned run, the tuner."""
    path = os.environ.get(_LOG)
    if path is None:
        return
    tuner = None
    if os.environ.get("UPSTREAM_TUNED") == "1":
        tuner = Tuner()
        tuner.install()
    config.pluginmanager.register(_Log(Path(path), tuner), "upstream-log")
